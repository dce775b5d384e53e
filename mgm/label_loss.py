"""Cross-entropy at the labelled positions, a few rows of the vocabulary at a time.

A vocabulary of 256,000 makes logits the largest tensor of a step. They exist here for one chunk of
rows only: the gradient of a chunk is made right after its logits, so nothing is kept or computed
twice. The plain path beside it is `torch.nn.functional.cross_entropy` over all rows.

Shape legend: R labelled positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024
"""Rows whose logits exist together: half a GiB in bfloat16 at the published vocabulary."""


class _Compiled:
    """The element-wise part, compiled at its first use on a GPU."""

    function: Callable[..., tuple[Tensor, Tensor]] | None = None


def label_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, chunk: int = CHUNK_ROWS
) -> Tensor:
    """Return the weighted sum of the cross-entropy of every row.

    Args:
        hidden: (R, E), at the positions that predict a label.
        head: (V, E), the output matrix.
        targets: (R,), ids.
        weights: (R,), float32; 1 / R each gives the mean.
        chunk: Rows whose logits exist together.

    Returns:
        A scalar in float32, differentiable in `hidden` and `head`.
    """
    total: Tensor = _LabelLoss.apply(hidden, head, targets, weights, chunk)  # type: ignore[no-untyped-call]
    return total


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        matrix = head.to(hidden.dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ matrix.t()  # (chunk, V)
            loss, slope = _element_wise(logits)(logits, targets[rows], weights[rows])
            total += loss
            if to_hidden is not None:
                torch.mm(slope, matrix, out=to_hidden[rows])
            if to_head is not None and to_head.dtype == hidden.dtype:
                to_head.addmm_(slope.t(), hidden[rows])
            elif to_head is not None:
                to_head += slope.t() @ hidden[rows]
        ctx.save_for_backward(to_hidden, to_head)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_head = ctx.saved_tensors
        (gradient,) = gradients
        scaled = (None if t is None else t.mul_(gradient.to(t.dtype)) for t in (to_hidden, to_head))
        return (*scaled, None, None, None)


def _element_wise(logits: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    if not logits.is_cuda:
        return _loss_and_slope
    if _Compiled.function is None:
        _Compiled.function = torch.compile(_loss_and_slope, dynamic=True)
    return _Compiled.function


def _loss_and_slope(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and its derivative by the logits (chunk, V), in their dtype."""
    wide = logits.float()
    highest = wide.amax(-1, keepdim=True)
    powers = (wide - highest).exp()
    sums = powers.sum(-1, keepdim=True)
    picked = wide.gather(1, targets[:, None])
    losses = (highest + sums.log() - picked).squeeze(-1)  # (chunk,)
    is_target = torch.arange(wide.shape[1], device=wide.device) == targets[:, None]
    slope = (powers / sums - is_target.float()) * weights[:, None]
    return (losses * weights).sum(), slope.to(logits.dtype)
