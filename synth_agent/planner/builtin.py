"""The planner that needs no key and no network.

Deterministic: the baseline first, then the workspace's recipes in order of the evidence that their
headers state, leaving out what was tried with the same settings, what a person rejected, and what lacks
a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from synth_agent.errors import InvalidInput, nearest
from synth_agent.fit import estimate_cost
from synth_agent.recipes import (
    Recipe,
    list_recipes,
    load_catalogue,
    steps_of,
    validate_recipe,
)
from synth_agent.runs import Kind, Proposal, Rejection, Run
from synth_agent.workspace import Workspace

SETTINGS_OF_A_RUN = ("seed", "data", "model", "pretrain", "finetune", "evaluate", "compute")
_NAME = "built-in planner"


def workspace_settings(workspace: Workspace) -> dict[str, Any]:
    """Return every setting that the stages of a run use, as plain data."""
    settings = workspace.settings.model_dump(mode="json")
    return {section: settings[section] for section in SETTINGS_OF_A_RUN}


class BuiltinPlanner:
    """Baseline first, then untried recipes, strongest published evidence first."""

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        """Return the next proposal, or None when every recipe was tried or rejected.

        Raises:
            InvalidInput: If a recipe cannot be read, or the baseline recipe is missing.
        """
        settings = workspace_settings(workspace)
        recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
        baseline_name = workspace.settings.baseline
        if baseline_name not in recipes:
            raise InvalidInput(
                "Baseline recipe is missing",
                f"{workspace.settings_file}: baseline = {baseline_name!r}, but "
                f"{workspace.recipes} has no such recipe",
                nearest(baseline_name, recipes),
            )
        baseline = finished_baseline(recipes[baseline_name], settings, history)
        if baseline is None:
            return _baseline_proposal(workspace, recipes[baseline_name], settings, history)
        untried = [
            recipe
            for recipe in recipes.values()
            if recipe.name != baseline_name
            and not _was_tried(recipe, settings, history)
            and not _was_rejected(recipe, settings, rejections)
        ]
        if not untried:
            return None
        # When none can run, the strongest goes to the gate, which says what it lacks.
        runnable = [recipe for recipe in untried if _can_run(workspace, recipe)]
        best = max(runnable or untried, key=_strength)
        return _recipe_proposal(workspace, best, settings, baseline, history)


def _can_run(workspace: Workspace, recipe: Recipe) -> bool:
    """Tell whether a recipe is valid and the models it names are there."""
    try:
        validate_recipe(recipe, load_catalogue(), workspace)
    except InvalidInput:
        return False
    return True


def propose_recipe(workspace: Workspace, recipe: Recipe, history: Sequence[Run]) -> Proposal:
    """Return a proposal for a recipe that a person chose or edited.

    It is compared with the latest finished baseline when there is one.
    """
    settings = workspace_settings(workspace)
    recipes = {known.name: known for known in list_recipes(workspace)}
    known_baseline = recipes.get(workspace.settings.baseline)
    baseline = (
        finished_baseline(known_baseline, settings, history) if known_baseline is not None else None
    )
    if recipe.name == workspace.settings.baseline:
        return _baseline_proposal(workspace, recipe, settings, history)
    return _recipe_proposal(workspace, recipe, settings, baseline, history)


def finished_baseline(
    recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> Run | None:
    """Return the latest succeeded run of the baseline recipe under these settings."""
    for run in reversed(history):
        if run.status == "succeeded" and _is_same(run.plan.proposal, recipe, settings):
            return run
    return None


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
        proposed_by=_NAME,
    )


def _recipe_proposal(
    workspace: Workspace,
    recipe: Recipe,
    settings: dict[str, Any],
    baseline: Run | None,
    history: Sequence[Run],
) -> Proposal:
    same = [run for run in history if _is_same(run.plan.proposal, recipe, settings)]
    repeated = any(run.status == "succeeded" for run in same)
    kind: Kind = "replicate" if repeated else "explore"
    published = f"published table, row {recipe.published['row']:.0f}" if recipe.published else ""
    evidence = tuple(filter(None, (baseline.id if baseline else "", published)))
    return Proposal(
        title=recipe.title,
        slug=recipe.name,
        kind=kind,
        reason=" ".join(filter(None, (recipe.reason, _published_words(recipe)))),
        evidence=evidence,
        parent=baseline.id if baseline else None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=settings,
        cost=estimate_cost(workspace, recipe, settings, history),
        proposed_by=_NAME,
    )


def _published_words(recipe: Recipe) -> str:
    if not recipe.published:
        return "No published result is known for it."
    gains = recipe.published
    return (
        f"A published experiment of this kind reached {gains['textvqa']:.2f} x the baseline on "
        f"TextVQA and {gains['mmbench']:.2f} x on MMBench (one run each, another data set)."
    )


def _strength(recipe: Recipe) -> tuple[float, str]:
    """Order of evidence: geometric mean of the published gains; unpublished recipes come last."""
    if not recipe.published:
        return (0.0, _reversed_name(recipe.name))
    gain = math.sqrt(recipe.published["textvqa"] * recipe.published["mmbench"])
    return (gain, _reversed_name(recipe.name))


def _reversed_name(name: str) -> str:
    """Make `max` prefer the alphabetically first of equals."""
    return "".join(chr(0x10FFFF - ord(letter)) for letter in name)


def _was_tried(recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]) -> bool:
    return any(
        _is_same(run.plan.proposal, recipe, settings)
        for run in history
        if run.status in ("succeeded", "failed", "running", "interrupted", "approved")
    )


def _was_rejected(
    recipe: Recipe, settings: Mapping[str, Any], rejections: Sequence[Rejection]
) -> bool:
    return any(_is_same(rejection.proposal, recipe, settings) for rejection in rejections)


def _is_same(proposal: Proposal, recipe: Recipe, settings: Mapping[str, Any]) -> bool:
    """Tell whether a proposal is this recipe under these settings; the machine does not count."""
    if steps_of(proposal.recipe) != steps_of(recipe.mapping()):
        return False
    compared = [section for section in SETTINGS_OF_A_RUN if section != "compute"]
    return all(proposal.settings.get(section) == settings.get(section) for section in compared)
