"""One AdamW step of one parameter on a GPU: every byte is read once and written once.

The same arithmetic as `mgm.adamw_step`, whose names and rules hold here: results in float32 differ
from it by rounding of the last place, the random bits not at all. Importing this module needs
Triton, which comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgm.adamw_step import ParameterState, StepNumbers
from mgm.quantised_moments import BLOCK, FIRST_TOP, SECOND_TOP, TINY, num_blocks, quotient_bound
from mgm.split_weights import HALF_BFLOAT16, LOST_BITS, MIX_FIRST, MIX_SECOND

ROWS = 4
"""Blocks that one program works on."""
WARPS = 4
"""Of one program."""

# A kernel reads no other globals than these.
_BLOCK = tl.constexpr(BLOCK)
_FIRST = tl.constexpr(float(FIRST_TOP))
_SECOND = tl.constexpr(float(SECOND_TOP))
_SECOND_CUBE = tl.constexpr(float(SECOND_TOP**3))
_TINY = tl.constexpr(TINY)
_HALF = tl.constexpr(HALF_BFLOAT16)
_LOST = tl.constexpr(LOST_BITS)
_MIX_FIRST = tl.constexpr(MIX_FIRST)
_MIX_SECOND = tl.constexpr(MIX_SECOND)


def step_kernel(
    weight: Tensor,
    gradient: Tensor | None,
    state: ParameterState,
    numbers: StepNumbers,
    gradient_scale: Tensor,
) -> None:
    """Update a parameter and its state in place.

    Args:
        weight: (N,), bfloat16 or float32, on a GPU like the rest.
        gradient: (N,), any float type; None means zero.
        state: Of this parameter.
        numbers: Of this step.
        gradient_scale: A factor of the gradient, one float32 element.
    """
    grid = (triton.cdiv(num_blocks(weight.numel()), ROWS),)
    bound = 0.0
    if state.first_unit is not None:
        bound = quotient_bound(numbers.beta1, numbers.beta2)
    _step[grid](
        weight.view(torch.int16) if state.low is not None else weight,
        gradient,
        state.master,
        state.low,
        state.first,
        state.second,
        state.first_unit,
        state.second_unit,
        gradient_scale,
        weight.numel(),
        numbers.shrinking,
        numbers.step_size,
        numbers.root_correction,
        numbers.eps,
        1 - numbers.beta1,
        numbers.beta2,
        1 - numbers.beta2,
        bound,
        *numbers.key,
        NUM_ROWS=ROWS,
        num_warps=WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mix(value: tl.tensor) -> tl.tensor:
    value = (value ^ (value >> 16)) * _MIX_FIRST
    value = (value ^ (value >> 15)) * _MIX_SECOND
    return value ^ (value >> 16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _join(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    pattern = (high.to(tl.int32) << 16) + (low.to(tl.int32) << 8)
    return pattern.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _split(whole: tl.tensor, bits: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    pattern = whole.to(tl.int32, bitcast=True) + (bits & _LOST).to(tl.int32)
    pattern = pattern - (pattern & _LOST)
    high = (pattern + _HALF) >> 16
    return high.to(tl.int16), ((pattern - (high << 16)) >> 8).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _encode_second(v: tl.tensor, bits: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    root = tl.sqrt(v)
    largest = tl.max(root, axis=1)  # (rows,)
    factor = tl.where(largest > _TINY, _SECOND_CUBE / largest, 0.0)
    scaled = root * factor[:, None]
    code = tl.floor(tl.exp2(tl.log2(tl.maximum(scaled, _TINY)) * (1.0 / 3.0)))
    code = tl.minimum(code, _SECOND - 1.0)
    above = code + 1.0
    low = code * code * code
    high = above * above * above
    share = (scaled - low) * (scaled + low) / ((high - low) * (high + low))
    dice = ((bits >> 16).to(tl.float32) + 0.5) / 65536.0
    code = tl.where(dice < share, above, code)
    code = tl.where(scaled > 0.0, tl.maximum(code, 1.0), 0.0)
    return code, largest / _SECOND_CUBE


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _encode_first(
    quotient: tl.tensor, bits: tl.tensor, bound: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    largest = tl.minimum(tl.max(tl.abs(quotient), axis=1), bound)  # (rows,)
    factor = tl.where(largest > _TINY, _FIRST / largest, 0.0)
    dice = (((bits >> 8) & 0xFF).to(tl.float32) + 0.5) / 256.0
    code = tl.floor(quotient * factor[:, None] + dice)
    return tl.minimum(tl.maximum(code, -_FIRST), _FIRST), largest / _FIRST


# The keys change with every step: specialising on them would compile again.
@triton.jit(do_not_specialize=["key_one", "key_two"])  # type: ignore[untyped-decorator,unused-ignore]
def _step(
    weight: tl.tensor,
    gradient: tl.tensor,
    master: tl.tensor,
    low: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    first_unit: tl.tensor,
    second_unit: tl.tensor,
    gradient_scale: tl.tensor,
    num_elements: tl.tensor,
    shrinking: tl.tensor,
    step_size: tl.tensor,
    root_correction: tl.tensor,
    eps: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    bound: tl.tensor,
    key_one: tl.tensor,
    key_two: tl.tensor,
    NUM_ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)  # (rows,)
    at = rows[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]  # (rows, BLOCK)
    inside = at < num_elements
    bits = _mix(_mix(at.to(tl.uint32) ^ key_one.to(tl.uint32)) ^ key_two.to(tl.uint32))
    m, v = _load_moments(first, second, first_unit, second_unit, rows, at, num_elements)
    slope = tl.zeros_like(v)
    if gradient is not None:
        slope = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        slope = slope * tl.load(gradient_scale)
    m = m + rest1 * (slope - m)
    v = v * beta2 + rest2 * slope * slope
    value = tl.load((weight if master is None else master) + at, mask=inside, other=0)
    if low is not None:
        value = _join(value, tl.load(low + at, mask=inside, other=0))
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction + tl.zeros_like(v)) + eps
    value = value * shrinking + tl.div_rn(-step_size * m, denominator)
    if low is not None:
        high_part, low_part = _split(value, bits)
        tl.store(weight + at, high_part, mask=inside)
        tl.store(low + at, low_part, mask=inside)
    else:
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)
    if master is not None:
        tl.store(master + at, value, mask=inside)
    _store_moments(
        first, second, first_unit, second_unit, rows, at, num_elements, m, v, bits, bound
    )


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load_moments(
    first: tl.tensor,
    second: tl.tensor,
    first_unit: tl.tensor,
    second_unit: tl.tensor,
    rows: tl.tensor,
    at: tl.tensor,
    num_elements: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    inside = at < num_elements
    m = tl.load(first + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0).to(tl.float32)
    if first_unit is not None:
        filled = rows * _BLOCK < num_elements
        root = v * v * v * tl.load(second_unit + rows, mask=filled, other=0.0)[:, None]
        m = m * tl.load(first_unit + rows, mask=filled, other=0.0)[:, None] * root
        v = root * root
    return m, v


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _store_moments(
    first: tl.tensor,
    second: tl.tensor,
    first_unit: tl.tensor,
    second_unit: tl.tensor,
    rows: tl.tensor,
    at: tl.tensor,
    num_elements: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    bits: tl.tensor,
    bound: tl.tensor,
) -> None:
    inside = at < num_elements
    if first_unit is None:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
    else:
        filled = rows * _BLOCK < num_elements
        second_code, second_scale = _encode_second(v, bits)
        root = second_code * second_code * second_code * second_scale[:, None]
        quotient = tl.where(root > 0.0, m / root, 0.0)
        first_code, first_scale = _encode_first(quotient, bits, bound)
        tl.store(second + at, second_code.to(tl.uint8), mask=inside)
        tl.store(first + at, first_code.to(tl.int8), mask=inside)
        tl.store(second_unit + rows, second_scale, mask=filled)
        tl.store(first_unit + rows, first_scale, mask=filled)
