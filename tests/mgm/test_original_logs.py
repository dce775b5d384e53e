"""`mgm.original_logs`: the history of the recorded runs, in the original's form."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from mgm.errors import InputError
from mgm.original_logs import epoch_after, write_original_logs
from mgm.train_settings import TrainSettings
from mgm.training_state import TrainingState


def _settings(output: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "stage": "pretrain",
        "language_model": output,
        "vision_tower": output,
        "high_resolution_tower": output,
        "data": output,
        "images": output,
        "output": output,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        **changes,
    }
    return TrainSettings(**values)


def _run(golden: Path, output: Path, run: str, **changes: Any) -> list[dict[str, float]]:
    """Write the logs of a recorded run from what this package notes about it."""
    meta = json.loads((golden / "train_run" / "meta.json").read_text())[run]
    metrics = [
        {
            "step": line["step"],
            "loss": line["loss"] + 1e-6,
            "lr": line["learning_rate"],
            "grad_norm": line["grad_norm"],
        }
        for line in meta["log"]
    ]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    state = TrainingState("", len(metrics), [line["loss"] for line in metrics], seconds=20.0)
    settings = _settings(output, **changes)
    write_original_logs(settings, output / "metrics.jsonl", len(meta["sample_order"]), state)
    return list(meta["log"])


def test_the_history_is_the_originals(golden: Path, tmp_path: Path) -> None:
    log = _run(golden, tmp_path, "stage1")
    content = json.loads((tmp_path / "trainer_state.json").read_text())
    *history, last = content["log_history"]
    recorded = [{key: entry[key] for key in log[0]} for entry in history]
    assert recorded == log
    assert [entry["epoch"] for entry in history] == [0.12, 0.25, 0.38, 0.5, 0.62, 0.75, 0.88, 1.0]
    assert last["train_loss"] == pytest.approx(sum(line["loss"] for line in log) / len(log))
    assert (last["train_runtime"], last["step"], last["epoch"]) == (20.0, 8, 1.0)
    assert last["train_samples_per_second"] == 1.6
    assert last["train_steps_per_second"] == 0.4
    assert (content["global_step"], content["max_steps"], content["num_train_epochs"]) == (8, 8, 1)
    assert content["train_batch_size"] == 2


def test_the_library_reads_the_state(golden: Path, tmp_path: Path) -> None:
    _run(golden, tmp_path, "stage1", logging_steps=1, save_steps=7)
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (state.global_step, state.epoch, state.save_steps) == (8, 1.0, 7)
    assert len(state.log_history) == 9


@pytest.mark.parametrize(
    ("stage", "names"),
    [("pretrain", ["pretrain.log"]), ("finetune", ["finetune.log", "finetuning.log"])],
)
def test_the_text_log_has_the_kits_names_and_lines(
    golden: Path, tmp_path: Path, stage: str, names: list[str]
) -> None:
    changes = {"method": "full", "projector": tmp_path} if stage == "finetune" else {}
    log = _run(golden, tmp_path, "stage2", stage=stage, **changes)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == names
    for name in names:
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == len(log) + 1
        first, last = ast.literal_eval(lines[0]), ast.literal_eval(lines[-1])
        assert list(first) == ["loss", "grad_norm", "learning_rate", "epoch"]
        assert (first["loss"], first["learning_rate"]) == (log[0]["loss"], log[0]["learning_rate"])
        assert list(last)[:2] == ["train_runtime", "train_samples_per_second"]
        assert "step" not in last


@pytest.mark.parametrize(
    ("num_samples", "step", "expected"),
    [(32, 8, 1.0), (26, 6, 12 / 13), (26, 7, 1 + 2 / 13), (3, 1, 1.0), (10_000, 1250, 0.5)],
)
def test_epochs_count_micro_batches(
    tmp_path: Path, num_samples: int, step: int, expected: float
) -> None:
    assert epoch_after(_settings(tmp_path), num_samples, step) == pytest.approx(expected)


def test_metrics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    settings, metrics = _settings(tmp_path), tmp_path / "metrics.jsonl"
    state = TrainingState("", 1, [1.0], seconds=1.0)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_original_logs(settings, metrics, 4, state)
    metrics.write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    with pytest.raises(InputError, match="line 1: no grad_norm"):
        write_original_logs(settings, metrics, 4, state)
    metrics.write_text("{")
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_original_logs(settings, metrics, 4, state)
