"""The Triton kernels of the vision side agree with PyTorch; without a GPU they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mgm import mining
from mgm.depthwise import pack_depthwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (24, 40, 48, 96)
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON and (DEVICE == "cuda" or IS_INTERPRETED):
    from mgm import depthwise_kernel, mining_kernel

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the triton package is not installed")
on_device = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not IS_INTERPRETED),
    reason="without a GPU the kernels run in the process of test_interpreted",
)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or IS_INTERPRETED, reason="the kernels run in this process")
def test_interpreted() -> None:
    """Triton decides when it is first imported whether it interprets, hence another process."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "cells"), [(2, (8, 4, 2, 1)), (3, (8, 4, 2, 1)), (1, (4, 4, 2, 1))]
)
def test_mining(side: int, cells: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(side)
    maps = [
        (torch.randn(2, width, side * ratio, side * ratio, device=DEVICE) + 0.5).to(dtype)
        for width, ratio in zip(WIDTHS, cells, strict=True)
    ]
    vectors = torch.randn(2, side * side, sum(WIDTHS), device=DEVICE, dtype=dtype) * 0.2
    gradient = torch.randn(2, side * side, sum(WIDTHS), device=DEVICE).to(dtype)
    assert mining_kernel.is_made_for(maps, side * side)
    last, tables, tokens = mining._prepared(maps, side * side)
    mined, *kept = mining_kernel.attend(vectors, last, tables, tokens, 1e-5)
    slope = mining_kernel.attend_backward(gradient, last, tables, tokens, tuple(kept), dtype)

    wide = [one.double() for one in maps]
    true, *numbers = mining._attend(vectors.double(), wide, 1e-5)
    back = mining._attend_backward(gradient.double(), wide, numbers, torch.float64)
    for ours, theirs in zip(kept, numbers, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    rounding = 1e-5 if dtype == torch.float32 else 4e-3
    assert_near(mined, true, rounding)
    assert_near(slope, back, rounding)


def assert_near(ours: Tensor, theirs: Tensor, limit: float) -> None:
    assert (ours.double() - theirs).norm() <= limit * theirs.norm()


@on_device
def test_which_sizes_the_mining_kernel_takes() -> None:
    maps = [torch.zeros(1, 4, size, size) for size in (16, 8, 4, 2)]
    assert mining_kernel.is_made_for(maps, 4)
    assert not mining_kernel.is_made_for(maps, 1)
    assert not mining_kernel.is_made_for(maps[:3], 4)
    assert not mining_kernel.is_made_for([one.double() for one in maps], 4)
    assert not mining_kernel.is_made_for([F.pad(one, (0, 8, 0, 8)) for one in maps], 16)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 8, 24), (1, 9, 7, 80), (1, 3, 2, 5)])
def test_depthwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels = shape[-1]
    cells = torch.randn(shape, device=DEVICE).to(dtype)
    weight = (torch.randn(channels, 1, 7, 7, device=DEVICE) / 7).to(dtype)
    bias = torch.randn(channels, device=DEVICE).to(dtype)
    ours = depthwise_kernel.depthwise(cells, pack_depthwise(weight), bias)
    first = cells.permute(0, 3, 1, 2).double()
    true = F.conv2d(first, weight.double(), bias.double(), padding=3, groups=channels)
    assert ours.dtype == dtype
    assert_near(ours, true.permute(0, 2, 3, 1), 1e-6 if dtype == torch.float32 else 5e-3)
