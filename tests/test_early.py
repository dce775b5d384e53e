"""Early verdicts: known answers, measured hit rates, and what several starts cost and give."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synth_agent.early import (
    LEAST_RUNS,
    Finished,
    Starts,
    early_verdict,
    early_verdicts,
    hit_rate,
    loss_at,
    share_reached,
    starts_effect,
    wilson,
)
from synth_agent.runs import Cost, Plan, Proposal, Run, Score, StageState

ROOT = Path(__file__).parents[1]


def _runs(count: int, slope: float, noise: float, seed: int = 0) -> list[Finished]:
    generator = np.random.default_rng(seed)
    losses = generator.normal(1.0, 0.1, count)
    scores = 50 + slope * (losses - 1.0) * 10 + generator.normal(0, noise, count)
    return [Finished(float(a), float(b)) for a, b in zip(losses, scores, strict=True)]


def with_loss(
    number: int, levels: list[float], recipe: str, percent: float | None = None, **settings: Any
) -> Run:
    """Return a run with a loss curve of 40 steps, so far as `levels` go; with a score it is finished."""
    proposal = Proposal(
        "t", recipe, "explore", "r", (), None, {"name": recipe},
        {"seed": number, "model": {"name": "mgm-mini"}, **settings},
        Cost(1, 1, None, ""), "a test",
    )  # fmt: skip
    run = Run(f"{number:04d}-{recipe}", Plan("", proposal, "a", "", ""), "running")
    process, stage = run.stages["process"], run.stages["pretrain"]
    process.status, process.result = "succeeded", {"digest": recipe}
    stage.progress = {"step": len(levels), "total": 40}
    stage.losses = list(enumerate(levels, 1))
    if percent is not None:
        run.status = "succeeded"
        run.scores["textvqa"] = Score(
            "textvqa", "val", "accuracy", percent, percent, percent, 0.0, 9, "", "", ""
        )
    return run


def telling(count: int, recipe: str = "one", **settings: Any) -> list[Run]:
    """Return finished runs whose loss tells their scores: low for high scores."""
    return [
        with_loss(n, [4.0 - 0.1 * n] * 40, recipe, 20.0 + 2 * n, **settings) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("steps", "share"),
    [(1, None), (9, None), (10, 0.25), (19, 0.25), (20, 0.5), (30, 0.75), (40, 1.0)],
)
def test_a_run_is_judged_at_quarters_of_its_first_stage(steps: int, share: float | None) -> None:
    run = with_loss(99, [2.0] * steps, "one")
    assert share_reached(run) == share
    found = early_verdicts(run, telling(12))
    assert [one.share for one in found] == ([] if share is None else [share])


def test_the_app_is_told_a_chance_only_with_its_measured_rate() -> None:
    run = with_loss(99, [2.9] * 20, "one")
    (found,) = early_verdicts(run, telling(12))
    assert found.verdict.chance is not None
    assert found.verdict.chance > 0.8
    assert not found.is_mixed
    assert "TextVQA, loss at 50 % of stage 1: " in found.words()
    assert "of 12 finished runs" in found.words()
    assert "mixed" not in found.words()
    assert early_verdicts(run, telling(LEAST_RUNS - 1)) == ()


def test_runs_of_other_recipes_are_named_as_mixed_and_other_settings_do_not_count() -> None:
    run = with_loss(99, [2.9] * 20, "one")
    other = telling(10, "other")
    (mixed,) = early_verdicts(run, other)
    assert mixed.is_mixed
    assert "recipes mixed" in mixed.words()
    (own,) = early_verdicts(run, [*telling(9), *other])
    assert not own.is_mixed
    assert own.verdict.measured is not None
    assert own.verdict.measured.num_runs == 9
    assert early_verdicts(run, telling(12, pretrain={"max_steps": 9})) == ()
    assert early_verdicts(run, [with_loss(n, [2.0] * 20, "one") for n in range(12)]) == ()


def test_too_few_runs_give_no_verdict() -> None:
    verdict = early_verdict(_runs(LEAST_RUNS - 1, -5, 1), 1.0)
    assert verdict.chance is None
    assert "not enough runs" in verdict.words()
    with pytest.raises(ValueError, match=f"{LEAST_RUNS} runs"):
        hit_rate(_runs(3, -5, 1))


def test_a_telling_loss_is_found_and_its_verdict_has_its_hit_rate() -> None:
    runs = _runs(40, -5, 1)
    low, high = (early_verdict(runs, loss) for loss in (0.85, 1.15))
    assert low.chance is not None and high.chance is not None
    assert low.chance > 0.85
    assert high.chance < 0.15
    assert low.measured is not None
    assert low.measured.is_useful
    assert low.measured.rate > 0.8
    assert f"right for {low.measured.hits} of 40" in low.words()
    assert "coin" not in low.words()


def test_a_loss_that_says_nothing_is_called_no_better_than_a_coin() -> None:
    useful = 0
    for seed in range(40):
        measured = hit_rate(_runs(20, 0, 1, seed))
        useful += measured.is_useful
    assert useful <= 3
    verdict = early_verdict(_runs(20, 0, 1), 1.0)
    assert "do not stop" in verdict.words()


def test_the_judged_run_is_not_in_its_own_rule() -> None:
    """One run that alone makes a slope: seen by its own rule, it would always be a hit."""
    runs = [Finished(1.0, 50.0 + i % 2) for i in range(10)]
    outlier = [*runs, Finished(9.0, 90.0)]
    verdict = early_verdict(outlier, 9.0)
    assert verdict.chance is not None
    assert verdict.chance > 0.5
    alone = hit_rate(outlier)
    assert alone.hits < 11


def test_equal_scores_have_no_upper_half() -> None:
    assert early_verdict([Finished(float(i), 5.0) for i in range(10)], 3.0).chance is None


def test_wilson_matches_a_table() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_loss_is_read_just_before_the_share() -> None:
    stage = StageState("pretrain", losses=[(step, 2.0 - step / 100) for step in range(1, 101)])
    stage.progress = {"step": 100, "total": 100}
    assert loss_at(stage, 0.5) == pytest.approx(2.0 - 0.48)
    assert loss_at(stage, 1.0) == pytest.approx(2.0 - 0.98)


def test_a_stage_that_has_not_come_so_far_has_no_loss_there() -> None:
    stage = StageState("pretrain", losses=[(step, 1.0) for step in range(1, 31)])
    stage.progress = {"step": 30, "total": 100}
    assert loss_at(stage, 0.25) == 1.0
    assert loss_at(stage, 0.5) is None
    assert loss_at(StageState("pretrain"), 0.5) is None


def test_sparse_losses_are_read_from_the_last_one() -> None:
    stage = StageState("pretrain", losses=[(3, 1.5), (6, 1.0)])
    stage.progress = {"step": 6, "total": 6}
    assert loss_at(stage, 0.5) == 1.5
    assert loss_at(stage, 1.0) == 1.0


def test_cost_of_several_starts() -> None:
    assert Starts(1).cost(55, 36) == pytest.approx(1.0)
    assert Starts(3).cost(55, 36) == pytest.approx((3 * 55 + 36) / 91)
    assert Starts(4, keep=2, share=0.25).cost(60, 40) == pytest.approx((2 * 15 + 200) / 100)
    assert "2.21 times one run" in Starts(3).cost_words(55, 36)
    for wrong in ({"count": 2, "keep": 3}, {"count": 2, "share": 0.0}, {"count": 0, "keep": 0}):
        with pytest.raises(ValueError, match="keep 1 to count"):
            Starts(**wrong)


def test_effect_counts_every_choice_of_starts() -> None:
    runs = _runs(8, -5, 2)
    for starts in (Starts(3), Starts(4, keep=2)):
        kept = [
            np.mean([run.score for run in sorted(chosen, key=lambda r: r.loss)[: starts.keep]])
            for chosen in itertools.combinations(runs, starts.count)
        ]
        expected = np.mean(kept) - np.mean([run.score for run in runs])
        assert starts_effect([runs], starts).points == pytest.approx(expected)


def test_effect_of_a_telling_loss_is_positive_and_of_a_random_one_is_not_claimed() -> None:
    telling = starts_effect([_runs(10, -5, 1, seed) for seed in range(4)], Starts(3))
    assert telling.low > 0
    assert telling.spread_after < telling.spread_before
    blind = starts_effect([_runs(10, 0, 1, seed) for seed in range(4)], Starts(3))
    assert blind.low < 0 < blind.high
    assert "not a better recipe" in telling.words()
    with pytest.raises(ValueError, match="11 runs"):
        starts_effect([_runs(10, 0, 1)], Starts(11))


def test_the_benchmark_measures_the_recorded_seeds(tmp_path: Path) -> None:
    out = tmp_path / "early.md"
    subprocess.run(
        [sys.executable, "benchmarks/early_verdict.py", "--out", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    text = out.read_text("utf-8")
    records = (ROOT / "benchmarks/results/miniworld_seeds.jsonl").read_text("utf-8").splitlines()
    matching = [json.loads(line) for line in records if json.loads(line)["recipe"] == "matching"]
    hits = hit_rate([Finished(r["pretrain_loss"], r["TextVQA"]) for r in matching]).hits
    assert f"| matching, 10 | {hits} |" in text
    assert "| inside recipes, together, 70 |" in text


def test_equal_scores_are_no_hits_of_the_rule() -> None:
    """Seven of eight runs score the same: who always says `bottom` is right for seven."""
    runs = [Finished(2.0 + 0.01 * number, 0.0) for number in range(7)] + [Finished(2.1, 3.0)]
    measured = hit_rate(runs)
    assert (measured.hits, measured.usual, measured.is_useful) == (7, 0.875, False)
    assert "do not stop" in early_verdict(runs, 2.05).words()
    for count in (8, 9):
        apart = [Finished(2.0 - 0.1 * number, float(number)) for number in range(count)]
        assert hit_rate(apart).usual == 0.5
