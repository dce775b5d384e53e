"""Read and write weights under the names of published Mini-Gemini checkpoints.

Owns the translation between this package's parameter names and the published ones, and every
file format that holds weights: the three folders a model is put together from, the projector
file of the first stage, the full folder of the second, and LoRA adapters. Loading is strict:
a tensor that is missing, unexpected or of the wrong shape is an error that names it. Pickled
files are read with `weights_only`, so no code in them can run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.model import MGM, init_vision_modules

PROJECTOR_FILE = "mm_projector.bin"
INDEX_FILE = "model.safetensors.index.json"
NON_LORA_FILE = "non_lora_trainables.bin"
LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
MAX_SHARD_BYTES = 5_000_000_000

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONVNEXT_PREFIX = "model.vision_tower_aux.vision_"
# Parameter of ours -> published name, applied to the start of a name.
_PART_NAMES = (
    ("vision_tower.clip.", CLIP_PREFIX),
    ("high_resolution_tower.", CONVNEXT_PREFIX),
    ("mining.query.", "model.vlm_uni_query_projector."),
    ("mining.key.", "model.vlm_uni_aux_projector."),
    ("mining.value.", "model.vlm_uni_val_projector."),
    ("projector.", "model.mm_projector."),
    ("language_model.", ""),
)
# ConvNextModel -> timm, on the rest of the name.
_CONVNEXT_NAMES = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"(?<=\d)\.layernorm\.", ".norm."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"\.layer_scale_parameter$", ".gamma"),
)
# Buffers that older library versions stored beside the weights.
_OLD_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


class Tokenizer(Protocol):
    """What `save_full` needs of a tokenizer."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files into a folder."""


def timm_name(name: str) -> str:
    """Translate a `ConvNextModel` parameter name to timm's."""
    for pattern, replacement in _CONVNEXT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_name(name: str) -> str:
    """Translate the name of one of `MGM`'s parameters to its published name.

    Raises:
        ValueError: If the parameter belongs to no part of the model.
    """
    for ours, published in _PART_NAMES:
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return published + (timm_name(rest) if published == CONVNEXT_PREFIX else rest)
    raise ValueError(f"no published name for parameter {name!r}")


