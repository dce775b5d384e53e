"""Early verdicts: what the loss so far says of the final score, and how often it was right.

`early_verdict` gives the chance that a run's final score lands in the top half of the finished runs.
The rule is fitted to finished runs and measured on runs that it did not see; with fewer than
`LEAST_RUNS` it says so instead. `early_verdicts` reads the runs of a workspace. `Starts` is the plan option that rests on it: start several
initialisations, keep those of the lowest loss, stop the others. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synth_agent.noise import replicate_key
from synth_agent.runs import Run, StageState
from synth_agent.wording import benchmark_name

LEAST_RUNS = 8
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the first stage at which a run is judged."""
_FIRST_STAGE = "pretrain"
_APART = ("seed", "compute")
"""Settings in which runs may differ whose losses are compared."""
_WINDOW = 0.05
"""Share of the stage over which the loss is averaged, backwards from where it is read."""
_PENALTY = 0.5
"""Ridge penalty on the slope per standard deviation of loss: losses that separate the halves
perfectly shall not be answered with certainty."""
_RESAMPLES = 2_000
_SEED = 20240601

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finished:
    """A finished run, as far as an early verdict needs it."""

    loss: float
    """At the share of the stage that the verdict is asked for."""
    score: float
    """Final score, percent."""


@dataclass(frozen=True)
class HitRate:
    """How good the rule was on finished runs, each left out of the fit in turn."""

    num_runs: int
    hits: int
    """Runs whose half of the scores was the likelier one."""
    low: float
    """Ends of the 95 % interval of the share of hits (Wilson)."""
    high: float
    brier: float
    """Mean squared error of the chance; 0.25 for always saying one half."""
    usual: float = 0.5
    """Share of the commoner half: more than one half where many scores are equal."""

    @property
    def rate(self) -> float:
        """Share of hits, 0 to 1."""
        return self.hits / self.num_runs

    @property
    def is_useful(self) -> bool:
        """Whether it is surely better than a coin, and its chances than always one half.

        Where scores are equal the halves are not: then, than always saying the commoner one.
        """
        return self.low > self.usual and self.brier < self.usual * (1 - self.usual)

    def words(self) -> str:
        """Return the hit rate with its interval and the number of runs."""
        return (
            f"right for {self.hits} of {self.num_runs} finished runs "
            f"({100 * self.low:.0f} to {100 * self.high:.0f} %), Brier score {self.brier:.2f}"
        )


@dataclass(frozen=True)
class EarlyVerdict:
    """What the loss so far says."""

    chance: float | None
    """That the final score lands in the top half, 0 to 1; None when there are too few runs."""
    measured: HitRate | None

    def words(self) -> str:
        """Return the verdict as one sentence, never without how well it has done."""
        if self.chance is None or self.measured is None:
            return f"not enough runs: an early verdict needs {LEAST_RUNS} finished ones"
        said = f"{100 * self.chance:.0f} % for the top half; {self.measured.words()}"
        return said if self.measured.is_useful else f"{said}: no better than a coin, do not stop"


def loss_at(stage: StageState, share: float) -> float | None:
    """Return the mean loss shortly before a share of a stage was done.

    Args:
        stage: With its losses by step and, in its progress, the total number of steps.
        share: 0 to 1.

    Returns:
        None when the stage has not come so far or reported no loss there.
    """
    total = stage.progress.get("total") or 0
    end = share * total
    if not stage.losses or not total or stage.losses[-1][0] < end - 0.5 - _WINDOW * total:
        return None
    start = end - max(_WINDOW * total, 1)
    window = [loss for step, loss in stage.losses if start < step <= end]
    before = [loss for step, loss in stage.losses if step <= end]
    return float(np.mean(window)) if window else (before[-1] if before else None)


def early_verdict(finished: Sequence[Finished], loss: float) -> EarlyVerdict:
    """Return the chance of the top half for a run whose loss is `loss` at the same share.

    Losses compare only between runs that train on alike data: easier captions have a lower loss
    whatever they teach. Pass the runs of one recipe, or say what was mixed.
    """
    if len(finished) < LEAST_RUNS:
        return EarlyVerdict(None, None)
    losses, is_top = _columns(finished)
    if not 0 < is_top.sum() < len(is_top):
        return EarlyVerdict(None, None)
    return EarlyVerdict(_chance(losses, is_top, loss), hit_rate(finished))


