"""Whether a recipe's options and operators are allowed, and their values possible.

A recipe may come from anybody. Data-Juicer's own check before a run looks at names and plain types
only; whether a recipe is safe, and whether it can work, is decided here by the tables of
`recipe_policy`. `docs/recipe-safety.md` is the page for people.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex

from synth_agent.catalogue import Catalogue, OperatorSpec, Parameter
from synth_agent.errors import InvalidInput, nearest
from synth_agent.recipe_paths import (
    check_export,
    check_links,
    check_models,
    check_needed_models,
    check_path,
    check_written,
    leaves_workspace,
)
from synth_agent.recipe_policy import (
    BASE_PARAMETERS,
    CHOICES,
    FIELD_PARAMETERS,
    FIELDS,
    FILE_PARAMETERS,
    LIMITS,
    META_FIELD,
    MODEL_PARAMETERS,
    MODEL_PREFIX,
    MODEL_VALUES,
    OPTIONS,
    PATH_SUFFIXES,
    PATTERNS,
    REFUSED_NAMES,
    STATS_FIELD,
    TEXTS,
    UNTYPED,
    WRITTEN_FOLDER,
    WRITTEN_FOLDERS,
    refusal,
)
from synth_agent.recipe_yaml import check_shape, printable, shown
from synth_agent.workspace import SETTINGS_NAME, Workspace

__all__ = ["check_models", "check_operator", "check_options", "parameters_as_checked"]


_OPERATOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,79}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,79}")
_SIZE = re.compile(r"(\d{1,15}) ?(?:([KMGTP])i?B?|B)?", re.IGNORECASE)
_MEMORY = re.compile(r"\d{1,6}(\.\d{1,3})? ?[KMGT]i?B?", re.IGNORECASE)
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_EXPRESSION_NODES = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.Name, ast.Attribute, ast.Load),
    *(ast.Constant, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.List, ast.Tuple, ast.Set),
    *(ast.Gt, ast.Lt, ast.Eq, ast.NotEq, ast.GtE, ast.LtE, ast.In, ast.NotIn),
)


def check_options(where: str, options: Mapping[str, Any], root: Path | None = None) -> None:
    """Check a recipe's global options.

    Args:
        where: The file, for errors.
        options: Names and values.
        root: The workspace, to see where links lead; None leaves that out.

    Raises:
        InvalidInput: an option that is not allowed, or a value of a wrong type.
    """
    where = printable(where)
    check_shape(where, options)
    for name, value in options.items():
        if name not in OPTIONS:
            reason = f" ({REFUSED_NAMES[name]})" if name in REFUSED_NAMES else ""
            raise InvalidInput(
                "Option not allowed", f"{where}: {shown(name)}{reason}", nearest(name, OPTIONS)
            )
        _check_option(f"{where}, option {name}", name, value, root)
    if options.get("skip_op_error"):
        _refuse_skipping(f"{where}, option skip_op_error")
    if "skip_op_error" not in options:
        raise InvalidInput(
            "Errors would drop samples",
            f"{where}: skip_op_error is not set, and Data-Juicer's default drops whole batches",
            "write `skip_op_error: false`",
        )


def _check_option(place: str, name: str, value: Any, root: Path | None) -> None:
    kind = OPTIONS[name]
    if kind == "path":
        check_path(place, value)
        if name == "export_path":
            check_export(place, value)
        if root is not None:
            check_links(place, value, root)
        return
    if type(value).__name__ != kind:
        raise InvalidInput("Wrong type", f"{place}: {shown(value)}", f"give a value of type {kind}")
    if name == "np" and not 1 <= value <= LIMITS["num_proc"][1]:
        raise InvalidInput("Out of range", f"{place}: {value}", "give 1 or more, at most 64")
    if name == "project_name" and not _LABEL.fullmatch(value):
        raise InvalidInput("Bad name", f"{place}: {shown(value)}", "use letters and digits")
    if name in ("text_keys", "image_key"):
        field = "text" if name == "text_keys" else "images"
        if value != field:
            raise InvalidInput("Unknown field", f"{place}: {shown(value)}", f"write {field}")


def check_operator(
    where: str,
    name: str,
    parameters: Mapping[str, Any],
    catalogue: Catalogue,
    workspace: Workspace,
) -> None:
    """Check one operator, and operators nested in its parameters.

    Raises:
        InvalidInput: naming the operator or the parameter, and the fix.
    """
    where = printable(where)
    if not _OPERATOR_NAME.fullmatch(name):
        raise InvalidInput(
            "Bad operator name", f"{where}: {shown(name)}", "use ASCII letters, digits and _"
        )
    if name not in catalogue.operators:
        raise InvalidInput("Unknown operator", where, nearest(name, catalogue.operators))
    spec = catalogue.operators[name]
    is_allowed_by_hand = name in workspace.settings.allow_operators
    if (reason := refusal(spec)) and not is_allowed_by_hand:
        raise InvalidInput(
            "Operator refused",
            f"{where}: {name} {reason}",
            f"leave it out; only a person can list it under allow_operators in {SETTINGS_NAME}",
        )
    check_shape(where, parameters)
    known = catalogue.parameters(name)
    own = spec.parameters if is_allowed_by_hand else {}
    for key, value in parameters.items():
        place = f"{where}, parameter {shown(key)[1:-1]}"
        if key not in known:
            raise InvalidInput("Unknown parameter", place, nearest(key, known))
        for nested, inner in _nested_operators(key, value, catalogue):
            _check_nested(place, nested, inner, catalogue, workspace)
        _check_names(place, key, value, frozenset(own))
        if key not in spec.parameters and key not in BASE_PARAMETERS:
            _check_left_alone(place, known[key], value)
        _check_value(place, known[key], value)
        _check_strings(place, spec, key, value)
    _check_required(where, name, parameters, known)
    values = {**{key: p.default for key, p in known.items()}, **parameters}
    _check_order(where, values)
    _check_together(where, name, values)
    own_values = {key: values[key] for key in spec.parameters}
    check_needed_models(where, spec, own_values, workspace.root)


def _check_left_alone(place: str, parameter: Parameter, value: Any) -> None:
    """Check that a parameter of every operator that recipes do not set has its default."""
    if value is None or (type(value) is type(parameter.default) and value == parameter.default):
        return
    raise InvalidInput("Parameter refused", f"{place}: recipes do not set it", "leave it out")


def _check_value(place: str, parameter: Parameter, value: Any) -> None:
    default = parameter.default
    # Some defaults are outside the bounds, and a recipe that is written out repeats them.
    if not parameter.required and type(value) is type(default) and value == default:
        return
    parameter = _as_checked(parameter)
    if not _is_accepted(value, parameter.accepts):
        expected = " or ".join(parameter.accepts)
        raise InvalidInput(
            "Wrong type", f"{place}: {shown(value)}", f"give a value of type {expected}"
        )
    choices = parameter.choices
    if choices and value is not None and value not in choices:
        raise InvalidInput(
            "Unknown value", f"{place}: {shown(value)}", nearest(str(value), map(str, choices))
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        if high is None:
            bounds = f"{low:g} or more"
        elif high <= 1 or low is None:
            bounds = f"a value from {low or 0:g} to {high:g}"
        else:
            bounds = f"{low:g} or more, at most {high:g}"
        raise InvalidInput("Out of range", f"{place}: {value}", f"give {bounds}")


def parameters_as_checked(operator: str, catalogue: Catalogue) -> dict[str, Parameter]:
    """Return the parameters of an operator with what a recipe is held to.

    Types, bounds, choices and which have to be named: Data-Juicer's, narrowed by `recipe_policy`.
    """
    known = catalogue.parameters(operator)
    needed = _required(operator, known)
    return {
        name: replace(_as_checked(parameter), required=name in needed)
        for name, parameter in known.items()
    }


def _as_checked(parameter: Parameter) -> Parameter:
    accepts, choices = parameter.accepts, parameter.choices
    if "any" in accepts:
        accepts = UNTYPED.get(parameter.name, accepts)
    low, high = parameter.minimum, parameter.maximum
    if parameter.name in LIMITS:
        least, most = LIMITS[parameter.name]
        low = least if low is None else max(low, least)
        high = most if high is None else min(high, most)
    return replace(
        parameter,
        accepts=accepts,
        choices=choices or CHOICES.get(parameter.name, ()),
        minimum=low,
        maximum=high,
    )


def _is_accepted(value: Any, accepts: tuple[str, ...]) -> bool:
    if "any" in accepts:
        return True
    if value is None:
        return "null" in accepts
    kind = type(value).__name__
    return kind in accepts or (kind == "int" and "float" in accepts)


def _check_names(place: str, key: str, value: Any, own: frozenset[str]) -> None:
    """Check names that may occur at no depth of a parameter; `own` are lifted by a person."""
    for name, inner in _walk(key, value):
        if name == "trust_remote_code" and inner is not False and inner is not None:
            raise InvalidInput(
                "Remote code refused", f"{place}: {name} = {shown(inner)}", "set it to false"
            )
        inside = place if name == key else f"{place}, {name}"
        is_lifted = name == key and name in own and "endpoint" not in name
        if name in REFUSED_NAMES and inner is not None and not is_lifted:
            raise InvalidInput(
                "Parameter refused",
                f"{inside}: {REFUSED_NAMES[name]}",
                "leave it out",
            )
        if name == "skip_op_error" and inner:
            _refuse_skipping(place)
        if name == "tokenization" and inner is True:
            raise InvalidInput(
                "Parameter refused", f"{place}: it downloads a tokenizer", "set it to false"
            )
        if name in MODEL_PARAMETERS and isinstance(inner, Mapping):
            for passed in inner:
                if passed not in MODEL_VALUES:
                    raise InvalidInput(
                        "Parameter refused",
                        f"{place}: {shown(passed)} is not among what a model may be given",
                        nearest(str(passed), MODEL_VALUES),
                    )


def _check_strings(place: str, spec: OperatorSpec, key: str, value: Any) -> None:
    """Check every string of a parameter for what its name says that it is."""
    for name, inner in _walk(key, value):
        if not isinstance(inner, str):
            continue
        if name in FIELD_PARAMETERS:
            _check_field(place, spec, name, inner)
        elif name in PATTERNS:
            _check_pattern(place, inner)
        elif name == "filter_condition":
            _check_condition(place, inner)
        elif name in ("min_size", "max_size"):
            _check_size(place, inner)
        elif name in ("memory", "mem_required"):
            _check_text(place, inner, _MEMORY, "give a size such as 1500MB")
        elif name == "lang":
            _check_text(place, inner, _LANGUAGE, "give a language such as en")
        elif name == "redact_keys" and inner != "text":
            raise InvalidInput("Unknown field", f"{place}: {shown(inner)}", "write text")
        elif name.startswith(MODEL_PREFIX) or name.endswith(PATH_SUFFIXES):
            if inner or not name.startswith(MODEL_PREFIX):
                check_path(place, inner)
            if name in WRITTEN_FOLDERS:
                check_written(place, inner)
        elif (name in FILE_PARAMETERS and inner) or (name not in TEXTS and leaves_workspace(inner)):
            check_path(place, inner)


def _check_text(place: str, text: str, pattern: re.Pattern[str], hint: str) -> None:
    if not pattern.fullmatch(text):
        raise InvalidInput("Unknown value", f"{place}: {shown(text)}", hint)


def _check_field(place: str, spec: OperatorSpec, name: str, field: str) -> None:
    if name not in ("text_key", "image_key"):
        valid: tuple[str, ...] = FIELDS
    elif name == "image_key":
        valid = ("images",)
    else:
        # What changes samples may not change their ids.
        valid = ("text", "id") if spec.kind in ("filter", "deduplicator") else ("text",)
    if field not in valid:
        raise InvalidInput(
            "Unknown field", f"{place}: {shown(field)}", f"valid names: {', '.join(valid)}"
        )


def _check_pattern(place: str, pattern: str) -> None:
    quoted = len(pattern) > 2 and pattern[0] == "r" and pattern[1] in "'\"" == pattern[-1]
    text = pattern[2:-1] if quoted else pattern
    try:
        regex.compile(text)
        if place.endswith("split_pattern"):
            re.compile(text)
    except (regex.error, re.error, OverflowError, RecursionError) as error:
        raise InvalidInput(
            "Bad pattern", f"{place}: {shown(pattern)}: {error}", "correct the regular expression"
        ) from error


def _check_condition(place: str, text: str) -> None:
    """Check the expression of general_field_filter: comparisons of fields with constants."""
    try:
        tree = ast.parse(text.strip() or "True", mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InvalidInput(
            "Bad condition", f"{place}: {shown(text)}", "write one such as `10 < a and b == 'c'`"
        ) from error
    for count, node in enumerate(ast.walk(tree)):
        if count > 200 or not isinstance(node, _EXPRESSION_NODES):
            raise InvalidInput(
                "Bad condition",
                f"{place}: {type(node).__name__} is not allowed",
                "compare fields with constants, joined by and, or, not",
            )
        is_private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
        names = (*FIELDS, STATS_FIELD, META_FIELD)
        if is_private or (isinstance(node, ast.Name) and node.id not in names):
            raise InvalidInput(
                "Unknown field", f"{place}: {shown(text)}", f"valid names: {', '.join(names)}"
            )
        if isinstance(node, ast.Attribute) and not _has_parts(node):
            raise InvalidInput(
                "Unknown field",
                f"{place}: {shown(ast.unparse(node))}: it has no parts, so no sample would be kept",
                f"name a stat or meta value: {STATS_FIELD}.num_words, {META_FIELD}.key",
            )


def _has_parts(node: ast.Attribute) -> bool:
    """Tell whether an attribute is one of the stats or of the meta values."""
    inner = node.value
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return isinstance(inner, ast.Name) and inner.id in (STATS_FIELD, META_FIELD)


def _check_size(place: str, text: str) -> None:
    if not _SIZE.fullmatch(text):
        raise InvalidInput(
            "Bad size",
            f"{place}: {shown(text)}, and Data-Juicer would read its digits as a whole number",
            "give a whole number and a unit, such as 500KB",
        )


def _bytes(value: object) -> int | None:
    """Return a size in bytes as Data-Juicer reads it; None when the value is no size."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    unit = (match[2] or "").upper()
    return int(match[1]) << (10 * (" KMGTP".index(unit) if unit else 0))


