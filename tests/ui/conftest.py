"""Fixtures: a workspace with a written history, and the app over it without a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.worker import WorkerCancelled, WorkerFailed

from synth_agent.ui.app import SynthAgentApp
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.workspace import Workspace
from tests.ui.folder_backend import FolderBackend
from tests.ui.notebook import finished_run, make_workspace


@pytest.fixture
def empty(tmp_path: Path) -> FolderBackend:
    """A workspace without any run."""
    return FolderBackend(make_workspace(tmp_path / "notebook"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with a baseline and a better run."""
    made = make_workspace(tmp_path / "notebook")
    baseline = finished_run(made, 1, "baseline", None, (20, 14), "baseline")
    finished_run(made, 2, "similarity", baseline, (29, 22), "better")
    return made


@pytest.fixture
def backend(workspace: Workspace) -> FolderBackend:
    """The backend over that workspace."""
    return FolderBackend(workspace)


Open = Callable[..., AbstractAsyncContextManager[Pilot[int]]]


@pytest.fixture
def open_app() -> Open:
    """Open the app over a backend without a terminal."""

    def opened(
        backend: WorkspaceBackend, size: tuple[int, int] = (120, 40)
    ) -> AbstractAsyncContextManager[Pilot[int]]:
        return SynthAgentApp(backend).run_test(size=size)

    return opened


async def settle(pilot: Pilot[int]) -> None:
    """Wait until no thread works and all messages were handled."""
    for _ in range(3):
        # A thread that fails is what some tests are about, and one may outlive its screen.
        with suppress(WorkerCancelled, WorkerFailed):
            await pilot.app.workers.wait_for_complete()
        await pilot.pause()


def seen(pilot: Pilot[int]) -> str:
    """Return what is on the screen, in one line."""
    rows = pilot.app.screen._compositor.render_strips()  # noqa: SLF001
    return re.sub(r"\s+", " ", " ".join(strip.text for strip in rows))
