"""The state of a training that was not finished: written whole or not at all, and read back.

It holds what the next step depends on: trained weights, optimizer moments, the number of steps done,
and the random states. The order of samples follows from the seed and the step, so it is not stored.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mgm.distributed import ALONE, Group
from mgm.engine import Engine
from mgm.errors import InputError
from mgm.weights import DAMAGE_ERRORS

STATE_FILE = "state.pt"
_KEYS = ("state", "trained", "engine", "random", "random_cuda")


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


def save_state(folder: Path, state: TrainingState, engine: Engine, group: Group = ALONE) -> None:
    """Write the state so that a crash leaves the previous one or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    content = {
        "state": dict(vars(state)),
        "trained": list(engine.trained),
        "engine": engine.state(folder, state.step),
        "random": group.gathered(torch.get_rng_state()),
        "random_cuda": [] if cuda is None else group.gathered(cuda),
    }
    if not group.is_first:
        return
    partial = folder / f"{STATE_FILE}.partial"
    with partial.open("wb") as target:
        torch.save(content, target)
        target.flush()
        os.fsync(target.fileno())
    partial.replace(folder / STATE_FILE)
    engine.forget_older(folder, state.step)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, without running any code in it.

    Raises:
        InputError: If the file is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *DAMAGE_ERRORS) as error:
        raise _damaged(path) from error
    if not isinstance(content, dict) or not all(key in content for key in _KEYS):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> InputError:
    return InputError(
        "Unreadable state",
        f"{path} is cut off or damaged",
        f"remove {path.parent}: the same command then starts this training anew",
    )


def load_state(folder: Path, digest: str, engine: Engine, group: Group = ALONE) -> TrainingState:
    """Continue from a folder's state, or start anew when it has none.

    Random states are taken up by as many processes as have saved them; with another number of
    processes they start anew, which only dropout and drop path can tell.

    Raises:
        InputError: If the folder holds the state of another training, or a damaged one.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return TrainingState(digest)
    content = read_state(path)
    state = TrainingState(**content["state"])
    if state.digest != digest or content["trained"] != list(engine.trained):
        raise InputError(
            "Another training was here",
            f"{path} belongs to other settings or other data",
            "choose another output folder, or remove this one",
        )
    engine.load_state(content["engine"], folder)
    if len(content["random"]) == group.size:
        torch.set_rng_state(content["random"][group.rank])
        if content["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(content["random_cuda"][group.rank])
    return state