def _required(name: str, known: Mapping[str, Parameter]) -> list[str]:
    needed = [key for key, parameter in known.items() if parameter.required]
    if name.endswith(("_field_selector", "specified_field_filter", "_numeric_field_filter")):
        needed.append("field_key")
    if WRITTEN_FOLDER in known:
        needed.append(WRITTEN_FOLDER)
    if name == "tags_specified_field_selector":
        needed.append("target_tags")
    return needed


def _check_required(
    where: str, name: str, parameters: Mapping[str, Any], known: Mapping[str, Parameter]
) -> None:
    for key in _required(name, known):
        if key not in parameters or parameters[key] in (None, ""):
            raise InvalidInput("Missing parameter", f"{where}: {key}", f"add {key}")


def _check_order(where: str, values: Mapping[str, Any]) -> None:
    for name, low in values.items():
        prefix, _, rest = name.partition("_")
        if prefix not in ("min", "lower"):
            continue
        upper = f"{'max' if prefix == 'min' else 'upper'}_{rest}"
        high = values.get(upper)
        if rest == "size":
            low, high = _bytes(low), _bytes(high)
        if _is_number(low) and _is_number(high) and low > high:
            raise InvalidInput(
                "Empty range",
                f"{where}, parameter {name}: {values[name]} is more than {upper} = {values[upper]}",
                f"lower {name} or raise {upper}",
            )


