"""What turns gradients into a step: accumulation, clipping, the optimizer, and its state.

`LocalEngine` keeps everything on one device and, with several processes, adds their gradients up.
The trainer knows engines by the interface only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm.optimization import clip_gradients, gradient_norm, parameter_groups, set_learning_rate
from mgm.train_settings import TrainSettings


class Engine(ABC):
    """Gradients and steps of what is trained.

    Args:
        trained: Parameters by their name in the model.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self.trained = dict(trained)

    @abstractmethod
    def set_rate(self, factor: float) -> float:
        """Set every rate to its share of its peak and return the first."""

    @abstractmethod
    def zero(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add a pass's gradient."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together; once a step, after its last pass."""

    @abstractmethod
    def step(self) -> None:
        """Clip and apply the gradients; after `gradient_norm`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a continued training needs beside the weights."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""


class LocalEngine(Engine):
    """AdamW on this process's device."""

    def __init__(self, trained: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        super().__init__(trained)
        self._max_norm = settings.max_grad_norm
        self._scale = torch.ones(())
        groups = parameter_groups(
            self.trained.items(),
            settings.learning_rate,
            settings.projector_learning_rate,
            settings.weight_decay,
        )
        betas = (settings.adam_beta1, settings.adam_beta2)
        self.optimizer: torch.optim.Optimizer
        self._has_masters = any(p.dtype != torch.float32 for p in self.trained.values())
        if self._has_masters:
            from mgm.master_weights import MasterAdamW

            self.optimizer = MasterAdamW(
                groups,
                betas,
                settings.adam_eps,
                master=settings.master_weights,
                moments=settings.moments,
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=settings.adam_eps)

    def set_rate(self, factor: float) -> float:
        """Set every rate to its share of its peak and return the first."""
        return set_learning_rate(self.optimizer, factor)

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add a pass's gradient."""
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients before they are clipped.

        What a step did not touch has a gradient of zero, not none: a step of text alone still
        moves the vision side by its momentum, as published.
        """
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._has_masters:
            norm = gradient_norm(self.trained.values())
            self._scale = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
            return norm
        return clip_gradients(self.trained.values(), self._max_norm)

    def step(self) -> None:
        """Apply the clipped gradients."""
        if self._has_masters:
            self.optimizer.step(gradient_scale=self._scale)
        else:
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up an optimizer's state."""
        self.optimizer.load_state_dict(state)
