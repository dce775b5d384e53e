"""Several processes train what one trains; they stop, fail and continue together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm.checkpoint import save_projector
from mgm.distributed import ALONE, Group, Place, buckets, own_device, place
from mgm.errors import InputError
from mgm.train import main, prepare_model
from tests.mgm.test_train import (
    GOLDEN,
    REPOSITORY,
    assert_equal,
    finetune,
    flags,
    lines,
    parts,
    settings,
    wait_for_step,
    weights,
)

__all__ = ["parts"]
MANY_STEPS = 150
"""Enough to be stopped in between."""
Processes = list[subprocess.Popen[str]]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(command: Sequence[str], size: int, python: str = sys.executable) -> Processes:
    """Start as a launcher does; the processes are in order of rank."""
    port = str(free_port())
    found = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        found.append(
            subprocess.Popen(
                [python, *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def ends(processes: Processes, seconds: float = 900) -> list[tuple[int, str]]:
    """Return exit code and what was said of each process."""
    try:
        return [
            (process.returncode, told)
            for process in processes
            for _, told in [process.communicate(timeout=seconds)]
        ]
    finally:
        for process in processes:
            process.kill()


def answers(
    folder: Path, tasks: Sequence[dict[str, Any]], size: int = 2, python: str = sys.executable
) -> list[Any]:
    """Give tasks to `several_processes` and return its answers."""
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    for code, told in ends(start(["-m", "tests.mgm.several_processes", str(path)], size, python)):
        assert code == 0, told
    found: list[Any] = json.loads(path.with_suffix(".answers").read_text())
    return found


@pytest.fixture(scope="module")
def projector(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A projector file as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("projector")
    model, _ = prepare_model(settings(flags(parts, folder / "o")))
    save_projector(model, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


def cases(parts: dict[str, Path], projector: Path, folder: Path) -> dict[str, list[str]]:
    """Every method in both executions, without randomness."""
    same = {"drop_path": False, "warmup_ratio": 0.0, "global_batch_size": 6, "micro_batch_size": 2}
    found = {}
    for numerics in ("reference", "fast"):
        changes = {**same, "numerics": numerics, "tokens_per_pass": 160, "lora_dropout": 0.0}
        found[f"projector, {numerics}"] = flags(parts, folder / "o", **changes)
        for method in ("lora", "full"):
            found[f"{method}, {numerics}"] = finetune(
                parts, folder / "o", projector, method=method, **changes
            )
    return found


@pytest.fixture(scope="module")
def found(
    parts: dict[str, Path], projector: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two processes have to say; they are started once."""
    folder = tmp_path_factory.mktemp("two")
    every = cases(parts, projector, folder)
    few = [*every["lora, reference"], "--global-batch-size=2"]
    plain = flags(parts, folder / "o", drop_path=False, warmup_ratio=0.0)
    tasks = {
        "compare": {"task": "compare", "steps": 3, "cases": every},
        "few": {"task": "compare", "steps": 2, "cases": {"few": few}},
        "out_of_memory": {"task": "out_of_memory", "arguments": plain, "steps": 2},
        "disagree": {"task": "disagree"},
        "golden": {"task": "golden", "folder": str(GOLDEN / "train_run"), "changes": {}},
    }
    return dict(zip(tasks, answers(folder, list(tasks.values())), strict=True))


def test_two_processes_train_what_one_trains(found: dict[str, Any]) -> None:
    assert len(found["compare"]) == 6
    for name, values in found["compare"].items():
        assert values["difference"] < 1e-5, name
        assert values["moved"] > 1e-5, name
        for together, alone in zip(values["together"], values["alone"], strict=True):
            assert together == pytest.approx(alone, rel=1e-4), name


def test_more_processes_than_passes_do_not_hang(found: dict[str, Any]) -> None:
    assert found["few"]["few"]["difference"] < 1e-5
    assert found["few"]["few"]["moved"] > 1e-5


