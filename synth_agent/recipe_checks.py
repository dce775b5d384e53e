"""What a recipe may say: allowed options, parameters within bounds, paths inside the workspace.

Data-Juicer's own check before a run looks at names and plain types only. Ranges, choices, missing
models and everything unsafe are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from synth_agent.catalogue import Catalogue, Parameter
from synth_agent.errors import InvalidInput, nearest
from synth_agent.workspace import SETTINGS_NAME, Workspace

OPTIONS: dict[str, str] = {
    "project_name": "str",
    "dataset_path": "path",
    "export_path": "path",
    "np": "int",
    "auto_op_parallelism": "bool",
    "skip_op_error": "bool",
    "turbo": "bool",
    "text_keys": "str",
    "image_key": "str",
    "image_special_token": "str",
    "eoc_special_token": "str",
    "keep_stats_in_res_ds": "bool",
    "keep_hashes_in_res_ds": "bool",
}
"""Global options that a recipe may set. The rest of Data-Juicer's can read or write anywhere."""

FORBIDDEN_PARAMETERS = {
    "runtime_env": "it installs packages",
    "ray_execution_mode": "recipes run on one machine",
    "work_dir": "the run chooses the folder",
}
MODEL_PREFIX = "hf_"
PATH_SUFFIXES = ("_dir", "_path", "_file", "_paths", "_files")


