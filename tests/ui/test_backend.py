"""What the app reads from the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from synth_agent import pipeline
from synth_agent.errors import InvalidInput
from synth_agent.runs import dump_proposal, parse_events
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.ui.questions import read_questions
from synth_agent.workspace import Workspace
from tests.ui.notebook import Writer, proposal_for


def test_questions_carry_the_parents_score(workspace: Workspace) -> None:
    backend = WorkspaceBackend(workspace)
    questions = backend.questions(backend.run("0002-similarity"))
    textvqa = [q for q in questions if q.benchmark == "textvqa"]
    assert len(textvqa) == 50
    won = [q.id for q in textvqa if q.is_changed]
    assert won == [str(i) for i in range(20, 29)]
    assert textvqa[3].picture.endswith("textvqa/train_images/3.png")
    assert all(q.score == 1.0 and q.parent_score == 0.0 for q in textvqa if q.is_changed)


def test_the_baseline_has_no_parent_to_differ_from(workspace: Workspace) -> None:
    backend = WorkspaceBackend(workspace)
    questions = backend.questions(backend.run("0001-baseline"))
    assert len(questions) == 90
    assert not any(q.is_changed for q in questions)


def test_a_broken_predictions_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    good = {
        "key": "1", "prompt": "?", "prediction": "a", "score": 1, "category": None,
        "image": "1.png", "answers": ["a"],
    }  # fmt: skip
    path.write_text(json.dumps(good) + "\n{torn\n", "utf-8")
    with pytest.raises(InvalidInput, match=r"predictions\.jsonl:2"):
        read_questions(path, "textvqa")


def test_only_the_end_of_a_long_log_is_read(workspace: Workspace) -> None:
    run = Writer(workspace, 3, proposal_for(workspace, "words", None))
    run.log("process", "".join(f"line {i}\n" for i in range(200_000)))
    lines = WorkspaceBackend(workspace).log_lines(run.id, "process")
    assert lines[-1] == "line 199999"
    assert len(lines) == 400
    assert WorkspaceBackend(workspace).log_lines(run.id, "finetune") == []


def test_the_text_to_edit_is_the_recipe(workspace: Workspace) -> None:
    proposal = proposal_for(workspace, "similarity", None)
    text = WorkspaceBackend(workspace).recipe_text(proposal)
    assert yaml.safe_load(text) == {"process": proposal.recipe["process"]}


def test_an_unchanged_text_keeps_the_proposal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = WorkspaceBackend(workspace)
    proposal = proposal_for(workspace, "similarity", None)
    text = backend.recipe_text(proposal)
    with pytest.raises(InvalidInput, match="skip_op_error"):
        backend.edited(proposal, text)
    monkeypatch.setattr(backend, "validate", lambda given: None)
    assert backend.edited(proposal, text) is proposal


def test_the_history_is_read_again_only_when_it_changed(workspace: Workspace) -> None:
    backend = WorkspaceBackend(workspace)
    first = backend.notebook()
    assert backend.notebook() is first
    run = Writer(workspace, 3, proposal_for(workspace, "words", None))
    run.start()
    second = backend.notebook()
    assert [r.id for r in second.runs] == ["0001-baseline", "0002-similarity", "0003-words"]
    assert second.runs[0] is first.runs[0]
    run.finish("failed", "failed")
    third = backend.notebook()
    assert third.runs[2].status == "failed"
    assert third.runs[:2] == second.runs[:2]
    assert third.runs[0] is second.runs[0]


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("plan.yaml", "run_id: 0002-similarity\n", "Not a plan"),
        ("events.jsonl", '{"time": "2026", "kind": "stage_started"}\n', "Event log is damaged"),
        (
            "events.jsonl",
            '{"time": "2026", "kind": "run_finished", "status": "lost"}\n',
            "'lost' is none of",
        ),
        ("events.jsonl", '{"time": "2026", "kind": "score_recorded", "score": 1}\n', "damaged"),
    ],
)
def test_a_run_that_breaks_while_it_is_shown_is_named_and_hides_no_other(
    workspace: Workspace, name: str, text: str, title: str
) -> None:
    backend = WorkspaceBackend(workspace)
    assert len(backend.notebook().runs) == 2
    path = workspace.run("0002-similarity").root / name
    whole = path.read_bytes()
    path.write_text(text, "utf-8")
    broken = backend.notebook()
    assert [run.id for run in broken.runs] == ["0001-baseline"]
    (problem,) = broken.damaged
    assert title in problem
    assert "0002-similarity" in problem
    path.write_bytes(whole)
    healed = backend.notebook()
    assert (len(healed.runs), healed.damaged) == (2, ())


def test_a_rejection_that_cannot_be_read_is_named_and_hides_nothing(workspace: Workspace) -> None:
    backend = WorkspaceBackend(workspace)
    folder = workspace.run("0003-words").root
    folder.mkdir()
    (folder / "proposal.yaml").write_text(dump_proposal(proposal_for(workspace, "words", None)))
    (folder / "rejection.yaml").write_text("")
    notebook = backend.notebook()
    assert len(notebook.runs) == 2
    (problem,) = notebook.damaged
    assert "Not a rejection" in problem
    assert "0003-words" in problem
    with pytest.raises(InvalidInput, match="0003-words"):
        pipeline.list_rejections(workspace)


def test_an_editors_lock_beside_a_plan_hides_nothing(workspace: Workspace) -> None:
    lock = workspace.run("0002-similarity").root / ".#plan.yaml"
    lock.symlink_to("ada@here.17")
    assert len(WorkspaceBackend(workspace).notebook().runs) == 2


def test_lines_without_a_time_in_words_are_no_events() -> None:
    lines = ['{"time": null, "kind": "note", "text": "a"}', '{"time": "2026", "kind": 5}', "[1]"]
    assert list(parse_events(lines)) == []
