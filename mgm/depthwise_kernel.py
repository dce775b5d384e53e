"""The Triton kernel of `mgm.depthwise`. Importing this needs the `triton` package.

A program makes four columns of a few rows for 64 channels: an input cell is loaded and widened once
for the up to four outputs that it reaches, and the rows share what they load in the first cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 64
_COLUMNS = 4
_ROWS = 16
_WARPS = 4


def depthwise(cells: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """Convolve `cells` (B, H, W, C), contiguous, with `packed` (49, C) and add `bias` (C,)."""
    batch, height, width, channels = cells.shape
    out = torch.empty_like(cells)
    tiles = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
    _depthwise_kernel[(batch * tiles, triton.cdiv(channels, _CHANNELS))](
        cells,
        packed,
        bias,
        out,
        height,
        width,
        channels,
        ROWS=_ROWS,
        BLOCK=_CHANNELS,
        num_warps=_WARPS,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _depthwise_kernel(  # type: ignore[no-untyped-def]
    cells, packed, bias, out, height, width, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tiles_along = tl.cdiv(width, 4)
    tiles_down = tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    left = tile % tiles_along * 4
    rows = tile // tiles_along % tiles_down * ROWS + tl.arange(0, ROWS)
    picture = (tile // (tiles_along * tiles_down)).to(tl.int64) * height * width * channels
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    start = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    sum0 = tl.zeros([ROWS, BLOCK], tl.float32) + start[None, :]
    sum1, sum2, sum3 = sum0, sum0, sum0
    for down in range(7):
        row = rows + (down - 3)
        line = cells + picture + row[:, None] * width * channels + channel[None, :]
        inside = ((row >= 0) & (row < height))[:, None] & exists[None, :]
        taps = packed + down * 7 * channels + channel
        weights = (
            _tap(taps, exists),
            _tap(taps + channels, exists),
            _tap(taps + 2 * channels, exists),
            _tap(taps + 3 * channels, exists),
            _tap(taps + 4 * channels, exists),
            _tap(taps + 5 * channels, exists),
            _tap(taps + 6 * channels, exists),
        )
        for right in tl.static_range(10):
            column = left + (right - 3)
            mask = inside & (column >= 0) & (column < width)
            value = tl.load(line + column * channels, mask=mask, other=0.0).to(tl.float32)
            if right < 7:
                sum0 += value * weights[right]
            if right > 0 and right < 8:
                sum1 += value * weights[right - 1]
            if right > 1 and right < 9:
                sum2 += value * weights[right - 2]
            if right > 2:
                sum3 += value * weights[right - 3]
    places = out + picture + (rows[:, None] * width + left) * channels + channel[None, :]
    inside = (rows < height)[:, None] & exists[None, :]
    tl.store(places, sum0, mask=inside)
    tl.store(places + channels, sum1, mask=inside & (left + 1 < width))
    tl.store(places + 2 * channels, sum2, mask=inside & (left + 2 < width))
    tl.store(places + 3 * channels, sum3, mask=inside & (left + 3 < width))


@triton.jit  # type: ignore[untyped-decorator]
def _tap(place, exists):  # type: ignore[no-untyped-def]
    """Load one weight of every channel, (1, BLOCK) float32."""
    return tl.load(place, mask=exists, other=0.0).to(tl.float32)[None, :]
