"""From a model's reply to a proposal, or to the words that say what is wrong with it.

Owns the checks that a proposal has to pass before a person sees it. Whatever the program can compute is
computed here and never taken from the model: the cost, the digest, the options of the recipe, and, in
`training_changes`, the seed of a replicate and the settings that are not changed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from synth_agent.data_plans import Branch, DataPlan, Order
from synth_agent.errors import InvalidInput, SynthAgentError, nearest
from synth_agent.fit import estimate_cost
from synth_agent.imported import list_imported
from synth_agent.planner.context import imported_name
from synth_agent.planner.fencing import cut, visible
from synth_agent.planner.reply import GivenProposal, given_in, objects_in, plain_process
from synth_agent.planner.training_changes import settings_with
from synth_agent.planner.tried import Known, check_untried, recipe_of, steps_digest
from synth_agent.recipes import (
    Recipe,
    list_recipes,
    load_catalogue,
    materialise,
    operators_with_places,
    recipe_from_mapping,
    validate_recipe,
)
from synth_agent.runs import Prediction, Proposal, Run, digest
from synth_agent.wording import BENCHMARK_NAMES
from synth_agent.workspace import Workspace

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")


def read_reply(workspace: Workspace, text: str, known: Known, *, proposed_by: str) -> Proposal:
    """Return the first proposal of a reply that passes every check.

    Args:
        workspace: What the proposal is for.
        text: The reply: one JSON object, or objects among other text.
        known: What was tried, rejected and shown.
        proposed_by: Name of the model, for the record.

    Raises:
        InvalidInput: There is no valid proposal; its words say what is wrong with the first one.
    """
    if known.recipes is None:
        known = replace(known, recipes=list_recipes(workspace))
    problem: SynthAgentError | None = None
    for found in objects_in(text):
        try:
            return validated(workspace, found, known, proposed_by=proposed_by)
        except SynthAgentError as error:
            problem = problem or error
    assert problem is not None
    raise InvalidInput(problem.title, problem.message, problem.hint) from problem


def validated(
    workspace: Workspace, value: Mapping[str, Any], known: Known, *, proposed_by: str
) -> Proposal:
    """Return the proposal that an object describes, every computed part computed.

    Raises:
        InvalidInput: naming the field and the fix.
    """
    given = given_in(value)
    recipes = list_recipes(workspace) if known.recipes is None else known.recipes
    parent = _parent(given, known)
    recipe = _recipe(workspace, given, parent, recipes)
    settings = settings_with(workspace, given.kind, given.settings, parent, known.runs)
    _check_kind(given, recipe, settings, parent)
    check_untried(given.kind, recipe, settings, known)
    evidence = _evidence(workspace, given, known, recipes)
    recipe = _exported(_named(given, recipe, recipes))
    cost = estimate_cost(workspace, recipe, settings, known.runs)
    if cost.expected_samples == 0:
        raise InvalidInput("No sample is left", "field recipe", "loosen a threshold")
    return Proposal(
        title=cut(visible(given.title), 120),
        slug=recipe.name,
        kind=given.kind,
        reason=visible(given.reason),
        evidence=evidence,
        parent=parent.id if parent else None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=settings,
        cost=cost,
        proposed_by=proposed_by,
        hypothesis=visible(given.hypothesis),
        predictions=_predictions(given, parent, proposed_by),
        refuted_by=visible(given.refuted_by),
    )


def _parent(given: GivenProposal, known: Known) -> Run | None:
    """Return the run that the proposal is compared with; None for the first baseline."""
    done = {run.id: run for run in known.runs if run.is_measured}
    if given.kind == "baseline":
        if given.parent is not None:
            raise InvalidInput("Baseline has a parent", "field parent", "write null")
        return None
    if not done:
        raise InvalidInput(
            "Nothing to compare with", "no run has succeeded", "propose the baseline first"
        )
    if given.parent in done:
        return done[given.parent]
    states = {run.id: run.status for run in known.runs}
    if given.parent in states:
        raise InvalidInput(
            "Parent was not measured",
            f"field parent: {given.parent} is {states[given.parent]}",
            "name a run that ended with scores",
        )
    raise InvalidInput(
        "No such run",
        f"field parent: {visible(str(given.parent))[:80]!r}",
        nearest(str(given.parent)[:80], list(done)[-20:]),
    )


def _recipe(
    workspace: Workspace, given: GivenProposal, parent: Run | None, recipes: Sequence[Recipe]
) -> Recipe:
    """Return the proposal's recipe, checked, with every parameter written out."""
    catalogue = load_catalogue()
    if given.kind == "baseline":
        by_name = {recipe.name: recipe for recipe in recipes}
        if workspace.settings.baseline not in by_name:
            raise InvalidInput(
                "Baseline recipe is missing", workspace.settings.baseline, "a person has to add it"
            )
        return materialise(by_name[workspace.settings.baseline], catalogue)
    assert parent is not None
    before = recipe_of(parent.plan.proposal)
    if given.recipe is None:
        if given.kind != "replicate":
            raise InvalidInput("Recipe is missing", "field recipe", "give process or branches")
        recipe = before
    else:
        steps = _plain_steps(given.recipe)
        # A model has no say in options: they tell where data lies and how errors are handled.
        options = {**before.options, "skip_op_error": False}
        recipe = recipe_from_mapping("proposal", {**options, **steps})
    validate_recipe(recipe, catalogue, workspace)
    return materialise(recipe, catalogue)


