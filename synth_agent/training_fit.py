"""Whether the training stages of a plan fit a GPU's memory, and how, before they run.

Owns the way from a plan's settings to `mgm.memory`, whose prediction this is, and the refusal of a
plan that the machine's card cannot hold. What is not predicted is named: nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.memory import (
    CONTEXT,
    WANTED_TOKENS,
    Memory,
    choose,
    predict,
    single_changes,
)
from mgm.memory import Plan as MemoryPlan
from synth_agent.cards import GIB, Card, CardUnknown, training_card
from synth_agent.errors import InvalidInput
from synth_agent.workspace import Workspace, stage_environment

TRAINING_STAGES = ("pretrain", "finetune")
_PARTS = ("language_model", "vision_tower", "high_resolution_tower")


@dataclass(frozen=True)
class StageFit:
    """What a training stage takes of a GPU's memory, and what goes through the model at once."""

    stage: str
    method: str
    fits: bool | None
    """None where nothing is claimed, for the reason that `why` gives."""
    why: str = ""
    plan: MemoryPlan | None = None
    """Positions of a pass and recomputed layers; the smallest there are where it does not fit."""
    memory: Memory | None = None
    """Bytes by what they are for."""
    samples: int = 0
    """Samples of a pass, of typical length."""
    passes: int = 0
    """Passes of an optimizer step, whose batch is the settings'."""
    least: float = 0.0
    """Bytes that the smallest card has for programs that would do."""
    changes: tuple[str, ...] = ()
    """Single changes of the settings, each of which would make it fit."""
    is_shrunk: bool = False
    """Whether the settings name a larger pass, which would run out of memory and be made smaller."""
    fits_now: bool = True
    """Whether it fits beside what other programs hold of the card."""
    fits_longest: bool = True
    """Whether a sample of `model_max_length` positions fits too."""


def fit_stages(
    workspace: Workspace, settings: Mapping[str, Any], card: Card | None
) -> tuple[StageFit, ...]:
    """Return what each training stage takes of a card.

    Args:
        workspace: Where the model's parts are.
        settings: The plan's.
        card: None where there is none; memory is then told for the passes that are wanted.

    Raises:
        InvalidInput: If a part of the model cannot be read.
    """
    reasons = {stage: _why_unknown(settings, stage) for stage in TRAINING_STAGES}
    if all(reasons.values()):
        return tuple(_not_predicted(settings, stage, why) for stage, why in reasons.items())
    config = model_config(workspace, settings)
    return tuple(
        _not_predicted(settings, stage, why)
        if why
        else _stage_fit(config, stage, settings[stage], card)
        for stage, why in reasons.items()
    )


def refuse_impossible(workspace: Workspace, settings: Mapping[str, Any]) -> None:
    """Check that the training fits the machine's card, where there is one and it can be told.

    What other programs hold at the moment does not count: a run may wait for them.

    Raises:
        InvalidInput: With the numbers and what would help; or if a part of the model cannot be read.
    """
    if all(_why_unknown(settings, stage) for stage in TRAINING_STAGES):
        return
    card = machine_card(workspace, settings)
    if card is None:
        return
    for fit in fit_stages(workspace, settings, card):
        if fit.fits is False:
            raise InvalidInput(
                "Training does not fit the GPU",
                f"{workspace.settings_file}: {fit.stage} with method = {fit.method!r} takes at "
                f"least {fit.least / GIB:.1f} GiB; the machine has {card.words()}",
                help_words(fit),
            )


def machine_card(workspace: Workspace, settings: Mapping[str, Any]) -> Card | None:
    """Return the GPU that a plan's training would use, None where there is none or it is not told."""
    if settings.get("compute", {}).get("device") == "cpu":
        return None
    try:
        return training_card(stage_environment(workspace))
    except CardUnknown:
        return None


