"""Standing rules cover what they say, count what was measured, and end."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from synth_agent import gate, journal, pipeline, rules
from synth_agent.errors import Conflict, InvalidInput
from synth_agent.runs import Event, EventLog, Plan, gpu_seconds
from synth_agent.workspace import Workspace, open_workspace
from tests.gate_world import fill_settings, flip, recipe_proposal


@pytest.fixture
def world(git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    fill_settings(git_workspace)
    monkeypatch.setattr(gate, "code_version", lambda digests, stage: f"code of {stage}")
    return git_workspace


def add(world: Workspace, kind: Any = "filters", **given: Any) -> rules.Rule:
    values: dict[str, Any] = {"gpu_hours": 2.0, "max_runs": 3, "by": "ada"}
    return rules.add(world, kind=kind, **{**values, **given})


def approved(world: Workspace, name: str = "short") -> Plan:
    proposal = recipe_proposal(world, name)
    return pipeline.approve(world, proposal, shown_sha256=proposal.sha256, approver="ada")


def spend(world: Workspace, run_id: str, hours: float, status: str = "succeeded") -> None:
    """Write the events of a run whose training took so long."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = [start, start, start + timedelta(hours=hours), start + timedelta(hours=hours)]
    lines = [
        Event(times[0].isoformat(), "run_started", {"resumed": False}),
        Event(times[1].isoformat(), "stage_started", {"stage": "finetune"}),
        Event(times[2].isoformat(), "stage_finished", {"stage": "finetune", "status": status}),
        Event(times[3].isoformat(), "run_finished", {"status": status}),
    ]
    world.run(run_id).events.write_text("".join(event.line() for event in lines))


def refusals(world: Workspace, name: str, **fields: Any) -> str:
    return "; ".join(rules.find_rule(world, recipe_proposal(world, name, **fields))[1])


def test_filters_only(world: Workspace) -> None:
    rule = add(world)
    state, reasons = rules.find_rule(world, recipe_proposal(world, "short", seed=7))
    assert state is not None and (state.id, reasons) == (rule.id, ())
    assert "whitespace_normalization_mapper is not a reviewed filter (mapper)" in refusals(
        world, "clean"
    )
    proposal = recipe_proposal(world, "short")
    for operator in ("llm_quality_score_filter", "no_such_filter"):
        recipe = {"name": "short", "process": [{operator: {}}]}
        _, reasons = rules.find_rule(world, replace(proposal, recipe=recipe))
        assert f"{operator} is not a reviewed filter" in reasons[0]


def test_what_a_person_rejected_is_covered_by_later_rules_only(world: Workspace) -> None:
    add(world)
    assert not refusals(world, "short")
    pipeline.reject(world, recipe_proposal(world, "short"), reason="wrong captions", by="ada")
    assert "r1: ada rejected it (0001-short): wrong captions" in refusals(world, "short", seed=7)
    with pytest.raises(Conflict, match="wrong captions"):
        rules.approve_under(world, "r1", recipe_proposal(world, "short", seed=7))
    assert not refusals(world, "words")
    rule = add(world)
    state, _ = rules.find_rule(world, recipe_proposal(world, "short"))
    assert state is not None and state.id == rule.id


def test_recipe_by_name_and_content(world: Workspace) -> None:
    add(world, "recipes", recipes=["clean"])
    assert not refusals(world, "clean")
    assert "'short' is not one of the rule's" in refusals(world, "short")
    path = world.recipes / "clean.yaml"
    path.write_text(path.read_text().replace("min_len: 3", "min_len: 4"))
    assert "'clean' is not as it was when the rule was made" in refusals(world, "clean")


def test_replicates_of_an_approved_run_on_the_same_inputs(world: Workspace) -> None:
    plan = approved(world)
    add(world, "replicates", run=plan.run_id)
    assert not refusals(world, "short", seed=7)
    assert "is not one of the rule's" in refusals(world, "words")
    other = recipe_proposal(world, "short")
    changed = {**other.settings, "finetune": {**other.settings["finetune"], "epochs": 9}}
    _, reasons = rules.find_rule(world, replace(other, settings=changed))
    assert "settings are not those" in reasons[0]
    flip(world.path(other.settings["data"]["instructions"]))
    assert f"not what {plan.run_id} ran on: data.instruction" in refusals(world, "short")
    with pytest.raises(Conflict, match=r"changed since: data\.instruction"):
        add(world, "replicates", run=plan.run_id)


def test_settings_of_the_workspace_are_bound(world: Workspace) -> None:
    add(world)
    world.settings_file.write_text("goal: test\npretrain: {epochs: 3}\n")
    later = open_workspace(world.root)
    assert "settings are not those" in refusals(later, "short")


def test_approval_names_the_rule_and_is_capped_by_what_is_left(world: Workspace) -> None:
    rule = add(world)
    first = rules.approve_under(world, rule.id, recipe_proposal(world, "short"))
    assert first.approver == f"rule {rule.id} of ada"
    assert first.proposal.limits.gpu_hours == 2.0
    assert journal.history(world)[0].trailers["Approver"] == first.approver
    [state] = rules.standing(world)
    assert (state.gpu_hours, state.problem) == (2.0, "its 2 GPU-hours are used up")
    spend(world, first.run_id, 0.5)
    [state] = rules.standing(world)
    assert (state.gpu_hours, state.hours_left, state.problem) == (0.5, 1.5, "")
    assert state.words().endswith("by ada; used 1 runs, 0.5 GPU-hours; stands")
    assert json.loads(json.dumps(state.data()))["rule"]["gpu_hours"] == 2.0
    second = rules.approve_under(world, rule.id, recipe_proposal(world, "words"), most_hours=0.25)
    assert second.proposal.limits.gpu_hours == 0.25
    assert "it needs about 3 h, 1.2 h are left" in refusals(world, "words", seconds=3 * 3600)
    spend(world, second.run_id, 1.5)
    with pytest.raises(Conflict, match="GPU-hours are used up"):
        rules.approve_under(world, rule.id, recipe_proposal(world, "words"))


