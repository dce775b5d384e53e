"""Figures over the values of stats: histograms, correlations and drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from synth_agent.statistics.values import Floats, Integers


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a stat's numbers in bins of equal width."""

    edges: Floats  # (B + 1,)
    counts: Integers  # (B,)
    unknown_rows: int


@dataclass(frozen=True)
class Correlation:
    """How two stats go together over the rows that have both."""

    pearson: float
    spearman: float
    rows: int


@dataclass(frozen=True, eq=False)
class CorrelationMatrix:
    """Spearman's rank correlation of every two stats, over the rows that have both."""

    names: tuple[str, ...]
    """As queries name the stats."""
    spearman: Floats
    """(S, S), NaN where it is not defined."""


@dataclass(frozen=True)
class Drift:
    """How far a stat of some rows is from that of all rows."""

    kolmogorov_smirnov: float
    """Largest distance of the two cumulative distributions, 0 to 1."""
    standardised_mean_difference: float
    """Difference of the means in standard deviations of all rows."""
    subset_values: int
    whole_values: int


@dataclass(frozen=True)
class DriftLine:
    """A stat of some rows beside that of all rows."""

    name: str
    """As queries name the stat."""
    median: float
    whole_median: float
    drift: Drift


def correlate(first: Floats, second: Floats) -> Correlation:
    """Correlate two stats of N rows, (N,) each and NaN where a row has none.

    The coefficients are NaN where they are not defined: under two rows, or a constant stat.
    """
    both = np.isfinite(first) & np.isfinite(second)
    x, y = first[both], second[both]
    return Correlation(_pearson(x, y), _pearson(_ranks(x), _ranks(y)), int(both.sum()))


def correlate_all(stats: Mapping[str, Floats]) -> CorrelationMatrix:
    """Correlate every two of S named stats of N rows, (N,) each and NaN where a row has none."""
    columns = list(stats.values())
    known = [np.isfinite(column) for column in columns]
    ranks = [_ranks(column) for column in columns]
    matrix = np.full((len(columns), len(columns)), np.nan)  # (S, S)
    for i, first in enumerate(columns):
        for j in range(i + 1):
            both = known[i] & known[j]
            # Ranks of all rows are those of the common rows when no row lacks either.
            pair = (
                (ranks[i], ranks[j])
                if both.all()
                else (_ranks(first[both]), _ranks(columns[j][both]))
            )
            matrix[i, j] = matrix[j, i] = _pearson(*pair)
    return CorrelationMatrix(tuple(stats), matrix)


def drift_between(subset: Floats, whole: Floats) -> Drift:
    """Compare the numbers of some rows with those of all rows; there is at least one of some."""
    subset, whole = np.sort(subset), np.sort(whole)
    at = np.unique(whole)
    below_whole = np.searchsorted(whole, at, side="right") / len(whole)
    below_subset = np.searchsorted(subset, at, side="right") / len(subset)
    deviation = float(np.std(whole))
    difference = float(np.mean(subset) - np.mean(whole))
    return Drift(
        float(np.max(np.abs(below_whole - below_subset))),
        difference / deviation if deviation > 0 else 0.0,
        len(subset),
        len(whole),
    )


def _pearson(x: Floats, y: Floats) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(numbers: Floats) -> Floats:
    """Return ranks from 0; equal numbers share the mean of theirs."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse], dtype=np.float64)
