"""The state of a training that was not finished: written whole or not at all, and read back.

It holds what the next step depends on: trained weights, optimizer moments, the number of steps done,
and the random states. The order of samples follows from the seed and the step, so it is not stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgm.engine import Engine
from mgm.errors import InputError

STATE_FILE = "state.pt"


@dataclass
class TrainingState:
    """Where a training stands after `step` optimizer steps."""

    digest: str
    """Of the settings and the data; a state is continued only under the same."""
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Loss of each step so far."""
    seconds: float = 0.0
    samples_seen: int = 0
    unlabelled_micro_batches: int = 0
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)
    """Steps that did not fit, and how training went on."""


def save_state(folder: Path, state: TrainingState, engine: Engine) -> None:
    """Write the state so that a crash leaves the previous one or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "state": dict(vars(state)),
        "weights": {name: value.detach().cpu() for name, value in engine.trained.items()},
        "optimizer": engine.state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = folder / f"{STATE_FILE}.partial"
    with partial.open("wb") as target:
        torch.save(content, target)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(folder / STATE_FILE)


def load_state(folder: Path, digest: str, engine: Engine) -> TrainingState:
    """Continue from a folder's state, or start anew when it has none.

    Raises:
        InputError: If the folder holds the state of another training.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return TrainingState(digest)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = TrainingState(**content["state"])
    if state.digest != digest or content["weights"].keys() != engine.trained.keys():
        raise InputError(
            "Another training was here",
            f"{path} belongs to other settings or other data",
            "choose another output folder, or remove this one",
        )
    with torch.no_grad():
        for name, parameter in engine.trained.items():
            value: Tensor = content["weights"][name]
            parameter.copy_(value)
    engine.load_state(content["optimizer"])
    torch.set_rng_state(content["random"])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])
    return state
