"""Schedule, parameter groups and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mgm.optimization import Schedule, clip_gradients, parameter_groups, set_learning_rate


def test_the_first_step_runs_at_zero_and_the_last_rate_is_zero() -> None:
    schedule = Schedule(total_steps=100, warmup_ratio=0.03)
    assert schedule.warmup_steps == 3
    assert [schedule.factor(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert schedule.factor(3 + 97) == pytest.approx(0, abs=1e-12)
    middle = 0.5 * (1 + math.cos(math.pi * 10 / 97))
    assert schedule.factor(13) == pytest.approx(middle)
    assert schedule.factor(1000) >= 0


@pytest.mark.parametrize(
    ("total", "ratio", "expected"), [(8, 0.03, 1), (101, 0.03, 4), (100, 0.0, 0)]
)
def test_warm_up_is_rounded_up(total: int, ratio: float, expected: int) -> None:
    schedule = Schedule(total, ratio)
    assert schedule.warmup_steps == expected
    assert schedule.factor(0) == (0.0 if expected else 1.0)


def _named() -> dict[str, nn.Parameter]:
    return {
        "projector.0.weight": nn.Parameter(torch.ones(2, 2)),
        "projector.0.bias": nn.Parameter(torch.ones(2)),
        "mining.query.0.weight": nn.Parameter(torch.ones(2)),
        "language_model.w.weight": nn.Parameter(torch.ones(2, 2)),
    }


def test_a_projector_rate_of_zero_is_zero_and_mining_keeps_the_common_rate() -> None:
    named = _named()
    groups = parameter_groups(named.items(), 1e-3, 0.0, 0.1)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rate) == len(named)
    assert [rate[id(p)] for p in named.values()] == [0.0, 0.0, 1e-3, 1e-3]
    assert [decay[id(p)] for p in named.values()] == [0.1, 0.0, 0.0, 0.1]

    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer, 1.0)
    before = {name: value.detach().clone() for name, value in named.items()}
    for value in named.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    moved = {name for name, value in named.items() if not torch.equal(value, before[name])}
    assert moved == {"mining.query.0.weight", "language_model.w.weight"}


def test_without_its_own_rate_the_projector_has_the_common_one() -> None:
    groups = parameter_groups(_named().items(), 2e-5, None, 0.0)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(2e-5, 4)]


def test_rates_follow_each_groups_peak() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(_named().items(), 1e-3, 1e-4, 0.0))
    for factor in (0.5, 0.25):
        first = set_learning_rate(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-4 * factor, 1e-3 * factor])
        assert first == rates[0]


def test_clipping_is_over_all_gradients_and_reports_the_norm_before() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(clip_gradients([first, second], 1.0)) == pytest.approx(5)
    assert [float(first.grad), float(second.grad)] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert float(clip_gradients([first, second], 10.0)) == pytest.approx(1, rel=1e-5)
    assert float(first.grad) == pytest.approx(0.6, rel=1e-5)
