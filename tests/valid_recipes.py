"""Random recipes that are valid, and a program that asks Data-Juicer whether it thinks so too.

`python -m tests.valid_recipes FOLDER` loads every recipe of a folder as Data-Juicer does and prints
the names of those that it refuses, with the reason, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from synth_agent.catalogue import OperatorSpec, Parameter, load_catalogue
from synth_agent.recipe_order import missing_packages
from synth_agent.recipe_policy import LIMITS, REVIEWED_OPERATORS

Steps = list[dict[str, dict[str, Any]]]

FIXED = ("tokenization", "tokenizer", "tokenizer_model", "trust_remote_code", "redact_keys",
         "text_key", "messages_key", "extra_patterns", "batch_size", "mode")  # fmt: skip
"""Parameters that stay at their defaults."""
TEXTS: Mapping[str, tuple[Any, ...]] = {
    "pattern": (r"[0-9]+", r"\bfoo\b", "r'a.c'"),
    "ignore_pattern": (r"\s+", None),
    "split_pattern": (r"\n\n", r"[.!?] "),
    "repl": ("", "#", "a/b", "../c", "https://x"),
    "filter_condition": ("10 < 11", "text != 'x'", "id in ['a', 'b'] and not text == ''"),
    "chars_to_remove": ("abc", ["/", "~", "$"]),
    "substrings": (["http", "/etc"], None),
    "doc_type": ("tex", ["tex"]),
    "lang": ("en", "de"),
    "min_size": ("0", "10 KB", "1MiB"),
    "max_size": ("2GB", "1TB"),
    "tables_field_name": ("html_tables", "tables"),
    "field_key": ("text", "id"),
    "target_value": (["a"], ["a", "b"]),
    "target_tags": (["a"], ["x y"]),
}
"""Values of parameters that are no numbers, by name."""
NEEDED: Mapping[str, tuple[str, ...]] = {
    "replace_content_mapper": ("pattern", "repl"),
    "specified_field_filter": ("field_key", "target_value"),
    "specified_numeric_field_filter": ("field_key",),
    "frequency_specified_field_selector": ("field_key",),
    "range_specified_field_selector": ("field_key",),
    "topk_specified_field_selector": ("field_key",),
    "tags_specified_field_selector": ("field_key", "target_tags"),
}


def random_recipes(count: int, seed: int) -> list[Steps]:
    """Return the steps of recipes of one or two operators, every operator in its turn."""
    generator = random.Random(seed)
    catalogue = load_catalogue()
    names = [
        name
        for name in sorted(REVIEWED_OPERATORS - {"general_fused_op"})
        if "model" not in catalogue.operators[name].needs and not missing_packages(name, {})
    ]
    recipes: list[Steps] = []
    waiting: list[str] = []
    for _ in range(count):
        if len(waiting) < 2:
            waiting = generator.sample(names, len(names))
        chosen = [waiting.pop() for _ in range(generator.randint(1, 2))]
        recipes.append(
            [{name: _parameters(catalogue.operators[name], generator)} for name in chosen]
        )
    return recipes


def _parameters(spec: OperatorSpec, generator: random.Random) -> dict[str, Any]:
    needed = NEEDED.get(spec.name, ())
    values: dict[str, Any] = {}
    for name, parameter in spec.parameters.items():
        if name in needed or (name not in FIXED and generator.random() < 0.6):
            values[name] = _value(parameter, generator)
    for low, high in _pairs(spec):
        least = values.get(low, spec.parameters[low].default)
        most = values.get(high, spec.parameters[high].default)
        if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
            values[low], values[high] = most, least
    if values.get("pattern", "") is None:
        values.pop("repl", None)
    if isinstance(values.get("max_len"), int) and "overlap_len" in spec.parameters:
        values["max_len"] = max(values["max_len"], 1)
        values["overlap_len"] = generator.randrange(values["max_len"])
    elif "overlap_len" in values:
        del values["overlap_len"]
    if "num_bands" in spec.parameters:
        most = values.get("num_permutations", spec.parameters["num_permutations"].default)
        rows = generator.randint(1, min(8, most))
        bands = generator.randint(1, most // rows)
        values |= {"num_bands": bands, "num_rows_per_band": rows}
    if generator.random() < 0.3:
        values["num_proc"] = generator.choice((0, 1, 2))
    return values


def _pairs(spec: OperatorSpec) -> Iterator[tuple[str, str]]:
    for name in spec.parameters:
        first, _, rest = name.partition("_")
        other = {"min": f"max_{rest}", "lower": f"upper_{rest}"}.get(first)
        if other in spec.parameters:
            yield name, other


def _value(parameter: Parameter, generator: random.Random) -> Any:
    if parameter.name in TEXTS:
        return generator.choice(TEXTS[parameter.name])
    if parameter.choices:
        return generator.choice([c for c in parameter.choices if c != "sentencepiece"])
    if "bool" in parameter.accepts:
        return generator.random() < 0.5
    low, high = _range(parameter)
    if "float" in parameter.accepts:
        return round(generator.uniform(low, high), 4)
    if "int" in parameter.accepts:
        return generator.randint(int(low), int(high))
    return parameter.default if "str" not in parameter.accepts else "[GONE]"


def _range(parameter: Parameter) -> tuple[float, float]:
    least, most = LIMITS.get(parameter.name, (0, 1000))
    low = least if parameter.minimum is None else max(least, parameter.minimum)
    high = most if parameter.maximum is None else min(most, parameter.maximum)
    return low, min(high, low + 1000)


def refused_by_data_juicer(folder: Path) -> dict[str, str]:
    """Return the recipes of a folder that Data-Juicer's parser, check or operators refuse."""
    from synth_agent.stages.datajuicer import guard

    guard()
    from data_juicer.config import init_configs
    from data_juicer.core.preflight import PipelineConfigError, pre_instantiation_check
    from data_juicer.ops import load_ops

    errors = (PipelineConfigError, SystemExit, ValueError, TypeError, KeyError, ImportError)

    refused = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            process = init_configs(["--config", str(path)]).process
            pre_instantiation_check(process)
            load_ops(process)
        except errors as error:
            refused[path.name] = f"{type(error).__name__}: {error}"
    return refused


if __name__ == "__main__":
    answer = refused_by_data_juicer(Path(sys.argv[1]))
    Path(sys.argv[1], "refused.json").write_text(json.dumps(answer), encoding="utf-8")
