"""`mgm.checkpoint`, `mgm.names`, `mgm.weights` and `mgm.lora`: names, layouts and refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    GemmaConfig,
    GemmaForCausalLM,
)

from mgm.checkpoint import (
    attach_lora,
    build_model,
    load_full,
    load_lora,
    load_projector,
    merge_lora,
    save_full,
    save_lora,
    save_projector,
)
from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.merge import main as merge_main
from mgm.model import MGM
from mgm.names import is_multimodal, published_name, published_parameters, timm_name
from mgm.weights import read_tensors
from tests.mgm.conftest import tiny_batch, tiny_config, tiny_model


def _equal(first: MGM, second: MGM) -> bool:
    ours, theirs = published_parameters(first), published_parameters(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def _train_run_model(golden: Path) -> MGM:
    """Build the model of the reference training run, with its starting weights."""
    folder = golden / "train_run"
    meta = json.loads((folder / "meta.json").read_text())
    sizes = meta["model"]
    towers = {
        "clip_vision": {
            "hidden_size": sizes["clip_hidden"],
            "intermediate_size": sizes["clip_inter"],
            "num_hidden_layers": sizes["clip_layers"],
            "num_attention_heads": sizes["clip_heads"],
            "image_size": meta["image_size"],
            "patch_size": sizes["patch"],
        },
        "convnext_aux": {"depths": sizes["convnext_depths"], "dims": sizes["convnext_dims"]},
    }
    config = ModelConfig.from_mgm_config(meta["stage1"]["config.json"], towers)
    model = MGM(config)
    tensors = load_file(folder / "base_weights.safetensors")
    tensors |= load_file(folder / "stage1_final.safetensors")
    parameters = published_parameters(model)
    with torch.no_grad():
        for name, value in tensors.items():
            if name != "lm_head.weight":
                parameters[name].copy_(value)
    return model


def test_convnext_names_translate_to_timm() -> None:
    assert timm_name("embeddings.patch_embeddings.weight") == "stem.0.weight"
    assert timm_name("embeddings.layernorm.bias") == "stem.1.bias"
    assert (
        timm_name("encoder.stages.2.downsampling_layer.1.weight") == "stages.2.downsample.1.weight"
    )
    block = "encoder.stages.3.layers.11."
    assert timm_name(block + "dwconv.bias") == "stages.3.blocks.11.conv_dw.bias"
    assert timm_name(block + "layernorm.weight") == "stages.3.blocks.11.norm.weight"
    assert timm_name(block + "pwconv2.weight") == "stages.3.blocks.11.mlp.fc2.weight"
    assert timm_name(block + "layer_scale_parameter") == "stages.3.blocks.11.gamma"
    with pytest.raises(ValueError, match="resampler"):
        published_name("resampler.weight")


def test_a_projector_file_of_the_original_has_the_same_keys_and_shapes(
    golden: Path, tmp_path: Path
) -> None:
    model = _train_run_model(golden)
    save_projector(model, tmp_path / "mm_projector.bin")
    written = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    meta = json.loads((golden / "train_run" / "meta.json").read_text())
    expected = meta["stage1"]["mm_projector_bin_keys"]
    assert {name: list(value.shape) for name, value in written.items()} == expected
    with torch.device("meta"):
        full = MGM(ModelConfig.preset("mgm-2b"))
    assert sum(map(is_multimodal, published_parameters(full))) == 747


def test_projector_round_trip_takes_clip_and_leaves_convnext(tmp_path: Path) -> None:
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    convnext = second.high_resolution_tower.embeddings.patch_embeddings.weight.clone()
    embedding = second.language_model.model.embed_tokens.weight.clone()
    save_projector(first, tmp_path / "mm_projector.bin")
    load_projector(second, tmp_path / "mm_projector.bin")
    for part in ("projector", "mining", "vision_tower"):
        ours, theirs = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(second.high_resolution_tower.embeddings.patch_embeddings.weight, convnext)
    assert torch.equal(second.language_model.model.embed_tokens.weight, embedding)
    assert not any(p.requires_grad for p in second.vision_tower.parameters())


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_projector_files_with_other_prefixes_are_read(tmp_path: Path, wrapper: str | None) -> None:
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    content = {
        f"module.{name}": value.detach()
        for name, value in published_parameters(first).items()
        if "mm_projector" in name or "vlm_uni" in name
    }
    torch.save({wrapper: content} if wrapper else content, tmp_path / "file.bin")
    load_projector(second, tmp_path / "file.bin")
    assert torch.equal(first.mining.key.linear.weight, second.mining.key.linear.weight)
    assert torch.equal(first.projector[2].bias, second.projector[2].bias)


def test_a_projector_file_lacking_mining_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    save_projector(model, tmp_path / "file.bin")
    content = torch.load(tmp_path / "file.bin", weights_only=True)
    del content["model.vlm_uni_val_projector.1.bias"]
    content["model.mm_projector.4.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "file.bin")
    before = model.projector[0].weight.clone()
    with pytest.raises(InputError) as error:
        load_projector(model, tmp_path / "file.bin")
    assert "missing: model.vlm_uni_val_projector.1.bias" in error.value.message
    assert "unexpected: model.mm_projector.4.weight" in error.value.message
    assert "file.bin" in error.value.message
    assert torch.equal(before, model.projector[0].weight), "nothing is loaded by halves"


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(pickle.dumps({"x": Path("a")}, protocol=2))
    with pytest.raises(InputError, match="mm_projector.bin"):
        load_projector(tiny_model(), path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="mm_projector.bin"):
        load_projector(tiny_model(), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_folder_round_trip(golden: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(golden / "model_a"))
    model = tiny_model().to(dtype)
    save_full(model, tmp_path, tokenizer, max_shard_bytes=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert all((tmp_path / shard).exists() for shard in shards)
    homes = {shard for name, shard in index["weight_map"].items() if is_multimodal(name)}
    assert len(homes) == 1, "the published loader needs all multimodal tensors in one shard"
    assert "lm_head.weight" not in index["weight_map"]
    assert (tmp_path / "tokenizer.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mgm_gemma"
    assert not list(tmp_path.glob("*.partial"))
    again = load_full(tmp_path)
    assert again.dtype == dtype
    assert _equal(model, again)
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert again.config.name == "tiny"
    assert load_full(tmp_path, torch.float16).mining.key.linear.weight.dtype == torch.float16


def test_a_full_folder_can_be_written_in_another_dtype(tmp_path: Path) -> None:
    model = tiny_model()
    model.vision_tower.to(torch.float16)
    save_full(model, tmp_path, max_shard_bytes=8000, dtype=torch.bfloat16)
    tensors = read_tensors(tmp_path)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert model.dtype == torch.float32, "the model itself keeps its precision"
    assert load_full(tmp_path).dtype == torch.bfloat16


def test_the_erf_gelu_survives_a_reload(tmp_path: Path) -> None:
    model = tiny_model().eval()
    save_full(model, tmp_path)
    again = load_full(tmp_path).eval()
    batch = tiny_batch()
    assert again.language_model.config.hidden_act == "gelu"
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, atol=0, rtol=0)


def test_overwriting_the_loaded_file_leaves_the_model_alone(tmp_path: Path) -> None:
    save_full(tiny_model(seed=1), tmp_path)
    model = load_full(tmp_path)
    before = model.language_model.model.embed_tokens.weight.clone()
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    assert torch.equal(model.language_model.model.embed_tokens.weight, before)


def test_published_checkpoints_load_with_and_without_a_separate_head(
    golden: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "towers.json"):
        shutil.copy(golden / "model_a" / name, tmp_path / name)
    tensors = load_file(golden / "model_a" / "weights.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    plain = load_full(tmp_path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    assert _equal(load_full(tmp_path), plain)
    save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        load_full(tmp_path)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("towers.json", {"convnext_aux": 5}),
        ("towers.json", {"convnext_aux": {"dims": 7, "depths": [1]}}),
        ("towers.json", {"image_mean": 0.5}),
        ("config.json", {"image_size_aux": "56"}),
        ("config.json", {"rms_norm_eps": "1e-6"}),
    ],
)
def test_a_configuration_with_a_value_of_another_type_is_named(
    golden: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    for name in ("config.json", "towers.json"):
        content = json.loads((golden / "model_a" / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | (change if name == file else {})))
    shutil.copy(golden / "model_a" / "weights.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"\.json"):
        load_full(tmp_path)


def test_layer_scale_is_loaded_not_left_at_its_start(golden: Path) -> None:
    folder = golden / "model_a"
    model = load_full(folder, weights=folder / "weights.safetensors")
    tensors = load_file(folder / "weights.safetensors")
    scales = [name for name in tensors if name.endswith(".gamma")]
    assert len(scales) == 5
    named = published_parameters(model)
    assert all(torch.equal(named[name], tensors[name]) for name in scales)


def test_a_full_folder_with_a_lost_tensor_or_shard_is_refused(tmp_path: Path) -> None:
    save_full(tiny_model(), tmp_path, max_shard_bytes=8000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, shard)
    with pytest.raises(InputError, match=f"missing: {lost}"):
        load_full(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_full(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    save_full(tiny_model(), tmp_path)
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside the folder"):
        load_full(tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """Write the three folders of a tiny model as the libraries write them, in float16."""
    config = tiny_config()
    torch.manual_seed(3)
    clip = CLIPModel(
        CLIPConfig(
            vision_config=dict(config.vision),
            text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        )
    )
    convnext = ConvNextModel(
        ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 2, 1], drop_path_rate=0.1)
    )
    gemma = GemmaForCausalLM(GemmaConfig(**{**config.language, "hidden_act": "gelu_pytorch_tanh"}))
    folders = {name: tmp_path / name for name in ("lm", "clip", "convnext")}
    for module, folder in ((gemma, "lm"), (clip, "clip"), (convnext, "convnext")):
        module.half().save_pretrained(str(folders[folder]))
    return folders


def test_a_model_is_built_from_library_folders(parts: dict[str, Path]) -> None:
    folders = (parts["lm"], parts["clip"], parts["convnext"])
    config = ModelConfig.from_parts(*folders)
    assert config.image_size_aux == 128
    assert config.language["hidden_act"] == "gelu_pytorch_tanh"
    model = build_model(config, *folders)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = read_tensors(parts["clip"])
    name = "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(
        model.vision_tower.clip.get_parameter(name), stored[f"vision_model.{name}"].float()
    )
    assert model(**tiny_batch()).loss.isfinite()
    assert build_model(config, *folders, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_vision_only_clip_folder_and_an_openclip_file_are_read(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    folders = (parts["lm"], parts["clip"], parts["convnext"])
    config = ModelConfig.from_parts(*folders)
    reference = build_model(config, *folders)
    bare, open_clip = tmp_path / "bare", tmp_path / "open_clip"
    bare.mkdir()
    open_clip.mkdir()
    vision = {
        name.removeprefix("vision_model."): value
        for name, value in read_tensors(parts["clip"]).items()
        if name.startswith("vision_model.")
    }
    save_file(vision, bare / "model.safetensors")
    trunk = {
        f"visual.trunk.{timm_name(name)}": value
        for name, value in reference.high_resolution_tower.state_dict().items()
    }
    trunk |= {"visual.head.proj.weight": torch.zeros(2), "logit_scale": torch.tensor(1.0)}
    trunk |= {"visual.trunk.head.norm.weight": torch.zeros(2), "text.x": torch.zeros(2)}
    torch.save({"state_dict": trunk}, open_clip / "open_clip_pytorch_model.bin")
    again = build_model(config, parts["lm"], bare, open_clip)
    assert _equal(reference, again)
    del trunk["visual.trunk.stages.2.blocks.1.gamma"]
    torch.save(trunk, open_clip / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match=r"missing: stages\.2\.blocks\.1\.gamma"):
        build_model(config, parts["lm"], bare, open_clip)


def test_folders_of_another_size_are_refused_by_name_and_shape(parts: dict[str, Path]) -> None:
    folders = (parts["lm"], parts["clip"], parts["convnext"])
    config = ModelConfig.from_parts(*folders)
    wider = config.replace(language={**config.language, "intermediate_size": 50})
    with pytest.raises(InputError, match=r"gate_proj\.weight has shape \(48, 32\), not \(50, 32\)"):
        build_model(wider, *folders)


def test_towers_missing_from_a_checkpoint_are_read_from_given_folders(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    folders = (parts["lm"], parts["clip"], parts["convnext"])
    model = build_model(
        ModelConfig.from_parts(*folders, vision_tower_path="/no/longer/there"), *folders
    )
    save_full(model, tmp_path / "full")
    assert _equal(load_full(tmp_path / "full"), model), "paths that are gone do not matter"
    kept = {
        name: value
        for name, value in read_tensors(tmp_path / "full").items()
        if "vision_tower" not in name
    }
    file = tmp_path / "kept.safetensors"
    save_file(kept, file)
    again = load_full(tmp_path / "full", weights=file, vision_tower_dir=parts["clip"])
    assert _equal(again, model)
    with pytest.raises(InputError, match="/no/longer/there"):
        load_full(tmp_path / "full", weights=file)


def _adapter_folder(golden: Path, folder: Path) -> Path:
    """Lay out the reference adapter as its trainer left it."""
    folder.mkdir()
    run = golden / "train_run"
    meta = json.loads((run / "meta.json").read_text())["lora"]
    (folder / "adapter_config.json").write_text(json.dumps(meta["adapter_config"]))
    shutil.copy(run / "lora_adapter.safetensors", folder / "adapter_model.safetensors")
    others = load_file(run / "lora_non_lora_trainables.safetensors")
    torch.save(others, folder / "non_lora_trainables.bin")
    return folder


def test_a_reference_adapter_merges_to_the_reference_weights(golden: Path, tmp_path: Path) -> None:
    model = _train_run_model(golden)
    load_lora(model, _adapter_folder(golden, tmp_path / "adapter"))
    merge_lora(model)
    merged = load_file(golden / "train_run" / "lora_merged.safetensors")
    named = published_parameters(model)
    for name, value in merged.items():
        torch.testing.assert_close(named[name].detach(), value, atol=1e-6, rtol=0)
    others = load_file(golden / "train_run" / "lora_non_lora_trainables.safetensors")
    for name, value in others.items():
        assert torch.equal(named[name.removeprefix("base_model.model.")], value)
    save_full(model, tmp_path / "merged")
    assert _equal(load_full(tmp_path / "merged"), model)


def test_lora_names_are_the_original_trainers(golden: Path, tmp_path: Path) -> None:
    model = _train_run_model(golden)
    attach_lora(model, rank=4, alpha=8)
    save_lora(model, tmp_path, base_model="gemma")
    meta = json.loads((golden / "train_run" / "meta.json").read_text())["lora"]
    written = load_file(tmp_path / "adapter_model.safetensors")
    reference = load_file(golden / "train_run" / "lora_adapter.safetensors")
    assert {n: v.shape for n, v in written.items()} == {n: v.shape for n, v in reference.items()}
    others = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    assert {name: list(value.shape) for name, value in others.items()} == meta["non_lora_keys"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert set(config["target_modules"]) == set(meta["adapter_config"]["target_modules"])


def test_attached_adapters_start_silent_train_alone_and_round_trip(tmp_path: Path) -> None:
    model = tiny_model().eval()
    batch = tiny_batch()
    before = model(**batch).loss.item()
    attach_lora(model, rank=2, alpha=4, dropout=0.1)
    assert model(**batch).loss.item() == pytest.approx(before, abs=1e-6)
    trainable = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2
    assert all(p.requires_grad for p in (*model.projector.parameters(), *model.mining.parameters()))
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = model(**batch).loss.item()
    assert abs(after - before) > 1e-3
    save_lora(model, tmp_path)
    again = tiny_model().eval()
    load_lora(again, tmp_path)
    assert again(**batch).loss.item() == after
    with pytest.raises(ValueError, match="merge_lora"):
        save_full(again, tmp_path / "full")
    merge_lora(again)
    assert again(**batch).loss.item() == pytest.approx(after, abs=1e-4)
    assert len(published_parameters(again)) == len(published_parameters(tiny_model()))
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"r": None}, "adapter_config.json"),
        ({"r": 8}, "has shape"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    golden: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = _adapter_folder(golden, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_lora(_train_run_model(golden), folder)


def test_merging_by_command_line_writes_a_loadable_folder(
    golden: Path, parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (parts["lm"], parts["clip"], parts["convnext"])
    model = build_model(ModelConfig.from_parts(*folders), *folders)
    attach_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_lora(model, tmp_path / "adapter")
    AutoTokenizer.from_pretrained(str(golden / "model_a")).save_pretrained(str(parts["lm"]))
    flags = ("--language-model", "--vision-tower", "--high-resolution-tower")
    arguments = [text for pair in zip(flags, map(str, folders), strict=True) for text in pair]
    arguments += ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert merge_main([*arguments, "--dtype", "float32"]) == 0
    merge_lora(model)
    merged = load_full(tmp_path / "merged")
    assert _equal(merged, model)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert merge_main(arguments) == 2
    assert "holds a model already" in capsys.readouterr().err