def _plain_steps(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps as a recipe file holds them; only fields of steps are taken."""
    if recipe.get("branches") is not None:
        if recipe.get("process"):
            raise InvalidInput(
                "Two kinds of steps", "field recipe: process and branches", "leave out one"
            )
        branches = recipe["branches"]
        if not isinstance(branches, list):
            raise InvalidInput("Wrong field", "recipe.branches is no list", "give a list")
        made = [
            {**branch, "process": plain_process(branch.get("process"))}
            if isinstance(branch, dict)
            else branch
            for branch in branches
        ]
        kept = {
            k: recipe[k] for k in ("merge", "deduplicate", "order") if recipe.get(k) is not None
        }
        return {"branches": made, **kept}
    return {"process": plain_process(recipe.get("process"))}


def _check_kind(
    given: GivenProposal,
    recipe: Recipe,
    settings: Mapping[str, Any],
    parent: Run | None,
) -> None:
    """Check that the proposal is of the kind that it says."""
    if parent is None:
        return
    catalogue = load_catalogue()
    before = materialise(recipe_of(parent.plan.proposal), catalogue)
    is_same_recipe = steps_digest(before) == steps_digest(recipe)
    sections = ("pretrain", "finetune")
    is_same = is_same_recipe and all(
        settings[section] == parent.plan.proposal.settings.get(section) for section in sections
    )
    if given.kind == "replicate" and not is_same:
        raise InvalidInput(
            "A replicate repeats its parent",
            f"field kind: recipe or settings differ from {parent.id}",
            "leave recipe and settings out, or choose explore or exploit",
        )
    if given.kind != "replicate" and is_same:
        raise InvalidInput(
            "Nothing changes",
            f"field recipe: it does what {parent.id} did",
            "change something, or choose kind replicate",
        )
    if given.kind != "ablate":
        return
    other = [name for name in sections if settings[name] != parent.plan.proposal.settings.get(name)]
    if other:
        raise InvalidInput(
            "An ablation only removes",
            f"field settings: {other[0]} differs from {parent.id}",
            "leave settings out, or choose explore or exploit",
        )
    if not _is_part(recipe, before):
        raise InvalidInput(
            "An ablation only removes",
            f"field recipe: it is not the recipe of {parent.id} without some of its operators",
            "leave out operators of the parent and change nothing else",
        )


def _is_part(recipe: Recipe, whole: Recipe) -> bool:
    """Tell whether a recipe is another without some of its operators, all else unchanged."""
    mine, others = (
        Counter(digest([o.name, dict(o.parameters)]) for _, o in operators_with_places(one))
        for one in (recipe, whole)
    )
    return (
        mine < others
        and _is_plan_kept(recipe.data_plan, whole.data_plan)
        and all(
            any(_is_branch_of(branch, other) for other in whole.branches)
            for branch in recipe.branches
        )
    )


def _is_branch_of(branch: Branch, whole: Branch) -> bool:
    """Tell whether a branch has the operators of another in their order, or some of them."""
    others = iter(whole.operators)
    return branch == replace(whole, operators=branch.operators) and all(
        operator in others for operator in branch.operators
    )


def _is_plan_kept(plan: DataPlan | None, whole: DataPlan | None) -> bool:
    """Tell whether merging and order are another plan's; a sorting may be left out."""
    if plan is None or whole is None:
        return plan is whole
    is_unsorted = whole.order.operator is not None and plan.order == Order()
    return plan.deduplicate == whole.deduplicate and (is_unsorted or plan.order == whole.order)


def _evidence(
    workspace: Workspace, given: GivenProposal, known: Known, recipes: Sequence[Recipe]
) -> tuple[str, ...]:
    ids = {run.id for run in known.runs} | {rejection.id for rejection in known.rejections}
    published = {
        f"published table, row {recipe.published['row']:.0f}"
        for recipe in recipes
        if recipe.published
    }
    published |= {
        imported_name(table, result)
        for table in list_imported(workspace)
        for result in table.results
    }
    for position, name in enumerate(given.evidence):
        if name not in ids and name not in published:
            hint = (
                nearest(name[:80], sorted(ids)[-20:]) if ids else "there is no run: leave it empty"
            )
            raise InvalidInput("No such run", f"evidence.{position}: {visible(name)[:80]}", hint)
    if ids and not given.evidence and given.kind != "baseline":
        raise InvalidInput("Evidence is missing", "field evidence", "name a run it rests on")
    return tuple(dict.fromkeys(given.evidence))


def _predictions(given: GivenProposal, parent: Run | None, by: str) -> tuple[Prediction, ...]:
    if parent is None:
        return ()
    wanted = set(parent.scores) or set(BENCHMARK_NAMES)
    named = [prediction.benchmark for prediction in given.predictions]
    if set(named) != wanted or len(named) != len(wanted):
        raise InvalidInput(
            "Predictions do not fit the benchmarks",
            f"field predictions: {visible(', '.join(named))[:120] or 'none'}",
            f"give one for each of {', '.join(sorted(wanted))}",
        )
    for position, p in enumerate(given.predictions):
        numbers = (p.low, p.expected, p.high)
        if not all(math.isfinite(n) and abs(n) <= 100 for n in numbers):
            raise InvalidInput(
                "Out of range", f"predictions.{position}", "give percentage points, -100 to 100"
            )
        if not p.low <= p.expected <= p.high or p.low == p.high:
            raise InvalidInput(
                "Interval is not one",
                f"predictions.{position}: low {p.low:g}, expected {p.expected:g}, high {p.high:g}",
                "give low <= expected <= high, and an interval that is not empty",
            )
    return tuple(Prediction(p.benchmark, p.expected, p.low, p.high, by) for p in given.predictions)


def _named(given: GivenProposal, recipe: Recipe, recipes: Sequence[Recipe]) -> Recipe:
    """Give the recipe a name that no other recipe of the workspace has."""
    if given.kind in ("baseline", "replicate"):
        return recipe
    name = given.name if _SLUG.fullmatch(given.name) else _slug(given.title)
    mark = steps_digest(recipe)[:6]
    name = name or f"{given.kind}-{mark}"
    taken = {known.name for known in recipes}
    if name in taken:
        name = f"{name[:41].rstrip('-')}-{mark}"
    return replace(recipe, name=name, title=cut(visible(given.title), 120))


def _slug(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")


def _exported(recipe: Recipe) -> Recipe:
    """Let the recipe write under its own name when it is run by hand."""
    if "export_path" not in recipe.options:
        return recipe
    path = f"artifacts/processed/{recipe.name}.jsonl"
    return replace(recipe, options={**recipe.options, "export_path": path})
