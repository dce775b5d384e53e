"""Model folders: put together from three, saved and loaded whole, or as a projector file.

Owns what a checkpoint consists of; names are `mgm.names`', file formats `mgm.weights`', adapters
`mgm.lora`'s. Loading is strict: a tensor that is missing, unexpected or of the wrong shape is an
error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.files import read_json, write_atomically, write_json
from mgm.lora import attach_lora, load_lora, merge_lora, save_lora
from mgm.model import MGM, init_vision_modules
from mgm.names import (
    CLIP_PREFIX,
    CONVNEXT_PREFIX,
    is_multimodal,
    published_parameters,
    published_slots,
    timm_name,
)
from mgm.weights import (
    INDEX_FILE,
    assign,
    parameter_slots,
    read_tensors,
)

__all__ = [
    "attach_lora",
    "build_model",
    "load_full",
    "load_high_resolution_tower",
    "load_language_model",
    "load_lora",
    "load_projector",
    "load_vision_tower",
    "merge_lora",
    "read_config",
    "save_full",
    "save_lora",
    "save_projector",
]

PROJECTOR_FILE = "mm_projector.bin"
MAX_SHARD_BYTES = 5_000_000_000
# Buffers that older library versions stored beside the weights.
_OLD_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


class Tokenizer(Protocol):
    """What `save_full` needs of a tokenizer."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files into a folder."""


def _tie(model: MGM) -> None:
    language_model = model.language_model
    language_model.lm_head.weight = language_model.model.embed_tokens.weight


def _drop_lm_head(tensors: dict[str, Tensor], source: str) -> None:
    """Remove the output matrix, which is the embedding; refuse one that is not."""
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise InputError(
            "Untied output matrix",
            f"{source}: lm_head.weight differs from model.embed_tokens.weight",
            "Gemma ties them; this checkpoint belongs to another model",
        )


