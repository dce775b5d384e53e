"""Preprocessing folders: pictures with the tensors the original makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mgm.data import preprocess_image
from mgm.files import read_json
from mgm.parity.report import Check, compare_exactly, compare_tensors
from mgm.vision import low_resolution

FLOAT_TOLERANCE = 1e-6
STEPS = (16, 24, 64)


def recognises(folder: Path) -> bool:
    """Whether `folder` holds preprocessed pictures."""
    return (folder / "tensors.safetensors").is_file() and (folder / "meta.json").is_file()


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of every picture, aspect ratio and size."""
    meta = read_json(folder / "meta.json")
    tensors = load_file(folder / "tensors.safetensors")
    for name, picture in meta["images"].items():
        for variant, shapes in picture["results"].items():
            aspect_ratio, _, size = variant.partition(".")
            case = f"{name}.{variant}"
            with Image.open(folder / f"{name}.png") as image:
                aux = preprocess_image(
                    image, int(size), aspect_ratio, tuple(meta["mean"]), tuple(meta["std"])
                )
            low = low_resolution(aux[None], shapes["low_shape"][-1])[0]
            stored = {
                key.removeprefix(case + "."): value
                for key, value in tensors.items()
                if key.startswith(case + ".")
            }
            yield from _check_variant(case, aux, low, meta, shapes, stored)


def _check_variant(
    case: str,
    aux: Tensor,
    low: Tensor,
    meta: Mapping[str, Any],
    shapes: Mapping[str, Any],
    stored: Mapping[str, Tensor],
) -> Iterator[Check]:
    pixels = _to_pixels(aux, meta["mean"], meta["std"])
    total = int(pixels.sum())
    yield compare_exactly(case, "sum of pixels", total, shapes["aux_u8_sum"])
    if "aux_u8" in stored:
        yield compare_exactly(case, "aux_u8", pixels, stored["aux_u8"].long())
    if "aux_row_mid_u8" in stored:
        row = pixels[:, pixels.shape[1] // 2]
        yield compare_exactly(case, "aux_row_mid_u8", row, stored["aux_row_mid_u8"].long())
    if "low" in stored:
        yield compare_tensors(case, "low", low, stored["low"], FLOAT_TOLERANCE)
    for kind, values in (("aux", aux), ("low", low)):
        for step in STEPS:
            name = f"{kind}_every{step}"
            if name in stored:
                part = values[:, ::step, ::step]
                yield compare_tensors(case, name, part, stored[name], FLOAT_TOLERANCE)


def _to_pixels(normalised: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Undo the normalisation; exact, since a pixel is far coarser than the rounding."""
    scale, shift = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    return ((normalised.float() * scale + shift) * 255).round().long()
