"""Several starts on a tiny model: the choice, stopping early, kills, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mgm.errors import InputError
from mgm.starts import StartsSettings, main, mean_loss
from mgm.train import main as train_main
from mgm.weights import read_tensors
from tests.mgm import test_train
from tests.mgm.test_train import GOLDEN, PICTURES, REPOSITORY, assert_equal, lines, weights

STEPS = 12
SEEDS = (3, 4, 5)
GIVEN = ",".join(str(seed) for seed in SEEDS)
parts = test_train.parts


def training(parts: dict[str, Path], folder: Path, **changes: Any) -> Path:
    """Write a configuration of `mgm.train` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "stage": "pretrain",
        **{name: str(path) for name, path in parts.items()},
        "data": str(GOLDEN / "train_run" / "stage1_data.json"),
        "images": str(PICTURES),
        "output": str(folder / "output"),
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "model_max_length": 128,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 5,
        "warmup_ratio": 0.0,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        **changes,
    }
    path = folder / "pretrain.json"
    path.write_text(json.dumps(values))
    return path


def flags(config: Path, start: int = 0, share: float = 1.0) -> list[str]:
    progress = config.parent / "progress.jsonl"
    given = {"training": config, "seeds": GIVEN, "start": start, "share": share}
    given["progress"] = progress
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def run_all(config: Path, share: float = 1.0) -> None:
    """Do what a run does: every start, then the choice."""
    for start in (1, 2, 3, 0):
        assert main(flags(config, start, share)) == 0


