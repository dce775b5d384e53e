"""Planners: they read the workspace and the past runs and return proposals, which are data.

A planner cannot run, write or approve anything. Whatever proposes, the way to a run is the same:
`Proposal`, `pipeline.validate`, `pipeline.approve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from synth_agent.planner.builtin import BuiltinPlanner, propose_recipe, workspace_settings
from synth_agent.runs import Proposal, Rejection, Run
from synth_agent.workspace import Workspace

__all__ = ["BuiltinPlanner", "Planner", "propose_recipe", "workspace_settings"]


class Planner(Protocol):
    """Whatever can suggest the next experiment."""

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        """Return the next proposal, or None when there is nothing left to try."""
        ...
