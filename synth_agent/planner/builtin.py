"""The planner that needs no key and no network.

Deterministic: the baseline first, then the run that a statistical model (`model`) expects to teach most
per GPU-hour (`choosing`): a recipe not yet tried, the leading recipe with another training seed, or the
leading recipe without one of its parts. It leaves out what was tried, what a person rejected, what lacks
a model, and what provably makes the samples of a recipe that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from synth_agent.errors import InvalidInput, nearest
from synth_agent.fit import estimate_cost
from synth_agent.planner.assessment import Assessment, Candidate, assess
from synth_agent.planner.evidence import same_steps
from synth_agent.planner.features import family_of
from synth_agent.recipes import (
    Recipe,
    does_same,
    list_recipes,
    load_catalogue,
    validate_recipe,
)
from synth_agent.runs import BUILTIN_PLANNER, Kind, Prediction, Proposal, Rejection, Run
from synth_agent.weighting import weighting_words
from synth_agent.wording import benchmark_name
from synth_agent.workspace import Workspace

SETTINGS_OF_A_RUN = ("seed", "data", "model", "pretrain", "finetune", "evaluate", "compute")
MODEL_NAME = "built-in model"
"""Whose predictions they are."""
CERTAIN_LEAD = 0.9
"""Chance that the leading recipe is the best of those measured above which it is not repeated."""
MOST_SEEDS = 10
"""Runs of one recipe, seeds apart, that the planner proposes by itself."""


def workspace_settings(workspace: Workspace) -> dict[str, Any]:
    """Return every setting that the stages of a run use, as plain data."""
    settings = workspace.settings.model_dump(mode="json")
    return {section: settings[section] for section in SETTINGS_OF_A_RUN}


class BuiltinPlanner:
    """Baseline first, then by expected information per GPU-hour."""

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        """Return the next proposal, or None when nothing is left that could change what is best.

        Raises:
            InvalidInput: If a recipe cannot be read, or the baseline recipe is missing.
        """
        settings = workspace_settings(workspace)
        recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
        baseline_recipe = _baseline_recipe(workspace, recipes)
        baseline = finished_baseline(baseline_recipe, settings, history)
        if baseline is None:
            return _baseline_proposal(workspace, baseline_recipe, settings, history)
        assessment = assess(workspace, recipes.values(), baseline_recipe, settings, history)
        options = [
            candidate
            for candidate in assessment.candidates
            if _is_open(candidate, assessment, settings, history, rejections)
        ]
        # When none can run, the strongest goes to the gate, which says what it lacks.
        runnable = [option for option in options if _can_run(workspace, option.recipe)]
        best = max(runnable or options, key=_order(assessment), default=None)
        if best is None:
            return None
        return _chosen_proposal(workspace, assessment, best, settings, baseline, history)


def _order(assessment: Assessment) -> Callable[[Candidate], tuple[bool, float, float, str]]:
    """Return the order of candidates, the largest first to run.

    By expected information per cost. While nothing but the baseline was measured, recipes with a
    published result go before the others: the first one shows whether such results carry over.
    """
    measured = any(candidate.runs for candidate in assessment.candidates)

    def order(option: Candidate) -> tuple[bool, float, float, str]:
        published = bool(option.recipe.published) and not measured
        return published, option.per_hour, option.mean_z, _reversed_name(option.recipe.name)

    return order


def predict(
    workspace: Workspace,
    recipe: Recipe,
    settings: Mapping[str, Any],
    history: Sequence[Run],
    parent: Run | None = None,
) -> tuple[Prediction, ...]:
    """Return what the built-in model expects of a run, minus its parent, by benchmark.

    Args:
        workspace: Where the other recipes and the baseline are.
        recipe: What would be run, known to the workspace or not.
        settings: The settings of the run.
        history: Past runs.
        parent: What it is compared with; None means the baseline.

    Returns:
        Percentage points with the 80 % interval of the measured difference; empty when there is
        nothing to expect it from, and for the baseline itself.

    Raises:
        InvalidInput: If a recipe cannot be read, or the baseline recipe is missing.
    """
    recipes = {known.name: known for known in list_recipes(workspace)}
    baseline = _baseline_recipe(workspace, recipes)
    if does_same(recipe.mapping(), baseline.mapping()):
        return ()
    assessment = assess(workspace, [*recipes.values(), recipe], baseline, settings, history)
    to = None if parent is None or same_steps(parent, baseline) else parent
    return assessment.predictions(recipe, MODEL_NAME, to)


def propose_recipe(workspace: Workspace, recipe: Recipe, history: Sequence[Run]) -> Proposal:
    """Return a proposal for a recipe that a person chose or edited.

    It is compared with the latest finished baseline when there is one.
    """
    settings = workspace_settings(workspace)
    recipes = {known.name: known for known in list_recipes(workspace)}
    known_baseline = recipes.get(workspace.settings.baseline)
    if recipe.name == workspace.settings.baseline:
        return _baseline_proposal(workspace, recipe, settings, history)
    proposal = _recipe_proposal(workspace, recipe, settings, None, history)
    if known_baseline is None:
        return proposal
    baseline = finished_baseline(known_baseline, settings, history)
    assessment = assess(workspace, [*recipes.values(), recipe], known_baseline, settings, history)
    candidate = assessment.of(recipe)
    predictions = () if candidate is None else assessment.predictions(recipe, MODEL_NAME)
    reason = [proposal.reason, _prediction_words(predictions)]
    if candidate is not None and candidate.same_as:
        reason.append(
            f"It keeps exactly the samples of {candidate.same_as}: training would repeat that run."
        )
    return replace(
        proposal,
        reason=" ".join(filter(None, reason)),
        evidence=_evidence(baseline, recipe),
        parent=baseline.id if baseline else None,
        **_expectations(recipe, predictions),
    )


def finished_baseline(
    recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> Run | None:
    """Return the latest succeeded run of the baseline recipe under these settings."""
    for run in reversed(history):
        if run.is_measured and _is_same(run.plan.proposal, recipe, settings):
            return run
    return None


def _baseline_recipe(workspace: Workspace, recipes: Mapping[str, Recipe]) -> Recipe:
    name = workspace.settings.baseline
    if name not in recipes:
        raise InvalidInput(
            "Baseline recipe is missing",
            f"{workspace.settings_file}: baseline = {name!r}, but "
            f"{workspace.recipes} has no such recipe",
            nearest(name, recipes)
            if recipes
            else f"copy recipes there, {name}.yaml among them: the sources have some in recipes/",
        )
    return recipes[name]


def _is_open(
    candidate: Candidate,
    assessment: Assessment,
    settings: Mapping[str, Any],
    history: Sequence[Run],
    rejections: Sequence[Rejection],
) -> bool:
    """Tell whether the planner may propose a candidate by itself."""
    recipe = candidate.recipe
    if candidate.same_as or _was_rejected(recipe, settings, rejections):
        return False
    if candidate.replicates == 0:
        return candidate.proposable and not _was_tried(recipe, settings, history)
    return (
        candidate is assessment.leader
        and assessment.lead_chance < CERTAIN_LEAD
        and candidate.replicates < MOST_SEEDS
        and not _was_tried(recipe, _next_seed(recipe, settings, history), history)
    )


def _can_run(workspace: Workspace, recipe: Recipe) -> bool:
    """Tell whether a recipe is valid and the models it names are there."""
    try:
        validate_recipe(recipe, load_catalogue(), workspace)
    except InvalidInput:
        return False
    return True


def _next_seed(
    recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> dict[str, Any]:
    """Return the settings with the first training seed that no run of the recipe had."""
    used = {run.plan.proposal.settings.get("seed") for run in history if same_steps(run, recipe)}
    seed = int(settings["seed"])
    while seed in used:
        seed += 1
    return {**settings, "seed": seed}


def _baseline_proposal(
    workspace: Workspace, recipe: Recipe, settings: dict[str, Any], history: Sequence[Run]
) -> Proposal:
    return Proposal(
        title="Measure the baseline",
        slug=recipe.name,
        kind="baseline",
        reason=(
            "Every later run is compared with this one on the same questions, so it comes first. "
            + recipe.reason
        ).strip(),
        evidence=(),
        parent=None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=settings,
        cost=estimate_cost(workspace, recipe, settings, history),
        proposed_by=BUILTIN_PLANNER,
    )


def _recipe_proposal(
    workspace: Workspace,
    recipe: Recipe,
    settings: dict[str, Any],
    baseline: Run | None,
    history: Sequence[Run],
) -> Proposal:
    same = [run for run in history if _is_same(run.plan.proposal, recipe, settings)]
    repeated = any(run.is_measured for run in same)
    kind: Kind = "replicate" if repeated else "explore"
    return Proposal(
        title=recipe.title,
        slug=recipe.name,
        kind=kind,
        reason=" ".join(filter(None, (recipe.reason, _published_words(recipe)))),
        evidence=_evidence(baseline, recipe),
        parent=baseline.id if baseline else None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=settings,
        cost=estimate_cost(workspace, recipe, settings, history),
        proposed_by=BUILTIN_PLANNER,
    )


def _chosen_proposal(
    workspace: Workspace,
    assessment: Assessment,
    chosen: Candidate,
    settings: dict[str, Any],
    baseline: Run,
    history: Sequence[Run],
) -> Proposal:
    recipe = chosen.recipe
    if chosen.replicates:
        settings = _next_seed(recipe, settings, history)
    proposal = _recipe_proposal(workspace, recipe, settings, baseline, history)
    predictions = assessment.predictions(recipe, MODEL_NAME)
    reason = (
        proposal.reason,
        _kind_words(assessment, chosen, settings),
        _prediction_words(predictions),
        f"Expected gain of the best known result{_goal_words(assessment)} by this run: "
        f"{chosen.information:.2f} times the spread between seeds, for "
        f"{assessment.cost_words(chosen)}.",
    )
    return replace(
        proposal,
        title=f"Repeat: {recipe.title}" if chosen.replicates else recipe.title,
        kind=chosen.kind,
        reason=" ".join(filter(None, reason)),
        evidence=_evidence(baseline, recipe, *chosen.runs),
        **_expectations(recipe, predictions),
    )


def _goal_words(assessment: Assessment) -> str:
    """Return which figure of the benchmarks the user asked for, if any."""
    if not assessment.weights:
        return ""
    return f" in your weighting ({weighting_words(assessment.weights)})"


def _kind_words(assessment: Assessment, chosen: Candidate, settings: Mapping[str, Any]) -> str:
    leader = assessment.leader
    if chosen.replicates:
        times = "once" if chosen.replicates == 1 else f"{chosen.replicates} times"
        return (
            f"It leads after being measured {times}, with a chance of "
            f"{100 * assessment.lead_chance:.0f} % of being the best of those measured: another "
            f"run with seed {settings['seed']} tells more than another recipe."
        )
    if leader is None and not any(one.runs for one in assessment.candidates):
        if recipe_published := chosen.recipe.published:
            row = f"row {recipe_published['row']:.0f}"
            return (
                "Nothing but the baseline was measured yet, so a recipe with a published result "
                f"({row}) comes first: it shows whether such results carry over."
            )
        return ""
    if chosen.kind == "ablate" and leader is not None:
        return f"{leader.recipe.title} leads; without this part it shows what the part brings."
    if chosen.kind == "exploit" and leader is not None:
        return f"It is one change away from {leader.recipe.title}, which leads."
    if chosen.differences > 1:
        return f"{chosen.differences} changes at once: a gain could not be put down to one of them."
    return ""


def _evidence(baseline: Run | None, recipe: Recipe, *runs: str) -> tuple[str, ...]:
    published = f"published table, row {recipe.published['row']:.0f}" if recipe.published else ""
    return tuple(filter(None, (baseline.id if baseline else "", *runs, published)))


def _expectations(recipe: Recipe, predictions: tuple[Prediction, ...]) -> dict[str, Any]:
    """Return hypothesis, predictions and what would refute the hypothesis, as fields."""
    if not predictions:
        return {"predictions": ()}
    families = [family_of(operator.name) for operator in recipe.all_operators()]
    named = ", ".join(dict.fromkeys(filter(None, families))) or "its operators"
    main = max(predictions, key=lambda one: one.expected / max(one.high - one.low, 1e-9))
    name = benchmark_name(main.benchmark)
    if main.expected > 0:
        hypothesis = f"What the recipe does ({named}) makes the model better on {name}."
        refuted = f"A mean difference on {name} at or below zero over two seeds."
    else:
        hypothesis = f"What the recipe does ({named}) brings nothing on {name}."
        refuted = f"A gain on {name} that is outside the noise, with two seeds."
    return {
        "hypothesis": hypothesis,
        "predictions": predictions,
        "refuted_by": refuted,
    }


def _prediction_words(predictions: Sequence[Prediction]) -> str:
    if not predictions:
        return ""
    parts = [
        f"{one.expected:+.1f} points on {benchmark_name(one.benchmark)} "
        f"(80 %: {one.low:+.1f} to {one.high:+.1f})"
        for one in predictions
    ]
    return f"The model expects {' and '.join(parts)} against the baseline."


def _published_words(recipe: Recipe) -> str:
    if not recipe.published:
        return "No published result is known for it."
    gains = recipe.published
    return (
        f"A published experiment of this kind reached {gains['textvqa']:.2f} x the baseline on "
        f"TextVQA and {gains['mmbench']:.2f} x on MMBench (one run each, another data set)."
    )


def _reversed_name(name: str) -> str:
    """Make `max` prefer the alphabetically first of equals."""
    return "".join(chr(0x10FFFF - ord(letter)) for letter in name)


def _was_tried(recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]) -> bool:
    return any(_is_same(run.plan.proposal, recipe, settings) for run in history if run.settles)


def _was_rejected(
    recipe: Recipe, settings: Mapping[str, Any], rejections: Sequence[Rejection]
) -> bool:
    """Tell whether a person turned the recipe down; another seed is no new recipe."""
    return any(_is_same(rejection.proposal, recipe, settings, "seed") for rejection in rejections)


def _is_same(proposal: Proposal, recipe: Recipe, settings: Mapping[str, Any], *but: str) -> bool:
    """Tell whether a proposal is this recipe under these settings; the machine does not count."""
    if not does_same(proposal.recipe, recipe.mapping()):
        return False
    compared = [section for section in SETTINGS_OF_A_RUN if section not in ("compute", *but)]
    return all(proposal.settings.get(section) == settings.get(section) for section in compared)
