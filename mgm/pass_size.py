"""How much goes through the model at once on the card that is there.

Settings that name it are followed. Otherwise `mgm.memory` predicts what fits; without a GPU, or
where memory is not the question, a pass is eight captions with their pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mgm.errors import InputError
from mgm.memory import CONTEXT, GIB, WANTED_TOKENS, Plan, choose, predict, single_changes
from mgm.model import MGM
from mgm.train_settings import TrainSettings

DEFAULT_TOKENS = 4864


class PassSize(NamedTuple):
    """What goes through the model at once."""

    tokens: int
    recomputed_layers: int


def pass_size(model: MGM, settings: TrainSettings) -> PassSize:
    """Return the positions of a pass, and the layers whose activations are recomputed.

    Raises:
        InputError: If nothing fits, with the single changes that would help.
    """
    given = PassSize(settings.tokens_per_pass, settings.recomputed_layers)
    if given.tokens and given.recomputed_layers >= 0:
        return given
    if model.device.type != "cuda" or settings.dtype != "bfloat16":
        return PassSize(given.tokens or DEFAULT_TOKENS, max(0, given.recomputed_layers))
    plan = Plan(
        settings.method,
        given.tokens or WANTED_TOKENS[settings.method],
        max(0, given.recomputed_layers),
        settings.master_weights,
        settings.moments,
        settings.lora_rank,
    )
    free = free_bytes(model.device)
    chosen = choose(model.config, plan, free)
    if chosen is None:
        raise _nothing_fits(model, plan, free)
    return PassSize(chosen.tokens, chosen.recomputed_layers)


def free_bytes(device: torch.device) -> float:
    """Return what this process's allocator may take in all, the model that is there included."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device), allowed)


def _nothing_fits(model: MGM, plan: Plan, free: float) -> InputError:
    least = predict(model.config, plan.least(model.config))
    changes = single_changes(model.config, plan, free)
    return InputError(
        "The training does not fit on this card",
        f"at its smallest it takes {(least.reserved + CONTEXT) / GIB:.1f} GiB, "
        f"{(free + CONTEXT) / GIB:.1f} GiB are there",
        "one of these would make it fit: " + "; ".join(changes)
        if changes
        else "no single setting makes it fit; use a larger card or several",
    )
