"""The fast towers agree with the plain ones, compiled or not, and follow the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgm.config import ModelConfig
from mgm.fast_vision import FastTowers
from mgm.model import MGM, TowerFeatures
from tests.mgm.conftest import tiny_model


def pictures(number: int = 2, side: int = 128) -> torch.Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(3))


def assert_equal(fast: TowerFeatures, plain: TowerFeatures, limit: float = 1e-5) -> None:
    for ours, theirs in zip([fast.low, *fast.stages], [plain.low, *plain.stages], strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= limit * theirs.double().norm()


def test_agrees_with_the_plain_towers() -> None:
    model = tiny_model().eval()
    assert_equal(
        FastTowers(model, compiled=False)(None, pictures()), model.towers(None, pictures())
    )


def test_agrees_in_the_model_of_two_cores() -> None:
    torch.manual_seed(0)
    model = MGM(ModelConfig.preset("mgm-mini")).eval()
    images = torch.randn(2, 3, 64, 64)
    fast = FastTowers(model, compiled=False)(images, pictures())
    assert_equal(fast, model.towers(images, pictures()))


def test_agrees_on_a_grid_of_views() -> None:
    model = tiny_model(image_grid=2, image_global=True, image_size_aux=256).eval()
    images = pictures(2, 256)
    fast = FastTowers(model, compiled=False)(None, images)
    assert fast.low.shape[1] == 5 * 16
    assert_equal(fast, model.towers(None, images))


def test_agrees_in_bfloat16() -> None:
    model = tiny_model().eval()
    exact = model.towers(None, pictures())
    model.to(torch.bfloat16)
    fast = FastTowers(model, compiled=False)(None, pictures().bfloat16())
    plain = model.towers(None, pictures().bfloat16())
    for part in range(5):
        ours, theirs, truth = ([one.low, *one.stages][part].float() for one in (fast, plain, exact))
        assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm() + 1e-3 * truth.norm()


def test_drop_path_never_drops() -> None:
    model = tiny_model().train()
    towers = FastTowers(model, compiled=False)
    fast = [towers(None, pictures()) for _ in range(3)]
    model.eval()
    for one in fast:
        assert_equal(one, model.towers(None, pictures()))


def test_maps_have_channels_last_and_no_gradient() -> None:
    fast = FastTowers(tiny_model(), compiled=False)(None, pictures())
    for stage in fast.stages:
        assert stage.is_contiguous(memory_format=torch.channels_last)
        assert not stage.requires_grad


def test_autocast_leaves_the_features_alone() -> None:
    model = tiny_model().eval()
    towers = FastTowers(model, compiled=False)
    with torch.autocast("cpu", torch.bfloat16):
        fast = towers(None, pictures())
    assert_equal(fast, model.towers(None, pictures()))


def test_follows_weights_that_are_loaded_or_moved() -> None:
    model = tiny_model(0).eval()
    towers = FastTowers(model, compiled=False)
    before = towers(None, pictures())
    model.load_state_dict(tiny_model(1).state_dict())
    after = towers(None, pictures())
    assert (after.low - before.low).norm() > 0.1 * before.low.norm()
    assert_equal(after, model.towers(None, pictures()))
    model.to(torch.float64)
    assert_equal(towers(None, pictures().double()), model.towers(None, pictures().double()))


def test_joined_projections_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    FastTowers(model, compiled=False)(None, pictures())
    after = model.vision_tower.state_dict()
    attention = model.vision_tower.clip.encoder.layers[0].self_attn
    query, key = attention.q_proj.weight, attention.k_proj.weight
    assert key.data_ptr() == query.data_ptr() + query.numel() * query.element_size()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_file(dict(after), tmp_path / "tower.safetensors")
    stored = load_file(tmp_path / "tower.safetensors")
    assert all(torch.equal(before[name], stored[name]) for name in before)


def test_one_compiled_function_for_a_stage_and_one_for_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted by the compiler itself: four stages and CLIP's layers, for any number of pictures."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compile_function(function, backend=count, **options),
    )
    torch._dynamo.reset()
    model = tiny_model().eval()
    towers = FastTowers(model)
    for number in (2, 3, 5):
        images = pictures(number)
        assert_equal(towers(None, images), model.towers(None, images))
    assert len(graphs) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_agree() -> None:
    model = tiny_model().eval().cuda()
    towers = FastTowers(model, graphed_pictures=3)
    kept = []
    for number in (2, 3, 2, 4):
        images = torch.randn(number, 3, 128, 128).cuda()
        kept.append((towers(None, images), model.towers(None, images)))
    for fast, plain in kept:
        assert_equal(fast, plain, 1e-4)
