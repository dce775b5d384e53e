"""Checkpoints in the published layouts: what is read of them, and what is written for others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    GemmaForCausalLM,
    PreTrainedTokenizerFast,
)

from mgm.checkpoint import (
    MAX_SHARD_BYTES,
    _plan_shards,
    attach_lora,
    build_model,
    load_full,
    load_lora,
    load_projector,
    merge_lora,
    read_config,
    save_full,
    save_lora,
    save_projector,
    stored_dtype,
)
from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.generate import Answerer
from mgm.merge import MergeSettings, merge
from mgm.model import IMAGE_TOKEN_ID, MGM, build_language_model
from mgm.names import is_multimodal, published_parameters, timm_name
from mgm.part_folders import CLIP_FIELD, find_part
from mgm.progress import Progress
from mgm.request import Decoding, Request
from mgm.weights import read_tensors
from tests.mgm.conftest import tiny_batch, tiny_model

CLIP_NAME = "OpenAI/clip-vit-large-patch14-336"
CONVNEXT_NAME = "OpenAI/openclip-convnext-large-d-320"


def _equal(first: MGM, second: MGM) -> bool:
    ours, theirs = published_parameters(first), published_parameters(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def _write_parts(model: MGM, folder: Path, golden: Path, dtype: torch.dtype) -> dict[str, Path]:
    """Write the three folders that `model` is made of, as their libraries write them."""
    config = model.config
    paths = {
        "language": folder / "gemma-2b-it",
        "vision": folder / CLIP_NAME,
        "high_resolution": folder / CONVNEXT_NAME,
    }
    language = build_language_model(config)
    language.load_state_dict(model.language_model.state_dict())
    language.to(dtype).save_pretrained(str(paths["language"]))
    vision = CLIPVisionModel(CLIPVisionConfig(**config.vision))
    vision.load_state_dict(model.vision_tower.clip.state_dict())
    vision.to(dtype).save_pretrained(str(paths["vision"]))
    sizes = config.high_resolution
    tower = ConvNextModel(
        ConvNextConfig(hidden_sizes=sizes["hidden_sizes"], depths=sizes["depths"])
    )
    tower.load_state_dict(model.high_resolution_tower.state_dict(), strict=False)
    tower.to(dtype).save_pretrained(str(paths["high_resolution"]))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(golden / "model_a" / name, paths["language"] / name)
    return paths


def _write_published(model: MGM, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Write a folder as the published trainer leaves it, with paths of another machine."""
    folder.mkdir(parents=True)
    config = model.config.to_mgm_config(torch_dtype="float32")
    config |= {
        "mm_vision_tower": f"/gone/model_zoo/{CLIP_NAME}",
        "mm_vision_tower_aux": f"/gone/model_zoo/{CONVNEXT_NAME}",
        "transformers_version": "4.38.0",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: value.detach() for name, value in published_parameters(model).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_the_published_model_is_written_with_the_published_names(golden: Path) -> None:
    reference = json.loads((golden / "full_model_keys.json").read_text())
    with torch.device("meta"):
        model = MGM(ModelConfig.preset("mgm-2b"))
    shards = _plan_shards(published_parameters(model), MAX_SHARD_BYTES, torch.bfloat16)
    written = {name: list(value.shape) for shard in shards for name, value in shard.items()}
    assert written == reference["keys"]
    assert sum(len(shard) for shard in shards) == len(written)
    assert [name for name in shards[-1] if not is_multimodal(name)] == []
    assert all(
        sum(value.numel() * 2 for value in shard.values()) <= MAX_SHARD_BYTES for shard in shards
    )


def _cut(names: set[str], keyword: str) -> set[str]:
    """Return what the published code is left with of the names that hold a keyword."""
    return {name.split(keyword + ".")[1] for name in names if keyword + "." in name}


def test_the_published_loaders_procedure_finds_every_part(tmp_path: Path) -> None:
    model = tiny_model()
    save_projector(model, tmp_path / "mm_projector.bin")
    save_full(model, tmp_path / "full", max_shard_bytes=4000)
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
    # It opens the shards that hold one of these, and takes mining and CLIP from nowhere else.
    opened = {
        shard
        for name, shard in index["weight_map"].items()
        if any(part in name for part in ("vlm_uni", "vision_fpn", "vision_stages"))
    }
    in_shards = {n for shard in opened for n in load_file(tmp_path / "full" / shard)}
    in_projector_file = set(torch.load(tmp_path / "mm_projector.bin", weights_only=True))
    clip = {f"vision_model.{name}" for name, _ in model.vision_tower.clip.named_parameters()}
    layers = {"0.weight", "0.bias", "1.weight", "1.bias"}
    for names in (in_shards, in_projector_file):
        assert _cut(names, "vision_tower.vision_tower") == clip
        for part in ("query", "aux", "val"):
            assert _cut(names, f"vlm_uni_{part}_projector") == layers
        assert _cut(names, "mm_projector") == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_published_folder_without_towers_json_is_read_with_the_towers_that_are_given(
    golden: Path, tmp_path: Path
) -> None:
    model = tiny_model().eval()
    parts = _write_parts(model, tmp_path / "zoo", golden, torch.float32)
    _write_published(model, tmp_path / "mgm-2b")
    given = {
        "vision_tower_dir": parts["vision"],
        "high_resolution_tower_dir": parts["high_resolution"],
    }
    found = load_full(tmp_path / "mgm-2b", **given).eval()
    assert _equal(found, model)
    batch = tiny_batch()
    assert torch.equal(found(**batch).loss, model(**batch).loss)
    with pytest.raises(InputError) as error:
        load_full(tmp_path / "mgm-2b")
    assert "mm_vision_tower = '/gone/model_zoo/OpenAI/clip" in error.value.message
    assert "--vision-tower" in error.value.hint


@pytest.mark.parametrize("place", ["inside", "beside", "above", "flat"])
def test_towers_are_found_near_the_checkpoint(golden: Path, tmp_path: Path, place: str) -> None:
    model = tiny_model().eval()
    checkpoint = tmp_path / "training_dirs" / "mgm-2b"
    tensors = _write_published(model, checkpoint)
    kept = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    save_file(kept, checkpoint / "model.safetensors")
    above = {"inside": checkpoint, "beside": checkpoint.parent, "above": tmp_path}
    parts = _write_parts(model, above.get(place, checkpoint.parent), golden, torch.float32)
    if place == "flat":
        for part in ("vision", "high_resolution"):
            parts[part].rename(checkpoint.parent / parts[part].name)
    assert _equal(load_full(checkpoint), model)


def test_towers_json_may_say_where_the_towers_are(golden: Path, tmp_path: Path) -> None:
    model = tiny_model()
    parts = _write_parts(model, tmp_path / "zoo", golden, torch.float32)
    checkpoint = tmp_path / "a" / "b" / "c" / "mgm-2b"
    tensors = _write_published(model, checkpoint)
    kept = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    save_file(kept, checkpoint / "model.safetensors")
    noted = {
        "vision_tower_path": str(parts["vision"]),
        "high_resolution_tower_path": str(parts["high_resolution"]),
    }
    towers = {**model.config.to_towers(), **noted}
    (checkpoint / "towers.json").write_text(json.dumps(towers))
    assert _equal(load_full(checkpoint), model)


def test_a_given_tower_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--vision-tower .*nowhere"):
        find_part(CLIP_FIELD, str(tmp_path), tmp_path / "nowhere", tmp_path)
    with pytest.raises(InputError, match="mm_vision_tower = ''"):
        find_part(CLIP_FIELD, "", None, tmp_path)
    assert find_part(CLIP_FIELD, str(tmp_path), None, tmp_path / "x") == tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoints_of_every_precision_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    save_full(model, tmp_path, dtype=dtype)
    assert stored_dtype(tmp_path) == dtype
    found = load_full(tmp_path)
    assert {value.dtype for value in found.parameters()} == {dtype}
    assert _equal(found, tiny_model().to(dtype))
    assert load_full(tmp_path, torch.float32, device=torch.device("cpu")).dtype == torch.float32


def test_weights_are_streamed_to_the_device_that_is_given(golden: Path, tmp_path: Path) -> None:
    model = tiny_model()
    save_full(model, tmp_path / "full")
    parts = _write_parts(model, tmp_path, golden, torch.float32)
    device = torch.device("meta")
    for found in (
        load_full(tmp_path / "full", device=device),
        build_model(model.config, *parts.values(), device=device),
    ):
        assert {value.device for value in (*found.parameters(), *found.buffers())} == {device}


def test_a_projector_that_is_a_view_is_stored_alone(tmp_path: Path) -> None:
    model = tiny_model()
    save_projector(model, tmp_path / "alone.bin")
    flat = torch.zeros(1_000_000)
    weight = model.projector[0].weight
    view = flat[5 : 5 + weight.numel()].view_as(weight)
    view.copy_(weight.detach())
    model.projector[0].weight = torch.nn.Parameter(view)
    save_projector(model, tmp_path / "view.bin")
    sizes = [(tmp_path / name).stat().st_size for name in ("alone.bin", "view.bin")]
    assert abs(sizes[0] - sizes[1]) < 1000
    load_projector(tiny_model(seed=3), tmp_path / "view.bin")


@pytest.mark.parametrize("prefix", ["visual.trunk.", ""])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_openclip_and_timm_names_are_read(
    golden: Path, tmp_path: Path, prefix: str, kind: str
) -> None:
    model = tiny_model()
    parts = _write_parts(model, tmp_path / "zoo", golden, torch.float32)
    named = model.high_resolution_tower.state_dict()
    tensors = {prefix + timm_name(name): value for name, value in named.items()}
    tensors |= {
        f"{prefix}head.norm.weight": torch.zeros(2),
        f"{prefix}norm_pre.bias": torch.ones(1),
    }
    if prefix:
        tensors |= {"logit_scale": torch.ones(1), "text.ln_final.weight": torch.zeros(3)}
    folder = tmp_path / "openclip"
    folder.mkdir()
    if kind == "bin":
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    found = build_model(model.config, parts["language"], parts["vision"], folder)
    assert all(
        torch.equal(found.high_resolution_tower.state_dict()[n], v) for n, v in named.items()
    )


def test_unknown_tensors_of_a_projector_file_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    save_projector(model, tmp_path / "file.bin", torch.bfloat16)
    content = torch.load(tmp_path / "file.bin", weights_only=True)
    assert {value.dtype for value in content.values()} == {torch.bfloat16}
    load_projector(tiny_model(seed=3), tmp_path / "file.bin")
    torch.save({**content, "model.embed_tokens.weight": torch.zeros(2)}, tmp_path / "file.bin")
    with pytest.raises(InputError, match=r"unexpected: model\.embed_tokens\.weight"):
        load_projector(model, tmp_path / "file.bin")


def test_outputs_of_other_stages_are_told_from_full_models(tmp_path: Path) -> None:
    model = tiny_model()
    save_projector(model, tmp_path / "pretrained" / "mm_projector.bin")
    with pytest.raises(InputError, match="first stage's"):
        load_full(tmp_path / "pretrained")
    attach_lora(model, rank=2, alpha=4)
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"mgm\.merge"):
        load_full(tmp_path / "adapter")


