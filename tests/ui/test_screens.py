"""The main screens at two sizes against committed ones: what they say, where, and nothing cut off.

Renew with `RENEW_SCREENS=1 pytest tests/ui/test_screens.py`. With SCREENS_AS_SVG=FOLDER the pictures
themselves are written there.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from synth_agent.planner.conversation import Conversation
from synth_agent.runs import Prediction, Proposal
from synth_agent.workspace import Workspace
from tests.planner_world import Scripted
from tests.ui import screens
from tests.ui.conftest import Open, settle
from tests.ui.folder_backend import FolderBackend
from tests.ui.notebook import Writer, finished_run, make_workspace, proposal_for
from tests.ui.screens import check_screen, lines_of

SIZES = [(80, 24), (160, 48)]
ANSWER = (
    "The similarity filter gained on both benchmarks; one seed each, so the gain on MMBench may be luck.\n\n"
    "1. Repeat 0002-similarity with another seed.\n2. Then try `words` with it."
)


class Notebook(FolderBackend):
    """A written history, a live run, a proposal with predictions, and a scripted model."""

    talk: Conversation | None = None

    def next_proposal(self) -> Proposal | None:
        proposal = super().next_proposal()
        assert proposal is not None
        return replace(
            proposal,
            hypothesis="What the recipe does (caption length) makes the model better on TextVQA.",
            refuted_by="A mean difference on TextVQA at or below zero over two seeds.",
            predictions=(
                Prediction("textvqa", 1.9, -0.7, 4.4, "built-in model"),
                Prediction("mmbench", 0.4, -5.2, 6.1, "built-in model"),
            ),
        )

    def conversation(self) -> Conversation | None:
        if self.talk is None:
            history = (list(self.notebook().runs), ())
            self.talk = Conversation(self._workspace, Scripted.of(ANSWER), lambda _: history)
        return self.talk

    def planner_words(self) -> str:
        return "tiny-vl, 5,120 of 500,000 tokens today"


@pytest.fixture
def backend(tmp_path: Path) -> Notebook:
    workspace = make_workspace(tmp_path / "notebook")
    baseline = finished_run(workspace, 1, "baseline", None, (20, 14), "baseline")
    finished_run(workspace, 2, "similarity", baseline, (29, 22), "better")
    return Notebook(workspace)


def make_live(workspace: Workspace) -> str:
    """Write a run in the middle of its first training stage and return its id."""
    for number in range(11, 19):
        finished_run(workspace, number, "words", None, (number, number), "baseline")
    run = Writer(workspace, 3, proposal_for(workspace, "words", "0001-baseline"))
    run.start()
    run.stage("process", {"kept": 204, "seed_samples": 300})
    run.event("stage_started", stage="pretrain", key="k", pid=1, pid_started=0.0, command=[])
    run.losses("pretrain", 24, 40)
    run.log("pretrain", "".join(f"step {step} of 40\n" for step in range(18, 25)))
    return run.id


async def still_picture(pilot: Pilot[int], size: tuple[int, int]) -> str:
    """Return the picture of the screen once its text does not change any more."""
    seen: list[list[str]] = []
    while len(seen) < 3 or not seen[-1] == seen[-2] == seen[-3]:
        assert len(seen) < 40, "the screen does not come to rest"
        await settle(pilot)
        await pilot.pause(0.1)
        picture = pilot.app.export_screenshot(title="synth-agent")
        seen.append(lines_of(picture, size))
    return picture


async def home(pilot: Pilot[int]) -> None:
    """Home is where the app begins."""


async def gate(pilot: Pilot[int]) -> None:
    await pilot.press("p")


async def live(pilot: Pilot[int]) -> None:
    await pilot.press("2")
    for _ in range(200):  # the early verdict is read after the screen was drawn
        await settle(pilot)
        if pilot.app.screen.query_one("#early").display:
            return
        await pilot.pause(0.05)
    raise AssertionError("no early verdict was shown")


async def results(pilot: Pilot[int]) -> None:
    await pilot.press("3")


async def history(pilot: Pilot[int]) -> None:
    await pilot.press("4")


async def planner(pilot: Pilot[int]) -> None:
    await pilot.press("6")
    await settle(pilot)
    pilot.app.screen.query_one(Input).value = "what helped so far?"
    await pilot.press("enter")


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "160x48"])
@pytest.mark.parametrize("go", [home, gate, live, results, history, planner])
async def test_a_screen_is_as_committed(
    backend: Notebook,
    open_app: Open,
    size: tuple[int, int],
    go: Callable[[Pilot[int]], Awaitable[None]],
) -> None:
    if go is live:
        backend.live = make_live(backend._workspace)
    if go is home or go is gate:
        backend.conversation = lambda: None  # type: ignore[method-assign]
    async with open_app(backend, size) as pilot:
        await settle(pilot)
        await go(pilot)
        svg = await still_picture(pilot, size)
        backend.live = None
    name = f"{go.__name__}-{size[0]}x{size[1]}"
    if folder := os.environ.get("SCREENS_AS_SVG"):
        Path(folder, f"{name}.svg").write_text(svg, encoding="utf-8")
    lines = lines_of(svg, size)
    assert len(lines) == size[1]
    check_screen(name, lines)


def test_a_changed_screen_fails_with_its_difference_and_how_to_renew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screens, "FOLDER", tmp_path / "screens")
    monkeypatch.setenv(screens.RENEW, "1")
    check_screen("one", ["Goal", "│ 40.0 │"])
    monkeypatch.delenv(screens.RENEW)
    check_screen("one", ["Goal", "│ 40.0 │"])
    with pytest.raises(AssertionError) as raised:
        check_screen("one", ["Goal", "│ 41.0 │"])
    assert "-│ 40.0 │\n+│ 41.0 │" in str(raised.value)
    assert "RENEW_SCREENS=1" in str(raised.value)
    with pytest.raises(AssertionError, match="has changed"):
        check_screen("never seen", ["Goal"])


def test_texts_that_overlap_or_leave_the_screen_are_no_screen() -> None:
    def picture(*pieces: tuple[int, float, str]) -> str:
        texts = "".join(
            f'<text x="{12.2 * x}" clip-path="url(#terminal-1-line-{row})">{text}</text>'
            for row, x, text in pieces
        )
        return f'<svg xmlns="http://www.w3.org/2000/svg">{texts}</svg>'

    assert lines_of(picture((0, 2, "ab"), (1, 0, "中c")), (5, 2)) == ["  ab", "中c"]
    assert lines_of(picture((0, 0, "0123456789abcdef")), (16, 1)) == ["0" * 16]
    for pieces in [((0, 0, "ab"), (0, 1, "c")), ((0, 4, "ab"),), ((2, 0, "a"),)]:
        with pytest.raises(ValueError, match="does not fit"):
            lines_of(picture(*pieces), (5, 2))
