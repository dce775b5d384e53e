"""Recipes: Data-Juicer configurations as values, their files, their checks and their differences.

A recipe file is YAML that `dj-process` runs unchanged from the workspace root. Its comment header
holds what Data-Juicer has no place for: title, reason, published result, share of samples kept.
Nothing here imports Data-Juicer; `catalogue` says what operators there are.
"""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from synth_agent.catalogue import Catalogue, load_catalogue
from synth_agent.errors import InvalidInput, nearest
from synth_agent.recipe_checks import check_operator, check_options
from synth_agent.runs import digest
from synth_agent.workspace import Workspace

__all__ = [
    "Catalogue",
    "DiffLine",
    "Operator",
    "Recipe",
    "diff_recipes",
    "dump_recipe",
    "list_recipes",
    "load_catalogue",
    "load_recipe",
    "materialise",
    "recipe_from_mapping",
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


@dataclass(frozen=True)
class Operator:
    """One step of a recipe: an operator of Data-Juicer and its parameters."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A data recipe. `operators` run in order on the seed set."""

    name: str
    title: str
    reason: str
    operators: tuple[Operator, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Global options of Data-Juicer: everything in the file besides `process`."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Published result of this kind of recipe: textvqa and mmbench (times the baseline), rows_k
    (thousand samples left), row (of the published table). Empty when there is none."""
    keeps: float | None = None
    """Share of the seed samples that it leaves, when known."""

    def mapping(self) -> dict[str, Any]:
        """Return what the file holds as YAML: the options and `process`."""
        process = [{operator.name: dict(operator.parameters)} for operator in self.operators]
        return {**self.options, "process": process}

    @property
    def digest(self) -> str:
        """Digest of what decides the outcome: operators and options, not names and places."""
        return digest({k: v for k, v in self.mapping().items() if k not in PLACES})


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
        text = path.read_text(encoding="utf-8")
        mapping = yaml.safe_load(text)
    except OSError as error:
        raise InvalidInput(
            "Cannot read recipe", f"{path}: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "Recipe is not UTF-8", f"{path}: {error.reason}", "save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise InvalidInput(
            "Recipe is not YAML", f"{path}: {error}", "correct the syntax"
        ) from error
    header = _read_header(text)
    return replace(
        recipe_from_mapping(path.stem, mapping),
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
        InvalidInput: a bad name, not a mapping, or `process` is not a list of operators.
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
    process = mapping.get("process")
    if not isinstance(process, list | tuple):
        raise InvalidInput(
            "No process list", f"{where}: process = {process!r}", "write `process: [...]`"
        )
    operators = tuple(
        _operator(entry, f"{where}, operator {i}") for i, entry in enumerate(process, 1)
    )
    options = {key: value for key, value in mapping.items() if key not in ("name", "process")}
    return Recipe(name=name, title=name, reason="", operators=operators, options=options)


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
    body = yaml.safe_dump(recipe.mapping(), sort_keys=False, allow_unicode=True, width=96)
    return "\n".join(lines) + "\n" + body


def materialise(recipe: Recipe, catalogue: Catalogue) -> Recipe:
    """Return the recipe with every parameter of every operator written out.

    Defaults come from the catalogue. `num_proc` is 0, which runs an operator in the process that
    reports its progress; workers cost more than they bring on data of this size.

    Raises:
        InvalidInput: an operator that the catalogue does not have.
    """
    operators = []
    for position, operator in enumerate(recipe.operators, 1):
        _check_known(recipe, position, operator, catalogue)
        spec = catalogue.operators[operator.name]
        values = {name: p.default for name, p in spec.parameters.items() if not p.required}
        base = catalogue.base[spec.kind]
        values |= {name: base[name].default for name in INTERVAL_PARAMETERS if name in base}
        values |= {"num_proc": 0, **operator.parameters}
        operators.append(Operator(operator.name, values))
    return replace(recipe, operators=tuple(operators))


def _check_known(recipe: Recipe, position: int, operator: Operator, catalogue: Catalogue) -> None:
    """Check that the catalogue has the operator.

    Raises:
        InvalidInput: naming the closest operator.
    """
    if operator.name not in catalogue.operators:
        raise InvalidInput(
            "Unknown operator",
            f"{recipe.name}.yaml, operator {position}: {operator.name}",
            nearest(operator.name, catalogue.operators),
        )


def validate_recipe(recipe: Recipe, catalogue: Catalogue, workspace: Workspace) -> None:
    """Check everything about a recipe that can be known before it runs.

    Raises:
        InvalidInput: naming the file, the operator, the parameter and the fix.
    """
    check_options(f"{recipe.name}.yaml", recipe.options)
    for position, operator in enumerate(recipe.operators, 1):
        where = f"{recipe.name}.yaml, operator {position} ({operator.name})"
        check_operator(where, operator.name, operator.parameters, catalogue, workspace)


def diff_recipes(parent: Recipe | None, recipe: Recipe) -> tuple[DiffLine, ...]:
    """Return what changes from the parent, operator by operator; all of it when there is none."""
    before = parent.operators if parent else ()
    after = recipe.operators
    lines = list(_diff_options(parent.options if parent else {}, recipe.options))
    matcher = difflib.SequenceMatcher(
        None, [o.name for o in before], [o.name for o in after], autojunk=False
    )
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        if [o.name for o in before[i:i_end]] == [o.name for o in after[j:j_end]]:
            for old, new in zip(before[i:i_end], after[j:j_end], strict=True):
                lines.append(DiffLine(" ", new.name))
                lines += _diff_values(old.parameters, new.parameters)
            continue
        for sign, removed_or_added in (("-", before[i:i_end]), ("+", after[j:j_end])):
            for operator in removed_or_added:
                lines += _whole_operator("+" if sign == "+" else "-", operator)
    return tuple(lines)


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


def _operator(entry: object, where: str) -> Operator:
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, parameters = next(iter(entry.items()))
        if isinstance(name, str) and (parameters is None or isinstance(parameters, Mapping)):
            return Operator(name, dict(parameters or {}))
    raise InvalidInput(
        "Bad operator", f"{where}: {entry!r}", "write `- operator_name: {parameter: value}`"
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
        if key not in _PUBLISHED_KEYS or number is None:
            raise InvalidInput(
                "Bad recipe header",
                f"{path}, published: {part!r}",
                f"write key=number with the keys {', '.join(_PUBLISHED_KEYS)}",
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
