"""Verdicts from per-question scores. Pure functions: no files, no clock, no global random state.

The interval of one score is a percentile bootstrap over questions. The interval of a difference is
the paired bootstrap: both runs are resampled with the same questions, so that what makes a question
hard cancels out. It covers the choice of questions, not the spread between training seeds.

Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 16
(percentile intervals, paired data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synth_agent.errors import InvalidInput

RESAMPLES = 10_000
SEED = 20240601
_CHUNK = 250
"""Resamples drawn at once: bounds memory at 250 x questions, 10 MB for 5,000 questions."""

Outcome = Literal["better", "worse", "inside noise"]


@dataclass(frozen=True)
class Difference:
    """One run minus another on the same questions, in percentage points."""

    points: float
    low: float
    high: float
    """Ends of the 95 % paired bootstrap interval."""
    num_questions: int
    outcome: Outcome


def interval(scores: Sequence[float], *, seed: int = SEED) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, in percent.

    Args:
        scores: One score per question, 0 to 1.
        seed: Seed of the resampling; the same scores always give the same interval.

    Raises:
        ValueError: If there is no score.
    """
    if not len(scores):
        raise ValueError("an interval needs at least one score")
    means = _resampled_means(np.asarray(scores, dtype=np.float64), seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def compare_scores(
    parent: Mapping[str, float], child: Mapping[str, float], *, seed: int = SEED
) -> Difference:
    """Compare two runs question by question.

    Args:
        parent: Question id to score, 0 to 1.
        child: The same of the run that is judged.
        seed: Seed of the resampling.

    Returns:
        The difference child minus parent. It is inside noise when its interval holds zero.

    Raises:
        InvalidInput: If the two runs did not answer the same questions.
    """
    if parent.keys() != child.keys():
        missing = len(parent.keys() - child.keys())
        surplus = len(child.keys() - parent.keys())
        raise InvalidInput(
            "Runs are not comparable",
            f"{missing} of {len(parent)} questions have no answer in the later run, "
            f"{surplus} have none in the earlier one",
            "evaluate both runs on the same benchmark files",
        )
    questions = sorted(parent)
    differences = np.array([child[q] - parent[q] for q in questions], dtype=np.float64)
    low, high = interval(differences.tolist(), seed=seed)
    return Difference(
        points=100 * float(differences.mean()),
        low=low,
        high=high,
        num_questions=len(questions),
        outcome=_outcome(low, high),
    )


def overall(outcomes: Sequence[Outcome]) -> Literal["better", "worse", "inside noise", "mixed"]:
    """Return one word for several benchmarks: a gain here and a loss there is `mixed`."""
    if "better" in outcomes and "worse" in outcomes:
        return "mixed"
    if "better" in outcomes:
        return "better"
    if "worse" in outcomes:
        return "worse"
    return "inside noise"


def _outcome(low: float, high: float) -> Outcome:
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "inside noise"


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(0, len(values), (_CHUNK, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // _CHUNK)
    ]
    return np.concatenate(means)
