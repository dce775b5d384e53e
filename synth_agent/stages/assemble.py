"""From the branches of a data plan to one list of samples: drawing, repeating, merging, ordering."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synth_agent.data import ROW_ID_FIELD, Record, Sample
from synth_agent.data_plans import Branch, DataPlan, Operator, Order, drawn
from synth_agent.errors import InvalidInput
from synth_agent.recipes import Recipe
from synth_agent.stages.branch import load_records

Row = Mapping[str, Any]
_POSITION = "position"


@dataclass(frozen=True)
class Share:
    """What one branch contributes."""

    name: str
    left: int
    """Samples that its operators left."""
    taken: int
    """Samples drawn from them, or all."""
    repeat: int
    samples: int
    """Samples in the merged set: those taken, each as often as the branch repeats it."""
    note: str
    """What a reader should know, empty when all is as asked."""


@dataclass(frozen=True)
class Assembled:
    """The samples of a data plan, not yet ordered."""

    rows: list[Row]
    """At most as many as the cap."""
    before_cap: list[Row]
    shares: tuple[Share, ...]
    """Per branch."""

    @property
    def merged(self) -> int:
        """Samples of all branches together."""
        return sum(share.samples for share in self.shares)

    @property
    def repetitions(self) -> int:
        """Samples that `deduplicate` dropped."""
        return self.merged - len(self.before_cap)


def assemble(
    plan: DataPlan, branch_rows: Sequence[Sequence[Row]], cap: int, cap_seed: int
) -> Assembled:
    """Put together what the operators of each branch left.

    Args:
        plan: The data plan.
        branch_rows: Rows with row id and text, branch by branch.
        cap: Most samples; more are drawn down to it without a change of order.
        cap_seed: Seed of that drawing.
    """
    merged: list[Row] = []
    shares = []
    for branch, rows in zip(plan.branches, branch_rows, strict=True):
        samples, share = take(branch, rows)
        merged += samples
        shares.append(share)
    left = without_repetitions(merged) if plan.deduplicate else merged
    capped = draw(left, cap, cap_seed) if len(left) > cap else left
    return Assembled(capped, left, tuple(shares))


def take(branch: Branch, rows: Sequence[Row]) -> tuple[list[Row], Share]:
    """Draw and repeat what a branch's operators left.

    Drawn samples stay in the order they had. Repetitions follow as whole passes.
    """
    taken = [rows[position] for position in branch.taken(len(rows))]
    samples = taken * branch.repeat
    note = branch.note(len(rows))
    return samples, Share(branch.name, len(rows), len(taken), branch.repeat, len(samples), note)


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows drawn without replacement, in the order they had."""
    return [rows[position] for position in drawn(len(rows), count, seed)]


def without_repetitions(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose seed row and text did not occur before, in the order they had."""
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        first.setdefault((row[ROW_ID_FIELD], row["text"]), row)
    return list(first.values())


def in_order(
    order: Order, rows: Sequence[Row], measured: Callable[[Operator], Sequence[float | None]]
) -> tuple[list[Row], int]:
    """Return the rows in the order that a data plan asks for.

    Args:
        order: The order.
        rows: The rows in the order of their branches.
        measured: Called with a filter, returns each row's statistic; None where there is none.

    Returns:
        The rows, and how many have no statistic; those come last.
    """
    ordered = list(rows)
    if order.by == "shuffled":
        random.Random(order.seed).shuffle(ordered)
    if order.operator is None:
        return ordered, 0
    values = measured(order.operator)
    return sort_by(ordered, values, descending=order.direction == "descending")


def sort_by(
    rows: Sequence[Row], values: Sequence[float | None], *, descending: bool
) -> tuple[list[Row], int]:
    """Sort rows by their values; equals keep their order, rows without a value come last.

    Returns:
        The rows, and how many have no value.
    """
    pairs = list(zip(rows, values, strict=True))
    known = [(value, row) for row, value in pairs if value is not None]
    known.sort(key=lambda pair: pair[0], reverse=descending)
    last = [row for row, value in pairs if value is None]
    return [row for _, row in known] + last, len(last)


def measure(
    operator: Operator,
    rows: Sequence[Row],
    recipe: Recipe,
    seed: Sequence[Sample],
    folder: Path,
    report: Callable[[int, int], None],
) -> list[float | None]:
    """Measure rows by a filter's statistic; the filter drops nothing.

    A sample with several values, one for each picture or chunk of text, has their mean, and one
    with none has None. Equal rows are measured once.

    Args:
        operator: A filter that measures one number.
        rows: Rows with row id, text and absolute picture paths.
        recipe: Recipe whose options hold.
        seed: The seed samples; a row id is a position in this list.
        folder: Empty folder for Data-Juicer's own files.
        report: Called with samples done and samples in all.

    Raises:
        SynthAgentError: the filter failed, or does not measure exactly one number.
    """
    from synth_agent.stages.operators import stand_in
    from synth_agent.stages.running import STATS_FIELD, run_operator

    keys = [(row[ROW_ID_FIELD], row["text"], *row["images"]) for row in rows]
    first: dict[tuple[Any, ...], Row] = {}
    for key, row in zip(keys, rows, strict=True):
        first.setdefault(key, row)
    position_of = {key: position for position, key in enumerate(first)}
    distinct: list[Record] = [
        {**row, "id": str(row["id"]), _POSITION: position_of[key]} for key, row in first.items()
    ]
    linear = Recipe(recipe.name, recipe.title, "", (operator,), recipe.options)
    dataset, (sorting,) = load_records(linear, distinct, folder)
    sorting = sorting if sorting.num_proc else stand_in(sorting)
    # Under another name the operator is not exchanged for its stand-in again, and errors say where.
    sorting._name = f"order by {sorting._name}"
    sorting.run = functools.partial(sorting.run, reduce=False)
    measured = run_operator(sorting, dataset, seed, report)
    stats = dict(zip(measured[_POSITION], measured[STATS_FIELD], strict=True))
    name = _only_statistic(f"{recipe.name}.yaml, field order ({operator.name})", stats.values())
    return [_number(stats[position_of[key]].get(name)) for key in keys]


def _only_statistic(where: str, stats: Iterable[Mapping[str, Any]]) -> str:
    names = {
        name
        for measured in stats
        for name, value in measured.items()
        if value == [] or _number(value) is not None
    }
    if len(names) != 1:
        found = f"it measures {', '.join(sorted(names)) or 'no number'}"
        raise InvalidInput(
            "No order", f"{where}: {found}", "name a filter that measures one number"
        )
    return names.pop()


def _number(value: object) -> float | None:
    """Return a statistic as one number, None when it is no number."""
    if isinstance(value, list | tuple):
        numbers = [number for number in map(_number, value) if number is not None]
        return sum(numbers) / len(numbers) if numbers else None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)
