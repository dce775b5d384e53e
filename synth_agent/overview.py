"""The seed set as its statistics tell it: plain values, for whoever shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StatisticLine:
    """One statistic of the seed set."""

    stat: str
    operator: str
    counts: tuple[int, ...]
    """Numbers in bins of equal width from the lowest to the highest."""
    low: float
    median: float
    high: float
    unknown: int


@dataclass(frozen=True)
class RecipeLine:
    """What a recipe of the workspace would keep."""

    name: str
    title: str
    kept: int | None
    why: str
    """Why it is not known."""


@dataclass(frozen=True)
class Overview:
    """The seed set as its statistics tell it."""

    num_samples: int
    statistics: tuple[StatisticLine, ...]
    recipes: tuple[RecipeLine, ...]
    contamination: str = ""
    """What the seed set shares with the evaluation sets; empty where it is not known."""


@dataclass(frozen=True)
class Relations:
    """How statistics go together, and how far what a recipe keeps is from the seed set."""

    names: tuple[str, ...]
    spearman: tuple[tuple[float, ...], ...]
    """(S, S) in the order of the names; NaN where it is not defined."""
    recipe: str
    drift: tuple[StatisticDrift, ...]
    """The largest first."""
    why: str
    """Why there is no drift."""


@dataclass(frozen=True)
class StatisticDrift:
    """One statistic of the samples that a recipe keeps beside that of all samples."""

    name: str
    median: float
    whole_median: float
    standardised_mean_difference: float
    kolmogorov_smirnov: float
