"""How much goes through the model at once: what settings say, and what the card allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import mgm.pass_size
from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.memory import CONTEXT, GIB, WANTED_TOKENS, Plan, predict
from mgm.pass_size import DEFAULT_TOKENS, PassSize, pass_size
from mgm.train_settings import TrainSettings

MGM_2B = ModelConfig.preset("mgm-2b")


@dataclass
class OnDevice:
    """What is asked of a model: where it is, and its sizes."""

    device: torch.device
    config: ModelConfig = MGM_2B


def asked(settings: TrainSettings, device: str = "cuda") -> PassSize:
    return pass_size(OnDevice(torch.device(device)), settings)  # type: ignore[arg-type]


@pytest.fixture
def fast() -> TrainSettings:
    nowhere = Path("nowhere")
    return TrainSettings(
        stage="pretrain",
        language_model=nowhere,
        vision_tower=nowhere,
        high_resolution_tower=nowhere,
        data=nowhere,
        images=nowhere,
        output=nowhere,
        projector=nowhere,
        numerics="fast",
    )


def free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(mgm.pass_size, "free_bytes", lambda device: gib * GIB)


def test_settings_that_name_both_are_followed(fast: TrainSettings) -> None:
    given = replace(fast, tokens_per_pass=1000, recomputed_layers=3)
    assert asked(given) == asked(given, "cpu") == PassSize(1000, 3)


def test_without_a_gpu_or_in_float32_memory_is_not_asked(fast: TrainSettings) -> None:
    assert asked(fast, "cpu") == PassSize(DEFAULT_TOKENS, 0)
    assert asked(replace(fast, dtype="float32")) == PassSize(DEFAULT_TOKENS, 0)
    assert asked(replace(fast, recomputed_layers=2), "cpu") == PassSize(DEFAULT_TOKENS, 2)


def test_a_large_card_takes_what_is_wanted(
    fast: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 79)
    assert asked(fast) == PassSize(WANTED_TOKENS["projector"], 0)
    lora = replace(fast, stage="finetune", method="lora")
    assert asked(lora) == PassSize(WANTED_TOKENS["lora"], 0)
    assert asked(replace(lora, tokens_per_pass=3000)) == PassSize(3000, 0)


def test_a_small_card_takes_what_fits(fast: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10)
    lora = replace(fast, stage="finetune", method="lora")
    tokens, recomputed = asked(lora)
    plan = Plan("lora", tokens, recomputed, lora_rank=lora.lora_rank)
    assert 0 < tokens < WANTED_TOKENS["lora"]
    assert predict(MGM_2B, plan).reserved <= 10 * GIB


def test_what_cannot_fit_is_refused_with_numbers_and_changes(
    fast: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 23)
    full = replace(fast, stage="finetune", method="full")
    with pytest.raises(InputError, match="does not fit on this card") as raised:
        asked(full)
    assert f"{23 + CONTEXT / GIB:.1f} GiB are there" in raised.value.message
    assert "method: lora" in raised.value.hint
    free(monkeypatch, 3)
    with pytest.raises(InputError, match="larger card"):
        asked(fast)
