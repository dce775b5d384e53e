"""The mini world part of the planner benchmark: the real loop with real training.

The built-in planner and random search get a copy of the same demo workspace each and the same number of
runs, the baseline included. A run takes minutes on a laptop; finished copies are continued, not started
over. What each calls best is then trained with seeds that neither had used, which gives its true value.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from synth_agent import headless, pipeline
from synth_agent.planner import BuiltinPlanner, propose_recipe
from synth_agent.planner.assessment import assess
from synth_agent.planner.builtin import workspace_settings
from synth_agent.recipes import list_recipes
from synth_agent.runs import Proposal, Run
from synth_agent.workspace import Workspace, open_workspace

Propose = Callable[[Workspace, Sequence[Run]], Proposal | None]
FRESH_SEEDS = (9001, 9002, 9003)


def compare(demo: Path, *, runs: int, seed: int) -> int:
    """Run both planners in copies of a demo workspace and print what they found.

    Args:
        demo: A workspace of `synth-agent demo` without runs.
        runs: Budget of each planner, the baseline included.
        seed: Of the random search.

    Returns:
        The exit code.
    """
    print("| planner | runs | called best | claimed, points | with fresh seeds, points |")
    print("| --- " * 5 + "|")
    for name, propose in {"built-in": builtin, "random": random_search(seed)}.items():
        copy = demo.resolve().with_name(f"{demo.resolve().name}-{name}")
        if not copy.exists():
            shutil.copytree(demo, copy, symlinks=True)
        workspace = open_workspace(copy)
        history = pipeline.list_runs(workspace)[:runs]
        while len(history) < runs and (proposal := propose(workspace, history)) is not None:
            history.append(train(workspace, proposal))
        print(verdict(workspace, name, history), flush=True)
    return 0


def builtin(workspace: Workspace, history: Sequence[Run]) -> Proposal | None:
    """Return what the product would propose."""
    return BuiltinPlanner().propose(workspace, history, ())


def random_search(seed: int) -> Propose:
    """Return a search that tries the workspace's recipes in random order after the baseline."""

    def propose(workspace: Workspace, history: Sequence[Run]) -> Proposal | None:
        if not history:
            return BuiltinPlanner().propose(workspace, history, ())
        recipes = [r for r in list_recipes(workspace) if r.name != workspace.settings.baseline]
        order = np.random.default_rng(seed).permutation(len(recipes))
        at = len(history) - 1
        return propose_recipe(workspace, recipes[order[at]], history) if at < len(order) else None

    return propose


def train(workspace: Workspace, proposal: Proposal) -> Run:
    """Run a proposal from approval to its end."""
    pipeline.validate(workspace, proposal)
    plan = pipeline.approve(
        workspace, proposal, shown_sha256=proposal.sha256, approver="planner benchmark"
    )
    pipeline.launch(workspace, plan)
    return headless.follow(workspace, plan.run_id)


def verdict(workspace: Workspace, name: str, history: Sequence[Run]) -> str:
    """Return the line of a planner: the recipe it calls best, its claim and its true gain.

    The built-in planner goes by its model, random search by the highest mean of both scores.
    """
    done = [run for run in history if run.status == "succeeded" and run.scores]
    baseline, others = done[0], done[1:]
    if not others:
        return f"| {name} | {len(history)} | baseline | 0.0 | 0.0 |"
    best = max(others, key=lambda run: level(run) - level(baseline))
    claimed = level(best) - level(baseline)
    if name == "built-in":
        settings, recipes = workspace_settings(workspace), list_recipes(workspace)
        zero = next(r for r in recipes if r.name == workspace.settings.baseline)
        assessment = assess(workspace, recipes, zero, settings, history)
        if assessment.leader is None:
            return f"| {name} | {len(history)} | baseline | 0.0 | 0.0 |"
        best = next(run for run in others if run.id == assessment.leader.runs[0])
        claimed = mean(
            one.expected for one in assessment.predictions(assessment.leader.recipe, name)
        )
    gains = [
        fresh(workspace, best, seed) - fresh(workspace, baseline, seed) for seed in FRESH_SEEDS
    ]
    return f"| {name} | {len(history)} | {best.plan.proposal.slug} | {claimed:+.1f} | {mean(gains):+.1f} |"


def level(run: Run) -> float:
    """Return the mean of a run's scores in percent."""
    return mean(score.percent for score in run.scores.values())


def fresh(workspace: Workspace, run: Run, seed: int) -> float:
    """Return the level of a run's recipe with another seed, trained unless that was done."""
    settings = {**run.plan.proposal.settings, "seed": seed}
    for known in pipeline.list_runs(workspace):
        same = known.plan.proposal.recipe == run.plan.proposal.recipe
        if same and known.plan.proposal.settings == settings and known.scores:
            return level(known)
    return level(train(workspace, replace(run.plan.proposal, settings=settings)))