def killed_at(arguments: list[str], progress: Path, reached: dict[str, Any]) -> None:
    """Start the program and kill it once a line of its progress holds `reached`."""
    before = len(lines(progress))
    process = subprocess.Popen(
        [sys.executable, "-m", "mgm.starts", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not any(reached.items() <= line.items() for line in lines(progress)[before:]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def plain(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An undisturbed pretraining of each seed by `mgm.train`, every step logged."""
    folder = tmp_path_factory.mktemp("plain")
    for seed in SEEDS:
        config = training(parts, folder / str(seed), seed=seed, logging_steps=1)
        assert train_main(["--config", str(config)]) == 0
    return {seed: folder / str(seed) / "output" for seed in SEEDS}


def losses(output: Path, first: int, last: int) -> float:
    values = [line["loss"] for line in lines(output / "metrics.jsonl")[first - 1 : last]]
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def undisturbed(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three starts to the end and the choice; the folder with output and progress."""
    folder = tmp_path_factory.mktemp("starts")
    run_all(training(parts, folder))
    return folder


def test_the_start_of_the_lowest_loss_is_kept(undisturbed: Path, plain: dict[int, Path]) -> None:
    expected = {seed: losses(output, STEPS - 1, STEPS) for seed, output in plain.items()}
    assert len(set(expected.values())) == 3
    best = min(expected, key=expected.__getitem__)
    output = undisturbed / "output"
    choice = json.loads((output / "starts.json").read_text())
    assert choice["chosen_seed"] == best
    assert {start["seed"]: start["loss"] for start in choice["starts"]} == expected
    assert (choice["compared_at_step"], choice["averaged_steps"]) == (STEPS, 2)
    assert_equal(weights(output, "projector"), weights(plain[best], "projector"))
    finished = json.loads((output / "train_state.json").read_text())
    assert (finished["seed"], finished["steps"], finished["starts"]) == (best, STEPS, choice)
    for name in ("config.json", "towers.json", "metrics.jsonl"):
        assert (output / name).read_bytes() == (plain[best] / name).read_bytes()


def test_of_the_others_the_losses_stay_and_no_weights(undisturbed: Path) -> None:
    output = undisturbed / "output"
    choice = json.loads((output / "starts.json").read_text())
    others = {f"start-{seed}" for seed in SEEDS} - {f"start-{choice['chosen_seed']}"}
    assert {path.name for path in output.iterdir() if path.is_dir()} == others
    for name in others:
        left = {path.name for path in (output / name).iterdir()}
        assert left == {"metrics.jsonl", "train_state.json"}
    steps = [line for line in lines(undisturbed / "progress.jsonl") if "loss" in line]
    assert [line["label"] for line in steps[:-1:STEPS]] == ["start 1/3", "start 2/3", "start 3/3"]
    chosen = SEEDS.index(choice["chosen_seed"]) + 1
    assert (steps[-1]["label"], steps[-1]["step"]) == (f"start {chosen}/3, the best", STEPS)
    assert steps[-1]["loss"] == lines(output / "metrics.jsonl")[-1]["loss"]


def test_every_command_again_changes_nothing(undisturbed: Path) -> None:
    def content() -> dict[str, tuple[bytes, int]]:
        files = [path for path in (undisturbed / "output").rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = content()
    run_all(undisturbed / "pretrain.json")
    assert content() == before


def test_a_kill_between_starts_leads_to_the_same_choice(
    parts: dict[str, Path], undisturbed: Path, tmp_path: Path
) -> None:
    config = training(parts, tmp_path)
    progress = tmp_path / "progress.jsonl"
    assert main(flags(config, 1)) == 0
    killed_at(flags(config, 2), progress, {"label": "start 2/3: loading weights"})
    assert not (tmp_path / "output" / "start-4" / "train_state.json").exists()
    run_all(config)
    ours, theirs = tmp_path / "output", undisturbed / "output"
    first, second = (json.loads((f / "starts.json").read_text()) for f in (ours, theirs))
    assert first["chosen_seed"] == second["chosen_seed"]
    assert [start["loss"] for start in first["starts"]] == [
        start["loss"] for start in second["starts"]
    ]
    assert_equal(weights(ours, "projector"), weights(theirs, "projector"))


def test_stopped_halfway_the_best_goes_on_as_if_undisturbed(
    parts: dict[str, Path], plain: dict[int, Path], tmp_path: Path
) -> None:
    config, output = training(parts, tmp_path), tmp_path / "output"
    progress = tmp_path / "progress.jsonl"
    half = STEPS // 2
    for start in (1, 2, 3):
        assert main(flags(config, start, 0.5)) == 0
    for seed in SEEDS:
        metrics = lines(output / f"start-{seed}" / "metrics.jsonl")
        assert [line["step"] for line in metrics] == list(range(1, half + 1))
        assert not (output / f"start-{seed}" / "train_state.json").exists()
    # A start that is far enough is not trained further, and a kill does not undo the choice.
    assert main(flags(config, 2, 0.5)) == 0
    killed_at(flags(config, 0, 0.5), progress, {"step": half + 3, "total": STEPS})
    choice = json.loads((output / "starts.json").read_text())
    run_all(config, 0.5)
    assert json.loads((output / "starts.json").read_text()) == choice
    expected = {seed: losses(plain[seed], half, half) for seed in SEEDS}
    best = min(expected, key=expected.__getitem__)
    assert (choice["chosen_seed"], choice["compared_at_step"]) == (best, half)
    assert_equal(weights(output, "projector"), weights(plain[best], "projector"))
    assert lines(output / "metrics.jsonl") == lines(plain[best] / "metrics.jsonl")
    for seed in set(SEEDS) - {best}:
        assert len(lines(output / f"start-{seed}" / "metrics.jsonl")) == half
        assert not list((output / f"start-{seed}").rglob("*.pt"))


def test_a_kill_while_the_files_are_moved_loses_nothing(
    parts: dict[str, Path], undisturbed: Path, tmp_path: Path
) -> None:
    """What a kill after the first moved file leaves is completed."""
    config, output = training(parts, tmp_path), tmp_path / "output"
    for start in (1, 2, 3):
        assert main(flags(config, start)) == 0
    choice = (undisturbed / "output" / "starts.json").read_text()
    (output / "starts.json").write_text(choice)
    chosen = output / f"start-{json.loads(choice)['chosen_seed']}"
    (chosen / "mm_projector.bin").rename(output / "mm_projector.bin")
    run_all(config)
    assert_equal(
        weights(output, "projector"), read_tensors(undisturbed / "output" / "mm_projector.bin")
    )
    assert (output / "train_state.json").exists() and not chosen.exists()


def test_a_choice_before_all_starts_are_trained_is_refused(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training(parts, tmp_path)
    assert main(flags(config, 1)) == 0
    assert main(flags(config)) == 2
    told = capsys.readouterr().err
    assert "start-4" in told and "--start 2" in told
    assert not (tmp_path / "output" / "starts.json").exists()


def test_a_loss_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = [2.0] * 15 + [1.0, 1.0, 1.0, 3.0, 5.0]
    rows = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(values, 1)]
    path.write_text("\n".join(rows))
    assert mean_loss(path, 20) == 4.0
    path.write_text("\n".join([*rows[:-1], json.dumps({"step": 20, "loss": math.nan})]))
    with pytest.raises(InputError, match="loss = nan at step 20"):
        mean_loss(path, 20)
    path.write_text("\n".join(rows[:-1]))
    with pytest.raises(InputError, match="lacks step 20"):
        mean_loss(path, 20)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": "1,x"}, "seeds = '1,x'"),
        ({"seeds": "1"}, "two or more"),
        ({"seeds": "1,1"}, "each another"),
        ({"start": 4}, "start = 4"),
        ({"share": 0.0}, "share = 0.0"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        StartsSettings(**{"training": Path("x"), "seeds": "1,2,3", **changes})


def test_a_finetuning_has_one_start(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training(parts, tmp_path, stage="finetune", method="lora", projector="x")
    assert main(flags(config, 1)) == 2
    assert "stage = 'finetune'" in capsys.readouterr().err
