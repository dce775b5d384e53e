"""Were predictions right? Hits, coverage and interval scores of everybody who predicted.

Pure: from finished runs with predictions and comparisons. An 80 % interval that is honest holds the
measured difference in 8 of 10 cases; wide intervals do so easily, which the interval score charges for.

Source: T. Gneiting and A. Raftery, Strictly proper scoring rules, prediction, and estimation, JASA
102(477), 2007, section 6.2 (the interval score).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from synth_agent.runs import Prediction, Run

COVERAGE = 0.80
"""Probability that a prediction's interval claims."""
FEWEST_RUNS = 10
"""Finished runs with predictions before anything is said of how well calibrated somebody is."""


@dataclass(frozen=True)
class Outcome:
    """A prediction and what came."""

    run: str
    prediction: Prediction
    measured: float
    """Percentage points, the run minus its parent."""

    @property
    def hit(self) -> bool:
        """Whether the measured difference lies in the interval, ends included."""
        return self.prediction.low <= self.measured <= self.prediction.high

    @property
    def score(self) -> float:
        """Interval score in percentage points, lower is better: width, and what it was missed by."""
        low, high = self.prediction.low, self.prediction.high
        missed = max(low - self.measured, 0.0) + max(self.measured - high, 0.0)
        return high - low + 2.0 / (1.0 - COVERAGE) * missed


@dataclass(frozen=True)
class Calibration:
    """How one predictor did."""

    by: str
    runs: int
    predictions: int
    hits: int
    mean_score: float
    """Mean interval score in percentage points."""
    mean_error: float
    """Mean absolute difference of expected and measured, in percentage points."""

    @property
    def coverage(self) -> float:
        """Share of predictions whose interval held."""
        return self.hits / self.predictions

    @property
    def is_shown(self) -> bool:
        """Whether there are enough runs to say anything."""
        return self.runs >= FEWEST_RUNS

    def words(self) -> str:
        """Return it as a sentence, or what is missing for one."""
        if not self.is_shown:
            return f"{self.by}: {self.runs} of the {FEWEST_RUNS} runs that a judgement needs"
        return (
            f"{self.by}: {self.hits} of {self.predictions} intervals held "
            f"({self.coverage:.0%}, {COVERAGE:.0%} would be right), mean interval score "
            f"{self.mean_score:.1f}, mean error {self.mean_error:.1f} points"
        )


def outcomes(run: Run) -> tuple[Outcome, ...]:
    """Return the predictions of a run that can be judged: those of a benchmark that was compared."""
    if run.status != "succeeded":
        return ()
    return tuple(
        Outcome(run.id, prediction, run.comparisons[prediction.benchmark].difference)
        for prediction in run.plan.proposal.predictions
        if prediction.benchmark in run.comparisons
    )


def calibrate(runs: Iterable[Run]) -> tuple[Calibration, ...]:
    """Return how each predictor did over the runs, best mean interval score first."""
    by: dict[str, list[Outcome]] = {}
    for run in runs:
        for outcome in outcomes(run):
            by.setdefault(outcome.prediction.by, []).append(outcome)
    judged = [_calibration(name, of) for name, of in by.items()]
    return tuple(sorted(judged, key=lambda one: (one.mean_score, one.by)))


def _calibration(by: str, of: Sequence[Outcome]) -> Calibration:
    errors = [abs(one.measured - one.prediction.expected) for one in of]
    return Calibration(
        by=by,
        runs=len({one.run for one in of}),
        predictions=len(of),
        hits=sum(one.hit for one in of),
        mean_score=sum(one.score for one in of) / len(of),
        mean_error=sum(errors) / len(errors),
    )
