"""Programs of the stages run outside a run: progress, the error they told of, and stopping them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from synth_agent.errors import Busy, InvalidInput, SynthAgentError
from synth_agent.stage_process import Ended, run_stage
from synth_agent.workspace import Workspace, open_workspace, stage_environment

ERROR = {"title": "Bad recipe", "message": "line 3", "hint": "fix it"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "synth.yaml").write_text("goal: test\n")
    return open_workspace(tmp_path)


def _program(code: str, *records: Mapping[str, Any]) -> list[str]:
    """Return a program that writes records to `progress` and then does something."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return [sys.executable, "-c", f"open('progress', 'a').write({lines!r})\n{code}"]


def _run(workspace: Workspace, command: list[str], **options: Any) -> Ended:
    root = workspace.root
    return run_stage(workspace, command, root / "progress", root / "log", **options)


def test_progress_is_reported_and_the_log_kept(workspace: Workspace) -> None:
    (workspace.root / "progress").write_text(json.dumps({"error": ERROR}) + "\n")
    records = [{"step": step, "total": 2} for step in range(3)]
    seen: list[Mapping[str, Any]] = []
    for _ in range(2):
        ended = _run(workspace, _program("print('done')", *records), report=seen.append)
        assert (ended.succeeded, ended.exit_code, ended.told) == (True, 0, None)
    assert seen == records * 2
    assert (workspace.root / "log").read_text() == "done\n" * 2


@pytest.mark.parametrize(
    ("code", "kind"), [(1, SynthAgentError), (2, InvalidInput), (3, Busy), (9, SynthAgentError)]
)
def test_the_error_that_it_told_of_keeps_its_kind(
    workspace: Workspace, code: int, kind: type[SynthAgentError]
) -> None:
    ended = _run(workspace, _program(f"raise SystemExit({code})", {"step": 1}, {"error": ERROR}))
    error = ended.error("Processing failed")
    assert not ended.succeeded
    assert type(error) is kind
    assert error.as_dict() == ERROR


def test_a_program_that_told_of_nothing_leaves_its_log(workspace: Workspace) -> None:
    ended = _run(workspace, _program("import os\nprint('oh', flush=True)\nos.abort()", {"step": 1}))
    error = ended.error("Scoring failed")
    assert (error.title, error.message) == ("Scoring failed", f"exit code {-signal.SIGABRT}")
    assert Path(error.hint.removeprefix("see ")).read_text().startswith("oh")


def test_it_is_stopped_when_cancelled(workspace: Workspace) -> None:
    seen: list[Mapping[str, Any]] = []
    slow = _program("import time\ntime.sleep(60)", {"step": 1})
    started = time.monotonic()
    ended = _run(workspace, slow, report=seen.append, is_cancelled=lambda: bool(seen))
    assert time.monotonic() - started < 30
    assert ended.exit_code == -signal.SIGTERM
    assert seen == [{"step": 1}]


def test_it_does_not_outlive_an_error_of_its_caller(workspace: Workspace) -> None:
    def report(record: Mapping[str, Any]) -> None:
        raise KeyError("step")

    slow = _program("import time\ntime.sleep(60)", {"step": 1})
    started = time.monotonic()
    with pytest.raises(KeyError):
        _run(workspace, slow, report=report)
    assert time.monotonic() - started < 30


def test_a_file_in_the_workspace_is_no_module(workspace: Workspace) -> None:
    (workspace.root / "shlex.py").write_text("raise SystemExit('imported')\n")
    program = "import shlex, sys\nprint(shlex.quote('a b'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=workspace.root,
        env=stage_environment(workspace),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, "'a b'\n")
