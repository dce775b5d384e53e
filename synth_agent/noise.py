"""How far a benchmark's score moves when nothing but the training seed changes.

The spread is measured from replicates: runs that trained on the same samples with the same settings
and differ in the seed. Before there are any, a figure from elsewhere stands in and is called
assumed. Pure functions: no files, no clock, no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from synth_agent.runs import Run, digest

LEAST_DEGREES = 4
"""Below so many degrees of freedom a measured spread is joined with the assumed one: with one
pair of replicates the true spread may be sixteen times the measured one."""
_NO_CHANGE = ("seed", "compute")
"""Settings that replicates may differ in."""


@dataclass(frozen=True)
class SeedNoise:
    """The standard deviation of one run's score over training seeds, on fixed questions."""

    sd: float
    """Percentage points."""
    degrees: float
    """Degrees of freedom that the figure rests on, for an assumed one those it is given."""
    high: float
    """Upper end of the one-sided 95 % interval of `sd`, in percentage points."""
    assumed: bool
    """Whether any part of it comes from outside this workspace."""
    basis: str
    """Where it comes from, in words."""


@dataclass(frozen=True)
class Assumption:
    """A spread over seeds that was measured elsewhere."""

    sd: float
    """Percentage points, or a share of the score when `is_share`."""
    is_share: bool
    degrees: float
    source: str


LOWEST_SCORE = 15.0
"""Percent: a spread that is a share of the score is taken of so much at least. The published scores lie
above; near zero a share of the score would promise that nothing moves."""
_MINI_WORLD = "the mini world's 7 recipes over 10 seeds each"
_PUBLISHED = "the published table's authors, about 0.02 of the score"
_PUBLISHED_MMBENCH = "0.10 of the score, five times the published TextVQA figure"
ASSUMPTIONS: Mapping[str, Mapping[str, Assumption]] = {
    # benchmarks/results/miniworld_seeds.jsonl, pooled over its recipes.
    "mgm-mini": {
        "textvqa": Assumption(9.4, False, 63, _MINI_WORLD),
        "mmbench": Assumption(9.0, False, 63, _MINI_WORLD),
    },
    # One statement and two pairs of near replicates that agree with it: worth few runs. MMBench
    # jumps between two levels in that table, so a wider figure stands in for it.
    "": {
        "textvqa": Assumption(0.02, True, 4, _PUBLISHED),
        "mmbench": Assumption(0.10, True, 4, _PUBLISHED_MMBENCH),
    },
}


def pooled(groups: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Pool the spread inside groups of replicates.

    Args:
        groups: Scores in percent; each group holds the replicates of one plan. Groups of one say
            nothing and are left out.

    Returns:
        The spread with its degrees of freedom, sum of (n - 1); None without replicates.
    """
    told = [np.asarray(group, dtype=np.float64) for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in told)
    if not degrees:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in told)
    sd = math.sqrt(squares / degrees)
    runs = sum(len(group) for group in told)
    plans = "1 plan" if len(told) == 1 else f"{len(told)} plans"
    basis = f"measured here on {runs} runs of {plans}, {degrees} degrees of freedom"
    return SeedNoise(sd, degrees, _upper(sd, degrees), False, basis)


def assumed_noise(benchmark: str, model: str, percent: float) -> SeedNoise:
    """Return the spread to assume before any replicate.

    Args:
        benchmark: `textvqa` or `mmbench`; any other is given the wider of the two figures.
        model: Name of the model as in the settings.
        percent: Score of the parent, since published spreads are shares of a score.
    """
    known = ASSUMPTIONS.get(model, ASSUMPTIONS[""])
    found = known.get(benchmark) or max(known.values(), key=lambda one: one.sd)
    sd = found.sd * max(percent, LOWEST_SCORE) if found.is_share else found.sd
    basis = f"assumed from {found.source}"
    return SeedNoise(sd, found.degrees, _upper(sd, found.degrees), True, basis)


def seed_noise(groups: Sequence[Sequence[float]], assumed: SeedNoise) -> SeedNoise:
    """Return the measured spread, joined with the assumed one while few replicates exist.

    The assumed variance counts as `LEAST_DEGREES` degrees of freedom at most, and no longer at all
    once the replicates have as many of their own.

    Source: G. Smyth, Linear models and empirical Bayes methods for assessing differential
    expression, 2004, section 3 (the moderated variance).
    """
    measured = pooled(groups)
    if measured is None:
        return assumed
    if measured.degrees >= LEAST_DEGREES:
        return measured
    weight = min(assumed.degrees, LEAST_DEGREES)
    degrees = measured.degrees + weight
    sd = math.sqrt((measured.degrees * measured.sd**2 + weight * assumed.sd**2) / degrees)
    basis = (
        f"{measured.basis}, too few alone, so joined with {assumed.sd:.1f} points {assumed.basis}"
    )
    return SeedNoise(sd, degrees, _upper(sd, degrees), True, basis)


def replicate_key(run: Run) -> str | None:
    """Return what a run's replicates share: the processed samples and all settings but the seed.

    Recipes that keep the very same samples share it too, since only their samples reach training.
    None for a run whose samples were never made.
    """
    process = run.stages["process"]
    samples = process.result.get("digest") or process.key
    if samples is None or process.status not in ("succeeded", "reused"):
        return None
    proposal = run.plan.proposal
    settings = {name: value for name, value in proposal.settings.items() if name not in _NO_CHANGE}
    return digest([samples, settings, proposal.limits.samples])


def replicates(runs: Sequence[Run], benchmark: str) -> dict[str, list[Run]]:
    """Group the runs that have a score by what replicates share, one run a seed.

    Runs of one group and seed are the same training: the first of them counts.

    Returns:
        `replicate_key` to runs, in the order given.
    """
    groups: dict[str, dict[object, Run]] = {}
    for run in runs:
        key = replicate_key(run) if benchmark in run.scores else None
        if key is not None:
            groups.setdefault(key, {}).setdefault(run.plan.proposal.settings.get("seed"), run)
    return {key: list(by_seed.values()) for key, by_seed in groups.items()}


def _upper(sd: float, degrees: float) -> float:
    """Return the one-sided 95 % upper bound of a standard deviation of normal values."""
    from scipy.special import (
        chdtri,
    )  # here: it costs a third of a second, which readers do not need

    return sd * math.sqrt(degrees / float(chdtri(degrees, 0.95)))


def answered_the_same(runs: Sequence[Run], benchmark: str, like: Run) -> list[Run]:
    """Return the runs that answered the questions that `like` did, as far as their scores tell."""
    mine = like.scores[benchmark]
    same = (mine.split, mine.num_questions, mine.scorer)
    scores = ((run, run.scores.get(benchmark)) for run in runs)
    return [run for run, s in scores if s and (s.split, s.num_questions, s.scorer) == same]


def workspace_noise(runs: Sequence[Run], benchmark: str, parent: Run) -> SeedNoise:
    """Return the spread over seeds that a workspace's runs show, joined with what is assumed.

    Args:
        runs: Runs of the workspace; those that answered other questions are left out.
        benchmark: A benchmark that `parent` was scored on.
        parent: The run that others are compared with.
    """
    model = parent.plan.proposal.settings.get("model", {}).get("name", "")
    assumed = assumed_noise(benchmark, model, parent.scores[benchmark].percent)
    groups = replicates(answered_the_same(runs, benchmark, parent), benchmark).values()
    return seed_noise(
        [[run.scores[benchmark].percent for run in group] for group in groups], assumed
    )
