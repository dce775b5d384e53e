"""The page of a run: what each operator left, and what its data shares with the evaluation sets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synth_agent import pipeline
from synth_agent.changes import Change, OperatorChanges, write_changes
from synth_agent.headless import run_text
from synth_agent.summary import write_summary
from synth_agent.workspace import Workspace
from tests.ui.notebook import Writer, make_workspace, proposal_for

OPERATORS = [
    {"name": "words_num_filter", "before": 1300, "after": 1040, "seconds": 1.25},
    {"name": "a_mapper", "before": 1040, "after": 1040, "seconds": 20.0},
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "notebook")


def summary(workspace: Workspace, result: dict[str, Any]) -> str:
    writer = Writer(workspace, 1, proposal_for(workspace, "words", None))
    writer.start()
    writer.stage("process", result)
    return write_summary(workspace, pipeline.load_run(workspace, writer.id)).read_text()


def test_operators_are_listed_with_their_counts(workspace: Workspace) -> None:
    result = {"kept": 1040, "seed_samples": 1300, "operators": OPERATORS}
    text = summary(workspace, result)
    assert "| operator | samples before | after | dropped | seconds |" in text
    assert "| words_num_filter | 1,300 | 1,040 | 260 | 1.2 |" in text
    assert "| a_mapper | 1,040 | 1,040 | 0 | 20.0 |" in text


def test_a_training_that_ran_out_of_memory_says_how_it_went_on(workspace: Workspace) -> None:
    changes = ["all layers recomputed in the backward pass", "4096 positions a pass"]
    times = [{"step": step, "then": change} for step, change in enumerate(changes, 3)]
    writer = Writer(workspace, 1, proposal_for(workspace, "words", None))
    writer.start()
    writer.stage("pretrain", {"steps": 9, "out_of_memory": []})
    writer.stage("finetune", {"steps": 9, "out_of_memory": times})
    run = pipeline.load_run(workspace, writer.id)
    text = write_summary(workspace, run).read_text()
    told = (
        "Stage finetune ran out of memory at step 3, going on with all layers recomputed in the "
        "backward pass; at step 4, going on with 4096 positions a pass; its batch stayed the same."
    )
    assert told in text
    assert "Stage pretrain" not in text
    assert told in run_text(run, {})


def test_a_run_of_the_data_alone_is_shown_without_a_verdict(workspace: Workspace) -> None:
    writer = Writer(workspace, 1, proposal_for(workspace, "words", None))
    writer.start()
    writer.finish("succeeded", None)
    text = run_text(pipeline.load_run(workspace, writer.id), {})
    assert "verdict" not in text
    assert "  status   succeeded" in text


def test_branches_are_named(workspace: Workspace) -> None:
    operators = [{**OPERATORS[0], "branch": "synthesis"}]
    text = summary(workspace, {"kept": 3, "seed_samples": 3, "operators": operators})
    assert "| synthesis | words_num_filter |" in text


def test_samples_that_operators_changed_are_quoted_on_one_line(workspace: Workspace) -> None:
    output = workspace.artifacts / "process"
    output.mkdir(parents=True)
    changes = (
        Change("7", "<__dj__image>\na `red` box <|__dj__eoc|>", None),
        Change("9", "x" * 300, "short"),
    )
    write_changes(output, [OperatorChanges("1. words_num_filter", changes)])
    text = summary(workspace, {"kept": 1, "seed_samples": 3, "operators": OPERATORS})
    assert "- 1. words_num_filter: id 7, `a 'red' box` dropped" in text
    assert f"`{'x' * 119}…` became `short`" in text


def test_without_data_or_evaluation_sets_it_says_so(workspace: Workspace) -> None:
    text = summary(workspace, {"kept": 3, "seed_samples": 3})
    assert "Contamination: not computed. No processed data" in text


def test_contamination_has_a_line_for_each_set(workspace: Workspace) -> None:
    data, output = workspace.root / "data", workspace.artifacts / "process"
    pictures = data / "textvqa" / "train_images"
    pictures.mkdir(parents=True)
    output.mkdir(parents=True)
    Image.linear_gradient("L").save(pictures / "aa.jpg")
    shutil.copy(pictures / "aa.jpg", data / "seed" / "1.jpg")
    question = {"image_id": "aa", "question": "which?", "answers": ["x"] * 10}
    (data / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [question]}))
    asked = {"question_id": "aa", "image": "aa.jpg", "text": "which?"}
    (data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(asked))
    (data / "mmbench").mkdir()
    header = "index\tquestion\tA\tB\tanswer\timage\n"
    (data / "mmbench" / "mmbench_dev_20230712.tsv").write_text(header)
    sample = {"id": "1", "images": ["1.jpg"], "text": "<image>\na"}
    (output / "processed.jsonl").write_text(json.dumps(sample) + "\n")
    text = summary(workspace, {"kept": 1, "seed_samples": 1})
    assert "- TextVQA: 1 equal and 0 near of 1 pictures, 0 matching texts of 1" in text
    assert "- MMBench: 0 equal" in text
