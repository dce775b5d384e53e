"""Which scores a workspace wants, how they are brought up to date, and what they tell of a recipe.

The scoring itself is the program `synth_agent.stages.analyze`; the table it fills belongs to
`synth_agent.statistics`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synth_agent.contamination_report import known_seed_overlaps, seed_overlaps
from synth_agent.data import without_markers
from synth_agent.data_keys import known_data_key
from synth_agent.digests import Digests
from synth_agent.duplicates import duplicates
from synth_agent.errors import InvalidInput
from synth_agent.overview import Overview, RecipeLine, Relations, StatisticDrift, StatisticLine
from synth_agent.plan_retention import PlanRetention, plan_retention
from synth_agent.recipe_order import install_advice, missing_packages
from synth_agent.recipes import Recipe, list_recipes, operators_with_places
from synth_agent.retention import Example, examples
from synth_agent.stage_process import run_stage
from synth_agent.statistics import (
    PICTURE_HASHES,
    SOURCES,
    ColumnSpec,
    Floats,
    StatisticsTable,
    column_spec,
)
from synth_agent.workspace import Workspace

TEXT_STATISTICS = (
    "text_length_filter",
    "words_num_filter",
    "character_repetition_filter",
    "word_repetition_filter",
    "special_characters_filter",
    "alphanumeric_filter",
    "average_line_length_filter",
    "maximum_line_length_filter",
)
OWN_STATISTICS = (PICTURE_HASHES,)
PICTURE_STATISTICS = ("image_shape_filter", "image_size_filter", "image_aspect_ratio_filter")
Wanted = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Skipped:
    """An operator that recipes use and that cannot be scored here."""

    operator: str
    why: str


def statistics_root(workspace: Workspace) -> Path:
    """Return the folder of the statistics table."""
    return workspace.artifacts / "statistics"


def wanted_operators(
    workspace: Workspace, digests: Digests
) -> tuple[tuple[Wanted, ...], tuple[Skipped, ...]]:
    """Return what to score, cheap operators first, and what cannot be scored.

    It is a fixed set that needs no model, and every filter of the workspace's recipes; two that differ
    only in their thresholds are one.
    """
    wanted: dict[str, Wanted] = {}
    skipped: dict[str, Skipped] = {}
    always = (*TEXT_STATISTICS, *OWN_STATISTICS, *PICTURE_STATISTICS)
    standard: list[Wanted] = [(name, {}) for name in always]
    used = [
        (operator.name, dict(operator.parameters))
        for recipe in list_recipes(workspace)
        for _, operator in operators_with_places(recipe)
        if operator.name in SOURCES
    ]
    for name, parameters in (*standard, *used):
        if missing := missing_packages(name, parameters):
            why = f"needs {', '.join(missing)}; {'; '.join(map(install_advice, missing))}"
            skipped.setdefault(name, Skipped(name, why))
            continue
        try:
            spec = column_spec(name, parameters, lambda path: digests.path(workspace.path(path)))
        except InvalidInput as error:
            skipped.setdefault(name, Skipped(name, error.message))
            continue
        if spec is not None:
            wanted.setdefault(spec.key, (name, parameters))
    return tuple(sorted(wanted.values(), key=lambda want: _cost(want[0]))), tuple(skipped.values())


def analyze(
    workspace: Workspace,
    wanted: tuple[Wanted, ...],
    report: Callable[[Mapping[str, Any]], None],
    is_cancelled: Callable[[], bool] = lambda: False,
    *,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Bring the statistics table up to date.

    Args:
        workspace: Its settings name the seed set and the pictures.
        wanted: Operators to score, in this order.
        report: Called with each progress record of the program.
        is_cancelled: Asked several times a second; the program is stopped when it says so.
        retry_failed: Score the samples once more that could not be scored.

    Returns:
        The program's report: `data_key`, `num_samples`, and for each column what was done.

    Raises:
        SynthAgentError: The program failed; scores that were made are kept.
    """
    files = _analysis_files(statistics_root(workspace))
    logs = workspace.artifacts / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    files["operators"].write_text(json.dumps(wanted), "utf-8")
    command = _analysis_command(workspace, files)
    command += ["--retry-failed"] if retry_failed else []
    ended = run_stage(
        workspace, command, files["progress"], logs / "analysis.log", report, is_cancelled
    )
    if not files["report"].exists():
        if is_cancelled():
            return {"data_key": None, "num_samples": 0, "columns": []}
        raise ended.error("Analysis failed")
    if ended.told is not None and not ended.succeeded:
        raise ended.told
    done: dict[str, Any] = json.loads(files["report"].read_text("utf-8"))
    if not is_cancelled():
        _compare_with_evaluation_sets(workspace, report)
    return done


