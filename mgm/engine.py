"""What turns gradients into a step: accumulation, clipping, the optimizer, and its state.

`LocalEngine` keeps everything on one device and, with several processes, adds their gradients up.
The trainer knows engines by the interface only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgm.distributed import ALONE, Group
from mgm.execution import Execution, Pass
from mgm.master_weights import MasterAdamW
from mgm.optimization import clip_gradients, gradient_norm, parameter_groups, set_learning_rate
from mgm.train_settings import TrainSettings


class Engine(ABC):
    """Gradients and steps of what is trained.

    Args:
        trained: Parameters by their name in the model.
    """

    exchanges_in_passes = False
    """Whether processes exchange gradients during every pass, not only after the last one. Then each
    must do as many passes as the others, and a pass that fails cannot be repeated."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self.trained = dict(trained)

    def loss(self, execution: Execution, one: Pass) -> Tensor:
        """Return a pass's share of the loss of the step."""
        return execution.loss(one)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Have every weight whole inside, to be written; every process takes part."""
        yield

    @abstractmethod
    def set_rate(self, factor: float) -> float:
        """Set every rate to its share of its peak and return the first."""

    @abstractmethod
    def zero(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Add a pass's gradient.

        Args:
            loss: Of the pass.
            is_last: Whether this process has no other pass in this step.
        """

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together; once a step, after its last pass."""

    @abstractmethod
    def step(self) -> None:
        """Clip and apply the gradients; after `gradient_norm`."""

    @abstractmethod
    def state(self, folder: Path, step: int) -> dict[str, Any]:
        """Return what a continued training needs of weights and optimizer.

        Every process calls it; what the first one returns is kept.

        Args:
            folder: For what is too large, or too much spread over processes, to be returned.
            step: Steps done, for the names of such files.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what `state` returned and wrote."""

    @abstractmethod
    def forget_older(self, folder: Path, step: int) -> None:
        """Remove what earlier steps wrote beside their states; once a newer state is kept."""


class LocalEngine(Engine):
    """AdamW on this process's device; every process does the same step."""

    def __init__(
        self, trained: Mapping[str, nn.Parameter], settings: TrainSettings, group: Group = ALONE
    ) -> None:
        super().__init__(trained)
        self._group = group
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
        if any(parameter.dtype != torch.float32 for parameter in self.trained.values()):
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

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Add a pass's gradient."""
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> Tensor:
        """Add up the gradients of all processes and return their norm before they are clipped.

        What a step did not touch has a gradient of zero, not none: a step of text alone still
        moves the vision side by its momentum, as published.
        """
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._group.add_up(p.grad for p in self.trained.values() if p.grad is not None)
        if isinstance(self.optimizer, MasterAdamW):
            norm = gradient_norm(self.trained.values())
            self._scale = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
            return norm
        return clip_gradients(self.trained.values(), self._max_norm)

    def step(self) -> None:
        """Apply the clipped gradients."""
        if isinstance(self.optimizer, MasterAdamW):
            self.optimizer.step(gradient_scale=self._scale)
        else:
            self.optimizer.step()

    def state(self, folder: Path, step: int) -> dict[str, Any]:
        """Return the trained weights and the optimizer's state."""
        weights = {name: value.detach().cpu() for name, value in self.trained.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Take up weights and the optimizer's state."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def forget_older(self, folder: Path, step: int) -> None:
        """Do nothing: the state is all there is."""
