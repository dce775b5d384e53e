"""The outermost edge of the stages' programs: what decides the exit code, and what is told."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from synth_agent.errors import Busy, InvalidInput
from synth_agent.stages import analyze
from synth_agent.stages.program import run_program
from synth_agent.stages.progress import StageProgress

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def _told(path: Path) -> list[dict[str, str]]:
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [line["error"] for line in lines if "error" in line]


def _stopped_in_native_code(number: int) -> None:
    """Send a signal to this process, and put another error in the place of the one it raises."""
    try:
        os.kill(os.getpid(), number)
    except BaseException as error:
        raise RuntimeError("a callback failed") from error


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_program(tmp_path: Path, number: int, code: int) -> None:
    def work(progress: StageProgress) -> int:
        os.kill(os.getpid(), number)
        return 0

    assert run_program("Failed", tmp_path / "progress", work) == code
    assert _told(tmp_path / "progress") == []


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("last", [RuntimeError("lost"), InvalidInput("Bad", "row 3")])
def test_a_signal_decides_though_its_exception_was_replaced(
    tmp_path: Path, number: int, code: int, last: Exception
) -> None:
    def work(progress: StageProgress) -> int:
        try:
            _stopped_in_native_code(number)
        except RuntimeError as error:
            raise last from error
        return 0

    assert run_program("Failed", tmp_path / "progress", work) == code
    assert _told(tmp_path / "progress") == []


@pytest.mark.parametrize(
    ("error", "code", "title", "message"),
    [
        (InvalidInput("Bad recipe", "line 3"), 2, "Bad recipe", "line 3"),
        (Busy("At work", "it is held"), 3, "At work", "it is held"),
        (KeyError("text"), 1, "Scoring failed", "KeyError: 'text'"),
    ],
)
def test_an_error_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    title: str,
    message: str,
) -> None:
    def work(progress: StageProgress) -> int:
        raise error

    assert run_program("Scoring failed", tmp_path / "progress", work) == code
    [told] = _told(tmp_path / "progress")
    assert (told["title"], told["message"]) == (title, message)
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_named_behind_the_error_of_a_library(tmp_path: Path) -> None:
    def work(progress: StageProgress) -> int:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise ValueError("cannot close the writer")  # noqa: B904  as libraries do

    assert run_program("Failed", tmp_path / "progress", work) == 1
    [told] = _told(tmp_path / "progress")
    assert "No space left on device" in told["message"]
    assert "cannot close the writer" in told["message"]


def test_the_end_of_the_work_is_the_exit_code_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    assert run_program("Failed", None, lambda progress: 1) == 1
    assert run_program("Failed", None, lambda progress: 0) == 0
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_an_earlier_signal_is_forgotten() -> None:
    def stop(progress: StageProgress) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    def fail(progress: StageProgress) -> int:
        raise ValueError("an error of its own")

    assert run_program("Failed", None, stop) == 143
    assert run_program("Failed", None, fail) == 1


@pytest.fixture
def analysis_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The analysis of three samples by their pictures' hashes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synth.yaml").write_text("goal: test\n")
    records = []
    for number in range(3):
        Image.new("RGB", (8, 8), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
        records.append({"id": f"s{number}", "images": [f"{number}.png"], "text": "<__dj__image> a"})
    (tmp_path / "seed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "operators.json").write_text(json.dumps([["picture_hashes", {}]]))
    flags = {
        "seed": "seed.jsonl",
        "images": ".",
        "operators": "operators.json",
        "statistics": "statistics",
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return lambda: analyze.main(arguments)


def test_a_stopped_analysis_blames_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, analysis_of_pictures: Callable[[], int]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(analyze, "hash_file", lambda path: _stopped_in_native_code(signal.SIGTERM))
        assert analysis_of_pictures() == 143
    assert not list(tmp_path.glob("statistics/columns/*/part-*"))
    assert analysis_of_pictures() == 0
    assert list(tmp_path.glob("statistics/columns/*/part-*"))
