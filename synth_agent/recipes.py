"""Recipes: Data-Juicer configurations as values, their files, their checks and their differences.

A recipe file is YAML. With `process`, a list of operators, `dj-process` runs it unchanged from the
workspace root; with `branches` it is a data plan (see `data_plans`), each branch of which makes such
a file. The comment header holds what Data-Juicer has no place for: title, reason, published result,
share of samples kept.
Nothing here imports Data-Juicer; `catalogue` says what operators there are.
"""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from synth_agent.catalogue import Catalogue, load_catalogue
from synth_agent.data_plans import (
    PLAN_FIELDS,
    Branch,
    DataPlan,
    Operator,
    Order,
    read_data_plan,
    read_operators,
)
from synth_agent.errors import InvalidInput, nearest
from synth_agent.recipe_checks import check_operator, check_options
from synth_agent.recipe_order import check_packages, check_sequence
from synth_agent.recipe_yaml import LONGEST_FILE, read_mapping
from synth_agent.runs import digest
from synth_agent.workspace import Workspace

__all__ = [
    "Branch",
    "Catalogue",
    "DataPlan",
    "DiffLine",
    "Operator",
    "Order",
    "Recipe",
    "diff_recipes",
    "does_same",
    "dump_recipe",
    "list_recipes",
    "load_catalogue",
    "load_recipe",
    "materialise",
    "operators_with_places",
    "recipe_from_mapping",
    "steps_of",
    "validate_recipe",
]

INTERVAL_PARAMETERS = ("min_closed_interval", "max_closed_interval", "reversed_range")
"""Parameters of every filter that decide what it keeps; written out like its own."""

PLACES = ("dataset_path", "export_path", "project_name")
"""Options that say where data is, not what is done to it."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HEADER = re.compile(r"#\s?(title|reason|published|keeps):\s*(.*)")
_CONTINUATION = re.compile(r"#\s{2,}(\S.*)")
_PUBLISHED_KEYS = ("textvqa", "mmbench", "rows_k", "row")
_MOST_PUBLISHED = 1_000_000_000


@dataclass(frozen=True)
class Recipe:
    """A data recipe: one list of operators, or a data plan."""

    name: str
    title: str
    reason: str
    operators: tuple[Operator, ...]
    """Run in order on the seed set; empty for a data plan, whose operators are in its branches."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Global options of Data-Juicer: everything in the file besides the steps."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Published result of this kind of recipe: textvqa and mmbench (times the baseline), rows_k
    (thousand samples left), row (of the published table). Empty when there is none."""
    keeps: float | None = None
    """Share of the seed samples that it leaves, when known."""
    data_plan: DataPlan | None = None
    """Set in place of `operators`."""

    def __post_init__(self) -> None:
        if self.data_plan is not None and self.operators:
            raise ValueError("a recipe has operators or a data plan")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The data plan's branches; a linear recipe is one branch without a name."""
        return self.data_plan.branches if self.data_plan else (Branch("", self.operators),)

    def all_operators(self) -> tuple[Operator, ...]:
        """Return the operators of all branches, branch after branch."""
        return tuple(operator for branch in self.branches for operator in branch.operators)

    def branch_recipe(self, position: int) -> Recipe:
        """Return one branch, counted from 1, as a linear recipe with an export path of its own.

        What the data plan does after the branch's operators, drawing and repeating, is left out.
        """
        branch = self.branches[position - 1]
        options = dict(self.options)
        if isinstance(path := options.get("export_path"), str):
            place = PurePosixPath(path)
            name = f"{place.stem}-{position}-{branch.name}{place.suffix}"
            options["export_path"] = str(place.with_name(name))
        return Recipe(
            name=f"branch-{position}-{branch.name}",
            title=f"Branch {position}, {branch.name}, of: {self.title}",
            reason=self.reason,
            operators=branch.operators,
            options=options,
        )

    def mapping(self) -> dict[str, Any]:
        """Return what the file holds as YAML: the options, then `process` or the data plan."""
        if self.data_plan is not None:
            return {**self.options, **self.data_plan.mapping()}
        process = [{operator.name: dict(operator.parameters)} for operator in self.operators]
        return {**self.options, "process": process}

    @property
    def digest(self) -> str:
        """Digest of what decides the outcome: operators and options, not names and places."""
        decisive = {k: v for k, v in self.mapping().items() if k not in PLACES}
        if self.data_plan is not None:
            decisive["branches"] = [
                {k: v for k, v in branch.items() if k != "name"} for branch in decisive["branches"]
            ]
        return digest(decisive)


