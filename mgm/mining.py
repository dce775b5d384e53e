"""Patch info mining that never upsamples: the stage maps are read at their own sizes.

Owns a second way to compute what `mgm.model.PatchInfoMining` gives on the map of
`mgm.vision.fuse_stages`; a test keeps the two equal. It is for frozen stage maps, which get no
gradient, and for one low-resolution view of a picture.

Bilinear interpolation is linear, so a product with an upsampled cell is the same mix of products with
its four coarse neighbours, and a weighted sum of upsampled cells is a weighted sum of coarse ones.
At the published sizes a token then reads 8 x 8, 6 x 6, 4 x 4 and 3 x 3 cells of the four stages
instead of 64 cells of the width of all. Layer norm needs the mean of every upsampled cell, which is
linear too, and its second moment, a quadratic form in the four neighbours: five sums over channels of
each coarse map give it.

The normalised cells x enter only through two products, each the adjoint of the other: v . x for a
vector of a token (`_Cells.dot`) and the sum of w x over a token's window (`_Cells.gather`). The
backward pass uses the same two, so nothing as large as a map is kept for it.

Shape legend: I pictures, N = n x n tokens, D their width, M = m x m upsampled cells of a window, k
coarse cells along a window with its rim, C channels of all stages together, C_s of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mgm.vision import fuse_stages

if TYPE_CHECKING:
    from mgm.model import PatchInfoMining


def mine(mining: PatchInfoMining, low: Tensor, stages: Sequence[Tensor]) -> Tensor:
    """Return the detail mined for each token, without the residual.

    Equal to `mining(low, fuse_stages(stages))` to rounding; sums over channels and the softmax are
    in float32 at least, whatever the dtype of the maps. Where a window does not cover whole cells of
    a stage, the map is upsampled after all.

    Args:
        mining: Gives the weights. They and `low` may need gradients.
        low: (I, N, D), tokens in row-major order.
        stages: (I, C_s, H_s, H_s), finest first, fastest with channels last in memory. No gradient
            reaches them.

    Returns:
        (I, N, D).

    Raises:
        ValueError: If the finest map cannot be cut into N equal square windows.
    """
    if not _has_whole_cells(low.shape[1], stages):
        upsampled: Tensor = mining(low, fuse_stages([stage.detach() for stage in stages]))
        return upsampled
    key_norm, key_linear = mining.key.norm, mining.key.linear
    value_norm, value_linear = mining.value.norm, mining.value.linear
    query: Tensor = mining.query(low)
    folded = (query @ key_linear.weight) * (key_norm.weight / math.sqrt(query.shape[-1]))
    # Both biases shift all logits of a window alike, which the softmax cancels. Their gradient is
    # zero and not missing: data-parallel training waits for one from every parameter.
    folded = folded + 0.0 * (key_linear.bias.sum() + key_norm.bias.sum())  # (I, N, C)
    maps = [stage.detach() for stage in stages]
    mean, *_ = _attend(folded, maps, key_norm.eps)  # (I, N, C)
    mined: Tensor = value_linear(mean * value_norm.weight + value_norm.bias)
    return mined


def _has_whole_cells(num_tokens: int, stages: Sequence[Tensor]) -> bool:
    """Whether each token's window covers whole cells of every stage."""
    side = math.isqrt(num_tokens)
    size = stages[0].shape[-1]
    return side * side == num_tokens and all(
        one.shape[-2] == one.shape[-1] and size % one.shape[-1] == 0 and one.shape[-1] % side == 0
        for one in stages
    )


