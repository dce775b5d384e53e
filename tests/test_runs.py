"""Plans survive their files, and the event log survives a crash."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.runs import (
    Cost,
    EventLog,
    EventTail,
    Plan,
    Proposal,
    dump_plan,
    fold,
    load_plan,
    parse_events,
)


@pytest.fixture
def plan() -> Plan:
    settings = {"seed": 1, "pretrain": {"learning_rate": 1e-5}}
    recipe = {"name": "r", "process": [{"f": {"min_score": 0.25}}]}
    cost = Cost(8, 6, 2.5, "measured")
    proposal = Proposal(
        "T", "t", "explore", "é: why", ("0001-a",), None, recipe, settings, cost, "m"
    )
    return Plan("0002-t", proposal, "a person", "2024-01-01", proposal.sha256)


def test_plan_survives_its_file(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan), "utf-8")
    assert load_plan(path) == plan


def test_edited_plan_is_refused(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan).replace("min_score: 0.25", "min_score: 0.26"), "utf-8")
    with pytest.raises(InvalidInput, match="changed after approval"):
        load_plan(path)


def test_torn_last_line_is_ignored_then_dropped(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("run_started", pid=1)
    log.close()
    with path.open("a") as torn:
        torn.write('{"time": "x", "kind": "run_fin')
    tail = EventTail(path)
    assert [event.kind for event in tail.read()] == ["run_started"]
    assert fold(plan, parse_events(path.read_text().splitlines())).status == "running"
    log = EventLog(path)
    log.append("run_finished", status="failed", error=None)
    log.close()
    assert [event.kind for event in tail.read()] == ["run_finished"]
    assert len(path.read_text().splitlines()) == 2


def test_losses_of_repeated_steps_replace_the_earlier(tmp_path: Path, plan: Plan) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    steps = [(1, 3.0), (2, 2.0), (3, 1.5), (2, 2.5)]
    events = [log.append("progress", stage="pretrain", step=s, loss=x) for s, x in steps]
    log.close()
    assert fold(plan, events).stages["pretrain"].losses == [(1, 3.0), (2, 2.5)]


def test_a_full_disk_takes_no_other_event_along(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("note", text="first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            log.append("note", text="lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append("note", text="second")
    log.close()
    events = parse_events(path.read_text().splitlines())
    assert [event.fields["text"] for event in events] == ["first", "second"]
