"""The spread over seeds: pooling, what stands in before replicates, and which runs are replicates."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synth_agent.noise import (
    ASSUMPTIONS,
    assumed_noise,
    pooled,
    replicate_key,
    replicates,
    seed_noise,
)
from synth_agent.referee import judge
from synth_agent.runs import Cost, Plan, Proposal, Run, Score

SEED_RESULTS = Path(__file__).parents[1] / "benchmarks/results/miniworld_seeds.jsonl"


def test_pooling_matches_the_hand_calculation() -> None:
    noise = pooled([[1.0, 3.0], [10.0, 10.0, 13.0], [5.0]])
    assert noise is not None
    assert noise.sd == pytest.approx(np.sqrt((2 + 6) / 3))
    assert noise.degrees == 3
    assert not noise.assumed
    assert "5 runs of 2 plans" in noise.basis


def test_runs_without_a_replicate_tell_no_spread() -> None:
    assert pooled([[1.0], [2.0]]) is None
    assert pooled([]) is None


def test_the_upper_bound_covers_the_true_spread_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1_000):
        noise = pooled(generator.normal(0, 2.0, (2, 4)).tolist())
        assert noise is not None
        covered += noise.high >= 2.0
    assert 930 <= covered <= 970


def test_before_replicates_the_assumption_says_that_it_is_one() -> None:
    noise = assumed_noise("textvqa", "mgm-2b", 56.0)
    assert noise.sd == pytest.approx(1.12)
    assert noise.assumed
    assert "assumed from the published table" in noise.basis
    assert seed_noise([[50.0]], noise) is noise


def test_a_benchmark_without_its_own_figure_is_given_the_wider_one() -> None:
    assert assumed_noise("other", "mgm-2b", 50.0).sd == pytest.approx(5.0)


@pytest.mark.parametrize("percent", [0.0, 2.0])
def test_a_score_near_zero_is_not_assumed_to_stand_still(percent: float) -> None:
    noise = assumed_noise("mmbench", "mgm-2b", percent)
    assert noise.sd == pytest.approx(1.5)
    nothing = {str(number): 0.0 for number in range(500)}
    few = {**nothing, **{str(number): 1.0 for number in range(8)}}
    assert judge([few], [nothing], noise).outcome == "inside noise"


def test_the_mini_worlds_figures_are_those_of_its_measured_seeds() -> None:
    groups: dict[str, dict[str, list[float]]] = {"TextVQA": defaultdict(list)}
    groups["MMBench"] = defaultdict(list)
    for line in SEED_RESULTS.read_text("utf-8").splitlines():
        record = json.loads(line)
        for name, by_recipe in groups.items():
            by_recipe[record["recipe"]].append(record[name])
    for name, by_recipe in groups.items():
        noise, known = pooled(list(by_recipe.values())), ASSUMPTIONS["mgm-mini"][name.lower()]
        assert noise is not None
        assert known.sd == pytest.approx(noise.sd, abs=0.05)
        assert known.degrees == noise.degrees


def test_few_replicates_are_joined_with_the_assumption_and_many_replace_it() -> None:
    assumed = assumed_noise("textvqa", "mgm-mini", 5.0)
    few = seed_noise([[4.0, 4.1]], assumed)
    assert 5 < few.sd < assumed.sd
    assert few.assumed
    assert few.degrees == 5
    many = seed_noise([[4.0, 4.1, 4.2, 4.3, 4.4]], assumed)
    assert not many.assumed
    assert many.sd == pytest.approx(np.std([4.0, 4.1, 4.2, 4.3, 4.4], ddof=1))


def _run(
    number: int, seed: int, samples: str = "a", *, rate: float = 1e-3, device: str = "cpu"
) -> Run:
    settings: dict[str, Any] = {"seed": seed, "pretrain": {"learning_rate": rate}}
    settings["compute"] = {"device": device}
    proposal = Proposal(
        title="t", slug="s", kind="explore", reason="", evidence=(), parent=None, recipe={},
        settings=settings, cost=Cost(1, 1, 1.0, ""), proposed_by="test",
    )  # fmt: skip
    run = Run(f"{number:04}-s", Plan(f"{number:04}-s", proposal, "me", "", proposal.sha256))
    run.stages["process"].status = "succeeded"
    run.stages["process"].result = {"digest": samples}
    run.scores["textvqa"] = Score(
        "textvqa", "val", "accuracy", 10.0 + number, 0, 0, 0, 9, "", "", "x"
    )
    return run


def test_replicates_differ_in_seed_and_machine_only() -> None:
    first = _run(1, 0)
    same = [_run(2, 1), _run(3, 2, device="cuda")]
    others = [_run(4, 1, samples="b"), _run(5, 1, rate=2e-3)]
    groups = replicates([first, *same, *others], "textvqa")
    assert [run.id for run in groups[str(replicate_key(first))]] == ["0001-s", "0002-s", "0003-s"]
    assert sorted(len(runs) for runs in groups.values()) == [1, 1, 3]


def test_the_same_seed_twice_is_no_replicate() -> None:
    (runs,) = replicates([_run(1, 7), _run(2, 7)], "textvqa").values()
    assert [run.id for run in runs] == ["0001-s"]


def test_runs_without_samples_or_score_are_left_out() -> None:
    unfinished = _run(1, 0)
    unfinished.stages["process"].status = "failed"
    assert replicate_key(unfinished) is None
    assert replicates([unfinished, _run(2, 1)], "mmbench") == {}
