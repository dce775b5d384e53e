"""Build the pretrained parts of the mini world from seeds alone.

    python -m synth_agent.miniworld.build --device cuda
    python -m synth_agent.miniworld.build --part clip --steps-scale 0.1 --out /tmp/parts

Order matters: the ConvNeXt's targets are codes of the language model's words, and the matcher starts
from the captioner's vision tower. Rebuilt weights differ in the last bits between machines; what they
do is measured in `docs/miniworld.md`. The captioner is shipped as an archive: its table of tokens that
nobody uses is six megabytes of the same row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from synth_agent.miniworld.pretrain_blip import pretrain_blip
from synth_agent.miniworld.pretrain_blip2 import pretrain_blip2
from synth_agent.miniworld.pretrain_clip import pretrain_clip
from synth_agent.miniworld.pretrain_convnext import pretrain_convnext
from synth_agent.miniworld.pretrain_language import pretrain_language
from synth_agent.miniworld.pretraining import PictureSet, draw_pictures

PARTS = ("gemma", "clip", "convnext", "blip2", "blip")
ASSETS = Path(__file__).parent / "assets"
_NUM_PICTURES = 40_000
_NUM_DOCUMENTS = 80_000
_STEPS = {"gemma": 4000, "clip": 2500, "convnext": 4000, "blip2": 6000, "blip": 4000}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the parts that are asked for and say what each took."""
    parser = argparse.ArgumentParser(
        prog="python -m synth_agent.miniworld.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="share of the usual steps and data"
    )
    options = parser.parse_args(arguments)
    wanted = options.part or PARTS
    pictures: PictureSet | None = None
    for part in (part for part in PARTS if part in wanted):
        started = time.monotonic()
        if part != "gemma" and pictures is None:
            pictures = draw_pictures(
                _rounded(_NUM_PICTURES * options.steps_scale), 7, options.processes
            )
        _build(part, options, pictures)
        print(f"{part} built in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _build(part: str, options: argparse.Namespace, pictures: PictureSet | None) -> None:
    device, out = torch.device(options.device), options.out
    if part == "gemma":
        pretrain_language(
            out / "gemma",
            device,
            steps=max(1, int(_STEPS[part] * options.steps_scale)),
            num_documents=_rounded(_NUM_DOCUMENTS * options.steps_scale),
            processes=options.processes,
        )
        return
    assert pictures is not None
    steps = max(1, int(_STEPS[part] * options.steps_scale))
    if part == "clip":
        pretrain_clip(out / "clip", pictures, device, steps=steps)
    elif part == "convnext":
        pretrain_convnext(out / "convnext", out / "gemma", pictures, device, steps=steps)
    elif part == "blip2":
        pretrain_blip2(out / "blip2", pictures, device, steps=steps)
        shutil.make_archive(str(out / "blip2"), "zip", out / "blip2")
    else:
        pretrain_blip(out / "blip", out / "blip2", pictures, device, steps=steps)


def _rounded(count: float) -> int:
    """Round up to whole chunks."""
    return max(500, -(-int(count) // 500) * 500)


if __name__ == "__main__":
    sys.exit(main())
