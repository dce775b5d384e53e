"""The commands about scores: `synth-agent analyze`, `statistics`, `contamination`, `retention` and
`samples`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from synth_agent import analysis, pipeline
from synth_agent.contamination import NEAR_BITS, WORDS_IN_A_ROW, Overlap
from synth_agent.contamination_report import run_overlaps, seed_overlaps
from synth_agent.data import without_markers
from synth_agent.digests import Digests
from synth_agent.duplicates import duplicates
from synth_agent.errors import EXIT_FAILED, EXIT_OK, InvalidInput, nearest
from synth_agent.headless import narrate
from synth_agent.plan_retention import PlanRetention
from synth_agent.recipes import Recipe, list_recipes, load_catalogue, load_recipe, validate_recipe
from synth_agent.retention import Example, examples
from synth_agent.statistics import Floats, StatisticsTable
from synth_agent.wording import duration
from synth_agent.workspace import Workspace

QUIET_SECONDS = 5.0
"""At most one progress line of an operator in this time."""
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_CAPTION_WIDTH = 90


def analyze(workspace: Workspace, options: argparse.Namespace) -> int:
    """Score what has no score yet, and say what was done."""
    digests = Digests(workspace)
    wanted, skipped = analysis.wanted_operators(workspace, digests)
    digests.save()
    if options.operator:
        known = {name for name, _ in wanted}
        for name in options.operator:
            for skip in skipped:
                if name == skip.operator and name not in known:
                    raise InvalidInput("Cannot be scored here", name, skip.why)
            if name not in known:
                raise InvalidInput("Not an operator to score", repr(name), nearest(name, known))
        wanted = tuple(want for want in wanted if want[0] in options.operator)
    for skip in skipped:
        narrate(f"left out: {skip.operator}: {skip.why}")
    report = analysis.analyze(
        workspace, wanted, _ProgressLines(), retry_failed=options.retry_failed
    )
    if options.json:
        print(json.dumps(report))
    else:
        for column in report["columns"]:
            print(_column_line(column))
        narrate("see them with: synth-agent statistics")
    # What is not on this machine is an error where it was asked for by name.
    failed = any(
        column["problem"] and (options.operator or not column["is_absent"])
        for column in report["columns"]
    )
    return EXIT_FAILED if failed else EXIT_OK


class _ProgressLines:
    """Prints progress records, seldom enough to be read."""

    def __init__(self) -> None:
        self._label: str | None = None
        self._printed = self._since = time.monotonic()

    def __call__(self, record: Mapping[str, Any]) -> None:
        moment = time.monotonic()
        if record["label"] != self._label:
            self._label, self._since, self._printed = record["label"], moment, moment
        elif record["step"] == record["total"] or moment - self._printed < QUIET_SECONDS:
            return
        self._printed = moment
        step, total = record["step"], record["total"]
        if not total:
            return
        spent = moment - self._since
        left = f", {duration(spent * (total - step) / step)} left" if step and spent > 1 else ""
        narrate(f"  {record['label']}  {step:,}/{total:,} {record['unit']}{left}")


def _column_line(column: Mapping[str, Any]) -> str:
    if column["problem"]:
        return f"{column['operator']:<34} cannot be used: {column['problem']}"
    errors = f", {column['errors']:,} could not be scored" if column["errors"] else ""
    known = f", {column['known']:,} known before" if column["known"] else ""
    seconds = duration(column["seconds"])
    return f"{column['operator']:<34} {column['scored']:,} scored in {seconds}{known}{errors}"


def statistics(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print quantiles of every statistic, correlations, or a recipe's drift."""
    if options.drift:
        return _drift(workspace, options)
    table = _table(workspace, Digests(workspace))
    if options.correlation:
        return _correlation(table, as_json=options.json)
    rows = statistics_rows(table)
    if options.json:
        print(json.dumps(rows))
        return EXIT_OK
    print(f"{table.num_rows:,} samples")
    header = ("lowest", "10 %", "median", "90 %", "highest", "unknown")
    print(f"{'':<34}" + "".join(f"{name:>10}" for name in header))
    for row in rows:
        numbers = "".join(f"{value:>10.4g}" for value in row["quantiles"])
        print(f"{row['stat']:<34}{numbers}{row['missing']:>10,}")
    repeated = duplicates(table).repeated
    print(f"repeated: {', '.join(f'{name} {count:,}' for name, count in repeated.items())}")
    return EXIT_OK


