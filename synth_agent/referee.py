"""Verdicts from per-question scores. Pure functions: no files, no clock, no global random state.

The interval of one score is a percentile bootstrap over questions. `judge` decides between two
arms; its interval covers the questions, the training seeds of both arms and the number of tries.
`shrink` says what is left to expect of a difference that was picked among others, and
`seeds_needed` and `detectable_difference` say beforehand what a verdict takes.

Source of the bootstrap: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13 (percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synth_agent.errors import InvalidInput
from synth_agent.noise import LEAST_DEGREES, SeedNoise

RESAMPLES = 10_000
SEED = 20240601
_CHUNK = 250
"""Resamples drawn at once: bounds memory at 250 x questions, 10 MB for 5,000 questions."""

FALSE_CLAIMS = 0.05
"""Chance that any of the tries against one parent is called better when none is; so for worse."""
_OWN_SEEDS = 3
"""With so many seeds in both arms their own spread is looked at too, not only the pooled one."""
_MOST_SEEDS = 1_000
_GRID = 96

Outcome = Literal["better", "worse", "inside noise"]
Scores = Mapping[str, float]
"""Question id to score, 0 to 1, of one run."""


@dataclass(frozen=True)
class Measured:
    """A candidate minus its parent on one benchmark, with what blurs it."""

    points: float
    """Percentage points, means over seeds and questions."""
    own_variance: float
    """Of the candidate's seeds and of the questions, squared percentage points."""
    parent_variance: float
    """Of the parent's seeds: the same for every candidate that is compared with this parent."""
    degrees: float
    """Degrees of freedom of the two variances' sum."""
    question_sd: float
    """Standard deviation of the paired bootstrap over questions, in percentage points."""
    num_questions: int
    seed_sd: float
    """Spread of one run over seeds that the variances rest on, in percentage points."""
    own_spread: bool
    """Whether that is the two arms' own, since they scatter more than the pooled one allows."""

    @property
    def sd(self) -> float:
        """Standard deviation of `points`."""
        return math.sqrt(self.own_variance + self.parent_variance)


@dataclass(frozen=True)
class Judgement:
    """The verdict on one candidate on one benchmark, in percentage points."""

    points: float
    low: float
    """Ends of the interval that covers questions, seeds of both arms, and the number of tries."""
    high: float
    outcome: Outcome
    shrunk: float
    """What is left to expect of `points`, since the candidate was looked at among others."""
    tries: int
    """Candidates compared with this parent so far, this one included."""
    seeds: int
    parent_seeds: int
    num_questions: int
    question_sd: float
    seed_sd: float
    assumed: bool
    """Whether the seed spread is assumed rather than measured in this workspace."""
    basis: str
    """What the interval rests on, in words."""

    def words(self) -> str:
        """Return the difference as `claimed +3.1, expect +1.2`."""
        return f"claimed {self.points:+.1f}, expect {self.shrunk:+.1f}"


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


def level(tries: int) -> float:
    """Return the two-sided level of the interval of the k-th candidate, 2 a / (k (k + 1)).

    Verdicts fall one after the other and are not taken back, so each k may spend only its share of
    `FALSE_CLAIMS` a: the shares of all k, however many, add up to a on each side. The first
    candidate has the usual 95 % interval. a / k, Bonferroni's for a family that is known
    beforehand, adds up to 2.9 a over ten candidates. Holm's and Benjamini and Hochberg's steps need
    all the p-values at once, and the latter bounds the share of false claims, whereas it is
    the best of the candidates that gets claimed.

    Source: D. Foster and R. Stine, Alpha-investing, 2008, section 2 (spending sequences).
    """
    if tries < 1:
        raise ValueError("there is at least one try")
    return 2 * FALSE_CLAIMS / (tries * (tries + 1))


