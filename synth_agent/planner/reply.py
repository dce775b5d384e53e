"""What a model is asked to write for a proposal, and the reading of what it wrote.

Owns the JSON schema, the tolerant search for objects in a reply, and the types of their fields. Whether
a proposal makes sense is checked in `proposing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from synth_agent.errors import InvalidInput
from synth_agent.planner.fencing import cut, visible
from synth_agent.planner.training_changes import TRAINING_FIELDS
from synth_agent.runs import Kind
from synth_agent.wording import BENCHMARK_NAMES

MOST_CHARACTERS = 200_000
MOST_DEPTH = 24
_MOST_STARTS = 64
_KNOWN_FIELDS = frozenset({"kind", "recipe", "hypothesis", "parent", "predictions", "evidence"})
_LEAST_FIELDS = 2
_WRAPPERS = ("proposal", "arguments", "parameters")

Text = Annotated[str, Field(max_length=4000)]


class _Given(BaseModel):
    """A part of what the model wrote. Names that are not asked for are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class GivenPrediction(_Given):
    """What the model expects on one benchmark, percentage points against the parent."""

    benchmark: Annotated[str, Field(max_length=40)]
    expected: float
    low: float
    high: float


class GivenProposal(_Given):
    """A proposal as the model wrote it: of the right types, otherwise unchecked."""

    kind: Kind
    title: Annotated[str, Field(min_length=1, max_length=300)]
    name: Annotated[str, Field(max_length=200)] = ""
    parent: Annotated[str, Field(max_length=200)] | None = None
    recipe: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    reason: Annotated[Text, Field(min_length=1)]
    hypothesis: Annotated[Text, Field(min_length=1)]
    refuted_by: Annotated[Text, Field(min_length=1)]
    evidence: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=30)]
    predictions: Annotated[list[GivenPrediction], Field(max_length=10)]


def schema() -> dict[str, Any]:
    """Return the JSON schema of the object that the model is asked for."""
    step = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
        "required": ["name"],
    }
    steps = {"type": "array", "items": step}
    branch = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "process": steps,
            "repeat": {"type": "integer", "minimum": 1},
            "sample": {"type": ["object", "null"]},
        },
        "required": ["name", "process"],
    }
    recipe = {
        "type": ["object", "null"],
        "properties": {
            "process": steps,
            "branches": {"type": "array", "items": branch},
            "deduplicate": {"type": "boolean"},
            "order": {"type": "object"},
        },
    }
    text = {"type": "string"}
    properties = {
        "kind": {"type": "string", "enum": list(get_args(Kind))},
        "name": text,
        "title": text,
        "parent": {"type": ["string", "null"]},
        "recipe": recipe,
        "settings": {"type": "object", "properties": _settings_schema()},
        "reason": text,
        "hypothesis": text,
        "refuted_by": text,
        "evidence": {"type": "array", "items": text},
        "predictions": {"type": "array", "items": _prediction_schema()},
    }
    required = [name for name in properties if name not in ("name", "recipe", "settings")]
    return {"type": "object", "properties": properties, "required": required}


def _prediction_schema() -> dict[str, Any]:
    number = {"type": "number"}
    return {
        "type": "object",
        "properties": {
            "benchmark": {"type": "string", "enum": list(BENCHMARK_NAMES)},
            "expected": number,
            "low": number,
            "high": number,
        },
        "required": ["benchmark", "expected", "low", "high"],
    }


def _settings_schema() -> dict[str, Any]:
    fields = {
        name: {"type": "string"} if name == "method" else {"type": "number"}
        for name in TRAINING_FIELDS
    }
    section = {"type": "object", "properties": fields, "additionalProperties": False}
    return {"pretrain": section, "finetune": section, "seed": {"type": "integer"}}


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a reply that look like proposals.

    Raises:
        InvalidInput: There is none.
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidInput(
            "The reply is too long", f"{len(text)} characters", f"at most {MOST_CHARACTERS}"
        )
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    position, starts, found = text.find("{"), 0, 0
    problem = "it holds no JSON object"
    while position >= 0 and starts < _MOST_STARTS:
        starts += 1
        end = position + 1
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if starts == 1:
                problem = f"it is not valid JSON: {str(error)[:200] or 'nested too deeply'}"
        else:
            value = _unwrapped(value)
            if _looks_like_a_proposal(value):
                _check_depth(value)
                found += 1
                yield value
            elif starts == 1:
                problem = "its object has none of the fields of a proposal"
        position = text.find("{", end)
    if not found:
        raise InvalidInput(
            "No proposal in the reply", problem, "send one JSON object with the fields asked for"
        )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unwrapped(value: Any) -> Any:
    for name in _WRAPPERS:
        if isinstance(value, dict) and len(value) <= 2 and isinstance(value.get(name), dict):
            return value[name]
    return value


def _looks_like_a_proposal(value: object) -> bool:
    return isinstance(value, dict) and len(_KNOWN_FIELDS & value.keys()) >= _LEAST_FIELDS


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise InvalidInput(
        "The reply is nested too deeply", f"over {MOST_DEPTH} levels", "write plain values"
    )


def given_in(value: Mapping[str, Any]) -> GivenProposal:
    """Return the fields of an object.

    Raises:
        InvalidInput: naming the field that is missing or of another type.
    """
    try:
        return GivenProposal.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        shown = cut(visible(repr(first.get("input"))[:400]), 120)
        raise InvalidInput("Wrong field", f"{place}: {shown}", str(first["msg"])[:200]) from error


def plain_process(process: object) -> object:
    """Return `{"name": x, "parameters": y}` as `{x: y}`; anything else stays for the check."""
    if not isinstance(process, list):
        return process
    return [
        {str(entry["name"]): entry.get("parameters") or {}}
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.keys() <= {"name", "parameters"}
        else entry
        for entry in process
    ]
