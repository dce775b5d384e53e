"""TextVQA and MMBench folders: normalisation, prompts, answer files and scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm import mmbench, textvqa
from mgm.errors import InputError
from mgm.files import read_json
from mgm.parity.report import Check, compare_exactly, compare_numbers

SCORE_TOLERANCE = 1e-9


def recognises_textvqa(folder: Path) -> bool:
    """Whether `folder` holds scored TextVQA answers."""
    return (folder / "pairs.json").is_file() or (
        (folder / "annotations.json").is_file() and (folder / "results.jsonl").is_file()
    )


def check_textvqa(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of the answer pairs, the joined files and the tables."""
    if (folder / "pairs.json").is_file():
        yield from _check_pairs(read_json(folder / "pairs.json")["pairs"])
    if (folder / "expected.json").is_file():
        yield from _check_joined_answers(folder, read_json(folder / "expected.json"))
    if (folder / "tables.json").is_file():
        yield from _check_textvqa_tables(read_json(folder / "tables.json"))


def _check_pairs(pairs: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    predictions = [textvqa.normalize_answer(pair["prediction"]) for pair in pairs]
    expected = [pair["normalized_prediction"] for pair in pairs]
    yield compare_exactly("pairs", "normalised predictions", predictions, expected)
    answers = [[textvqa.normalize_answer(a) for a in pair["answers"]] for pair in pairs]
    expected = [pair["normalized_answers"] for pair in pairs]
    yield compare_exactly("pairs", "normalised answers", answers, expected)
    ours = {
        str(number): textvqa.accuracy(pair["prediction"], pair["answers"])
        for number, pair in enumerate(pairs)
    }
    scores = {str(number): pair["accuracy"] for number, pair in enumerate(pairs)}
    yield compare_numbers("pairs", "accuracy", ours, scores, SCORE_TOLERANCE)


def _check_joined_answers(folder: Path, expected: Mapping[str, Any]) -> Iterator[Check]:
    index = textvqa.index_annotations(textvqa.read_annotations(folder / "annotations.json"))
    lines = read_lines(folder / "results.jsonl")
    recovered = [textvqa.recover_question(line["prompt"]) for line in lines]
    yield compare_exactly(
        "results", "recovered questions", recovered, expected["recovered_questions"]
    )
    scores = []
    for line in lines:
        question = textvqa.Question(line["question_id"], "", line["prompt"])
        annotation = textvqa.annotation_of(question, index)
        scores.append(textvqa.accuracy(line["text"], annotation.answers))
    yield compare_numbers(
        "results",
        "overall accuracy",
        {"accuracy": sum(scores) / len(scores), "samples": len(scores)},
        {"accuracy": expected["accuracy"], "samples": expected["samples"]},
        SCORE_TOLERANCE,
    )


def _check_textvqa_tables(tables: Mapping[str, Any]) -> Iterator[Check]:
    ours = {
        "contractions": textvqa.CONTRACTIONS,
        "number_words": textvqa.NUMBER_WORDS,
        "articles": sorted(textvqa.ARTICLES),
        "punctuation_in_order": list(textvqa.PUNCTUATION),
    }
    for name, value in ours.items():
        if name in tables:
            reference = sorted(tables[name]) if name == "articles" else tables[name]
            yield compare_exactly("tables", name, value, reference)


def recognises_mmbench(folder: Path) -> bool:
    """Whether `folder` holds an MMBench table with scored answers."""
    return (folder / "questions.tsv").is_file() and (folder / "expected.json").is_file()


def check_mmbench(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of prompts, answer lines, the upload table and the scores."""
    questions = mmbench.read_questions(folder / "questions.tsv")
    expected = read_json(folder / "expected.json")
    for name, all_rounds in (("single", False), ("all_rounds", True)):
        yield from _check_answer_lines(folder / f"answers_{name}.jsonl", questions, all_rounds)
    yield from _check_prompts(questions, expected)
    answers = read_lines(folder / "answers_single.jsonl")
    predictions = {int(line["question_id"]): str(line["text"]) for line in answers}
    yield from _check_upload(questions, predictions, expected)
    yield from _check_scores(questions, predictions, expected)


def _check_answer_lines(
    path: Path, questions: Sequence[mmbench.Question], all_rounds: bool
) -> Iterator[Check]:
    if not path.is_file():
        return
    lines = read_lines(path)
    asked = [r for question in questions for r in mmbench.rounds(question, all_rounds=all_rounds)]
    made = [
        mmbench.answer_line(one, line["text"], line["answer_id"], line["model_id"])
        for one, line in zip(asked, lines, strict=False)
    ]
    yield compare_exactly(path.stem, "rounds", len(asked), len(lines))
    yield compare_exactly(path.stem, "answer lines", made, lines)


def _check_prompts(
    questions: Sequence[mmbench.Question], expected: Mapping[str, Any]
) -> Iterator[Check]:
    for name, content in expected.items():
        if not isinstance(content, Mapping) or "first_model_prompts" not in content:
            continue
        reference = content["first_model_prompts"]
        language = "cn" if name.endswith("_cn") else "en"
        all_rounds = name.startswith("all_rounds")
        asked = [r for q in questions for r in mmbench.rounds(q, all_rounds=all_rounds)]
        prompts = [one.model_text(language) for one in asked[: len(reference)]]
        # The stored prompts are whole turns around the picture and this text.
        whole = [_turn(text) for text in prompts]
        yield compare_exactly(name, "model prompts", whole, reference)


def _turn(text: str) -> str:
    return f"<start_of_turn>user\n<image>\n{text}<end_of_turn>\n<start_of_turn>model\n"


def _check_upload(
    questions: Sequence[mmbench.Question],
    predictions: Mapping[int, str],
    expected: Mapping[str, Any],
) -> Iterator[Check]:
    if "xlsx" not in expected:
        return
    columns, rows = mmbench.upload_table(questions, predictions)
    # A cell that is absent is read back from the file as none.
    read_back = [[None if cell in mmbench.ABSENT else cell for cell in row] for row in rows]
    yield compare_exactly("upload", "columns", columns, expected["xlsx"]["columns"])
    yield compare_exactly("upload", "rows", read_back, expected["xlsx"]["rows"])


def _check_scores(
    questions: Sequence[mmbench.Question],
    predictions: Mapping[int, str],
    expected: Mapping[str, Any],
) -> Iterator[Check]:
    kit = mmbench.exact_circular(questions, predictions)
    yield compare_exactly("kit", "hits", _by_name(kit.hits), expected["kit_hits"])
    if "kit_score_printed" in expected:
        printed = f"{kit.percent:.2f}%"
        yield compare_exactly("kit", "printed score", printed, expected["kit_score_printed"])
    letters = {
        str(q.index): mmbench.infer_letter(predictions[q.index], q.choices) for q in questions
    }
    yield compare_exactly("inferred", "letters", letters, expected["vlmevalkit_letter"])
    for name, reference in expected["vlmevalkit"].items():
        if name == "circular":
            score = mmbench.inferred_circular(questions, predictions)
        else:
            first_only = name == "vanilla_0"
            score = mmbench.inferred_vanilla(questions, predictions, first_only=first_only)
        yield compare_exactly(name, "hits", _by_name(score.hits), reference["hits"])
        report = mmbench.report(questions, score.hits)
        means = dict(reference["report"])
        ours = report.get(means.pop("split"), {})
        yield compare_numbers(name, "report", ours, means, SCORE_TOLERANCE)


def _by_name(hits: Mapping[int, int]) -> dict[str, int]:
    return {str(index): hit for index, hit in hits.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line.

    Raises:
        InputError: If the file is missing or a line is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]
    except FileNotFoundError:
        raise InputError("File not found", str(path)) from None
    except json.JSONDecodeError as error:
        raise InputError("Not JSON lines", f"{path}: {error}") from None
