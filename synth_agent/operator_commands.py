"""The command `synth-agent operators`: what operators there are, and all about one of them."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import Any

from synth_agent.catalogue import COSTS, Catalogue, OperatorSpec, Parameter, load_catalogue
from synth_agent.errors import InvalidInput, nearest
from synth_agent.recipe_checks import parameters_as_checked
from synth_agent.recipe_order import missing_packages
from synth_agent.recipe_policy import refusal
from synth_agent.workspace import SETTINGS_NAME, Workspace

_WIDTH = 96


def operators(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print the operators, or the one that `options.operator` names; JSON if `options.json`.

    Without `options.all` the list leaves out operators that recipes may not name.

    Raises:
        InvalidInput: no operator has the name.
    """
    catalogue = load_catalogue()
    allowed = workspace.settings.allow_operators
    if options.operator is None:
        specs = [
            spec for spec in catalogue.operators.values() if options.all or is_usable(spec, allowed)
        ]
        if options.json:
            print(json.dumps([operator_data(spec, catalogue, allowed) for spec in specs]))
        else:
            print("\n".join(list_lines(specs, allowed)))
        return 0
    if options.operator not in catalogue.operators:
        raise InvalidInput(
            "Unknown operator", options.operator, nearest(options.operator, catalogue.operators)
        )
    spec = catalogue.operators[options.operator]
    if options.json:
        print(json.dumps(operator_data(spec, catalogue, allowed)))
    else:
        print("\n".join(detail_lines(spec, catalogue, allowed)))
    return 0


def is_usable(spec: OperatorSpec, allowed: Iterable[str]) -> bool:
    """Return whether a recipe may name the operator, by review or by a person's permission."""
    return not refusal(spec) or spec.name in allowed


def list_lines(specs: Iterable[OperatorSpec], allowed: Iterable[str]) -> list[str]:
    """Return one line for each operator: name, kind, cost, what it needs, whether it is refused."""
    allowed = tuple(allowed)
    listed = list(specs)
    width = max((len(spec.name) for spec in listed), default=0)
    return [
        f"{spec.name:<{width}}  {spec.kind:<12}  {spec.cost:<10}  "
        f"{_needs(spec)}{'' if is_usable(spec, allowed) else '  (refused)'}".rstrip()
        for spec in listed
    ]


def detail_lines(spec: OperatorSpec, catalogue: Catalogue, allowed: Iterable[str]) -> list[str]:
    """Return all that is known about an operator, its own parameters one a line."""
    lines = [spec.name, *textwrap.wrap(spec.summary, _WIDTH), ""]
    facts = [
        ("kind", spec.kind + (", keeps samples by thresholds" if spec.is_threshold else "")),
        ("source", spec.source),
        ("cost", f"{spec.cost}: {COSTS[spec.cost]}"),
        ("needs", _needs(spec) or "nothing of a sample"),
        ("packages", ", ".join(spec.packages)),
        ("missing", ", ".join(missing_packages(spec.name, {}))),
        ("refused", refusal(spec) + _permission(spec, allowed) if refusal(spec) else ""),
    ]
    lines += [f"{name:<9} {value}" for name, value in facts if value]
    lines += ["", "parameters"] if spec.parameters else []
    checked = parameters_as_checked(spec.name, catalogue)
    lines += [f"  {_parameter(checked[name])}" for name in spec.parameters]
    base = [name for name in catalogue.base[spec.kind] if name.endswith("interval")]
    shared = ["num_proc", "batch_size", *base, *(["reversed_range"] if base else [])]
    return [*lines, "", f"and, as every {spec.kind}: {', '.join(shared)}"]


def operator_data(
    spec: OperatorSpec, catalogue: Catalogue, allowed: Iterable[str]
) -> dict[str, Any]:
    """Return all that is known about an operator as plain values."""
    parameters = {
        name: {
            "accepts": list(parameter.accepts),
            "required": parameter.required,
            "default": parameter.default,
            "minimum": parameter.minimum,
            "maximum": parameter.maximum,
            "choices": list(parameter.choices),
        }
        for name, parameter in parameters_as_checked(spec.name, catalogue).items()
    }
    return {
        "name": spec.name,
        "kind": spec.kind,
        "summary": spec.summary,
        "source": spec.source,
        "cost": spec.cost,
        "needs": list(spec.needs),
        "packages": list(spec.packages),
        "missing_packages": list(missing_packages(spec.name, {})),
        "is_threshold": spec.is_threshold,
        "usable": is_usable(spec, allowed),
        "refused": refusal(spec),
        "parameters": parameters,
    }


def _needs(spec: OperatorSpec) -> str:
    return ", ".join(spec.needs)


def _permission(spec: OperatorSpec, allowed: Iterable[str]) -> str:
    if spec.name in allowed:
        return f"; allowed in {SETTINGS_NAME}"
    return f"; a person can list it under allow_operators in {SETTINGS_NAME}"


def _parameter(parameter: Parameter) -> str:
    kinds = " or ".join(parameter.accepts)
    default = "required" if parameter.required else f"default {json.dumps(parameter.default)}"
    if len(default) > 60:
        default = f"{default[:57]}..."
    text = f"{parameter.name}: {kinds}, {default}"
    if parameter.choices:
        text += f", one of {', '.join(map(str, parameter.choices))}"
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        return f"{text}, from {low:g} to {high:g}"
    if high is not None:
        return f"{text}, at most {high:g}"
    return text if low is None else f"{text}, {low:g} or more"
