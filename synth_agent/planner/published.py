"""Which results from elsewhere belong to which recipe of the workspace.

A recipe's own `published` note counts first. Rows of imported tables belong to a recipe with the same
operator families, thresholds, kind of captions and repetition; tidying texts and dropping duplicates may
differ. Pure: tables are given, so that a table that is replayed can be left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from synth_agent.data_plans import Branch, DataPlan, Operator
from synth_agent.imported import ImportedResult, ImportedStep, ImportedTable
from synth_agent.noise import ASSUMPTIONS
from synth_agent.planner.features import FEATURES, STRICTNESS, Volume, family_of, featurise
from synth_agent.planner.model import Array
from synth_agent.recipes import Recipe

Gains = Mapping[str, float]
"""Benchmark to gain: the logarithm of the ratio to the baseline, in spreads of one run of its table."""

SAME_THRESHOLD = 0.1
"""Thresholds this near, on the scale of `STRICTNESS`, are one."""
_IGNORED = ("processed", "operators", "volume", "dropped", "text cleaning", "deduplication")
_UNKNOWN = Volume(None, 1.0, None)
_NUMBER = re.compile(r">?=?([\d.]+)")


def published_gains(
    recipes: Sequence[Recipe], tables: Sequence[ImportedTable]
) -> tuple[tuple[int, Gains], ...]:
    """Return the published results that are evidence on recipes, each with its recipe's position.

    Args:
        recipes: Of the workspace.
        tables: Imported tables that may be used.
    """
    noted = [
        (position, _in_spreads(_of_note(recipe), {}))
        for position, recipe in enumerate(recipes)
        if recipe.published
    ]
    # Recipes are shipped with their row of a table that is shipped too: it is one result.
    known = [_of_note(recipe) for recipe in recipes if recipe.published]
    known_gains = {tuple(sorted(one.items())) for one in known}
    open_positions = [at for at, recipe in enumerate(recipes) if not recipe.published]
    vectors = {at: _compared(recipes[at]) for at in open_positions}
    for table in tables:
        for result, recipe in _recipes_of(table):
            if tuple(sorted(result.gains.items())) in known_gains:
                continue
            mine = _compared(recipe)
            # One row is one result: it is not evidence on several recipes at once.
            found = next((at for at, other in vectors.items() if _is_same(mine, other)), None)
            if found is not None:
                noted.append((found, _in_spreads(result.gains, table.spread)))
    return tuple((position, gains) for position, gains in noted if gains)


def recipe_of(result: ImportedResult) -> Recipe | None:
    """Return the recipe that a row of a table describes; None where it does not say enough.

    A step without a known operator, or without the threshold that decides it, is not enough.
    """
    operators = [_operator(step) for step in result.steps]
    known = tuple(operator for operator in operators if operator is not None)
    if not known or len(known) < len(operators):
        return None
    if result.times == 1:
        return Recipe("imported", result.id, "", known)
    plan = DataPlan((Branch("all", known, result.times),))
    return Recipe("imported", result.id, "", (), data_plan=plan)


def _recipes_of(table: ImportedTable) -> Iterator[tuple[ImportedResult, Recipe]]:
    for result in table.results:
        recipe = recipe_of(result)
        if result.gains and recipe is not None:
            yield result, recipe


def _operator(step: ImportedStep) -> Operator | None:
    family = family_of(step.operator)
    if not family:
        return None
    if family in STRICTNESS:
        found = _NUMBER.fullmatch(step.condition)
        parameter = STRICTNESS[family][0]
        return Operator(step.operator, {parameter: float(found[1])}) if found else None
    parameters = {"hf_img2seq": step.condition} if family == "new captions" else {}
    return Operator(step.operator, parameters)


def _compared(recipe: Recipe) -> Array:
    vector = featurise(recipe, _UNKNOWN)
    vector[[FEATURES.index(name) for name in _IGNORED]] = 0.0
    return vector


def _is_same(one: Array, other: Array) -> bool:
    return bool(one.any()) and bool(np.all(np.abs(one - other) <= _TOLERANCE))


_TOLERANCE: Array = np.array(
    [SAME_THRESHOLD if name.endswith(", strictness") else 1e-9 for name in FEATURES]
)


def _of_note(recipe: Recipe) -> dict[str, float]:
    return {name: recipe.published[name] for name in ASSUMPTIONS[""] if name in recipe.published}


def _in_spreads(gains: Mapping[str, float], spread: Mapping[str, float]) -> Gains:
    return {
        name: math.log(max(gain, 0.01)) / (spread.get(name) or ASSUMPTIONS[""][name].sd)
        for name, gain in gains.items()
        if name in ASSUMPTIONS[""]
    }