@dataclass(frozen=True)
class DiffLine:
    """One line of the difference between two recipes."""

    sign: Literal["+", "-", " "]
    text: str


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InvalidInput: unreadable, not YAML, not a mapping, or a bad header or process list.
    """
    try:
        # What is longer than a recipe may be, such as a device without an end, is not read whole.
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise InvalidInput(
            "Cannot read recipe", f"{path}: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "Recipe is not UTF-8", f"{path}: {error.reason}", "save it as UTF-8"
        ) from error
    header = _read_header(text)
    return replace(
        recipe_from_mapping(path.stem, read_mapping(text, str(path))),
        title=header.get("title", path.stem),
        reason=header.get("reason", ""),
        published=_published(header.get("published", ""), path),
        keeps=_share(header["keeps"], path) if "keeps" in header else None,
    )


def list_recipes(workspace: Workspace) -> tuple[Recipe, ...]:
    """Return every recipe of the workspace in the order of their names.

    Raises:
        InvalidInput: a recipe that cannot be read.
    """
    return tuple(
        load_recipe(path)
        for path in sorted(workspace.recipes.glob("*.yaml"), key=lambda path: path.stem)
    )


def recipe_from_mapping(name: str, mapping: object) -> Recipe:
    """Build a recipe from what its YAML holds; a key `name` is ignored.

    Raises:
        InvalidInput: a bad name, not a mapping, or bad steps: `process` is not a list of operators,
            or a field of a data plan is wrong.
    """
    where = f"{name}.yaml"
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "Bad recipe name", f"{name!r}", "use lower case letters, digits and hyphens"
        )
    if not isinstance(mapping, Mapping):
        raise InvalidInput(
            "Recipe is not a mapping", f"{where}: {mapping!r}", "write `key: value` lines"
        )
    steps = ("name", "process", *(PLAN_FIELDS if "branches" in mapping else ()))
    options = {key: value for key, value in mapping.items() if key not in steps}
    if "branches" in mapping:
        if "process" in mapping:
            raise InvalidInput(
                "Two kinds of steps", f"{where}: process and branches", "leave out one of the two"
            )
        plan = read_data_plan(where, mapping)
        return Recipe(name, name, "", (), options, data_plan=plan)
    for key in PLAN_FIELDS:
        if key in mapping:
            raise InvalidInput(
                "Field of a data plan", f"{where}: {key}", "it needs `branches` in place of process"
            )
    operators = read_operators(where, "process", mapping.get("process"))
    return Recipe(name, name, "", operators, options)


def steps_of(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe's mapping that says what is done: `process` or the data plan.

    Two recipes do the same if these are equal and their options are.
    """
    return {key: mapping[key] for key in ("process", *PLAN_FIELDS) if key in mapping}


