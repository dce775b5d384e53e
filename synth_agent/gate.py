"""What an approval covers: every file, program and package that a run reads, by digest.

Owns the names and digests in `Plan.inputs`, the check that they still hold, and the limits that
make a proposal smaller. It decides nothing: `pipeline.approve` and `pipeline.launch` ask it.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from synth_agent import __version__
from synth_agent.digests import Digests
from synth_agent.errors import Conflict, InvalidInput
from synth_agent.recipes import steps_of
from synth_agent.runs import Cost, Limits, Plan, Proposal
from synth_agent.stage_plan import code_version, named_paths
from synth_agent.workspace import Workspace

ABSENT = "absent"
"""Stands for the digest of a file that is not there."""
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
    "py-data-juicer",
)
_PACKAGE = Path(__file__).resolve().parent
_DATA_ONLY = frozenset({"data.seed", "data.original", "code: data processing", "run: recipe.yaml"})
"""What only the data stage reads, besides what the recipe names."""
_READ_BY = {
    "process": ("data.seed", "data.original", "data.images", "recipe: ", "run: recipe.yaml"),
    "pretrain": ("data.images", "model."),
    "finetune": ("data.instructions", "data.instruction_images", "model."),
    "evaluate": ("evaluate.", "model."),
}
"""Beginnings of the names of what a stage reads as long as it runs; its code is loaded at once."""
_CODE = (
    "digests.py",
    "gate.py",
    "noise.py",
    "pipeline.py",
    "referee.py",
    "runs.py",
    "stage_plan.py",
    "verdicts.py",
    "worker.py",
)


def approved_inputs(workspace: Workspace, proposal: Proposal, digests: Digests) -> dict[str, str]:
    """Return the digest of everything that a run of the proposal reads besides its own folder.

    Keys are `data.*`, `model.*`, `evaluate.*` (files and folders of the settings), `recipe: PATH`
    (what the recipe names), `code: *`, `version: *`.
    """
    found = {
        name: _digest(workspace.path(path), digests)
        for name, path in _paths_of(proposal.settings).items()
        if name != "model.name" or workspace.path(path).is_file()
    }
    for path in sorted(named_paths(steps_of(proposal.recipe), workspace)):
        found[f"recipe: {path}"] = _digest(workspace.path(path), digests)
    found["code: data processing"] = code_version(digests, "process")
    found["code: training and evaluation"] = code_version(digests, "pretrain")
    found["code: run"] = digests.files(_PACKAGE, [_PACKAGE / name for name in _CODE])
    return found | _versions()


def folder_inputs(workspace: Workspace, run_id: str) -> dict[str, str]:
    """Return the digests of the files of a run's folder that say what runs."""
    paths = workspace.run(run_id)
    return {f"run: {path.name}": _content(path) for path in (paths.proposal, paths.recipe)}


def changed_inputs(
    workspace: Workspace, plan: Plan, digests: Digests | None = None
) -> tuple[str, ...]:
    """Return the names of what is no longer as it was when the plan was approved."""
    known = digests or Digests(workspace)
    current = approved_inputs(workspace, plan.proposal, known)
    current |= folder_inputs(workspace, plan.run_id)
    if digests is None:
        known.save()
    names = sorted(current.keys() | plan.inputs.keys())
    return tuple(name for name in names if current.get(name) != plan.inputs.get(name))


def check_approval(
    workspace: Workspace,
    plan: Plan,
    digests: Digests | None = None,
    *,
    finished: Collection[str] | None = None,
) -> None:
    """Check that what would run is what was approved.

    Args:
        workspace: The workspace.
        plan: The plan.
        digests: Where digests are remembered; None for a memory of its own.
        finished: Stages that a running worker is done with: what only they read, and the code that
            the worker has loaded, may change. None before the start.

    Raises:
        Conflict: Naming everything that changed.
    """
    if not plan.inputs:
        raise Conflict(
            "Approval covers too little",
            f"{plan.run_id} was approved before the digests of its inputs were kept",
            "propose it again and approve it; finished stages are reused",
        )
    changed = changed_inputs(workspace, plan, digests)
    if finished is not None:
        changed = tuple(name for name in changed if not _is_past(name, finished))
    if changed:
        raise Conflict(
            "Approval is void",
            f"{plan.run_id}: changed since it was approved: {', '.join(changed)}",
            "put it back as it was, or propose again and approve what is there",
        )


