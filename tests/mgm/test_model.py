"""`mgm.model` and `mgm.vision`: each thing that leaves shapes right and results wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import ConvNextConfig, ConvNextModel
from transformers.utils import is_flash_attn_2_available

from mgm.checkpoint import read_config
from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.model import (
    IGNORE_INDEX,
    MGM,
    PatchInfoMining,
    TowerFeatures,
    build_projector,
    cut_windows,
    init_vision_modules,
)
from mgm.names import published_parameters
from mgm.vision import low_resolution_views
from tests.mgm.conftest import tiny_batch, tiny_config, tiny_model


def test_the_published_model_has_the_published_tensors(golden: Path) -> None:
    reference = json.loads((golden / "full_model_keys.json").read_text())
    with torch.device("meta"):
        model = MGM(ModelConfig.preset("mgm-2b"))
    shapes = {name: list(value.shape) for name, value in published_parameters(model).items()}
    assert shapes == reference["keys"]
    assert len(shapes) == 911
    assert sum(p.numel() for p in model.parameters()) == reference["total_parameters"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2_519_431_424
    assert sum(p.numel() for p in model.mining.parameters()) == 6_963_456
    assert sum(p.numel() for p in model.projector.parameters()) == 6_295_552


def test_mining_is_twelve_trainable_tensors() -> None:
    model = tiny_model()
    assert len(list(model.mining.parameters())) == 12
    assert all(parameter.requires_grad for parameter in model.mining.parameters())
    towers = (*model.vision_tower.parameters(), *model.high_resolution_tower.parameters())
    assert not any(parameter.requires_grad for parameter in towers)


def test_text_and_image_rows_carry_the_same_scale() -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=1)
    projected = model.encode_images(None, batch["images_aux"])
    spliced = model.splice(batch["input_ids"], batch["labels"], None, projected)
    scale = math.sqrt(model.config.language_width)
    weight = model.language_model.model.embed_tokens.weight
    torch.testing.assert_close(spliced.inputs_embeds[0, 2:18], projected[0] * scale)
    torch.testing.assert_close(
        spliced.inputs_embeds[0, 18:], weight[batch["input_ids"][0, 3:]] * scale
    )


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: F.gelu(x)),
        ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_the_activation_is_the_one_named(name: str, function: object) -> None:
    config = tiny_config()
    model = MGM(config.replace(language={**config.language, "hidden_act": name}))
    points = torch.linspace(-3, 3, 50)
    for layer in model.language_model.model.layers:
        torch.testing.assert_close(layer.mlp.act_fn(points), function(points), atol=0, rtol=0)  # type: ignore[operator]
    assert model.language_model.config.hidden_act == name


def test_low_resolution_is_bilinear_without_antialias(golden: Path) -> None:
    tensors = load_file(golden / "model_a" / "single.safetensors")
    config = read_config(golden / "model_a")
    images = low_resolution_views(tensors["in.images_aux_u8"].float() / 64 - 2, config)
    torch.testing.assert_close(images, tensors["in.images"], atol=1e-6, rtol=0)


def test_views_are_tiles_by_row_then_the_whole() -> None:
    config = tiny_config(image_grid=2, image_global=True, image_size_aux=256)
    aux = torch.randn(2, 3, 256, 256)
    views = low_resolution_views(aux, config)
    assert views.shape == (2, 5, 3, 28, 28)
    half = F.interpolate(aux, size=(56, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(views[:, 1], half[:, :, :28, 28:])
    torch.testing.assert_close(views[:, 2], half[:, :, 28:, :28])
    whole = F.interpolate(half, size=(28, 28), mode="bilinear", align_corners=False)
    torch.testing.assert_close(views[:, 4], whole)


def test_low_features_are_the_librarys_hidden_state_before_last() -> None:
    model = tiny_model().eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        reference = model.vision_tower.clip(pixel_values=images, output_hidden_states=True)
        features = model.vision_tower(images)
    torch.testing.assert_close(features, reference.hidden_states[-2][:, 1:], atol=1e-6, rtol=0)


def test_stages_are_the_librarys_hidden_states() -> None:
    model = tiny_model().eval()
    reference = ConvNextModel(
        ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 2, 1], patch_size=4)
    ).eval()
    reference.load_state_dict(model.high_resolution_tower.state_dict(), strict=False)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected = reference(pixel_values=images, output_hidden_states=True).hidden_states[1:]
        stages = model.high_resolution_tower.stages(images)
    assert [stage.shape[-1] for stage in stages] == [32, 16, 8, 4]
    for stage, reference_stage in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage, reference_stage, atol=0, rtol=0)


def test_the_frozen_towers_drop_blocks_in_training_mode_unless_told_not_to() -> None:
    images = torch.randn(64, 3, 32, 32)
    config = tiny_config().high_resolution
    active = tiny_model(high_resolution={**config, "drop_path_rate": 0.5}).high_resolution_tower
    with torch.no_grad():
        active.train()
        first, second = active(images), active(images)
        assert not torch.equal(first, second)
        active.eval()
        torch.testing.assert_close(active(images), active(images), atol=0, rtol=0)
        off = tiny_model(
            high_resolution={**config, "drop_path_rate": 0.5}, drop_path=False
        ).high_resolution_tower.train()
        torch.testing.assert_close(off(images), active(images), atol=0, rtol=0)


def _mine(mining: PatchInfoMining, low: Tensor, fused: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mining.zero_grad()
    mined = mining(low, fused)
    mined.pow(2).sum().backward()
    return mined.detach(), {
        n: p.grad.clone() for n, p in mining.named_parameters() if p.grad is not None
    }


def test_mining_reassociated_equals_mining_as_published() -> None:
    torch.manual_seed(1)
    mining = PatchInfoMining(24, 60)
    with torch.no_grad():
        for parameter in mining.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    low, fused = torch.randn(2, 9, 24), torch.randn(2, 60, 12, 12) * 3
    fast, fast_gradients = _mine(mining, low, fused)
    mining.reassociated = False
    plain, plain_gradients = _mine(mining, low, fused)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    assert len(fast_gradients) == 12
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, atol=2e-3, rtol=1e-4)


def test_mining_equals_a_loop_over_windows() -> None:
    torch.manual_seed(2)
    mining = PatchInfoMining(8, 12)
    low, fused = torch.randn(1, 4, 8), torch.randn(1, 12, 6, 6)
    mined = mining(low, fused)
    for token in range(4):
        row, column = divmod(token, 2)
        window = fused[0, :, row * 3 : row * 3 + 3, column * 3 : column * 3 + 3].flatten(1).T
        expected = F.scaled_dot_product_attention(
            mining.query(low[0, token])[None], mining.key(window), mining.value(window)
        )
        torch.testing.assert_close(mined[0, token], expected[0], atol=1e-5, rtol=1e-5)


def test_mining_lets_not_a_number_through() -> None:
    mining = PatchInfoMining(8, 12)
    fused = torch.zeros(1, 12, 4, 4)
    fused[0, 0, 0, 0] = torch.inf
    mined = mining(torch.ones(1, 4, 8), fused)
    assert mined[0, 0].isnan().all(), "hidden numbers would train on garbage"
    assert mined[0, 1:].isfinite().all()


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10 x 10 map has no 9"):
        cut_windows(torch.zeros(1, 2, 10, 10), 9)


def test_projector_kinds() -> None:
    assert [type(layer).__name__ for layer in build_projector("mlp3x_gelu", 4, 8)] == [  # type: ignore[attr-defined]
        "Linear",
        "GELU",
        "Linear",
        "GELU",
        "Linear",
    ]
    assert tuple(build_projector("linear", 4, 8).weight.shape) == (8, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="conv"):
        build_projector("conv", 4, 8)


def test_features_stand_in_for_the_towers() -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=3)
    features = model.towers(None, batch["images_aux"])
    direct = model(**batch).loss
    del batch["images_aux"]
    torch.testing.assert_close(model(**batch, features=features).loss, direct, atol=0, rtol=0)
    shuffled = TowerFeatures.cat([features[1:], features[[0]]])[torch.tensor([2, 0, 1])]
    torch.testing.assert_close(model(**batch, features=shuffled).loss, direct, atol=0, rtol=0)
    assert len(features[:2]) == 2
    assert features.to(dtype=torch.float16).stages[3].dtype == torch.float16
    assert features.to("cpu").low.dtype == torch.float32


def test_logits_at_labels_only_give_the_loss_of_all_logits() -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=3)
    lean, full = model(**batch), model(**batch, full_logits=True)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, full.loss, atol=1e-6, rtol=0)
    shifted = full.logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(shifted, full.spliced.labels[:, 1:].flatten())
    torch.testing.assert_close(lean.loss, expected, atol=1e-6, rtol=0)
    assert lean.num_labels == int((full.spliced.labels[:, 1:] != IGNORE_INDEX).sum())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention: str) -> None:
    batch = tiny_batch(rows=3)
    reference = tiny_model().eval()(**batch).loss
    torch.testing.assert_close(
        tiny_model(attention=attention).eval()(**batch).loss, reference, atol=1e-5, rtol=0
    )


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_a_kernel_that_is_not_installed_is_an_input_error() -> None:
    with pytest.raises(InputError, match="set attention to sdpa"):
        tiny_model(attention="flash_attention_2")


def test_padding_changes_nothing() -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=1)
    alone = model(**batch).loss
    for side in ("left", "right"):
        padded = {key: batch[key] for key in batch}
        for key, value in (("input_ids", 0), ("labels", IGNORE_INDEX), ("attention_mask", 0)):
            amounts = (4, 0) if side == "left" else (0, 4)
            padded[key] = F.pad(batch[key], amounts, value=value)
        torch.testing.assert_close(model(**padded).loss, alone, atol=1e-6, rtol=0)


def test_a_text_only_row_consumes_one_blank_picture() -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=3)
    batch["input_ids"][1, 2] = 7
    mixed = model(**batch)
    assert mixed.spliced.attention_mask.sum(1).tolist() == [24, 8, 22]
    changed = {**batch, "images_aux": batch["images_aux"].clone()}
    changed["images_aux"][1] = 5.0
    torch.testing.assert_close(model(**changed).loss, mixed.loss, atol=0, rtol=0)


def test_an_all_text_batch_has_zero_gradients_not_none() -> None:
    model = tiny_model()
    batch = tiny_batch(rows=2)
    batch["input_ids"][:, 2] = 7
    batch["images_aux"].zero_()
    model(**batch).loss.backward()
    for name, parameter in (*model.projector.named_parameters(), *model.mining.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0, name
    assert model.language_model.model.norm.weight.grad.count_nonzero() > 0


def test_the_loss_is_nan_when_no_label_is_left() -> None:
    model = tiny_model().eval()
    batch = tiny_batch()
    batch["labels"].fill_(IGNORE_INDEX)
    output = model(**batch)
    assert output.loss.isnan()
    assert output.num_labels == 0


def test_rows_are_cut_after_splicing() -> None:
    model = tiny_model(tokenizer_model_max_length=20).eval()
    spliced = model(**tiny_batch()).spliced
    assert spliced.inputs_embeds.shape[1] == 20


@pytest.mark.parametrize("pictures", [1, 3])
def test_too_few_or_too_many_pictures_are_an_input_error(pictures: int) -> None:
    model = tiny_model().eval()
    batch = tiny_batch(rows=2)
    batch["images_aux"] = torch.zeros(pictures, 3, 128, 128)
    with pytest.raises(InputError, match="image marker"):
        model(**batch)


def test_without_labels_only_logits_come_back() -> None:
    model = tiny_model().eval()
    batch = tiny_batch()
    del batch["labels"]
    output = model(**batch, full_logits=True)
    assert output.loss is None
    assert output.logits.shape == (2, 24, 64)
    with pytest.raises(InputError, match="No pictures"):
        model(batch["input_ids"])


def test_gradient_reaches_the_projector_through_a_frozen_language_model() -> None:
    model = tiny_model()
    model.language_model.requires_grad_(False)
    model(**tiny_batch()).loss.backward()
    assert all(p.grad.count_nonzero() > 0 for p in model.projector.parameters())
    assert all(p.grad is None for p in model.language_model.parameters())
    assert model.mining.value.linear.weight.grad.count_nonzero() > 0


def test_initialisation_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    state = torch.get_rng_state()
    init_vision_modules(first, seed=5)
    init_vision_modules(second, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.mining.parameters(), second.mining.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(first.projector[0].weight, second.projector[0].weight)
    init_vision_modules(second, seed=6)
    assert not torch.equal(first.projector[0].weight, second.projector[0].weight)
    assert torch.equal(first.mining.key.norm.weight, torch.ones(40))
    bound = 1 / math.sqrt(40)
    assert 0.9 * bound < first.mining.key.linear.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_rounds_weights_and_nothing_else(dtype: torch.dtype) -> None:
    model, cast = tiny_model().eval(), tiny_model().eval().to(dtype)
    ours, reference = cast.language_model.model, model.language_model.model
    assert cast.dtype == dtype
    assert torch.equal(ours.rotary_emb.inv_freq, reference.rotary_emb.inv_freq)
    assert torch.equal(ours.embed_tokens.embed_scale, reference.embed_tokens.embed_scale)
    batch = tiny_batch()
    features = cast.towers(None, batch.pop("images_aux").to(dtype))
    loss = cast(**batch, features=features).loss
    assert loss.dtype == torch.float32
    features = model.towers(None, tiny_batch()["images_aux"])
    assert loss.item() == pytest.approx(model(**batch, features=features).loss.item(), rel=0.05)


def test_float32_vision_modules_train_on_a_bfloat16_language_model() -> None:
    model = tiny_model(drop_path=False).to(torch.bfloat16)
    model.language_model.requires_grad_(False)
    model.projector.float()
    model.mining.float()
    batch = tiny_batch()
    features = model.towers(None, batch["images_aux"])
    with torch.autocast("cpu", torch.bfloat16):
        again = model.towers(None, batch.pop("images_aux"))
    assert torch.equal(features.low, again.low), "what is cached equals what is computed anew"
    assert torch.equal(features.stages[3], again.stages[3])
    for is_enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            loss = model(**batch, features=features).loss
        loss.backward()
        gradient = model.mining.value.linear.weight.grad
        assert gradient.dtype == torch.float32
        assert gradient.count_nonzero() > 0


def test_one_batch_can_be_learnt() -> None:
    model = tiny_model().train()
    batch = tiny_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model(**batch).loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