def measure(child: Sequence[Scores], parent: Sequence[Scores], noise: SeedNoise) -> Measured:
    """Take the difference of two arms and the variances that blur it.

    Per question the scores are averaged over seeds, and the arms are paired by question. The
    standard deviation of the paired bootstrap of a mean has a closed form, so nothing is drawn.
    What a seed changes in single answers counts both as a question's and as a seed's, which makes
    the sum too large rather than too small.

    Args:
        child: Scores of the candidate, one mapping a seed.
        parent: The same of the run that it is compared with.
        noise: Spread of one run's score over seeds.

    Raises:
        ValueError: If an arm has no run.
        InvalidInput: If the runs did not answer the same questions.

    Source: F. Satterthwaite, An approximate distribution of estimates of variance components,
    1946 (degrees of freedom of a sum of variances).
    """
    if not child or not parent:
        raise ValueError("each arm needs at least one run")
    for run in (*parent, *child):
        _check_same_questions(parent[0], run)
    questions = sorted(parent[0])
    ours, theirs = (
        100 * np.array([[run[q] for q in questions] for run in arm], dtype=np.float64)
        for arm in (child, parent)
    )  # (seeds, questions)
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    by_question = float(differences.var()) / len(questions)
    own_spread, own, others, degrees = _seed_variances(
        ours.mean(axis=1), theirs.mean(axis=1), noise
    )
    total = by_question + own + others
    parts = by_question**2 / max(1, len(questions) - 1) + (own + others) ** 2 / degrees
    # A spread from one or two pairs is often far too small, and then the sum's degrees far too many.
    if degrees >= LEAST_DEGREES and parts:
        degrees = total**2 / parts
    return Measured(
        points=float(differences.mean()),
        own_variance=by_question + own,
        parent_variance=others,
        degrees=degrees,
        question_sd=math.sqrt(by_question),
        num_questions=len(questions),
        seed_sd=(
            math.sqrt((own * len(child) + others * len(parent)) / 2) if own_spread else noise.sd
        ),
        own_spread=own_spread,
    )


def judge(
    child: Sequence[Scores],
    parent: Sequence[Scores],
    noise: SeedNoise,
    *,
    tries: int = 1,
    rivals: Sequence[Measured] = (),
) -> Judgement:
    """Decide whether a candidate is better than its parent, worse, or inside noise.

    Args:
        child: Scores of the candidate, one mapping a seed.
        parent: The same of the run that it is compared with.
        noise: Spread of one run's score over seeds on this benchmark.
        tries: Candidates compared with this parent so far, this one included.
        rivals: The other candidates, for the shrinkage.

    Raises:
        ValueError: If an arm has no run or there is no try.
        InvalidInput: If the runs did not answer the same questions.
    """
    found = measure(child, parent, noise)
    half = _t_quantile(level(tries) / 2, found.degrees) * found.sd
    low, high = found.points - half, found.points + half
    everyone = [found, *rivals]
    shrunk = shrink(
        [one.points for one in everyone],
        [one.own_variance for one in everyone],
        found.parent_variance,
    )
    return Judgement(
        points=found.points,
        low=low,
        high=high,
        outcome=_outcome(low, high),
        shrunk=float(shrunk[0]),
        tries=tries,
        seeds=len(child),
        parent_seeds=len(parent),
        num_questions=found.num_questions,
        question_sd=found.question_sd,
        seed_sd=found.seed_sd,
        assumed=noise.assumed and not found.own_spread,
        basis=_basis(found, noise, len(child), len(parent), tries),
    )


def shrink(
    points: Sequence[float], own_variances: Sequence[float], parent_variance: float
) -> NDArray[np.float64]:
    """Return what to expect of each candidate's difference, given all of them.

    The true differences are taken as normal around zero with an unknown spread, which the
    candidates themselves tell: if they scatter no more than noise does, little is left of any, and
    a posterior mean does not mind that the best one was picked. The spread is averaged over
    instead of fixed at its likeliest value, which for a few candidates is often zero. The parent's
    own luck is shared by all candidates and is taken off all of them.

    Args:
        points: Measured differences, percentage points.
        own_variances: Variances that are each candidate's own, squared points.
        parent_variance: Variance of the parent's score, squared points.

    Source: B. Efron and C. Morris, Stein's estimation rule and its competitors, 1973; the spread's
    half-Cauchy prior: A. Gelman, Prior distributions for variance parameters, 2006; selection:
    B. Efron, Tweedie's formula and selection bias, 2011.
    """
    measured = np.asarray(points, dtype=np.float64)  # (K,)
    own = np.asarray(own_variances, dtype=np.float64)
    scale = math.sqrt(float(own.mean()) + parent_variance)
    if scale == 0:
        return measured
    # Equal steps of the angle are equal steps of the half-Cauchy prior's probability.
    angles = (np.arange(_GRID) + 0.5) * (np.pi / 2 / _GRID)
    spread = (scale * np.tan(angles))[:, None] ** 2  # (G, 1)
    diagonal = np.maximum(spread + own, 1e-12)  # (G, K)
    weighted = measured / diagonal
    shared = 1 + parent_variance * (1 / diagonal).sum(axis=1, keepdims=True)
    pull = parent_variance * weighted.sum(axis=1, keepdims=True) / shared
    solved = (measured - pull) / diagonal  # covariance^-1 @ points, by Sherman and Morrison
    log_likelihood = -0.5 * (
        np.log(diagonal).sum(axis=1) + np.log(shared[:, 0]) + (measured * solved).sum(axis=1)
    )
    weights = np.exp(log_likelihood - log_likelihood.max())
    weights /= weights.sum()
    expected: NDArray[np.float64] = (weights[:, None] * spread * solved).sum(axis=0)
    return expected


