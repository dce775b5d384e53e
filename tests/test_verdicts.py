"""Verdicts on runs of a workspace: arms, tries, noise, and logs without the later fields."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synth_agent.errors import InvalidInput
from synth_agent.noise import SeedNoise
from synth_agent.pipeline import load_run, question_scores
from synth_agent.referee import detectable_difference, measure, shrink
from synth_agent.runs import Cost, EventLog, Plan, Proposal, dump_plan, now
from synth_agent.summary import write_summary
from synth_agent.verdicts import compare_runs
from synth_agent.workspace import Settings, Workspace

QUESTIONS = 200


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "synth.yaml").write_text("", "utf-8")
    return Workspace(tmp_path, Settings())


def _add(
    workspace: Workspace,
    number: int,
    share: float,
    *,
    seed: int = 0,
    samples: str = "base",
    parent: str | None = None,
    questions: int = QUESTIONS,
) -> str:
    """Write a finished run that answers `share` of the questions right, and return its id."""
    run_id = f"{number:04}-run"
    settings: dict[str, Any] = {"seed": seed, "model": {"name": "mgm-2b"}, "pretrain": {}}
    proposal = Proposal(
        title="A run", slug="run", kind="explore", reason="", evidence=(), parent=parent,
        recipe={"name": "run"}, settings=settings, cost=Cost(1, 1, 1.0, ""), proposed_by="test",
    )  # fmt: skip
    folder = workspace.run(run_id).root
    folder.mkdir(parents=True)
    plan = Plan(run_id, proposal, "me", now(), proposal.sha256)
    workspace.run(run_id).plan.write_text(dump_plan(plan), "utf-8")
    predictions = f"artifacts/predictions/{run_id}.jsonl"
    path = workspace.path(predictions)
    path.parent.mkdir(parents=True, exist_ok=True)
    right = np.random.default_rng(number).permutation(questions) < round(share * questions)
    lines = [json.dumps({"key": i, "score": float(v)}) for i, v in enumerate(right)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    score = {
        "benchmark": "textvqa", "split": "val", "metric": "accuracy",
        "percent": 100 * float(right.mean()), "low": 0.0, "high": 100.0, "chance": 0.0,
        "num_questions": questions, "predictions_sha256": "", "predictions": predictions,
        "scorer": "x",
    }  # fmt: skip
    events = EventLog(workspace.run(run_id).events)
    events.append("run_started", pid=1, host="h", worker_version="1", resumed=False)
    result = {"digest": samples, "kept": 9, "seed_samples": 9}
    events.append("stage_reused", stage="process", key=samples, output="o", result=result)
    events.append("score_recorded", score=score)
    events.append("run_finished", status="succeeded", verdict=None, message="", error=None)
    events.close()
    return run_id


def test_one_run_against_one_rests_on_an_assumed_spread(workspace: Workspace) -> None:
    base = _add(workspace, 1, 0.50)
    (one,) = compare_runs(workspace, base, _add(workspace, 2, 0.9, samples="a", parent=base))
    assert one.verdict == "better"
    assert one.difference == pytest.approx(40)
    assert (one.seeds, one.parent_seeds, one.tries, one.assumed) == (1, 1, 1, True)
    assert one.expected is not None
    assert 30 < one.expected < 40
    assert "assumed from" in one.basis
    assert "1 seed tells" in one.power


def test_replicates_are_seeds_of_their_arm_and_tell_the_spread(workspace: Workspace) -> None:
    base = _add(workspace, 1, 0.50)
    for number, (seed, share) in enumerate([(1, 0.40), (2, 0.60), (3, 0.45), (4, 0.55)], 2):
        _add(workspace, number, share, seed=seed, parent=base)
    _add(workspace, 6, 0.52, samples="a", parent=base)
    (one,) = compare_runs(
        workspace, base, _add(workspace, 7, 0.62, seed=1, samples="a", parent=base)
    )
    assert (one.seeds, one.parent_seeds) == (2, 5)
    assert one.difference == pytest.approx(57 - 50)
    assert not one.assumed
    assert one.seed_sd == pytest.approx(np.sqrt((250 + 50) / 5))
    assert one.verdict == "inside noise"


def test_what_so_many_seeds_tell_does_not_count_their_own_scatter_twice(
    workspace: Workspace,
) -> None:
    base = _add(workspace, 1, 0.48)
    for number, share in ((2, 0.50), (3, 0.52)):
        _add(workspace, number, share, seed=number, parent=base)
    for number, share in ((4, 0.50), (5, 0.52)):
        _add(workspace, number, share, seed=number, samples="a", parent=base)
    (one,) = compare_runs(
        workspace, base, _add(workspace, 6, 0.54, seed=6, samples="a", parent=base)
    )
    assert (one.seeds, one.parent_seeds, one.seed_sd) == (3, 3, pytest.approx(2.0))
    # Four degrees of freedom are all that there is: none is left for a spread from elsewhere.
    assert one.question_sd is not None
    told = detectable_difference(3, 2.0, one.question_sd, tries=one.tries, degrees=0)
    assert one.power.startswith(f"3 seeds tell {told:.1f} points apart")
    assert told > detectable_difference(3, 2.0, one.question_sd, tries=one.tries, degrees=4)


def test_tries_against_one_parent_are_counted_and_replicates_of_it_are_not(
    workspace: Workspace,
) -> None:
    base = _add(workspace, 1, 0.50)
    _add(workspace, 2, 0.51, seed=1, parent=base)
    first = _add(workspace, 3, 0.6, samples="a", parent=base)
    second = _add(workspace, 4, 0.6, samples="b", parent=base)
    later = {run: compare_runs(workspace, base, run)[0] for run in (first, second)}
    assert [one.tries for one in later.values()] == [1, 2]
    widths = [one.high - one.low for one in later.values()]
    assert widths[1] > widths[0]


def test_what_to_expect_goes_by_all_seeds_of_the_other_candidates(workspace: Workspace) -> None:
    base = _add(workspace, 1, 0.50)
    seeds = [(2, 0.80), (3, 0.50)]
    for number, share in seeds:
        _add(workspace, number, share, seed=number, samples="a", parent=base)
    mine = _add(workspace, 4, 0.52, samples="b", parent=base)
    (one,) = compare_runs(workspace, base, mine)
    arms = [
        [
            question_scores(workspace.path(f"artifacts/predictions/{number:04}-run.jsonl"))
            for number in arm
        ]
        for arm in ([1], [2, 3], [4])
    ]
    assert one.seed_sd is not None
    noise = SeedNoise(one.seed_sd, 5, 0.0, True, "")
    rival, found = (measure(arm, arms[0], noise) for arm in arms[1:])
    own = [found.own_variance, rival.own_variance]
    together = shrink([found.points, rival.points], own, found.parent_variance)
    assert one.expected == pytest.approx(together[0])


def test_a_recipe_that_keeps_the_same_samples_is_a_replicate_of_its_parent(
    workspace: Workspace,
) -> None:
    base = _add(workspace, 1, 0.50)
    (one,) = compare_runs(workspace, base, _add(workspace, 2, 0.50, parent=base))
    assert one.verdict == "inside noise"
    assert (one.seeds, one.parent_seeds) == (1, 1)


def test_other_questions_are_not_compared_nor_counted(workspace: Workspace) -> None:
    base = _add(workspace, 1, 0.50)
    _add(workspace, 2, 0.9, seed=1, parent=base, questions=50)
    child = _add(workspace, 3, 0.6, samples="a", parent=base)
    assert compare_runs(workspace, base, child)[0].parent_seeds == 1
    other = _add(workspace, 4, 0.6, samples="b", parent=base, questions=50)
    with pytest.raises(InvalidInput, match="not comparable"):
        compare_runs(workspace, base, other)


def test_a_replicate_without_predictions_is_left_out(workspace: Workspace) -> None:
    base = _add(workspace, 1, 0.50)
    gone = _add(workspace, 2, 0.52, seed=1, parent=base)
    workspace.path(f"artifacts/predictions/{gone}.jsonl").unlink()
    child = _add(workspace, 3, 0.6, samples="a", parent=base)
    assert compare_runs(workspace, base, child)[0].parent_seeds == 1


def test_logs_without_the_later_fields_are_read_and_say_what_their_interval_covers(
    workspace: Workspace,
) -> None:
    run_id = _add(workspace, 1, 0.50)
    old = {
        "benchmark": "textvqa", "parent": "0000-base", "difference": 3.0, "low": 1.0, "high": 5.0,
        "num_questions": 9, "verdict": "better",
    }  # fmt: skip
    events = EventLog(workspace.run(run_id).events)
    events.append("compared", comparison=old)
    events.close()
    run = load_run(workspace, run_id)
    assert run.comparisons["textvqa"].expected is None
    assert "not the training seed" in write_summary(workspace, run).read_text("utf-8")
