"""A tiny training: the three folders of its model, and the command line that starts it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    GemmaConfig,
    GemmaForCausalLM,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
STEPS = 9


def write_parts(
    folder: Path,
    *,
    seed: int = 6,
    depths: tuple[int, ...] = (1, 1, 2, 1),
    drop_path_rate: float = 0.3,
) -> dict[str, Path]:
    """Write the three folders of a tiny model."""
    torch.manual_seed(seed)
    language = GemmaConfig(
        vocab_size=502,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    sizes = {
        "hidden_sizes": [4, 8, 12, 16],
        "depths": list(depths),
        "drop_path_rate": drop_path_rate,
    }
    GemmaForCausalLM(language).save_pretrained(str(folder / "language_model"))
    CLIPVisionModel(vision).save_pretrained(str(folder / "vision_tower"))
    ConvNextModel(ConvNextConfig(**sizes)).save_pretrained(str(folder / "high_resolution_tower"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "model_a" / name, folder / "language_model" / name)
    return {path.name: path for path in folder.iterdir()}


def arguments(
    parts: dict[str, Path], output: Path, method: str, projector: Path, **changes: Any
) -> list[str]:
    """Return the flags of a training of `STEPS` steps."""
    values: dict[str, Any] = {
        **parts,
        "stage": "pretrain" if method == "projector" else "finetune",
        "data": GOLDEN / "train_run" / "stage2_data.json",
        "images": GOLDEN / "preprocess",
        "output": output,
        "method": method,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "model_max_length": 128,
        "max_steps": STEPS,
        "save_steps": 1,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        **changes,
    }
    if method != "projector":
        values["projector"] = projector
    given = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [text.replace("_", "-") if text.startswith("--") else text for text in given] + [
        "--no-gradient-checkpointing"
    ]
