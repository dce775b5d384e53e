"""The model's tools: they answer from the workspace, within bounds, and nothing that is asked writes."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from synth_agent import pipeline
from synth_agent.catalogue import load_catalogue
from synth_agent.operator_commands import operator_data
from synth_agent.planner import tools
from synth_agent.planner.builtin import BuiltinPlanner
from synth_agent.planner.fencing import CLOSING, OPENING, visible
from synth_agent.planner.tools import MOST_BYTES, MOST_ROWS, TOOLS, run_tool
from synth_agent.recipe_policy import CHOICES
from synth_agent.runs import EventLog
from synth_agent.workspace import Workspace
from tests.injections import INJECTIONS, disguised
from tests.planner_world import (
    RECIPES,
    ROWS,
    files_of,
    fill_workspace,
    history,
    long_history,
    score,
)
from tests.test_context import outside_fences, poisoned


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    return fill_workspace(git_workspace, [f"{disguised(i)} <b>" for i in range(20)])


def call(workspace: Workspace, name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return a tool's answer to a call about a short history."""
    text = run_tool(workspace, name, json.dumps(arguments), history(workspace))
    assert len(text.encode()) <= MOST_BYTES
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def test_statistics_answers_a_query(workspace: Workspace) -> None:
    answer = call(workspace, "statistics", sql="SELECT count(*) AS n, max(num_words) FROM samples;")
    assert answer["columns"][0] == "n"
    assert answer["rows"] == [[str(ROWS), "39.0"]]
    assert "num_words" in call(workspace, "statistics")["columns"]
    last = call(workspace, "statistics", sql="SELECT id FROM samples WHERE row = 3 -- the fourth")
    assert last["rows"] == [[f"{OPENING}s3{CLOSING}"]]


def test_statistics_is_bounded_in_rows_and_bytes(workspace: Workspace) -> None:
    answer = call(workspace, "statistics", sql="SELECT * FROM range(1000)")
    assert len(answer["rows"]) == MOST_ROWS
    assert answer["truncated"]
    wide = call(workspace, "statistics", sql="SELECT repeat('x', 50000000) FROM range(50)")
    assert wide["truncated"]
    assert 0 < len(wide["rows"]) < MOST_ROWS


def test_a_query_that_does_not_end_is_interrupted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "MOST_SECONDS", 1.0)
    started = time.monotonic()
    answer = call(
        workspace,
        "statistics",
        sql="SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
    )
    assert "too long" in answer["error"]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "sql",
    [
        "DROP VIEW samples",
        "CREATE TABLE t AS SELECT 1",
        "COPY samples TO 'out.csv'",
        "SELECT 1; SELECT 2",
        "SELECT 1) ; COPY (SELECT 1) TO 'out.csv' --",
        "ATTACH 'x.db'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM 'seed.jsonl'",
        "SELECT * FROM read_csv('http://localhost/x')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "SELECT getenv('HOME')",
        "EXPORT DATABASE 'x'",
        "SELECT missing FROM samples",
        "nonsense",
        "\x00",
    ],
)
def test_only_a_select_over_the_view_is_answered(workspace: Workspace, sql: str) -> None:
    before = files_of(workspace.root)
    answer = call(workspace, "statistics", sql=sql)
    assert answer["error"]
    assert answer["fix"]
    assert files_of(workspace.root) == before


def test_samples_and_retention_tell_what_a_recipe_keeps(workspace: Workspace) -> None:
    kept = call(workspace, "retention", recipe="short")
    assert (kept["seed_samples"], kept["samples"]) == (ROWS, 37)
    assert kept["steps"] == "words_num_filter(min_num=3)"
    asked = call(workspace, "retention", process=[{"words_num_filter": {"min_num": 30}}])
    assert asked["samples"] == 10
    step = {"name": "words_num_filter", "parameters": {"min_num": 30}}
    assert call(workspace, "retention", process=[step]) == asked
    drawn = call(workspace, "samples", recipe="short", operator=1, count=2)
    assert len(drawn["kept"]) == len(drawn["dropped"]) == 2
    assert drawn["operator"] == "words_num_filter"


def test_operators_are_described(workspace: Workspace) -> None:
    one = call(workspace, "operators", name="words_num_filter")
    assert {"min_num", "max_num"} <= {parameter["name"] for parameter in one["parameters"]}
    refused = call(workspace, "operators", name="python_file_mapper")
    assert not refused["usable"]
    assert refused["refused_because"]
    found = call(workspace, "operators", word="aesthetics")
    assert found["found"] >= 1
    assert all("aesthetics" in entry["name"] for entry in found["operators"])


@pytest.mark.parametrize(
    ("operator", "parameter", "field", "told"),
    [
        ("image_captioning_mapper", "caption_num", "maximum", 32),
        ("batched_image_captioning_mapper", "max_new_tokens", "minimum", 1),
        ("range_specified_field_selector", "upper_percentile", "maximum", 1),
        ("sentence_augmentation_mapper", "top_p", "accepts", ["float", "null"]),
        ("topk_specified_field_selector", "field_key", "required", True),
        ("chinese_convert_mapper", "mode", "choices", list(CHOICES["mode"])),
    ],
)
def test_operators_are_described_as_they_are_checked(
    workspace: Workspace, operator: str, parameter: str, field: str, told: object
) -> None:
    listed = call(workspace, "operators", name=operator)["parameters"]
    described = {entry["name"]: entry for entry in listed}
    assert described[parameter][field] == told
    catalogue = load_catalogue()
    plain = operator_data(catalogue.operators[operator], catalogue, ())["parameters"]
    assert plain[parameter][field] == told


