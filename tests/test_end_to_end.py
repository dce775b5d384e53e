"""The whole loop for real, on a small mini world: Data-Juicer, both stages, both benchmarks, git."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import git
import pytest
import yaml

from synth_agent import headless, pipeline
from synth_agent.demo import prepare_demo
from synth_agent.miniworld import write_world
from synth_agent.planner import BuiltinPlanner
from synth_agent.runs import Proposal, Run
from synth_agent.workspace import Workspace, open_workspace

PATIENCE_SECONDS = 600


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A demo workspace with little data and few steps."""
    root = tmp_path_factory.mktemp("end") / "demo"
    data = root.parent / "data"
    small = {"num_seed_samples": 48, "num_instructions": 12, "num_textvqa": 8, "num_mmbench": 6}
    write_world(data, seed=5, **small)
    prepare_demo(root, lambda line: None, data=data)
    path = root / "synth.yaml"
    settings = yaml.safe_load(path.read_text())
    for stage, steps in (("pretrain", 20), ("finetune", 4)):
        settings[stage] |= {"max_steps": steps, "save_steps": 2, "logging_steps": 1}
    path.write_text(yaml.safe_dump(settings))
    return open_workspace(root)


def run(workspace: Workspace, proposal: Proposal) -> Run:
    pipeline.validate(workspace, proposal)
    plan = pipeline.approve(workspace, proposal, shown_sha256=proposal.sha256, approver="a test")
    pipeline.launch(workspace, plan)
    return headless.follow(workspace, plan.run_id)


@pytest.fixture(scope="module")
def history(workspace: Workspace) -> list[Run]:
    """The baseline and the best recipe by evidence, run."""
    runs: list[Run] = []
    for _ in range(2):
        proposal = BuiltinPlanner().propose(workspace, runs, ())
        assert proposal is not None
        runs.append(run(workspace, proposal))
    return runs


def test_both_runs_end_with_scores_and_a_verdict(history: list[Run]) -> None:
    baseline, recipe = history
    assert [run.status for run in history] == ["succeeded", "succeeded"]
    assert baseline.verdict == "baseline"
    assert recipe.verdict in ("better", "worse", "inside noise", "mixed")
    assert set(recipe.scores) == {"textvqa", "mmbench"} == set(recipe.comparisons)
    for score in recipe.scores.values():
        assert score.low <= score.percent <= score.high
        assert score.num_questions > 0
    assert recipe.stages["process"].result["kept"] < 48


def test_git_holds_two_commits_a_run(workspace: Workspace, history: list[Run]) -> None:
    repository = git.Repo(workspace.root)
    messages = [str(commit.message) for commit in repository.iter_commits()]
    for finished in history:
        assert sum(f"Run: {finished.id}" in message for message in messages) == 2
    assert not repository.git.status("--porcelain", "runs")
    committed = repository.git.ls_files(f"runs/{history[1].id}").split()
    assert {Path(name).name for name in committed} >= {
        "proposal.yaml",
        "plan.yaml",
        "recipe.yaml",
        "events.jsonl",
        "environment.json",
        "scores.json",
        "summary.md",
    }


def test_the_same_plan_again_computes_nothing(workspace: Workspace, history: list[Run]) -> None:
    again = run(workspace, history[0].plan.proposal)
    assert {stage.status for stage in again.stages.values()} == {"reused"}
    assert again.scores["textvqa"].percent == history[0].scores["textvqa"].percent


def test_a_killed_worker_is_resumed_to_the_same_result(
    workspace: Workspace, history: list[Run]
) -> None:
    proposal = replace(
        history[0].plan.proposal,
        title="killed",
        settings={**history[0].plan.proposal.settings, "seed": 7},
    )
    plan = pipeline.approve(workspace, proposal, shown_sha256=proposal.sha256, approver="a test")
    worker = pipeline.launch(workspace, plan)
    wait_for_steps(workspace, plan.run_id, 3)
    os.kill(worker, signal.SIGKILL)
    wait_for_status(workspace, plan.run_id, "interrupted")
    pipeline.resume(workspace, plan.run_id)
    resumed = headless.follow(workspace, plan.run_id)
    assert resumed.status == "succeeded"
    kept = weights_of(workspace, resumed)
    assert undisturbed_weights(workspace, resumed) == kept


def wait_for_steps(workspace: Workspace, run_id: str, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        stage = pipeline.load_run(workspace, run_id).stages["pretrain"]
        if stage.progress.get("unit") == "steps" and stage.progress.get("step", 0) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("pretraining did not get under way")


def wait_for_status(workspace: Workspace, run_id: str, status: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pipeline.load_run(workspace, run_id).status != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights_of(workspace: Workspace, finished: Run) -> tuple[bytes, ...]:
    """Return the bytes of what was trained and answered."""
    outputs = {name: stage.output for name, stage in finished.stages.items()}
    adapter = workspace.root / str(outputs["finetune"]) / "adapter_model.safetensors"
    answers = workspace.root / str(outputs["evaluate"]) / "textvqa" / "predictions.jsonl"
    return adapter.read_bytes(), answers.read_bytes()


def undisturbed_weights(workspace: Workspace, finished: Run) -> tuple[bytes, ...]:
    """Compute the same plan again from nothing, with the killed run's artifacts put aside."""
    artifacts = workspace.artifacts
    for kind in ("checkpoints", "predictions"):
        (artifacts / kind).rename(artifacts / f"{kind}-aside")
    again = run(workspace, finished.plan.proposal)
    assert again.stages["pretrain"].status == "succeeded"
    return weights_of(workspace, again)


def test_a_corrupt_picture_fails_the_run_and_is_named(
    workspace: Workspace, history: list[Run]
) -> None:
    picture = workspace.root / "data" / "seed" / "images" / "000003.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    try:
        failed = run(workspace, history[0].plan.proposal)
    finally:
        picture.write_bytes(whole)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "000003" in failed.error["message"]
    assert failed.error["hint"]
    assert json.loads(json.dumps(headless.run_data(failed)))["status"] == "failed"
