"""A git workspace in a temporary folder, and no network."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import ImageFile

from synth_agent.workspace import Workspace, open_workspace


@pytest.fixture(autouse=True, scope="session")
def hear_interrupts() -> None:
    """A shell starts what runs in its background deaf to interrupts, which some tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let local sockets connect and nothing else."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError("tests have no network")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def refuse_half_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what importing Data-Juicer in a test's process does to Pillow."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(autouse=True, scope="module")
def end_warm_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """End the warm Data-Juicers of the workspaces that a file's tests made."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    for process in psutil.process_iter(["cmdline", "cwd"]):
        is_worker = "synth_agent.stages.warm_worker" in (process.info["cmdline"] or ())
        if is_worker and str(process.info["cwd"]).startswith(base):
            process.kill()


@pytest.fixture
def git_workspace(tmp_path: Path) -> Workspace:
    """A committed workspace with an identity of its own."""
    root = tmp_path / "workspace"
    root.mkdir()
    (root / "synth.yaml").write_text("goal: test\n")
    (root / ".gitignore").write_text("artifacts/\n")
    for command in (
        ["init", "-q", "-b", "main"],
        ["config", "user.name", "Test"],
        ["config", "user.email", "test@localhost"],
        ["add", "."],
        ["commit", "-q", "-m", "start"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    return open_workspace(root)