def changed_under(
    workspace: Workspace, plan: Plan, digests: Digests, stage: str
) -> tuple[str, ...]:
    """Return the names of what a stage read and what is no longer as it was approved."""
    if not plan.inputs:
        return ()
    read = _READ_BY[stage]
    return tuple(name for name in changed_inputs(workspace, plan, digests) if name.startswith(read))


def _is_past(name: str, finished: Collection[str]) -> bool:
    is_of_data = name in _DATA_ONLY or name.startswith("recipe: ")
    return name == "code: run" or (is_of_data and "process" in finished)


def with_limits(proposal: Proposal, limits: Limits) -> Proposal:
    """Return a proposal of which only a part may run. It has another sha256: show it again.

    A limit on samples becomes the settings' sample cap where that is higher, so that it decides
    which samples are trained on and is part of the data stage's key.

    Raises:
        InvalidInput: If a limit makes no sense, or is wider than one that the proposal has.
    """
    _check_values(limits)
    before, settings, cost = proposal.limits, dict(proposal.settings), proposal.cost
    if before.samples is not None and (limits.samples is None or limits.samples > before.samples):
        raise InvalidInput(
            "Limit cannot be widened",
            f"{proposal.slug}: limited to {before.samples:,} samples",
            "propose it again without the limit",
        )
    if limits.samples is not None:
        data = settings.get("data", {})
        cap = min(int(data.get("sample_cap", limits.samples)), limits.samples)
        settings["data"] = {**data, "sample_cap": cap}
        if cost.expected_samples is not None:
            cost = replace(cost, expected_samples=min(cost.expected_samples, cap))
    if limits.data_only or limits.samples is not None:
        cost = _unknown_time(cost)
    return replace(proposal, limits=limits, settings=settings, cost=cost)


def check_limits(proposal: Proposal) -> None:
    """Check that a proposal's limits make sense and that its settings keep to them.

    Raises:
        InvalidInput: Naming the limit.
    """
    limits = proposal.limits
    _check_values(limits)
    cap = proposal.settings.get("data", {}).get("sample_cap")
    if limits.samples is not None and (cap is None or cap > limits.samples):
        raise InvalidInput(
            "Limit is not kept",
            f"limits.samples = {limits.samples}, but data.sample_cap = {cap}",
            "set the limit again",
        )


def _check_values(limits: Limits) -> None:
    samples, hours = limits.samples, limits.gpu_hours
    if samples is not None and (type(samples) is not int or samples < 1):
        raise InvalidInput("Bad limit", f"samples = {samples!r}", "give a whole number from 1")
    if hours is not None and (
        type(hours) not in (int, float) or not math.isfinite(hours) or hours <= 0
    ):
        raise InvalidInput("Bad limit", f"gpu_hours = {hours!r}", "give a number above 0")
    if type(limits.data_only) is not bool:
        raise InvalidInput("Bad limit", f"data_only = {limits.data_only!r}", "give true or false")


def _unknown_time(cost: Cost) -> Cost:
    words = "limited: its time is not estimated"
    basis = cost.basis if words in cost.basis else f"{cost.basis}; {words}"
    return replace(cost, seconds=None, basis=basis)


def _paths_of(settings: Mapping[str, Any]) -> dict[str, str]:
    evaluate = settings.get("evaluate", {})
    sections = {
        "data": settings.get("data", {}),
        "model": settings.get("model", {}),
        "evaluate.textvqa": evaluate.get("textvqa", {}),
        "evaluate.mmbench": evaluate.get("mmbench", {}),
    }
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if isinstance(value, str)
    }


def _digest(path: Path, digests: Digests) -> str:
    return digests.path(path) if path.exists() else ABSENT


def _content(path: Path) -> str:
    # Read in full each time: these are small, and the first that somebody would edit.
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ABSENT


@cache
def _versions() -> dict[str, str]:
    versions = {"version: python": platform.python_version(), "version: synth-agent": __version__}
    for package in _PACKAGES:
        try:
            versions[f"version: {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[f"version: {package}"] = ABSENT
    return versions
