"""The warm worker, with the real Data-Juicer in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from synth_agent.stages.warm import LOCK, LOG, SOCKET, start_warm
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]
WORDS = {"words_num_filter": {"min_num": 5, "max_num": 9, "num_proc": 0}}
SLOW = {"character_repetition_filter": {"rep_len": 3, "max_ratio": 1.0, "num_proc": 0}}
NUM_SLOW = 800
SLOW_CHARACTERS = 10_000


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace of samples without pictures: a small seed set and one that takes seconds."""
    root = tmp_path_factory.mktemp("warm")
    (root / "synth.yaml").touch()
    seeds = root / "data"
    seeds.mkdir()
    for name, count, characters in (("seed", 40, 0), ("slow", NUM_SLOW, SLOW_CHARACTERS)):
        texts = [f"{'word ' * (i % 12)}{'x' * characters}{i} <|__dj__eoc|>" for i in range(count)]
        rows = [{"id": f"s{i}", "images": [], "text": text} for i, text in enumerate(texts)]
        (seeds / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        turns = [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "so"}]
        original = [{"id": row["id"], "conversations": turns} for row in rows]
        (seeds / f"{name}.json").write_text(json.dumps(original))
    for name, step in (("words", WORDS), ("slow", SLOW)):
        options = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
        (root / f"{name}.yaml").write_text(json.dumps({**options, "process": [step]}))
    yield Workspace(root, Settings())
    shutil.rmtree(root)


def _environment(workspace: Workspace, **more: str) -> dict[str, str]:
    return stage_environment(workspace) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def _start(
    workspace: Workspace,
    output: str,
    recipe: str = "words",
    module: str = "warm",
    environment: dict[str, str] | None = None,
    seed: str = "seed",
) -> subprocess.Popen[bytes]:
    folder = workspace.root / output
    flags = {
        "recipe": f"{recipe}.yaml",
        "seed": f"data/{seed}.jsonl",
        "images": "data",
        "original": f"data/{seed}.json",
        "output": str(folder),
        "progress": f"{folder}.progress",
    }
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    with _log(workspace, output).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"synth_agent.stages.{module}", *arguments],
            cwd=workspace.root,
            env=environment or _environment(workspace),
            stdout=log,
            stderr=log,
        )


def _log(workspace: Workspace, output: str) -> Path:
    return workspace.root / f"{output}.log"


def _run(workspace: Workspace, output: str, *arguments: Any, **options: Any) -> tuple[int, str]:
    code = _start(workspace, output, *arguments, **options).wait(60)
    return code, _log(workspace, output).read_text()


