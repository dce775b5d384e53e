"""The command `synth-agent strategies`: recipes compared on data quality alone, in one table.

With `--run` recipes are processed first, by the first stage of a run and its cache, and texts that they
made are scored; without it, nothing is run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from synth_agent import analysis
from synth_agent.data import Sample, write_samples
from synth_agent.digests import Digests
from synth_agent.errors import EXIT_OK, InvalidInput, SynthAgentError, nearest
from synth_agent.headless import narrate
from synth_agent.processed_sets import make_processed
from synth_agent.recipes import Recipe, list_recipes, load_recipe
from synth_agent.stage_process import run_stage
from synth_agent.strategies import DRAWS, JUDGE, NGRAMS, Comparison, Strategy
from synth_agent.wording import duration
from synth_agent.workspace import Workspace

_UNKNOWN = "-"
_WIDTH_WITHOUT_TERMINAL = 160
_COLUMNS = (
    "kept",
    "share",
    "distinct-1",
    "distinct-2",
    "words",
    "similarity",
    "same text",
    "same picture",
    "time",
)
_LEGEND = (
    f"distinct-n: distinct n-grams among {NGRAMS:,}, mean of {DRAWS} draws; similarity: 25 %, 50 %, "
    "75 %; same: share that occurred before; ~ estimated from this workspace's rates"
)


def strategies(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print a table of recipes; all of the workspace unless some are named.

    Args:
        workspace: The recipes' workspace.
        options: `recipes`, names or files; `run`; `json`.

    Raises:
        InvalidInput: no such recipe, or one that cannot be read.
    """
    digests = Digests(workspace)
    recipes = _chosen(workspace, options.recipes)
    folders: dict[str, Path] = {}
    failures: dict[str, SynthAgentError] = {}
    if options.run:
        _run_all(workspace, recipes, digests, folders, failures)
    comparison = Comparison(workspace, digests)
    found = [comparison.strategy(recipe, folders.get(recipe.name)) for recipe in recipes]
    digests.save()
    if options.json:
        print(json.dumps([_data(one, failures.get(one.name)) for one in found]))
    else:
        _print_table(found, failures)
    return next((error.exit_code for error in failures.values()), EXIT_OK)


def _chosen(workspace: Workspace, names: Sequence[str]) -> list[Recipe]:
    """Return recipes by their names or files; all of the workspace when none is named.

    Raises:
        InvalidInput: no such recipe, or one that cannot be read.
    """
    known = {recipe.name: recipe for recipe in list_recipes(workspace)}
    chosen = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            chosen.append(load_recipe(Path(name)))
        elif name in known:
            chosen.append(known[name])
        else:
            raise InvalidInput(
                "No such recipe", f"{name!r} in {workspace.recipes}", nearest(name, known)
            )
    return chosen if names else list(known.values())


def _run_all(
    workspace: Workspace,
    recipes: Sequence[Recipe],
    digests: Digests,
    folders: dict[str, Path],
    failures: dict[str, SynthAgentError],
) -> None:
    """Process recipes and score what they made; fill in their folders, and errors where they failed."""
    comparison = Comparison(workspace, digests)
    for number, recipe in enumerate(recipes, 1):
        narrate(f"{number}/{len(recipes)} {recipe.name}")
        try:
            folders[recipe.name] = folder = make_processed(workspace, recipe, digests)
            if samples := comparison.unscored(folder):
                narrate(f"scoring {len(samples):,} samples that {recipe.name} made")
                _score(workspace, comparison, samples, folder)
        except SynthAgentError as error:
            narrate(f"{recipe.name}: {error.title}: {error.message}")
            failures[recipe.name] = error
        digests.save()


def _score(
    workspace: Workspace, comparison: Comparison, samples: Sequence[Sample], folder: Path
) -> None:
    """Score samples of a processed data set by the similarity filter, into the statistics.

    Raises:
        SynthAgentError: the program failed.
    """
    path, root = comparison.scored_file(folder), analysis.statistics_root(workspace)
    images = folder / "images"
    if not images.is_dir():
        images = workspace.path(workspace.settings.data.images)
    # Ids repeat where a recipe repeats samples, and the statistics want one of each.
    numbered = [
        Sample(id=str(number), images=sample.images, text=sample.text)
        for number, sample in enumerate(samples)
    ]
    write_samples(path, numbered)
    root.mkdir(parents=True, exist_ok=True)
    places = {
        "seed": path,
        "images": images,
        "statistics": root,
        "operators": path.with_suffix(".operators.json"),
        "progress": path.with_suffix(".progress.jsonl"),
    }
    places["operators"].write_text(json.dumps([[JUDGE, dict(comparison.judge or {})]]), "utf-8")
    command = [sys.executable, "-m", "synth_agent.stages.analyze"]
    command += [text for name, place in places.items() for text in (f"--{name}", str(place))]
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    ended = run_stage(workspace, command, places["progress"], log)
    if not ended.succeeded:
        raise ended.error("Scoring failed")


def _print_table(found: Sequence[Strategy], failures: Mapping[str, SynthAgentError]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", overflow="fold", min_width=12)
    for name in _COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    for strategy in found:
        table.add_row(strategy.name, *cells(strategy))
    console.print(table)
    lines = [_LEGEND]
    for strategy in found:
        error = failures.get(strategy.name)
        lines += [
            f"{strategy.name}: {note}" for note in ((str(error),) if error else strategy.notes)
        ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def cells(strategy: Strategy) -> tuple[str, ...]:
    """Return a strategy's figures as the table shows them, in the order of its columns."""
    share = None
    if strategy.kept is not None and strategy.seed_samples:
        share = strategy.kept / strategy.seed_samples
    seconds = _UNKNOWN if strategy.seconds is None else duration(strategy.seconds)
    return (
        _UNKNOWN if strategy.kept is None else f"{strategy.kept:,}",
        _figure(share, ".1%"),
        _figure(strategy.distinct_1, ".3f"),
        _figure(strategy.distinct_2, ".3f"),
        _figure(strategy.mean_words, ".1f"),
        " ".join(f"{score:.3f}" for score in strategy.similarity or ()) or _UNKNOWN,
        _figure(strategy.repeated_texts, ".1%"),
        _figure(strategy.repeated_pictures, ".1%"),
        f"~{seconds}" if strategy.seconds_source == "estimated" else seconds,
    )


def _figure(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _data(strategy: Strategy, error: SynthAgentError | None) -> dict[str, Any]:
    return {**asdict(strategy), "error": error.as_dict() if error else None}