def test_one_process_out_of_memory_makes_all_take_smaller_passes(found: dict[str, Any]) -> None:
    told = found["out_of_memory"]
    for together, alone in zip(told["together"], told["alone"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    assert [entry["step"] for entry in told["out_of_memory"]] == [1]
    assert told["passes"] == 4


def test_bad_input_of_one_process_is_told_by_the_first_alone(found: dict[str, Any]) -> None:
    first, second = found["disagree"]["met"]
    assert "title of the last: message (hint)" in first
    assert "own: 0 in one, 1 in another (look)" in second
    assert found["disagree"]["lengths"] == [[len(first), len(second)], [1, 1]]


def test_recorded_runs_are_repeated_by_two_processes(found: dict[str, Any]) -> None:
    assert found["golden"]["failed"] == []
    assert {"stage1", "stage2", "lora", "stage2, fast"} <= set(found["golden"]["cases"])


def by_torchrun(command: Sequence[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, "--standalone", "--nproc-per-node=2", *command]


def test_stopped_and_killed_processes_end_with_the_undisturbed_weights(
    parts: dict[str, Path], projector: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        # With dropout, so that every process needs its own random state back.
        return [
            "-m",
            "mgm.train",
            *finetune(parts, tmp_path / name, projector, save_steps=1, max_steps=MANY_STEPS),
        ]

    reference = subprocess.run(
        by_torchrun(command("undisturbed")), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert reference.returncode == 0, reference.stderr
    assert reference.stdout.count(f"step {MANY_STEPS}/{MANY_STEPS}") == 1

    stopped = start(command("killed"), 2)
    wait_for_step(stopped[0], tmp_path / "killed.jsonl", 2)
    stopped[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in ends(stopped)] == [143, 143]
    state = torch.load(tmp_path / "killed" / "state" / "state.pt", weights_only=True)
    at = state["state"]["step"]
    assert 2 <= at < MANY_STEPS
    assert len(state["random"]) == 2
    assert not torch.equal(*state["random"])

    killed = start(command("killed"), 2)
    wait_for_step(killed[0], tmp_path / "killed.jsonl", at + 5)
    killed[0].kill()
    (code, _), (left, told) = ends(killed)
    assert (code, left) == (-signal.SIGKILL, 1)
    assert "Another process of this training ended" in told

    assert [code for code, _ in ends(start(command("killed"), 2))] == [0, 0]
    assert_equal(weights(tmp_path / "killed", "lora"), weights(tmp_path / "undisturbed", "lora"))
    metrics = lines(tmp_path / "killed" / "metrics.jsonl")
    assert metrics == lines(tmp_path / "undisturbed" / "metrics.jsonl")
    assert not (tmp_path / "killed" / "state").exists()


def test_bad_input_is_told_once_and_ends_all(parts: dict[str, Path], tmp_path: Path) -> None:
    command = ["-m", "mgm.train", *flags(parts, tmp_path / "o", data=tmp_path / "nowhere.json")]
    (first, told), (second, silence) = ends(start(command, 2))
    assert (first, second) == (2, 2)
    assert "nowhere.json" in told
    assert "nowhere.json" not in silence
    assert "nowhere.json" in lines(tmp_path / "o.jsonl")[-1]["error"]["message"]


def test_an_incomplete_launch_is_told(
    parts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(flags(parts, tmp_path / "output")) == 2
    told = capsys.readouterr().err
    assert "WORLD_SIZE = 2" in told
    assert "RANK" in told


def test_the_place_is_the_launchers() -> None:
    given = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "WORLD_SIZE": "4"}
    assert place({**given, "RANK": "3", "LOCAL_RANK": "1"}) == Place(3, 4, 1)
    assert place({}) == place({"WORLD_SIZE": "1", "RANK": "0"}) == Place()
    with pytest.raises(InputError, match="RANK = 4"):
        place({**given, "RANK": "4", "LOCAL_RANK": "0"})


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="1 GPUs are visible"):
        own_device(torch.device("cuda"), 1)


def test_a_process_whose_torchrun_was_killed_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    group = Group(Place(), torch.device("cpu"))
    assert not group.is_orphaned
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert group.is_orphaned
    assert not ALONE.is_orphaned


def test_gradients_travel_in_buckets_of_one_dtype() -> None:
    sizes = [4, 4, 100, 4]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(4, dtype=torch.bfloat16)]
    found = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors, 40)]
    assert found == [[4, 4], [100], [4], [4]]
    assert list(buckets([], 40)) == []


def test_a_process_alone_agrees_with_itself() -> None:
    tensor = torch.tensor([1.5])
    ALONE.add_up([tensor])
    assert tensor.item() == 1.5
    assert ALONE.largest([2.0, -1.0]) == [2.0, -1.0]
    assert ALONE.text_of(0, "own") == "own"
    with pytest.raises(InputError, match="wrong"), ALONE.together():
        raise InputError("wrong", "here")