def memory_words(workspace: Workspace, settings: Mapping[str, Any]) -> str:
    """Return what each training stage takes of the machine's card; empty where that is not known."""
    card = machine_card(workspace, settings)
    if card is None:
        return ""
    try:
        fits = fit_stages(workspace, settings, card)
    except InvalidInput:
        return ""  # a validation of the plan names the part that cannot be read
    words = []
    for fit in fits:
        if fit.fits and fit.memory is not None and fit.plan is not None:
            layers = fit.plan.recomputed_layers
            again = f", {layers} layers recomputed" if layers else ""
            words.append(
                f"{fit.stage} {fit.memory.card / GIB:.1f} GiB ({fit.plan.tokens:,} positions a pass{again})"
            )
        elif fit.fits is False:
            words.append(f"{fit.stage} at least {fit.least / GIB:.1f} GiB, which does not fit")
    return f"{', '.join(words)}, of {card.words()}" if words else ""


def help_words(fit: StageFit) -> str:
    """Return what would make a stage fit, in words."""
    if fit.changes:
        return f"one of these makes {fit.stage} fit: {'; '.join(fit.changes)}"
    return f"no single setting makes {fit.stage} fit: use a larger card"


def model_config(workspace: Workspace, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the sizes of the model: those of its parts, or as published while none is there.

    Raises:
        InvalidInput: If a part's configuration is missing, cannot be read, or does not fit.
    """
    model = settings["model"]
    folders = [workspace.path(model[part]) for part in _PARTS]
    try:
        if model["name"] == "mgm-2b" and not any(folder.exists() for folder in folders):
            return ModelConfig.preset(model["name"])
        return ModelConfig.from_parts(*folders)
    except InputError as error:
        raise InvalidInput(error.title, error.message, error.hint) from error


def _why_unknown(settings: Mapping[str, Any], stage: str) -> str:
    """Return why the memory of a stage is not predicted; empty where it is."""
    section = settings[stage]
    numerics = section.get("numerics", "reference")
    if settings["model"]["name"] == "mgm-mini":
        return "not predicted for the mini world's model"
    if settings.get("compute", {}).get("device") == "cpu":
        return "not predicted for compute.device: cpu"
    if numerics != "fast":
        return f"not predicted for numerics: {numerics}"
    if section["dtype"] != "bfloat16":
        return f"not predicted for dtype: {section['dtype']}"
    return ""


def _not_predicted(settings: Mapping[str, Any], stage: str, why: str) -> StageFit:
    return StageFit(stage, settings[stage]["method"], None, why)


def _stage_fit(
    config: ModelConfig, stage: str, section: Mapping[str, Any], card: Card | None
) -> StageFit:
    plan = _wanted(section)
    least = plan.least(config)
    told = partial(_told, config, stage, section, predict(config, least).card)
    if card is None:
        return told(plan, fits=None, why="no card to fit")
    free = card.usable - CONTEXT
    chosen = choose(config, plan, free)
    if chosen is None:
        return told(least, fits=False, changes=tuple(single_changes(config, plan, free)))
    length = max(section["model_max_length"], least.tokens)
    longest = replace(least, tokens=length, text_tokens=length - config.num_image_tokens)
    is_given = section.get("tokens_per_pass", 0) > 0 and section.get("recomputed_layers", -1) >= 0
    return told(
        chosen,
        fits=True,
        is_shrunk=is_given and chosen != plan,
        fits_now=choose(config, plan, card.free - CONTEXT) is not None,
        fits_longest=predict(config, longest).reserved <= free,
    )


def _wanted(section: Mapping[str, Any]) -> MemoryPlan:
    """Return what a stage would take if there were room."""
    return MemoryPlan(
        section["method"],
        section.get("tokens_per_pass") or WANTED_TOKENS[section["method"]],
        max(0, section.get("recomputed_layers", -1)),
        section.get("master_weights", "float32"),
        section.get("moments", "float32"),
        section["lora_rank"],
    )


def _told(
    config: ModelConfig,
    stage: str,
    section: Mapping[str, Any],
    least: float,
    plan: MemoryPlan,
    **more: Any,
) -> StageFit:
    samples = plan.pictures(config)
    passes = math.ceil(section["global_batch_size"] / samples)
    memory = predict(config, plan)
    return StageFit(
        stage,
        plan.method,
        plan=plan,
        memory=memory,
        samples=samples,
        passes=passes,
        least=least,
        **more,
    )