def test_tokenizer_files_are_copied_not_written_anew(golden: Path, tmp_path: Path) -> None:
    source = golden / "model_a"
    model = tiny_model(tokenizer_model_max_length=77)
    save_full(model, tmp_path, AutoTokenizer.from_pretrained(str(source)))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    noted = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((source / "tokenizer_config.json").read_text())
    assert noted == {**original, "model_max_length": 77, "padding_side": "right"}
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    save_full(model, tmp_path, again)
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    unsaved = PreTrainedTokenizerFast(tokenizer_object=again.backend_tokenizer)
    save_full(model, tmp_path / "other", unsaved)
    assert (tmp_path / "other" / "tokenizer.json").is_file()


def test_the_special_tokens_are_written_for_generation(tmp_path: Path) -> None:
    save_full(tiny_model(), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {
        "_from_model_config": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def test_folders_may_be_relative_or_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model()
    save_full(model, Path("~/full"))
    save_projector(model, Path("~/mm_projector.bin"))
    assert (tmp_path / "full" / "config.json").is_file()
    for folder in (Path("full"), Path("~/full")):
        assert _equal(load_full(folder), model)
        assert read_config(folder).name == "tiny"
    other = tiny_model(seed=5)
    load_projector(other, Path("~/mm_projector.bin"))
    assert torch.equal(other.projector[0].weight, model.projector[0].weight)


def _with_adapters(model: MGM, scale: float) -> MGM:
    attach_lora(model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def test_stock_peft_reads_the_adapters_over_a_stock_gemma(golden: Path, tmp_path: Path) -> None:
    model = tiny_model().eval()
    parts = _write_parts(model, tmp_path / "zoo", golden, torch.float32)
    save_lora(_with_adapters(model, 0.1), tmp_path / "adapter", str(parts["language"]))
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(2))
    stock = GemmaForCausalLM.from_pretrained(str(parts["language"]), dtype=torch.float32)
    # The stock class rewrites the name of the erf GELU as it reads it.
    stock.config.hidden_act = "gelu"
    for layer in stock.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    before = stock.eval()(ids).logits
    peft = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    expected = model.language_model(ids).logits
    torch.testing.assert_close(peft(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-2


def test_pickled_adapters_with_other_prefixes_are_read(golden: Path, tmp_path: Path) -> None:
    model = _with_adapters(tiny_model(), 0.1)
    save_lora(model, tmp_path)
    adapter = tmp_path / "adapter_model.safetensors"
    tensors = {n.replace(".weight", ".default.weight"): v for n, v in load_file(adapter).items()}
    adapter.unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    others = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    bare = {name.removeprefix("base_model.model."): value for name, value in others.items()}
    torch.save(bare, tmp_path / "non_lora_trainables.bin")
    again = tiny_model()
    load_lora(again, tmp_path)
    merge_lora(model)
    merge_lora(again)
    assert _equal(again, model)


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_a_lost_file_of_an_adapter_is_named(tmp_path: Path, lost: str) -> None:
    save_lora(_with_adapters(tiny_model(), 0.1), tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=lost):
        load_lora(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"target_modules": "all-linear"},
        {"r": 0},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [106]},
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_lora(_with_adapters(tiny_model(), 0.1), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=rf"adapter_config\.json.*{next(iter(change))}"):
        load_lora(tiny_model(), tmp_path)


def test_adapters_that_ran_away_are_named_when_they_are_merged() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj in float32"):
        merge_lora(_with_adapters(tiny_model(), float("inf")))


def test_merging_rounds_once() -> None:
    model = tiny_model().to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.language_model.get_parameter(name).detach().float()
    _with_adapters(model, 0.01)
    layer = model.language_model.model.layers[0].mlp.up_proj
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (before + update.detach()).to(torch.bfloat16)
    merge_lora(model)
    assert torch.equal(model.language_model.get_parameter(name), expected)


def _questions(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return six questions (6, 7) with a picture each, their pictures and their answers (6, 4)."""
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(4, 750, (6, 5), generator=generator)
    start = torch.tensor([2, IMAGE_TOKEN_ID]).expand(6, 2)
    side = config.image_size_aux
    pictures = torch.randn(6, 3, side, side, generator=generator)
    answers = torch.randint(4, 750, (6, 4), generator=generator)
    return torch.cat([start, words], dim=1), pictures, answers


def _answers(model: MGM) -> list[list[int]]:
    questions, pictures, _ = _questions(model.config)
    asked = [Request(tuple(ids), (str(n),)) for n, ids in enumerate(questions.tolist())]
    decoding = Decoding(8, frozenset({1}))
    answerer = Answerer(model, lambda key: pictures[int(key)].to(model.dtype), decoding)
    return [list(answer) for answer in answerer.answer(asked)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[MGM, Path]:
    """A mini model, and the folder of adapters that were trained to six answers over it."""
    torch.manual_seed(21)
    model = MGM(ModelConfig.preset("mgm-mini"))
    with torch.no_grad():  # the frozen output matrix must be able to speak up
        model.language_model.model.embed_tokens.weight.mul_(5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attach_lora(model, rank=4, alpha=8)
    questions, pictures, answers = _questions(model.config)
    ids = torch.cat([questions, answers, torch.ones(6, 1, dtype=torch.long)], dim=1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < questions.shape[1], -100)
    features = model.towers(None, pictures)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(120):
        loss = model(ids, labels, features=features).loss
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert loss < 0.1, float(loss)
    folder = tmp_path_factory.mktemp("taught")
    noted = model.config.replace(
        vision_tower_path=f"/gone/{CLIP_NAME}", high_resolution_tower_path=f"/gone/{CONVNEXT_NAME}"
    )
    model.config = noted
    save_lora(model, folder, "/gone/gemma-2b-it")
    base = MGM(noted)
    base.load_state_dict(state)
    return base, folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_folder_answers_as_the_adapters_did(
    golden: Path, tmp_path: Path, taught: tuple[MGM, Path], dtype: str
) -> None:
    base, adapter = taught
    kind = getattr(torch, dtype)
    parts = _write_parts(base, tmp_path, golden, kind)
    shutil.copytree(adapter, tmp_path / "adapter")
    unmerged = build_model(base.config, *parts.values(), dtype=kind).eval()
    expected = [[*answer, 1] for answer in _questions(base.config)[2].tolist()]
    assert not any(answer in expected for answer in _answers(unmerged))
    load_lora(unmerged, tmp_path / "adapter")
    answers = _answers(unmerged)
    settings = MergeSettings(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)  # type: ignore[arg-type]
    merge(settings, Progress(None))
    merged = load_full(tmp_path / "merged").eval()
    assert {value.dtype for value in merged.parameters()} == {kind}
    assert _answers(merged) == answers
    assert [answer[:4] for answer in answers] == [answer[:4] for answer in expected]
    assert read_tensors(tmp_path / "merged").keys() == published_parameters(merged).keys()
    parts["language"].rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"adapter_config\.json: base_model_name_or_path"):
        merge(replace(settings, output=tmp_path / "second"), Progress(None))
