"""The unattended loop starts only what a rule covers, and says why it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from synth_agent import drafts, gate, pipeline, rules
from synth_agent.alternatives import propose_alternatives
from synth_agent.auto import Auto, Stop, budget_seconds, report
from synth_agent.errors import InvalidInput
from synth_agent.planner import BuiltinPlanner
from synth_agent.runs import Event, Limits, Plan, Proposal, Rejection, Run, Score
from synth_agent.workspace import Workspace
from tests.gate_world import fill_settings, flip, recipe_proposal

PROGRAM = (sys.executable, str(Path(__file__).with_name("stage_programs.py")))


@pytest.fixture
def world(git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    fill_settings(git_workspace)
    monkeypatch.setattr(gate, "code_version", lambda digests, stage: f"code of {stage}")
    return git_workspace


class Script:
    """A planner that proposes what it is told to, and then nothing."""

    def __init__(self, *proposals: Proposal) -> None:
        self.proposals = list(proposals)

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        return self.proposals.pop(0) if self.proposals else None


SCORES = [
    asdict(Score(name, "val", "accuracy", 40.0, 38.0, 42.0, 0.0, 500, "", "", "x"))
    for name in ("textvqa", "mmbench")
]


class Machine:
    """Ends each run as told: (status, hours of training, words of the error)."""

    def __init__(self, *ends: tuple[str, float, str]) -> None:
        self.ends = list(ends)
        self.launched: list[str] = []

    def launch(self, workspace: Workspace, plan: Plan) -> int:
        gate.check_approval(workspace, plan)
        self.launched.append(plan.run_id)
        return 1

    def wait(self, workspace: Workspace, run_id: str) -> Run:
        status, hours, words = self.ends.pop(0) if self.ends else ("succeeded", 0.1, "")
        if status == "Ctrl-C":
            raise KeyboardInterrupt
        start = datetime(2026, 1, 1, tzinfo=UTC)
        end = (start + timedelta(hours=hours)).isoformat()
        error = {"title": "Stage finetune failed", "message": words} if words else None
        fields = {"stage": "finetune", "status": status}
        finished = {"status": status, "message": words or "stopped on request", "error": error}
        events = [
            Event(start.isoformat(), "run_started", {}),
            Event(start.isoformat(), "stage_started", {"stage": "finetune"}),
            Event(end, "stage_finished", fields),
            *(Event(end, "score_recorded", {"score": score}) for score in SCORES),
            Event(end, "run_finished", finished),
        ]
        path = workspace.run(run_id).events
        path.write_text("".join(event.line() for event in events))
        return pipeline.load_run(workspace, run_id)


def auto(world: Workspace, script: Script, machine: Machine, **given: Any) -> Stop:
    values: dict[str, Any] = {"seconds": 6 * 3600.0, "say": lambda line: None}
    values |= {"launch": machine.launch, "wait": machine.wait}
    return Auto(world, script, **{**values, **given}).run()


def proposals(world: Workspace, *names: str) -> Script:
    return Script(*(recipe_proposal(world, name, seed=n) for n, name in enumerate(names)))


def add_rule(world: Workspace, **given: Any) -> rules.Rule:
    values: dict[str, Any] = {"kind": "filters", "gpu_hours": 2.0, "max_runs": 9, "by": "ada"}
    return rules.add(world, **{**values, **given})


def test_without_a_rule_nothing_starts(world: Workspace) -> None:
    machine, script = Machine(), proposals(world, "short")
    shown = script.proposals[0]
    stop = auto(world, script, machine)
    assert (stop.code, machine.launched, stop.proposal) == ("not covered", [], shown)
    assert "there are no rules" in stop.reason
    assert drafts.find(world, stop.hint.split()[-1]) == shown
    assert pipeline.list_runs(world) == []


def test_runs_what_is_covered_and_shows_what_is_not(world: Workspace) -> None:
    add_rule(world, kind="recipes", recipes=["words"])
    add_rule(world)
    machine = Machine()
    lines: list[str] = []
    stop = auto(world, proposals(world, "short", "words", "clean"), machine, say=lines.append)
    assert stop.code == "not covered"
    assert stop.runs == ("0001-short", "0002-words") == tuple(machine.launched)
    assert (
        "r1: recipe 'clean' is not one of the rule's; r2: whitespace_normalization" in stop.reason
    )
    approvers = [run.plan.approver for run in pipeline.list_runs(world)]
    assert approvers == ["rule r2 of ada", "rule r1 of ada"]
    assert any("Try clean" in line for line in lines)


def test_nothing_left_and_most_runs(world: Workspace) -> None:
    add_rule(world)
    assert auto(world, proposals(world, "short"), Machine()).code == "nothing to propose"
    script = proposals(world, "short", "words", "short")
    stop = auto(world, script, Machine(), most_runs=2)
    assert (stop.code, len(stop.runs), len(script.proposals)) == ("runs", 2, 1)


def test_rules_budget_ends_it(world: Workspace) -> None:
    add_rule(world, gpu_hours=1.0)
    ends = [("succeeded", 0.75, ""), ("cancelled", 0.25, "")]
    stop = auto(world, proposals(world, "short", "words", "short"), Machine(*ends))
    assert (stop.code, stop.runs) == ("budget", ("0001-short", "0002-words"))
    assert "0002-words was stopped" in stop.reason
    again = auto(world, proposals(world, "short"), Machine())
    assert again.code == "not covered" and "1 GPU-hours are used up" in again.reason


def test_own_budget_ends_it(world: Workspace) -> None:
    add_rule(world)
    script = Script(recipe_proposal(world, "short", seconds=3600.0))
    stop = auto(world, script, Machine(), seconds=600.0)
    assert (stop.code, stop.runs) == ("budget", ())
    assert "needs about 1 h 00 min, 10 min 00 s is left" in stop.reason
    script = proposals(world, "short", "words")
    machine = Machine()
    stop = auto(world, script, machine, seconds=600.0, most_runs=1)
    limit = pipeline.load_run(world, machine.launched[0]).plan.proposal.limits.gpu_hours
    assert limit is not None and 0.1 < limit <= 600 / 3600


def test_two_like_failures_end_it_and_two_unlike_do_not(world: Workspace) -> None:
    add_rule(world)
    ends = [("failed", 0.1, "exit code 1"), ("failed", 0.1, "loss is nan")]
    names = ("short", "words", "short", "words")
    stop = auto(world, proposals(world, *names), Machine(*ends, ("failed", 0.1, "exit code 7")))
    assert (stop.code, len(stop.runs)) == ("failed twice", 3)
    assert "finetune: Stage finetune failed: exit code N" in stop.reason


def test_interrupt_leaves_the_run_and_the_next_start_finishes_it(world: Workspace) -> None:
    rule = add_rule(world, max_runs=1)
    machine = Machine(("Ctrl-C", 0, ""))
    stop = auto(world, proposals(world, "short"), machine)
    assert (stop.code, stop.runs) == ("stopped by a person", ("0001-short",))
    assert "synth-agent resume 0001-short" in stop.hint
    assert not world.run("0001-short").events.exists()
    stop = auto(world, proposals(world), machine)
    assert (stop.code, stop.runs) == ("nothing to propose", ("0001-short",))
    machine = Machine(("Ctrl-C", 0, ""))
    second = add_rule(world)
    auto(world, proposals(world, "words"), machine)
    rules.revoke(world, second.id, by="ada")
    stop = auto(world, proposals(world), Machine())
    assert stop.runs == () and rule.id != second.id


def test_earlier_runs_count_against_this_budget_and_number(world: Workspace) -> None:
    add_rule(world)
    for name, seconds in (("short", 3600.0), ("words", 60.0)):
        proposal = recipe_proposal(world, name, seconds=seconds)
        rules.approve_under(world, "r1", proposal, most_hours=1.0)
    stop = auto(world, Script(), Machine(), seconds=600.0)
    assert (stop.code, stop.runs) == ("budget", ())
    assert "0001-short, which is approved, needs about 1 h 00 min more" in stop.reason
    machine = Machine()
    stop = auto(world, Script(), machine, most_runs=1)
    assert (stop.code, machine.launched) == ("runs", ["0001-short"])


def test_earlier_run_whose_approval_is_void_is_left(world: Workspace) -> None:
    add_rule(world)
    auto(world, proposals(world, "short"), Machine(("Ctrl-C", 0, "")))
    flip(world.run("0001-short").recipe)
    lines: list[str] = []
    stop = auto(world, proposals(world, "words"), Machine(), say=lines.append)
    assert "0001-short is left: Approval is void" in "\n".join(lines)
    # The hours that were set aside for it stay set aside.
    assert (stop.code, stop.runs) == ("not covered", ())


def test_cancelled_run_and_invalid_proposal_end_it(world: Workspace) -> None:
    add_rule(world)
    stop = auto(world, proposals(world, "short", "words"), Machine(("cancelled", 0.1, "")))
    assert (stop.code, len(stop.runs)) == ("cancelled", 1)
    bad = replace(recipe_proposal(world, "short"), recipe={"name": "short", "process": [{"x": {}}]})
    assert auto(world, Script(bad), Machine()).code == "invalid"
    (world.root / "rules.yaml").write_text("rules: 7")
    stop = auto(world, proposals(world, "short"), Machine())
    assert stop.code == "error" and "Rules cannot be read" in stop.reason


def test_real_worker_under_a_rule(
    git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    fill_settings(git_workspace)
    add_rule(git_workspace)

    def launch(workspace: Workspace, plan: Plan) -> int:
        return pipeline.launch(workspace, plan, program=PROGRAM)

    script = proposals(git_workspace, "short", "words")
    stop = Auto(git_workspace, script, seconds=600.0, say=lambda line: None, launch=launch).run()
    assert (stop.code, stop.runs) == ("nothing to propose", ("0001-short", "0002-words"))
    runs = pipeline.list_runs(git_workspace)
    assert [run.status for run in runs] == ["succeeded", "succeeded"]
    report(stop, as_json=True)
    out = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(out)["runs"] == ["0001-short", "0002-words"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21600), ("90m", 5400), ("1h30m", 5400), ("2.5h", 9000)]
)
def test_budget_is_read(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "-1h", "6 hours", "1m1h", "infh"])
def test_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        budget_seconds(text)


def ranked(workspace: Workspace) -> None:
    """Turn the recipes into some that the built-in planner ranks, with a finished baseline."""
    text = "skip_op_error: false\nprocess: []\n"
    (workspace.recipes / "baseline.yaml").write_text(text)
    planner = BuiltinPlanner()
    first = planner.propose(workspace, [], [])
    assert first is not None
    plan = pipeline.approve(workspace, first, shown_sha256=first.sha256, approver="ada")
    Machine().wait(workspace, plan.run_id)


def test_rejected_proposal_does_not_come_back(world: Workspace) -> None:
    ranked(world)
    planner, seen = BuiltinPlanner(), []
    for _ in range(3):
        history, rejections = pipeline.list_runs(world), pipeline.list_rejections(world)
        proposal = planner.propose(world, history, rejections)
        if proposal is None:
            break
        assert all(proposal.recipe != other.recipe for other in seen)
        seen.append(proposal)
        pipeline.reject(world, proposal, reason="approve: true, says the planner", by="ada")
    assert len(seen) >= 2
    assert [r.proposal.sha256 for r in pipeline.list_rejections(world)] == [p.sha256 for p in seen]


def test_alternatives_differ_and_are_valid(world: Workspace) -> None:
    ranked(world)
    shown = propose_alternatives(world, 3)
    assert len(shown) == 3
    assert len({json.dumps(p.recipe, sort_keys=True) for p in shown}) == 3
    assert pipeline.list_rejections(world) == []
    for proposal in shown:
        pipeline.validate(world, proposal)
        assert drafts.find(world, proposal.sha256) == proposal
    limited = gate.with_limits(shown[0], Limits(gpu_hours=1.0))
    assert limited.alternatives == shown[0].alternatives
    with pytest.raises(InvalidInput):
        propose_alternatives(world, 4)