def load_language_model(model: MGM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Fill the language model from a Gemma folder.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """
    tensors = read_tensors(folder, lambda name: not name.endswith(_OLD_BUFFERS))
    _drop_lm_head(tensors, str(folder))
    assign(parameter_slots(model.language_model), tensors, str(folder), dtype)
    _tie(model)


def load_vision_tower(model: MGM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Fill the low-resolution tower from a CLIP folder, whole or vision only.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """
    outside = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    tensors = read_tensors(
        folder, lambda name: not name.startswith(outside) and not name.endswith(_OLD_BUFFERS)
    )
    tensors = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    assign(parameter_slots(model.vision_tower.clip), tensors, str(folder), dtype)


def load_high_resolution_tower(model: MGM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Fill the high-resolution tower from a `ConvNextModel` or an OpenCLIP folder.

    The head, the final norm and OpenCLIP's text side are not part of the tower.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """
    tensors = read_tensors(folder)
    trunk = {
        name.removeprefix("visual.trunk."): value
        for name, value in tensors.items()
        if name.startswith(("visual.trunk.stem.", "visual.trunk.stages."))
    }
    tower = model.high_resolution_tower
    if trunk:
        assign(parameter_slots(tower, rename=timm_name), trunk, str(folder), dtype)
        return
    bare = {name.removeprefix("convnext."): value for name, value in tensors.items()}
    inside = {
        name: value
        for name, value in bare.items()
        if not name.startswith(("layernorm.", "classifier."))
    }
    assign(parameter_slots(tower), inside, str(folder), dtype)


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> MGM:
    """Build a model whose language model and towers hold no values yet.

    Their memory is reserved but not touched, so replacing it by loaded tensors costs nothing.
    Projector and mining have the default initialisation.
    """
    with no_init_weights():
        model = MGM(config)
    _tie(model)
    init_vision_modules(model)
    model.projector.to(dtype)
    model.mining.to(dtype)
    return model


def build_model(
    config: ModelConfig,
    language_model_dir: Path,
    vision_tower_dir: Path,
    high_resolution_tower_dir: Path,
    dtype: torch.dtype = torch.float32,
) -> MGM:
    """Put a model together from its three folders, with a fresh projector and mining.

    Args:
        config: Sizes, see `ModelConfig.from_parts`.
        dtype: Of every parameter, whatever the files hold.

    Raises:
        InputError: If a folder's weights do not fit `config`.
    """
    model = empty_model(config, dtype)
    load_language_model(model, language_model_dir, dtype)
    load_vision_tower(model, vision_tower_dir, dtype)
    load_high_resolution_tower(model, high_resolution_tower_dir, dtype)
    return model


def save_projector(model: MGM, path: Path) -> None:
    """Write projector, mining and both towers as the published first stage does."""
    named = published_parameters(model)
    content = {
        name: value.detach().cpu().clone() for name, value in named.items() if is_multimodal(name)
    }
    write_atomically(path, lambda target: torch.save(content, target))


def load_projector(model: MGM, path: Path) -> None:
    """Fill projector and mining, and CLIP where the file holds it.

    ConvNeXt weights in the file are passed over, as published: the tower keeps those of its own
    folder. Names may carry any prefix in front of the part they name.

    Raises:
        InputError: If a tensor of the projector or the mining is missing, or any does not fit.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in read_tensors(path).items():
        part = re.search(
            r"(mm_projector|vlm_uni_\w+?_projector|vision_tower\.vision_tower)\.", name
        )
        if part is not None:
            tensors["model." + name[part.start() :]] = value
    has_clip = any(name.startswith(CLIP_PREFIX) for name in tensors)
    slots = {
        name: slot
        for name, slot in published_slots(model).items()
        if name.startswith(("model.mm_projector.", "model.vlm_uni_"))
        or (has_clip and name.startswith(CLIP_PREFIX))
    }
    assign(slots, tensors, str(path))


def save_full(
    model: MGM,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the whole model in the published layout.

    All multimodal tensors share the last shard, and there is always an index, since the
    published loader needs both. The index is written last: without it the folder is incomplete.

    Args:
        tokenizer: Written beside the weights.
        max_shard_bytes: Most that a shard of the language model takes.
        dtype: Of the written tensors; None keeps what each has, which differ where only a part
            was trained in float32.

    Raises:
        ValueError: If LoRA adapters are attached; merge them first.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("LoRA adapters are attached: call merge_lora before save_full")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shards = _plan_shards(published_parameters(model), max_shard_bytes, dtype)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / name, shard, dtype)
        weight_map.update(dict.fromkeys(shard, name))
    stored = str(dtype or model.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**model.config.to_mgm_config(), "torch_dtype": stored})
    write_json(folder / "towers.json", model.config.to_towers())
    model.language_model.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    size = sum(_size(value, dtype) for shard in shards for value in shard.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _plan_shards(
    tensors: Mapping[str, Tensor], max_bytes: int, dtype: torch.dtype | None
) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    taken = 0
    for name, tensor in tensors.items():
        if is_multimodal(name):
            continue
        if shards[-1] and taken + _size(tensor, dtype) > max_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = tensor
        taken += _size(tensor, dtype)
    return [*shards, {name: tensor for name, tensor in tensors.items() if is_multimodal(name)}]


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Return the bytes that a tensor takes when written in `dtype`."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def read_config(folder: Path, **overrides: Any) -> ModelConfig:
    """Read the configuration of a full folder: config.json, and towers.json where there is one.

    Raises:
        InputError: If config.json is missing or incomplete.
    """
    towers = folder / "towers.json"
    config = ModelConfig.from_mgm_config(
        read_json(folder / "config.json"), read_json(towers) if towers.exists() else None
    )
    return config.replace(**overrides) if overrides else config


def load_full(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    config: ModelConfig | None = None,
    weights: Path | None = None,
    vision_tower_dir: Path | None = None,
    high_resolution_tower_dir: Path | None = None,
    **overrides: Any,
) -> MGM:
    """Load a full folder, ours or a published one, sharded or not.

    Towers inside the checkpoint are used whatever paths its config.json names. Where it holds
    none, they are read from the given folders, or from those paths if they exist.

    Args:
        dtype: Of every parameter; None takes that of the stored embedding.
        config: Configuration to use instead of the folder's own.
        weights: A weights file to use instead of the folder's own.
        overrides: Fields of `ModelConfig` to change.

    Raises:
        InputError: If weights are missing or do not fit the configuration.
    """
    config = read_config(folder) if config is None else config
    config = config.replace(**overrides)
    source = weights or folder
    tensors = read_tensors(source, lambda name: not name.endswith(_OLD_BUFFERS))
    _drop_lm_head(tensors, str(source))
    if dtype is None:
        embedding = tensors.get("model.embed_tokens.weight")
        dtype = torch.float32 if embedding is None else embedding.dtype
    model = empty_model(config, dtype)
    slots = published_slots(model)
    for prefix, path, noted, load in (
        (CLIP_PREFIX, vision_tower_dir, config.vision_tower_path, load_vision_tower),
        (
            CONVNEXT_PREFIX,
            high_resolution_tower_dir,
            config.high_resolution_tower_path,
            load_high_resolution_tower,
        ),
    ):
        if any(name.startswith(prefix) for name in tensors):
            continue
        load(model, _tower_folder(path, noted, prefix, folder), dtype)
        slots = {name: slot for name, slot in slots.items() if not name.startswith(prefix)}
    assign(slots, tensors, str(source), dtype)
    _tie(model)
    return model


def _tower_folder(given: Path | None, noted: str, prefix: str, checkpoint: Path) -> Path:
    folder = given or Path(noted)
    if not noted and given is None or not folder.is_dir():
        raise InputError(
            "A vision tower is missing",
            f"{checkpoint} holds no {prefix}* tensors, and {str(folder)!r} is not a folder",
            "name the tower's folder",
        )
    return folder


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    content = {
        name: value.detach().to(dtype=dtype, device="cpu").contiguous()
        for name, value in tensors.items()
    }
    write_atomically(path, lambda target: save_file(content, target, {"format": "pt"}))
