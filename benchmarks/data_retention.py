"""How long does it take to know what a recipe keeps, and to ask the statistics table?

A part of `benchmarks/data.py`, which runs it. Writes a table of made-up scores to a temporary folder,
one picture for most samples, two or none for some. Then it moves one threshold at a time, as somebody
does who looks for a recipe, and times every answer. Reading the table from disk happens once and is its
own row.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synth_agent.recipes import Operator, Recipe
from synth_agent.retention import examples, retention
from synth_agent.statistics import (
    ColumnWriter,
    SampleRow,
    StatisticsTable,
    column_spec,
    write_samples,
)

DATA = "benchmark"
PART_ROWS = 50_000
WORDS = ("a", "red", "green", "sign", "reading", "box", "left", "right", "of", "the")

Step = tuple[str, dict[str, Any], str]
STEPS: tuple[Step, ...] = (
    ("text_length_filter", {"min_len": 20}, "min_len"),
    ("words_num_filter", {"min_num": 3}, "min_num"),
    ("special_characters_filter", {"max_ratio": 0.9}, "max_ratio"),
    ("character_repetition_filter", {"max_ratio": 0.9}, "max_ratio"),
    ("image_shape_filter", {"min_width": 64, "min_height": 64, "any_or_all": "all"}, "min_width"),
    ("image_aspect_ratio_filter", {"any_or_all": "all"}, "max_ratio"),
    ("image_text_similarity_filter", {"hf_clip": "clip", "min_score": 0.2}, "min_score"),
    ("image_text_matching_filter", {"hf_blip": "blip", "min_score": 0.1}, "min_score"),
)
DEDUPLICATOR = Operator("document_deduplicator", {"lowercase": True})


def print_retention(num_rows: int, repeats: int) -> None:
    """Make a table of that many samples, time the answers, print them."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        make_table(Path(folder), num_rows, generator)
        started = time.perf_counter()
        table = StatisticsTable.open(Path(folder), DATA)
        cold = retention(recipe([]), table, str)
        first = time.perf_counter() - started
        started = time.perf_counter()
        retention(recipe([DEDUPLICATOR]), table, str)
        hashes = time.perf_counter() - started
        rows = [
            ("opening the table and the first answer", [first]),
            ("first answer with document_deduplicator", [hashes]),
            *answers(table, generator, repeats),
        ]
    print(f"{num_rows:,} samples, {len(STEPS)} filters, {os.cpu_count()} CPU cores;", end=" ")
    print(f"the recipe keeps {cold.kept:,}.\n")
    print("| answer | median ms | 95 % ms | largest ms |\n| --- | ---: | ---: | ---: |")
    for name, seconds in rows:
        figures = np.quantile(np.array(seconds) * 1000, [0.5, 0.95, 1.0])
        print(f"| {name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


def answers(
    table: StatisticsTable, generator: np.random.Generator, repeats: int
) -> list[tuple[str, list[float]]]:
    """Return what is asked and how many seconds each answer took."""
    name, parameters, _ = STEPS[6]
    score = column_spec(name, parameters, str)
    length = column_spec(STEPS[0][0], STEPS[0][1], str)
    assert score is not None
    assert length is not None
    outcome = retention(recipe([DEDUPLICATOR]), table, str)
    query = (
        "SELECT count(*), avg(text_len) FROM samples WHERE list_min(image_text_similarity) > 0.3"
    )
    asked: list[tuple[str, Callable[[], object]]] = [
        ("8 filters, one threshold moved", lambda: retention(moved(generator), table, str)),
        (
            "8 filters and document_deduplicator, one threshold moved",
            lambda: retention(moved(generator, DEDUPLICATOR), table, str),
        ),
        ("examples of one filter", lambda: examples(outcome, 6, table, 20, seed=0)),
        ("histogram", lambda: table.histogram(score)),
        ("correlation", lambda: table.correlation(score, length)),
        ("drift", lambda: table.drift(outcome.keep, score)),
        ("query over two stats", lambda: table.query(query)),
    ]
    return [(name, timed(ask, repeats)) for name, ask in asked]


def timed(ask: Callable[[], object], repeats: int) -> list[float]:
    """Return seconds of each call, after one that is not counted."""
    ask()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
    return seconds


def recipe(more: Sequence[Operator]) -> Recipe:
    """Return the recipe of all filters, and further operators after them."""
    operators = [Operator(name, parameters) for name, parameters, _ in STEPS]
    return Recipe("benchmark", "benchmark", "", (*operators, *more))


def moved(generator: np.random.Generator, *more: Operator) -> Recipe:
    """Return the recipe with one threshold drawn anew."""
    operators = [Operator(name, dict(parameters)) for name, parameters, _ in STEPS]
    position = int(generator.integers(len(STEPS)))
    name, parameters, threshold = STEPS[position]
    scale = 64 if threshold.startswith("min_") and "score" not in threshold else 1
    value = generator.random() * scale
    drawn = int(value) if scale > 1 else float(value)
    operators[position] = Operator(name, {**parameters, threshold: drawn})
    return Recipe("benchmark", "benchmark", "", (*operators, *more))


def make_table(root: Path, rows: int, generator: np.random.Generator) -> None:
    """Write samples and scores of every filter of the recipe."""
    texts = [" ".join(words) for words in generator.choice(WORDS, (rows, 8))]
    names = [f"{row:064x}" for row in range(rows)]
    write_samples(
        root,
        DATA,
        (
            SampleRow(str(row), name, text, (f"{row}.jpg",))
            for row, (name, text) in enumerate(zip(names, texts, strict=True))
        ),
    )
    lengths = generator.choice([0, 1, 1, 1, 1, 1, 1, 1, 2], rows)
    for name, parameters, _ in STEPS:
        spec = column_spec(name, parameters, str)
        assert spec is not None
        writer = ColumnWriter(root, spec)
        values = {
            stat: draw(stat, spec.kind(stat) == "list", lengths, generator) for stat in spec.stats
        }
        for start in range(0, rows, PART_ROWS):
            part = slice(start, start + PART_ROWS)
            writer.append(names[part], {stat: column[part] for stat, column in values.items()})


def draw(
    stat: str, is_list: bool, lengths: npt.NDArray[np.int64], generator: np.random.Generator
) -> list[Any]:
    """Return made-up values: ratios and scores from 0 to 1, counts from 0 to 200."""
    scale = 200 if stat in ("text_len", "num_words", "image_width", "image_height") else 1
    if not is_list:
        return list((generator.random(len(lengths)) * scale).tolist())
    numbers = generator.random(int(lengths.sum())) * scale
    return [part.tolist() for part in np.split(numbers, np.cumsum(lengths)[:-1])]