def test_number_of_runs_is_counted_and_ids_are_never_used_again(world: Workspace) -> None:
    rule = add(world, max_runs=1)
    plan = rules.approve_under(world, rule.id, recipe_proposal(world, "short"))
    spend(world, plan.run_id, 0.1)
    assert "its 1 runs are used up" in refusals(world, "words")
    rules.rules_file(world).unlink()
    assert add(world).id == "r2"


def test_revoked_and_expired(world: Workspace) -> None:
    rule = add(world, days=2)
    later = datetime.now(UTC) + timedelta(days=2)
    assert "expired" in rules.standing(world, at=later)[0].problem
    assert rules.standing(world)[0].problem == ""
    rules.revoke(world, rule.id, by="grace")
    assert "revoked by grace" in refusals(world, "short")
    with pytest.raises(Conflict, match="revoked by grace"):
        rules.approve_under(world, rule.id, recipe_proposal(world, "short"))
    subjects = [line.split(" ", 1)[1] for line in journal.log(world, 2)]
    assert subjects == ["rules: r1 revoked", "rules: r1 added"]
    with pytest.raises(InvalidInput, match="r9"):
        rules.revoke(world, "r9", by="ada")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_hours", 200.0),
        ("max_runs", 99),
        ("expires", "2999-01-01T00:00:00.000+00:00"),
        ("by", "grace"),
        ("kind", "recipes"),
        ("recipes", {"clean": "0" * 64}),
        ("id", "r7"),
        ("extra", 1),
        ("sha256", "0" * 64),
    ],
)
def test_edited_rule_is_void(world: Workspace, name: str, value: Any) -> None:
    rule = add(world)
    path = rules.rules_file(world)
    raw = yaml.safe_load(path.read_text())
    raw["rules"][0][name] = value
    path.write_text(yaml.safe_dump(raw))
    [state] = rules.standing(world)
    assert state.problem == "void: it was not written by `synth-agent rules`"
    with pytest.raises(Conflict):
        rules.approve_under(world, str(raw["rules"][0]["id"]), recipe_proposal(world, "short"))
    second = add(world)
    assert second.id != rule.id
    assert [bool(s.problem) for s in rules.standing(world)] == [True, False]


def test_doubled_and_unreadable_rules(world: Workspace) -> None:
    add(world)
    path = rules.rules_file(world)
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({"rules": raw["rules"] * 2}))
    assert {s.problem for s in rules.standing(world)} == {"void: its id occurs twice"}
    path.write_text("rules: 7")
    with pytest.raises(InvalidInput, match="Rules cannot be read"):
        rules.standing(world)


@pytest.mark.parametrize(
    "given",
    [
        {"gpu_hours": 0},
        {"gpu_hours": float("inf")},
        {"max_runs": 0},
        {"days": -1},
        {"days": 1e12},
        {"by": " "},
        {"by": "rule r1 of ada"},
        {"kind": "anything"},
        {"kind": "recipes"},
        {"kind": "recipes", "recipes": ["no-such"]},
        {"kind": "replicates"},
        {"kind": "replicates", "run": "0404-none"},
        {"kind": "filters", "recipes": ["short"]},
    ],
)
def test_bad_rules_are_refused(world: Workspace, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        add(world, **given)
    assert not rules.rules_file(world).exists()


def test_damaged_run_stops_the_counting(world: Workspace) -> None:
    rule = add(world)
    plan = rules.approve_under(world, rule.id, recipe_proposal(world, "short"))
    flip(world.run(plan.run_id).plan)
    with pytest.raises(InvalidInput, match="changed after approval"):
        rules.approve_under(world, rule.id, recipe_proposal(world, "words"))


def test_time_is_summed_over_resumes_and_crashes(world: Workspace) -> None:
    plan = approved(world)
    log = EventLog(world.run(plan.run_id).events)
    log.append("run_started")
    log.close()
    assert pipeline.gpu_seconds_of(world, plan.run_id) == 0
    moments = [
        (0, "run_started", {}),
        (1, "stage_started", {"stage": "process"}),
        (100, "stage_finished", {"stage": "process"}),
        (100, "stage_started", {"stage": "pretrain"}),
        (110, "progress", {"stage": "pretrain"}),
        (500, "run_started", {}),
        (501, "stage_started", {"stage": "pretrain"}),
        (506, "stage_finished", {"stage": "pretrain"}),
        (510, "stage_started", {"stage": "evaluate"}),
        (511, "stage_started", {"stage": "evaluate"}),
        (513, "progress", {"stage": "evaluate"}),
    ]
    start = datetime(2026, 1, 1, tzinfo=UTC)
    events = [Event((start + timedelta(seconds=s)).isoformat(), k, f) for s, k, f in moments]
    assert gpu_seconds(events) == 10 + 5 + 3
