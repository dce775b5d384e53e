"""Every candidate recipe side by side: what is believed of it, what a run of it would tell, its cost.

Benchmarks stay apart wherever something is claimed. Only for choosing where to look next are they put
together: as the user weighs them, or else as the mean in units of each one's spread between seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from synth_agent.fit import estimate_cost, relative_times
from synth_agent.imported import list_imported
from synth_agent.planner.choosing import (
    believe,
    changes,
    differences,
    information_per_cost,
    knowledge_gradient,
)
from synth_agent.planner.evidence import (
    Evidence,
    comparable,
    gather,
    question_spread,
    same_steps,
    trainings,
)
from synth_agent.planner.features import FEATURES, family_of, featurise
from synth_agent.planner.model import INTERVAL_Z, Array, Beliefs
from synth_agent.planner.outlook import Outlook, look
from synth_agent.recipes import Recipe, recipe_from_mapping, steps_of
from synth_agent.runs import Kind, Prediction, Run
from synth_agent.workspace import Workspace

GENERATION_COST = 0.5
"""Generating captions or pictures takes so much of a run's other time."""
NO_BELIEFS = Beliefs((), np.zeros((0, 0)), np.zeros((0, 0, 0, 0)))
_DRAWS = 4000


@dataclass(frozen=True, eq=False)
class Candidate:
    """A recipe that could be run next."""

    recipe: Recipe
    position: int
    """In the features and beliefs."""
    runs: tuple[str, ...]
    """Ids of its succeeded runs with scores."""
    proposable: bool
    """Whether the planner may propose it by itself before it was run."""
    same_as: str
    """Run or recipe that provably has the same samples; mostly empty."""
    hours: float
    """GPU-hours, or runs where no run was timed."""
    differences: int = 1
    information: float = 0.0
    per_hour: float = 0.0
    mean_z: float = 0.0
    """Expected difference to the baseline in spreads between seeds, benchmarks put together."""
    kind: Kind = "explore"

    @property
    def replicates(self) -> int:
        """How often it was measured."""
        return len(self.runs)


@dataclass(frozen=True, eq=False)
class Assessment:
    """All candidates, and what they rest on."""

    candidates: tuple[Candidate, ...]
    evidence: Mapping[str, Evidence]
    beliefs: Beliefs
    question_sd: Mapping[str, float]
    """Spread of a difference by the choice of questions, in percentage points."""
    features: Array
    """(M, F)"""
    timed: bool
    """Whether costs are GPU-hours; else they are runs."""
    weights: Mapping[str, float]
    """The user's weighting of the benchmarks; mostly empty."""
    _by_steps: Mapping[str, Candidate] = field(repr=False, default_factory=dict)

    def of(self, recipe: Recipe) -> Candidate | None:
        """Return the candidate with a recipe's steps; None for the baseline."""
        return self._by_steps.get(_key(recipe))

    @cached_property
    def leader(self) -> Candidate | None:
        """The measured candidate that is believed best, if it is believed better than nothing."""
        measured = [candidate for candidate in self.candidates if candidate.runs]
        best = max(measured, key=lambda candidate: candidate.mean_z, default=None)
        return best if best is not None and best.mean_z > 0 else None

    @cached_property
    def lead_chance(self) -> float:
        """Chance that the leader is the best of the baseline and all that was measured."""
        if self.leader is None:
            return 1.0
        measured = [candidate.position for candidate in self.candidates if candidate.runs]
        belief = self.beliefs.combined(_shares(self.evidence, self.weights))
        part = belief.covariance[np.ix_(measured, measured)]
        draws = np.random.default_rng(0).multivariate_normal(
            belief.mean[measured], part, _DRAWS, check_valid="ignore"
        )
        winners = draws.argmax(axis=1)
        at = measured.index(self.leader.position)
        return float(np.mean((winners == at) & (draws[:, at] > 0)))

    def predictions(
        self, recipe: Recipe, by: str, parent: Run | None = None
    ) -> tuple[Prediction, ...]:
        """Return what is expected of a run of the recipe minus its parent, by benchmark.

        Args:
            recipe: One of the candidates.
            by: Whose predictions to call them.
            parent: A run of another candidate; None is the baseline.
        """
        candidate = self.of(recipe)
        if candidate is None:
            return ()
        other = None
        if parent is not None:
            matching = [one for one in self.candidates if same_steps(parent, one.recipe)]
            other = matching[0].position if matching else None
        return tuple(self._prediction(name, candidate.position, other, by) for name in self.beliefs)

    def _prediction(self, name: str, at: int, other: int | None, by: str) -> Prediction:
        belief, of = self.beliefs[name], self.evidence[name]
        mean, variance, start = belief.mean[at], belief.covariance[at, at], 0.0
        if other is not None:
            start = float(belief.mean[other])
            mean = mean - start
            variance += belief.covariance[other, other] - 2 * belief.covariance[at, other]
        points, zero = of.scale.leave(start + mean), of.scale.leave(start)
        # Seeds that were measured before are judged together with the new one, on either side.
        before = () if at == other else of.measured.get(at, ())
        against = () if other is None or at == other else of.measured.get(other, ())
        parents = of.baselines if other is None else len(against)
        noise = math.hypot(math.sqrt(1 + 1 / max(1, parents)) * of.seed_sd, self.question_sd[name])
        half = INTERVAL_Z * math.hypot(math.sqrt(max(variance, 0.0)), of.scale.noise(points, noise))
        ends = (points, *(of.scale.leave(start + mean + side) for side in (-half, half)))
        known = sum(before) - len(before) * (fmean(against) if against else 0.0)
        expected, low, high = (
            round(float((known + end - zero) / (len(before) + 1)), 2) for end in ends
        )
        return Prediction(name, expected, low, high, by)

    def cost_words(self, candidate: Candidate) -> str:
        """Return a candidate's cost in words."""
        if self.timed:
            return f"{candidate.hours:.2f} hours of compute"
        return f"{candidate.hours:.1f} times the time of an ordinary run"


