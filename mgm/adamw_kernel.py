"""One AdamW step of one parameter on a GPU: every byte is read once and written once.

The same arithmetic as `mgm.adamw_step`, whose names and rules hold here: results in float32 differ
from it by rounding of the last place, the random bits not at all. Importing this module needs
Triton, which comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

from typing import Any

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
    quantised = state.first_unit is not None
    grid = (triton.cdiv(num_blocks(weight.numel()), ROWS),)
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
        quotient_bound(numbers.beta1, numbers.beta2) if quantised else 0.0,
        *numbers.key,
        HAS_GRADIENT=gradient is not None,
        HAS_MASTER=state.master is not None,
        IS_SPLIT=state.low is not None,
        QUANTISED=quantised,
        BLOCK_SIZE=BLOCK,
        NUM_ROWS=ROWS,
        FIRST=FIRST_TOP,
        SECOND=SECOND_TOP,
        SMALL=TINY,
        HALF=HALF_BFLOAT16,
        LOST=LOST_BITS,
        MIX_ONE=MIX_FIRST,
        MIX_TWO=MIX_SECOND,
        num_warps=WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mix(value: Any, MIX_ONE: tl.constexpr, MIX_TWO: tl.constexpr) -> Any:
    value = (value ^ (value >> 16)) * MIX_ONE
    value = (value ^ (value >> 15)) * MIX_TWO
    return value ^ (value >> 16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _join(high: Any, low: Any) -> Any:
    pattern = (high.to(tl.int32) << 16) + (low.to(tl.int32) << 8)
    return pattern.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _round_to_24_bits(whole: Any, bits: Any, LOST: tl.constexpr) -> Any:
    pattern = whole.to(tl.int32, bitcast=True) + (bits & LOST).to(tl.int32)
    return pattern - (pattern & LOST)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _encode_second(v: Any, bits: Any, SECOND: tl.constexpr, SMALL: tl.constexpr) -> Any:
    TOP: tl.constexpr = SECOND * SECOND * SECOND
    root = tl.sqrt(v)
    largest = tl.max(root, axis=1)
    factor = tl.where(largest > SMALL, TOP / largest, 0.0)
    scaled = root * factor[:, None]
    code = tl.floor(tl.exp2(tl.log2(tl.maximum(scaled, 1e-30)) * (1.0 / 3.0)))
    code = tl.minimum(code, SECOND - 1.0)
    above = code + 1.0
    low = code * code * code
    high = above * above * above
    share = (scaled - low) * (scaled + low) / ((high - low) * (high + low))
    dice = ((bits >> 16).to(tl.float32) + 0.5) / 65536.0
    code = tl.where(dice < share, above, code)
    code = tl.where(scaled > 0.0, tl.maximum(code, 1.0), 0.0)
    return code, largest / TOP


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _encode_first(
    quotient: Any, bits: Any, bound: Any, FIRST: tl.constexpr, SMALL: tl.constexpr
) -> Any:
    largest = tl.minimum(tl.max(tl.abs(quotient), axis=1), bound)
    factor = tl.where(largest > SMALL, FIRST / largest, 0.0)
    dice = (((bits >> 8) & 0xFF).to(tl.float32) + 0.5) / 256.0
    code = tl.floor(quotient * factor[:, None] + dice)
    return tl.minimum(tl.maximum(code, -1.0 * FIRST), 1.0 * FIRST), largest / FIRST


# The keys change with every step: specialising on them would compile again.
@triton.jit(do_not_specialize=["key_one", "key_two"])  # type: ignore[untyped-decorator,unused-ignore]
def _step(
    weight: Any,
    gradient: Any,
    master: Any,
    low: Any,
    first: Any,
    second: Any,
    first_unit: Any,
    second_unit: Any,
    gradient_scale: Any,
    num_elements: Any,
    shrinking: Any,
    step_size: Any,
    root_correction: Any,
    eps: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    bound: Any,
    key_one: Any,
    key_two: Any,
    HAS_GRADIENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SMALL: tl.constexpr,
    HALF: tl.constexpr,
    LOST: tl.constexpr,
    MIX_ONE: tl.constexpr,
    MIX_TWO: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)  # (rows,)
    at = rows[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # (rows, BLOCK_SIZE)
    inside = at < num_elements
    row_inside = rows * BLOCK_SIZE < num_elements
    if IS_SPLIT or QUANTISED:
        bits = _mix(at.to(tl.uint32) ^ key_one.to(tl.uint32), MIX_ONE, MIX_TWO)
        bits = _mix(bits ^ key_two.to(tl.uint32), MIX_ONE, MIX_TWO)

    m = tl.load(first + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0).to(tl.float32)
    if QUANTISED:
        root = v * v * v * tl.load(second_unit + rows, mask=row_inside, other=0.0)[:, None]
        m = m * tl.load(first_unit + rows, mask=row_inside, other=0.0)[:, None] * root
        v = root * root
    if HAS_GRADIENT:
        slope = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        slope = slope * tl.load(gradient_scale)
        m = m + rest1 * (slope - m)
        v = v * beta2 + rest2 * slope * slope
    else:
        m = m - rest1 * m
        v = v * beta2

    if IS_SPLIT:
        high = tl.load(weight + at, mask=inside, other=0)
        value = _join(high, tl.load(low + at, mask=inside, other=0))
    elif HAS_MASTER:
        value = tl.load(master + at, mask=inside, other=0)
    else:
        value = tl.load(weight + at, mask=inside, other=0)
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction + tl.zeros_like(v)) + eps
    value = value * shrinking + tl.div_rn(-step_size * m, denominator)
    if IS_SPLIT:
        pattern = _round_to_24_bits(value, bits, LOST)
        high_part = (pattern + HALF) >> 16
        low_part = (pattern - (high_part << 16)) >> 8
        tl.store(weight + at, high_part.to(tl.int16), mask=inside)
        tl.store(low + at, low_part.to(tl.int8), mask=inside)
    else:
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)
        if HAS_MASTER:
            tl.store(master + at, value, mask=inside)

    if QUANTISED:
        second_code, second_scale = _encode_second(v, bits, SECOND, SMALL)
        root = second_code * second_code * second_code * second_scale[:, None]
        quotient = tl.where(root > 0.0, m / root, 0.0)
        first_code, first_scale = _encode_first(quotient, bits, bound, FIRST, SMALL)
        tl.store(second + at, second_code.to(tl.uint8), mask=inside)
        tl.store(first + at, first_code.to(tl.int8), mask=inside)
        tl.store(second_unit + rows, second_scale, mask=row_inside)
        tl.store(first_unit + rows, first_scale, mask=row_inside)
    else:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
