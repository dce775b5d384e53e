"""Data plans: several lists of operators on the same seed set, and how their results become one.

Owns the values, their reading from what a recipe file holds, and the checks that need neither the
operator catalogue nor the workspace.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from synth_agent.errors import InvalidInput, nearest

MERGES = ("concatenate",)
MOST_REPEATS = 100
MOST_SEED = 2**32 - 1
"""The largest seed that every generator takes."""
PLAN_FIELDS = ("branches", "merge", "deduplicate", "order")
"""Fields of a recipe file that only a data plan has."""

_BRANCH_FIELDS = ("name", "process", "repeat", "sample")
_ORDER_FIELDS: Mapping[str, tuple[str, ...]] = {
    "given": (),
    "shuffled": ("seed",),
    "statistic": ("operator", "parameters", "direction"),
}
_DIRECTIONS = ("ascending", "descending")
_BRANCH_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Operator:
    """One step of a recipe: an operator of Data-Juicer and its parameters."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Draw:
    """So many samples drawn without replacement; all of them when there are fewer."""

    count: int
    seed: int


@dataclass(frozen=True)
class Branch:
    """Operators that run in order on the whole seed set, and how much of the result is taken."""

    name: str
    """Empty for the one branch of a linear recipe."""
    operators: tuple[Operator, ...]
    repeat: int = 1
    """How often every sample of the branch occurs."""
    sample: Draw | None = None
    """Taken before the repetition; None takes everything."""

    def taken(self, available: int) -> Sequence[int]:
        """Return the ascending positions of what is taken of so many samples left."""
        if self.sample is None or available < self.sample.count:
            return range(available)
        return drawn(available, self.sample.count, self.sample.seed)

    def note(self, available: int) -> str:
        """Say what is not as asked when so many samples are left; empty when all is."""
        if not available:
            return "no sample is left"
        if self.sample is None or available >= self.sample.count:
            return ""
        asked = f"fewer than the {self.sample.count:,} to be drawn"
        return f"{available:,} left, {asked}: all are taken"

    def mapping(self) -> dict[str, Any]:
        """Return the branch as the recipe file holds it."""
        drawn = {"count": self.sample.count, "seed": self.sample.seed} if self.sample else None
        return {
            "name": self.name,
            "process": [{o.name: dict(o.parameters)} for o in self.operators],
            "repeat": self.repeat,
            "sample": drawn,
        }


@dataclass(frozen=True)
class Order:
    """The order of the samples of a data plan."""

    by: Literal["given", "shuffled", "statistic"] = "given"
    """`given` is branch after branch; `statistic` sorts by what a filter measures."""
    seed: int = 0
    """Of the shuffling."""
    operator: Operator | None = None
    """The filter whose statistic sorts; its thresholds drop nothing here."""
    direction: Literal["ascending", "descending"] = "ascending"

    def mapping(self) -> dict[str, Any]:
        """Return the order as the recipe file holds it."""
        if self.by == "shuffled":
            return {"by": self.by, "seed": self.seed}
        if self.operator is None:
            return {"by": self.by}
        return {
            "by": self.by,
            "operator": self.operator.name,
            "parameters": dict(self.operator.parameters),
            "direction": self.direction,
        }


@dataclass(frozen=True)
class DataPlan:
    """Branches, each of which reads the whole seed set, and what becomes of their samples."""

    branches: tuple[Branch, ...]
    merge: Literal["concatenate"] = "concatenate"
    """The branches one after the other."""
    deduplicate: bool = False
    """Drop a sample whose id and text occurred before."""
    order: Order = Order()

    def mapping(self) -> dict[str, Any]:
        """Return the plan as the recipe file holds it, every field written out."""
        return {
            "branches": [branch.mapping() for branch in self.branches],
            "merge": self.merge,
            "deduplicate": self.deduplicate,
            "order": self.order.mapping(),
        }

    def with_operators(self, branches: Iterable[Sequence[Operator]]) -> DataPlan:
        """Return the plan with other operators in its branches, given branch by branch."""
        changed = zip(self.branches, branches, strict=True)
        return replace(
            self, branches=tuple(replace(old, operators=tuple(new)) for old, new in changed)
        )


def drawn(available: int, count: int, seed: int) -> list[int]:
    """Return the ascending positions of `count` of `available`, drawn without replacement."""
    return sorted(random.Random(seed).sample(range(available), count))


def read_operators(where: str, field: str, value: object) -> tuple[Operator, ...]:
    """Read a list of operators, each a mapping from one name to parameters.

    Raises:
        InvalidInput: naming the operator that is none.
    """
    if not isinstance(value, list | tuple):
        raise InvalidInput(
            "No process list", f"{where}: {field} = {value!r}", "write `process: [...]`"
        )
    return tuple(_operator(f"{where}, operator {i}", entry) for i, entry in enumerate(value, 1))


