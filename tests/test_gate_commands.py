"""The planner and the gate on the command line, with a real local server behind the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from synth_agent import drafts, pipeline
from synth_agent.cli import main
from synth_agent.errors import Busy
from synth_agent.planner.factory import session_transcript
from synth_agent.proposal_words import proposal_text
from synth_agent.runs import Limits
from synth_agent.worker import hold_lock
from synth_agent.workspace import Workspace, open_workspace
from tests import llm_server
from tests.gate_world import fill_settings, recipe_proposal
from tests.llm_server import refuse_network  # noqa: F401  lets this machine be reached

CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    settings = "goal: test\nbaseline: words\nplanner: {kind: llm, model: small}\n"
    git_workspace.settings_file.write_text(settings)
    workspace = open_workspace(git_workspace.root)
    fill_settings(workspace)
    return workspace


def test_a_question_is_answered_and_can_be_replayed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = llm_server.Call("runs", {})
    answers = (llm_server.Answer("", calls=(call,)), llm_server.Answer("No run was made yet."))
    command = ["-w", str(workspace.root), "ask", "What was tried?"]
    with llm_server.LlmServer(*(llm_server.vllm(answer) for answer in answers)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        assert main(command) == 0
    live = capsys.readouterr()
    assert live.out == "No run was made yet.\n"
    assert "tokens today" in live.err
    monkeypatch.delenv("OPENAI_API_KEY")
    recorded = session_transcript(workspace)
    assert main([*command, "--planner", "replay", "--transcript", str(recorded)]) == 0
    replayed = capsys.readouterr()
    assert replayed.out == live.out
    assert replayed.err == f"replay of {recorded}\n"
    for path in workspace.root.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_the_planner_that_answered_is_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.settings_file.write_text("goal: test\nbaseline: words\nplanner: {model: small}\n")
    command = ["-w", str(workspace.root), "ask", "What was tried?", "--planner", "llm"]
    with llm_server.LlmServer(llm_server.vllm(llm_server.Answer("Nothing."))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        assert main(command) == 0
    told = capsys.readouterr().err
    assert told.startswith("small, ") and "tokens today" in told


def test_what_is_missing_is_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-w", str(workspace.root), "ask", "why?"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert main(command) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert main([*command, "--planner", "builtin"]) == 2
    assert "planner.kind" in capsys.readouterr().err
    assert main([*command, "--planner", "replay"]) == 2
    assert "planner.transcript is empty" in capsys.readouterr().err
    workspace.settings_file.write_text("planner: {kind: llm}\n")
    assert main(command) == 2
    assert "planner.model is empty" in capsys.readouterr().err


def test_what_is_shown_says_all_that_would_run(workspace: Workspace) -> None:
    proposal = recipe_proposal(workspace, "short", seed=7)
    assert "  settings" not in proposal_text(workspace, recipe_proposal(workspace, "short"))
    faster = {**proposal.settings["finetune"], "learning_rate": 0.5}
    filters = [{"text_length_filter": {"min_len": 3, "num_proc": 0, "reversed_range": False}}]
    plan = {
        "branches": [
            {"name": "b", "process": filters, "repeat": 2, "sample": {"count": 5, "seed": 4}}
        ],
        "order": {"by": "shuffled", "seed": 9},
    }
    proposal = replace(
        proposal,
        recipe={"name": "short", **plan},
        settings={**proposal.settings, "finetune": faster},
        proposed_by="a \u001bmodel",
    )
    lines = proposal_text(workspace, proposal).splitlines()
    assert "  steps     branch b: each sample 2 x, 5 drawn with seed 4" in lines
    assert "  steps     text_length_filter(min_len=3)" in lines
    assert "  steps     shuffled with seed 9" in lines
    assert "  settings  seed = 7 (synth.yaml: 1024)" in lines
    assert any(line.startswith("  settings  finetune.learning_rate = 0.5 (") for line in lines)
    assert "  from      a model" in lines
    hidden = replace(proposal, recipe={"name": "r", "process": [{"x_filter": {"a": "\u202ex"}}]})
    assert 'x_filter(a="\\u202ex")' in proposal_text(workspace, hidden)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--planner", "builtin", "--wish", "cheaper"], "--wish 'cheaper'"),
        (["--alternatives", "2", "--wish", "cheaper"], "--wish 'cheaper'"),
        (["short", "--wish", "cheaper"], "--wish 'cheaper'"),
        (["--alternatives", "2", "--planner", "llm"], "--planner llm"),
        (["short", "--planner", "replay"], "--planner replay"),
    ],
)
def test_a_wish_that_nobody_hears_is_refused(
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    option: str,
) -> None:
    assert main(["-w", str(workspace.root), "propose", *arguments]) == 2
    told = capsys.readouterr()
    assert option in told.err and not told.out
    assert not (workspace.artifacts / "drafts").exists()


def test_a_part_of_a_proposal_is_shown_under_its_own_sha256(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-w", str(workspace.root)]
    assert main([*where, "propose", "--planner", "builtin", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["sha256"]
    assert main([*where, "limit", shown, "--data-only"]) == 0
    part = capsys.readouterr().out
    proposal = drafts.find(workspace, shown)
    limited = replace(proposal, limits=Limits(data_only=True))
    assert shown not in part
    assert "data only" in part
    kept = (workspace.artifacts / "drafts").glob("*.json")
    assert limited.limits in [drafts.find(workspace, path.stem).limits for path in kept]


def test_rules_are_made_by_people_only(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-w", str(workspace.root)]
    assert main([*where, "rules"]) == 0
    assert "no standing rule" in capsys.readouterr().out
    add = ["rules", "add", "filters", "--gpu-hours", "2", "--max-runs", "3"]
    assert main([*where, *add]) == 2
    assert "without a terminal" in capsys.readouterr().err
    assert main([*where, "auto", "--budget", "1m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == []
    assert "rule" in told["reason"]
    assert pipeline.list_runs(workspace) == []


def test_the_days_exchanges_lie_beside_a_models_proposal(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-w", str(workspace.root)]
    assert main([*where, "propose", "--planner", "builtin", "--json"]) == 0
    proposal = drafts.find(workspace, json.loads(capsys.readouterr().out)["sha256"])
    recorded = session_transcript(workspace)
    recorded.parent.mkdir(parents=True)
    recorded.write_text('{"said": 1}\n')
    for proposer, is_kept in (("small", True), (proposal.proposed_by, False)):
        one = replace(proposal, proposed_by=proposer)
        plan = pipeline.approve(workspace, one, shown_sha256=one.sha256, approver="a person")
        kept = workspace.run(plan.run_id).transcript
        assert kept.is_file() is is_kept


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"title": "x"}', b"\xff\xfe"])
def test_a_damaged_draft_is_named(
    git_workspace: Workspace, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    drafts_folder = git_workspace.artifacts / "drafts"
    drafts_folder.mkdir(parents=True)
    (drafts_folder / "abcdef123.json").write_bytes(content)
    assert main(["-w", str(git_workspace.root), "approve", "abcdef"]) == 2
    error = capsys.readouterr().err
    assert str(drafts_folder / "abcdef123.json") in error
    assert "propose it again" in error


@pytest.mark.parametrize("number", ["0", "-3", "4"])
def test_a_wrong_number_of_alternatives_is_refused(
    git_workspace: Workspace, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    where = ["-w", str(git_workspace.root)]
    assert main([*where, "propose", "--alternatives", number]) == 2
    assert "ask for 1 to 3" in capsys.readouterr().err


def test_a_live_run_leaves_nothing_approved(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-w", str(workspace.root)]
    assert main([*where, "propose", "--planner", "builtin", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["sha256"]
    lock = hold_lock(workspace, "0007-other")
    assert main([*where, "approve", shown]) == 3
    assert "0007-other; nothing was approved" in capsys.readouterr().err
    assert pipeline.list_runs(workspace) == []
    lock.close()

    def busy(*_: object) -> int:
        raise Busy("A run is live", "another", "wait")

    monkeypatch.setattr(pipeline, "launch", busy)
    assert main([*where, "approve", shown]) == 3
    [run] = pipeline.list_runs(workspace)
    assert f"synth-agent resume {run.id}" in capsys.readouterr().err
