"""Small models shared by the tests of `mgm`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgm.config import ModelConfig
from mgm.model import MGM

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture
def golden() -> Path:
    """The folder of reference values."""
    return GOLDEN


def tiny_config(**changes: object) -> ModelConfig:
    """Return the smallest configuration that has every part: 16 image tokens, windows of 8 x 8."""
    values: dict[str, object] = {
        "name": "tiny",
        "language": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_act": "gelu",
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        "vision": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        "high_resolution": {
            "hidden_sizes": [4, 8, 12, 16],
            "depths": [1, 1, 2, 1],
            "drop_path_rate": 0.1,
        },
        "image_size_aux": 128,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> MGM:
    """Build the tiny model with weights large enough that every part shows in the loss."""
    torch.manual_seed(seed)
    model = MGM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_batch(seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return a batch of `rows` rows of different length with one picture each."""
    generator = torch.Generator().manual_seed(seed)
    length = 9
    ids = torch.randint(4, 64, (rows, length), generator=generator)
    ids[:, 0] = 2
    ids[:, 2] = -200
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row :] = 0
        ids[row, length - row :] = 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) < 5), -100)
    images = torch.randn(rows, 3, 128, 128, generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "images_aux": images,
    }
