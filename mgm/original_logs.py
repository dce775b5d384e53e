"""The logs of a finished training as the original trainer leaves them beside the weights.

`trainer_state.json` with its `log_history`, and the text log whose lines are that history's
entries: `pretrain.log`, or `finetuning.log` and `finetune.log`, since the kit writes the first name
and its submission rules ask for the second. Scripts that plot or check the original's runs read
these files. Owns their form only; the numbers are those of `metrics.jsonl` and of the state.
What the original counts and this package does not, floating-point operations, is left out.

Source of the form: `TrainerState` and the logging of transformers 4.38.0, which the kit pins.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mgm.errors import InputError
from mgm.files import write_atomically, write_json
from mgm.train_settings import TrainSettings
from mgm.training_state import TrainingState

STATE_FILE = "trainer_state.json"
LOG_FILES = {"pretrain": ("pretrain.log",), "finetune": ("finetuning.log", "finetune.log")}
_STEP_KEYS = ("loss", "grad_norm", "learning_rate", "epoch")


def write_original_logs(
    settings: TrainSettings, metrics: Path, num_samples: int, state: TrainingState
) -> None:
    """Write a finished training's logs into its output folder.

    Args:
        settings: Of the stage.
        metrics: Its `metrics.jsonl`, one line for each report.
        num_samples: Records in the data.
        state: After the last step.

    Raises:
        InputError: If the metrics cannot be read.
    """
    history = [_entry(settings, line, num_samples) for line in _read_lines(metrics)]
    summary = _summary(settings, num_samples, state)
    entries = [{**entry, "epoch": round(entry["epoch"], 2)} for entry in [*history, summary]]
    content = {
        **_CONSTANTS,
        "epoch": summary["epoch"],
        "global_step": state.step,
        "max_steps": state.step,
        "num_train_epochs": math.ceil(summary["epoch"]),
        "logging_steps": settings.logging_steps,
        "save_steps": settings.save_steps,
        "train_batch_size": settings.micro_batch_size,
        "log_history": entries,
    }
    write_json(settings.output / STATE_FILE, content)
    lines = [{key: value for key, value in entry.items() if key != "step"} for entry in entries]
    text = "".join(f"{line}\n" for line in lines)
    for name in LOG_FILES[settings.stage]:
        write_atomically(settings.output / name, lambda target: target.write_text(text, "utf-8"))


# Fields of the original's state that say nothing about a training such as this one.
_CONSTANTS: dict[str, Any] = {
    "best_metric": None,
    "best_model_checkpoint": None,
    "eval_steps": 500,
    "is_hyper_param_search": False,
    "is_local_process_zero": True,
    "is_world_process_zero": True,
    "num_input_tokens_seen": 0,
    "trial_name": None,
    "trial_params": None,
}


def epoch_after(settings: TrainSettings, num_samples: int, step: int) -> float:
    """Return how many passes over the data lie behind after `step` optimizer steps, 1 or more.

    An epoch's left-over micro-batches count as unseen, as in the original.
    """
    per_epoch = settings.steps_per_epoch(num_samples)
    epoch, position = divmod(step - 1, per_epoch)
    micro_batches = math.ceil(num_samples / settings.micro_batch_size)
    return epoch + min(1.0, (position + 1) * settings.accumulation_steps / micro_batches)


def _entry(settings: TrainSettings, line: dict[str, float], num_samples: int) -> dict[str, Any]:
    step = int(line["step"])
    values = (
        round(line["loss"], 4),
        line["grad_norm"],
        line["lr"],
        epoch_after(settings, num_samples, step),
    )
    return {**dict(zip(_STEP_KEYS, values, strict=True)), "step": step}


def _summary(settings: TrainSettings, num_samples: int, state: TrainingState) -> dict[str, Any]:
    """Return the last entry of the history: speed, and the mean loss over all steps."""
    seconds = max(state.seconds, 1e-9)
    planned = state.step * settings.global_batch_size
    samples = planned if settings.max_steps else num_samples * settings.epochs
    return {
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(samples / seconds, 3),
        "train_steps_per_second": round(state.step / seconds, 3),
        "train_loss": sum(state.losses) / len(state.losses),
        "epoch": epoch_after(settings, num_samples, state.step),
        "step": state.step,
    }


def _read_lines(metrics: Path) -> list[dict[str, float]]:
    try:
        lines = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError("Cannot read metrics", f"{metrics}: {error}") from None
    for number, line in enumerate(lines, start=1):
        missing = [key for key in ("step", "loss", "lr", "grad_norm") if key not in line]
        if missing:
            raise InputError("Unusable metrics", f"{metrics}, line {number}: no {missing[0]}")
    return lines
