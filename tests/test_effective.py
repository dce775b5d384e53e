"""The effective set: steps as training counts them, and passes over each sample."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from mgm.train_settings import TrainSettings
from synth_agent.effective import (
    Ladder,
    Training,
    capped,
    effective,
    processed_effective,
    read_ladder,
    read_training_list,
)
from synth_agent.errors import InvalidInput

LADDER = Ladder(100, 90, 80, 70)


def write_lines(path: Path, rows: list[int], texts: list[str]) -> None:
    lines = [
        json.dumps({"id": f"s{row}", "images": [f"{row}.jpg"], "text": text})
        for row, text in zip(rows, texts, strict=True)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


@pytest.fixture
def processed(tmp_path: Path) -> Path:
    """Six samples of four of ten seed rows: rows 3 and 5 twice, 5 with another text."""
    write_lines(tmp_path / "seed.jsonl", list(range(10)), ["seed"] * 10)
    folder = tmp_path / "processed"
    folder.mkdir()
    rows, texts = [5, 3, 5, 8, 3, 1], ["a", "b", "c", "d", "b", "e"]
    write_lines(folder / "processed.jsonl", rows, texts)
    (folder / "rows.json").write_text(json.dumps({"kept": [1, 3, 5, 7, 8]}), "utf-8")
    counts = [
        ("words_num_filter", 10, 6),
        ("document_deduplicator", 6, 4),
        ("words_num_filter", 10, 3),
    ]
    result = {
        "kept": 6,
        "before_cap": 8,
        "seed_samples": 10,
        "operators": [{"name": n, "before": b, "after": a} for n, b, a in counts],
        "branches": [{"left": 4}, {"left": 3}],
    }
    (folder / "result.json").write_text(json.dumps(result), "utf-8")
    return folder


def settings_of(training: Training) -> TrainSettings:
    """The trainer's own settings; those fields alone, as nothing else decides the steps."""
    settings = object.__new__(TrainSettings)
    for name in ("global_batch_size", "micro_batch_size", "epochs", "max_steps"):
        object.__setattr__(settings, name, getattr(training, name))
    return settings


def simulate(num_samples: int, training: Training) -> Counter[int]:
    """Return how often each position is trained on, with the trainer's own slices."""
    settings = settings_of(training)
    per_epoch = settings.steps_per_epoch(num_samples)
    generator = random.Random(1)
    seen: Counter[int] = Counter()
    order: list[int] = []
    for step in range(settings.total_steps(num_samples)):
        position = step % per_epoch
        if position == 0:
            order = generator.sample(range(num_samples), num_samples)
        start = position * settings.global_batch_size
        seen.update(order[start : start + settings.global_batch_size])
    return seen


def test_steps_and_samples_are_those_of_the_trainer() -> None:
    generator = random.Random(4)
    for _ in range(400):
        micro = generator.choice([1, 2, 4, 8])
        training = Training(
            micro * generator.choice([1, 2, 8]),
            micro,
            generator.choice([0.3, 1.0, 1.5, 2.0, 3.0]),
            generator.choice([0, 0, 1, 7]),
        )
        num_samples = generator.randrange(1, 200)
        settings = settings_of(training)
        assert training.steps_per_epoch(num_samples) == settings.steps_per_epoch(num_samples)
        assert training.steps(num_samples) == settings.total_steps(num_samples)
        seen = simulate(num_samples, training)
        found = effective(LADDER, range(num_samples), training)
        assert found.steps == settings.total_steps(num_samples)
        assert found.seen == seen.total()
        assert found.mean_passes == pytest.approx(seen.total() / num_samples)
        assert found.max_passes >= max(seen.values())
        if num_samples % training.global_batch_size == 0:
            assert found.max_passes == max(seen.values())


def test_the_last_incomplete_batch_is_left_out() -> None:
    once = effective(LADDER, range(1000), Training())
    assert (once.steps, once.seen) == (3, 768)
    assert once.mean_passes == pytest.approx(0.768)
    few = effective(LADDER, range(100), Training())
    assert (few.steps, few.seen, few.max_passes) == (1, 100, 1)
    # 249 samples need 32 micro-batches of 8, the last of one sample: a whole step.
    assert effective(LADDER, range(249), Training()).seen == 249


def test_repeated_samples_are_passes() -> None:
    found = effective(LADDER, [1, 1, 1, 2, 3, 3], Training(2, 1, 2.0))
    assert (found.samples, found.unique, found.steps, found.seen) == (6, 3, 6, 12)
    assert (found.mean_passes, found.max_passes) == (4.0, 6)


def test_the_cap_draws_as_the_stage_does() -> None:
    rows = list(range(50, 100))
    assert capped(rows, 50, 1) == rows
    drawn = random.Random(1024).sample(range(50), 7)
    assert capped(rows, 7, 1024) == sorted(rows[position] for position in drawn)


def test_training_list_and_counts_of_a_processed_set(processed: Path) -> None:
    seed = processed.parent / "seed.jsonl"
    listed = read_training_list(processed, seed)
    assert listed.rows == (5, 3, 5, 8, 3, 1)
    assert listed.samples == (0, 1, 2, 3, 1, 4)
    assert read_ladder(processed) == Ladder(10, 9, 7, 8)
    found = processed_effective(processed, seed, Training(2, 1))
    assert (found.samples, found.unique, found.steps) == (6, 5, 3)
    assert (found.mean_passes, found.max_passes) == (6 / 5, 2)


def test_a_linear_set_has_one_count(processed: Path) -> None:
    path = processed / "result.json"
    result = json.loads(path.read_text())
    del result["branches"]
    path.write_text(json.dumps(result), "utf-8")
    assert read_ladder(processed) == Ladder(10, 10, 8, 8)


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("result.json", None, "result.json"),
        ("result.json", "[", "result.json"),
        ("result.json", "[]", "result.json"),
        ("result.json", "{}", "before_cap"),
        ("rows.json", None, "rows.json"),
        ("rows.json", "{}", "field kept"),
        ("processed.jsonl", None, "processed.jsonl"),
    ],
)
def test_a_damaged_folder_is_named(
    processed: Path, file: str, text: str | None, named: str
) -> None:
    path = processed / file
    path.unlink() if text is None else path.write_text(text, "utf-8")
    with pytest.raises(InvalidInput) as caught:
        processed_effective(processed, processed.parent / "seed.jsonl", Training())
    assert named in str(caught.value)


def test_another_seed_set_is_refused(processed: Path) -> None:
    seed = processed.parent / "seed.jsonl"
    write_lines(seed, list(range(7)), ["seed"] * 7)
    with pytest.raises(InvalidInput, match="line 4: id 's8'"):
        read_training_list(processed, seed)


def test_settings_of_a_stage_are_read() -> None:
    section = {"global_batch_size": 4, "micro_batch_size": 2, "epochs": 0.5, "max_steps": 0}
    training = Training.of({**section, "method": "projector"})
    assert training == Training(4, 2, 0.5, 0)
    assert training.steps(40) == math.ceil(0.5 * 10)
