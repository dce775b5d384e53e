"""The optimizer of both stages: parameter groups, the schedule, clipping.

Source: the Better Synth kit's arguments and the trainer defaults they leave in place: AdamW, cosine
with linear warm-up, one gradient norm over everything that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then half a cosine down to zero."""

    total_steps: int
    warmup_ratio: float

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, rounded up."""
        return math.ceil(self.warmup_ratio * self.total_steps)

    def factor(self, step: int) -> float:
        """Return the share of the peak rate that applies after `step` optimizer steps.

        The first step runs at factor(0), which is zero with any warm-up: as published, it leaves
        the weights where they are.
        """
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps)
        remaining = max(1, self.total_steps - self.warmup_steps)
        progress = (step - self.warmup_steps) / remaining
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    projector_learning_rate: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return AdamW groups: weights and the rest (biases, norms), the projector apart if it has
    a rate of its own.

    Args:
        named: Trained parameters with their names in the model.
        learning_rate: Peak rate. Mining keeps it: only the projector itself has another.
        projector_learning_rate: Peak rate of the projector; None means the same.
        weight_decay: Of weights; biases and norms are never decayed.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = learning_rate
        if name.startswith("projector.") and projector_learning_rate is not None:
            rate = projector_learning_rate
        decay = weight_decay if parameter.dim() > 1 else 0.0
        members.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in members.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its share of its peak rate and return the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip all gradients together and return their norm before clipping."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm, foreach=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, in float32 whatever theirs is."""
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