def published_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters under their published names; tied ones appear once."""
    return {published_name(name): value for name, value in model.named_parameters()}


def is_multimodal(published: str) -> bool:
    """Whether a published name belongs to the projector, the mining or a tower."""
    return published.startswith(("model.mm_projector.", "model.vlm_uni_", "model.vision_tower"))


# Reading files


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Read the tensors of a weights file, or of a folder in the Hugging Face layout.

    Args:
        path: A `.safetensors` or pickled file, or a folder, sharded or not.
        wanted: Says by name which tensors to read.

    Raises:
        InputError: If there is no such file, or it is not what its name says.
    """
    if not path.is_dir():
        return dict(_read_file(path, wanted))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        tensors.update(_read_file(file, wanted))
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for index_name in (INDEX_FILE, "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError("Unusable index", f"{index}: weight_map is missing")
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name for name in names):
                raise InputError("Unusable index", f"{index}: a shard lies outside the folder")
            return [folder / name for name in names]
    known = (
        "model.safetensors",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
    )
    for name in known:
        if (folder / name).exists():
            return [folder / name]
    raise InputError("No weights found", str(folder), f"expected one of {', '.join(known)}")


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    if not path.exists():
        raise InputError("File not found", str(path), "the checkpoint is incomplete")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in filter(wanted, file.keys()):  # noqa: SIM118 (not a mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise InputError("Unreadable weights", f"{path}: {error}") from None
        return
    content = load_pickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    for name, value in content.items():
        if isinstance(value, Tensor) and wanted(name):
            yield name, value


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of tensors without running any code in it.

    Raises:
        InputError: If the file is missing, damaged, or holds more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError("File not found", str(path)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError("Unreadable weights", f"{path}: {error}") from None
    except Exception as error:
        # pickle.UnpicklingError is what weights_only raises; its class depends on the version.
        if "npickling" not in type(error).__name__:
            raise
        raise InputError("Unsafe or damaged pickle", f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError("Not a dictionary of tensors", str(path))
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("File not found", str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("Not a JSON file", f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError("Not a JSON object", str(path))
    return content


# Filling modules


def assign(
    targets: Mapping[str, tuple[nn.Module, str]],
    tensors: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Put tensors into parameters, all or nothing by name and shape.

    Args:
        targets: Name in the file -> module and attribute of the parameter it fills.
        tensors: Name in the file -> value; must have exactly the names of `targets`.
        source: The file or folder, for the error.
        dtype: Of the filled parameters; None keeps the dtype they have.

    Raises:
        InputError: With the missing, unexpected and misshapen names.
    """
    problems = _name_problems(targets.keys(), tensors.keys())
    for name in targets.keys() & tensors.keys():
        module, attribute = targets[name]
        expected, found = tuple(getattr(module, attribute).shape), tuple(tensors[name].shape)
        if expected != found:
            problems.append(f"{name} has shape {found}, not {expected}")
    if problems:
        raise InputError(
            "Weights do not fit the model",
            f"{source}: {'; '.join(problems)}",
            "the files must come from a model with the sizes of this configuration",
        )
    for name, (module, attribute) in targets.items():
        old = getattr(module, attribute)
        # A copy, since a tensor from a mapped file would change or vanish with the file.
        value = tensors[name].to(dtype=dtype or old.dtype, device=old.device, copy=True)
        setattr(module, attribute, nn.Parameter(value, requires_grad=old.requires_grad))


def _name_problems(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    expected, found = set(expected), set(found)
    problems = []
    for label, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            problems.append(f"{label}: {', '.join(listed[:8])}{more}")
    return problems


def parameter_slots(
    module: nn.Module, prefix: str = "", rename: Callable[[str], str] = str
) -> dict[str, tuple[nn.Module, str]]:
    """Return every parameter's place under its (renamed, prefixed) name; tied ones once."""
    slots = {}
    for name, _ in module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        slots[prefix + rename(name)] = (module.get_submodule(owner), attribute)
    return slots


def _published_slots(model: MGM) -> dict[str, tuple[nn.Module, str]]:
    return parameter_slots(model, rename=published_name)


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


# The projector file of the first stage


def save_projector(model: MGM, path: Path) -> None:
    """Write projector, mining and both towers as the published first stage does."""
    named = published_parameters(model)
    content = {
        name: value.detach().cpu().clone() for name, value in named.items() if is_multimodal(name)
    }
    _write_atomically(path, lambda target: torch.save(content, target))


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
        for name, slot in _published_slots(model).items()
        if name.startswith(("model.mm_projector.", "model.vlm_uni_"))
        or (has_clip and name.startswith(CLIP_PREFIX))
    }
    assign(slots, tensors, str(path))


# The full folder of the second stage


def save_full(
    model: MGM,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the whole model in the published layout, in the dtype it has.

    All multimodal tensors share the last shard, and there is always an index, since the
    published loader needs both. The index is written last: without it the folder is incomplete.

    Raises:
        ValueError: If LoRA adapters are attached; merge them first.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("LoRA adapters are attached: call merge_lora before save_full")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shards = _plan_shards(published_parameters(model), max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: value.detach().cpu().contiguous() for key, value in shard.items()}
        _write_atomically(
            folder / name,
            lambda target, tensors=tensors: save_file(tensors, target, {"format": "pt"}),
        )
        weight_map.update(dict.fromkeys(shard, name))
    config = {**model.config.to_mgm_config(), "torch_dtype": str(model.dtype).split(".")[-1]}
    _write_json(folder / "config.json", config)
    _write_json(folder / "towers.json", model.config.to_towers())
    model.language_model.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    size = sum(value.numel() * value.element_size() for shard in shards for value in shard.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _plan_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if is_multimodal(name):
            continue
        tensor_size = tensor.numel() * tensor.element_size()
        if shards[-1] and size + tensor_size > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor_size
    return [*shards, {name: tensor for name, tensor in tensors.items() if is_multimodal(name)}]


def read_config(folder: Path, **overrides: Any) -> ModelConfig:
    """Read the configuration of a full folder: config.json, and towers.json where there is one.

    Raises:
        InputError: If config.json is missing or incomplete.
    """
    towers = folder / "towers.json"
    config = ModelConfig.from_mgm_config(
        _read_json(folder / "config.json"), _read_json(towers) if towers.exists() else None
    )
    return config.replace(**overrides) if overrides else config


def load_full(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
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
        weights: A weights file to use instead of the folder's own.
        overrides: Fields of `ModelConfig` to change.

    Raises:
        InputError: If weights are missing or do not fit the configuration.
    """
    config = read_config(folder, **overrides)
    source = weights or folder
    tensors = read_tensors(source, lambda name: not name.endswith(_OLD_BUFFERS))
    _drop_lm_head(tensors, str(source))
    if dtype is None:
        embedding = tensors.get("model.embed_tokens.weight")
        dtype = torch.float32 if embedding is None else embedding.dtype
    model = empty_model(config, dtype)
    slots = _published_slots(model)
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


# LoRA


def attach_lora(model: MGM, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Add low-rank adapters to every linear layer of the language model, and freeze its base.

    Adapters are float32 whatever the base, since their updates are small. Projector and mining
    stay as they are.

    Source: LoRA, arXiv:2106.09685: W x + (alpha / rank) B A x, B starting at zero.
    """
    _inject(model, _lora_config(rank, alpha, dropout))


def _lora_config(rank: int, alpha: float, dropout: float) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works, only int is declared
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _inject(model: MGM, config: LoraConfig) -> None:
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("LoRA adapters are already attached")
    inject_adapter_in_model(config, model.language_model)
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def merge_lora(model: MGM) -> None:
    """Add every adapter into its layer, W + (alpha / rank) B A, and remove the adapters.

    Raises:
        ValueError: If none are attached, or a merged weight is not finite.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ValueError("no LoRA adapters are attached")
    for name, layer in layers:
        layer.merge(safe_merge=True)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.get_base_layer())
    model.language_model.requires_grad_(True)


def _adapter_slots(model: MGM) -> dict[str, tuple[nn.Module, str]]:
    slots = parameter_slots(model.language_model, prefix="base_model.model.")
    return {
        name.replace(".default.weight", ".weight"): slot
        for name, slot in slots.items()
        if ".lora_" in name
    }


def _non_lora_slots(model: MGM) -> dict[str, tuple[nn.Module, str]]:
    return {
        "base_model.model." + name: slot
        for name, slot in _published_slots(model).items()
        if name.startswith(("model.mm_projector.", "model.vlm_uni_"))
    }


def save_lora(model: MGM, folder: Path, base_model: str = "") -> None:
    """Write adapters in PEFT's layout, and projector and mining beside them.

    Args:
        base_model: Name or path of the language model, noted in adapter_config.json.

    Raises:
        ValueError: If no adapters are attached.
    """
    layer = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    if layer is None:
        raise ValueError("no LoRA adapters are attached")
    folder.mkdir(parents=True, exist_ok=True)
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    config = _lora_config(layer.r["default"], layer.lora_alpha["default"], dropout)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(str(folder))
    adapter = _values(_adapter_slots(model))
    _write_atomically(
        folder / "adapter_model.safetensors",
        lambda target: save_file(adapter, target, {"format": "pt"}),
    )
    others = _values(_non_lora_slots(model))
    _write_atomically(folder / NON_LORA_FILE, lambda target: torch.save(others, target))
    config_json = {**model.config.to_mgm_config(), "torch_dtype": str(model.dtype).split(".")[-1]}
    _write_json(folder / "config.json", config_json)
    _write_json(folder / "towers.json", model.config.to_towers())


def _values(slots: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
    return {
        name: getattr(module, attribute).detach().cpu().clone()
        for name, (module, attribute) in slots.items()
    }


def load_lora(model: MGM, folder: Path) -> None:
    """Attach the adapters of a folder, and fill projector and mining from beside them.

    Raises:
        InputError: If the files are missing, use a LoRA variant or do not fit the model.
    """
    path = folder / "adapter_config.json"
    content = _read_json(path)
    if content.get("use_rslora") or content.get("use_dora"):
        raise InputError("Unsupported adapter", f"{path}: use_rslora or use_dora", "use plain LoRA")
    if set(content.get("target_modules") or ()) != set(LORA_TARGETS):
        raise InputError("Unsupported adapter", f"{path}: target_modules", ", ".join(LORA_TARGETS))
    try:
        rank, alpha = int(content["r"]), float(content["lora_alpha"])
        dropout = float(content.get("lora_dropout", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("Unusable adapter", f"{path}: {error}", "r and lora_alpha") from None
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        weights = folder / "adapter_model.bin"
    tensors = read_tensors(weights)
    others = read_tensors(folder / NON_LORA_FILE)
    _inject(model, _lora_config(rank, alpha, dropout))
    assign(_adapter_slots(model), tensors, str(weights))
    assign(_non_lora_slots(model), others, str(folder / NON_LORA_FILE))


# Writing files


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    _write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))