def _correlation(table: StatisticsTable, *, as_json: bool) -> int:
    matrix = table.correlations()
    if as_json:
        rows = [
            [None if value != value else float(value) for value in row] for row in matrix.spearman
        ]
        print(json.dumps({"method": "spearman", "names": list(matrix.names), "values": rows}))
        return EXIT_OK
    print("Spearman's rank correlation; a statistic of several pictures counts as its mean")
    print(f"{'':<38}" + "".join(f"{number:>6}" for number in range(1, len(matrix.names) + 1)))
    for number, (name, row) in enumerate(zip(matrix.names, matrix.spearman, strict=True), 1):
        cells = "".join(
            f"{'-':>6}" if value != value else f"{value:>6.2f}" for value in row[:number]
        )
        print(f"{number:>3}. {name:<33}{cells}")
    return EXIT_OK


def _drift(workspace: Workspace, options: argparse.Namespace) -> int:
    recipe, table, made = _judged(workspace, options.drift)
    if made.rows is None:
        raise InvalidInput(
            "Drift is not known",
            f"what {recipe.name} keeps is not known before it runs",
            f"see why: synth-agent retention {recipe.name}",
        )
    kept_rows = made.kept_rows()
    kept = int(kept_rows.sum())
    lines = table.drifts(kept_rows)
    if options.json:
        print(
            json.dumps({"recipe": recipe.name, "kept": kept, "drift": [asdict(x) for x in lines]})
        )
        return EXIT_OK
    print(f"{recipe.name} keeps {kept:,} of {table.num_rows:,} samples")
    print("mean: difference in standard deviations of all; KS: Kolmogorov-Smirnov distance, 0 to 1")
    print(f"{'':<34}{'median kept':>14}{'median all':>14}{'mean':>8}{'KS':>8}")
    for line in lines:
        drift = line.drift
        print(
            f"{line.name:<34}{line.median:>14.4g}{line.whole_median:>14.4g}"
            f"{drift.standardised_mean_difference:>+8.2f}{drift.kolmogorov_smirnov:>8.3f}"
        )
    return EXIT_OK