def hit_rate(finished: Sequence[Finished]) -> HitRate:
    """Measure the rule: each run is judged by a rule and a median that were made without it.

    Raises:
        ValueError: If there are fewer than `LEAST_RUNS` runs.
    """
    if len(finished) < LEAST_RUNS:
        raise ValueError(f"a hit rate needs {LEAST_RUNS} runs")
    errors, hits = [], 0
    for left_out, run in enumerate(finished):
        others = [other for number, other in enumerate(finished) if number != left_out]
        losses, is_top = _columns(others)
        truth = float(run.score > np.median([other.score for other in others]))
        chance = _chance(losses, is_top, run.loss)
        errors.append((chance - truth) ** 2)
        hits += (chance > 0.5) == bool(truth)
    low, high = wilson(hits, len(finished))
    error = float(np.mean(errors))
    return HitRate(len(finished), hits, low, high, error, _commoner_half(finished))


def _commoner_half(finished: Sequence[Finished]) -> float:
    """Return the share of runs that are not in the top half; one half without equal scores."""
    scores = np.array([run.score for run in finished])
    middle = 0.5 * (len(scores) % 2)  # the middle one of an odd number belongs to neither half
    return max(0.5, float((scores <= np.median(scores)).sum() - middle) / len(scores))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Source: E. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z = 1.959964
    share, square = hits / trials, z**2 / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def _columns(finished: Sequence[Finished]) -> tuple[Floats, NDArray[np.bool_]]:
    scores = np.array([run.score for run in finished])
    return np.array([run.loss for run in finished]), scores > np.median(scores)


def _chance(losses: Floats, is_top: NDArray[np.bool_], loss: float) -> float:
    """Return the chance at a loss from a ridge logistic regression on the standardised loss."""
    scale = float(losses.std()) or 1.0
    design = np.stack([np.ones_like(losses), (losses - losses.mean()) / scale], axis=1)  # (N, 2)
    coefficients = np.zeros(2)
    penalty = np.array([1e-6, 2 * _PENALTY])
    for _ in range(25):
        chances = 1 / (1 + np.exp(-design @ coefficients))
        gradient = design.T @ (chances - is_top) + penalty * coefficients
        curvature = (design.T * (chances * (1 - chances))) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-9:
            break
    at = coefficients[0] + coefficients[1] * (loss - losses.mean()) / scale
    return float(1 / (1 + np.exp(-np.clip(at, -30, 30))))


@dataclass(frozen=True)
class RunVerdict:
    """What a run's loss so far says of its score on one benchmark."""

    benchmark: str
    share: float
    """Of the first stage, at which losses were compared, 0 to 1."""
    verdict: EarlyVerdict
    is_mixed: bool
    """Whether runs of several recipes had to be compared."""

    def words(self) -> str:
        """Return it as one sentence, with how well the rule has done and what was mixed."""
        mixed = "; recipes mixed: easier captions lower the loss whatever they teach"
        return (
            f"{benchmark_name(self.benchmark)}, loss at {100 * self.share:.0f} % of stage 1: "
            f"{self.verdict.words()}{mixed if self.is_mixed else ''}"
        )


def share_reached(run: Run) -> float | None:
    """Return the largest of `SHARES` that a run's first stage has come to, None before the first."""
    stage = run.stages[_FIRST_STAGE]
    done, total = stage.progress.get("step") or 0, stage.progress.get("total") or 0
    reached = [share for share in SHARES if total and done >= share * total]
    return next((share for share in reversed(reached) if loss_at(stage, share) is not None), None)


def early_verdicts(run: Run, history: Sequence[Run]) -> tuple[RunVerdict, ...]:
    """Judge a run by its loss so far, benchmark by benchmark.

    Replicates of the run are its measure; where there are too few of them, all finished runs with
    the same settings are, and the verdict says so. Benchmarks with fewer than `LEAST_RUNS` such
    runs are left out: without a measured hit rate nothing is said.

    Args:
        run: A run whose first stage has begun.
        history: Other runs of the workspace; finished ones with scores count.
    """
    share = share_reached(run)
    if share is None:
        return ()
    loss = loss_at(run.stages[_FIRST_STAGE], share)
    assert loss is not None
    alike = [one for one in history if one.id != run.id and one.is_measured and _alike(run, one)]
    key = replicate_key(run)
    twins = [one for one in alike if key is not None and replicate_key(one) == key]
    found = []
    for benchmark in dict.fromkeys(name for one in alike for name in one.scores):
        same, mixed = (_finished(runs, benchmark, share) for runs in (twins, alike))
        is_mixed = len(same) < LEAST_RUNS
        verdict = early_verdict(mixed if is_mixed else same, loss)
        if verdict.measured is not None:
            found.append(RunVerdict(benchmark, share, verdict, is_mixed))
    return tuple(found)


def _alike(run: Run, other: Run) -> bool:
    """Tell whether two runs trained under the same settings."""
    mine, theirs = run.plan.proposal.settings, other.plan.proposal.settings
    names = (mine.keys() | theirs.keys()) - set(_APART)
    return all(mine.get(name) == theirs.get(name) for name in names)


