"""The cap and the order of samples, against the published implementation's own output."""

import json
from pathlib import Path

import pytest
import torch

from mgm.sampling import _dealt, capped_positions, grouped_order, shuffled_order

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "train"
SAMPLER = json.loads((GOLDEN / "sampler.json").read_text())
CAPPING = json.loads((GOLDEN / "sampling.json").read_text())


@pytest.mark.parametrize("case", CAPPING["cases"], ids=lambda case: str(case["n_records"]))
def test_the_cap_keeps_the_published_positions(case: dict) -> None:
    positions = capped_positions(case["n_records"], case["sample_num"], CAPPING["seed"])
    if "selected_positions" in case:
        assert positions == case["selected_positions"]
    else:
        assert positions[:20] == case["first20"]
        assert len(set(positions)) == case["sample_num"]


@pytest.mark.parametrize("case", SAMPLER["modality_grouped"])
def test_grouping_gives_the_published_order(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["torch_seed"])
    order = grouped_order(case["lengths"], case["batch_size"], case["world_size"], generator)
    assert order == case["indices"]


def test_a_sample_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="without words"):
        grouped_order([3, 0], 1, 1, torch.Generator())


def test_shuffling_is_a_permutation_that_follows_its_seed() -> None:
    assert sorted(shuffled_order(50, 1)) == list(range(50))
    assert shuffled_order(50, 1) == shuffled_order(50, 1) != shuffled_order(50, 2)


@pytest.mark.parametrize("case", SAMPLER["even_chunks"])
def test_chunks_are_dealt_as_published(case: dict) -> None:
    assert _dealt(case["indices"], case["lengths"], case["num_chunks"]) == case["chunks"]