def _check_together(where: str, name: str, values: Mapping[str, Any]) -> None:
    """Check parameters that only make sense together."""
    if name == "document_simhash_deduplicator":
        blocks, distance = values["num_blocks"], values["hamming_distance"]
        if distance >= blocks or math.comb(blocks, distance) > 10_000:
            raise InvalidInput(
                "Out of range",
                f"{where}, parameter hamming_distance: {distance} with num_blocks = {blocks}",
                "give a hamming_distance below num_blocks, both small",
            )
    if name.startswith("document_minhash_deduplicator"):
        _check_bands(where, values)
    if name == "text_chunk_mapper":
        longest, overlap = values["max_len"], values["overlap_len"]
        if longest is None and values["split_pattern"] is None:
            raise InvalidInput(
                "Missing parameter", f"{where}: max_len", "give max_len or split_pattern"
            )
        if longest is not None and not 0 <= overlap < longest:
            raise InvalidInput(
                "Out of range",
                f"{where}, parameter overlap_len: {overlap} with max_len = {longest}",
                "give an overlap_len below max_len",
            )


def _check_bands(where: str, values: Mapping[str, Any]) -> None:
    bands, rows = values["num_bands"], values["num_rows_per_band"]
    if (bands is None) != (rows is None):
        raise InvalidInput(
            "Missing parameter",
            f"{where}: num_bands = {bands}, num_rows_per_band = {rows}, and one alone is ignored",
            "give both or neither",
        )
    if bands is not None and bands * rows > values["num_permutations"]:
        raise InvalidInput(
            "Out of range",
            f"{where}, parameter num_bands: {bands} * {rows} rows is more than num_permutations = "
            f"{values['num_permutations']}, and empty bands make all samples repeats",
            "give fewer bands or rows",
        )
    if values["tokenization"] == "sentencepiece" and not values["tokenizer_model"]:
        raise InvalidInput(
            "Missing parameter", f"{where}: tokenizer_model", "name a sentencepiece model file"
        )


