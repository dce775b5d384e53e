"""Cache keys follow content, configurations fit the programs, and the gate checks what it can."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mgm.benchmarks import write_lines
from mgm.train_settings import STAGE_DEFAULTS, TrainSettings
from synth_agent import pipeline
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.runs import Cost, Plan, Proposal
from synth_agent.stage_plan import BUILDERS, Context, Stage
from synth_agent.workspace import TrainSettings as StageSettings
from synth_agent.workspace import Workspace, load_settings


@pytest.fixture
def filled(git_workspace: Workspace) -> Workspace:
    """A workspace in which every file that the settings name exists."""
    settings = settings_of(git_workspace)
    evaluate = settings["evaluate"]
    model = {key: value for key, value in settings["model"].items() if key != "name"}
    for section in (settings["data"], evaluate["textvqa"], evaluate["mmbench"], model):
        for value in section.values():
            path = git_workspace.path(str(value))
            if not isinstance(value, str):
                continue
            target = path if path.suffix else path / "file"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(value)
    return git_workspace


def settings_of(workspace: Workspace) -> dict[str, Any]:
    settings = workspace.settings.model_dump(mode="json")
    names = ("data", "model", "pretrain", "finetune", "evaluate", "seed", "compute")
    return {name: settings[name] for name in names}


def plan_of(workspace: Workspace, settings: dict[str, Any], operators: list[Any]) -> Plan:
    recipe = {"name": "r", "process": operators}
    cost = Cost(1, None, None, "none")
    proposal = Proposal("T", "t", "explore", "why", (), None, recipe, settings, cost, "me")
    return Plan("0001-t", proposal, "me", "now", proposal.sha256)


def stages_of(workspace: Workspace, plan: Plan, kept: str = "same") -> dict[str, Stage]:
    """Build all stages over outputs that say `kept`."""
    outputs: dict[str, Path] = {}
    stages: dict[str, Stage] = {}
    for name, build in BUILDERS.items():
        context = Context(workspace, plan, Digests(workspace), dict(outputs))
        stages[name] = build(context)
        folder = workspace.artifacts / "made" / kept / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("processed.json", "mm_projector.bin"):
            (folder / file).write_text(kept)
        outputs[name] = folder
    return stages


def test_recipe_that_keeps_the_same_samples_shares_the_training(filled: Workspace) -> None:
    settings = settings_of(filled)
    one = stages_of(filled, plan_of(filled, settings, []))
    two = stages_of(filled, plan_of(filled, settings, [{"text_length_filter": {"min_len": 1}}]))
    other = stages_of(filled, plan_of(filled, settings, []), kept="fewer")
    assert one["process"].key != two["process"].key
    assert one["pretrain"].key == two["pretrain"].key
    assert one["pretrain"].key != other["pretrain"].key


def changed(settings: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    return {**settings, section: {**settings[section], **values}}


def test_keys_cover_settings_that_change_results_and_no_others(filled: Workspace) -> None:
    settings = settings_of(filled)
    keys = {n: s.key for n, s in stages_of(filled, plan_of(filled, settings, [])).items()}

    def differing(other: dict[str, Any]) -> set[str]:
        stages = stages_of(filled, plan_of(filled, other, []))
        return {name for name, stage in stages.items() if stage.key != keys[name]}

    assert differing(changed(settings, "compute", threads=3)) == set()
    assert differing(changed(settings, "pretrain", save_steps=7, logging_steps=9)) == set()
    passes = changed(settings, "pretrain", tokens_per_pass=4096, recomputed_layers=2)
    assert differing(passes) == set()
    assert differing(changed(settings, "finetune", moments="8bit")) == {"finetune"}
    assert differing(changed(settings, "evaluate", batch_size=5)) == set()
    assert differing(changed(settings, "pretrain", learning_rate=0.5)) == {"pretrain"}
    assert differing(changed(settings, "data", sample_cap=5)) == {"process"}
    assert differing({**settings, "seed": 2}) == {"pretrain", "finetune"}
    (filled.root / "models/gemma-2b-it/file").write_text("other weights")
    assert differing(settings) == {"pretrain", "finetune", "evaluate"}


def test_configurations_are_what_the_programs_take(filled: Workspace) -> None:
    stages = stages_of(filled, plan_of(filled, settings_of(filled), []))
    known = {field.name for field in fields(TrainSettings)}
    for name in ("pretrain", "finetune"):
        [config] = stages[name].configs.values()
        assert set(config) <= known
        assert config["output"] == str(stages[name].partial)
        json.dumps(config)
    benchmarks = [config["benchmark"] for config in stages["evaluate"].configs.values()]
    assert benchmarks == ["textvqa", "mmbench"]
    assert len(stages["evaluate"].commands) == 2


def test_missing_file_and_bad_batches_are_named(filled: Workspace) -> None:
    settings = settings_of(filled)
    pipeline.check_settings(filled, settings)
    with pytest.raises(InvalidInput, match=r"pretrain\.micro_batch_size = 7"):
        pipeline.check_settings(filled, changed(settings, "pretrain", micro_batch_size=7))
    with pytest.raises(InvalidInput, match=r"pretrain\.method = 'lora'"):
        pipeline.check_settings(filled, changed(settings, "pretrain", method="lora"))
    filled.path(settings["data"]["original"]).unlink()
    with pytest.raises(InvalidInput, match=r"synth\.yaml: data\.original"):
        pipeline.check_settings(filled, settings)


@pytest.mark.parametrize(("name", "value"), [("warmup_ratio", 1), ("projector_learning_rate", -1)])
def test_a_workspace_refuses_what_the_training_would(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        StageSettings.model_validate({name: value})


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_keeps_the_kits_values_beside_those_that_are_given(
    tmp_path: Path, stage: str
) -> None:
    path = tmp_path / "synth.yaml"
    path.write_text(f"{stage}: {{save_steps: 50}}\n")
    section = getattr(load_settings(path), stage).model_dump()
    assert {name: section[name] for name in STAGE_DEFAULTS[stage]} == STAGE_DEFAULTS[stage]
    assert section["save_steps"] == 50


def test_rejection_is_kept_with_its_reason(filled: Workspace) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    first = pipeline.reject(filled, proposal, reason="too costly", by="a person")
    second = pipeline.approve(
        filled,
        replace(proposal, slug="u"),
        shown_sha256=replace(proposal, slug="u").sha256,
        approver="a person",
    )
    assert (first, second.run_id) == ("0001-t", "0002-u")
    [rejection] = pipeline.list_rejections(filled)
    assert (rejection.reason, rejection.proposal.sha256) == ("too costly", proposal.sha256)
    assert [run.id for run in pipeline.list_runs(filled)] == ["0002-u"]
    environment = json.loads(filled.run("0002-u").environment.read_text())
    assert set(environment["inputs"]) == {"seed", "original", "instructions"}


def test_a_key_that_is_a_word_stays_in_the_reason(
    filled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    pipeline.reject(filled, proposal, reason="its branch is empty", by="a person")
    monkeypatch.setenv("OPENAI_API_KEY", "my-long-key")
    pipeline.reject(filled, proposal, reason="I typed my-long-key", by="a person")
    reasons = [rejection.reason for rejection in pipeline.list_rejections(filled)]
    assert reasons == ["its branch is empty", "I typed [removed]"]


def test_circular_group_is_one_question(tmp_path: Path) -> None:
    rows = [(1, 1, 1.0), (1000001, 1, 0.0), (2, 2, 1.0), (1000002, 2, 1.0), (1000003, 3, 1.0)]
    path = tmp_path / "predictions.jsonl"
    records = [{"key": str(q), "question_id": q, "group": g, "score": s} for q, g, s in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert pipeline.question_scores(path) == {"1": 0.0, "2": 1.0}


def test_an_answer_may_hold_any_separator_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    answer = "a\u2028b\u0085c\u2029"
    write_lines(path, [{"key": key, "prediction": answer, "score": 1.0} for key in ("1", "2")])
    assert pipeline.question_scores(path) == {"1": 1.0, "2": 1.0}


def test_simultaneous_approvals_take_different_numbers(filled: Workspace) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    proposals = [replace(proposal, slug=slug) for slug in ("a", "b", "c", "d")]

    def approve(wanted: Proposal) -> str:
        plan = pipeline.approve(filled, wanted, shown_sha256=wanted.sha256, approver="a person")
        return plan.run_id[:4]

    with ThreadPoolExecutor(4) as pool:
        numbers = sorted(pool.map(approve, proposals))
    assert numbers == ["0001", "0002", "0003", "0004"]


@pytest.mark.parametrize("text", ["", "a: [", "reason: x\n", "5\n", "\x00"])
@pytest.mark.parametrize("name", ["rejection.yaml", "proposal.yaml"])
def test_a_damaged_rejection_does_not_hide_the_others(
    filled: Workspace, name: str, text: str
) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    good, bad = (
        pipeline.reject(filled, replace(proposal, slug=slug), reason="no", by="a person")
        for slug in ("good", "bad")
    )
    path = filled.run(bad).root / name
    path.write_text(text)
    problems: list[str] = []
    kept = pipeline.list_rejections(filled, lambda error: problems.append(str(error)))
    assert [rejection.id for rejection in kept] == [good]
    assert [str(path) in problem for problem in problems] == [True]
    with pytest.raises(InvalidInput, match="Not a rejection"):
        pipeline.list_rejections(filled)


@pytest.mark.parametrize(
    "event",
    [
        {"time": "2025-01-01", "kind": "stage_started"},
        {"time": "x", "kind": "score_recorded", "score": {}},
        {"time": "x", "kind": "progress", "stage": "pretrain", "loss": 1.0},
    ],
)
def test_a_damaged_event_log_is_named(filled: Workspace, event: dict[str, Any]) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    plan = pipeline.approve(filled, proposal, shown_sha256=proposal.sha256, approver="a person")
    path = filled.run(plan.run_id).events
    path.write_text(json.dumps(event) + "\n")
    problems: list[str] = []
    assert pipeline.list_runs(filled, lambda error: problems.append(str(error))) == []
    assert [f"runs/{plan.run_id}/events.jsonl" in problem for problem in problems] == [True]


def test_damaged_predictions_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    for text in ('{"key": "1", "score": 1}\n{"key": "2"', '{"key": "1", "score": 1}\n[]\n'):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=r"predictions\.jsonl, line 2"):
            pipeline.question_scores(path)


def test_a_damaged_run_does_not_hide_the_others(filled: Workspace) -> None:
    proposal = plan_of(filled, settings_of(filled), []).proposal
    for slug in ("good", "bad"):
        wanted = replace(proposal, slug=slug)
        pipeline.approve(filled, wanted, shown_sha256=wanted.sha256, approver="a person")
    path = filled.run("0002-bad").plan
    path.write_text(path.read_text()[:100])
    problems: list[str] = []
    runs = pipeline.list_runs(filled, lambda error: problems.append(str(error)))
    assert [run.id for run in runs] == ["0001-good"]
    assert len(problems) == 1
    assert str(path) in problems[0]
    with pytest.raises(InvalidInput, match="Not a plan"):
        pipeline.list_runs(filled)