@torch.library.custom_op("mgm::attend_windows", mutates_args=())
def _attend(folded: Tensor, maps: list[Tensor], eps: float) -> list[Tensor]:
    """Return the attention-weighted mean of each window's normalised cells, and what it took.

    An operator of its own, so that a compiler neither looks inside nor keeps windows for later.

    Args:
        folded: (I, N, C), the query behind the key's weights and the logit's scale.
        maps: (I, C_s, H_s, H_s).
        eps: Of the layer norm.

    Returns:
        The mean (I, N, C) in the dtype of the maps; then the attention, the cells' means and one
        over their deviations, (I, N, M) each.
    """
    num_tokens = folded.shape[1]
    if (kernel := _kernel(maps, num_tokens)) is not None:
        last, tables, side = _prepared(maps, num_tokens)
        return list(kernel.attend(folded.contiguous(), last, tables, side, eps))
    with torch.autocast(folded.device.type, enabled=False):
        cells = _Cells.of(maps, num_tokens)
        mean, scale = cells.statistics(eps)  # (I, N, M) each
        cells = cells._replace(mean=mean, scale=scale)
        attention = cells.dot(folded).softmax(-1)  # (I, N, M)
        return [cells.gather(attention).to(maps[0].dtype), attention, mean, scale]


@torch.library.custom_op("mgm::attend_windows_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor, maps: list[Tensor], kept: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Return the gradient (I, N, C) of the folded query, in `dtype`."""
    attention, mean, scale = kept
    num_tokens = attention.shape[1]
    if (kernel := _kernel(maps, num_tokens)) is not None:
        last, tables, side = _prepared(maps, num_tokens)
        found: Tensor = kernel.attend_backward(
            gradient.contiguous(), last, tables, side, (attention, mean, scale), dtype
        )
        return found
    with torch.autocast(attention.device.type, enabled=False):
        cells = _Cells.of(maps, num_tokens)._replace(mean=mean, scale=scale)
        slope = cells.dot(gradient)  # (I, N, M), by the attention
        slope = attention * (slope - (attention * slope).sum(-1, keepdim=True))
        return cells.gather(slope).to(dtype)


@_attend.register_fake
def _(folded: Tensor, maps: list[Tensor], eps: float) -> list[Tensor]:
    window = maps[0].shape[-1] // math.isqrt(folded.shape[1])
    wide = torch.promote_types(maps[0].dtype, torch.float32)
    numbers = folded.new_empty((*folded.shape[:2], window * window), dtype=wide)
    mean = torch.empty_like(folded, dtype=maps[0].dtype, memory_format=torch.contiguous_format)
    return [mean, *(torch.empty_like(numbers) for _ in range(3))]


@_attend_backward.register_fake
def _(gradient: Tensor, maps: list[Tensor], kept: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    folded, maps, _ = inputs
    ctx.save_for_backward(*output[1:], *maps)
    ctx.dtype = folded.dtype


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    attention, mean, scale, *maps = ctx.saved_tensors
    kept = [attention, mean, scale]
    return _attend_backward(gradients[0], maps, kept, ctx.dtype), [None for _ in maps], None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _kernel(maps: Sequence[Tensor], num_tokens: int) -> Any:
    """Return the module of GPU kernels, None where it is absent or not made for these sizes."""
    if not maps[0].is_cuda or find_spec("triton") is None:
        return None
    from mgm import mining_kernel

    return mining_kernel if mining_kernel.is_made_for(maps, num_tokens) else None


def _prepared(maps: Sequence[Tensor], num_tokens: int) -> tuple[list[Tensor], Tensor, int]:
    """Return the maps with channels last, the kernel's tables and the tokens along a side."""
    side = math.isqrt(num_tokens)
    last = [one.permute(0, 2, 3, 1).contiguous() for one in maps]
    ratios = tuple(one.shape[1] // side for one in last)
    return last, _tables(ratios, maps[0].device), side


@cache
def _tables(ratios: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the mixes of all upsampled stages one below the other, (sum of 5 k k, M) float32."""
    window = ratios[0]
    parts = [torch.zeros(0, window * window, device=device)]
    for ratio in ratios:
        if ratio != window:
            weights = _hat(window, ratio, device, torch.float32)
            mix = _outer(weights, weights)
            parts += [mix, _second_moment_mix(ratio, mix)]
    return torch.cat(parts)


class _Stage(NamedTuple):
    """One stage's map, seen as windows with a rim of one cell."""

    padded: Tensor
    """(I, H_s + 3, H_s + 3, C_s): the map with its border repeated, once before and twice behind.

    Where the stage has the upsampled size, the map as it is."""
    cells: Tensor
    """(I, n, n, C_s, k, k), a view."""
    mix: Tensor | None
    """(k * k, M), what each coarse cell adds to each upsampled one; None where they are the same."""
    ratio: int
    """Cells of this stage along a window, without the rim."""


class _Cells(NamedTuple):
    """The normalised upsampled cells of all windows, of which none exists in memory."""

    stages: tuple[_Stage, ...]
    wide: torch.dtype
    """Of all sums."""
    mean: Tensor
    """(I, N, M), over channels."""
    scale: Tensor
    """(I, N, M), one over the standard deviation."""

    @classmethod
    def of(cls, maps: Sequence[Tensor], num_tokens: int) -> _Cells:
        """Cut maps (I, C_s, H_s, H_s) into the windows of N tokens; statistics are left empty."""
        side = math.isqrt(num_tokens)
        wide = torch.promote_types(maps[0].dtype, torch.float32)
        window = maps[0].shape[-1] // side
        stages = tuple(_cut(one, side, window, wide) for one in maps)
        empty = maps[0].new_empty(0)
        return cls(stages, wide, empty, empty)

    def dot(self, vectors: Tensor) -> Tensor:
        """Return the product (I, N, M) of each token's vector (I, N, C) with its window's cells."""
        vectors = vectors.to(self.wide)
        parts = torch.split(vectors, [stage.cells.shape[3] for stage in self.stages], dim=-1)
        products = sum(
            (self._raw_dot(stage, part) for stage, part in zip(self.stages, parts, strict=True)),
            start=torch.zeros((), dtype=self.wide, device=vectors.device),
        )
        return self.scale * (products - self.mean * vectors.sum(-1, keepdim=True))

    def gather(self, weights: Tensor) -> Tensor:
        """Return the sum (I, N, C) of each window's cells with weights (I, N, M)."""
        weights = weights * self.scale
        sums = [self._raw_gather(stage, weights) for stage in self.stages]
        return torch.cat(sums, dim=-1) - (weights * self.mean).sum(-1, keepdim=True)

    def statistics(self, eps: float) -> tuple[Tensor, Tensor]:
        """Return the mean and one over the standard deviation of every cell, (I, N, M) each."""
        firsts, seconds = zip(*(self._moments(stage) for stage in self.stages), strict=True)
        channels = sum(stage.cells.shape[3] for stage in self.stages)
        mean = torch.stack(firsts).sum(0) / channels
        variance = torch.stack(seconds).sum(0) / channels - mean * mean
        return mean, (variance.clamp(min=0) + eps).rsqrt()

    def _raw_dot(self, stage: _Stage, vectors: Tensor) -> Tensor:
        pictures, side = stage.cells.shape[:2]
        spread = vectors.view(pictures, side, side, -1, 1, 1)
        products = (stage.cells.to(self.wide) * spread).sum(3).flatten(3).flatten(1, 2)
        return products if stage.mix is None else products @ stage.mix

    def _raw_gather(self, stage: _Stage, weights: Tensor) -> Tensor:
        pictures, side, *_, rim = stage.cells.shape
        if stage.mix is not None:
            weights = weights @ stage.mix.T  # (I, N, k * k)
        spread = weights.view(pictures, side, side, 1, rim, rim)
        return (stage.cells.to(self.wide) * spread).sum((4, 5)).flatten(1, 2)  # (I, N, C_s)

    def _moments(self, stage: _Stage) -> tuple[Tensor, Tensor]:
        """Return the sums over a stage's channels of every cell and of its square, (I, N, M) each."""
        if stage.mix is None:
            cells = stage.cells.to(self.wide)
            sums = [cells.sum(3), (cells * cells).sum(3)]  # (I, n, n, m, m) each
            first, second = (part.flatten(3).flatten(1, 2) for part in sums)
            return first, second
        padded = stage.padded.to(self.wide)
        here, right = padded[:, :-1, :-1], padded[:, :-1, 1:]
        below, across = padded[:, 1:, :-1], padded[:, 1:, 1:]
        sums = [
            here.sum(-1),
            (here * here).sum(-1),
            (here * right).sum(-1),
            (here * below).sum(-1),
            (here * across + right * below).sum(-1) / 2,
        ]  # (I, H_s + 2, H_s + 2) each
        rim = stage.ratio + 2
        first, *products = (
            _windows(part, rim, stage.ratio).flatten(3).flatten(1, 2) for part in sums
        )  # (I, N, k * k) each
        mix = _second_moment_mix(stage.ratio, stage.mix)
        return first @ stage.mix, torch.cat(products, dim=-1) @ mix


def _cut(one: Tensor, side: int, window: int, wide: torch.dtype) -> _Stage:
    """See a map (I, C_s, H_s, H_s) as windows of `window` upsampled cells along a side."""
    last = one.permute(0, 2, 3, 1)  # (I, H_s, H_s, C_s)
    height = last.shape[1]
    ratio = height // side
    if ratio == window:
        return _Stage(last, _windows(last, ratio, ratio), None, ratio)
    rows = torch.arange(-1, height + 2, device=one.device).clamp(0, height - 1)
    padded = last[:, rows[:, None], rows]
    cells = _windows(padded[:, :-1, :-1], ratio + 2, ratio)
    weights = _hat(window, ratio, one.device, wide)  # (m, k)
    return _Stage(padded, cells, _outer(weights, weights), ratio)


def _windows(cells: Tensor, size: int, step: int) -> Tensor:
    """View (I, h, h, ...) as overlapping windows (I, n, n, ..., size, size)."""
    return cells.unfold(1, size, step).unfold(2, size, step)


def _hat(
    window: int, ratio: int, device: torch.device, dtype: torch.dtype, shift: int = 0
) -> Tensor:
    """Return the bilinear weights (m, k) of coarse cells, the rim first, in upsampled ones.

    Source: bilinear interpolation whose corners are not aligned: cell i of m lies at
    (i + 1/2) k / m - 1/2 among the coarse ones, and a neighbour's weight is one less its distance.

    Args:
        window: m.
        ratio: Coarse cells of a window without its rim.
        device: Of the result.
        dtype: Of the result.
        shift: Give the weights of the neighbour this many cells on.
    """
    fine = torch.arange(window, device=device, dtype=dtype)
    places = (fine + 0.5) * (ratio / window) + 0.5
    coarse = torch.arange(shift, ratio + 2 + shift, device=device, dtype=dtype)
    return (1 - (places[:, None] - coarse).abs()).clamp(min=0)


def _outer(down: Tensor, along: Tensor) -> Tensor:
    """Join weights of rows and of columns, (m, k) each, to (k * k, M)."""
    joined = down.T[:, None, :, None] * along.T[None, :, None, :]  # (k, k, m, m)
    return joined.flatten(2).flatten(0, 1)


def _second_moment_mix(ratio: int, mix: Tensor) -> Tensor:
    """Return (4 k k, M): what products of neighbouring cells add to an upsampled cell's square.

    In the order of the products: a cell with itself, with its right neighbour, with the one below,
    and half the sum over the two diagonals of a square of four. Expanding the square of
    a0 b0 x00 + a0 b1 x01 + a1 b0 x10 + a1 b1 x11 gives weights that are products of a row's and a
    column's: a0^2 for a cell alone and 2 a0 a1 for a pair.
    """
    window = math.isqrt(mix.shape[1])
    weights = _hat(window, ratio, mix.device, mix.dtype)
    alone = weights * weights
    pair = 2 * weights * _hat(window, ratio, mix.device, mix.dtype, shift=1)
    return torch.cat(
        [_outer(alone, alone), _outer(alone, pair), _outer(pair, alone), _outer(pair, pair)]
    )
