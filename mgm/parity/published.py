"""The published model's tensors: every name and shape, and the number of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mgm.config import ModelConfig
from mgm.files import read_json
from mgm.model import MGM
from mgm.names import published_parameters
from mgm.parity.report import Check, compare_exactly

KEYS_FILE = "full_model_keys.json"


def recognises(folder: Path) -> bool:
    """Whether `folder` lists the tensors of the published model."""
    return (folder / KEYS_FILE).is_file()


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparison with `mgm-2b`, built without memory for its weights."""
    reference = read_json(folder / KEYS_FILE)
    with torch.device("meta"):
        model = MGM(ModelConfig.preset("mgm-2b"))
    named = published_parameters(model)
    shapes = {name: list(value.shape) for name, value in named.items()}
    yield compare_exactly("mgm-2b", "names and shapes", shapes, reference["keys"])
    total = sum(value.numel() for value in named.values())
    yield compare_exactly("mgm-2b", "parameters", total, reference["total_parameters"])