def _walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(key, inner)


def _nested_operators(
    key: str, value: Any, catalogue: Catalogue
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield operators inside a parameter, however it spells them.

    Process lists hold `name: parameters`; fused operators also take `class_name` and `kwargs`.
    """
    is_list = isinstance(value, list) and {"op", "ops"} & set(key.split("_"))
    for _, inner in _walk(key, value):
        if not isinstance(inner, Mapping):
            continue
        for name in ("class_name", "name", "op", "op_name", "type"):
            if isinstance(inner.get(name), str) and (is_list or inner[name] in catalogue.operators):
                kwargs = inner.get("kwargs")
                yield inner[name], kwargs if isinstance(kwargs, Mapping) else {}
        for name, parameters in inner.items():
            if name in catalogue.operators:
                yield name, parameters if isinstance(parameters, Mapping) else {}
    if is_list:
        for entry in value:
            if not isinstance(entry, Mapping) or len(entry) != 1:
                continue
            for name, parameters in entry.items():
                if name not in catalogue.operators:
                    yield str(name), parameters if isinstance(parameters, Mapping) else {}


def _check_nested(
    place: str, name: str, inner: Mapping[str, Any], catalogue: Catalogue, workspace: Workspace
) -> None:
    check_operator(f"{place}, {shown(name)[1:-1]}", name, inner, catalogue, workspace)
    if catalogue.operators[name].kind not in ("mapper", "filter"):
        raise InvalidInput(
            "Operator cannot be fused",
            f"{place}, {name}: it needs all samples at once",
            "put it into the recipe's own list",
        )


def _refuse_skipping(place: str) -> None:
    raise InvalidInput(
        "Errors would drop samples",
        f"{place}: one failing sample would drop its whole batch unseen",
        "set skip_op_error to false",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