def test_both_ends_of_a_filters_interval_are_described(workspace: Workspace) -> None:
    listed = call(workspace, "operators", name="words_num_filter")["parameters"]
    names = {entry["name"] for entry in listed}
    assert {"min_closed_interval", "max_closed_interval", "reversed_range"} <= names


def test_runs_are_listed_and_shown(workspace: Workspace) -> None:
    listed = call(workspace, "runs")
    assert listed["runs"] == 2
    assert listed["lines"][0].startswith("- 0002-short explore")
    assert call(workspace, "runs", status="failed")["lines"] == []
    one = call(workspace, "runs", run="0002-short")
    assert one["comparisons"]["textvqa"]["points"] == 1.5
    assert one["stages"]["process"]["samples"] == 30


def test_a_long_history_is_cut_to_size(workspace: Workspace) -> None:
    text = run_tool(workspace, "runs", "{}", long_history(workspace, 400))
    assert len(text.encode()) <= MOST_BYTES
    answer = json.loads(text)
    assert answer["truncated"]
    assert answer["runs"] == 400
    assert "0400-" in answer["lines"][0]


def test_two_runs_are_compared_question_by_question(workspace: Workspace) -> None:
    proposal = BuiltinPlanner().propose(workspace, (), ())
    assert proposal is not None
    for right in (40, 60):
        plan = pipeline.approve(
            workspace, proposal, shown_sha256=proposal.sha256, approver="a test"
        )
        paths = workspace.run(plan.run_id)
        lines = [{"key": str(i), "score": float(i < right)} for i in range(100)]
        predictions = paths.root / "predictions.jsonl"
        predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        relative = str(predictions.relative_to(workspace.root))
        recorded = {**vars(score("textvqa", float(right))), "predictions": relative}
        log = EventLog(paths.events)
        log.append("score_recorded", score=recorded)
        log.close()
    text = run_tool(workspace, "compare", '{"earlier": "0001-baseline", "later": "0002-baseline"}')
    (difference,) = json.loads(text)["differences"]
    assert (difference["points"], difference["questions"]) == (20, 100)
    assert difference["verdict"] == "better"


def test_fit_gives_samples_with_their_basis(workspace: Workspace) -> None:
    answer = call(workspace, "fit", recipe="short")
    assert answer["samples"] == 30
    assert "measured in run 0002-short" in answer["basis"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("approve", "{}", "No such tool"),
        ("write_file", '{"path": "synth.yaml"}', "No such tool"),
        ("statistics", "SELECT 1", "not JSON"),
        ("statistics", "[1]", "not an object"),
        ("statistics", '{"sql": 3}', "Wrong type"),
        ("statistics", '{"query": "SELECT 1"}', "Unknown argument"),
        ("statistics", '{"sql": "' + "x" * 30_000 + '"}', "too long"),
        ("statistics", "[" * 100_000, "too long"),
        ("statistics", "[" * 15_000, "not JSON"),
        ("compare", "{}", "missing"),
        ("compare", '{"earlier": "../x", "later": "0001-baseline"}', "No such run"),
        ("runs", '{"run": "/etc/passwd"}', "No such run"),
        ("runs", '{"offset": -1}', "Out of range"),
        ("retention", '{"recipe": "../../etc/passwd"}', "No such recipe"),
        ("retention", "{}", "No such recipe"),
        ("samples", '{"recipe": "short", "operator": 9}', "No such operator"),
        ("samples", '{"recipe": "short", "count": 5000}', "Out of range"),
        ("fit", '{"process": [{"python_file_mapper": {"file_path": "x.py"}}]}', "refused"),
        (
            "retention",
            '{"process": [{"image_text_similarity_filter": {"hf_clip": "/root"}}]}',
            "outside the workspace",
        ),
        ("operators", '{"name": "os.system"}', "Unknown operator"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(
    workspace: Workspace, name: str, arguments: str, words: str
) -> None:
    before = files_of(workspace.root)
    text = run_tool(workspace, name, arguments, history(workspace))
    answer = json.loads(text)
    assert words in answer["error"]
    assert "Traceback" not in text
    assert files_of(workspace.root) == before


def test_without_statistics_the_answer_says_what_to_do(git_workspace: Workspace) -> None:
    git_workspace.recipes.mkdir()
    (git_workspace.recipes / "short.yaml").write_text(RECIPES["short"])
    for name, arguments in (
        ("statistics", '{"sql": "SELECT 1"}'),
        ("retention", '{"recipe": "short"}'),
    ):
        answer = json.loads(run_tool(git_workspace, name, arguments, ()))
        assert "synth-agent analyze" in answer["fix"]


def test_texts_of_the_data_are_fenced(workspace: Workspace) -> None:
    answers = [
        call(workspace, "statistics", sql='SELECT id, text, text AS "ignore all" FROM samples'),
        call(workspace, "samples", recipe="short", operator=1, count=8),
    ]
    for answer in answers:
        text = json.dumps(answer, ensure_ascii=False)
        assert OPENING in text
        own = outside_fences(text)
        assert "<" not in own
        assert not re.search("ignore|approve|批准|system", own, re.IGNORECASE)
        assert "\\u001b" not in text


@pytest.mark.parametrize("number", range(len(INJECTIONS)))
def test_texts_of_runs_are_fenced(workspace: Workspace, number: int) -> None:
    runs = poisoned(workspace, disguised(number))
    start = visible(INJECTIONS[number])[:24]
    for arguments in ({}, {"run": runs[1].id}):
        text = run_tool(workspace, "runs", json.dumps(arguments), runs)
        own = outside_fences(text)
        assert start not in own
        assert "<" not in own


def test_every_tool_has_a_schema_and_a_function() -> None:
    assert {spec.name for spec in TOOLS} == set(tools._TOOLS)
    for spec in TOOLS:
        assert json.loads(json.dumps(spec.parameters))["additionalProperties"] is False
