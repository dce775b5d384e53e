"""Packed and padded passes give one objective; passes that do not fit are made smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.execution import Execution, Pass
from mgm.features import PictureFeatures
from mgm.packing import make_sample, pack, packed_row
from mgm.prompt import Encoded
from mgm.train import make_trainer
from mgm.trainer import Trainer
from mgm.training_state import TrainingState
from tests.mgm.test_train import flags, parts, prepared, settings

__all__ = ["parts"]
IMAGE = -200


def sample(index: int, length: int) -> object:
    encoded = Encoded([5] * length, [-100] + [5] * (length - 1))
    return make_sample(index, encoded, None, tokens_of_picture=4, limit=None, pad_id=0)


def test_rows_hold_every_sample_once_within_the_budget() -> None:
    samples = [sample(i, length) for i, length in enumerate([9, 1, 5, 5, 3, 8, 2, 7, 7, 1])]
    rows = pack(samples, 12)
    assert sorted(s.index for row in rows for s in row) == list(range(10))
    assert all(sum(s.length for s in row) <= 12 for row in rows)
    assert len(rows) <= 5


def test_a_sample_beyond_the_budget_has_a_row_of_its_own() -> None:
    rows = pack([sample(0, 30), sample(1, 3), sample(2, 4)], 8)
    assert [s.index for s in next(row for row in rows if row[0].length == 30)] == [0]


def test_the_number_of_rows_is_a_multiple() -> None:
    rows = pack([sample(i, 4) for i in range(9)], 12, rows=4)
    assert len(rows) == 4
    assert len(pack([sample(0, 4)], 12, rows=4)) == 1


def test_a_row_puts_pictures_labels_and_tail_in_their_places() -> None:
    encoded = Encoded([2, IMAGE, 7, 8], [-100, -100, -100, 8])
    one = make_sample(3, encoded, 11, tokens_of_picture=4, limit=None, pad_id=0)
    two = make_sample(
        4, Encoded([2, 9], [-100, 9]), None, tokens_of_picture=4, limit=None, pad_id=0
    )
    row = packed_row([one, two], 4)
    assert row.ids.tolist()[:9] == [2, 0, 0, 0, 0, 7, 8, 2, 9]
    assert len(row.ids) == 128
    assert row.segments.bounds.tolist() == [0, 7, 9, 128]
    assert row.image_places.tolist() == [1, 2, 3, 4]
    assert row.image_rows is None
    assert row.label_places.tolist() == [5, 7]
    assert row.targets.tolist() == [8, 9]
    assert row.pictures == (11,)


def test_a_picture_that_is_cut_keeps_its_first_rows() -> None:
    encoded = Encoded([2, IMAGE, 7, IMAGE, 8], [-100, -100, 7, -100, 8])
    one = make_sample(0, encoded, 1, tokens_of_picture=4, limit=8, pad_id=0)
    assert (one.length, one.num_labels) == (8, 1)
    row = packed_row([one], 4)
    assert row.image_places.tolist() == [1, 2, 3, 4, 6, 7]
    assert row.image_rows is not None
    assert row.image_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.targets.tolist() == [7]


def test_a_padding_token_in_a_text_is_left_out() -> None:
    one = make_sample(
        0, Encoded([2, 0, 7], [-100, 0, 7]), None, tokens_of_picture=4, limit=None, pad_id=0
    )
    assert one.encoded.input_ids == [2, 7]


def build(folders: dict[str, Path], tmp_path: Path, **changes: object) -> Trainer:
    chosen = settings(flags(folders, tmp_path / "o", drop_path=False, warmup_ratio=0.0, **changes))
    torch.manual_seed(0)
    model, data = prepared(chosen)
    features = PictureFeatures(model, data, 1, chosen.image_aspect_ratio)
    return make_trainer(model, data, features, chosen)


@pytest.mark.parametrize("changes", [{"tokens_per_pass": 30}, {"recomputed_layers": 2}])
def test_packed_steps_equal_padded_ones(
    parts: dict[str, Path], tmp_path: Path, changes: dict[str, int]
) -> None:
    padded = build(parts, tmp_path)
    packed = build(parts, tmp_path, numerics="fast", **changes)
    first, second = TrainingState(""), TrainingState("")
    for _ in range(3):
        assert packed.step(second) == pytest.approx(padded.step(first), rel=1e-4)
    assert first.samples_seen == second.samples_seen == 12


class Narrow(Execution):
    """An execution whose passes fit only up to a number of samples."""

    def __init__(self, inner: Execution, most: int) -> None:
        super().__init__(inner.model, inner.dataset, inner.features, inner.dtype)
        self._inner, self._most = inner, most
        self.tried: list[int] = []

    def passes(self, micro_batches: object, accumulation: int, ranks: int = 1) -> list[Pass]:
        return self._inner.passes(micro_batches, accumulation, ranks)  # type: ignore[arg-type]

    def loss(self, one: Pass) -> torch.Tensor:
        self.tried.append(len(one.indices))
        if len(one.indices) > self._most:
            raise torch.OutOfMemoryError("a pass of this size does not fit")
        return self._inner.loss(one)

    def halve(self) -> str:
        return self._inner.halve()


@pytest.mark.parametrize("numerics", ["reference", "fast"])
def test_out_of_memory_halves_the_passes_and_keeps_the_result(
    parts: dict[str, Path], tmp_path: Path, numerics: str
) -> None:
    changes = {"numerics": numerics, "tokens_per_pass": 256}
    undisturbed = build(parts, tmp_path, **changes)
    disturbed = build(parts, tmp_path, **changes)
    narrow = Narrow(disturbed.execution, 1)
    disturbed.execution = narrow
    first, second = TrainingState(""), TrainingState("")
    for _ in range(2):
        assert disturbed.step(second) == pytest.approx(undisturbed.step(first), rel=1e-4)
    assert max(narrow.tried) > 1
    assert narrow.tried[-4:] == [1, 1, 1, 1]
    assert second.out_of_memory[0]["step"] == 1
    assert first.out_of_memory == []


def test_a_sample_that_never_fits_is_told(parts: dict[str, Path], tmp_path: Path) -> None:
    trainer = build(parts, tmp_path)
    trainer.execution = Narrow(trainer.execution, 0)
    with pytest.raises(InputError, match="one sample alone"):
        trainer.step(TrainingState(""))


def test_the_preset_packs_to_the_published_lengths() -> None:
    config = ModelConfig.preset("mgm-2b")
    encoded = Encoded([2, IMAGE, *range(10, 40)], [-100] * 32)
    one = make_sample(
        0, encoded, 0, tokens_of_picture=config.num_image_tokens, limit=2048, pad_id=0
    )
    assert one.length == 576 + 31
