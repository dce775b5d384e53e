"""AdamW for weights that the model keeps in bfloat16, with more precise masters inside.

An update of 2e-5 is below half the last place of most bfloat16 weights: added to them, it is lost.
`MasterAdamW` adds it to a master, of which the model's weight is the nearest bfloat16. Bytes a
weight, beside the gradient:

| master | moments | weight | master | moments | total |
|---|---|---|---|---|---|
| float32 | float32 | 2 | 4 | 8 | 14 |
| float32 | 8bit | 2 | 4 | 2.03 | 8.03 |
| split24 | float32 | 2 | 1 | 8 | 11 |
| split24 | 8bit | 2 | 1 | 2.03 | 5.03 |

Float32 masters and moments follow `torch.optim.AdamW` bit by bit on a CPU. See `split_weights` and
`quantised_moments` for what the others keep. Clipping belongs to the caller, as a factor that `step`
applies while it reads the gradients: no pass over them writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgm.adamw_step import ParameterState, StepNumbers, master_of, step_plain
from mgm.quantised_moments import num_blocks, quotient_bound
from mgm.split_weights import random_key

Masters = Literal["float32", "split24"]
Moments = Literal["float32", "8bit"]

HAS_TRITON = find_spec("triton") is not None
"""PyTorch's CPU builds come without it."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay over bfloat16 and float32 parameters.

    Build it when the weights are loaded and on their device: masters start as the weights are. A
    float32 parameter is its own master and has float32 moments. A parameter without a gradient is
    treated as one whose gradient is zero: its momentum goes on.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        master: Masters,
        moments: Moments,
        seed: int = 0,
    ) -> None:
        """Allocate the state.

        Args:
            groups: Of `mgm.optimization.parameter_groups`.
            betas: Decay rates of the two moments.
            eps: Added to the denominator.
            master: What a bfloat16 weight is beside itself.
            moments: How the moments of bfloat16 weights are kept.
            seed: Of the stochastic rounding.

        Raises:
            ValueError: If a parameter is not contiguous or of another type, or the betas do not
                suit the moments.
        """
        self.step_count = 0
        self.seed = seed
        self._parts: list[ParameterState] = []
        defaults = {"lr": 0.0, "peak_lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)
        if moments == "8bit":
            quotient_bound(*betas)
        for parameter in self._parameters():
            part = _initial_state(parameter, master, moments)
            self._parts.append(part)
            self.state[parameter] = part.tensors()

    @torch.no_grad()
    def step(self, gradient_scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """Update every parameter.

        Args:
            gradient_scale: Every gradient is taken times this, for example to clip.
        """
        self.step_count += 1
        scales: dict[torch.device, Tensor] = {}
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                numbers = self._numbers(group, index)
                device = parameter.device
                if device not in scales:
                    scale = torch.as_tensor(gradient_scale, dtype=torch.float32)
                    scales[device] = scale.to(device, non_blocking=True)
                _step_parameter(parameter, self._parts[index], numbers, scales[device])
                index += 1

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of a parameter in float32, as precisely as it is kept."""
        for own, part in zip(self._parameters(), self._parts, strict=True):
            if own is parameter:
                flat = master_of(parameter.detach().view(-1), part)
                return flat.clone().view(parameter.shape)
        raise ValueError("this optimizer does not have that parameter")

    def state_dict(self) -> dict[str, Any]:
        """Return groups, tensors of each parameter, number of steps and seed; nothing is copied.

        The bfloat16 part of a split weight is in the parameter itself: save both.
        """
        return {**super().state_dict(), "step_count": self.step_count, "seed": self.seed}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, in place and in its own types.

        Raises:
            ValueError: If it is of other parameters, masters or moments; nothing is changed then.
        """
        given = state_dict["state"]
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError("the state has other parameter groups")
        for index, part in enumerate(self._parts):
            if _layout(given[index]) != _layout(part.tensors()):
                raise ValueError(
                    f"parameter {index}: the state holds {_layout(given[index])}, "
                    f"this optimizer {_layout(part.tensors())}"
                )
        for index, part in enumerate(self._parts):
            for name, value in part.tensors().items():
                value.copy_(given[index][name])
        for own, group in zip(self.param_groups, groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
        self.step_count = state_dict["step_count"]
        self.seed = state_dict["seed"]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _numbers(self, group: dict[str, Any], index: int) -> StepNumbers:
        beta1, beta2 = group["betas"]
        return StepNumbers(
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            step=self.step_count,
            key=random_key(self.seed, self.step_count, index),
        )


def _step_parameter(
    parameter: nn.Parameter, part: ParameterState, numbers: StepNumbers, scale: Tensor
) -> None:
    if parameter.numel() == 0:
        return
    weight = parameter.view(-1)
    gradient = None if parameter.grad is None else parameter.grad.reshape(-1)
    if parameter.is_cuda and HAS_TRITON:
        from mgm.adamw_kernel import step_kernel

        with torch.cuda.device(parameter.device):
            step_kernel(weight, gradient, part, numbers, scale)
    else:
        step_plain(weight, gradient, part, numbers, scale)


def _initial_state(parameter: nn.Parameter, master: Masters, moments: Moments) -> ParameterState:
    if parameter.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a parameter is {parameter.dtype}; it must be bfloat16 or float32")
    if not parameter.is_contiguous():
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not contiguous")
    weight = parameter.detach().view(-1)
    tensors: dict[str, Tensor] = {}
    if parameter.dtype == torch.bfloat16 and master == "float32":
        tensors["master"] = weight.float()
    elif parameter.dtype == torch.bfloat16:
        tensors["low"] = torch.zeros_like(weight, dtype=torch.int8)
    first, second = torch.float32, torch.float32
    if parameter.dtype == torch.bfloat16 and moments == "8bit":
        first, second = torch.int8, torch.uint8
        blocks = num_blocks(len(weight))
        for name in ("first_unit", "second_unit"):
            tensors[name] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)
    return ParameterState(
        first=torch.zeros_like(weight, dtype=first),
        second=torch.zeros_like(weight, dtype=second),
        **tensors,
    )


def _layout(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{value.dtype} {tuple(value.shape)}" for name, value in tensors.items()}
