"""Merge a LoRA folder into a full model folder that any loader of published checkpoints reads.

`python -m mgm.merge --adapter DIR --output DIR [--language-model DIR] [--vision-tower DIR]
[--high-resolution-tower DIR]`. Parts that are not given are taken from where the adapter notes
them, or from beside it. The published merge script cannot read its own trainer's adapters; this
does what it is meant to do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from mgm.checkpoint import build_model, read_config, save_full, stored_dtype
from mgm.errors import InputError
from mgm.files import read_json
from mgm.lora import ADAPTER_CONFIG, load_lora, merge_lora
from mgm.part_folders import CLIP_FIELD, CONVNEXT_FIELD, LANGUAGE_FIELD, find_part
from mgm.program import run_program
from mgm.progress import Progress
from mgm.settings import parse_settings
from mgm.tokenizer_files import TOKENIZER_CONFIG, read_tokenizer


@dataclass(frozen=True)
class MergeSettings:
    """What to merge, and where to write it."""

    adapter: Path = field(metadata={"help": "LoRA folder of the second stage"})
    output: Path = field(metadata={"help": "folder to write; must not hold a model yet"})
    language_model: Path | None = field(
        default=None, metadata={"help": "Gemma folder that the adapters were made for"}
    )
    vision_tower: Path | None = field(default=None, metadata={"help": "CLIP folder"})
    high_resolution_tower: Path | None = field(default=None, metadata={"help": "ConvNeXt folder"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "precision of the written weights"}
    )
    progress: Path | None = field(
        default=None, metadata={"help": "file to which progress is appended"}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""

    def read() -> MergeSettings:
        return parse_settings(
            MergeSettings,
            arguments,
            program="python -m mgm.merge",
            description="Merge LoRA adapters and write the whole model.",
        )

    return run_program(read, lambda settings: settings.progress, merge)


def merge(settings: MergeSettings, progress: Progress) -> None:
    """Load the parts and the adapters, merge, and write the full folder.

    Updates are added in float32 and rounded once, so that small ones are not lost before.

    Raises:
        InputError: If a folder is missing or does not fit, or the output already holds a model.
    """
    if (settings.output.expanduser() / "config.json").exists():
        raise InputError(
            "Output exists", f"{settings.output} holds a model already", "Give a new folder."
        )
    settings.output.expanduser().mkdir(parents=True, exist_ok=True)
    progress.update(step=0, total=2, unit="parts", label="load")
    language, vision, high_resolution = _parts(settings)
    tokenizer = _load_tokenizer(settings.adapter, language)
    target: torch.dtype = getattr(torch, settings.dtype)
    # A base of the written precision is merged as it is: float32 would take twice the memory.
    dtype = target if stored_dtype(language) == target else torch.float32
    config = read_config(settings.adapter)
    model = build_model(config, language, vision, high_resolution, dtype)
    # The file holds them in the precision that they were trained in.
    for module in (model.projector, model.mining):
        module.float()
    load_lora(model, settings.adapter)
    merge_lora(model)
    progress.update(step=1, total=2, unit="parts", label="write")
    save_full(model, settings.output, tokenizer, dtype=target)
    progress.update(step=2, total=2, unit="parts", label="write")


def _parts(settings: MergeSettings) -> tuple[Path, Path, Path]:
    """Return the folders of the language model, of CLIP and of ConvNeXt."""
    adapter = settings.adapter.expanduser()
    base = str(read_json(adapter / ADAPTER_CONFIG).get(LANGUAGE_FIELD) or "")
    config = read_config(adapter)
    clip, convnext = config.vision_tower_path, config.high_resolution_tower_path
    return (
        find_part(LANGUAGE_FIELD, base, settings.language_model, adapter),
        find_part(CLIP_FIELD, clip, settings.vision_tower, adapter),
        find_part(CONVNEXT_FIELD, convnext, settings.high_resolution_tower, adapter),
    )


def _load_tokenizer(adapter: Path, language_model: Path) -> PreTrainedTokenizerBase:
    for folder in (adapter.expanduser(), language_model):
        if (folder / TOKENIZER_CONFIG).is_file():
            return read_tokenizer(folder)
    raise InputError(
        "No tokenizer",
        f"{TOKENIZER_CONFIG} is neither in {adapter} nor {language_model}",
        "Copy the tokenizer's files into the language model's folder.",
    )


if __name__ == "__main__":
    sys.exit(main())
