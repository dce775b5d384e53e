"""Scores that the statistics table holds, handed to Data-Juicer as its own stats fields.

A filter of Data-Juicer leaves a sample alone that carries its stats already, and only compares them.
What is handed over is what the same operator wrote into the table, under the same parameters and
models, for a sample of the same text and pictures; whatever is not there is computed as always.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from synth_agent.data import DJ_IMAGE_MARKER, END_OF_CHUNK, ROW_ID_FIELD, Sample
from synth_agent.data_keys import sample_digest
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.recipes import Operator
from synth_agent.statistics import ColumnSpec, StatisticsTable, column_spec
from synth_agent.workspace import Workspace

STATS_FIELD = "__dj__stats__"
_ROWS_A_BATCH = 1000
_SCORED_UNDER = {
    "text_keys": "text",
    "image_key": "images",
    "image_special_token": DJ_IMAGE_MARKER,
    "eoc_special_token": END_OF_CHUNK,
}
"""Options that decide scores besides an operator's parameters, as the table was made."""


class KnownScores:
    """The part of a statistics table that belongs to a seed set.

    Args:
        root: The folder `artifacts/statistics`.
        workspace: Remembers the digests of pictures and models.
        seed: The seed samples; a row id is a position in this list.
        images: Folder that their pictures' paths are relative to.
    """

    def __init__(
        self, root: Path, workspace: Workspace, seed: Sequence[Sample], images: Path
    ) -> None:
        self._root = root
        self._workspace = workspace
        self._seed = seed
        self._images = images
        self._digests = Digests(workspace)

    def hand_over(
        self, operator: Operator, options: Mapping[str, Any], dataset: Any
    ) -> tuple[Any, int]:
        """Give the samples of a dataset the stats that a filter would measure.

        No sample gets any unless every one does, and none that an earlier operator measured.

        Args:
            operator: The filter that is to run next, on samples that no operator changed.
            options: The recipe's options.
            dataset: A `NestedDataset` with row ids.

        Returns:
            The dataset, and how many samples were given their stats.
        """
        try:
            scores = self._scores(operator, options, dataset)
        except SynthAgentError as error:
            print(f"{operator.name} is scored anew: {error}", file=sys.stderr)
            return dataset, 0
        if scores is None:
            return dataset, 0
        return _with_stats(dataset, scores), len(scores)

    def saves_a_model(self, operators: Sequence[Operator]) -> bool:
        """Tell whether there are scores for which one of the operators would run a model."""
        for operator in operators:
            try:
                spec = column_spec(operator.name, operator.parameters, self._model_digest)
                if spec is not None and spec.models and self._is_whole(spec):
                    return True
            except SynthAgentError as error:
                print(f"{operator.name} is scored anew: {error}", file=sys.stderr)
        return False

    def _scores(
        self, operator: Operator, options: Mapping[str, Any], dataset: Any
    ) -> dict[int, dict[str, Any]] | None:
        """Return the stats of every row by row id, None where they are not known.

        Raises:
            SynthAgentError: the table, a picture or a model cannot be read.
        """
        if any(options.get(name, value) != value for name, value in _SCORED_UNDER.items()):
            return None
        spec = column_spec(operator.name, operator.parameters, self._model_digest)
        if spec is None or not self._is_whole(spec) or _is_measured(spec, dataset):
            return None
        columns = {stat: self._table.values(spec, stat) for stat in spec.stats}
        self._digests.save()
        rows = list(dataset[ROW_ID_FIELD])
        if not all(values.known[rows].all() for values in columns.values()):
            return None
        return {
            row: {
                stat: _as_measured(values.at(row), is_list=values.offsets is not None)
                for stat, values in columns.items()
            }
            for row in rows
        }

    def _model_digest(self, path: str) -> str:
        return self._digests.path(self._workspace.path(path))

    def _is_whole(self, spec: ColumnSpec) -> bool:
        """Tell whether there is a column that says of itself what its key says."""
        document = self._root / "columns" / spec.key / "column.json"
        if not document.exists():
            return False
        try:
            told = json.loads(document.read_text("utf-8"))
        except ValueError as error:
            raise InvalidInput("Statistics cannot be read", f"{document}: {error}") from error
        return bool(told == json.loads(json.dumps(spec.document()))) and self._table.has(spec)

    @functools.cached_property
    def _table(self) -> StatisticsTable:
        """The table's scores for the seed samples as they are on disk."""
        digests = [
            sample_digest(s.text, [self._digests.path(self._images / image) for image in s.images])
            for s in self._seed
        ]
        return StatisticsTable(self._root, pa.table({"sample": pa.array(digests, pa.string())}))


def _is_measured(spec: ColumnSpec, dataset: Any) -> bool:
    """Tell whether an earlier operator wrote stats under the same names, which count then."""
    if STATS_FIELD not in dataset.column_names or not len(dataset):
        return False
    return any(stat in dataset[0][STATS_FIELD] for stat in spec.stats)


def _as_measured(value: tuple[float, ...] | str, *, is_list: bool) -> Any:
    if isinstance(value, str):
        return value
    return list(value) if is_list else value[0]


def _with_stats(dataset: Any, scores: Mapping[int, Mapping[str, Any]]) -> Any:
    from data_juicer.core.data import add_same_content_to_new_column
    from datasets.fingerprint import generate_random_fingerprint

    if STATS_FIELD not in dataset.features:
        empty = {"new_column_name": STATS_FIELD, "initial_value": {}}
        dataset = dataset.map(add_same_content_to_new_column, fn_kwargs=empty)

    def fill(batch: Any) -> Any:
        for stats, row in zip(batch[STATS_FIELD], batch[ROW_ID_FIELD], strict=True):
            stats.update(scores[row])
        return batch

    # A fingerprint of the function would be one of all the scores that it holds.
    return dataset.map(
        fill,
        batched=True,
        batch_size=_ROWS_A_BATCH,
        new_fingerprint=generate_random_fingerprint(),
        desc="handing over known scores",
    )