def _workers(workspace: Workspace) -> list[psutil.Process]:
    """Return the workspace's worker processes and their forks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(workspace.root) and "warm_worker" in str(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _worker(workspace: Workspace) -> psutil.Process:
    [worker] = [p for p in _workers(workspace) if p.ppid() not in map(_pid, _workers(workspace))]
    return worker


def _pid(process: psutil.Process) -> int:
    return int(process.pid)


def _wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def _start_slow(workspace: Workspace, output: str) -> subprocess.Popen[bytes]:
    """Start a stage and return when its operator is at work."""
    process = _start(workspace, output, "slow", seed="slow")
    progress = workspace.root / f"{output}.progress"
    _wait_for(lambda: progress.exists() and "character_repetition" in progress.read_text(), 60)
    return process


def test_forks_give_what_a_process_of_its_own_gives(workspace: Workspace) -> None:
    assert _run(workspace, "own", module="process")[0] == 0
    for output in ("first", "second"):
        code, log = _run(workspace, output)
        assert (code, "not run by" in log) == (0, False), log
        assert "words_num_filter" in log
        for name in ("processed.jsonl", "processed.json", "rows.json"):
            own = (workspace.root / "own" / name).read_bytes()
            assert (workspace.root / output / name).read_bytes() == own
        told = json.loads((workspace.root / output / "result.json").read_text())
        assert 0 < told["kept"] < 40
    assert len(_workers(workspace)) == 1
    mode = (workspace.root / SOCKET).stat().st_mode
    assert stat.S_ISSOCK(mode) and not mode & 0o077


def test_one_worker_a_workspace_however_often_it_is_started(workspace: Workspace) -> None:
    _run(workspace, "again")
    before = _worker(workspace)
    start_warm(workspace)
    start_warm(workspace)
    assert _workers(workspace) == [before]


def test_errors_keep_their_exit_code_and_words(workspace: Workspace) -> None:
    (workspace.root / "bad.yaml").write_text("process: [")
    code, log = _run(workspace, "bad", "bad")
    assert code == 2
    assert "bad.yaml" in log and "not run by" not in log
    last = (workspace.root / "bad.progress").read_text().splitlines()[-1]
    assert "bad.yaml" in json.loads(last)["error"]["message"]


def test_a_signal_reaches_the_stage(workspace: Workspace) -> None:
    process = _start_slow(workspace, "terminated")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert not (workspace.root / "terminated" / "result.json").exists()
    assert not list((workspace.root / "terminated").iterdir())
    _wait_for(lambda: len(_workers(workspace)) == 1)


def test_a_stage_does_not_outlive_the_process_that_asked_for_it(workspace: Workspace) -> None:
    process = _start_slow(workspace, "killed")
    assert len(_workers(workspace)) == 2
    process.kill()
    process.wait()
    _wait_for(lambda: len(_workers(workspace)) == 1)


def test_a_stage_goes_on_when_the_worker_is_lost(workspace: Workspace) -> None:
    process = _start_slow(workspace, "orphan")
    lost = _worker(workspace)
    lost.kill()
    assert process.wait(60) == 0
    assert json.loads((workspace.root / "orphan" / "result.json").read_text())["kept"] == NUM_SLOW
    _wait_for(lambda: not _workers(workspace))
    code, log = _run(workspace, "after")
    assert (code, "not run by" in log) == (0, False), log
    assert _worker(workspace).pid != lost.pid


def test_a_crashed_stage_is_run_anew_and_its_worker_replaced(workspace: Workspace) -> None:
    process = _start_slow(workspace, "crashed")
    before = _worker(workspace)
    [stage] = [p for p in _workers(workspace) if p != before]
    stage.send_signal(signal.SIGSEGV)
    assert process.wait(60) == 0
    assert "it crashed with SIGSEGV" in _log(workspace, "crashed").read_text()
    _wait_for(lambda: before not in _workers(workspace))


def test_another_environment_gets_another_worker(workspace: Workspace) -> None:
    _run(workspace, "here")
    before = _worker(workspace)
    changed = _environment(workspace, HF_DATASETS_CACHE=str(workspace.root / "elsewhere"))
    code, log = _run(workspace, "there", environment=changed)
    assert (code, "not run by" in log) == (0, False), log
    assert _worker(workspace) != before
    unread = changed | {"SHLVL": "7"}
    before = _worker(workspace)
    assert _run(workspace, "same", environment=unread)[0] == 0
    assert _worker(workspace) == before


def test_without_a_worker_the_stage_runs_by_itself(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("data", "words.yaml"):
        (tmp_path / name).symlink_to(workspace.root / name)
    bare = Workspace(tmp_path, Settings())
    code, log = _run(bare, "bare")
    assert code == 0 and "no synth.yaml" in log
    (tmp_path / "synth.yaml").touch()
    (tmp_path / SOCKET.parent).parent.mkdir(parents=True)
    (tmp_path / SOCKET.parent).write_text("in the way of the folder")
    code, log = _run(bare, "blocked")
    assert code == 0 and "not run by the warm worker" in log
    assert not _workers(bare)


def test_the_worker_ends_with_its_workspace(workspace: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "short"
    root.mkdir()
    (root / "synth.yaml").touch()
    short = Workspace(root, Settings())
    environment = os.environ.copy()
    os.environ.update(PYTHONPATH=str(ROOT))
    try:
        start_warm(short)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert (root / LOCK).exists() and (root / LOG).exists()
    worker = _worker(short)
    _wait_for(lambda: (root / SOCKET).exists())
    shutil.rmtree(root)
    _wait_for(lambda: not worker.is_running(), 20)
