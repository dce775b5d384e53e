"""One GPU kernel for patch info mining at the stages' own sizes, forward and backward.

Owns the Triton form of what `mgm.mining` computes in PyTorch: one program a token reads its windows of
the four stages twice, once for the products with its vector and once for their weighted sum. Importing
this needs the `triton` package; `mgm.mining` does so only where there is a GPU.

Shape legend: that of `mgm.mining`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_STAGES = 4
LARGEST_WINDOW = 8
"""Upsampled cells along a window: the kernel holds all of a window's numbers in registers."""
_TILE = tl.constexpr(4096)
_WARPS = 4


def is_made_for(maps: Sequence[Tensor], num_tokens: int) -> bool:
    """Whether maps (I, C_s, H_s, H_s) and the windows of N tokens are such as the kernel takes."""
    window = maps[0].shape[-1] // math.isqrt(num_tokens)
    return (
        len(maps) == NUM_STAGES
        and window <= LARGEST_WINDOW
        and window & (window - 1) == 0
        and maps[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def attend(
    vectors: Tensor, maps: Sequence[Tensor], tables: Tensor, side: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mine with folded queries.

    Args:
        vectors: (I, N, C), contiguous.
        maps: Four (I, H_s, H_s, C_s), contiguous.
        tables: (sum of 5 k k, M) float32, of each stage that is upsampled: its mix, then that of
            the four products of neighbours.
        side: n.
        eps: Of the layer norm.

    Returns:
        The weighted mean (I, N, C) in the dtype of the maps; then the attention, the cells' means
        and one over their deviations, (I, N, M) float32 each.
    """
    mined = torch.empty(vectors.shape, dtype=maps[0].dtype, device=vectors.device)
    window = maps[0].shape[1] // side
    shape = (*vectors.shape[:2], window * window)
    # Tensors of their own: what an operator returns must not share memory.
    attention, mean, scale = (vectors.new_empty(shape, dtype=torch.float32) for _ in range(3))
    _launch(vectors, maps, tables, side, eps, (attention, mean, scale), mined, forward=True)
    return mined, attention, mean, scale


def attend_backward(
    gradients: Tensor,
    maps: Sequence[Tensor],
    tables: Tensor,
    side: int,
    kept: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient (I, N, C) of the folded queries, in `dtype`.

    Args:
        gradients: (I, N, C), contiguous, of the weighted mean.
        maps: As in `attend`.
        tables: As in `attend`.
        side: n.
        kept: The three tensors that `attend` returned last.
        dtype: Of the result.
    """
    to_vectors = torch.empty(gradients.shape, dtype=dtype, device=gradients.device)
    _launch(gradients, maps, tables, side, 0.0, kept, to_vectors, forward=False)
    return to_vectors


def _launch(
    vectors: Tensor,
    maps: Sequence[Tensor],
    tables: Tensor,
    side: int,
    eps: float,
    kept: tuple[Tensor, Tensor, Tensor],
    result: Tensor,
    *,
    forward: bool,
) -> None:
    sizes = [(one.shape[3], one.shape[1] // side) for one in maps]
    _attend_kernel[(vectors.shape[0] * vectors.shape[1],)](
        vectors,
        *kept,
        result,
        *maps,
        tables,
        eps,
        side,
        *(size for pair in sizes for size in pair),
        forward,
        num_warps=_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    vectors,
    attention,
    mean,
    scale,
    result,
    map0,
    map1,
    map2,
    map3,
    tables,
    eps,
    SIDE: tl.constexpr,
    C0: tl.constexpr,
    R0: tl.constexpr,
    C1: tl.constexpr,
    R1: tl.constexpr,
    C2: tl.constexpr,
    R2: tl.constexpr,
    C3: tl.constexpr,
    R3: tl.constexpr,
    FORWARD: tl.constexpr,
):
    M: tl.constexpr = R0 * R0
    C: tl.constexpr = C0 + C1 + C2 + C3
    table2 = tables + _table_rows(R0, R1) * M
    table3 = table2 + _table_rows(R0, R2) * M
    token = tl.program_id(0).to(tl.int64)
    own = vectors + token * C
    zero = tl.zeros([M], tl.float32)
    found = (zero, zero, zero, 0.0)
    found = _read(found, own, map0, tables, token, SIDE, R0, C0, R0, FORWARD)
    found = _read(found, own + C0, map1, tables, token, SIDE, R0, C1, R1, FORWARD)
    found = _read(found, own + C0 + C1, map2, table2, token, SIDE, R0, C2, R2, FORWARD)
    found = _read(found, own + C0 + C1 + C2, map3, table3, token, SIDE, R0, C3, R3, FORWARD)
    place = token * M + tl.arange(0, M)
    if FORWARD:
        centre = found[1] / C
        variance = tl.maximum(found[2] / C - centre * centre, 0.0)
        spread = 1.0 / tl.sqrt(variance + eps)
        logits = spread * (found[0] - centre * found[3])
        powers = tl.exp(logits - tl.max(logits, 0))
        weights = powers / tl.sum(powers, 0)
        tl.store(attention + place, weights)
        tl.store(mean + place, centre)
        tl.store(scale + place, spread)
    else:
        centre, spread = tl.load(mean + place), tl.load(scale + place)
        softmax = tl.load(attention + place)
        slope = spread * (found[0] - centre * found[3])
        weights = softmax * (slope - tl.sum(softmax * slope, 0))
    weights = weights * spread
    shift = tl.sum(weights * centre, 0)
    out = result + token * C
    _write(weights, shift, out, map0, tables, token, SIDE, R0, C0, R0)
    _write(weights, shift, out + C0, map1, tables, token, SIDE, R0, C1, R1)
    _write(weights, shift, out + C0 + C1, map2, table2, token, SIDE, R0, C2, R2)
    _write(weights, shift, out + C0 + C1 + C2, map3, table3, token, SIDE, R0, C3, R3)


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    found,
    vectors,
    rows_last,
    table,
    token,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    RATIO: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """Add a stage's share to a window's products, sums and sums of squares, and to the vector's sum."""
    RIM: tl.constexpr = RATIO != WINDOW
    K: tl.constexpr = _padded_cells(WINDOW, RATIO)
    BLOCK: tl.constexpr = _TILE // K
    products = tl.zeros([K], tl.float32)
    sums, squares, along = products, products, products
    down, across, total = products, products, found[3]
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        vector = tl.load(vectors + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        total += tl.sum(vector, 0)
        here = _tile(rows_last, token, channel, 0, 0, SIDE, WINDOW, CHANNELS, RATIO)
        products += tl.sum(here * vector[None, :], 1)
        if FORWARD:
            sums += tl.sum(here, 1)
            squares += tl.sum(here * here, 1)
            if RIM:
                right = _tile(rows_last, token, channel, 0, 1, SIDE, WINDOW, CHANNELS, RATIO)
                below = _tile(rows_last, token, channel, 1, 0, SIDE, WINDOW, CHANNELS, RATIO)
                corner = _tile(rows_last, token, channel, 1, 1, SIDE, WINDOW, CHANNELS, RATIO)
                along += tl.sum(here * right, 1)
                down += tl.sum(here * below, 1)
                across += tl.sum(here * corner + right * below, 1)
    if RIM:
        products = _mixed(products, table, 0, WINDOW, RATIO)
        if FORWARD:
            sums = _mixed(sums, table, 0, WINDOW, RATIO)
            squares = _mixed(squares, table, 1, WINDOW, RATIO)
            squares += _mixed(along, table, 2, WINDOW, RATIO)
            squares += _mixed(down, table, 3, WINDOW, RATIO)
            squares += _mixed(across * 0.5, table, 4, WINDOW, RATIO)
    if FORWARD:
        return found[0] + products, found[1] + sums, found[2] + squares, total
    return found[0] + products, found[1], found[2], total


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    weights,
    shift,
    out,
    rows_last,
    table,
    token,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    RATIO: tl.constexpr,
):
    """Store the weighted sum of a stage's cells less `shift`."""
    K: tl.constexpr = _padded_cells(WINDOW, RATIO)
    BLOCK: tl.constexpr = _TILE // K
    if RATIO != WINDOW:
        weights = tl.sum(weights[None, :] * _mix(table, 0, WINDOW, RATIO), 1)  # (K,)
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        cells = _tile(rows_last, token, channel, 0, 0, SIDE, WINDOW, CHANNELS, RATIO)
        mixed = tl.sum(cells * weights[:, None], 0) - shift
        tl.store(out + channel, mixed, mask=channel < CHANNELS)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    rows_last,
    token,
    channel,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    RATIO: tl.constexpr,
):
    """Load (K, channels) of a window with its rim, moved by DOWN and RIGHT; zero where K is padding."""
    RIM: tl.constexpr = RATIO != WINDOW
    SIZE: tl.constexpr = RATIO + 2 * RIM
    HEIGHT: tl.constexpr = SIDE * RATIO
    cell = tl.arange(0, _padded_cells(WINDOW, RATIO))
    row = (token // SIDE % SIDE).to(tl.int32) * RATIO - RIM + DOWN + cell // SIZE
    column = (token % SIDE).to(tl.int32) * RATIO - RIM + RIGHT + cell % SIZE
    row = tl.minimum(tl.maximum(row, 0), HEIGHT - 1)
    column = tl.minimum(tl.maximum(column, 0), HEIGHT - 1)
    picture = rows_last + token // (SIDE * SIDE) * (HEIGHT * HEIGHT * CHANNELS)
    places = (row * HEIGHT + column)[:, None] * CHANNELS + channel[None, :]
    mask = (cell < SIZE * SIZE)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(picture + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(  # type: ignore[no-untyped-def]
    coarse, table, PART: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr
):
    """Return what numbers of the coarse cells (K,) give in the upsampled ones (M,)."""
    return tl.sum(coarse[:, None] * _mix(table, PART, WINDOW, RATIO), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _mix(  # type: ignore[no-untyped-def]
    table, PART: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr
):
    """Load one of a stage's five tables, (K, M)."""
    COUNT: tl.constexpr = (RATIO + 2) * (RATIO + 2)
    M: tl.constexpr = WINDOW * WINDOW
    cell = tl.arange(0, _padded_cells(WINDOW, RATIO))
    places = (PART * COUNT + cell)[:, None] * M + tl.arange(0, M)[None, :]
    return tl.load(table + places, mask=(cell < COUNT)[:, None], other=0.0)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _padded_cells(window, ratio):  # type: ignore[no-untyped-def]
    size = ratio if ratio == window else ratio + 2
    return triton.next_power_of_2(size * size)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _table_rows(window, ratio):  # type: ignore[no-untyped-def]
    return 0 if ratio == window else 5 * (ratio + 2) ** 2
