"""MMBench files and scores against values of the kit and of VLMEvalKit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook

from mgm import mmbench
from mgm.errors import InputError
from mgm.prompt import generation_prompt

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "mmbench"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
PIXELS = "A" * 80


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions() -> list[mmbench.Question]:
    return mmbench.read_questions(GOLDEN / "questions.tsv")


@pytest.fixture(scope="module")
def predictions() -> dict[int, str]:
    return {
        line["question_id"]: line["text"] for line in read_lines(GOLDEN / "answers_single.jsonl")
    }


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = ["index", "question", "A", "B", "C", "D", "answer", "image", "category"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "l2-category"], delimiter="\t")
        writer.writeheader()
        base = {"question": "q", "A": "x", "B": "y", "answer": "A", "image": PIXELS}
        for row in rows:
            writer.writerow({**base, "category": "c", "l2-category": "l", **row})
    return path


@pytest.mark.parametrize("name", ["single", "all_rounds"])
def test_answer_lines_equal_the_kits(questions: list[mmbench.Question], name: str) -> None:
    lines = read_lines(GOLDEN / f"answers_{name}.jsonl")
    asked = [r for q in questions for r in mmbench.rounds(q, all_rounds=name == "all_rounds")]
    made = [
        mmbench.answer_line(r, line["text"], line["answer_id"], line["model_id"])
        for r, line in zip(asked, lines, strict=True)
    ]
    assert made == lines
    assert [list(line) for line in made] == [list(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "language", "all_rounds"),
    [("single", "en", False), ("single_cn", "cn", False), ("all_rounds", "en", True)],
)
def test_model_prompts(
    questions: list[mmbench.Question], name: str, language: str, all_rounds: bool
) -> None:
    expected = EXPECTED[name]["first_model_prompts"]
    asked = [r for q in questions for r in mmbench.rounds(q, all_rounds=all_rounds)]
    made = [generation_prompt(r.model_text(language)) for r in asked[: len(expected)]]
    assert made == expected


def test_text_without_the_suffix_is_the_prompt(questions: list[mmbench.Question]) -> None:
    (asked,) = mmbench.rounds(questions[0])
    assert asked.model_text(single_prediction=False) == asked.prompt


def test_upload_table(questions: list[mmbench.Question], predictions: dict[int, str]) -> None:
    columns, rows = mmbench.upload_table(questions, predictions)
    assert columns == EXPECTED["xlsx"]["columns"]
    as_read_back = [[None if cell in mmbench.ABSENT else cell for cell in row] for row in rows]
    assert as_read_back == EXPECTED["xlsx"]["rows"]


def test_upload_file_equals_the_kits(
    questions: list[mmbench.Question], predictions: dict[int, str], tmp_path: Path
) -> None:
    path = tmp_path / "split" / "model.xlsx"
    mmbench.write_upload(path, questions, predictions)
    made, expected = load_workbook(path), load_workbook(GOLDEN / "upload.xlsx")
    assert made.sheetnames == expected.sheetnames
    assert list(made.active.values) == list(expected.active.values)


def test_upload_keeps_a_formula_as_text(questions: list[mmbench.Question], tmp_path: Path) -> None:
    path = tmp_path / "upload.xlsx"
    mmbench.write_upload(path, questions[:1], {questions[0].index: "=1+1\x07"})
    cell = load_workbook(path).active.cell(2, 1 + mmbench.PREDICTION_POSITION)
    assert (cell.value, cell.data_type) == ("=1+1", "s")


def test_kit_score(questions: list[mmbench.Question], predictions: dict[int, str]) -> None:
    score = mmbench.exact_circular(questions, predictions)
    assert score.hits == {int(index): hit for index, hit in EXPECTED["kit_hits"].items()}
    assert score.percent == pytest.approx(EXPECTED["kit_score"], abs=1e-9)
    assert f"{score.percent:.2f}%" == EXPECTED["kit_score_printed"]


def test_letter_inference(questions: list[mmbench.Question], predictions: dict[int, str]) -> None:
    inferred = {
        str(q.index): mmbench.infer_letter(predictions[q.index], q.choices) for q in questions
    }
    assert inferred == EXPECTED["vlmevalkit_letter"]


@pytest.mark.parametrize("name", ["circular", "vanilla_all", "vanilla_0"])
def test_vlmevalkit_scores(
    questions: list[mmbench.Question], predictions: dict[int, str], name: str
) -> None:
    if name == "circular":
        score = mmbench.inferred_circular(questions, predictions)
    else:
        score = mmbench.inferred_vanilla(questions, predictions, first_only=name == "vanilla_0")
    expected = EXPECTED["vlmevalkit"][name]
    assert score.hits == {int(index): hit for index, hit in expected["hits"].items()}
    made = mmbench.report(questions, score.hits)
    means = {key: value for key, value in expected["report"].items() if key != "split"}
    assert list(made) == [expected["report"]["split"]]
    assert made["dev"] == pytest.approx(means, abs=1e-9)


def test_tables_equal_the_originals() -> None:
    tables = json.loads((GOLDEN / "tables.json").read_text())
    assert tables["refusals_map_to_Z"] == list(mmbench.REFUSALS)
    assert tables["api_failure_marker"] == mmbench.API_FAILURE
    assert tables["category_abbreviations"] == mmbench.CATEGORY_ABBREVIATIONS
    assert tables["index_offset_per_rotation"] == mmbench.ROTATION_OFFSET


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B.", "B"),
        ("(b)", None),
        ("B is what one sees in this one", None),
        ("Z", "Z"),
        ("The answer is **c**, I think", "C"),
        ("a red BUS", "A"),
        ("bus", None),
        ("Failed to obtain answer via API: A", None),
        ("I'm sorry, but without the image provided, A", "Z"),
        ("a red bus " + "x" * 60, None),
    ],
)
def test_letter_inference_rules(prediction: str, expected: str | None) -> None:
    choices = {"A": "a red bus", "B": "a dog", "C": "two people"}
    assert mmbench.infer_letter(prediction, choices) == expected


def test_exact_match_counts_space_and_case(tmp_path: Path) -> None:
    (question,) = mmbench.read_questions(write_table(tmp_path / "q.tsv", [{"index": "0"}]))
    for prediction, percent in (("A", 100.0), ("A.", 0.0), (" A", 0.0), ("a", 0.0), ("", 0.0)):
        assert mmbench.exact_circular([question], {0: prediction}).percent == percent


def test_circular_needs_every_rotation_and_its_main_row(tmp_path: Path) -> None:
    rows = [{"index": index} for index in ("0", "1000000", "1", "1000002")]
    table = mmbench.read_questions(write_table(tmp_path / "q.tsv", rows))
    score = mmbench.exact_circular(table, {0: "A", 1_000_000: "B", 1: "A", 1_000_002: "B"})
    assert score.hits == {0: 0, 1: 1}


def test_chance_follows_the_number_of_options(tmp_path: Path) -> None:
    four = {"C": "z", "D": "w"}
    rows = [{"index": "0"}, {"index": "1000000"}, {"index": "1", **four}]
    table = mmbench.read_questions(write_table(tmp_path / "q.tsv", rows))
    assert mmbench.chance_vanilla(table) == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert mmbench.chance_circular(table) == pytest.approx((1 / 4 + 1 / 4) / 2)


def test_picture_given_as_the_index_of_another_row(tmp_path: Path) -> None:
    rows = [{"index": "1000007", "image": "7"}, {"index": "7"}, {"index": "8", "image": "B" * 80}]
    table = mmbench.read_questions(write_table(tmp_path / "q.tsv", rows))
    keys = [mmbench.picture_key(question) for question in table]
    assert keys[0] == keys[1] != keys[2]
    assert len(mmbench.decode_picture(table[0])) == 60


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": "x"}], "line 2, field index"),
        ([{"index": "1"}, {"index": "1"}], "line 3: index 1 again"),
        ([{"index": "1", "image": "5"}], "line 2, field image refers to index 5"),
        ([{"index": "1", "image": ""}], "line 2, field image is empty"),
        ([{"index": "1", "image": "?" * 80}], "line 2, field image is not base64"),
        ([{"index": "1", "answer": "E"}], "line 2, field answer"),
        ([{"index": "1", "answer": ""}], "line 2, field answer"),
        ([{"index": "1", "answer": "AB"}], "line 2, field answer"),
        ([{"index": "1000001"}, {"index": "2000001"}], "every index is 1000000 or more"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    path = write_table(tmp_path / "q.tsv", rows)
    with pytest.raises(InputError) as caught:
        mmbench.read_questions(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message


def test_a_mark_of_the_byte_order_is_passed_over(tmp_path: Path) -> None:
    path = write_table(tmp_path / "q.tsv", [{"index": "1"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [question.index for question in mmbench.read_questions(path)] == [1]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    path.write_text("index\tquestion\tA\tB\tanswer\n1\tq\tx\ty\tA\n")
    with pytest.raises(InputError, match="no column image, category, l2-category"):
        mmbench.read_questions(path)


def test_row_of_wrong_length_is_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "q.tsv", [{"index": "1"}])
    path.write_text(path.read_text() + "2\tonly two\n")
    with pytest.raises(InputError, match="line 3: 2 fields in place of 10"):
        mmbench.read_questions(path)
