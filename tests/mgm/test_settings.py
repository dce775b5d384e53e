"""Settings from defaults, file and flags, and the exit codes of a program."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mgm.errors import InputError
from mgm.program import run_program
from mgm.progress import Progress
from mgm.settings import parse_settings


@dataclass(frozen=True)
class Example:
    name: str = field(metadata={"help": "a name"})
    lr: float = 1e-3
    steps: int | None = None
    folder: Path | None = None
    shuffle: bool = True
    mode: Literal["fast", "slow"] = "fast"


def parse(*arguments: str) -> Example:
    return parse_settings(Example, arguments, program="example", description="Example.")


def test_defaults_file_and_flags_win_in_that_order(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("name: file\nlr: 2e-5\nsteps: 7\nfolder: a/b\nshuffle: false\n")
    assert parse("--name", "x") == Example("x")
    assert parse("--config", str(config)) == Example("file", 2e-5, 7, Path("a/b"), False)
    merged = parse("--config", str(config), "--lr", "1", "--shuffle", "--mode", "slow")
    assert merged == Example("file", 1.0, 7, Path("a/b"), True, "slow")
    assert isinstance(merged.lr, float)


def test_null_in_the_file_means_none(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"name": "x", "steps": None}))
    assert parse("--config", str(config)).steps is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nme: x", "key 'nme'"),
        ("name: x\nsteps: 1.5", "key 'steps': 1.5"),
        ("name: x\nsteps: true", "key 'steps': True"),
        ("name: x\nshuffle: 1", "key 'shuffle': 1"),
        ("name: [x]", "key 'name': ['x']"),
        ("name: x\nmode: medium", "Give one of fast, slow"),
        ("name: null", "key 'name': None"),
        ("lr: 1", "--name is needed"),
        ("just a text", "has no keys"),
        ("a: [", "config.yaml"),
    ],
)
def test_bad_file_names_file_key_and_fix(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(InputError) as caught:
        parse("--config", str(config))
    assert message in str(caught.value)
    assert caught.value.hint


def test_bad_flag_names_the_flag() -> None:
    with pytest.raises(InputError, match="--steps: 'many'"):
        parse("--name", "x", "--steps", "many")


def test_flags_may_not_be_abbreviated() -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--name", "x", "--step", "3")
    assert caught.value.code == 2


def run(error: BaseException | None, progress_file: Path | None = None) -> int:
    def work(settings: Example, progress: Progress) -> None:
        if error is not None:
            raise error

    return run_program(lambda: Example("x"), lambda settings: progress_file, work)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "progress.jsonl"
    assert run(None) == 0
    assert run(KeyboardInterrupt()) == 130
    assert run(InputError("Title", "file, field", "do this"), path) == 2
    assert capsys.readouterr().err == "Title: file, field\ndo this\n"
    recorded = json.loads(path.read_text())["error"]
    assert recorded == {"title": "Title", "message": "file, field", "hint": "do this"}
    with pytest.raises(RuntimeError):
        run(RuntimeError())


def test_a_path_that_cannot_be_used_is_told_as_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, progress = tmp_path / "file", tmp_path / "progress.jsonl"
    file.write_text("")

    def work(settings: Example, progress: Progress) -> None:
        (file / "below").mkdir(parents=True)

    assert run_program(lambda: Example("x"), lambda settings: progress, work) == 2
    assert f"{file / 'below'}: Not a directory" in capsys.readouterr().err
    assert json.loads(progress.read_text())["error"]["title"] == "Cannot use a path"
    assert run(None, tmp_path) == 2
    assert f"{tmp_path}: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_even_behind_the_error_of_a_library(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
    hidden.__context__ = OSError(number, os.strerror(number))
    assert run(hidden) == 1
    assert capsys.readouterr().err == f"{os.strerror(number)}: output\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_decides_the_exit_code_whatever_native_code_makes_of_it(
    number: signal.Signals, code: int
) -> None:
    def work(settings: Example, progress: Progress) -> None:
        try:
            signal.raise_signal(number)
        except SystemExit as stopped:
            raise ValueError("what a reader of weights says instead") from stopped

    before = signal.getsignal(number)
    assert run_program(lambda: Example("x"), lambda settings: None, work) == code
    assert signal.getsignal(number) == before
