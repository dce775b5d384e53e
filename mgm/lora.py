"""LoRA on the language model: attach, merge, save and load adapters.

Files are PEFT's standard ones, with the projector and the mining beside them as published.

Source: LoRA, arXiv:2106.09685: W x + (alpha / rank) B A x, B starting at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mgm.errors import InputError
from mgm.files import read_json, write_json
from mgm.model import MGM
from mgm.names import published_slots, vision_module_name
from mgm.weights import (
    Slots,
    detached,
    fill,
    parameter_slots,
    write_pickle,
    write_safetensors,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
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
# Options of PEFT's that change what the two matrices mean, or that train more than them.
_UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layers_to_transform",
    "modules_to_save",
    "exclude_modules",
    "lora_bias",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
)
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Those of PEFT's that leave the base as it is; others take a part of it into the adapters."""


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
    model.language_model.train(model.training)  # new layers start in training mode, dropping out
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def merge_lora(model: MGM) -> None:
    """Add every adapter into its layer, W + (alpha / rank) B A, and remove the adapters.

    The sum is rounded to the layer's dtype once: an update smaller than the weight's precision is
    not rounded before it is added.

    Raises:
        ValueError: If none are attached.
        InputError: If a merged weight is not finite.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ValueError("no LoRA adapters are attached")
    for name, layer in layers:
        base = layer.get_base_layer()
        base.weight.data = _merged(name, layer, base.weight.data)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, base)
    model.language_model.requires_grad_(True)


def _merged(name: str, layer: LoraLayer, weight: Tensor) -> Tensor:
    """Return a layer's weight (O, I) with its adapter, added in float32."""
    down = layer.lora_A["default"].weight.detach().float()  # (rank, I)
    up = layer.lora_B["default"].weight.detach().float()  # (O, rank)
    merged: Tensor = (weight.float() + layer.scaling["default"] * (up @ down)).to(weight.dtype)
    if not merged.isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(
            "Merged weight is not finite",
            f"{name} in {dtype}",
            "the training of the adapters ran away, or the values need bfloat16 or float32",
        )
    return merged


def _adapter_slots(model: MGM) -> Slots:
    slots = parameter_slots(model.language_model, prefix="base_model.model.")
    return {
        name.replace(".default.weight", ".weight"): slot
        for name, slot in slots.items()
        if ".lora_" in name
    }


def _vision_slots(model: MGM) -> Slots:
    return {
        name: slot
        for name, slot in published_slots(model).items()
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
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    config = _lora_config(layer.r["default"], layer.lora_alpha["default"], dropout)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_safetensors(folder / ADAPTER_FILES[0], _values(_adapter_slots(model)))
    others = {f"base_model.model.{name}": v for name, v in _values(_vision_slots(model)).items()}
    write_pickle(folder / NON_LORA_FILE, others)
    stored = str(model.dtype).removeprefix("torch.")
    write_json(folder / "config.json", model.config.to_mgm_config(torch_dtype=stored))
    write_json(folder / "towers.json", model.config.to_towers())


def _values(slots: Slots) -> dict[str, Tensor]:
    return {
        name: detached(getattr(module, attribute)) for name, (module, attribute) in slots.items()
    }


def load_lora(model: MGM, folder: Path) -> None:
    """Attach the adapters of a folder, and fill projector and mining from beside them.

    Adapter names may hold the adapter's own name, `default`, and the other tensors any prefix.

    Raises:
        InputError: If the files are missing, use a LoRA variant or do not fit the model.
    """
    folder = folder.expanduser()
    config = _read_adapter_config(folder / ADAPTER_CONFIG)
    weights = next((folder / n for n in ADAPTER_FILES if (folder / n).exists()), None)
    if weights is None:
        raise InputError(
            "No adapter weights", f"{folder} holds neither of {', '.join(ADAPTER_FILES)}"
        )
    others = folder / NON_LORA_FILE
    if not others.exists():
        raise InputError(
            "No projector beside the adapters",
            f"{others} is missing",
            "copy the file that was written with these adapters",
        )
    _inject(model, config)
    slots = _adapter_slots(model)
    fill(slots, weights, lambda name: name.replace(".default.weight", ".weight"))
    fill(_vision_slots(model), others, lambda name: vision_module_name(name) or name)


def _read_adapter_config(path: Path) -> LoraConfig:
    """Read PEFT's configuration of an adapter.

    Raises:
        InputError: Naming the key that is missing, unusable or of another LoRA variant.
    """
    content = read_json(path)
    _refuse_variants(path, content)
    try:
        rank, alpha = int(content["r"]), float(content["lora_alpha"])
        dropout = float(content.get("lora_dropout") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "Unusable adapter", f"{path}: {error}", "r and lora_alpha must be numbers"
        ) from None
    if rank < 1:
        raise InputError("Unusable adapter", f"{path}: r = {rank}", "it must be 1 or more")
    return _lora_config(rank, alpha, dropout)


def _refuse_variants(path: Path, content: Mapping[str, Any]) -> None:
    used = [key for key in _UNSUPPORTED if content.get(key)]
    if content.get("bias", "none") != "none":
        used.append("bias")
    if content.get("peft_type", "LORA") != "LORA":
        used.append("peft_type")
    if content.get("init_lora_weights") not in _INITIALISATIONS:
        used.append("init_lora_weights")
    if used:
        raise InputError("Unsupported adapter", f"{path}: {', '.join(used)}", "use plain LoRA")
    targets = content.get("target_modules")
    if not isinstance(targets, list) or {str(t) for t in targets} != set(LORA_TARGETS):
        raise InputError("Unsupported adapter", f"{path}: target_modules", ", ".join(LORA_TARGETS))
