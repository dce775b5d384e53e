"""Recipes run chunk by chunk leave what the same recipes leave when all samples are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synth_agent.data import Sample
from synth_agent.recipes import Operator, Recipe
from synth_agent.stages.branch import Outcome, run_branch, seed_records
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.running import OperatorFailed
from synth_agent.stages.streaming import (
    ChunkDone,
    ChunkTask,
    LocalPool,
    OperatorKind,
    StreamedOutcome,
    first_of_equals,
    segments,
    stream_branch,
    why_not_in_chunks,
)

Step = tuple[str, Mapping[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def data_juicer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        guard()
        from data_juicer.ops.deduplicator import image_deduplicator

        # The operator is Data-Juicer's; its hash is in a package that is not always there.
        patch.setattr(image_deduplicator, "get_hash_method", lambda method: _WidthHash)
        yield


class _WidthHash:
    """Pictures of about one width are alike."""

    def encode_image(self, image_array: Any) -> str:
        return str(image_array.shape[1] // 4)


@pytest.fixture
def seed(tmp_path: Path) -> list[Sample]:
    """40 samples: texts and pictures repeat across chunks, some have no picture, one has two."""
    samples = []
    for number in range(40):
        image = f"{number % 11}.png"
        size = (40 + number % 11, 50)
        Image.effect_noise(size, 10 * (number % 11)).save(tmp_path / image)
        text = f"<__dj__image>\na  Box,{' and' * (number % 4)} number {number % 5} <|__dj__eoc|>"
        images = (image,)
        if number % 13 == 5:
            images = ()
        if number == 8:
            images = (image, "0.png")
        identity = number if number % 2 else f"sample-{number}"
        samples.append(Sample(identity, images, text))
    return samples


def _recipe(*steps: Step) -> Recipe:
    options = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
    operators = tuple(Operator(name, {**given, "num_proc": 0}) for name, given in steps)
    return Recipe("mine", "", "", operators, options)


def _whole(recipe: Recipe, seed: list[Sample], folder: Path) -> Outcome:
    records = seed_records(seed, folder)
    return run_branch(recipe, records, seed, folder / "whole", 0, lambda *_: None)


def _streamed(
    recipe: Recipe,
    seed: list[Sample],
    folder: Path,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> StreamedOutcome:
    pool = _Backwards(recipe, folder / "pool")
    return stream_branch(
        iter(seed), len(seed), folder, pool, folder / "chunks", report, chunk_samples=7
    )


class _Backwards(LocalPool):
    """Gives the results back in the wrong order, as a cluster may."""

    def run(self, tasks: Iterable[ChunkTask]) -> Iterator[ChunkDone]:
        yield from reversed(list(super().run(tasks)))


RECIPES: dict[str, tuple[Step, ...]] = {
    "no operator": (),
    "filters": (("text_length_filter", {"min_len": 47}), ("image_shape_filter", {"min_width": 43})),
    "deduplicator between": (
        ("words_num_filter", {"min_num": 6}),
        ("document_deduplicator", {}),
        ("image_aspect_ratio_filter", {"min_ratio": 0.85}),
    ),
    "measured anew after a mapper": (
        ("text_length_filter", {"min_len": 46}),
        ("document_deduplicator", {}),
        ("remove_specific_chars_mapper", {"chars_to_remove": "0123456789"}),
        ("text_length_filter", {"min_len": 46}),
        ("document_deduplicator", {"lowercase": True}),
    ),
    "hash of the first deduplicator": (
        ("document_deduplicator", {}),
        ("document_deduplicator", {"ignore_non_character": True}),
        ("words_num_filter", {"min_num": 1, "max_num": 7}),
    ),
    "pictures": (("image_deduplicator", {}), ("words_num_filter", {"min_num": 5})),
    "pictures and texts": (("image_deduplicator", {"consider_text": True}),),
    "nothing left": (
        ("words_num_filter", {"min_num": 500}),
        ("document_deduplicator", {}),
        ("text_length_filter", {}),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_leaves_what_the_whole_leaves(name: str, seed: list[Sample], tmp_path: Path) -> None:
    recipe = _recipe(*RECIPES[name])
    whole = _whole(recipe, seed, tmp_path)
    streamed = _streamed(recipe, seed, tmp_path)
    assert list(streamed.rows()) == whole.rows
    assert streamed.num_rows == len(whole.rows)
    assert [(c.name, c.before, c.after) for c in streamed.counts] == [
        (c.name, c.before, c.after) for c in whole.counts
    ]
    assert {key: rows.tolist() for key, rows in streamed.dropped.items()} == whole.dropped
    assert streamed.measured_anew == whole.measured_anew
    assert streamed.emptied_by == whole.emptied_by
    assert streamed.kept().tolist() == sorted({row["row_id"] for row in whole.rows})
    if name == "nothing left":
        assert not whole.rows
    elif name == "no operator":
        assert len(whole.rows) == len(seed)
    else:
        assert 0 < len(whole.rows) < len(seed)


def test_samples_have_the_seeds_paths_and_ids(seed: list[Sample], tmp_path: Path) -> None:
    streamed = _streamed(_recipe(("words_num_filter", {"min_num": 6})), seed, tmp_path)
    kept = streamed.kept().tolist()
    made = [(s.id, s.images, s.text) for s in streamed.samples(tmp_path)]
    assert made == [(seed[row].id, seed[row].images, seed[row].text) for row in kept]
    assert 0 < len(kept) < len(seed)


def test_progress_counts_every_sample(seed: list[Sample], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    recipe = _recipe(("text_length_filter", {}), ("document_deduplicator", {}))
    _streamed(recipe, seed, tmp_path, lambda *line: seen.append(line))
    label = "1 to 2/2 text_length_filter, document_deduplicator"
    assert seen[0] == (label, 0, 40)
    assert seen[-1] == (label, 40, 40)


def test_a_failure_names_operator_and_sample(seed: list[Sample], tmp_path: Path) -> None:
    seed[17] = Sample("lost", ("absent.png",), seed[17].text)
    for step in (("image_shape_filter", {}), ("image_deduplicator", {})):
        (tmp_path / step[0]).mkdir()
        for picture in tmp_path.glob("*.png"):
            (tmp_path / step[0] / picture.name).hardlink_to(picture)
        with pytest.raises(OperatorFailed) as failure:
            _streamed(_recipe(step), seed, tmp_path / step[0])
        assert step[0] in failure.value.message
        assert "(id lost)" in failure.value.message


def test_what_needs_all_samples_is_refused() -> None:
    assert why_not_in_chunks(_recipe(*RECIPES["measured anew after a mapper"])) is None
    for name in ("image_captioning_mapper", "document_minhash_deduplicator", "random_selector"):
        assert name in (why_not_in_chunks(_recipe(("words_num_filter", {}), (name, {}))) or "")


def test_segments_end_with_deduplicators() -> None:
    kinds = [
        _kind("a_mapper", "Mapper"),
        _kind("a_filter", "Filter"),
        _kind("a_deduplicator", "Deduplicator"),
        _kind("b_mapper", "Mapper"),
        _kind("b_deduplicator", "Deduplicator"),
    ]
    cut = segments(kinds)
    assert [(s.start, s.stop) for s in cut] == [(0, 3), (3, 5)]
    assert cut[0].forget_before == {1, 4}


def test_the_first_of_equal_keys_is_kept() -> None:
    def keys(*numbers: int) -> Any:
        packed = b"".join(number.to_bytes(16, "big") for number in numbers)
        return np.frombuffer(packed, np.dtype((np.void, 16)))

    parts = [keys(3, 1, 3), keys(), keys(1, 2, 3)]
    keyless = [np.array([False] * 3), np.zeros(0, np.bool_), np.array([False, False, True])]
    masks = [mask.tolist() for mask in first_of_equals(parts, keyless)]
    assert masks == [[True, True, False], [], [False, True, True]]


def _kind(name: str, base: str) -> OperatorKind:
    return OperatorKind(name, frozenset({base, "OP"}))
