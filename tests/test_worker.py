"""The worker with real processes: finish, fail, cancel, kill and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from synth_agent import journal, pipeline
from synth_agent.cli import main
from synth_agent.errors import Busy, Conflict, InvalidInput
from synth_agent.runs import Cost, Plan, Proposal, Run
from synth_agent.workspace import Workspace

PROGRAM = (sys.executable, str(Path(__file__).with_name("stage_programs.py")))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))


def approve(workspace: Workspace, parent: str | None = None) -> Plan:
    cost = Cost(8, None, None, "none")
    proposal = Proposal(
        "A run", "try", "explore", "why", (), parent, {"name": "r", "process": []}, {}, cost, "me"
    )
    return pipeline.approve(workspace, proposal, shown_sha256=proposal.sha256, approver="a person")


def wait_for(workspace: Workspace, run_id: str, ready: Callable[[Run], bool]) -> Run:
    deadline = time.monotonic() + 300
    while not ready(run := pipeline.load_run(workspace, run_id)):
        assert time.monotonic() < deadline, run
        time.sleep(0.05)
    return run


def ended(workspace: Workspace, run_id: str) -> Run:
    wait_for(workspace, run_id, lambda r: pipeline.live_run(workspace) is None)
    return pipeline.load_run(workspace, run_id)


def mode(workspace: Workspace, stage: str, how: str) -> None:
    workspace.artifacts.mkdir(exist_ok=True)
    (workspace.artifacts / f"mode-{stage}").write_text(how)


def test_runs_then_reuses_everything(git_workspace: Workspace) -> None:
    first = approve(git_workspace)
    pipeline.launch(git_workspace, first, program=PROGRAM)
    run = ended(git_workspace, first.run_id)
    assert (run.status, run.verdict, run.scores["textvqa"].percent) == (
        "succeeded",
        "baseline",
        50.0,
    )
    second = approve(git_workspace, parent=first.run_id)
    pipeline.launch(git_workspace, second, program=PROGRAM)
    run = ended(git_workspace, second.run_id)
    assert {stage.status for stage in run.stages.values()} == {"reused"}
    assert run.verdict == "inside noise"
    assert len(journal.history(git_workspace)) == 4
    assert journal.history(git_workspace)[0].trailers["TextVQA"] == "50.00"


def test_failed_stage_names_its_log(git_workspace: Workspace) -> None:
    mode(git_workspace, "pretrain", "fail")
    plan = approve(git_workspace)
    pipeline.launch(git_workspace, plan, program=PROGRAM)
    run = ended(git_workspace, plan.run_id)
    assert run.status == "failed"
    assert "disk of dreams" in run.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_resumes(git_workspace: Workspace, number: signal.Signals) -> None:
    mode(git_workspace, "pretrain", "hang")
    plan = approve(git_workspace)
    pid = pipeline.launch(git_workspace, plan, program=PROGRAM)
    wait_for(git_workspace, plan.run_id, lambda r: bool(r.stages["pretrain"].progress))
    os.kill(pid, number)
    run = ended(git_workspace, plan.run_id)
    assert run.status == ("cancelled" if number == signal.SIGTERM else "interrupted")
    mode(git_workspace, "pretrain", "")
    pipeline.resume(git_workspace, plan.run_id, program=PROGRAM)
    assert ended(git_workspace, plan.run_id).status == "succeeded"


def test_changed_proposal_and_edited_plan_are_refused(git_workspace: Workspace) -> None:
    plan = approve(git_workspace)
    with pytest.raises(Conflict):
        pipeline.approve(git_workspace, plan.proposal, shown_sha256="0" * 64, approver="x")
    path = git_workspace.run(plan.run_id).plan
    path.write_text(path.read_text().replace("title: A run", "title: B run"))
    with pytest.raises(InvalidInput):
        pipeline.launch(git_workspace, plan, program=PROGRAM)


def test_commit_leaves_the_users_changes_alone(git_workspace: Workspace) -> None:
    root = git_workspace.root
    (root / "staged").write_text("staged")
    subprocess.run(["git", "add", "staged"], cwd=root, check=True)
    (root / "synth.yaml").write_text("goal: dirty\n")
    (root / "loose").write_text("untracked")
    status = ["git", "status", "--porcelain"]
    before = subprocess.run(status, cwd=root, capture_output=True, check=True).stdout
    approve(git_workspace)
    assert subprocess.run(status, cwd=root, capture_output=True, check=True).stdout == before
    (root / ".git" / "index.lock").touch()
    approve(git_workspace)
    assert len(journal.pending(git_workspace)) == 1
    (root / ".git" / "index.lock").unlink()
    assert journal.catch_up(git_workspace)[0].made and not journal.pending(git_workspace)


def test_second_launch_is_busy_and_a_succeeded_run_is_not_resumed(
    git_workspace: Workspace,
) -> None:
    mode(git_workspace, "process", "hang")
    first, second = approve(git_workspace), approve(git_workspace)
    pipeline.launch(git_workspace, first, program=PROGRAM)
    with pytest.raises(Busy, match=first.run_id):
        pipeline.launch(git_workspace, second, program=PROGRAM)
    pipeline.cancel(git_workspace, first.run_id)
    assert ended(git_workspace, first.run_id).status == "cancelled"
    assert journal.history(git_workspace)[0].trailers["Verdict"] == "cancelled"
    mode(git_workspace, "process", "")
    pipeline.launch(git_workspace, second, program=PROGRAM)
    assert ended(git_workspace, second.run_id).status == "succeeded"
    with pytest.raises(Conflict):
        pipeline.resume(git_workspace, second.run_id, program=PROGRAM)
    assert json.loads(git_workspace.run(second.run_id).scores.read_text())["scores"]
    index = (git_workspace.runs / "README.md").read_text()
    assert index.index(second.run_id) < index.index(first.run_id)


def test_stage_that_outlived_a_killed_worker_is_ended(git_workspace: Workspace) -> None:
    mode(git_workspace, "process", "hang")
    first = approve(git_workspace)
    pid = pipeline.launch(git_workspace, first, program=PROGRAM)
    run = wait_for(git_workspace, first.run_id, lambda r: bool(r.stages["process"].progress))
    os.kill(pid, signal.SIGKILL)
    ended(git_workspace, first.run_id)
    survivor = run.stages["process"].pid
    assert survivor is not None and psutil.pid_exists(survivor)
    mode(git_workspace, "process", "")
    second = approve(git_workspace)
    pipeline.launch(git_workspace, second, program=PROGRAM)
    assert ended(git_workspace, second.run_id).status == "succeeded"
    assert not psutil.pid_exists(survivor) or psutil.Process(survivor).status() == "zombie"


def test_run_is_not_over_before_its_commit(git_workspace: Workspace) -> None:
    plan = approve(git_workspace)
    pipeline.launch(git_workspace, plan, program=PROGRAM)
    wait_for(git_workspace, plan.run_id, lambda r: r.status == "succeeded")
    assert journal.history(git_workspace)[0].trailers["Verdict"] == "baseline"


def test_a_run_whose_worker_was_killed_at_its_end_is_recorded_by_the_next(
    git_workspace: Workspace,
) -> None:
    first = approve(git_workspace)
    before = journal.history(git_workspace)[0].hash
    pipeline.launch(git_workspace, first, program=PROGRAM)
    ended(git_workspace, first.run_id)
    # As a worker leaves it that is killed between its last event and its record.
    subprocess.run(["git", "reset", "-q", before], cwd=git_workspace.root, check=True)
    paths = git_workspace.run(first.run_id)
    paths.summary.unlink()
    paths.scores.unlink()
    second = approve(git_workspace)
    pipeline.launch(git_workspace, second, program=PROGRAM)
    ended(git_workspace, second.run_id)
    assert json.loads(paths.scores.read_text())["scores"]
    assert paths.summary.is_file()
    verdicts = [
        c.trailers["Run"] for c in journal.history(git_workspace) if "Verdict" in c.trailers
    ]
    assert verdicts == [second.run_id, first.run_id]
    status = ["git", "status", "--porcelain"]
    shown = subprocess.run(status, cwd=git_workspace.root, check=True, capture_output=True)
    assert shown.stdout == b""


def test_parent_without_scores_gives_no_verdict(
    git_workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = approve(git_workspace)
    plan = approve(git_workspace, parent=parent.run_id)
    pipeline.launch(git_workspace, plan, program=PROGRAM)
    run = ended(git_workspace, plan.run_id)
    assert (run.status, run.verdict) == ("succeeded", None)
    assert parent.run_id in run.message
    assert main(["-w", str(git_workspace.root), "compare", parent.run_id, plan.run_id]) == 2
    assert "no score of the same benchmark" in capsys.readouterr().err


def test_a_run_that_nobody_started_is_not_waited_for(
    git_workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = approve(git_workspace)
    assert main(["-w", str(git_workspace.root), "watch", plan.run_id]) == 1
    assert f"was not started: start it with: synth-agent resume {plan.run_id}" in (
        capsys.readouterr().err
    )


def test_full_disk_is_named(git_workspace: Workspace) -> None:
    mode(git_workspace, "process", "full")
    plan = approve(git_workspace)
    pipeline.launch(git_workspace, plan, program=PROGRAM)
    run = ended(git_workspace, plan.run_id)
    assert run.error is not None and run.error["title"] == "Disk is full"
    assert "bytes are free" in run.error["message"]