def does_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether the mappings of two recipes say the same, with parameters written out or not."""
    mine, others = steps_of(one), steps_of(other)
    if mine == others:
        return True
    # Most recipes differ in their operators, which is told without the catalogue.
    if _operator_names(mine) != _operator_names(others):
        return False
    try:
        return _written_out(mine) == _written_out(others)
    except InvalidInput:
        return False


def _operator_names(steps: Mapping[str, Any]) -> list[list[str]]:
    lists = [steps, *(steps.get("branches") or ())]
    return [[str(name) for step in part.get("process") or () for name in step] for part in lists]


def _written_out(steps: Mapping[str, Any]) -> str:
    return materialise(recipe_from_mapping("recipe", steps), load_catalogue()).digest


def dump_recipe(recipe: Recipe) -> str:
    """Return the text of the recipe's file: header and YAML."""
    header = [("title", recipe.title), ("reason", recipe.reason)]
    if recipe.published:
        published = (f"{key}={recipe.published[key]:g}" for key in recipe.published)
        header.append(("published", " ".join(published)))
    if recipe.keeps is not None:
        header.append(("keeps", f"{recipe.keeps:g}"))
    lines: list[str] = []
    for key, value in header:
        if value:
            lines += textwrap.wrap(
                f"{key}: {value}",
                width=96,
                initial_indent="# ",
                subsequent_indent="#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    body = yaml.dump(
        recipe.mapping(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96
    )
    return "\n".join(lines) + "\n" + body


class _Dumper(yaml.SafeDumper):
    """Writes equal values out in place of referring to the first of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def materialise(recipe: Recipe, catalogue: Catalogue) -> Recipe:
    """Return the recipe with every parameter of every operator written out.

    Defaults come from the catalogue. `num_proc` is 0, which runs an operator in the process that
    reports its progress; workers cost more than they bring on data of this size.

    Raises:
        InvalidInput: an operator that the catalogue does not have.
    """
    if recipe.data_plan is None:
        operators = _materialised(f"{recipe.name}.yaml", recipe.operators, catalogue)
        return replace(recipe, operators=operators)
    places = [_branch_place(recipe, position) for position in range(1, len(recipe.branches) + 1)]
    plan = recipe.data_plan.with_operators(
        _materialised(place, branch.operators, catalogue)
        for place, branch in zip(places, recipe.branches, strict=True)
    )
    if (sorting := plan.order.operator) is not None:
        _check_known(f"{recipe.name}.yaml, field order", sorting.name, catalogue)
        # Its thresholds drop nothing, so that writing them out would mislead.
        parameters = {**sorting.parameters, "num_proc": sorting.parameters.get("num_proc", 0)}
        plan = replace(
            plan, order=replace(plan.order, operator=replace(sorting, parameters=parameters))
        )
    return replace(recipe, data_plan=plan)


def _materialised(
    where: str, operators: Sequence[Operator], catalogue: Catalogue
) -> tuple[Operator, ...]:
    made = []
    for position, operator in enumerate(operators, 1):
        _check_known(f"{where}, operator {position}", operator.name, catalogue)
        spec = catalogue.operators[operator.name]
        values = {name: p.default for name, p in spec.parameters.items() if not p.required}
        base = catalogue.base[spec.kind]
        values |= {name: base[name].default for name in INTERVAL_PARAMETERS if name in base}
        values |= {"num_proc": 0, **operator.parameters}
        made.append(Operator(operator.name, values))
    return tuple(made)


def _branch_place(recipe: Recipe, position: int) -> str:
    """Return the file and, in a data plan, the branch, for messages."""
    if recipe.data_plan is None:
        return f"{recipe.name}.yaml"
    return f"{recipe.name}.yaml, branch {position} ({recipe.branches[position - 1].name})"


def _check_known(where: str, name: str, catalogue: Catalogue) -> None:
    """Check that the catalogue has the operator.

    Raises:
        InvalidInput: naming the closest operator.
    """
    if name not in catalogue.operators:
        raise InvalidInput(
            "Unknown operator", f"{where}: {name}", nearest(name, catalogue.operators)
        )


def operators_with_places(recipe: Recipe) -> Iterator[tuple[str, Operator]]:
    """Yield every operator of a recipe, the sorting one included, and its place for messages.

    The place names the file, the branch of a data plan, the position and the operator.
    """
    for number, branch in enumerate(recipe.branches, 1):
        where = _branch_place(recipe, number)
        for position, operator in enumerate(branch.operators, 1):
            yield f"{where}, operator {position} ({operator.name})", operator
    if recipe.data_plan is not None and (sorting := recipe.data_plan.order.operator) is not None:
        yield f"{recipe.name}.yaml, field order ({sorting.name})", sorting


def validate_recipe(recipe: Recipe, catalogue: Catalogue, workspace: Workspace) -> None:
    """Check everything about a recipe that can be known before it runs.

    Raises:
        InvalidInput: naming the file, the branch, the operator, the parameter and the fix.
    """
    check_options(f"{recipe.name}.yaml", recipe.options, workspace.root)
    for where, operator in operators_with_places(recipe):
        check_operator(where, operator.name, operator.parameters, catalogue, workspace)
    for number, branch in enumerate(recipe.branches, 1):
        place = _branch_place(recipe, number)
        sequence = [(operator.name, operator.parameters) for operator in branch.operators]
        check_sequence(place, sequence, catalogue)
        check_packages(place, sequence)
    sorting = recipe.data_plan.order.operator if recipe.data_plan is not None else None
    if sorting is not None and catalogue.operators[sorting.name].kind != "filter":
        raise InvalidInput(
            "Not a filter",
            f"{recipe.name}.yaml, field order.operator: {sorting.name} measures nothing",
            "name a filter, such as image_text_similarity_filter",
        )
    if sorting is not None:
        check_packages(f"{recipe.name}.yaml, field order", [(sorting.name, sorting.parameters)])


def diff_recipes(parent: Recipe | None, recipe: Recipe) -> tuple[DiffLine, ...]:
    """Return what changes from the parent, operator by operator; all of it when there is none.

    Branches of a data plan are compared with the parent's branches of the same name.
    """
    lines = list(_diff_options(parent.options if parent else {}, recipe.options))
    before = parent.branches if parent else ()
    names = [branch.name for branch in before], [branch.name for branch in recipe.branches]
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            for old, new in zip(before[i:i_end], recipe.branches[j:j_end], strict=True):
                lines += _diff_branch(old, new)
            continue
        for removed in before[i:i_end]:
            lines += _diff_branch(removed, None)
        for added in recipe.branches[j:j_end]:
            lines += _diff_branch(None, added)
    lines += _diff_options(_after_branches(parent), _after_branches(recipe))
    return tuple(lines)


def _after_branches(recipe: Recipe | None) -> dict[str, Any]:
    """Return what a data plan does with its branches' samples."""
    if recipe is None or recipe.data_plan is None:
        return {}
    return {key: value for key, value in recipe.data_plan.mapping().items() if key != "branches"}


def _diff_branch(before: Branch | None, after: Branch | None) -> Iterator[DiffLine]:
    """Yield a branch's changes, indented under its name if it has one."""
    operators = _diff_operators(
        before.operators if before else (), after.operators if after else ()
    )
    name = (after or before or Branch("", ())).name
    if not name:
        yield from operators
        return
    yield DiffLine(" " if before and after else "+" if after else "-", f"branch {name}")
    settings = _diff_values(_branch_settings(before), _branch_settings(after))
    for line in (*operators, *settings):
        yield replace(line, text=f"  {line.text}")


def _branch_settings(branch: Branch | None) -> dict[str, Any]:
    if branch is None:
        return {}
    return {k: v for k, v in branch.mapping().items() if k not in ("name", "process")}


def _diff_operators(before: Sequence[Operator], after: Sequence[Operator]) -> Iterator[DiffLine]:
    matcher = difflib.SequenceMatcher(
        None, [o.name for o in before], [o.name for o in after], autojunk=False
    )
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        if [o.name for o in before[i:i_end]] == [o.name for o in after[j:j_end]]:
            for old, new in zip(before[i:i_end], after[j:j_end], strict=True):
                yield DiffLine(" ", new.name)
                yield from _diff_values(old.parameters, new.parameters)
            continue
        for removed in before[i:i_end]:
            yield from _whole_operator("-", removed)
        for added in after[j:j_end]:
            yield from _whole_operator("+", added)


def _whole_operator(sign: Literal["+", "-"], operator: Operator) -> Iterator[DiffLine]:
    yield DiffLine(sign, operator.name)
    for name, value in operator.parameters.items():
        yield DiffLine(sign, f"  {name}: {_text(value)}")


def _diff_options(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[DiffLine]:
    yield from (
        replace(line, text=line.text.strip())
        for line in _diff_values(
            {key: value for key, value in before.items() if key not in PLACES},
            {key: value for key, value in after.items() if key not in PLACES},
        )
    )


def _diff_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[DiffLine]:
    for name in dict.fromkeys((*before, *after)):
        if name in before and name in after and before[name] == after[name]:
            continue
        if name in before:
            yield DiffLine("-", f"  {name}: {_text(before[name])}")
        if name in after:
            yield DiffLine("+", f"  {name}: {_text(after[name])}")


def _text(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )


def _read_header(text: str) -> dict[str, str]:
    header: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if start := _HEADER.fullmatch(line):
            key = start[1]
            header[key] = start[2].strip()
        elif key and (more := _CONTINUATION.fullmatch(line)):
            header[key] = f"{header[key]} {more[1].strip()}".strip()
        else:
            key = ""
    return header


def _published(text: str, path: Path) -> dict[str, float]:
    published: dict[str, float] = {}
    for part in text.split():
        key, _, value = part.partition("=")
        number = _number(value)
        if key not in _PUBLISHED_KEYS or number is None or not 0 <= number <= _MOST_PUBLISHED:
            raise InvalidInput(
                "Bad recipe header",
                f"{path}, published: {part!r}",
                f"write key=number, 0 to {_MOST_PUBLISHED:,}, with the keys "
                f"{', '.join(_PUBLISHED_KEYS)}",
            )
        published[key] = number
    if published and set(published) != set(_PUBLISHED_KEYS):
        raise InvalidInput(
            "Bad recipe header",
            f"{path}, published: {text!r}",
            f"give all of {', '.join(_PUBLISHED_KEYS)}",
        )
    return published


def _share(text: str, path: Path) -> float:
    number = _number(text)
    if number is None or not 0 <= number < math.inf:
        raise InvalidInput(
            "Bad recipe header",
            f"{path}, keeps: {text!r}",
            "write the share of samples that comes out, 0.5 for half, above 1 if samples are added",
        )
    return number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
