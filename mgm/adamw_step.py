"""One AdamW step of one parameter: what it reads, what it keeps, and the path in plain PyTorch.

The plain path runs on any device. It works on slices, so that its float32 temporaries do not grow
with the parameter. `mgm.adamw_kernel` does the same in one pass on a GPU.

Shape legend: N elements of the parameter, B blocks of `quantised_moments.BLOCK` elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgm import quantised_moments, split_weights
from mgm.split_weights import Key

SLICE = 1 << 19
"""Elements worked on together, a multiple of the block: 36 MiB of temporaries at most."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step is told beside tensors; equal for all elements of a parameter."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """1 in the first step."""
    key: Key
    """Of the random bits of this parameter in this step."""

    @property
    def shrinking(self) -> float:
        """The factor of decoupled weight decay."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def step_size(self) -> float:
        """Learning rate over the first moment's bias correction."""
        return self.learning_rate / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        """Root of the second moment's bias correction."""
        return float((1 - self.beta2**self.step) ** 0.5)


@dataclass(frozen=True)
class ParameterState:
    """The tensors that an optimizer keeps for one parameter; flat, on its device.

    A float32 parameter has neither `master` nor `low`: it is its own master. The units are absent
    when the moments are float32.
    """

    first: Tensor
    """First moment (N,): float32, or codes in int8."""
    second: Tensor
    """Second moment (N,): float32, or codes in uint8."""
    first_unit: Tensor | None = None
    """(B,) float32."""
    second_unit: Tensor | None = None
    """(B,) float32."""
    master: Tensor | None = None
    """(N,) float32."""
    low: Tensor | None = None
    """(N,) int8, the byte beside a bfloat16 weight."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def master_of(weight: Tensor, state: ParameterState) -> Tensor:
    """Return the weight (N,) as precisely as it is kept; a view when that is in float32."""
    if state.low is not None:
        return split_weights.join(weight, state.low)
    return weight if state.master is None else state.master


def step_plain(
    weight: Tensor,
    gradient: Tensor | None,
    state: ParameterState,
    numbers: StepNumbers,
    gradient_scale: float | Tensor,
) -> None:
    """Update a parameter and its state in place.

    Args:
        weight: (N,), bfloat16 or float32.
        gradient: (N,), any float type; None means zero.
        state: Of this parameter.
        numbers: Of this step.
        gradient_scale: A factor of the gradient, a number or a tensor of one element.
    """
    for start in range(0, len(weight), SLICE):
        elements = slice(start, min(start + SLICE, len(weight)))
        blocks = slice(
            start // quantised_moments.BLOCK, quantised_moments.num_blocks(elements.stop)
        )
        part = ParameterState(
            **{
                name: value[blocks if name.endswith("_unit") else elements]
                for name, value in state.tensors().items()
            }
        )
        values = weight[elements]
        slope = torch.zeros_like(values, dtype=torch.float32)
        if gradient is not None:
            slope = gradient[elements].float() * gradient_scale
        _step_slice(values, slope, part, numbers, start)


def _step_slice(
    weight: Tensor, gradient: Tensor, state: ParameterState, numbers: StepNumbers, start: int
) -> None:
    bits: Tensor | None = None
    if state.low is not None or state.first_unit is not None:
        stop = start + len(weight)
        bits = split_weights.random_bits(start, stop, numbers.key, weight.device)
    m, v = _moments(state)
    # The order of operations is torch.optim.AdamW's, so that float32 results equal its bit by bit.
    master = master_of(weight, state)
    master.mul_(numbers.shrinking)
    m.lerp_(gradient, 1 - numbers.beta1)
    v.mul_(numbers.beta2).addcmul_(gradient, gradient, value=1 - numbers.beta2)
    denominator = (v.sqrt() / numbers.root_correction).add_(numbers.eps)
    master.addcdiv_(m, denominator, value=-numbers.step_size)
    if state.low is not None:
        high, low = split_weights.split(master, bits)
        weight.copy_(high)
        state.low.copy_(low)
    elif state.master is not None:
        weight.copy_(master)
    if state.first_unit is not None and bits is not None:
        _store_moments(state, m, v, bits, numbers)


def _moments(state: ParameterState) -> tuple[Tensor, Tensor]:
    if state.first_unit is None or state.second_unit is None:
        return state.first, state.second
    return quantised_moments.decode(state.first, state.second, state.first_unit, state.second_unit)


def _store_moments(
    state: ParameterState, m: Tensor, v: Tensor, bits: Tensor, numbers: StepNumbers
) -> None:
    bound = quantised_moments.quotient_bound(numbers.beta1, numbers.beta2)
    codes = quantised_moments.encode(m, v, bits, bound)
    kept = (state.first, state.second, state.first_unit, state.second_unit)
    for target, value in zip(kept, codes, strict=True):
        if target is not None:
            target.copy_(value)
