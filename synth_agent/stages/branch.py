"""One list of operators on a set of records, by Data-Juicer in this process.

Owns loading records and operators the way Data-Juicer does, and what each operator dropped.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synth_agent.changes import Change, OperatorChanges, spread
from synth_agent.data import ROW_ID_FIELD, Record, Sample
from synth_agent.recipes import Recipe

if TYPE_CHECKING:
    from synth_agent.stages.known_scores import KnownScores

_OPERATOR_STRIDE = 1_000_003
"""Between the seeds of operators; a branch adds one, so that no two have the same."""

Report = Callable[[str, int, int], None]
"""Called with a label, samples done and samples in all."""


@dataclass(frozen=True)
class OperatorCount:
    """What one operator did: samples before and after, and wall time."""

    name: str
    before: int
    after: int
    seconds: float
    scores_known_before: int = 0
    """Samples that it did not score, because the statistics table holds their scores."""


@dataclass(frozen=True)
class Outcome:
    """What the operators left, and where the seed rows that are gone went."""

    rows: list[dict[str, Any]]
    """Row id, seed id, text and absolute picture paths of each sample."""
    counts: tuple[OperatorCount, ...]
    dropped: dict[str, list[int]]
    """Rows that an operator dropped, under `position. name`."""
    measured_anew: tuple[int, ...]
    """Positions, from 1, of operators before which measurements from before a mapper were forgotten;
    Data-Juicer by itself uses them again."""

    changes: tuple[OperatorChanges, ...] = ()
    """Some of the samples that each operator dropped or changed."""

    @property
    def emptied_by(self) -> str | None:
        """The operator that dropped the last sample, None while there is one."""
        return next((count.name for count in self.counts if count.after == 0), None)


def seed_records(seed: Sequence[Sample], images: Path) -> list[dict[str, Any]]:
    """Return the seed samples as Data-Juicer reads them, with row ids and absolute paths."""
    # Links are kept: the image folder is often one.
    root = os.path.abspath(images)  # noqa: PTH100
    return [
        {
            "id": str(sample.id),
            "images": [os.path.join(root, image) for image in sample.images],  # noqa: PTH118
            "text": sample.text,
            ROW_ID_FIELD: row_id,
        }
        for row_id, sample in enumerate(seed)
    ]


def run_branch(
    recipe: Recipe,
    records: Sequence[Record],
    seed: Sequence[Sample],
    folder: Path,
    generator_seed: int,
    report: Report,
    known: KnownScores | None = None,
) -> Outcome:
    """Drive a linear recipe's operators one by one, in this process.

    Args:
        recipe: A linear recipe.
        records: What it reads, from `seed_records`.
        seed: The seed samples; a row id is a position in this list.
        folder: Empty folder for Data-Juicer's own files.
        generator_seed: Seed of what operators draw at random.
        report: Called with an operator's label, samples done and samples in all.
        known: Scores of the seed samples that filters need not compute.

    Raises:
        SynthAgentError: an operator failed, or samples were lost without its decision.
    """
    from synth_agent.stages.running import OperatorFailed, describe_rows, run_operator

    dataset, operators = load_records(recipe, records, folder)
    lost = sorted({record[ROW_ID_FIELD] for record in records} - set(dataset[ROW_ID_FIELD]))
    if lost:
        raise OperatorFailed(
            "Samples lost", f"Data-Juicer did not load {describe_rows(lost, seed)}", ""
        )
    measurements = _Measurements(recipe, known)
    counts, dropped, changes = [], {}, []
    for position, operator in enumerate(operators, 1):
        label = f"{position}/{len(operators)} {operator._name}"
        started, before, given = time.monotonic(), dataset[ROW_ID_FIELD], dataset

        def report_step(done: int, total: int, label: str = label) -> None:
            report(label, done, total)

        _seed_generators(generator_seed, position, operator)
        dataset, num_known = measurements.prepare(position, operator, dataset)
        dataset = run_operator(operator, dataset, seed, report_step)
        after = dataset[ROW_ID_FIELD] if len(dataset) else []
        seconds = round(time.monotonic() - started, 3)
        counts.append(OperatorCount(operator._name, len(before), len(after), seconds, num_known))
        gone = sorted(set(before) - set(after))
        dropped[f"{position}. {operator._name}"] = gone
        examples = _changes(given, dataset, gone, seed)
        changes.append(OperatorChanges(f"{position}. {operator._name}", examples))
        if not len(dataset):
            break
    rows = dataset.select_columns([ROW_ID_FIELD, "text", "images"]).to_list()
    for row in rows:
        row["id"] = seed[row[ROW_ID_FIELD]].id
    return Outcome(rows, tuple(counts), dropped, tuple(measurements.anew), tuple(changes))


def _changes(
    given: Any, left: Any, gone: Sequence[int], seed: Sequence[Sample]
) -> tuple[Change, ...]:
    """Return some samples that an operator dropped, or else changed, spread over the data set."""
    texts = dict(zip(given[ROW_ID_FIELD], given["text"], strict=True))
    if gone:
        return tuple(Change(str(seed[row].id), texts[row], None) for row in spread(gone))
    if not len(left):
        return ()
    made = {
        row: text
        for row, text in zip(left[ROW_ID_FIELD], left["text"], strict=True)
        if text != texts.get(row)
    }
    return tuple(Change(str(seed[r].id), texts[r], made[r]) for r in spread(sorted(made)))


class _Measurements:
    """Sees to it that every operator compares measurements of the samples that reach it."""

    def __init__(self, recipe: Recipe, known: KnownScores | None) -> None:
        self._recipe = recipe
        self._known = known
        self._is_stale = False
        self.anew: list[int] = []

    def prepare(self, position: int, operator: Any, dataset: Any) -> tuple[Any, int]:
        """Forget what a mapper made stale, and hand over what is known of seed samples.

        Args:
            position: The operator's place in the recipe, counted from 1.
            operator: The operator that runs next.
            dataset: The samples that reach it.

        Returns:
            The dataset, and how many of its samples have a score that was known before.
        """
        kinds = _kinds(operator)
        if self._is_stale and kinds & {"Filter", "Deduplicator"}:
            self._is_stale, fresh = False, _without_measurements(dataset)
            if fresh is not dataset:
                self.anew.append(position)
                dataset = fresh
        self._is_stale = self._is_stale or "Mapper" in kinds
        if not kinds & {"Filter", "Deduplicator", "Selector"}:
            # From here on samples are not those of the seed set.
            self._known = None
        # Worker processes run Data-Juicer's own operator, whose scores may differ in the last digits.
        if self._known is None or "Filter" not in kinds or operator.num_proc:
            return dataset, 0
        step = self._recipe.operators[position - 1]
        return self._known.hand_over(step, self._recipe.options, dataset)


def _without_measurements(dataset: Any) -> Any:
    """Return the dataset without what was measured of its samples; itself if there is nothing."""
    from synth_agent.stages.forget_measurements import FORGOTTEN

    stale = [name for name in FORGOTTEN if name in dataset.column_names]
    return dataset.remove_columns(stale) if stale else dataset


def load_records(recipe: Recipe, records: Iterable[Record], folder: Path) -> tuple[Any, Any]:
    """Return records as Data-Juicer's dataset, and a linear recipe's operators."""
    from data_juicer.core.data.dataset_builder import DatasetBuilder
    from data_juicer.ops import load_ops

    from synth_agent.stages.prepared import configuration

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "input.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    # Data-Juicer's cache does not know when a model folder's content changes: none is used.
    mapping = recipe.mapping() | {
        "dataset_path": str(folder / "input.jsonl"),
        "export_path": str(folder / "export" / "output.jsonl"),
        "skip_op_error": False,
        "use_cache": False,
        "ds_cache_dir": str(folder / "cache"),
    }
    config = configuration(mapping, folder)
    dataset = DatasetBuilder(config, executor_type="default").load_dataset()
    return dataset, load_ops(config.process)


def _seed_generators(seed: int, position: int, operator: Any) -> None:
    """Seed what operators that draw at random draw from; Data-Juicer seeds nothing itself.

    Each operator has draws of its own, whatever those before it drew while they loaded a model.
    """
    seed = (seed + _OPERATOR_STRIDE * (position - 1)) % 2**32
    random.seed(seed)
    import numpy as np

    np.random.seed(seed)
    # A mapper with a model may import torch while it runs, and would draw from torch's first seed.
    if "torch" in sys.modules or ("Mapper" in _kinds(operator) and operator._accelerator == "cuda"):
        import torch

        torch.manual_seed(seed)


def _kinds(operator: Any) -> set[str]:
    """Return the names of an operator's class and of the classes that it builds on."""
    return {base.__name__ for base in type(operator).__mro__}
