"""The prediction of GPU memory: its counts against built modules, its direction, and its choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mgm.config import ModelConfig
from mgm.lora import attach_lora
from mgm.memory import (
    CONTEXT,
    GIB,
    WANTED_TOKENS,
    Method,
    Plan,
    adapter_parameters,
    choose,
    language_parameters,
    predict,
    single_changes,
    tower_parameters,
    vision_parameters,
)
from mgm.model import MGM

MGM_2B = ModelConfig.preset("mgm-2b")
METHODS: tuple[Method, ...] = ("projector", "lora", "full")
CHANGES: dict[str, dict[str, Any]] = {
    "8-bit moments (moments: 8bit)": {"moments": "8bit"},
    "24-bit masters (master_weights: split24)": {"master_weights": "split24"},
    "8-bit moments with 24-bit masters (moments: 8bit, master_weights: split24)": {
        "moments": "8bit",
        "master_weights": "split24",
    },
    "train adapters (method: lora)": {"method": "lora"},
    "smaller adapters (lora_rank: 16)": {"lora_rank": 16},
}


def wanted(method: Method) -> Plan:
    return Plan(method, WANTED_TOKENS[method])


@pytest.fixture(scope="module")
def built() -> MGM:
    """The published model in its true shapes, without memory behind them."""
    with torch.device("meta"):
        return MGM(MGM_2B)


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_are_those_of_the_model_that_is_built(built: MGM) -> None:
    assert language_parameters(MGM_2B) == count(built.language_model) == 2_506_172_416
    assert vision_parameters(MGM_2B) == count(built.mining, built.projector)
    towers = count(built.vision_tower, built.high_resolution_tower)
    assert tower_parameters(MGM_2B) == pytest.approx(towers, rel=2e-3)


def test_adapters_are_those_that_training_attaches() -> None:
    with torch.device("meta"):
        model = MGM(MGM_2B)
        attach_lora(model, 64, 16.0, 0.05)
    adapters = [p.numel() for name, p in model.named_parameters() if "lora_" in name]
    assert adapter_parameters(MGM_2B, 64) == sum(adapters)


def test_what_is_there_all_the_time_follows_from_the_counts() -> None:
    language, towers = language_parameters(MGM_2B), tower_parameters(MGM_2B)
    small = vision_parameters(MGM_2B)
    full = predict(MGM_2B, wanted("full"))
    assert full.weights == 2 * (language + towers)
    assert full.gradients == 2 * language + 4 * small
    assert full.optimizer == 12 * language + 12 * small
    lean = predict(MGM_2B, replace(wanted("full"), master_weights="split24", moments="8bit"))
    assert full.optimizer - lean.optimizer == pytest.approx((3 + 6) * language, rel=0.01)
    assert predict(MGM_2B, wanted("projector")).optimizer == 12 * small


@pytest.mark.parametrize("method", METHODS)
def test_more_positions_take_more(method: Method) -> None:
    peaks = [predict(MGM_2B, Plan(method, tokens)).peak for tokens in range(1024, 20000, 1024)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


@pytest.mark.parametrize("method", METHODS)
def test_each_further_recomputed_layer_takes_less(method: Method) -> None:
    plans = [replace(wanted(method), recomputed_layers=layers) for layers in range(18)]
    peaks = [predict(MGM_2B, plan).peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < predict(MGM_2B, wanted(method)).peak


def test_the_card_holds_what_is_reserved_and_the_context() -> None:
    memory = predict(MGM_2B, wanted("lora"))
    moment = max(memory.activations + memory.backward, memory.vision)
    assert memory.peak == memory.states + moment
    assert memory.reserved > memory.peak
    assert memory.card == memory.reserved + CONTEXT


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_fits_and_is_refused_only_where_the_smallest_does_not(method: Method) -> None:
    plan = wanted(method)
    least = predict(MGM_2B, plan.least(MGM_2B)).reserved
    for gib in range(4, 81):
        chosen = choose(MGM_2B, plan, gib * GIB)
        if chosen is None:
            assert least > gib * GIB
            continue
        assert predict(MGM_2B, chosen).reserved <= gib * GIB
        assert chosen.tokens <= plan.tokens
        assert replace(chosen, tokens=plan.tokens, recomputed_layers=0) == plan
    assert choose(MGM_2B, plan, 80 * GIB) == plan
    assert choose(MGM_2B, plan, least) == plan.least(MGM_2B)


def test_a_choice_holds_one_sample_however_few_positions_were_asked_for() -> None:
    chosen = choose(MGM_2B, Plan("projector", 100), 80 * GIB)
    assert chosen is not None
    assert chosen.tokens == Plan("projector", 100).least(MGM_2B).tokens


@pytest.mark.parametrize("method", METHODS)
def test_every_change_that_is_named_makes_it_fit(method: Method) -> None:
    plan, seen = wanted(method), set()
    for tenths in range(60, 450, 3):
        free = tenths * GIB / 10
        if choose(MGM_2B, plan, free) is not None:
            continue
        words = single_changes(MGM_2B, plan, free)
        seen |= set(words)
        for word in words:
            assert choose(MGM_2B, replace(plan, **CHANGES[word]), free) is not None
        for word in set(CHANGES) - set(words):
            helps = choose(MGM_2B, replace(plan, **CHANGES[word]), free) is not None
            is_pair = word.startswith("8-bit moments with") and words
            assert not helps or is_pair or word not in _of_method(method)
    assert seen == _of_method(method)


def _of_method(method: Method) -> set[str]:
    names = list(CHANGES)
    return {"full": set(names[:4]), "lora": {names[4]}, "projector": set[str]()}[method]