def check_options(where: str, options: Mapping[str, Any]) -> None:
    """Check a recipe's global options.

    Raises:
        InvalidInput: an option that is not allowed, or a value of a wrong type.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidInput(
                "Option not allowed", f"{where}: {name}", nearest(str(name), OPTIONS)
            )
        place = f"{where}, option {name}"
        kind = OPTIONS[name]
        if kind == "path":
            _check_path(place, value)
        elif type(value).__name__ != kind:
            raise InvalidInput("Wrong type", f"{place}: {value!r}", f"give a value of type {kind}")
    if options.get("np", 1) < 1:
        raise InvalidInput("Out of range", f"{where}, option np: {options['np']}", "give 1 or more")
    if options.get("skip_op_error"):
        _refuse_skipping(f"{where}, option skip_op_error")
    if "skip_op_error" not in options:
        raise InvalidInput(
            "Errors would drop samples",
            f"{where}: skip_op_error is not set, and Data-Juicer's default drops whole batches",
            "write `skip_op_error: false`",
        )


def check_operator(
    where: str,
    name: str,
    parameters: Mapping[str, Any],
    catalogue: Catalogue,
    workspace: Workspace,
) -> None:
    """Check one operator, and operators nested in its parameters.

    Raises:
        InvalidInput: naming the parameter and the fix.
    """
    if name not in catalogue.operators:
        raise InvalidInput("Unknown operator", where, nearest(name, catalogue.operators))
    spec = catalogue.operators[name]
    if spec.danger and name not in workspace.settings.allow_operators:
        raise InvalidInput(
            "Operator refused",
            f"{where}: it {spec.danger}",
            f"leave it out, or list {name} under allow_operators in {SETTINGS_NAME}",
        )
    known = catalogue.parameters(name)
    for key, value in parameters.items():
        place = f"{where}, parameter {key}"
        if key not in known:
            raise InvalidInput("Unknown parameter", place, nearest(str(key), known))
        _check_value(place, known[key], value)
        _check_safety(place, key, value)
        for nested, inner in _nested_operators(key, value):
            check_operator(f"{place}, {nested}", nested, inner, catalogue, workspace)
    for key, parameter in known.items():
        if parameter.required and key not in parameters:
            raise InvalidInput("Missing parameter", f"{where}: {key}", f"add {key}")
    _check_order(where, {**{k: p.default for k, p in known.items()}, **parameters})
    defaults = {key: parameter.default for key, parameter in spec.parameters.items()}
    check_models(where, {**defaults, **parameters}, workspace.root)


def _check_value(place: str, parameter: Parameter, value: Any) -> None:
    if not _is_accepted(value, parameter.accepts):
        expected = " or ".join(parameter.accepts)
        raise InvalidInput("Wrong type", f"{place}: {value!r}", f"give a value of type {expected}")
    if parameter.choices and value is not None and value not in parameter.choices:
        raise InvalidInput(
            "Unknown value", f"{place}: {value!r}", nearest(str(value), map(str, parameter.choices))
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise InvalidInput("Not a number", f"{place}: {value}", "give a finite number")
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"{low:g} or more" if high is None else f"a value from {low or 0:g} to {high:g}"
        raise InvalidInput("Out of range", f"{place}: {value}", f"give {bounds}")


def _is_accepted(value: Any, accepts: tuple[str, ...]) -> bool:
    if "any" in accepts:
        return True
    if value is None:
        return "null" in accepts
    kind = type(value).__name__
    return kind in accepts or (kind == "int" and "float" in accepts)


def _check_safety(place: str, key: str, value: Any) -> None:
    """Check what may not occur at any depth of a parameter."""
    for name, inner in _walk(key, value):
        if name == "trust_remote_code" and inner:
            raise InvalidInput(
                "Remote code refused", f"{place}: {name} = {inner!r}", "set it to false"
            )
        if name in FORBIDDEN_PARAMETERS and inner is not None:
            reason = FORBIDDEN_PARAMETERS[name]
            raise InvalidInput("Parameter refused", f"{place}: {reason}", "leave it out")
        if name == "skip_op_error" and inner:
            _refuse_skipping(place)
        if name == "tokenization" and inner is True:
            raise InvalidInput(
                "Parameter refused", f"{place}: it downloads a tokenizer", "set it to false"
            )
        if isinstance(inner, str) and (_names_path(name) or _leaves_workspace(inner)):
            _check_path(place, inner)


def check_models(where: str, parameters: Mapping[str, Any], root: Path) -> None:
    """Check that every model that an operator's parameters name is a folder under `root`.

    Raises:
        InvalidInput: naming the parameter and the folder.
    """
    for name, value in parameters.items():
        if not name.startswith(MODEL_PREFIX) or not isinstance(value, str) or not value:
            continue
        if not (root / value).is_dir():
            raise InvalidInput(
                "Model folder is missing",
                f"{where}, parameter {name}: {value} is not a folder of the workspace",
                "put the model there, or name the folder that holds it",
            )


def _check_order(where: str, values: Mapping[str, Any]) -> None:
    for name, low in values.items():
        if not name.startswith("min_"):
            continue
        upper = f"max_{name.removeprefix('min_')}"
        high = values.get(upper)
        if _is_number(low) and _is_number(high) and low > high:
            raise InvalidInput(
                "Empty range",
                f"{where}, parameter {name}: {low} is more than {upper} = {high}",
                f"lower {name} or raise {upper}",
            )


def _check_path(place: str, value: object) -> None:
    if not isinstance(value, str) or not value or _leaves_workspace(value) or "{" in value:
        raise InvalidInput(
            "Path outside the workspace",
            f"{place}: {value!r}",
            "give a path relative to the workspace root, without '..'",
        )


def _leaves_workspace(text: str) -> bool:
    path = PurePosixPath(text.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "://" in text or text.startswith("~")


def _names_path(name: str) -> bool:
    return name.startswith(MODEL_PREFIX) or name.endswith(PATH_SUFFIXES)


def _walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(key, inner)


def _nested_operators(key: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the operators of a parameter that is a process list of its own."""
    if not isinstance(value, list) or not {"op", "ops"} & set(key.split("_")):
        return
    for entry in value:
        if isinstance(entry, Mapping):
            for name, parameters in entry.items():
                yield str(name), parameters if isinstance(parameters, Mapping) else {}


def _refuse_skipping(place: str) -> None:
    raise InvalidInput(
        "Errors would drop samples",
        f"{place}: one failing sample would drop its whole batch unseen",
        "set skip_op_error to false",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
