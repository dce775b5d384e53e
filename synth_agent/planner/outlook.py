"""What recipes are expected to leave of the seed set, and which of them leave the same.

Counted where the statistics tell it, else measured in a run, else the recipe's own note. Recipes that
provably make the same samples share an identity, so that none of them is trained twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synth_agent import analysis
from synth_agent.data_keys import KEYS_NAME
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.fit import count_samples
from synth_agent.plan_retention import PlanRetention
from synth_agent.planner.features import Volume
from synth_agent.processed_sets import find_processed
from synth_agent.recipes import Recipe, steps_of
from synth_agent.runs import Run
from synth_agent.workspace import Workspace


@dataclass(frozen=True)
class Outlook:
    """What is known of a recipe's samples before it is trained on."""

    volume: Volume
    identities: frozenset[str]
    """Recipes that share one make the same samples; empty when nothing is known."""
    samples: int | None
    """Samples that training reads, repetitions counted and after the cap; None when not known."""

    def is_same(self, other: Outlook) -> bool:
        """Tell whether both recipes provably make the same samples."""
        return bool(self.identities & other.identities)


def look(
    workspace: Workspace,
    recipes: Sequence[Recipe],
    settings: Mapping[str, Any],
    history: Sequence[Run],
) -> tuple[Outlook, ...]:
    """Return the outlook of each recipe."""
    seed_samples = count_samples(workspace)
    digests = Digests(workspace)
    table = None
    if (workspace.artifacts / "statistics" / KEYS_NAME).exists():
        table = analysis.open_table(workspace, digests)
    outlooks = []
    for recipe in recipes:
        counted = None
        if table is not None:
            counted = analysis.recipe_retention(workspace, recipe, table, digests)
        result = _result(workspace, recipe, history, digests)
        volume = _volume(recipe, seed_samples, settings, counted, result)
        identities = frozenset(_identities(recipe, seed_samples, counted, result))
        samples = _samples(recipe, seed_samples, settings, counted, result)
        outlooks.append(Outlook(volume, identities, samples))
    return tuple(outlooks)


def _volume(
    recipe: Recipe,
    seed_samples: int,
    settings: Mapping[str, Any],
    counted: PlanRetention | None,
    result: Mapping[str, Any],
) -> Volume:
    cap = float(settings["data"]["sample_cap"])
    most = min(cap, float(seed_samples)) if seed_samples else cap
    distinct: float | None = None
    if counted is not None and counted.rows is not None:
        distinct = float(len(np.unique(counted.rows)))
    elif "kept" in result:
        distinct = float(result.get("before_cap", result["kept"])) / _repeats(recipe)
    elif recipe.data_plan is None and not recipe.operators:
        distinct = float(seed_samples)
    elif recipe.keeps is not None:
        distinct = recipe.keeps * seed_samples / _repeats(recipe)
    if distinct is None:
        return Volume(None, most, None)
    share = min(distinct / seed_samples, 1.0) if seed_samples else None
    return Volume(min(distinct, most), most, share)


def _samples(
    recipe: Recipe,
    seed_samples: int,
    settings: Mapping[str, Any],
    counted: PlanRetention | None,
    result: Mapping[str, Any],
) -> int | None:
    found: float | None = None
    if counted is not None and counted.samples is not None:
        found = counted.samples
    elif "kept" in result:
        found = result.get("before_cap", result["kept"])
    elif recipe.data_plan is None and not recipe.operators:
        found = seed_samples
    elif recipe.keeps is not None:
        found = recipe.keeps * seed_samples
    return None if found is None else min(round(found), int(settings["data"]["sample_cap"]))


def _repeats(recipe: Recipe) -> float:
    """Return how often a sample occurs, the mean over branches."""
    return sum(branch.repeat for branch in recipe.branches) / len(recipe.branches)


def _result(
    workspace: Workspace, recipe: Recipe, history: Sequence[Run], digests: Digests
) -> Mapping[str, Any]:
    """Return what processing said of the recipe's samples, empty when it was not processed."""
    steps = steps_of(recipe.mapping())
    for run in reversed(history):
        result = run.stages["process"].result
        if "kept" in result and steps_of(run.plan.proposal.recipe) == steps:
            return result
    try:
        folder = find_processed(workspace, recipe, digests)
    except InvalidInput:
        return {}  # an input is missing, which the gate tells
    return {} if folder is None else _read_result(folder)


def _read_result(folder: Path) -> Mapping[str, Any]:
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _identities(
    recipe: Recipe, seed_samples: int, counted: PlanRetention | None, result: Mapping[str, Any]
) -> Iterator[str]:
    if digest := result.get("digest"):
        yield f"samples {digest}"
    if recipe.data_plan is not None and recipe.data_plan.order.by != "given":
        return
    rows = None if counted is None else counted.rows
    if recipe.data_plan is None and not recipe.operators and seed_samples:
        rows = np.arange(seed_samples)
    if rows is not None and len(rows):
        yield "rows " + hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