def combine(judgements: Mapping[str, Judgement], weights: Mapping[str, float]) -> Judgement:
    """Weigh several benchmarks into one judgement, with weights that the user set.

    Nothing else makes one figure of two benchmarks. The half-widths add up as they are, which
    holds however the benchmarks move together.

    Raises:
        InvalidInput: If a benchmark has no weight, or a weight no benchmark.
    """
    if not judgements or judgements.keys() != weights.keys():
        raise InvalidInput(
            "Weights do not fit the benchmarks",
            f"weights for {', '.join(weights) or 'none'}; scored: {', '.join(judgements) or 'none'}",
            "give each scored benchmark one weight",
        )
    parts = [(weights[name], judgements[name]) for name in sorted(judgements)]
    points = sum(weight * one.points for weight, one in parts)
    half = sum(abs(weight) * (one.high - one.low) / 2 for weight, one in parts)
    named = ", ".join(f"{weights[name]:g} x {name}" for name in sorted(judgements))
    return Judgement(
        points=points,
        low=points - half,
        high=points + half,
        outcome=_outcome(points - half, points + half),
        shrunk=sum(weight * one.shrunk for weight, one in parts),
        tries=max(one.tries for _, one in parts),
        seeds=min(one.seeds for _, one in parts),
        parent_seeds=min(one.parent_seeds for _, one in parts),
        num_questions=sum(one.num_questions for _, one in parts),
        question_sd=sum(abs(weight) * one.question_sd for weight, one in parts),
        seed_sd=sum(abs(weight) * one.seed_sd for weight, one in parts),
        assumed=any(one.assumed for _, one in parts),
        basis=f"{named}, the weights that you set; half-widths added",
    )


def power(
    difference: float,
    seeds: int,
    seed_sd: float,
    question_sd: float = 0.0,
    *,
    tries: int = 1,
    degrees: float = math.inf,
) -> float:
    """Return the chance that a true difference is told from zero, on its own side.

    Args:
        difference: True difference, percentage points.
        seeds: Runs of each arm.
        seed_sd: Spread of one run's score over seeds, percentage points.
        question_sd: Standard deviation that the questions leave in the difference. More seeds do
            not make it smaller.
        tries: Which candidate against its parent it will be; see `level`.
        degrees: Degrees of freedom of `seed_sd` before these runs; infinite for a known spread.
    """
    from scipy.special import nctdtr, ndtr

    variance = 2 * seed_sd**2 / seeds
    total = variance + question_sd**2
    if total == 0:
        return 1.0 if difference else 0.0
    shift = abs(difference) / math.sqrt(total)
    known = max(degrees + 2 * (seeds - 1), 1.0)  # one run of each tells nothing of its spread
    freedom = known * (total / variance) ** 2 if variance else math.inf
    limit = _t_quantile(level(tries) / 2, freedom)
    if freedom > _NORMAL_DEGREES:
        return float(ndtr(shift - limit))
    # Far out scipy's noncentral t is not a number, as where replicates answer all but the same.
    return 1 - float(nctdtr(freedom, min(shift, _FAR), limit))


def seeds_needed(
    difference: float,
    seed_sd: float,
    question_sd: float = 0.0,
    *,
    chance: float = 0.8,
    tries: int = 1,
    degrees: float = math.inf,
) -> int | None:
    """Return the fewest runs of each arm that tell a difference with the given chance.

    None when `_MOST_SEEDS` are not enough, as when the questions alone blur more than that. The
    other arguments are those of `power`.
    """

    def enough(seeds: int) -> bool:
        found = power(difference, seeds, seed_sd, question_sd, tries=tries, degrees=degrees)
        return found >= chance

    if not enough(_MOST_SEEDS):
        return None
    too_few, seeds = 0, 1
    while not enough(seeds):
        too_few, seeds = seeds, min(2 * seeds, _MOST_SEEDS)
    while seeds - too_few > 1:
        middle = (too_few + seeds) // 2
        too_few, seeds = (too_few, middle) if enough(middle) else (middle, seeds)
    return seeds


