"""What `--numerics reference` takes over from the original: orders, precisions, drop path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgm.checkpoint import save_projector
from mgm.config import ModelConfig
from mgm.data import InstructionDataset
from mgm.features import PictureFeatures
from mgm.model import MGM
from mgm.sampling import grouped_order, shuffled_order
from mgm.settings import parse_settings
from mgm.train import prepare_model
from mgm.train_settings import TrainSettings, stage_defaults
from tests.mgm.tiny_training import arguments, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three folders of a tiny model."""
    return write_parts(tmp_path_factory.mktemp("parts"))


def _settings(
    parts: dict[str, Path], output: Path, method: str, **changes: object
) -> TrainSettings:
    given = arguments(parts, output, method, output / "mm_projector.bin", **changes)
    return parse_settings(
        TrainSettings, given, program="train", description="", defaults=stage_defaults
    )


def _high_resolution_maps(settings: TrainSettings) -> list[torch.Tensor]:
    """Encode one picture as a training would, and return the coarsest map of each time."""
    model, tokenizer = prepare_model(settings)
    data = InstructionDataset(settings.data, settings.images, tokenizer, model_max_length=128)
    features = PictureFeatures(model, data, 1, settings.image_aspect_ratio)
    torch.manual_seed(0)
    maps = [features.of([0]).stages[-1] for _ in range(6) if model.train()]
    model.eval()
    return [*maps, features.of([0]).stages[-1]]


def test_the_frozen_convnext_drops_blocks_in_training_and_only_there(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    *training, evaluated = _high_resolution_maps(_settings(parts, tmp_path, "projector"))
    assert any(not torch.equal(training[0], other) for other in training[1:])
    *still, same = _high_resolution_maps(
        _settings(parts, tmp_path, "projector", numerics="fast", dtype="float32")
    )
    assert all(torch.equal(one, evaluated) for one in [*still, same]), "fast leaves it out"


def test_the_rate_of_dropping_rises_evenly_over_the_published_blocks() -> None:
    with torch.device("meta"):
        tower = MGM(ModelConfig.preset("mgm-2b")).high_resolution_tower
    blocks = [block for stage in tower.encoder.stages for block in stage.layers]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) or 0.0 for block in blocks]
    assert rates == pytest.approx([0.1 * number / 35 for number in range(36)])


@pytest.mark.parametrize("method", ["projector", "full", "lora"])
def test_what_is_trained_is_float32_and_the_rest_bfloat16(
    parts: dict[str, Path], tmp_path: Path, method: str
) -> None:
    first = _settings(parts, tmp_path, "projector", dtype="bfloat16")
    save_projector(prepare_model(first)[0], tmp_path / "mm_projector.bin", torch.bfloat16)
    model, _ = prepare_model(_settings(parts, tmp_path, method, dtype="bfloat16"))
    kinds = {(value.requires_grad, value.dtype) for value in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    towers = (model.vision_tower, model.high_resolution_tower)
    assert not any(value.requires_grad for tower in towers for value in tower.parameters())
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    expected = {"projector": 16, "full": 16 + 20, "lora": 16 + 2 * 7 * 2}
    assert len(trained) == expected[method]


def test_seed_42_gives_the_orders_of_the_recorded_runs(golden: Path) -> None:
    meta = json.loads((golden / "train_run" / "meta.json").read_text())
    assert shuffled_order(32, 42) == meta["stage1"]["sample_order"]
    records = json.loads((golden / "train_run" / "stage2_data.json").read_text())
    lengths = []
    for record in records:
        words = sum(len(message["value"].split()) for message in record["conversations"])
        lengths.append(words if "image" in record else -words)
    generator = torch.Generator().manual_seed(42)
    # The original's data loader draws a seed for its workers before the sampler starts.
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    order = grouped_order(lengths, meta["batch_size"], meta["grad_accum"], generator)
    assert order == meta["stage2"]["sample_order"] == meta["lora"]["sample_order"]
