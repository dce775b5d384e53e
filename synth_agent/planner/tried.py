"""What a proposal is checked against, and whether it was tried, rejected or shown before.

Two proposals are the same when they do the same: steps and settings count, names and options do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from synth_agent.errors import InvalidInput
from synth_agent.planner.fencing import visible
from synth_agent.planner.training_changes import COMPARED
from synth_agent.recipes import Recipe, load_catalogue, materialise, recipe_from_mapping
from synth_agent.runs import Kind, Proposal, Rejection, Run


@dataclass(frozen=True)
class Known:
    """What a proposal is checked against."""

    runs: Sequence[Run]
    rejections: Sequence[Rejection] = ()
    shown: Sequence[Proposal] = ()
    """Proposals of this conversation that nobody has decided about."""
    recipes: Sequence[Recipe] | None = None
    """The workspace's recipes if they are loaded."""


def recipe_of(proposal: Proposal) -> Recipe:
    """Return the recipe of a proposal."""
    mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
    return recipe_from_mapping(str(proposal.recipe.get("name", proposal.slug)), mapping)


def steps_digest(recipe: Recipe) -> str:
    """Return what tells apart what two recipes do; options and names of branches do not."""
    return replace(recipe, options={}).digest


def check_untried(kind: Kind, recipe: Recipe, settings: Mapping[str, Any], known: Known) -> None:
    """Check that nothing did the same before; of a replicate, with the same seed.

    Raises:
        InvalidInput: naming the run, rejection or proposal that did.
    """
    mine = _identity(recipe, settings, with_seed=kind == "replicate")
    for run in known.runs:
        if run.settles and _is(run.plan.proposal, mine):
            hint = "propose something else, or a replicate of it"
            raise InvalidInput("It was tried", f"run {run.id} ({run.status})", hint)
    for rejection in known.rejections:
        if _is(rejection.proposal, mine):
            raise InvalidInput(
                "It was rejected",
                f"{rejection.id}: {visible(rejection.reason)[:200]}",
                "propose something else that respects the reason",
            )
    for proposal in known.shown:
        if _is(proposal, mine):
            raise InvalidInput(
                "It was shown already", visible(proposal.title)[:120], "propose something else"
            )


_Identity = tuple[str, dict[str, Any]]


def _identity(recipe: Recipe, settings: Mapping[str, Any], *, with_seed: bool) -> _Identity:
    sections = [*COMPARED, "pretrain", "finetune", *(["seed"] if with_seed else [])]
    return steps_digest(recipe), {section: settings.get(section) for section in sections}


def _is(proposal: Proposal, identity: _Identity) -> bool:
    """Tell whether a proposal would do the same."""
    steps, settings = identity
    if any(proposal.settings.get(name) != value for name, value in settings.items()):
        return False
    try:
        return steps_digest(materialise(recipe_of(proposal), load_catalogue())) == steps
    except InvalidInput:
        return False
