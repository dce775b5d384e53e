"""Mining at the stages' own sizes agrees with mining on the fused map, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mgm.config import ModelConfig
from mgm.mining import mine
from mgm.model import PatchInfoMining
from mgm.vision import fuse_stages
from tests.mgm.conftest import tiny_model

WIDTHS = (5, 6, 7, 9)


def random_mining(dtype: torch.dtype, width: int = 10, high: int = sum(WIDTHS)) -> PatchInfoMining:
    mining = PatchInfoMining(width, high).to(dtype)
    with torch.no_grad():
        for parameter in mining.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mining


def random_case(
    side: int, cells: tuple[int, ...], dtype: torch.dtype, pictures: int = 2, offset: float = 0.0
) -> tuple[PatchInfoMining, Tensor, list[Tensor]]:
    """Return modules, tokens and maps of which a window holds `cells` x `cells` for each stage."""
    torch.manual_seed(side)
    mining = random_mining(dtype)
    low = torch.randn(pictures, side * side, 10, dtype=dtype)
    stages = [
        torch.randn(pictures, width, side * ratio, side * ratio, dtype=dtype) * 2 + offset
        for width, ratio in zip(WIDTHS, cells, strict=True)
    ]
    return mining, low, stages


def exact_fused(stages: list[Tensor]) -> Tensor:
    """Fuse without the detour through float32."""
    size = stages[0].shape[-2:]
    return torch.cat([F.interpolate(one, size=size, mode="bilinear") for one in stages], dim=1)


def gradients(mining: PatchInfoMining, low: Tensor, mined: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a fixed function of `mined` by every parameter and by the tokens."""
    torch.manual_seed(5)
    named = {**dict(mining.named_parameters()), "low": low}
    found = torch.autograd.grad((mined * torch.randn_like(mined)).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize(
    "cells", [(8, 4, 2, 1), (16, 8, 4, 2), (6, 3, 2, 1), (8, 8, 4, 1), (2, 2, 1, 1)]
)
def test_agrees_with_the_fused_map(side: int, cells: tuple[int, ...]) -> None:
    mining, low, stages = random_case(side, cells, torch.float64)
    low.requires_grad_(True)
    fast, plain = mine(mining, low, stages), mining(low, exact_fused(stages))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    for (name, ours), theirs in zip(
        gradients(mining, low, fast).items(), gradients(mining, low, plain).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("offset", [0.0, 6.0])
def test_agrees_in_float32_with_the_published_order(offset: float) -> None:
    mining, low, stages = random_case(3, (8, 4, 2, 1), torch.float32, offset=offset)
    mining.reassociated = False
    low.requires_grad_(True)
    fast, plain = mine(mining, low, stages), mining(low, fuse_stages(stages))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-5)
    ours, theirs = gradients(mining, low, fast), gradients(mining, low, plain)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-4, name


def test_the_border_repeats_itself() -> None:
    """A single coarse cell that differs is spread as interpolation spreads it, corners included."""
    mining, low, stages = random_case(3, (8, 4, 2, 1), torch.float64)
    for position in [(0, 0), (0, 2), (2, 2), (1, 0), (1, 1)]:
        maps = [torch.zeros_like(one) for one in stages]
        maps[3][:, :, position[0], position[1]] = stages[3][:, :, position[0], position[1]]
        fast, plain = mine(mining, low, maps), mining(low, exact_fused(maps))
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


def test_the_model_of_two_cores() -> None:
    config = ModelConfig.preset("mgm-mini")
    torch.manual_seed(0)
    mining = random_mining(torch.float32, config.vision_width, config.high_resolution_width)
    side = config.image_size_aux // 4
    low = torch.randn(2, config.num_image_tokens, config.vision_width)
    stages = [
        torch.randn(2, width, side // 2**place, side // 2**place)
        for place, width in enumerate(config.high_resolution["hidden_sizes"])
    ]
    plain = mining(low, fuse_stages(stages))
    torch.testing.assert_close(mine(mining, low, stages), plain, rtol=1e-4, atol=2e-4)


def test_channels_last_maps_of_the_towers() -> None:
    model = tiny_model()
    features = model.towers(None, torch.randn(2, 3, 128, 128))
    plain = model.mining(features.low, fuse_stages(features.stages))
    maps = [one.to(memory_format=torch.channels_last) for one in features.stages]
    torch.testing.assert_close(mine(model.mining, features.low, maps), plain, rtol=1e-4, atol=1e-5)


def test_low_precision_is_closer_to_the_truth_than_the_plain_path() -> None:
    mining, low, stages = random_case(3, (8, 4, 2, 1), torch.float64)
    stages = [one.bfloat16().double() for one in stages]
    truth = mining(low, exact_fused(stages))
    halves = [one.bfloat16() for one in stages]
    with torch.autocast("cpu", torch.bfloat16):
        mining.float()
        fast = mine(mining, low.bfloat16(), halves)
        plain = mining(low.bfloat16(), fuse_stages(halves))
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert (fast - truth).norm() <= 1.05 * (plain - truth).norm()
    assert (fast - truth).norm() < 0.02 * truth.norm()


def test_every_parameter_has_a_gradient_and_no_map_has() -> None:
    mining, low, stages = random_case(2, (8, 4, 2, 1), torch.float32)
    stages = [one.requires_grad_(True) for one in stages]
    mine(mining, low, stages).sum().backward()
    assert all(parameter.grad is not None for parameter in mining.parameters())
    assert all(one.grad is None for one in stages)
    assert mining.key.linear.bias.grad is not None
    assert not mining.key.linear.bias.grad.any()


def test_no_map_is_kept_twice_for_the_backward_pass() -> None:
    """What is kept beside the given tensors is a small part of an upsampled map."""
    mining, low, stages = random_case(3, (8, 4, 2, 1), torch.float32)
    given = {one.data_ptr() for one in [low, *stages, *mining.parameters()]}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mine(mining, low, stages)
    upsampled = 2 * 9 * 64 * sum(WIDTHS)
    windows = 3 * 2 * 9 * 64
    assert kept
    assert sum(tensor.numel() for tensor in kept) < windows + upsampled / 4


def test_compiles_in_one_piece() -> None:
    mining, low, stages = random_case(2, (8, 4, 2, 1), torch.float64)
    low.requires_grad_(True)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    fast, plain = compiled(mining, low, stages), mining(low, exact_fused(stages))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(
        gradients(mining, low, fast).values(), gradients(mining, low, plain).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sizes", [(8, 4, 2, 1), (12, 6, 3, 2), (12, 6, 2, 2)])
def test_windows_over_parts_of_cells_are_upsampled(sizes: tuple[int, ...]) -> None:
    mining = random_mining(torch.float32)
    low = torch.randn(1, 4, 10)
    stages = [torch.randn(1, width, size, size) for width, size in zip(WIDTHS, sizes, strict=True)]
    torch.testing.assert_close(mine(mining, low, stages), mining(low, fuse_stages(stages)))


@pytest.mark.parametrize("tokens", [5, 9])
def test_uneven_windows_are_refused(tokens: int) -> None:
    _, _, stages = random_case(2, (8, 4, 2, 1), torch.float32)
    with pytest.raises(ValueError, match="windows"):
        mine(random_mining(torch.float32), torch.randn(2, tokens, 10), stages)
