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
    if query.is_cuda and query.dtype in _HALF:
        if (flash := _flash_attn()) is not None:
            mixed: Tensor = flash(query, key, value, bounds, bounds, longest, longest, causal=True)
            return mixed
        # PyTorch's public wrapper of this operator changed its arguments from release to release;
        # the operator, which has a gradient of its own, did not.
        forward: Any = torch.ops.aten._flash_attention_forward
        outputs: tuple[Tensor, ...] = forward(
            query, key, value.contiguous(), bounds, bounds, longest, longest, 0.0, True, False
        )
        return outputs[0]
    return _attend_each(query, key, value, bounds)


def _attend_each(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    mixed = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        one = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


@cache
def _flash_attn() -> Any:
    """Return the package's function for sequences of several lengths, None where it is absent."""
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func
