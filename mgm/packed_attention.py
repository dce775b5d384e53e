"""Causal attention inside each sequence of a packed row.

Owns the choice of kernel: the flash-attn package where it is installed and able, PyTorch's own flash
kernel on other GPUs, and one scaled-dot-product call a sequence everywhere else.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Let every position attend to its own sequence up to itself.

    Args:
        query: (T, H, D).
        key: (T, K, D), K a divisor of H.
        value: (T, K, D).
        bounds: (S + 1,), int32, where sequences begin and end.
        longest: Positions of the longest sequence.

    Returns:
        (T, H, D).
    """
    return attend_behind(query, key, value, bounds, bounds, longest, longest)


def attend_behind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
) -> Tensor:
    """Let sequences attend causally to themselves and to what stands before them.

    Args:
        query: (T, H, D): the last positions of each sequence.
        key: (U, K, D): all positions of each sequence, K a divisor of H.
        value: (U, K, D).
        query_bounds: (S + 1,), int32, where sequences begin and end among the queries.
        key_bounds: (S + 1,), int32, likewise among the keys.
        longest_query: Positions of the longest sequence among the queries.
        longest_key: Likewise among the keys.

    Returns:
        (T, H, D).
    """
    if not (query.is_cuda and query.dtype in _HALF):
        return _attend_each(query, key, value, query_bounds, key_bounds)
    # Both kernels align their causal mask to the last query and the last key.
    spans = query_bounds, key_bounds, longest_query, longest_key
    if (flash := _flash_attn()) is not None:
        mixed: Tensor = flash(query, key, value, *spans, causal=True)
        return mixed
    # PyTorch's public wrapper of this operator changed its arguments from release to release;
    # the operator, which has a gradient of its own, did not.
    forward: Any = torch.ops.aten._flash_attention_forward
    outputs: tuple[Tensor, ...] = forward(query, key, value.contiguous(), *spans, 0.0, True, False)
    return outputs[0]


def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, key_bounds: Tensor
) -> Tensor:
    mixed = []
    pairs = zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True)
    for (start, end), (first, last) in pairs:
        q = query[start:end].transpose(0, 1)[None]
        k, v = (part[first:last].transpose(0, 1)[None] for part in (key, value))
        before = (last - first) - (end - start)
        seen = None
        if before:
            seen = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
            seen = seen.tril(before)
        one = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


@cache
def _flash_attn() -> Any:
    """Return the package's function for sequences of several lengths, None where it is absent."""
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func
