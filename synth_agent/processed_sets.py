"""The processed data set of a recipe: found among what runs left behind, or made without training.

It is the first stage of a run, with the same command and the same cache key, so that a run of the
recipe finds what was made here and the other way round.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from synth_agent.data import atomic_file
from synth_agent.digests import Digests
from synth_agent.errors import SynthAgentError
from synth_agent.recipes import Recipe, dump_recipe, load_catalogue, validate_recipe
from synth_agent.runs import Cost, Plan, Proposal
from synth_agent.stage_plan import Context, Stage, build_process
from synth_agent.stage_process import run_stage
from synth_agent.workspace import Workspace


def find_processed(workspace: Workspace, recipe: Recipe, digests: Digests) -> Path | None:
    """Return the folder of a recipe's processed data set, None when it was not made.

    Raises:
        InvalidInput: an input that decides the result cannot be read.
    """
    if next(processed_results(workspace), None) is None:
        return None  # and the pictures need not be read for the key
    stage = _stage(workspace, recipe, digests)
    return stage.output if stage.output.is_dir() and not stage.missing(stage.output) else None


def make_processed(workspace: Workspace, recipe: Recipe, digests: Digests) -> Path:
    """Process the seed set by a recipe, unless that was done, and return the folder.

    Raises:
        InvalidInput: the recipe may not run here, or an input cannot be read.
        SynthAgentError: processing failed.
    """
    found = find_processed(workspace, recipe, digests)
    if found is not None:
        return found
    validate_recipe(recipe, load_catalogue(), workspace)
    stage = _stage(workspace, recipe, digests)
    folder = workspace.artifacts / "strategies" / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "recipe.yaml") as file:
        file.write(dump_recipe(recipe))
    # A folder of its own: a run of the same recipe may be at work on the stage's.
    partial = stage.output.with_name(f"{stage.output.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for command in stage.commands:
            _run(workspace, command, folder, partial)
        if missing := stage.missing(partial):
            raise SynthAgentError(
                "Processing failed", f"{recipe.name}: {', '.join(missing)} is missing", ""
            )
        if not stage.output.exists():
            partial.rename(stage.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return stage.output


def processed_results(workspace: Workspace) -> Iterator[dict[str, Any]]:
    """Yield what `result.json` says of every processed data set of the workspace."""
    for path in sorted((workspace.artifacts / "processed").glob("*/result.json")):
        try:
            result = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue  # another process may be removing it
        if isinstance(result, dict):
            yield result


def _run(workspace: Workspace, command: Sequence[str], folder: Path, partial: Path) -> None:
    places = {
        "--recipe": folder / "recipe.yaml",
        "--progress": folder / "progress.jsonl",
        "--output": partial,
    }
    arguments = list(command)
    for position, flag in enumerate(command[:-1]):
        if flag in places:
            arguments[position + 1] = str(places[flag])
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    ended = run_stage(workspace, arguments, places["--progress"], log)
    if not ended.succeeded:
        raise ended.error("Processing failed")


def _stage(workspace: Workspace, recipe: Recipe, digests: Digests) -> Stage:
    """Return the process stage that a run of the recipe would have."""
    proposal = Proposal(
        title=recipe.title,
        slug=recipe.name,
        kind="explore",
        reason=recipe.reason,
        evidence=(),
        parent=None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=workspace.settings.model_dump(mode="json"),
        cost=Cost(0, None, None, ""),
        proposed_by="",
    )
    plan = Plan(
        run_id=f"strategy-{recipe.name}", proposal=proposal, approver="", approved_at="", sha256=""
    )
    return build_process(Context(workspace, plan, digests, {}))