def _analysis_files(root: Path) -> dict[str, Path]:
    """Return the files that the program reads and writes besides the table, without an old report."""
    root.mkdir(parents=True, exist_ok=True)
    files = {name: root / f"analysis.{name}.json" for name in ("operators", "report", "progress")}
    files["report"].unlink(missing_ok=True)
    return files


def _analysis_command(workspace: Workspace, files: Mapping[str, Path]) -> list[str]:
    """Return the program that scores the seed set, with its arguments."""
    data = workspace.settings.data
    arguments: dict[str, object] = {
        "statistics": statistics_root(workspace),
        "seed": workspace.path(data.seed),
        "images": workspace.path(data.images),
        # Small models lose more by threads that wait for each other than they gain.
        "threads": workspace.settings.compute.threads or 1,
        **files,
    }
    command = [sys.executable, "-m", "synth_agent.stages.analyze"]
    return command + [
        text for name, value in arguments.items() for text in (f"--{name}", str(value))
    ]


def _compare_with_evaluation_sets(
    workspace: Workspace, report: Callable[[Mapping[str, Any]], None]
) -> None:
    """Compute the contamination of the seed set, so that whoever shows it need not wait."""
    digests = Digests(workspace)
    table = open_table(workspace, digests)
    if table is None:
        return

    def tell(done: int, total: int) -> None:
        report({"label": "contamination", "step": done, "total": total, "unit": "pictures"})

    # A workspace may be without evaluation sets until its first run.
    with suppress(InvalidInput):
        seed_overlaps(workspace, table, digests, report=tell)
    digests.save()


def open_table(workspace: Workspace, digests: Digests) -> StatisticsTable | None:
    """Return the statistics of the seed set as it is, None when it was not analysed yet."""
    root, seed = statistics_root(workspace), workspace.path(workspace.settings.data.seed)
    if not seed.is_file():
        return None
    data_key = known_data_key(root, digests.path(seed))
    if data_key is None:
        return None
    samples = root / "samples" / f"{data_key}.parquet"
    return _opened(root, data_key, samples.stat().st_mtime_ns if samples.exists() else 0)


@functools.lru_cache(maxsize=1)
def _opened(root: Path, data_key: str, written: int) -> StatisticsTable:
    """Open a table once; it looks for new scores by itself."""
    return StatisticsTable.open(root, data_key)


def recipe_retention(
    workspace: Workspace, recipe: Recipe, table: StatisticsTable, digests: Digests
) -> PlanRetention:
    """Return what a recipe, linear or a data plan, would make of the seed set."""
    return plan_retention(recipe, table, lambda path: digests.path(workspace.path(path)))


def overview(workspace: Workspace, bins: int) -> Overview | None:
    """Return statistics and retention of every recipe, None before the first analysis."""
    digests = Digests(workspace)
    table = open_table(workspace, digests)
    if table is None:
        return None
    statistics = tuple(
        _statistic_line(table, spec, stat, bins)
        for spec in table.columns()
        for stat in spec.numeric_stats
    ) + tuple(_copies_line(kind, copies, bins) for kind, copies in duplicates(table).copies.items())
    recipes = []
    for recipe in list_recipes(workspace):
        made = recipe_retention(workspace, recipe, table, digests)
        recipes.append(RecipeLine(recipe.name, recipe.title, made.samples, made.why))
    shared = known_seed_overlaps(workspace, table, digests) or []
    digests.save()
    ordered = sorted(statistics, key=lambda line: -_cost(line.operator))
    contamination = "; ".join(overlap.short() for overlap in shared)
    return Overview(table.num_rows, tuple(ordered), tuple(recipes), contamination)


