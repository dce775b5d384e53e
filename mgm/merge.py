"""Merge a LoRA folder into a full model folder that any loader of published checkpoints reads.

`python -m mgm.merge --adapter DIR --language-model DIR --vision-tower DIR
--high-resolution-tower DIR --output DIR`. The published merge script cannot read its own
trainer's adapters; this does what it is meant to do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from mgm.checkpoint import build_model, read_config, save_full
from mgm.errors import InputError
from mgm.lora import load_lora, merge_lora
from mgm.program import run_program
from mgm.progress import Progress
from mgm.settings import parse_settings


@dataclass(frozen=True)
class MergeSettings:
    """What to merge, and where to write it."""

    adapter: Path = field(metadata={"help": "LoRA folder of the second stage"})
    language_model: Path = field(metadata={"help": "Gemma folder that the adapters were made for"})
    vision_tower: Path = field(metadata={"help": "CLIP folder"})
    high_resolution_tower: Path = field(metadata={"help": "ConvNeXt folder"})
    output: Path = field(metadata={"help": "folder to write; must not hold a model yet"})
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

    The merge itself is done in float32, so that small updates are not lost before they are added.

    Raises:
        InputError: If a folder does not fit, or the output already holds a model.
    """
    if (settings.output / "config.json").exists():
        raise InputError(
            "Output exists", f"{settings.output} holds a model already", "Give a new folder."
        )
    progress.update(step=0, total=2, unit="parts", label="load")
    config = read_config(settings.adapter)
    model = build_model(
        config, settings.language_model, settings.vision_tower, settings.high_resolution_tower
    )
    load_lora(model, settings.adapter)
    merge_lora(model)
    progress.update(step=1, total=2, unit="parts", label="write")
    model.to(getattr(torch, settings.dtype))
    save_full(model, settings.output, _load_tokenizer(settings))
    progress.update(step=2, total=2, unit="parts", label="write")


def _load_tokenizer(settings: MergeSettings) -> AutoTokenizer:
    for folder in (settings.adapter, settings.language_model):
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    raise InputError(
        "No tokenizer",
        f"tokenizer_config.json is neither in {settings.adapter} nor {settings.language_model}",
        "Copy the tokenizer's files into the language model's folder.",
    )


if __name__ == "__main__":
    sys.exit(main())
