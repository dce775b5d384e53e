"""Model folders: put together from three, saved and loaded whole, or as a projector file.

Owns what a checkpoint consists of; names are `mgm.names`', file formats `mgm.weights`', adapters
`mgm.lora`'s. Loading is strict: a tensor that is missing, unexpected or of the wrong shape is an
error that names it. Weights are streamed, so loading and saving take little more memory than the
model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.initialization import no_init_weights

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.files import read_json, write_json
from mgm.lora import ADAPTER_CONFIG, attach_lora, load_lora, merge_lora, save_lora
from mgm.model import MGM, init_vision_modules
from mgm.names import (
    CLIP_PREFIX,
    CONVNEXT_PREFIX,
    is_multimodal,
    published_parameters,
    published_slots,
    timm_name,
    vision_module_name,
)
from mgm.part_folders import CLIP_FIELD, CONVNEXT_FIELD, find_part
from mgm.tokenizer_files import Tokenizer, save_tokenizer
from mgm.weights import (
    INDEX_FILE,
    detached,
    fill,
    parameter_slots,
    read_shapes,
    read_tensors,
    write_pickle,
    write_safetensors,
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
    "stored_dtype",
]

PROJECTOR_FILE = "mm_projector.bin"
MAX_SHARD_BYTES = 5_000_000_000
TOWERS_FILE = "towers.json"
# Buffers that older library versions stored beside the weights.
_OLD_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Start of a name -> whether it belongs to CLIP's text side, which no tower has.
_CLIP_TEXT = ("text_model.", "text_projection", "visual_projection", "logit_scale")
# What stands before timm's names: in OpenCLIP's files, and in timm's own.
_TRUNKS = ("visual.trunk.", "")


def _tie(model: MGM) -> None:
    language_model = model.language_model
    language_model.lm_head.weight = language_model.model.embed_tokens.weight


def _refuse_untied(source: Path, names: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an output matrix that is not the embedding."""
    if not names.keys() >= {_HEAD, _EMBEDDING}:
        return
    both = read_tensors(source, lambda name: name in (_HEAD, _EMBEDDING))
    if not torch.equal(both[_HEAD], both[_EMBEDDING]):
        raise InputError(
            "Untied output matrix",
            f"{source}: {_HEAD} differs from {_EMBEDDING}",
            "Gemma ties them; this checkpoint belongs to another model",
        )


def stored_dtype(source: Path) -> torch.dtype:
    """Return the dtype of the embedding in a weights file or folder; float32 if it has none.

    Raises:
        InputError: If the weights cannot be read.
    """
    embedding = read_tensors(source, lambda name: name == _EMBEDDING).get(_EMBEDDING)
    return torch.float32 if embedding is None else embedding.dtype


def _without_head(name: str) -> str | None:
    return None if name == _HEAD or name.endswith(_OLD_BUFFERS) else name