def detectable_difference(
    seeds: int,
    seed_sd: float,
    question_sd: float = 0.0,
    *,
    chance: float = 0.8,
    tries: int = 1,
    degrees: float = math.inf,
) -> float:
    """Return the smallest difference, in points, that so many runs of each arm tell.

    The arguments are those of `seeds_needed`.
    """
    low, high = 0.0, 1.0
    while power(high, seeds, seed_sd, question_sd, tries=tries, degrees=degrees) < chance:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        found = power(middle, seeds, seed_sd, question_sd, tries=tries, degrees=degrees)
        low, high = (middle, high) if found < chance else (low, middle)
    return high


def power_words(
    seeds: int,
    difference: float,
    noise: SeedNoise,
    question_sd: float = 0.0,
    *,
    tries: int = 1,
) -> str:
    """Return `3 seeds tell 6.0 points apart; 3.0 points need 11`, for 80 % of the cases."""
    spread = {"tries": tries, "degrees": noise.degrees}
    told = detectable_difference(seeds, noise.sd, question_sd, **spread)  # type: ignore[arg-type]
    needed = seeds_needed(difference, noise.sd, question_sd, **spread)  # type: ignore[arg-type]
    each = "1 seed tells" if seeds == 1 else f"{seeds} seeds tell"
    more = f"you would need {needed} for" if needed else "no number of seeds is enough for"
    return f"{each} {told:.1f} points apart; {more} {difference:.1f} points"


def overall(outcomes: Sequence[Outcome]) -> Literal["better", "worse", "inside noise", "mixed"]:
    """Return one word for several benchmarks: a gain here and a loss there is `mixed`."""
    if "better" in outcomes and "worse" in outcomes:
        return "mixed"
    if "better" in outcomes:
        return "better"
    if "worse" in outcomes:
        return "worse"
    return "inside noise"


def _check_same_questions(parent: Scores, child: Scores) -> None:
    if parent.keys() == child.keys() and parent:
        return
    missing = len(parent.keys() - child.keys())
    surplus = len(child.keys() - parent.keys())
    raise InvalidInput(
        "Runs are not comparable",
        f"{missing} of {len(parent)} questions have no answer in the later run, "
        f"{surplus} have none in the earlier one",
        "evaluate both runs on the same benchmark files",
    )


def _seed_variances(
    child: NDArray[np.float64], parent: NDArray[np.float64], noise: SeedNoise
) -> tuple[bool, float, float, float]:
    """Return whether the arms' own spread counts, both means' variances and degrees of freedom.

    Recipes differ in their spread: where both arms have seeds enough of their own and scatter more
    than the upper bound of the pooled figure allows, their own spread counts (Welch's variances).
    """
    pooled = (False, noise.sd**2 / len(child), noise.sd**2 / len(parent), noise.degrees)
    if min(len(child), len(parent)) < _OWN_SEEDS:
        return pooled
    ours, theirs = (float(arm.var(ddof=1)) / len(arm) for arm in (child, parent))
    if ours + theirs <= noise.high**2 * (1 / len(child) + 1 / len(parent)):
        return pooled
    parts = ours**2 / (len(child) - 1) + theirs**2 / (len(parent) - 1)
    return True, ours, theirs, (ours + theirs) ** 2 / parts


_FAR = 1e6
"""Standard deviations, far beyond any limit that a test is held against."""
_NORMAL_DEGREES = 1e6
"""From here on the t distribution is taken as normal."""


def _t_quantile(upper_tail: float, degrees: float) -> float:
    from scipy.special import ndtri, stdtrit  # here: a third of a second that readers do not need

    if degrees > _NORMAL_DEGREES:
        return -float(ndtri(upper_tail))
    return -float(stdtrit(degrees, upper_tail))


def _basis(found: Measured, noise: SeedNoise, seeds: int, parent_seeds: int, tries: int) -> str:
    runs = f"{seeds} seed{'s' if seeds > 1 else ''} against {parent_seeds}"
    share = f"{100 * (1 - level(tries)):.4g} % interval"
    spread = f"{noise.sd:.1f} points, {noise.basis}"
    if found.own_spread:
        spread = f"{found.seed_sd:.1f} points, these runs' own spread, beyond the usual {spread}"
    return (
        f"{runs}; {found.num_questions:,} questions blur it by {found.question_sd:.1f} points; "
        f"one run's seed by {spread}; "
        f"try {tries} against this parent, so a {share}"
    )


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
