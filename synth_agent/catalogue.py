"""What operators Data-Juicer has: names, parameters, bounds, and which are refused and why.

Reads the JSON that `synth_agent.stages.build_catalogue` writes; does not import Data-Juicer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SUPPORTED_VERSION = "1.6.1"
CATALOGUE_FILE = Path(__file__).parent / f"operators-{SUPPORTED_VERSION}.json"

NEEDS = ("text", "images", "audio", "video", "model", "gpu", "service", "network")
COSTS: Mapping[str, str] = {
    "text": "reads text: thousands of samples a second",
    "picture": "opens pictures: hundreds to thousands of samples a second",
    "model": "runs a model: a few to hundreds of samples a second",
    "generation": "generates text or pictures: seconds a sample without a GPU",
    "media": "decodes sound or video",
    "service": "waits for a service, which may charge for it",
}
"""What a sample costs, cheapest first. Rates are orders of magnitude on one CPU core."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator."""

    name: str
    type: str
    """The annotation, as text."""
    accepts: tuple[str, ...]
    """Plain types that are valid: int, float, str, bool, list, dict, null, or any."""
    default: Any
    required: bool
    minimum: float | None = None
    maximum: float | None = None
    """Bounds, both inclusive."""
    choices: tuple[Any, ...] = ()
    """The only valid values; empty when there is no such list."""


@dataclass(frozen=True)
class OperatorSpec:
    """One operator of Data-Juicer."""

    name: str
    kind: str
    """mapper, filter, deduplicator, selector, grouper, aggregator or pipeline."""
    summary: str
    parameters: Mapping[str, Parameter]
    """Its own parameters; those of its kind are in `Catalogue.base`."""
    danger: str = ""
    """Why it is refused unless a person allows it by name; empty when it is not."""
    needs: tuple[str, ...] = ()
    """Of NEEDS: what a sample must have and what the operator uses."""
    packages: tuple[str, ...] = ()
    """Packages that it may import and Data-Juicer does not require."""
    cost: str = "text"
    """One of COSTS: what a sample costs."""
    is_threshold: bool = False
    """Whether it keeps samples by comparing scores with bounds, so that scores decide it alone."""
    source: str = "data-juicer"
    """`data-juicer`, or `synth-agent` for an operator of this program."""


@dataclass(frozen=True)
class Catalogue:
    """All operators of one Data-Juicer version."""

    version: str
    operators: Mapping[str, OperatorSpec]
    base: Mapping[str, Mapping[str, Parameter]]
    """Parameters that every operator of a kind has."""

    def parameters(self, operator: str) -> dict[str, Parameter]:
        """Return every parameter that an operator takes: its kind's, then its own."""
        spec = self.operators[operator]
        return {**self.base[spec.kind], **spec.parameters}


@cache
def load_catalogue() -> Catalogue:
    """Read the catalogue that is shipped with the package."""
    document = json.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))
    operators = {
        entry["name"]: OperatorSpec(
            name=entry["name"],
            kind=entry["kind"],
            summary=entry["summary"],
            parameters=_parameters(entry["parameters"]),
            danger=entry.get("danger", ""),
            needs=tuple(entry["needs"]),
            packages=tuple(entry["packages"]),
            cost=entry["cost"],
            is_threshold=entry["is_threshold"],
            source=entry["source"],
        )
        for entry in document["operators"]
    }
    base = {kind: _parameters(entries) for kind, entries in document["base"].items()}
    return Catalogue(document["version"], operators, base)


def _parameters(entries: list[dict[str, Any]]) -> dict[str, Parameter]:
    return {
        entry["name"]: Parameter(
            **{
                **entry,
                "accepts": tuple(entry["accepts"]),
                "choices": tuple(entry.get("choices", ())),
            }
        )
        for entry in entries
    }
