"""`mgm.config`: presets, published config.json in both directions, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgm.config import CLIP_MEAN, CLIP_STD, ModelConfig
from mgm.errors import InputError


def test_the_published_model_has_the_published_sizes() -> None:
    config = ModelConfig.preset("mgm-2b")
    assert config.num_image_tokens == 576
    assert config.high_resolution_width == 2880
    assert (config.vision_width, config.language_width) == (1024, 2048)
    assert config.image_size_aux == 768
    hd = config.replace(image_grid=2, image_global=True, image_size_aux=1536)
    assert hd.num_image_tokens == 2880
    assert hd.num_views == 5


def test_drop_path_needs_the_switch_and_a_rate() -> None:
    published = ModelConfig.preset("mgm-2b")
    assert published.has_drop_path
    assert not published.replace(drop_path=False).has_drop_path
    assert not ModelConfig.preset("mgm-mini").has_drop_path, "its rate is zero"


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="mgm-2b or mgm-mini"):
        ModelConfig.preset("mgm-7b")


@pytest.mark.parametrize("name", ["mgm-2b", "mgm-mini"])
def test_published_keys_round_trip(name: str) -> None:
    config = ModelConfig.preset(name, vision_tower_path="/somewhere/clip", image_aspect_ratio="pad")
    written = json.loads(json.dumps(config.to_mgm_config()))
    towers = json.loads(json.dumps(config.to_towers()))
    again = ModelConfig.from_mgm_config(written, towers)
    assert config.language.items() <= again.language.items()
    assert again.language.keys() - config.language.keys() <= {
        "attention_bias",
        "attention_dropout",
        "initializer_range",
    }
    assert again.vision == config.vision
    assert again.high_resolution == {**config.high_resolution, "norm_eps": 1e-6}
    assert again.name == name
    assert again.vision_tower_path == "/somewhere/clip"
    assert again.num_image_tokens == config.num_image_tokens


def test_a_published_config_json_keeps_every_key_and_value(golden: Path) -> None:
    folder = golden / "model_a"
    original = json.loads((folder / "config.json").read_text())
    towers = json.loads((folder / "towers.json").read_text())
    config = ModelConfig.from_mgm_config(original, towers)
    written = config.to_mgm_config(torch_dtype="float32")
    assert {key: written[key] for key in original} == original
    assert config.language["hidden_act"] == "gelu"
    assert config.vision["image_size"] == 56
    assert config.high_resolution["hidden_sizes"] == [8, 16, 24, 32]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_is_written_is_what_the_original_trainer_writes(
    golden: Path, tmp_path: Path, stage: str
) -> None:
    meta = json.loads((golden / "train_run" / "meta.json").read_text())
    original, sizes = meta[stage]["config.json"], meta["model"]
    gemma = {key: value for key, value in original.items() if "mm_" not in key}
    parts = {
        "lm": {**gemma, "model_type": "gemma"},
        "clip": {
            "model_type": "clip_vision_model",
            "hidden_size": sizes["clip_hidden"],
            "image_size": meta["image_size"],
            "patch_size": sizes["patch"],
        },
        "convnext": {
            "model_type": "convnext",
            "hidden_sizes": sizes["convnext_dims"],
            "depths": sizes["convnext_depths"],
        },
    }
    for name, content in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    config = ModelConfig.from_parts(
        *(tmp_path / name for name in parts),
        image_size_aux=meta["image_size_aux"],
        tokenizer_model_max_length=meta["model_max_length"],
        image_aspect_ratio=original["image_aspect_ratio"],
        vision_tower_path=original["mm_vision_tower"],
        high_resolution_tower_path=original["mm_vision_tower_aux"],
    )
    assert config.to_mgm_config(torch_dtype="float32", is_pretraining=stage == "stage1") == original


@pytest.mark.parametrize("extra", [{"a_later_key": [1, {"x": None}]}, {"rope_scaling": None}])
def test_unknown_keys_are_kept(extra: dict[str, object]) -> None:
    published = ModelConfig.preset("mgm-2b").to_mgm_config()
    config = ModelConfig.from_mgm_config({**published, **extra})
    assert config.to_mgm_config() == {**published, **extra}


@pytest.mark.parametrize(
    "lost",
    [
        ("hidden_size",),
        ("intermediate_size", "num_key_value_heads", "head_dim"),
        ("mm_projector_type", "mm_vision_select_layer"),
        ("mm_hidden_size",),
    ],
)
def test_missing_keys_are_all_named(lost: tuple[str, ...]) -> None:
    published = ModelConfig.preset("mgm-2b").to_mgm_config()
    kept = {key: value for key, value in published.items() if key not in lost}
    with pytest.raises(InputError) as error:
        ModelConfig.from_mgm_config(kept)
    assert all(key in error.value.message for key in lost)
    assert "config.json" in error.value.message


@pytest.mark.parametrize("value", ["2048", 0, 2048.5])
def test_a_size_that_is_no_number_is_named(value: object) -> None:
    published = ModelConfig.preset("mgm-2b").to_mgm_config()
    with pytest.raises(InputError, match="intermediate_size ="):
        ModelConfig.from_mgm_config({**published, "intermediate_size": value})


def test_a_bare_language_model_is_not_taken_for_the_whole() -> None:
    with pytest.raises(InputError, match="model_type = 'gemma'") as error:
        ModelConfig.from_mgm_config({"model_type": "gemma", "hidden_size": 2048})
    assert "--language-model" in error.value.hint


@pytest.mark.parametrize("lost", ["clip_vision", "convnext_aux", "dims"])
def test_an_incomplete_towers_json_is_named(lost: str) -> None:
    config = ModelConfig.preset("mgm-mini")
    towers = config.to_towers()
    if lost == "dims":
        del towers["convnext_aux"]["dims"]
    else:
        del towers[lost]
    with pytest.raises(InputError, match=rf"towers\.json.*{lost}"):
        ModelConfig.from_mgm_config(config.to_mgm_config(), towers)


def test_without_towers_json_only_the_published_widths_are_known(golden: Path) -> None:
    published = ModelConfig.preset("mgm-2b").to_mgm_config()
    config = ModelConfig.from_mgm_config(published)
    assert config.vision["num_hidden_layers"] == 24
    assert config.high_resolution["depths"] == [3, 3, 27, 3]
    tiny = json.loads((golden / "model_a" / "config.json").read_text())
    with pytest.raises(InputError, match=r"towers\.json"):
        ModelConfig.from_mgm_config(tiny)


def test_image_size_aux_is_320_where_the_key_is_absent() -> None:
    published = ModelConfig.preset("mgm-2b").to_mgm_config()
    del published["image_size_aux"]
    # 320 px give a map of 80 cells, which 24 tokens cannot share evenly.
    with pytest.raises(InputError, match="image_size_aux = 320"):
        ModelConfig.from_mgm_config(published)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image_size_aux": 760}, "image_size_aux"),
        ({"image_global": True}, "image_global"),
        ({"tokenizer_padding_side": "middle"}, "tokenizer_padding_side"),
        ({"vision_select_feature": "cls_patch"}, "vision_select_feature"),
        ({"projector_type": "conv"}, "projector_type"),
        ({"attention": "fast"}, "attention"),
    ],
)
def test_unbuildable_combinations_name_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        ModelConfig.preset("mgm-2b", **change)


def _write_parts(root: Path) -> tuple[Path, Path, Path]:
    contents = {
        "lm": {"config.json": {**_GEMMA, "rope_parameters": {"rope_theta": 500.0}}},
        "clip": {
            "config.json": {"model_type": "clip", "vision_config": {"hidden_size": 96}},
            "preprocessor_config.json": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]},
        },
        "convnext": {
            "open_clip_config.json": {
                "model_cfg": {
                    "vision_cfg": {"timm_model_name": "convnext_large", "timm_drop_path": 0.2}
                },
                "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
            }
        },
    }
    for folder, files in contents.items():
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_text(json.dumps(content))
    return root / "lm", root / "clip", root / "convnext"


_GEMMA = {
    "model_type": "gemma",
    "vocab_size": 750,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu",
}


def test_parts_are_read_from_their_folders(tmp_path: Path) -> None:
    config = ModelConfig.from_parts(*_write_parts(tmp_path), name="assembled")
    assert config.language["rope_theta"] == 500.0
    assert config.language["hidden_act"] == "gelu", "hidden_activation is not what trained it"
    assert config.vision["hidden_size"] == 96
    assert config.vision["num_hidden_layers"] == 12, "keys left out have the library's defaults"
    assert config.high_resolution["hidden_sizes"] == [192, 384, 768, 1536]
    assert config.high_resolution["drop_path_rate"] == 0.2, "as its file says"
    assert config.image_mean == (0.1, 0.2, 0.3)
    assert config.image_size_aux == 7 * 32, "one patch covers 8 x 8 cells of 4 pixels"
    assert config.name == "assembled"


@pytest.mark.parametrize("layer", [-14, 13])
def test_a_layer_that_the_tower_does_not_have_is_named(layer: int) -> None:
    vision = {**ModelConfig.preset("mgm-2b").vision, "num_hidden_layers": 12}
    with pytest.raises(InputError, match=f"vision_select_layer = {layer} "):
        ModelConfig.preset("mgm-2b", vision=vision, vision_select_layer=layer)


def test_towers_that_normalise_differently_are_refused(tmp_path: Path) -> None:
    folders = _write_parts(tmp_path)
    (folders[1] / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)})
    )
    with pytest.raises(InputError, match="normalise differently"):
        ModelConfig.from_parts(*folders)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        ModelConfig.from_parts(tmp_path / "nowhere", tmp_path, tmp_path)