def relations(workspace: Workspace, recipe_name: str) -> Relations | None:
    """Return correlations of the statistics and a recipe's drift, None before the first analysis."""
    digests = Digests(workspace)
    table = open_table(workspace, digests)
    if table is None:
        return None
    matrix = table.remember(("correlations", table.parts_of()), table.correlations)
    why = "there is no such recipe"
    drift: tuple[StatisticDrift, ...] = ()
    for recipe in list_recipes(workspace):
        if recipe.name == recipe_name:
            why, drift = _drift_of(workspace, recipe, table, digests)
    digests.save()
    rows = tuple(tuple(float(value) for value in row) for row in matrix.spearman)
    return Relations(matrix.names, rows, recipe_name, drift, why)


def _drift_of(
    workspace: Workspace, recipe: Recipe, table: StatisticsTable, digests: Digests
) -> tuple[str, tuple[StatisticDrift, ...]]:
    """Return why a recipe's drift is not known, or the drift."""
    made = recipe_retention(workspace, recipe, table, digests)
    if made.rows is None:
        return made.why, ()
    lines = tuple(
        StatisticDrift(
            line.name,
            line.median,
            line.whole_median,
            line.drift.standardised_mean_difference,
            line.drift.kolmogorov_smirnov,
        )
        for line in table.drifts(made.kept_rows())
    )
    return "", lines


def example_lines(
    workspace: Workspace, recipe_name: str, count: int
) -> list[tuple[str, list[str], list[str]]]:
    """Return, for each operator of a recipe whose outcome is known, what it keeps and drops.

    Returns:
        The operator with its counts, and a line for each of up to `count` samples of either kind.

    Raises:
        InvalidInput: There is no such recipe or no statistics.
    """
    digests = Digests(workspace)
    recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
    table = open_table(workspace, digests)
    if recipe_name not in recipes or table is None:
        raise InvalidInput("No examples", recipe_name, "run `synth-agent analyze` first")
    made = recipe_retention(workspace, recipes[recipe_name], table, digests)
    found: list[tuple[str, list[str], list[str]]] = []
    for branch, kept, position in made.steps():
        operator = kept.operators[position]
        title = f"{branch + ': ' if branch else ''}{position + 1}. {operator.name}"
        if not operator.known:
            found.append((f"{title}: {operator.why}", [], []))
            continue
        drawn = examples(kept, position, table, count, seed=0)
        lines = [[example_line(one) for one in side] for side in (drawn.kept, drawn.dropped)]
        found.append((f"{title}  {operator.before:,} → {operator.after:,}", lines[0], lines[1]))
    return found


def example_line(example: Example) -> str:
    """Return a sample's scores, its id and its caption without markers."""
    scores = [
        value if isinstance(value, str) else ", ".join(f"{number:.3g}" for number in value)
        for value in example.values.values()
    ]
    return "  ".join([*scores, example.sample.id, repr(without_markers(example.sample.text))])


def _statistic_line(
    table: StatisticsTable, spec: ColumnSpec, stat: str, bins: int
) -> StatisticLine:
    histogram = table.histogram(spec, bins=bins, stat=stat)
    low, median, high = table.quantiles(spec, (0.0, 0.5, 1.0), stat=stat)
    counts = tuple(int(count) for count in histogram.counts)
    unknown = int((~table.values(spec, stat).known).sum())
    return StatisticLine(
        stat, spec.operator, counts, float(low), float(median), float(high), unknown
    )


def _copies_line(kind: str, copies: Floats, bins: int) -> StatisticLine:
    known = copies[np.isfinite(copies)]
    counts = tuple(int(count) for count in np.histogram(known, bins=bins)[0])
    low, median, high = np.quantile(known, (0.0, 0.5, 1.0)) if len(known) else [np.nan] * 3
    unknown = len(copies) - len(known)
    return StatisticLine(kind, kind, counts, float(low), float(median), float(high), unknown)


def _cost(operator: str) -> int:
    """Rank an operator: text, then pictures, then models."""
    if operator in SOURCES and SOURCES[operator].models:
        return 2
    return 1 if operator.startswith(("image", "picture")) else 0
