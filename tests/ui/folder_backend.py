"""A backend over real run folders that starts no process and needs no pipeline.

Plans and events are real files, read through `synth_agent.runs`. What the pipeline, the planner and
the recipe catalogue decide elsewhere is decided here by a few lines, so that the app's tests say
something about the app only.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

import yaml

from synth_agent.errors import Conflict, InvalidInput, nearest
from synth_agent.recipes import DiffLine
from synth_agent.runs import (
    Comparison,
    EventTail,
    Plan,
    Proposal,
    Rejection,
    Run,
    dump_plan,
    fold,
    load_plan,
)
from synth_agent.ui.backend import Notebook, RecipeChoice, WorkspaceBackend
from synth_agent.workspace import Workspace
from tests.ui.notebook import RECIPES, proposal_for

OPERATORS = {"image_text_similarity_filter", "words_num_filter"}
TIME = "2026-11-20T12:00:00.000+00:00"


class FolderBackend(WorkspaceBackend):
    """Real files, no workers: what would start or stop one is recorded."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.live: str | None = None
        self.rejections: list[Rejection] = []
        self.launched: list[Plan] = []
        self.resumed: list[str] = []
        self.cancelled: list[str] = []

    def notebook(self) -> Notebook:
        folders = sorted(path.parent.name for path in self.root.glob("runs/*/plan.yaml"))
        runs = tuple(self.run(name) for name in folders)
        return Notebook(runs, tuple(self.rejections), self.live)

    def run(self, run_id: str) -> Run:
        paths = self._workspace.run(run_id)
        run = fold(load_plan(paths.plan), EventTail(paths.events).read())
        if run.status == "running" and self.live != run_id:
            run.status = "interrupted"
        return run

    def live_run(self) -> str | None:
        return self.live

    def _baseline(self) -> str | None:
        return next((run.id for run in self.notebook().runs), None)

    def next_proposal(self) -> Proposal | None:
        baseline = self._baseline()
        if baseline is None:
            return replace(self.proposal_of("baseline"), title="Measure the baseline")
        return self.proposal_of("words")

    def recipes(self) -> list[RecipeChoice]:
        return [RecipeChoice(name, f"The recipe {name}", "To see.") for name in RECIPES]

    def proposal_of(self, recipe_name: str) -> Proposal:
        return proposal_for(self._workspace, recipe_name, self._baseline())

    def validate(self, proposal: Proposal) -> None:
        for operator in proposal.recipe["process"]:
            (name,) = operator
            if name not in OPERATORS:
                raise InvalidInput("Unknown operator", name, nearest(name, OPERATORS))

    def edited(self, proposal: Proposal, text: str) -> Proposal:
        mapping = yaml.safe_load(text)
        if not isinstance(mapping, dict) or "process" not in mapping:
            raise InvalidInput("Not a recipe", "`process` is missing", "add it")
        recipe = {"name": f"{proposal.recipe['name']}-edited", **mapping}
        edited = replace(proposal, recipe=recipe, proposed_by="ada, editing built-in planner")
        self.validate(edited)
        return edited

    def difference(self, proposal: Proposal) -> list[DiffLine]:
        parent = self.run(proposal.parent).plan.proposal if proposal.parent else None
        before = self.recipe_text(parent).splitlines() if parent else []
        return _lines(before, self.recipe_text(proposal).splitlines())

    def difference_of_runs(self, earlier: str, later: str) -> list[DiffLine]:
        texts = [self.recipe_text(self.run(i).plan.proposal).splitlines() for i in (earlier, later)]
        return _lines(*texts)

    def approve(self, proposal: Proposal, shown_sha256: str) -> Plan:
        if proposal.sha256 != shown_sha256:
            raise Conflict("Not what was shown", shown_sha256, "look again")
        run_id = f"{len(self.notebook().runs) + 1:04d}-{proposal.slug}"
        plan = Plan(run_id, proposal, "ada", TIME, shown_sha256)
        path: Path = self._workspace.run(run_id).plan
        path.parent.mkdir(parents=True)
        path.write_text(dump_plan(plan), "utf-8")
        return plan

    def reject(self, proposal: Proposal, reason: str) -> str:
        name = f"rejected-{len(self.rejections) + 1:04d}"
        self.rejections.append(Rejection(name, proposal, reason, "ada", TIME))
        return name

    def launch(self, plan: Plan) -> None:
        self.launched.append(plan)

    def resume(self, run_id: str) -> None:
        self.resumed.append(run_id)

    def cancel(self, run_id: str) -> None:
        self.cancelled.append(run_id)

    def compare(self, earlier: str, later: str) -> list[Comparison]:
        found = self.run(later).comparisons.values()
        return [comparison for comparison in found if comparison.parent == earlier]


def _lines(before: list[str], after: list[str]) -> list[DiffLine]:
    found = difflib.ndiff(before, after)
    return [DiffLine(line[0], line[2:]) for line in found if line[0] in "+- "]