def contamination(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print what the seed set, a recipe's samples or a run's data share with the evaluation sets."""
    digests = Digests(workspace)
    try:
        found = _overlaps(workspace, options.data, digests)
    finally:
        digests.save()
    if options.json:
        print(json.dumps([asdict(overlap) for overlap in found]))
        return EXIT_OK
    for overlap in found:
        print(overlap.line())
        if overlap.examples:
            print(f"  {overlap.flagged_samples:,} samples, as {', '.join(overlap.examples)}")
    narrate(
        f"near: {NEAR_BITS} of 64 bits of the difference hash or fewer; matching: {WORDS_IN_A_ROW} "
        "words in a row of a question or an answer, or a whole question"
    )
    return EXIT_OK


def _overlaps(workspace: Workspace, name: str | None, digests: Digests) -> list[Overlap]:
    tell = _ProgressLines()

    def report(done: int, total: int) -> None:
        tell({"label": "hashing", "step": done, "total": total, "unit": "pictures"})

    if name is not None and workspace.run(name).plan.is_file():
        run, table = pipeline.load_run(workspace, name), analysis.open_table(workspace, digests)
        return run_overlaps(workspace, run, table, digests, report=report)
    if name is None:
        table = _table(workspace, digests)
        return seed_overlaps(workspace, table, digests, report=report)
    recipe, judged, made = _judged(workspace, name)
    if made.rows is None:
        raise InvalidInput(
            "Samples are not known",
            f"what {recipe.name} keeps is not known before it runs",
            "run it, and name the run",
        )
    return seed_overlaps(workspace, judged, digests, made.kept_rows(), report)


def statistics_rows(table: StatisticsTable) -> list[dict[str, Any]]:
    """Return quantiles and gaps of every numeric statistic."""
    rows = []
    for spec in table.columns():
        for stat in spec.numeric_stats:
            quantiles = table.quantiles(spec, QUANTILES, stat=stat)
            known = table.values(spec, stat).known
            rows.append(
                {
                    "stat": stat,
                    "operator": spec.operator,
                    "parameters": dict(spec.parameters),
                    "quantiles": [float(value) for value in quantiles],
                    "missing": int((~known).sum()),
                }
            )
    return rows + [_copies_row(*copies) for copies in duplicates(table).copies.items()]


def _copies_row(kind: str, copies: Floats) -> dict[str, Any]:
    known = copies[np.isfinite(copies)]
    quantiles = np.quantile(known, QUANTILES).tolist() if len(known) else []
    return {
        "stat": kind,
        "operator": kind,
        "parameters": {},
        "quantiles": quantiles,
        "missing": len(copies) - len(known),
    }


def retention(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print what every operator of a recipe would leave."""
    recipe, _, made = _judged(workspace, options.recipe)
    if options.json:
        print(json.dumps(retention_data(recipe, made)))
        return EXIT_OK
    for branch in made.branches:
        if branch.branch.name:
            print(f"branch {branch.branch.name}")
        for number, operator in enumerate(branch.retention.operators, 1):
            change = f"{_count(operator.before):>9} -> {_count(operator.after):>9}"
            why = f"  {operator.why}" if operator.why else ""
            print(f"{number:>3}. {operator.name:<36} {change}{why}")
        if branch.branch.name:
            parts = f"left {_count(branch.left)}, taken {_count(branch.taken)}"
            note = f"  {branch.note}" if branch.note and branch.left is not None else ""
            print(f"     {parts}, x {branch.branch.repeat} = {_count(branch.samples)}{note}")
    if made.repetitions:
        print(f"merged: {_count(made.merged)}, repetitions dropped: {made.repetitions:,}")
    if made.samples is None:
        print(f"kept: not known before it runs, of {made.num_rows:,}")
    else:
        share = made.samples / made.num_rows
        print(f"kept: {made.samples:,} of {made.num_rows:,} ({share:.1%})")
    return EXIT_OK


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def retention_data(recipe: Recipe, made: PlanRetention) -> dict[str, Any]:
    """Return a retention as plain data."""
    branches = [
        {
            "name": branch.branch.name,
            "operators": [
                {
                    "name": operator.name,
                    "before": operator.before,
                    "after": operator.after,
                    "known": operator.known,
                    "why": operator.why,
                }
                for operator in branch.retention.operators
            ],
            "left": branch.left,
            "taken": branch.taken,
            "repeat": branch.branch.repeat,
            "samples": branch.samples,
            "note": branch.note,
        }
        for branch in made.branches
    ]
    return {
        "recipe": recipe.name,
        "samples": made.num_rows,
        "kept": made.samples,
        "merged": made.merged,
        "repetitions": made.repetitions,
        "branches": branches,
    }


def samples(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print samples that an operator keeps and drops, spread over its scores."""
    recipe, table, made = _judged(workspace, options.recipe)
    steps = list(made.steps())
    if not 1 <= options.operator <= len(steps):
        raise InvalidInput(
            "No such operator",
            f"{recipe.name} has {len(steps)} operators, not {options.operator}",
            "give its number, counted from 1",
        )
    if options.count < 1 or options.seed < 0:
        raise InvalidInput(
            "Bad number",
            f"--count {options.count}, --seed {options.seed}",
            "give a count of 1 or more and a seed of 0 or more",
        )
    branch, kept, position = steps[options.operator - 1]
    drawn = examples(kept, position, table, options.count, options.seed)
    kinds = {"kept": drawn.kept, "dropped": drawn.dropped}
    if options.json:
        print(
            json.dumps({kind: [_example_data(e) for e in found] for kind, found in kinds.items()})
        )
        return EXIT_OK
    for kind, found in kinds.items():
        place = f" in branch {branch}" if branch else ""
        print(f"{kind} by {kept.operators[position].name}{place}")
        for example in found:
            _print_example(example)
    return EXIT_OK


def _example_data(example: Example) -> dict[str, Any]:
    sample = example.sample
    return {
        "id": sample.id,
        "text": sample.text,
        "images": sample.images,
        "values": dict(example.values),
    }


def _print_example(example: Example) -> None:
    caption = without_markers(example.sample.text)
    if len(caption) > _CAPTION_WIDTH:
        caption = caption[: _CAPTION_WIDTH - 1] + "…"
    scores = " ".join(
        f"{name} {value if isinstance(value, str) else ', '.join(f'{v:.4g}' for v in value)}"
        for name, value in example.values.items()
    )
    pictures = ", ".join(example.sample.images)
    print(f"  {example.sample.id}  {scores}  {pictures}\n      {caption!r}")


def _judged(workspace: Workspace, name: str) -> tuple[Recipe, StatisticsTable, PlanRetention]:
    """Return a recipe with what it would keep."""
    digests = Digests(workspace)
    recipe = _recipe(workspace, name)
    validate_recipe(recipe, load_catalogue(), workspace)
    table = _table(workspace, digests)
    made = analysis.recipe_retention(workspace, recipe, table, digests)
    digests.save()
    return recipe, table, made


def _recipe(workspace: Workspace, name: str) -> Recipe:
    if name.endswith((".yaml", ".yml")):
        return load_recipe(Path(name))
    recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
    if name not in recipes:
        raise InvalidInput("No such recipe", f"{name!r} in recipes/", nearest(name, recipes))
    return recipes[name]


def _table(workspace: Workspace, digests: Digests) -> StatisticsTable:
    table = analysis.open_table(workspace, digests)
    digests.save()
    if table is None:
        raise InvalidInput(
            "Seed set was not analysed",
            f"{workspace.path(workspace.settings.data.seed)} has no statistics",
            "run: synth-agent analyze",
        )
    return table
