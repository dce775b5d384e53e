"""TextVQA scoring against values of the public evaluator, and the errors a user meets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm import textvqa
from mgm.errors import InputError

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "textvqa"
PAIRS = json.loads((GOLDEN / "pairs.json").read_text())["pairs"]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair["id"]))
def test_pair_is_normalised_and_scored_like_the_public_evaluator(pair: dict[str, Any]) -> None:
    assert textvqa.normalize_answer(pair["prediction"]) == pair["normalized_prediction"]
    normalized = [textvqa.normalize_answer(answer) for answer in pair["answers"]]
    assert normalized == pair["normalized_answers"]
    scored = textvqa.accuracy(pair["prediction"], pair["answers"])
    assert scored == pytest.approx(pair["accuracy"], abs=1e-9)


def test_tables_equal_the_public_evaluator() -> None:
    tables = json.loads((GOLDEN / "tables.json").read_text())
    assert tables["contractions"] == textvqa.CONTRACTIONS
    assert tables["number_words"] == textvqa.NUMBER_WORDS
    assert set(tables["articles"]) == textvqa.ARTICLES
    assert tuple(tables["punctuation_in_order"]) == textvqa.PUNCTUATION
    assert tables["max_periods_removed"] == textvqa.MAX_PERIODS_REMOVED


def test_answer_file_joins_with_annotations_and_scores() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    index = textvqa.index_annotations(textvqa.read_annotations(GOLDEN / "annotations.json"))
    lines = [json.loads(line) for line in (GOLDEN / "results.jsonl").read_text().splitlines()]
    recovered = [textvqa.recover_question(line["prompt"]) for line in lines]
    assert recovered == expected["recovered_questions"]
    scores = []
    for line in lines:
        question = textvqa.Question(line["question_id"], "unused.jpg", line["prompt"])
        scores.append(
            textvqa.accuracy(line["text"], textvqa.annotation_of(question, index).answers)
        )
    assert len(scores) == expected["samples"]
    assert sum(scores) / len(scores) == pytest.approx(expected["accuracy"], abs=1e-9)


@pytest.mark.parametrize(
    ("matching", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_by_number_of_matching_answers(matching: int, expected: float) -> None:
    answers = ["yes"] * matching + [f"other {n}" for n in range(10 - matching)]
    assert textvqa.accuracy("yes", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3.5", "3.5"), ("5.", "5"), (".5", ".5"), ("u.s.a", "usa"), ("none", "0"), ("hes", "he's")],
)
def test_normalisation_of_periods_and_words(text: str, expected: str) -> None:
    assert textvqa.normalize_answer(text) == expected


def test_only_32_periods_are_removed() -> None:
    assert textvqa.normalize_answer("a." * 40) == "a" * 32 + "a." * 8


@pytest.mark.parametrize("tokens", [None, [], ["STOP", "two words\nhere"]])
def test_built_prompt_gives_its_question_back(tokens: list[str] | None) -> None:
    annotation = textvqa.Annotation("abc", "What does the SIGN say?", ("stop",) * 10)
    ocr_tokens = None if tokens is None else {"abc": tokens}
    (question,) = textvqa.build_questions([annotation], ocr_tokens)
    assert question.image == "abc.jpg"
    assert len(question.text.split("\n")) == (2 if tokens is None else 3)
    assert question.text.endswith("\n" + textvqa.INSTRUCTION)
    index = textvqa.index_annotations([annotation])
    assert textvqa.annotation_of(question, index) == annotation


def test_prompt_with_ocr_tokens_is_written_as_in_the_question_file() -> None:
    assert textvqa.prompt_text("what brand?", ["NIKON", "D90"]) == (
        "what brand?\nReference OCR token: NIKON, D90\n"
        "Answer the question using a single word or phrase."
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("OCR tokens: A, B. Question: What IS it? Short answer:", "what is it?"),
        ("Reference OCR token: A\nWhat IS it?\nAnswer.", "what is it?"),
    ],
)
def test_other_prompt_layouts_give_their_question_back(prompt: str, expected: str) -> None:
    assert textvqa.recover_question(prompt) == expected


@pytest.mark.parametrize("prompt", ["one line", "a\nb\nc", "a\nb\nReference OCR token: x\nd"])
def test_unknown_prompt_layout_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="cannot be recovered"):
        textvqa.recover_question(prompt)


def test_question_of_two_lines_is_refused() -> None:
    annotation = textvqa.Annotation("abc", "first\nsecond", ("x",) * 10)
    with pytest.raises(InputError, match=r"data\[0\], field question"):
        textvqa.build_questions([annotation])


def test_duplicate_question_keeps_the_last_annotation() -> None:
    first = textvqa.Annotation("abc", "What?", ("x",) * 10)
    last = textvqa.Annotation("abc", "what?", ("y",) * 10)
    index = textvqa.index_annotations([first, last])
    assert index["abc", "what?"].answers == ("y",) * 10


@pytest.mark.parametrize("answer", [{"answer": "x", "answer_confidence": "yes"}, None, ["x"]])
def test_answers_that_are_no_texts_name_file_entry_and_field(
    tmp_path: Path, answer: object
) -> None:
    path = tmp_path / "annotations.json"
    entry = {"image_id": "a", "question": "What?", "answers": [answer] * 10}
    path.write_text(json.dumps({"data": [entry]}))
    with pytest.raises(InputError, match=r"data\[0\], field answers"):
        textvqa.read_annotations(path)


def test_nine_answers_name_file_entry_and_field(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    entry = {"image_id": "a", "question": "What?", "answers": ["x"] * 9}
    path.write_text(json.dumps({"data": [{**entry, "answers": ["x"] * 10}, entry]}))
    with pytest.raises(InputError) as caught:
        textvqa.read_annotations(path)
    assert f"{path}, data[1], field answers: 9 answers" in caught.value.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"question_id": "a", "image": "a.jpg"}', "line 2, field text"),
    ],
)
def test_bad_question_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    good = {"question_id": 7, "image": "a.jpg", "text": "q\ni", "category": "default"}
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        textvqa.read_questions(path)
    assert message in caught.value.message


def test_question_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    record = {"question_id": "a", "image": "a.jpg", "text": "q\u2028r\ni", "category": "default"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert textvqa.read_questions(path) == [textvqa.Question("a", "a.jpg", "q\u2028r\ni")]


def test_chance_is_the_score_of_the_most_frequent_answer() -> None:
    answers = [["yes"] * 10, ["no"] * 8 + ["Yes."] * 2, ["red"] * 10]
    assert textvqa.chance_accuracy(answers) == pytest.approx((1 + 0.6 + 0) / 3)


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read file"):
        textvqa.read_annotations(tmp_path / "absent.json")
