"""Which training settings a proposal of a model may change, and the settings that its run would have.

The parent's settings, where they may differ, with the changes; bounds and consistency are checked here,
and a replicate's seed is chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from synth_agent.errors import InvalidInput, nearest
from synth_agent.planner.builtin import workspace_settings
from synth_agent.planner.fencing import visible
from synth_agent.runs import Kind, Run
from synth_agent.workspace import TrainSettings, Workspace

COMPARED = ("data", "model", "evaluate")
"""Sections that have to be equal for two runs to be comparable."""

TRAINING_FIELDS: Mapping[str, tuple[float, float]] = {
    "learning_rate": (1e-8, 1.0),
    "projector_learning_rate": (1e-8, 1.0),
    "epochs": (0.01, 20),
    "micro_batch_size": (1, 1024),
    "warmup_ratio": (0, 0.5),
    "weight_decay": (0, 1),
    "lora_rank": (1, 1024),
    "lora_alpha": (0.1, 4096),
    "lora_dropout": (0, 0.9),
    "method": (0, 0),
}
"""Training settings that a model may change, with the bounds of those that are numbers."""
METHODS: Mapping[str, tuple[str, ...]] = {"pretrain": ("projector",), "finetune": ("full", "lora")}


def settings_words() -> str:
    """Return the settings that a model may change, with what they may be."""
    words = [
        f"{name} {low:g} to {high:g}"
        for name, (low, high) in TRAINING_FIELDS.items()
        if name != "method"
    ]
    return f"{', '.join(words)}; method of finetune: {' or '.join(METHODS['finetune'])}"


def settings_with(
    workspace: Workspace,
    kind: Kind,
    changes: Mapping[str, Any],
    parent: Run | None,
    runs: Sequence[Run],
) -> dict[str, Any]:
    """Return the settings of the run: the parent's, where they may differ, with the changes.

    Args:
        workspace: Whose settings the run has otherwise.
        kind: A baseline changes nothing; only a replicate has another seed.
        changes: What the model wrote: section to setting to value, and `seed`.
        parent: What the run is compared with.
        runs: All past runs, for a seed that none has used.

    Raises:
        InvalidInput: naming the setting and the fix.
    """
    settings = workspace_settings(workspace)
    if parent is not None:
        before = parent.plan.proposal.settings
        for section in COMPARED:
            if before.get(section) != settings.get(section):
                raise InvalidInput(
                    "Parent is not comparable",
                    f"field parent: {parent.id} ran with other {section} settings",
                    "name a run with the present settings, or propose the baseline",
                )
        settings |= {key: before[key] for key in ("pretrain", "finetune", "seed") if key in before}
    for name, values in changes.items():
        if name in METHODS:
            settings[name] = _changed(name, settings[name], values)
        elif name != "seed":
            raise InvalidInput(
                "Setting may not be changed",
                f"field settings: {visible(name)[:60]}",
                "valid names: pretrain, finetune, seed",
            )
    if kind == "baseline" and changes:
        raise InvalidInput("Baseline with changes", "field settings", "leave it empty")
    return settings | {"seed": _seed(kind, changes.get("seed"), settings, runs)}


def _changed(section: str, before: Mapping[str, Any], changes: object) -> dict[str, Any]:
    if not isinstance(changes, dict):
        raise InvalidInput("Wrong field", f"settings.{section}", "give an object")
    for name, value in changes.items():
        place = f"settings.{section}.{visible(str(name))[:60]}"
        if name not in TRAINING_FIELDS:
            raise InvalidInput(
                "Setting may not be changed", place, nearest(str(name)[:60], TRAINING_FIELDS)
            )
        _check_training(place, section, name, value)
    if "epochs" in changes and before.get("max_steps"):
        raise InvalidInput(
            "Setting has no effect",
            f"settings.{section}.epochs: the stage takes {before['max_steps']} steps",
            "leave it out",
        )
    changed = {**before, **changes}
    try:
        TrainSettings.model_validate(changed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            "Wrong setting", f"settings.{section}.{place}", str(first["msg"])[:200]
        ) from error
    for name in changes:
        if name.startswith("lora_") and changed["method"] != "lora":
            raise InvalidInput(
                "Setting has no effect",
                f"settings.{section}.{name}: the method is {changed['method']}",
                "leave it out" if section == "pretrain" else "leave it out, or set method to lora",
            )
    whole, micro = changed["global_batch_size"], changed["micro_batch_size"]
    if whole % micro:
        raise InvalidInput(
            "Batch sizes do not fit",
            f"settings.{section}.micro_batch_size = {micro} does not divide {whole}",
            "give a divisor",
        )
    return changed


def _check_training(place: str, section: str, name: str, value: object) -> None:
    if name == "method":
        if value not in METHODS[section]:
            raise InvalidInput("Unknown method", place, f"one of {', '.join(METHODS[section])}")
        return
    low, high = TRAINING_FIELDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= float(str(value)) <= high:
        raise InvalidInput(
            "Out of range", f"{place}: {str(value)[:40]}", f"give a number from {low:g} to {high:g}"
        )


def _seed(kind: Kind, wanted: Any, settings: Mapping[str, Any], runs: Sequence[Run]) -> int:
    """Return the seed: for a replicate one that no run of the workspace has used."""
    if kind != "replicate":
        if wanted is not None and wanted != settings["seed"]:
            raise InvalidInput(
                "A seed is not a change",
                "field settings.seed",
                "leave it out, or propose a replicate",
            )
        return int(settings["seed"])
    used = {run.plan.proposal.settings.get("seed") for run in runs}
    if wanted is None:
        free = int(settings["seed"])
        while free in used:
            free += 1
        return free
    if type(wanted) is not int or not 0 <= wanted < 2**31 or wanted in used:
        raise InvalidInput(
            "Bad seed", f"settings.seed: {str(wanted)[:40]}", "leave it out: it is chosen for you"
        )
    return wanted
