"""The depthwise 7 x 7 convolution of ConvNeXt with channels last, on a GPU as a Triton kernel.

Owns the kernel, the form of the weights that it reads, and the plain convolution beside it, which
runs wherever the kernel cannot. cuDNN's depthwise kernel with channels last takes several times as
long as reading and writing the maps.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_SIZE = 7


def pack_depthwise(weight: Tensor) -> Tensor:
    """Return a depthwise weight (C, 1, 7, 7) as (49, C), row by row of the kernel.

    Raises:
        ValueError: If the kernel is not 7 x 7, one for each channel.
    """
    if weight.shape[1:] != (1, KERNEL_SIZE, KERNEL_SIZE):
        raise ValueError(f"a depthwise 7 x 7 weight is (C, 1, 7, 7), not {tuple(weight.shape)}")
    return weight.detach().flatten(1).t().contiguous()


def depthwise(cells: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """Convolve every channel with its own 7 x 7 kernel, zeros around the map.

    Products are summed in float32 on a GPU, whatever the dtype.

    Args:
        cells: (B, H, W, C), contiguous.
        packed: (49, C), from `pack_depthwise`.
        bias: (C,).

    Returns:
        (B, H, W, C) in the dtype of `cells`.
    """
    if cells.is_cuda and cells.dtype in _DTYPES and (kernel := _kernel()) is not None:
        found: Tensor = kernel.depthwise(cells.contiguous(), packed, bias)
        return found
    return _convolved(cells, packed, bias)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _convolved(cells: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    channels = cells.shape[-1]
    weight = packed.t().reshape(channels, 1, KERNEL_SIZE, KERNEL_SIZE)
    first = cells.permute(0, 3, 1, 2)  # (B, C, H, W)
    mixed = F.conv2d(first, weight, bias, padding=KERNEL_SIZE // 2, groups=channels)
    return mixed.permute(0, 2, 3, 1)


@cache
def _kernel() -> Any:
    """Return the module of the kernel, None where its package is absent."""
    if find_spec("triton") is None:
        return None
    from mgm import depthwise_kernel

    return depthwise_kernel
