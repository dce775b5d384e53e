"""What a recipe would make of the seed set, branch by branch and merged, worked out without a run.

Drawing, repeating and dropping repetitions are arithmetic once it is known which samples a branch's
operators leave, which `retention` says. A linear recipe is one branch without a name. Where a branch
is not known, neither is what is merged; nothing is estimated. A run's cap comes after this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from synth_agent.data_plans import Branch
from synth_agent.recipes import Recipe
from synth_agent.retention import Retention, retention
from synth_agent.statistics import Integers, StatisticsTable


@dataclass(frozen=True, eq=False)
class BranchRetention:
    """What one branch would contribute."""

    branch: Branch
    retention: Retention
    """What its operators would leave."""

    @property
    def left(self) -> int | None:
        """Samples that its operators leave; None when that is not known."""
        return self.retention.kept

    @property
    def taken(self) -> int | None:
        """Samples drawn from them, or all; None when that is not known."""
        return None if self.left is None else len(self.branch.taken(self.left))

    @property
    def samples(self) -> int | None:
        """Samples in the merged set: those taken, each as often as the branch repeats it."""
        return None if self.taken is None else self.taken * self.branch.repeat

    @property
    def note(self) -> str:
        """Why it is not known, or what is worth knowing though it is; mostly empty."""
        for operator in self.retention.operators:
            if not operator.known:
                return f"{operator.name}: {operator.why}"
        return self.branch.note(self.left or 0)

    def rows(self) -> Integers | None:
        """Return the (M,) rows that it contributes, in their order; None when not known."""
        if self.left is None:
            return None
        left = np.flatnonzero(self.retention.keep)
        return np.tile(left[np.asarray(self.branch.taken(self.left), np.int64)], self.branch.repeat)


@dataclass(frozen=True, eq=False)
class PlanRetention:
    """What a recipe would make of a data set, before a run's cap."""

    num_rows: int
    """Samples of the data set."""
    branches: tuple[BranchRetention, ...]
    merged: int | None
    """Samples of all branches together; None when that is not known."""
    rows: Integers | None = field(repr=False)
    """(M,) rows of the data set, branch after branch, once for each sample that is made of them,
    without those that `deduplicate` drops; None when that is not known."""

    @property
    def known(self) -> bool:
        """Whether every operator's outcome is known."""
        return self.rows is not None

    @property
    def samples(self) -> int | None:
        """Samples after the merge; None when that is not known."""
        return None if self.rows is None else len(self.rows)

    @property
    def repetitions(self) -> int | None:
        """Samples that `deduplicate` drops; None when that is not known."""
        return None if self.rows is None or self.merged is None else self.merged - len(self.rows)

    def kept_rows(self) -> NDArray[np.bool_]:
        """Return which rows of the data set occur at all, (rows,); all False when not known."""
        occurs = np.zeros(self.num_rows, dtype=bool)
        if self.rows is not None:
            occurs[self.rows] = True
        return occurs

    def steps(self) -> Iterator[tuple[str, Retention, int]]:
        """Yield every operator: its branch's name, the branch's retention, its place there."""
        for branch in self.branches:
            for position in range(len(branch.retention.operators)):
                yield branch.branch.name, branch.retention, position

    @property
    def why(self) -> str:
        """Why it is not known, empty when it is."""
        for branch in self.branches:
            if not branch.retention.known:
                name = branch.branch.name
                return f"branch {name}: {branch.note}" if name else branch.note
        return ""


def plan_retention(
    recipe: Recipe, table: StatisticsTable, model_digest: Callable[[str], str]
) -> PlanRetention:
    """Work out what a recipe, linear or a data plan, would make of a data set.

    Args:
        recipe: A recipe that was checked.
        table: The statistics of the data set that it would run on.
        model_digest: Called with a model parameter's value, returns the content's digest.
    """
    plan = recipe.data_plan
    linear = [recipe]
    if plan is not None:
        linear = [recipe.branch_recipe(number) for number in range(1, len(plan.branches) + 1)]
    branches = tuple(
        BranchRetention(branch, retention(one, table, model_digest))
        for branch, one in zip(recipe.branches, linear, strict=True)
    )
    parts = [rows for branch in branches if (rows := branch.rows()) is not None]
    if len(parts) < len(branches):
        return PlanRetention(table.num_rows, branches, None, None)
    merged = np.concatenate(parts)
    # Operators whose outcome is known leave texts as they are, so that a row names id and text.
    rows = _first_occurrences(merged) if plan is not None and plan.deduplicate else merged
    return PlanRetention(table.num_rows, branches, len(merged), rows)


def _first_occurrences(rows: Integers) -> Integers:
    """Return rows without those that occurred before, in the order they had."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]
