"""A proposal in lines for a terminal: what would run, why, and what it takes.

Who approves by a sha256 has read these lines only, so that nothing that would run is left out of them but
what the workspace's own settings say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput
from synth_agent.planner import workspace_settings
from synth_agent.planner.fencing import visible
from synth_agent.recipes import Operator, Recipe, recipe_from_mapping
from synth_agent.runs import Limits, Proposal
from synth_agent.wording import benchmark_name, duration
from synth_agent.workspace import Workspace

_UNSAID = {"num_proc": 0}
"""Parameters, and the values of them that change nothing of the samples."""
_UNSET = "not set"


def proposal_text(workspace: Workspace, proposal: Proposal) -> str:
    """Return a proposal as a few lines: what, why, what it takes."""
    cost = proposal.cost
    samples = "unknown" if cost.expected_samples is None else f"{cost.expected_samples:,}"
    lines = [
        f"{proposal.title} ({proposal.kind}, recipe {proposal.recipe['name']})",
        f"  from      {visible(proposal.proposed_by)}",
        f"  against   {proposal.parent or 'nothing'}",
        f"  reason    {proposal.reason}",
        f"  evidence  {', '.join(proposal.evidence) or 'none'}",
        *(f"  steps     {line}" for line in _steps(proposal)),
        *(f"  settings  {line}" for line in _other_settings(workspace, proposal)),
        f"  samples   {samples} of {cost.seed_samples:,}",
        f"  time      {duration(cost.seconds)}",
        f"  basis     {cost.basis}",
    ]
    if proposal.hypothesis:
        lines.append(f"  thesis    {proposal.hypothesis}")
    for one in proposal.predictions:
        lines.append(
            f"  expects   {benchmark_name(one.benchmark)} {one.expected:+.1f} points, 80 %: "
            f"{one.low:+.1f} to {one.high:+.1f} ({one.by})"
        )
    if proposal.refuted_by:
        lines.append(f"  refuted   {proposal.refuted_by}")
    if proposal.limits != Limits():
        lines.append(f"  limits    {proposal.limits.words()}")
    if proposal.alternatives:
        lines.append(f"  beside    {', '.join(name[:12] for name in proposal.alternatives)}")
    lines.append(f"  sha256    {proposal.sha256}")
    return "\n".join(lines)


def _steps(proposal: Proposal) -> Iterator[str]:
    """Yield a line for each operator and for whatever else a data plan does."""
    mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
    try:
        recipe = recipe_from_mapping(str(proposal.recipe["name"]), mapping)
    except InvalidInput:
        # It cannot be approved either; what it holds is shown as it is.
        yield json.dumps(mapping, default=str)
        return
    for branch in recipe.branches:
        if branch.name:
            drawn = f", {branch.sample.count:,} drawn" if branch.sample else ""
            seed = f" with seed {branch.sample.seed}" if branch.sample else ""
            yield f"branch {branch.name}: each sample {branch.repeat} x{drawn}{seed}"
        yield from map(_step, branch.operators)
        if not branch.operators:
            yield "none: every sample is kept as it is"
    yield from _merging(recipe)


def _merging(recipe: Recipe) -> Iterator[str]:
    plan = recipe.data_plan
    if plan is None:
        return
    if plan.deduplicate:
        yield "repeated samples of the branches are dropped"
    if plan.order.by != "given":
        sorting = plan.order.operator
        by = f"sorted, {plan.order.direction}, by {_step(sorting)}" if sorting else ""
        yield by or f"shuffled with seed {plan.order.seed}"


def _step(operator: Operator) -> str:
    known = load_catalogue().operators.get(operator.name)
    defaults = load_catalogue().parameters(operator.name) if known else {}
    chosen = [
        # As JSON, so that no character of a text is unseen or moves the cursor.
        f"{name}={json.dumps(value, default=str)}"
        for name, value in operator.parameters.items()
        if _UNSAID.get(name, _UNSET) != value
        and not (name in defaults and defaults[name].default == value)
    ]
    return f"{operator.name}({', '.join(chosen)})"


def _other_settings(workspace: Workspace, proposal: Proposal) -> Iterator[str]:
    """Yield a line for each setting that is not the workspace's."""
    mine, own = _leaves(proposal.settings), _leaves(workspace_settings(workspace))
    for name in dict.fromkeys((*mine, *own)):
        here, there = mine.get(name, _UNSET), own.get(name, _UNSET)
        if here != there:
            yield f"{name} = {json.dumps(here)} (synth.yaml: {json.dumps(there)})"


def _leaves(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found
