"""A program of the stages run outside a run: its log, its progress and the error that it told of.

Runs have a process of their own for that, `synth_agent.worker`, which also keeps their events.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synth_agent.errors import (
    EXIT_INVALID,
    EXIT_OK,
    EXIT_RETRY,
    Busy,
    InvalidInput,
    SynthAgentError,
)
from synth_agent.workspace import Workspace, stage_environment

POLL_SECONDS = 0.2
_KINDS = {EXIT_INVALID: InvalidInput, EXIT_RETRY: Busy}


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    exit_code: int
    """Negative for the signal that killed it."""
    told: SynthAgentError | None
    """The error that it wrote to its progress file."""
    log: Path

    @property
    def succeeded(self) -> bool:
        return self.exit_code == EXIT_OK

    def error(self, title: str) -> SynthAgentError:
        """Return what it told of, or where to look, under a title, when it told of nothing."""
        return self.told or SynthAgentError(title, f"exit code {self.exit_code}", f"see {self.log}")


def run_stage(
    workspace: Workspace,
    command: Sequence[str],
    progress: Path,
    log: Path,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a program of the stages from the workspace's root and wait for its end.

    Args:
        workspace: Where it works, and whose settings give its environment.
        command: The program and its arguments.
        progress: The file that its arguments name for progress; an earlier one is removed.
        log: File that its output is appended to; its folder exists.
        report: Called with each record of its progress.
        is_cancelled: Asked several times a second; the program is stopped when it says so.
    """
    progress.unlink(missing_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=workspace.root,
            env=stage_environment(workspace),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            told = _follow(process, progress, report, is_cancelled)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if told is None:
        return Ended(code, None, log)
    kind = _KINDS.get(code, SynthAgentError)
    return Ended(code, kind(told["title"], told["message"], told["hint"]), log)


def _follow(
    process: subprocess.Popen[bytes],
    progress: Path,
    report: Callable[[Mapping[str, Any]], None],
    is_cancelled: Callable[[], bool],
) -> Mapping[str, str] | None:
    """Report the program's progress until it ends; return the error that it told of last."""
    lines, told = _Lines(progress), None
    while True:
        has_ended = _has_ended(process)
        for record in lines.read():
            if "error" in record:
                told = record["error"]
            else:
                report(record)
        if has_ended or is_cancelled():
            return told


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


class _Lines:
    """The complete JSON lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records that were added since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            yield json.loads(line)