def read_data_plan(where: str, mapping: Mapping[str, Any]) -> DataPlan:
    """Read the plan's fields of a recipe; other keys are ignored.

    Args:
        where: The file, for messages.
        mapping: What the file holds.

    Raises:
        InvalidInput: naming the field and the fix.
    """
    listed = mapping.get("branches")
    if not isinstance(listed, list | tuple) or not listed:
        raise InvalidInput(
            "No branches",
            f"{where}: branches = {listed!r}",
            "write a list of branches, each with name and process",
        )
    branches = tuple(_branch(where, i, entry) for i, entry in enumerate(listed, 1))
    names = [branch.name for branch in branches]
    for position, name in enumerate(names, 1):
        if name in names[: position - 1]:
            raise InvalidInput(
                "Repeated branch name",
                f"{where}, branch {position}, field name: {name!r}",
                "give every branch a name of its own",
            )
    merge = mapping.get("merge", "concatenate")
    if merge not in MERGES:
        raise InvalidInput(
            "Unknown merge", f"{where}, field merge: {merge!r}", "write `merge: concatenate`"
        )
    deduplicate = mapping.get("deduplicate", False)
    if not isinstance(deduplicate, bool):
        raise InvalidInput(
            "Wrong type", f"{where}, field deduplicate: {deduplicate!r}", "write true or false"
        )
    for branch in branches:
        if deduplicate and branch.repeat > 1:
            raise InvalidInput(
                "Repetitions would be dropped",
                f"{where}, branch {branch.name}, field repeat: {branch.repeat}, with "
                "deduplicate: true",
                "leave out one of the two",
            )
    return DataPlan(branches, "concatenate", deduplicate, _order(where, mapping.get("order")))


def _operator(where: str, entry: object) -> Operator:
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, parameters = next(iter(entry.items()))
        if isinstance(name, str) and (parameters is None or isinstance(parameters, Mapping)):
            return Operator(name, dict(parameters or {}))
    raise InvalidInput(
        "Bad operator", f"{where}: {entry!r}", "write `- operator_name: {parameter: value}`"
    )


def _branch(where: str, position: int, entry: object) -> Branch:
    place = f"{where}, branch {position}"
    fields = _mapping(place, entry, "write name and process")
    name = fields.get("name")
    if not isinstance(name, str) or not _BRANCH_NAME.fullmatch(name):
        raise InvalidInput(
            "Bad branch name",
            f"{place}, field name: {name!r}",
            "use at most 32 lower case letters, digits and hyphens",
        )
    place = f"{place} ({name})"
    _check_fields(place, fields, _BRANCH_FIELDS)
    operators = read_operators(place, "process", fields.get("process"))
    repeat = _whole(f"{place}, field repeat", fields.get("repeat", 1), 1, MOST_REPEATS)
    return Branch(name, operators, repeat, _draw(f"{place}, field sample", fields.get("sample")))


def _draw(place: str, value: object) -> Draw | None:
    if value is None:
        return None
    fields = _mapping(place, value, "write {count: N, seed: S}, or null for all")
    _check_fields(place, fields, ("count", "seed"))
    return Draw(
        _whole(f"{place}.count", fields.get("count"), 1),
        _whole(f"{place}.seed", fields.get("seed"), 0, MOST_SEED),
    )


def _order(where: str, value: object) -> Order:
    if value is None:
        return Order()
    place = f"{where}, field order"
    fields = _mapping(place, value, "write {by: given}, {by: shuffled, seed: 1} or {by: statistic}")
    by = fields.get("by")
    if not isinstance(by, str) or by not in _ORDER_FIELDS:
        raise InvalidInput("Unknown order", f"{place}.by: {by!r}", nearest(str(by), _ORDER_FIELDS))
    _check_fields(place, fields, ("by", *_ORDER_FIELDS[by]))
    if by == "shuffled":
        return Order("shuffled", _whole(f"{place}.seed", fields.get("seed"), 0, MOST_SEED))
    return _statistic_order(place, fields) if by == "statistic" else Order()


def _statistic_order(place: str, fields: Mapping[str, Any]) -> Order:
    name = fields.get("operator")
    if not isinstance(name, str):
        raise InvalidInput("No operator", f"{place}.operator: {name!r}", "name a filter")
    parameters = _mapping(
        f"{place}.parameters", fields.get("parameters") or {}, "write {parameter: value}"
    )
    direction = fields.get("direction", "ascending")
    if direction not in _DIRECTIONS:
        raise InvalidInput(
            "Unknown direction",
            f"{place}.direction: {direction!r}",
            "write ascending or descending",
        )
    return Order("statistic", 0, Operator(name, dict(parameters)), direction)


def _mapping(place: str, value: object, fix: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput("Not a mapping", f"{place}: {value!r}", fix)
    return value


def _check_fields(place: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise InvalidInput("Unknown field", f"{place}: {name!r}", nearest(str(name), known))


def _whole(place: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput("Wrong type", f"{place}: {value!r}", "give a whole number")
    if value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"a whole number from {low} to {high}"
        raise InvalidInput("Out of range", f"{place}: {value}", f"give {bounds}")
    return value