def _finished(runs: Sequence[Run], benchmark: str, share: float) -> list[Finished]:
    """Return loss and score of the runs that have both."""
    scored = [run for run in runs if benchmark in run.scores]
    losses = [loss_at(run.stages[_FIRST_STAGE], share) for run in scored]
    return [
        Finished(loss, run.scores[benchmark].percent)
        for run, loss in zip(scored, losses, strict=True)
        if loss is not None
    ]


@dataclass(frozen=True)
class Starts:
    """Start several initialisations of the first training stage and keep the best by loss."""

    count: int
    keep: int = 1
    share: float = 1.0
    """Share of the first stage after which the others are stopped."""

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.count or not 0 < self.share <= 1:
            raise ValueError("keep 1 to count of the starts, after a share above 0 and up to 1")

    def cost(self, first_seconds: float, rest_seconds: float) -> float:
        """Return the cost in multiples of one plain run's training and evaluation.

        Args:
            first_seconds: The first stage of one run.
            rest_seconds: The second stage and the evaluation.
        """
        dropped = (self.count - self.keep) * self.share * first_seconds
        whole = first_seconds + rest_seconds
        return (dropped + self.keep * whole) / whole

    def cost_words(self, first_seconds: float, rest_seconds: float) -> str:
        """Return what it costs, beside the plain seeds that the same time would pay."""
        factor = self.cost(first_seconds, rest_seconds)
        return (
            f"{self.count} starts, the best {self.keep} kept after {100 * self.share:.0f} % of "
            f"stage 1: {factor:.2f} times one run; the same time pays {factor:.1f} plain seeds, "
            "which tell more about the recipe"
        )


@dataclass(frozen=True)
class StartsEffect:
    """What keeping the best starts did to the score, on runs that were all finished."""

    points: float
    """Mean score of the kept minus that of any start, percentage points."""
    low: float
    """Ends of the 95 % bootstrap interval over runs."""
    high: float
    spread_before: float
    """Standard deviation of the score over plain starts, mean over groups."""
    spread_after: float
    """The same of a kept one."""
    num_runs: int
    num_groups: int

    def words(self) -> str:
        """Return the effect with its interval, what it rests on and what it is not."""
        return (
            f"{self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}] on {self.num_runs} runs "
            f"of {self.num_groups} recipes, spread {self.spread_before:.1f} to "
            f"{self.spread_after:.1f}: a luckier start, not a better recipe, so give the baseline "
            "the same starts"
        )


def starts_effect(groups: Sequence[Sequence[Finished]], starts: Starts) -> StartsEffect:
    """Measure what keeping the starts of the lowest loss does to the score.

    Every choice of `starts.count` of a group's runs is counted, by the chance of each rank to be
    among the kept.

    Args:
        groups: Runs of one recipe each, which differ in the seed, with the loss at `starts.share`.
        starts: How many are started and kept.

    Raises:
        ValueError: If a group has fewer runs than are started, or there is none.
    """
    if not groups or min(len(group) for group in groups) < starts.count:
        raise ValueError(f"each group needs {starts.count} runs")
    tables = [np.array([(run.loss, run.score) for run in group]) for group in groups]  # (N, 2) each
    found = [_kept(table, starts) for table in tables]
    generator = np.random.default_rng(_SEED)
    drawn = [
        np.mean([_kept(_resampled(table, generator), starts)[0] for table in tables])
        for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return StartsEffect(
        points=float(np.mean([points for points, _ in found])),
        low=float(low),
        high=float(high),
        spread_before=float(np.mean([table[:, 1].std() for table in tables])),
        spread_after=float(np.mean([spread for _, spread in found])),
        num_runs=sum(len(table) for table in tables),
        num_groups=len(tables),
    )


def _resampled(table: Floats, generator: np.random.Generator) -> Floats:
    rows: Floats = table[generator.integers(0, len(table), len(table))]
    return rows


def _kept(table: Floats, starts: Starts) -> tuple[float, float]:
    """Return mean gain and standard deviation of the score of a kept start."""
    scores = table[np.argsort(table[:, 0], kind="stable"), 1]
    weights = _kept_weights(len(scores), starts)
    mean = float(weights @ scores)
    spread = math.sqrt(max(0.0, float(weights @ (scores - mean) ** 2)))
    return mean - float(scores.mean()), spread


def _kept_weights(runs: int, starts: Starts) -> Floats:
    """Return the share of kept starts that each rank of loss provides; they add up to 1."""
    ways = math.comb(runs, starts.count) * starts.keep
    return np.array(
        [
            sum(
                math.comb(rank, lower) * math.comb(runs - 1 - rank, starts.count - 1 - lower)
                for lower in range(starts.keep)
                if lower <= starts.count - 1
            )
            / ways
            for rank in range(runs)
        ]
    )
