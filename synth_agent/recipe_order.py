"""What of a recipe cannot work: operators in an impossible order, and packages that are missing.

Every operator is checked by itself by `recipe_checks`; here they are looked at together.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from synth_agent.catalogue import Catalogue
from synth_agent.errors import InvalidInput, nearest
from synth_agent.recipe_policy import (
    FIELDS,
    INSTALL_COMMANDS,
    MEASURING,
    META_FIELD,
    PACKAGES,
    SELECTORS_OF_SINGLE_VALUES,
    STATS,
    STATS_FIELD,
)
from synth_agent.recipe_yaml import shown

Step = tuple[str, Mapping[str, Any]]
"""An operator's name and its parameters."""


def check_sequence(where: str, steps: Sequence[Step], catalogue: Catalogue) -> None:
    """Check that operators can work in this order.

    Scores and hashes stay with samples until a mapper changes them, and Data-Juicer keeps them by
    name alone. A parameter that an operator leaves out is taken from the operator of the same name
    before it.

    Args:
        where: The file, for errors.
        steps: Operators in the order in which they run, each of them checked by itself.
        catalogue: What operators there are.

    Raises:
        InvalidInput: naming the operator and the fix.
    """
    scores: set[str] = set()
    measured: dict[str, Mapping[str, Any]] = {}
    earlier: dict[str, set[str]] = {}
    for position, (name, parameters) in enumerate(steps, 1):
        place = f"{where}, operator {position} ({name})"
        known = catalogue.parameters(name)
        for left_out in sorted(earlier.get(name, set()) - set(parameters)):
            raise InvalidInput(
                "Parameter would be inherited",
                f"{place}: an earlier {name} sets {left_out}, and Data-Juicer would reuse it here",
                f"write {left_out} out",
            )
        set_here = {k for k, v in parameters.items() if k in known and v != known[k].default}
        earlier.setdefault(name, set()).update(set_here)
        kind = catalogue.operators[name].kind
        if kind == "mapper":
            scores.clear()
            measured.clear()
            continue
        values = {key: p.default for key, p in known.items()} | dict(parameters)
        _check_reads(place, name, values, scores)
        how = {key: values[key] for key in MEASURING if key in values}
        if measured.setdefault(name, how) != how:
            changed = sorted(key for key in how if measured[name].get(key) != how[key])
            raise InvalidInput(
                "Score would be reused",
                f"{place}, parameter {changed[0]}: an earlier {name} measures with another value, "
                "and Data-Juicer would use its scores here too",
                "use the same value, or keep one of the two",
            )
        scores.update(STATS.get(name, ()))
        if name in ("specified_field_filter", "specified_numeric_field_filter"):
            scores.add(str(values["field_key"]))


def _check_reads(place: str, name: str, values: Mapping[str, Any], scores: set[str]) -> None:
    """Check that the fields that an operator reads are there when it runs."""
    read = [str(values["field_key"])] if values.get("field_key") else []
    if name == "general_field_filter":
        read += re.findall(rf"{STATS_FIELD}\.\w+", str(values["filter_condition"]))
    for key in read:
        field, _, score = key.partition(".")
        if field not in (*FIELDS, STATS_FIELD, META_FIELD) or (field in FIELDS and score):
            valid = ", ".join((*FIELDS, f"{STATS_FIELD}.NAME"))
            raise InvalidInput("Unknown field", f"{place}: {shown(key)}", f"valid names: {valid}")
        if field == STATS_FIELD and score not in scores:
            writers = [writer for writer, written in STATS.items() if score in written]
            raise InvalidInput(
                "Score is not there",
                f"{place}: no operator since the last mapper writes {shown(score)}",
                f"put {writers[0]} before it" if writers else nearest(score, _all_scores()),
            )
        if field == "images" and name in SELECTORS_OF_SINGLE_VALUES:
            raise InvalidInput(
                "Wrong field", f"{place}: images is a list", "name a field with one value"
            )


def _all_scores() -> list[str]:
    return list(itertools.chain.from_iterable(STATS.values()))


def check_packages(where: str, steps: Sequence[Step]) -> None:
    """Check that the packages which operators import are installed; imports none of them.

    Raises:
        InvalidInput: naming the operator and the package to install.
    """
    for position, (name, parameters) in enumerate(steps, 1):
        for package in missing_packages(name, parameters):
            raise InvalidInput(
                "Package is missing",
                f"{where}, operator {position} ({name}) needs {package}",
                f"{install_advice(package)}, or leave the operator out",
            )


def install_advice(package: str) -> str:
    """Return what to do to have a package, as a phrase."""
    command = INSTALL_COMMANDS.get(package)
    return f"install it with: {command}" if command else f"install {package}"


def missing_packages(name: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the packages that an operator with these parameters needs and that are missing."""
    needed = list(PACKAGES.get(name, ()))
    if name.startswith("document_minhash_deduplicator"):
        if parameters.get("num_bands") is None or parameters.get("num_rows_per_band") is None:
            needed.append(("scipy", "scipy"))
        if parameters.get("tokenization") == "sentencepiece":
            needed.append(("sentencepiece", "sentencepiece"))
    if parameters.get("enable_vllm") is True:
        needed.append(("vllm", "vllm"))
    if parameters.get("keep_candidate_mode") == "similar_one_simhash":
        needed.append(("simhash", "simhash-pybind"))
    missing = [package for module, package in needed if importlib.util.find_spec(module) is None]
    for value in parameters.values():
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, Mapping):
                for nested, inner in entry.items():
                    missing += missing_packages(
                        str(nested), inner if isinstance(inner, Mapping) else {}
                    )
    return tuple(dict.fromkeys(missing))