def load_language_model(
    model: MGM,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill the language model from a Gemma folder.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """
    _refuse_untied(folder, read_shapes(folder))
    fill(parameter_slots(model.language_model), folder, _without_head, dtype, device)
    _tie(model)


def load_vision_tower(
    model: MGM,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill the low-resolution tower from a CLIP folder, whole or vision only.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """

    def rename(name: str) -> str | None:
        if name.startswith(_CLIP_TEXT) or name.endswith(_OLD_BUFFERS):
            return None
        return name.removeprefix("vision_model.")

    fill(parameter_slots(model.vision_tower.clip), folder, rename, dtype, device)


def load_high_resolution_tower(
    model: MGM,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill the high-resolution tower from a `ConvNextModel`, an OpenCLIP or a timm folder.

    The head, the final norm and OpenCLIP's text side are not part of the tower.

    Raises:
        InputError: If a tensor is missing, unexpected or of another shape.
    """
    tower, names = model.high_resolution_tower, read_shapes(folder)
    for trunk in _TRUNKS:
        if any(name.startswith(f"{trunk}stem.") for name in names):
            fill(parameter_slots(tower, rename=timm_name), folder, _inside(trunk), dtype, device)
            return

    def rename(name: str) -> str | None:
        bare = name.removeprefix("convnext.")
        return None if bare.startswith(("layernorm.", "classifier.")) else bare

    fill(parameter_slots(tower), folder, rename, dtype, device)


def _inside(trunk: str) -> Callable[[str], str | None]:
    """Return what keeps the stem and the stages that stand behind a prefix."""
    parts = (f"{trunk}stem.", f"{trunk}stages.")
    return lambda name: name.removeprefix(trunk) if name.startswith(parts) else None


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
    device: torch.device | None = None,
) -> MGM:
    """Put a model together from its three folders, with a fresh projector and mining.

    Args:
        config: Sizes, see `ModelConfig.from_parts`.
        dtype: Of every parameter, whatever the files hold.
        device: To which the weights are streamed; None is the CPU.

    Raises:
        InputError: If a folder's weights do not fit `config`.
    """
    model = empty_model(config, dtype)
    load_language_model(model, language_model_dir, dtype, device)
    load_vision_tower(model, vision_tower_dir, dtype, device)
    load_high_resolution_tower(model, high_resolution_tower_dir, dtype, device)
    return model if device is None else model.to(device)


def save_projector(model: MGM, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write projector, mining and both towers as the published first stage does.

    Args:
        dtype: Of the written tensors, bfloat16 as published; None keeps what each has.
    """
    named = published_parameters(model)
    content = {name: detached(value, dtype) for name, value in named.items() if is_multimodal(name)}
    write_pickle(path, content)


def load_projector(model: MGM, path: Path) -> None:
    """Fill projector and mining, and CLIP where the file holds it.

    ConvNeXt weights in the file are passed over, as published: the tower keeps those of its own
    folder. Names may carry any prefix in front of the part they name.

    Raises:
        InputError: If a tensor of the projector or the mining is missing, or any does not fit.
    """

    def rename(name: str) -> str | None:
        return None if "vision_tower_aux." in name else vision_module_name(name) or name

    has_clip = any((rename(name) or "").startswith(CLIP_PREFIX) for name in read_shapes(path))
    slots = {
        name: slot
        for name, slot in published_slots(model).items()
        if name.startswith(("model.mm_projector.", "model.vlm_uni_"))
        or (has_clip and name.startswith(CLIP_PREFIX))
    }
    fill(slots, path, rename)


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
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shards = _plan_shards(published_parameters(model), max_shard_bytes, dtype)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, dtype)
        weight_map.update(dict.fromkeys(shard, name))
    config = model.config
    stored = str(dtype or model.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config.to_mgm_config(torch_dtype=stored))
    write_json(folder / TOWERS_FILE, config.to_towers())
    write_json(folder / "generation_config.json", _generation_config(config))
    if tokenizer is not None:
        length = config.tokenizer_model_max_length
        save_tokenizer(tokenizer, folder, length, config.tokenizer_padding_side)
    size = sum(_size(value, dtype) for shard in shards for value in shard.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    """Return what the published code reads before it generates: the special tokens."""
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {name: config.language[name] for name in tokens if name in config.language}
    return {"_from_model_config": True, **known}


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


def read_config(
    folder: Path,
    *,
    vision_tower_dir: Path | None = None,
    high_resolution_tower_dir: Path | None = None,
    **overrides: Any,
) -> ModelConfig:
    """Read the configuration of a full folder: config.json, and towers.json where there is one.

    Without a towers.json, the sizes are those of the published towers where their widths fit, and
    otherwise those of the towers' folders.

    Args:
        vision_tower_dir: CLIP folder; None looks for the noted one.
        high_resolution_tower_dir: ConvNeXt folder, likewise.
        overrides: Fields of `ModelConfig` to change.

    Raises:
        InputError: If config.json is missing or incomplete, or no tower's size is known.
    """
    folder = folder.expanduser()
    written = read_json(folder / "config.json")
    towers: dict[str, Any] | None = None
    if (folder / TOWERS_FILE).exists():
        towers = read_json(folder / TOWERS_FILE)
    elif "mm_hidden_size" in written and not ModelConfig.has_published_widths(written):
        found = (
            find_part(field, str(written.get(field, "")), given, folder)
            for field, given in (
                (CLIP_FIELD, vision_tower_dir),
                (CONVNEXT_FIELD, high_resolution_tower_dir),
            )
        )
        towers = ModelConfig.tower_sizes(*found)
    try:
        config = ModelConfig.from_mgm_config(written, towers)
    except (AttributeError, TypeError, ValueError) as error:
        files = f"config.json or {TOWERS_FILE}" if towers is not None else "config.json"
        raise InputError(
            "Unusable configuration",
            f"{folder}, {files}: a value is of another type: {error}",
            "restore the file, or write the numbers as numbers",
        ) from error
    return config.replace(**overrides) if overrides else config


def load_full(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    config: ModelConfig | None = None,
    weights: Path | None = None,
    vision_tower_dir: Path | None = None,
    high_resolution_tower_dir: Path | None = None,
    device: torch.device | None = None,
    **overrides: Any,
) -> MGM:
    """Load a full folder, ours or a published one, sharded or not.

    Towers inside the checkpoint are used whatever paths its config.json names. Where it holds
    none, they are read from the given folders, or from where `mgm.part_folders` finds them.

    Args:
        dtype: Of every parameter; None takes that of the stored embedding.
        config: Configuration to use instead of the folder's own.
        weights: A weights file to use instead of the folder's own.
        vision_tower_dir: CLIP folder, for a checkpoint without it.
        high_resolution_tower_dir: ConvNeXt folder, likewise.
        device: To which the weights are streamed; None is the CPU.
        overrides: Fields of `ModelConfig` to change.

    Raises:
        InputError: If weights are missing or do not fit the configuration.
    """
    if weights is None:
        _refuse_other_folders(folder.expanduser())
    if config is None:
        config = read_config(
            folder,
            vision_tower_dir=vision_tower_dir,
            high_resolution_tower_dir=high_resolution_tower_dir,
        )
    config = config.replace(**overrides)
    source = weights or folder
    names = read_shapes(source)
    _refuse_untied(source, names)
    dtype = dtype or stored_dtype(source)
    model = empty_model(config, dtype)
    given = {CLIP_FIELD: vision_tower_dir, CONVNEXT_FIELD: high_resolution_tower_dir}
    slots = published_slots(model)
    for prefix in _load_missing_towers(model, names, folder, given, dtype, device):
        slots = {name: slot for name, slot in slots.items() if not name.startswith(prefix)}
    fill(slots, source, _without_head, dtype, device)
    _tie(model)
    return model if device is None else model.to(device)


def _load_missing_towers(
    model: MGM,
    names: Collection[str],
    folder: Path,
    given: Mapping[str, Path | None],
    dtype: torch.dtype,
    device: torch.device | None,
) -> list[str]:
    """Fill the towers of which a checkpoint holds no tensor; return the prefixes of their names."""
    noted = model.config
    towers = (
        (CLIP_PREFIX, CLIP_FIELD, noted.vision_tower_path, load_vision_tower),
        (
            CONVNEXT_PREFIX,
            CONVNEXT_FIELD,
            noted.high_resolution_tower_path,
            load_high_resolution_tower,
        ),
    )
    missing = []
    for prefix, field, path, load in towers:
        if not any(name.startswith(prefix) for name in names):
            load(model, find_part(field, path, given[field], folder), dtype, device)
            missing.append(prefix)
    return missing


def _refuse_other_folders(folder: Path) -> None:
    """Tell what a folder is that is no full model but looks like the output of a stage.

    Raises:
        InputError: If it holds adapters, or a projector file and nothing more.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            "Not a full model",
            f"{folder} holds LoRA adapters",
            "merge them with python -m mgm.merge, or give the parts they were made for",
        )
    weights = [
        path.name for suffix in ("bin", "safetensors") for path in folder.glob(f"*.{suffix}")
    ]
    if weights == [PROJECTOR_FILE]:
        raise InputError(
            "Not a full model",
            f"{folder} holds the first stage's {PROJECTOR_FILE} only",
            "give that file as the projector, and the three parts beside it",
        )
