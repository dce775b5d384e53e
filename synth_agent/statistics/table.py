"""The statistics of one data set: its samples, the values of its columns, figures and queries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from synth_agent.errors import InvalidInput, nearest
from synth_agent.statistics.columns import ColumnSpec, is_default
from synth_agent.statistics.figures import (
    Correlation,
    CorrelationMatrix,
    Drift,
    DriftLine,
    Histogram,
    correlate,
    correlate_all,
    drift_between,
)
from synth_agent.statistics.files import (
    SampleRow,
    part_names,
    read_columns,
    read_samples,
    read_scores,
)
from synth_agent.statistics.queries import MAX_RESULT_BYTES, Database, QueryResult
from synth_agent.statistics.values import Floats, Integers, Mask, Values, from_arrow, to_arrow

T = TypeVar("T")


class StatisticsTable:
    """The statistics of one data set. Values are read once and kept."""

    def __init__(self, root: Path, samples: pa.Table) -> None:
        self._root = root
        self._samples = samples
        self._cache: dict[tuple[str, str], tuple[tuple[str, ...], Values]] = {}
        self._remembered: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self._database: tuple[object, Database] | None = None

    @classmethod
    def open(cls, root: Path, data_key: str) -> StatisticsTable:
        """Open the statistics of a data set.

        Args:
            root: The folder `artifacts/statistics`.
            data_key: Names the data set.

        Raises:
            InvalidInput: the data set was not analysed, or its file cannot be read.
        """
        return cls(root, read_samples(root, data_key))

    @property
    def num_rows(self) -> int:
        """How many samples the data set has."""
        return int(self._samples.num_rows)

    def columns(self) -> tuple[ColumnSpec, ...]:
        """Return the columns on disk of this Data-Juicer version, by operator and key."""
        return read_columns(self._root)

    def has(self, spec: ColumnSpec) -> bool:
        """Tell whether any score of the column was ever written."""
        return bool(part_names(self._root, spec))

    def parts_of(self, operator: str | None = None) -> tuple[str, ...]:
        """Return what tells apart the states on disk of an operator's columns, or of all."""
        return tuple(
            f"{spec.key}/{name}"
            for spec in self.columns()
            if operator in (None, spec.operator)
            for name in part_names(self._root, spec)
        )

    def values(self, spec: ColumnSpec, stat: str | None = None) -> Values:
        """Return one stat of a column for every row, the column's first unless named.

        Raises:
            InvalidInput: the column has no such stat, or a part cannot be read.
        """
        stat = stat or spec.stats[0]
        if stat not in spec.stats:
            raise InvalidInput(
                "Unknown stat", f"{spec.operator}: {stat}", nearest(stat, spec.stats)
            )
        names = part_names(self._root, spec)
        cached = self._cache.get((spec.key, stat))
        if cached is None or cached[0] != names:
            cached = (names, self._load(spec, stat))
            self._cache[spec.key, stat] = cached
        return cached[1]

    def texts(self) -> list[str]:
        """Return the text of every row."""
        return self.remember("texts", lambda: list(self._samples["text"].to_pylist()))

    def remember(self, what: Hashable, compute: Callable[[], T]) -> T:
        """Return what `compute` made of the samples the first time; samples do not change."""
        if what not in self._remembered:
            self._remembered[what] = compute()
        made: T = self._remembered[what]
        return made

    def rows(self, positions: Sequence[int] | Integers) -> list[SampleRow]:
        """Return the samples at positions, in the order given."""
        taken = self._samples.take(pa.array(np.asarray(positions, dtype=np.int64)))
        return [
            SampleRow(row["id"], row["sample"], row["text"], tuple(row["images"] or ()))
            for row in taken.to_pylist()
        ]

    def histogram(
        self,
        spec: ColumnSpec,
        *,
        bins: int = 40,
        stat: str | None = None,
        mask: Mask | None = None,
        limits: tuple[float, float] | None = None,
    ) -> Histogram:
        """Count a stat's numbers in bins of equal width, of the rows in `mask` if it is given."""
        values = self._figures(spec, stat)
        numbers = values.numbers(mask)
        numbers = numbers[np.isfinite(numbers)]
        unknown = ~values.known if mask is None else ~values.known & mask
        counts, edges = np.histogram(numbers, bins=bins, range=limits)
        return Histogram(edges, counts.astype(np.int64), int(unknown.sum()))

    def quantiles(
        self,
        spec: ColumnSpec,
        probabilities: Sequence[float],
        *,
        stat: str | None = None,
        mask: Mask | None = None,
    ) -> Floats:
        """Return (len(probabilities),) quantiles of a stat's numbers, NaN when there are none."""
        numbers = self._figures(spec, stat).numbers(mask)
        if not len(numbers):
            return np.full(len(probabilities), np.nan)
        return np.asarray(np.quantile(numbers, probabilities), dtype=np.float64)

    def correlation(self, a: ColumnSpec, b: ColumnSpec) -> Correlation:
        """Correlate the main stats of two columns; a list counts as its mean.

        The coefficients are NaN where they are not defined: under two rows, or a constant stat.
        """
        return correlate(self._figures(a).per_row(), self._figures(b).per_row())

    def drift(self, mask: Mask, spec: ColumnSpec, stat: str | None = None) -> Drift:
        """Compare a stat's numbers of the rows in `mask` (N,) with those of all rows.

        Raises:
            InvalidInput: there is nothing to compare.
        """
        values = self._figures(spec, stat)
        whole, subset = values.numbers(), values.numbers(mask)
        if not len(subset):
            raise InvalidInput(
                "Nothing to compare",
                f"{spec.operator}: no known value among the chosen rows",
                "choose rows that have one",
            )
        return drift_between(subset, whole)

    def correlations(self) -> CorrelationMatrix:
        """Correlate every two stats by Spearman's coefficient; a list counts as its mean."""
        return correlate_all(
            {
                name: self.values(spec, stat).per_row()
                for name, (spec, stat) in self._numeric_names().items()
            }
        )

    def drifts(self, mask: Mask) -> tuple[DriftLine, ...]:
        """Return the drift of every stat that some row in `mask` (N,) has, the largest first."""
        lines = []
        for name, (spec, stat) in self._numeric_names().items():
            values = self.values(spec, stat)
            subset, whole = values.numbers(mask), values.numbers()
            if len(subset):
                drift = self.drift(mask, spec, stat)
                lines.append(
                    DriftLine(name, float(np.median(subset)), float(np.median(whole)), drift)
                )
        return tuple(sorted(lines, key=lambda line: -line.drift.kolmogorov_smirnov))

    def _numeric_names(self) -> dict[str, tuple[ColumnSpec, str]]:
        named = self.column_names()
        return {
            name: (spec, stat)
            for name, (spec, stat) in sorted(named.items(), key=lambda item: item[1][0].operator)
            if stat in spec.numeric_stats and self.values(spec, stat).known.any()
        }

    def _figures(self, spec: ColumnSpec, stat: str | None = None) -> Values:
        """Return a stat that is a number, the column's main one unless named."""
        values = self.values(spec, stat or spec.main_stat)
        if spec.kind(values.stat) == "string":
            raise InvalidInput("Not a number", f"{spec.operator}: {stat}", "choose another stat")
        return values

    def column_names(self) -> dict[str, tuple[ColumnSpec, str]]:
        """Return the names that queries use for the stats.

        A stat goes by its own key. Where columns share one, the column with default parameters has
        it, and the others add the start of their column key.
        """
        names: dict[str, tuple[ColumnSpec, str]] = {}
        for spec in sorted(self.columns(), key=lambda spec: (not is_default(spec), spec.key)):
            for stat in spec.stats:
                names[stat if stat not in names else f"{stat}_{spec.key[:6]}"] = (spec, stat)
        return names

    def query(
        self,
        sql: str,
        limit_rows: int = 100,
        timeout_s: float = 5.0,
        *,
        limit_bytes: int = MAX_RESULT_BYTES,
    ) -> QueryResult:
        """Run one SELECT over the view `samples`: row, id, sample, text, images and every stat.

        The database is in memory and can reach neither files nor network.

        Args:
            sql: One statement in DuckDB's dialect.
            limit_rows: Most rows that are returned.
            timeout_s: Seconds after which it is interrupted.
            limit_bytes: Most bytes of text that are returned.

        Raises:
            InvalidInput: not one SELECT, or the database refuses it.
            SynthAgentError: it took too long.
        """
        with self._lock:
            return self._open_database().query(sql, limit_rows, timeout_s, limit_bytes)

    def _open_database(self) -> Database:
        """Return the database, made anew when columns changed on disk."""
        names = self.column_names()
        state = {
            name: (spec.key, stat, part_names(self._root, spec))
            for name, (spec, stat) in names.items()
        }
        if self._database is not None and self._database[0] == state:
            return self._database[1]
        view = self._samples
        for name, (spec, stat) in names.items():
            view = view.append_column(name, to_arrow(self.values(spec, stat), spec.kind(stat)))
        database = Database(view)
        self._database = (state, database)
        return database

    def _load(self, spec: ColumnSpec, stat: str) -> Values:
        written = read_scores(self._root, spec, stat)
        # The first of equal samples is found, which is the latest that was written.
        found = pc.index_in(
            self._samples["sample"].combine_chunks(), written["sample"].combine_chunks()
        )
        rows = written.take(found)
        return from_arrow(
            stat, spec.kind(stat), rows[stat].combine_chunks(), rows["error"].combine_chunks()
        )
