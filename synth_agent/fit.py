"""What a plan will take before it runs: samples and wall time, each with where it comes from.

Estimates rest on what was measured: first on finished runs of this workspace, then on the reference
figures of the mini world. Where nothing was measured the answer is "unknown", never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from synth_agent.data import count_records
from synth_agent.data_keys import KEYS_NAME
from synth_agent.effective import Effective, Ladder, Training, capped, effective, is_deduplicator
from synth_agent.recipes import Recipe, steps_of
from synth_agent.runs import STAGES, Cost, Run
from synth_agent.workspace import Workspace

if TYPE_CHECKING:
    from synth_agent.plan_retention import PlanRetention

MINI_WORLD_SECONDS = {"process": 10.0, "pretrain": 55.0, "finetune": 20.0, "evaluate": 16.0}
"""Seconds of each stage of the demo on two 2.x GHz cores; see `benchmarks/results/`."""


def count_samples(workspace: Workspace) -> int:
    """Return the number of records of the seed set; 0 when the file is missing."""
    path = workspace.path(workspace.settings.data.seed)
    return count_records(path) if path.is_file() else 0


def estimate_cost(
    workspace: Workspace, recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> Cost:
    """Return the expected samples, at most as many as the cap, and the seconds of a run.

    Args:
        workspace: Where the seed set is.
        recipe: What processes it.
        settings: The settings that the stages would use.
        history: Runs of this workspace, for their measured sample counts and stage times.
    """
    seed_samples = count_samples(workspace)
    samples, samples_basis = _expected_samples(workspace, recipe, seed_samples, history)
    if samples is not None:
        samples = min(samples, int(settings["data"]["sample_cap"]))
    seconds, seconds_basis = _expected_seconds(settings, history)
    return Cost(seed_samples, samples, seconds, f"samples: {samples_basis}; time: {seconds_basis}")


def expected_effective(
    workspace: Workspace, recipe: Recipe, settings: Mapping[str, Any]
) -> Effective | None:
    """Return what the first training stage would make of a recipe's samples.

    Args:
        workspace: Where the seed set and its statistics are.
        recipe: What would process it, linear or a data plan.
        settings: The settings that the stages would use.

    Returns:
        The effective set; None when the statistics do not tell it, or when no sample is left.
    """
    rows: Sequence[int]
    if (counted := _plan_retention(workspace, recipe)) is not None:
        ladder = _ladder(counted)
        rows = [] if counted.rows is None else counted.rows.tolist()
    elif recipe.data_plan is None and not recipe.operators:
        rows = range(count_samples(workspace))
        ladder = Ladder(len(rows), len(rows), len(rows), len(rows))
    else:
        return None
    if ladder is None or not rows:
        return None
    data = settings["data"]
    left = capped(rows, int(data["sample_cap"]), int(data["sample_cap_seed"]))
    return effective(ladder, left, Training.of(settings["pretrain"]))


def _expected_samples(
    workspace: Workspace, recipe: Recipe, seed_samples: int, history: Sequence[Run]
) -> tuple[int | None, str]:
    """Return the samples before the cap, and where that comes from."""
    steps = steps_of(recipe.mapping())
    for run in reversed(history):
        result = run.stages["process"].result
        if (
            "kept" in result
            and result.get("seed_samples", seed_samples) == seed_samples
            and steps_of(run.plan.proposal.recipe) == steps
        ):
            return int(result.get("before_cap", result["kept"])), f"measured in run {run.id}"
    if recipe.data_plan is None and not recipe.operators:
        return seed_samples, "the recipe has no operator"
    counted = _plan_retention(workspace, recipe)
    if counted is not None and counted.samples is not None:
        return counted.samples, "counted from the seed set's statistics"
    if recipe.keeps is not None:
        return round(recipe.keeps * seed_samples), "the recipe's own note on what it keeps"
    return None, "not known before the recipe has run"


def _plan_retention(workspace: Workspace, recipe: Recipe) -> PlanRetention | None:
    """Return what the recipe makes by the statistics table, None where there is no table."""
    if not (workspace.artifacts / "statistics" / KEYS_NAME).exists():
        return None  # and what reads the table need not be loaded
    from synth_agent import analysis
    from synth_agent.digests import Digests
    from synth_agent.plan_retention import plan_retention

    digests = Digests(workspace)
    table = analysis.open_table(workspace, digests)
    if table is None:
        return None
    return plan_retention(recipe, table, lambda path: digests.path(workspace.path(path)))


def _ladder(counted: PlanRetention) -> Ladder | None:
    """Return the counts before the cap, None while one of them is not known."""
    left = [branch.left for branch in counted.branches if branch.left is not None]
    if counted.samples is None or len(left) < len(counted.branches):
        return None
    dropped = sum(
        (operator.before or 0) - (operator.after or 0)
        for branch in counted.branches
        for operator in branch.retention.operators
        if is_deduplicator(operator.name)
    )
    return Ladder(counted.num_rows, sum(left) + dropped, sum(left), counted.samples)


def _expected_seconds(
    settings: Mapping[str, Any], history: Sequence[Run]
) -> tuple[float | None, str]:
    measured: dict[str, float] = {}
    for stage in STAGES:
        known = [
            seconds / _trainings(run.plan.proposal.settings, stage)
            for run in history
            if run.stages[stage].status == "succeeded"
            and _same_work(run, settings, stage)
            and (seconds := run.stages[stage].seconds) is not None
        ]
        if known:
            measured[stage] = median(known)
    if len(measured) == len(STAGES):
        basis = "median of this workspace's runs"
    elif settings["model"]["name"] == "mgm-mini":
        measured = {**MINI_WORLD_SECONDS, **measured}
        basis = "the mini world's reference figures for two cores"
    else:
        return None, "no run was timed on this machine yet"
    total = sum(seconds * _trainings(settings, stage) for stage, seconds in measured.items())
    if settings["pretrain"].get("starts", 1) > 1:
        basis += f"; {_starts_words(settings, measured)}"
    return total, basis


def _trainings(settings: Mapping[str, Any], stage: str) -> float:
    """Return how many whole trainings a stage does, those that are stopped early by their share."""
    section = settings.get(stage, {})
    others: int = section.get("starts", 1) - 1 if stage == "pretrain" else 0
    return 1 + others * float(section.get("start_share", 1.0))


def _starts_words(settings: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """Return what several starts cost, in multiples of a run's training and evaluation."""
    from synth_agent.early import Starts  # numpy, which no other estimate needs

    section = settings["pretrain"]
    starts = Starts(section["starts"], share=section.get("start_share", 1.0))
    return starts.cost_words(seconds["pretrain"], seconds["finetune"] + seconds["evaluate"])


def _same_work(run: Run, settings: Mapping[str, Any], stage: str) -> bool:
    if stage == "process":
        return True
    before = run.plan.proposal.settings
    return bool(
        before["model"]["name"] == settings["model"]["name"]
        and _of_one_start(before.get(stage, {})) == _of_one_start(settings.get(stage, {}))
    )


def _of_one_start(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in ("starts", "start_share")}
