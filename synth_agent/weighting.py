"""One figure of several benchmarks, where and only where the user has weighed them.

The weights are `goal_weights` of synth.yaml. The figure stands beside the benchmarks' own differences
and never in their place. Pure functions; the arithmetic is `referee.combine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from synth_agent.referee import Judgement, combine
from synth_agent.runs import Comparison
from synth_agent.wording import benchmark_name


@dataclass(frozen=True)
class Weighted:
    """A run minus its parent in the user's weighting, percentage points."""

    weighting: str
    """The weights in words."""
    missing: tuple[str, ...]
    """Benchmarks that have a weight and no comparison: then there is no figure."""
    judgement: Judgement | None
    """None when a benchmark is missing."""
    covers_seeds: bool
    """Whether every interval that went in covers seeds and tries, not the questions alone."""

    def words(self) -> str:
        """Return what the figure is made of, or why there is none."""
        if self.missing:
            names = ", ".join(benchmark_name(name) for name in self.missing)
            return f"your weighting, {self.weighting}: no figure, as {names} was not compared"
        covered = "" if self.covers_seeds else "; covers questions only, not seeds"
        return f"your weighting, {self.weighting}; half-widths added{covered}"

    def line(self) -> str:
        """Return the figure and its interval in one line of plain text."""
        one = self.judgement
        if one is None:
            return self.words()
        return f"{one.points:+.1f} points [{one.low:+.1f}, {one.high:+.1f}] {one.outcome}, {self.words()}"


def weigh(comparisons: Sequence[Comparison], weights: Mapping[str, float]) -> Weighted | None:
    """Return the weighted difference, None when the user has weighed nothing.

    Half-widths are added, so that the interval holds however the benchmarks move together: both
    measure one trained model, and its seed moves both.

    Args:
        comparisons: Of one run with one parent, one a benchmark.
        weights: Benchmark to weight, adding up to 1; from `Settings.weights`.
    """
    if not weights:
        return None
    of = {one.benchmark: one for one in comparisons if one.benchmark in weights}
    missing = tuple(name for name in weights if name not in of)
    judgement = None
    if not missing:
        judgement = combine({name: _judgement(one) for name, one in of.items()}, weights)
    covers_seeds = all(one.basis for one in of.values())
    return Weighted(weighting_words(weights), missing, judgement, covers_seeds)


def weighting_words(weights: Mapping[str, float]) -> str:
    """Return weights as `0.7 TextVQA + 0.3 MMBench`."""
    return " + ".join(f"{weight:.3g} {benchmark_name(name)}" for name, weight in weights.items())


def _judgement(one: Comparison) -> Judgement:
    verdict = one.verdict
    outcome = verdict if verdict == "better" or verdict == "worse" else "inside noise"
    return Judgement(
        points=one.difference,
        low=one.low,
        high=one.high,
        outcome=outcome,
        shrunk=one.difference if one.expected is None else one.expected,
        tries=one.tries,
        seeds=one.seeds,
        parent_seeds=one.parent_seeds,
        num_questions=one.num_questions,
        question_sd=one.question_sd or 0.0,
        seed_sd=one.seed_sd or 0.0,
        assumed=one.assumed,
        basis=one.basis,
    )
