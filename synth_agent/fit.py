"""What a plan will take before it runs: samples and wall time, each with where it comes from.

Estimates rest on what was measured: first on finished runs of this workspace, then on the reference
figures of the mini world. Where nothing was measured the answer is "unknown", never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from synth_agent.recipes import Recipe
from synth_agent.runs import STAGES, Cost, Run
from synth_agent.workspace import Workspace

MINI_WORLD_SECONDS = {"process": 10.0, "pretrain": 55.0, "finetune": 20.0, "evaluate": 16.0}
"""Seconds of each stage of the demo on two 2.x GHz cores; see `benchmarks/results/`."""


def count_samples(workspace: Workspace) -> int:
    """Return the number of records of the seed set; 0 when the file is missing."""
    path = workspace.path(workspace.settings.data.seed)
    if not path.is_file():
        return 0
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def estimate_cost(
    workspace: Workspace, recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> Cost:
    """Return the expected samples and seconds of a run.

    Args:
        workspace: Where the seed set is.
        recipe: What processes it.
        settings: The settings that the stages would use.
        history: Runs of this workspace, for their measured sample counts and stage times.
    """
    seed_samples = count_samples(workspace)
    samples, samples_basis = _expected_samples(recipe, seed_samples, history)
    seconds, seconds_basis = _expected_seconds(settings, history)
    return Cost(seed_samples, samples, seconds, f"samples: {samples_basis}; time: {seconds_basis}")


def _expected_samples(
    recipe: Recipe, seed_samples: int, history: Sequence[Run]
) -> tuple[int | None, str]:
    for run in reversed(history):
        kept = run.stages["process"].result.get("kept")
        if kept is not None and run.plan.proposal.recipe.get("process") == recipe.mapping().get(
            "process"
        ):
            return int(kept), f"measured in run {run.id}"
    if not recipe.operators:
        return seed_samples, "the recipe has no operator"
    if recipe.keeps is not None:
        return round(recipe.keeps * seed_samples), "the recipe's own note on what it keeps"
    return None, "not known before the recipe has run"


def _expected_seconds(
    settings: Mapping[str, Any], history: Sequence[Run]
) -> tuple[float | None, str]:
    measured: dict[str, float] = {}
    for stage in STAGES:
        times = [
            run.stages[stage].seconds
            for run in history
            if run.stages[stage].status == "succeeded" and _same_work(run, settings, stage)
        ]
        known = [seconds for seconds in times if seconds is not None]
        if known:
            measured[stage] = median(known)
    if len(measured) == len(STAGES):
        return sum(measured.values()), "median of this workspace's runs"
    if settings["model"]["name"] == "mgm-mini":
        return (
            sum(measured.get(stage, MINI_WORLD_SECONDS[stage]) for stage in STAGES),
            "the mini world's reference figures for two cores",
        )
    return None, "no run was timed on this machine yet"


def _same_work(run: Run, settings: Mapping[str, Any], stage: str) -> bool:
    if stage == "process":
        return True
    before = run.plan.proposal.settings
    return bool(
        before["model"]["name"] == settings["model"]["name"]
        and before.get(stage) == settings.get(stage)
    )
