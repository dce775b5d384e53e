"""LoRA on the language model: attach, merge, save and load adapters.

Files are PEFT's standard ones, with the projector and the mining beside them as published.

Source: LoRA, arXiv:2106.09685: W x + (alpha / rank) B A x, B starting at zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from mgm.errors import InputError
from mgm.files import read_json, write_atomically, write_json
from mgm.model import MGM
from mgm.names import published_slots
from mgm.weights import (
    Slots,
    assign,
    parameter_slots,
    read_tensors,
)

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


def _adapter_slots(model: MGM) -> Slots:
    slots = parameter_slots(model.language_model, prefix="base_model.model.")
    return {
        name.replace(".default.weight", ".weight"): slot
        for name, slot in slots.items()
        if ".lora_" in name
    }


def _non_lora_slots(model: MGM) -> Slots:
    return {
        "base_model.model." + name: slot
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
    folder.mkdir(parents=True, exist_ok=True)
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    config = _lora_config(layer.r["default"], layer.lora_alpha["default"], dropout)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(str(folder))
    adapter = _values(_adapter_slots(model))
    write_atomically(
        folder / "adapter_model.safetensors",
        lambda target: save_file(adapter, target, {"format": "pt"}),
    )
    others = _values(_non_lora_slots(model))
    write_atomically(folder / NON_LORA_FILE, lambda target: torch.save(others, target))
    config_json = {**model.config.to_mgm_config(), "torch_dtype": str(model.dtype).split(".")[-1]}
    write_json(folder / "config.json", config_json)
    write_json(folder / "towers.json", model.config.to_towers())


def _values(slots: Slots) -> dict[str, Tensor]:
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
    content = read_json(path)
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
