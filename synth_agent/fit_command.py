"""The command `synth-agent fit`: will the training fit the GPU, how, and how long will it take.

Nothing is run. Exit code 0, or 1 when a stage does not fit the card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm.memory import CONTEXT, Memory
from synth_agent import pipeline
from synth_agent.cards import GIB, Card, machine_cards, parse_card
from synth_agent.errors import EXIT_FAILED, EXIT_OK, InvalidInput, nearest
from synth_agent.fit import StageTime, estimate_cost, training_times
from synth_agent.headless import narrate
from synth_agent.recipes import Recipe, list_recipes, load_catalogue, load_recipe, validate_recipe
from synth_agent.runs import Cost
from synth_agent.training_fit import StageFit, fit_stages, help_words
from synth_agent.wording import duration
from synth_agent.workspace import Workspace, stage_environment

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "masters and moments",
    "activations": "activations",
    "backward": "logits or a layer",
    "vision": "pictures",
    "fragmentation": "allocator's spare",
    "context": "CUDA itself",
}
_LEGEND = "Of pictures and activations, which are not there at once, the larger counts."


def fit(workspace: Workspace, options: argparse.Namespace) -> int:
    """Print what each training stage takes of the card, and its time.

    Args:
        workspace: Whose settings the training has.
        options: `recipe`, a name, a file or None; `card`, text or None; `json`.

    Raises:
        InvalidInput: If there is no such recipe or card, or a part of the model cannot be read.
        CardUnknown: If this machine's GPU cannot be told.
    """
    settings = workspace.settings.model_dump(mode="json")
    card = parse_card(options.card) if options.card else _machine_card(workspace)
    history = pipeline.list_runs(workspace, lambda error: narrate(f"left out: {error}"))
    recipe = _recipe(workspace, options.recipe)
    cost = estimate_cost(workspace, recipe, settings, history)
    fits = fit_stages(workspace, settings, card)
    times = training_times(workspace, settings, history, cost.expected_samples or None, card)
    if options.json:
        print(json.dumps(_data(card, recipe, cost, fits, times)))
    else:
        print("\n".join(_lines(card, recipe, cost, fits, times)))
    return EXIT_FAILED if any(one.fits is False for one in fits) else EXIT_OK


def _machine_card(workspace: Workspace) -> Card | None:
    if workspace.settings.compute.device == "cpu":
        return None
    cards = machine_cards(stage_environment(workspace))
    return max(cards, key=lambda card: card.usable, default=None)


def _recipe(workspace: Workspace, name: str | None) -> Recipe:
    if name is None:
        return Recipe("the whole seed set", "", "", (), {})
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(name))
    else:
        recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
        if name not in recipes:
            raise InvalidInput("No such recipe", f"{name!r} in recipes/", nearest(name, recipes))
        recipe = recipes[name]
    validate_recipe(recipe, load_catalogue(), workspace)
    return recipe


def _lines(
    card: Card | None,
    recipe: Recipe,
    cost: Cost,
    fits: Sequence[StageFit],
    times: Mapping[str, StageTime],
) -> list[str]:
    expected = cost.expected_samples
    samples = "unknown" if expected is None else f"{expected:,}"
    lines = [
        f"card     {_card_words(card)}",
        f"samples  {samples} of {cost.seed_samples:,} ({recipe.name})",
        "",
    ]
    rows: list[tuple[str, ...]] = [("", *(one.stage for one in fits))]
    rows.append(("method", *(one.method for one in fits)))
    rows.append(("fits", *(_fits_word(one) for one in fits)))
    if any(one.memory for one in fits):
        parts = [_parts(one.memory) if one.memory else {} for one in fits]
        rows.append(("GiB", *(_gib(sizes.get("card")) for sizes in parts)))
        for name, words in _PARTS.items():
            rows.append((f"  {words}", *(_gib(sizes.get(name)) for sizes in parts)))
        rows += _pass_rows(fits)
    seconds = [times[one.stage].seconds for one in fits]
    rows.append(("time", *("unknown" if s is None else duration(s) for s in seconds)))
    lines += [f"{row[0]:<22}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows]
    return [*lines, "", *_notes(card, fits, times)]


def _card_words(card: Card | None) -> str:
    if card is None:
        return "none here: name one with --card 24GiB"
    return f"{card.words()} for programs, {card.free / GIB:.1f} GiB free"


def _fits_word(one: StageFit) -> str:
    return "-" if one.fits is None else "yes" if one.fits else "no"


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f}"


def _pass_rows(fits: Sequence[StageFit]) -> list[tuple[str, ...]]:
    plans = [one.plan for one in fits]
    return [
        ("positions a pass", *("-" if plan is None else f"{plan.tokens:,}" for plan in plans)),
        ("samples a pass", *(f"{one.samples:,}" if one.plan else "-" for one in fits)),
        ("passes a step", *(f"{one.passes:,}" if one.plan else "-" for one in fits)),
        ("layers recomputed", *("-" if p is None else str(p.recomputed_layers) for p in plans)),
    ]


def _notes(
    card: Card | None, fits: Sequence[StageFit], times: Mapping[str, StageTime]
) -> list[str]:
    lines = [_LEGEND] if any(one.memory for one in fits) else []
    for one in fits:
        if one.why and not one.memory:
            lines.append(f"{one.stage}: {one.why}")
        if one.fits is False:
            lines.append(f"{one.stage} takes at least {one.least / GIB:.1f} GiB, shown above.")
            lines.append(help_words(one))
        elif one.fits is None and one.memory:
            lines.append(f"{one.stage} takes at least {one.least / GIB:.1f} GiB of a card.")
        if one.is_shrunk:
            lines.append(
                f"{one.stage}: tokens_per_pass and recomputed_layers of the settings take more than "
                "is there; training would run out of memory once and go on with less."
            )
        if one.fits and not one.fits_now and card is not None:
            held = (card.usable - card.free) / GIB
            lines.append(f"{one.stage} does not fit now: other programs hold {held:.1f} GiB.")
        if one.fits and not one.fits_longest:
            lines.append(f"{one.stage}: a sample of model_max_length positions may not fit.")
    lines += [f"time of {stage}: {time.basis}" for stage, time in times.items()]
    return lines


def _parts(memory: Memory) -> dict[str, float]:
    """Return bytes by part, and `card`, what the card must have for programs."""
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "backward": memory.backward,
        "vision": memory.vision,
        "fragmentation": memory.reserved - memory.peak,
        "context": CONTEXT,
        "card": memory.card,
    }


def _data(
    card: Card | None,
    recipe: Recipe,
    cost: Cost,
    fits: Sequence[StageFit],
    times: Mapping[str, StageTime],
) -> dict[str, Any]:
    """Return the answer as plain data; sizes in bytes, times in seconds."""
    verdicts = [one.fits for one in fits]
    return {
        "card": None if card is None else vars(card),
        "recipe": recipe.name,
        "samples": cost.expected_samples,
        "fits": False if False in verdicts else None if None in verdicts else True,
        "stages": [_stage_data(one, times[one.stage]) for one in fits],
    }


def _stage_data(one: StageFit, time: StageTime) -> dict[str, Any]:
    sizes = _parts(one.memory) if one.memory else None
    return {
        "stage": one.stage,
        "method": one.method,
        "fits": one.fits,
        "why": one.why,
        "bytes": sizes and {name: round(size) for name, size in sizes.items()},
        "least_bytes": round(one.least),
        "tokens_per_pass": one.plan and one.plan.tokens,
        "recomputed_layers": one.plan and one.plan.recomputed_layers,
        "samples_per_pass": one.samples,
        "passes_per_step": one.passes,
        "changes": list(one.changes),
        "is_shrunk": one.is_shrunk,
        "fits_now": one.fits_now,
        "fits_longest": one.fits_longest,
        "seconds": time.seconds,
        "seconds_basis": time.basis,
    }
