"""Two or three proposals side by side, and the choice between them as evidence.

Each of them names the others by sha256, so whichever is approved says what it was preferred to. A
name that stood in its own digest could not be computed: what is named is the proposal without its
alternatives, and that is kept as a draft too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from synth_agent import drafts
from synth_agent.errors import InvalidInput
from synth_agent.pipeline import list_rejections, list_runs, validate
from synth_agent.planner import BuiltinPlanner, Planner
from synth_agent.runs import Proposal, Rejection, now
from synth_agent.workspace import Workspace

MOST = 3


def propose_alternatives(
    workspace: Workspace, count: int = MOST, planner: Planner | None = None
) -> tuple[Proposal, ...]:
    """Return up to `count` proposals in the planner's order, valid, each naming the others.

    What was shown already counts as rejected, in memory only. Fewer come back when the planner has
    no more; one alone has no alternatives. All are kept as drafts.

    Raises:
        InvalidInput: If `count` is not 1 to 3, or the planner's first proposal is not valid.
    """
    if not 1 <= count <= MOST:
        raise InvalidInput("Bad number", f"{count} alternatives", f"ask for 1 to {MOST}")
    chooser = planner or BuiltinPlanner()
    history = list_runs(workspace, lambda error: None)
    rejections = list_rejections(workspace, lambda error: None)
    found: list[Proposal] = []
    while len(found) < count:
        proposal = chooser.propose(workspace, history, rejections)
        if proposal is None or any(_is_same(proposal, other) for other in found):
            break
        try:
            validate(workspace, proposal)
        except InvalidInput:
            # The planner's strongest goes to the gate even if it lacks something; others do not.
            if not found:
                raise
            break
        found.append(proposal)
        rejections = [*rejections, Rejection("", proposal, "shown beside it", "", now())]
    return side_by_side(workspace, found)


def side_by_side(workspace: Workspace, proposals: Sequence[Proposal]) -> tuple[Proposal, ...]:
    """Return the proposals, each naming the others, and keep all of them as drafts."""
    plain = [replace(proposal, alternatives=()) for proposal in proposals]
    names = [proposal.sha256 for proposal in plain]
    shown = tuple(
        replace(proposal, alternatives=tuple(other for other in names if other != name))
        for proposal, name in zip(plain, names, strict=True)
    )
    for proposal in (*plain, *shown):
        drafts.keep(workspace, proposal)
    return shown


def others(workspace: Workspace, proposal: Proposal) -> tuple[Proposal, ...]:
    """Return the proposals that were shown beside one, as far as their drafts are there."""
    found = []
    for sha256 in proposal.alternatives:
        try:
            found.append(drafts.find(workspace, sha256))
        except InvalidInput:
            continue
    return tuple(found)


def _is_same(proposal: Proposal, other: Proposal) -> bool:
    return proposal.recipe == other.recipe and proposal.settings == other.settings