def assess(
    workspace: Workspace,
    recipes: Iterable[Recipe],
    baseline: Recipe,
    settings: Mapping[str, Any],
    history: Sequence[Run],
) -> Assessment:
    """Return what is believed of the recipes, of those in the history, and of the leader's parts.

    Args:
        workspace: Where seed set and statistics are.
        recipes: Candidates; the baseline and equal ones are left out.
        baseline: What differences are to.
        settings: The settings of the next run.
        history: Past runs.
    """
    named = tuple(recipes)
    history = [run for run in history if run.plan.proposal.limits.samples is None]
    first = _assess(workspace, named, named, baseline, settings, history)
    if first.leader is None or not (parts := without_parts(first.leader.recipe)):
        return first
    second = _assess(workspace, (*named, *parts), named, baseline, settings, history)
    return replace(second, candidates=tuple(_with_kind(one, second) for one in second.candidates))


def without_parts(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return a linear recipe without each of its operator families; none when it has but one."""
    families = [family_of(operator.name) for operator in recipe.operators]
    distinct = [family for family in dict.fromkeys(families) if family]
    if recipe.data_plan is not None or len(distinct) < 2:
        return ()
    return tuple(
        Recipe(
            name=f"{recipe.name[:30].rstrip('-')}-without-{family.replace(' ', '-')}",
            title=f"{recipe.title}, without {family}",
            reason=f"Shows what {family} brings in {recipe.title}.",
            operators=tuple(o for o in recipe.operators if family_of(o.name) != family),
            options=_elsewhere(recipe, family),
        )
        for family in distinct
    )


def _elsewhere(recipe: Recipe, family: str) -> dict[str, Any]:
    """Return a recipe's options with an export path of its own."""
    options = dict(recipe.options)
    if isinstance(path := options.get("export_path"), str):
        stem, dot, suffix = path.rpartition(".")
        options["export_path"] = f"{stem}-without-{family.replace(' ', '-')}{dot}{suffix}"
    return options


def _assess(
    workspace: Workspace,
    proposable: Sequence[Recipe],
    named: Sequence[Recipe],
    baseline: Recipe,
    settings: Mapping[str, Any],
    history: Sequence[Run],
) -> Assessment:
    kept = _distinct(proposable, baseline, settings, history)
    known = {_key(recipe) for recipe in proposable}
    outlooks = look(workspace, [baseline, *kept], settings, history)
    features: Array = np.array(
        [featurise(r, o.volume) for r, o in zip(kept, outlooks[1:], strict=True)]
    )
    features = features.reshape(len(kept), len(FEATURES))
    tables = list_imported(workspace)
    evidence = gather(kept, history, baseline, settings, tables)
    results = {name: of.results for name, of in evidence.items()}
    beliefs = believe(features, results) if kept else NO_BELIEFS
    cost = estimate_cost(workspace, baseline, settings, history)
    hour = 1.0 if cost.seconds is None else cost.seconds / 3600
    counts = [outlook.samples for outlook in outlooks]
    times = relative_times(settings, history, counts[0] or 0, counts[1:])
    measured = trainings([r for r in history if r.is_measured and comparable(r, settings)])
    runs = [tuple(run.id for run in measured if same_steps(run, recipe)) for recipe in kept]
    candidates = tuple(
        Candidate(
            recipe,
            position,
            runs[position],
            _key(recipe) in known,
            _same_as(position, [baseline, *kept], outlooks, runs),
            hour * times[position] * _relative_cost(recipe),
        )
        for position, recipe in enumerate(kept)
    )
    weights = workspace.settings.weights
    candidates = _with_information(candidates, features, evidence, beliefs, weights)
    return Assessment(
        candidates,
        evidence,
        beliefs,
        {name: _question_sd(name, baseline, settings, history) for name in evidence},
        features,
        cost.seconds is not None,
        weights,
        {_key(candidate.recipe): candidate for candidate in candidates},
    )


def _with_information(
    candidates: tuple[Candidate, ...],
    features: Array,
    evidence: Mapping[str, Evidence],
    beliefs: Beliefs,
    weights: Mapping[str, float],
) -> tuple[Candidate, ...]:
    if not candidates:
        return ()
    tried = [candidate.position for candidate in candidates if candidate.runs]
    combined = beliefs.combined(_shares(evidence, weights))
    if _weighed(evidence, weights):
        gains = knowledge_gradient(combined, tried, 1.0)
    else:
        units = {name: _unit(evidence[name]) for name in beliefs}
        each = [knowledge_gradient(of, tried, units[n]) / units[n] for n, of in beliefs.items()]
        gains = np.asarray(np.mean(each, axis=0))
    counts = changes(features, tried)
    costs = np.array([candidate.hours for candidate in candidates])
    rates = information_per_cost(gains, counts, costs)
    means = combined.mean
    return tuple(
        replace(
            one,
            differences=int(counts[one.position]),
            information=float(gains[one.position]),
            per_hour=float(rates[one.position]),
            mean_z=float(means[one.position]),
            kind="replicate" if one.runs else "explore",
        )
        for one in candidates
    )


def _with_kind(candidate: Candidate, assessment: Assessment) -> Candidate:
    """Return a candidate with its kind, seen from the leader."""
    leader = assessment.leader
    if candidate.runs or leader is None:
        return candidate
    mine, parts = _key(candidate.recipe), without_parts(leader.recipe)
    if mine in {_key(part) for part in parts}:
        return replace(candidate, kind="ablate")
    vector, best = assessment.features[candidate.position], assessment.features[leader.position]
    nothing = np.zeros_like(best)
    builds_on = differences(vector, nothing) >= differences(best, nothing)
    if builds_on and differences(vector, best) <= 1:
        return replace(candidate, kind="exploit")
    return candidate


def _shares(evidence: Mapping[str, Evidence], weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each benchmark's belief counts when they are put together.

    Without weights: the mean over benchmarks in units of each one's noise. With weights: the user's
    figure of percentage points, in units of its own noise, so that a run measures it with noise 1.
    """
    weighed = _weighed(evidence, weights)
    if not weighed:
        return {name: 1.0 / len(evidence) / _unit(of) for name, of in evidence.items()}
    points = {name: weight * evidence[name].scale.slope for name, weight in weighed.items()}
    noise = math.hypot(*(share * _unit(evidence[name]) for name, share in points.items()))
    return {name: share / noise for name, share in points.items()}


def _weighed(evidence: Mapping[str, Evidence], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of the benchmarks that anything is known of."""
    return {name: weight for name, weight in weights.items() if name in evidence}


def _unit(evidence: Evidence) -> float:
    return evidence.results.unit


def _distinct(
    recipes: Sequence[Recipe], baseline: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> list[Recipe]:
    """Return the recipes and those of comparable runs, each steps once, without the baseline."""
    found = {_key(baseline): baseline}
    for recipe in recipes:
        found.setdefault(_key(recipe), recipe)
    for run in history:
        if run.is_measured and comparable(run, settings):
            mapping = {k: v for k, v in run.plan.proposal.recipe.items() if k != "name"}
            recipe = replace(
                recipe_from_mapping(run.plan.proposal.slug, mapping), title=run.plan.proposal.title
            )
            found.setdefault(_key(recipe), recipe)
    del found[_key(baseline)]
    return list(found.values())


def _same_as(
    position: int,
    recipes: Sequence[Recipe],
    outlooks: Sequence[Outlook],
    runs: Sequence[tuple[str, ...]],
) -> str:
    """Return the baseline, or another recipe that was run, that has the same samples."""
    mine = outlooks[position + 1]
    if runs[position]:
        return ""
    if mine.is_same(outlooks[0]):
        return f"the baseline ({recipes[0].name})"
    for other, ids in enumerate(runs):
        if other != position and ids and mine.is_same(outlooks[other + 1]):
            return f"run {ids[0]} ({recipes[other + 1].name})"
    return ""


def _relative_cost(recipe: Recipe) -> float:
    families = {family_of(operator.name) for operator in recipe.all_operators()}
    return 1.0 + GENERATION_COST * bool(families & {"new captions", "new pictures"})


def _question_sd(
    name: str, baseline: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> float:
    """Return the spread of a difference by the choice of questions: paired if any was compared."""
    widths = [
        question_spread(run, name, run.scores[name])
        for run in history
        if name in run.comparisons and name in run.scores and comparable(run, settings)
    ]
    if widths:
        return float(np.median(widths))
    scores = [
        run.scores[name] for run in history if name in run.scores and same_steps(run, baseline)
    ]
    return (scores[-1].high - scores[-1].low) / 3.92 if scores else 0.0


def _key(recipe: Recipe) -> str:
    return repr(steps_of(recipe.mapping()))
