"""MMBench: question tables, prompts, answer and upload files, and the exact-matching scorers.

Owns the benchmark's protocol. Scoring is pure; `read_questions` and `write_upload` do the I/O.
A question and its rotations are separate rows whose indices differ by multiples of 1,000,000.
Three ways of scoring live here: the competition kit's circular exact match, and VLMEvalKit's
circular and vanilla scores with letter inference and without a judge model.

Source: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?" (2023).
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from mgm.errors import InputError

LETTERS = "ABCD"
ROTATION_OFFSET = 1_000_000
SINGLE_PREDICTION_SUFFIX = {
    "en": "\nAnswer with the option's letter from the given choices directly.",
    "cn": "\n请直接回答选项字母。",
}
REQUIRED_COLUMNS = ("index", "question", "A", "B", "answer", "image", "category", "l2-category")
COLUMNS_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_POSITION = 6
# Texts that a table reader takes for an absent value.
ABSENT = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
CATEGORY_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
API_FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_BOLD_LETTER = re.compile(r"answer is \*\*([A-D])\*\*", re.IGNORECASE)
# A base64 picture is longer than this; anything shorter refers to another row's picture.
_LONGEST_REFERENCE = 64


@dataclass(frozen=True)
class Question:
    """One row of the table. `options` holds A to D, None where the table has no value.

    `image` is the base64 text of the picture, shared by all rows that show it. `row` holds every
    column as read, with None for an absent value and "" in the place of the picture.
    """

    index: int
    question: str
    hint: str | None
    options: tuple[str | None, ...]
    answer: str
    category: str
    l2_category: str
    split: str
    image: str
    row: Mapping[str, str | None]

    @property
    def group(self) -> int:
        """Index of the main row that this row is a rotation of."""
        return self.index % ROTATION_OFFSET

    @property
    def is_main(self) -> bool:
        """Whether this row is the unrotated one."""
        return self.index < ROTATION_OFFSET

    @property
    def choices(self) -> dict[str, str]:
        """Every option with a value, by letter."""
        return {
            letter: option
            for letter, option in zip(LETTERS, self.options, strict=False)
            if option is not None
        }


@dataclass(frozen=True)
class Round:
    """One prompt of a question: its options in the displayed order and their original letters."""

    question: Question
    round_id: int
    prompt: str
    options: tuple[str, ...]
    option_letters: tuple[str, ...]

    def model_text(self, language: str = "en", *, single_prediction: bool = True) -> str:
        """Return the text put to the model after the picture."""
        return self.prompt + (SINGLE_PREDICTION_SUFFIX[language] if single_prediction else "")


@dataclass(frozen=True)
class GroupScore:
    """Hits (0 or 1) by row index, and their mean in percent."""

    hits: Mapping[int, int]

    @property
    def percent(self) -> float:
        """Share of hits in percent; NaN without rows."""
        return 100 * sum(self.hits.values()) / len(self.hits) if self.hits else math.nan


def read_questions(path: Path) -> list[Question]:
    """Read a tab-separated question table in file order.

    Raises:
        InputError: unreadable file, missing column, a row with a bad index or picture, or rotations
            alone.
    """
    # Pictures are single fields of any length.
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            header = _check_header(next(reader, []), path)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise InputError(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("Bad table", f"{path}: {error}", "Give a UTF-8 TSV file.") from error
    if not lines:
        raise InputError("No questions", f"{path} has a header only", "Give a table with rows.")
    rows = [(number, _as_row(header, cells, path, number)) for number, cells in lines]
    pictures = _resolve_pictures(rows, path)
    if min(pictures) >= ROTATION_OFFSET:
        raise InputError(
            "Rotations alone",
            f"{path}: every index is {ROTATION_OFFSET} or more",
            "The score counts the questions themselves, whose indices are below: add their rows.",
        )
    return [
        _parse_question(row, pictures[index], f"{path}, line {number}")
        for index, (number, row) in zip(pictures, rows, strict=True)
    ]


def decode_picture(question: Question) -> bytes:
    """Return the bytes of the picture file of a question."""
    return base64.b64decode(question.image)


def picture_key(question: Question) -> str:
    """Return a name for the picture that is equal exactly for equal pictures."""
    return hashlib.sha256(question.image.encode()).hexdigest()


def displayed_options(question: Question) -> list[str]:
    """Return the options up to the first missing one; the texts nan and none count as missing."""
    shown: list[str] = []
    for option in question.options:
        if option is None or option.lower() in ("nan", "none"):
            break
        shown.append(option)
    return shown


def rounds(question: Question, *, all_rounds: bool = False) -> list[Round]:
    """Return the prompts of a question: one, or one for each rotation of its options."""
    options = displayed_options(question)
    count = len(options) if all_rounds else 1
    return [_round(question, options, shift) for shift in range(count)]


def answer_line(asked: Round, answer: str, answer_id: str, model_id: str) -> dict[str, Any]:
    """Return one line of the answers file."""
    return {
        "question_id": asked.question.index,
        "round_id": asked.round_id,
        "prompt": asked.prompt,
        "text": answer,
        "options": list(asked.options),
        "option_char": list(asked.option_letters),
        "answer_id": answer_id,
        "model_id": model_id,
        "metadata": {},
    }


def upload_table(
    questions: Sequence[Question], predictions: Mapping[int, str]
) -> tuple[list[str], list[list[int | str | None]]]:
    """Return columns and rows of the upload file; rows without a prediction keep it empty.

    Raises:
        InputError: the question table lacks a column that the upload has to drop.
    """
    if not questions:
        raise ValueError("no questions")
    columns = list(questions[0].row)
    for column in COLUMNS_NOT_UPLOADED:
        if column not in columns:
            raise InputError(
                "Missing column", f"the question table has no column {column}", f"Add {column}."
            )
        columns.remove(column)
    columns.insert(PREDICTION_POSITION, "prediction")
    table: list[list[int | str | None]] = []
    for question in questions:
        cells = {
            **question.row,
            "index": question.index,
            "prediction": predictions.get(question.index) or None,
        }
        table.append([cells[column] for column in columns])
    return columns, table


def write_upload(path: Path, questions: Sequence[Question], predictions: Mapping[int, str]) -> None:
    """Write the upload file (xlsx, one sheet). Characters that the format forbids are dropped."""
    columns, table = upload_table(questions, predictions)
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(columns)
    for row in table:
        cells = []
        for value in row:
            if isinstance(value, str):
                cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
                # A text that starts with "=" is an answer, not a formula.
                cell.data_type = "s"
                cells.append(cell)
            else:
                cells.append(value)
        sheet.append(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def exact_circular(questions: Sequence[Question], predictions: Mapping[int, str]) -> GroupScore:
    """Score as the competition kit does: a main row hits if all its rotations match exactly.

    Case and surrounding space count; a letter is not looked for inside the prediction.
    Rotations whose main row is absent are ignored.
    """
    return _circular(questions, exact_vanilla(questions, predictions).hits)


def exact_vanilla(questions: Sequence[Question], predictions: Mapping[int, str]) -> GroupScore:
    """Score every row on its own by exact match."""
    return GroupScore(
        {q.index: int(_as_prediction(predictions, q.index) == q.answer) for q in questions}
    )


def inferred_circular(questions: Sequence[Question], predictions: Mapping[int, str]) -> GroupScore:
    """Score main rows as VLMEvalKit does without a judge: all rotations inferred and right."""
    return _circular(questions, inferred_vanilla(questions, predictions).hits)


def inferred_vanilla(
    questions: Sequence[Question], predictions: Mapping[int, str], *, first_only: bool = False
) -> GroupScore:
    """Score rows on their own with letter inference.

    `first_only` keeps rows up to index 1,000,000 inclusive, VLMEvalKit's `vanilla_0`.
    """
    rows = [q for q in questions if not first_only or q.index <= ROTATION_OFFSET]
    return GroupScore(
        {
            q.index: int(infer_letter(_as_prediction(predictions, q.index), q.choices) == q.answer)
            for q in rows
        }
    )


def infer_letter(prediction: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter a prediction means, "Z" for none of the options, None if unclear.

    Args:
        prediction: What the model wrote.
        choices: Option texts by letter.

    Source: VLMEvalKit, exact-matching mode.
    """
    if API_FAILURE in prediction:
        return None
    if any(refusal in prediction for refusal in REFUSALS):
        return "Z"
    return (
        _letter_among_words(prediction, choices)
        or _letter_in_bold(prediction, choices)
        or _letter_of_text(prediction, choices)
    )


def report(questions: Sequence[Question], hits: Mapping[int, int]) -> dict[str, dict[str, float]]:
    """Return means in 0..1 by split: overall, by l2-category (abbreviated) and by category."""
    by_split: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        if question.index not in hits:
            continue
        l2_category = question.l2_category
        for key in (
            "Overall",
            CATEGORY_ABBREVIATIONS.get(l2_category, l2_category),
            question.category,
        ):
            by_split[question.split][key].append(hits[question.index])
    return {
        split: {key: sum(values) / len(values) for key, values in groups.items()}
        for split, groups in by_split.items()
    }


def chance_vanilla(questions: Sequence[Question]) -> float:
    """Return the expected share of right rows in 0..1 when displayed letters are guessed."""
    return _mean(_chance(question) for question in questions)


def chance_circular(questions: Sequence[Question]) -> float:
    """Return the expected share of hit main rows in 0..1 when every rotation is guessed."""
    products: dict[int, float] = defaultdict(lambda: 1.0)
    for question in questions:
        products[question.group] *= _chance(question)
    return _mean(products[question.group] for question in questions if question.is_main)


def _round(question: Question, options: Sequence[str], shift: int) -> Round:
    letters = LETTERS[: len(options)]
    shifted = (*options[shift:], *options[:shift])
    prompt = question.question
    if question.hint is not None and question.hint.lower() not in ("nan", "none"):
        prompt = f"{question.hint}\n{prompt}"
    for letter, option in zip(letters, shifted, strict=True):
        prompt += f"\n{letter}. {option}"
    return Round(
        question=question,
        round_id=shift,
        prompt=prompt,
        options=shifted,
        option_letters=(*letters[shift:], *letters[:shift]),
    )


def _as_prediction(predictions: Mapping[int, str], index: int) -> str:
    # The scorers read the upload file, from which an absent value comes back as "nan".
    prediction = predictions.get(index, "")
    return "nan" if prediction in ABSENT else prediction


def _circular(questions: Sequence[Question], row_hits: Mapping[int, int]) -> GroupScore:
    groups: dict[int, int] = defaultdict(lambda: 1)
    for question in questions:
        groups[question.group] &= row_hits[question.index]
    return GroupScore({q.index: groups[q.index] for q in questions if q.is_main})


def _letter_among_words(prediction: str, choices: Mapping[str, str]) -> str | None:
    words = prediction.translate(_SEPARATORS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    return None


def _letter_in_bold(prediction: str, choices: Mapping[str, str]) -> str | None:
    match = _BOLD_LETTER.search(prediction)
    letter = match.group(1).upper() if match else None
    return letter if letter in choices else None


def _letter_of_text(prediction: str, choices: Mapping[str, str]) -> str | None:
    prediction = prediction.lower()
    if len(prediction) > 2 * sum(len(option) for option in choices.values()):
        return None
    found = [letter for letter, option in choices.items() if option.lower() in prediction]
    return found[0] if len(found) == 1 else None


def _chance(question: Question) -> float:
    options = displayed_options(question)
    return 1 / len(options) if options else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _check_header(header: Sequence[str], path: Path) -> list[str]:
    missing = [column for column in REQUIRED_COLUMNS if column not in header]
    if missing:
        raise InputError(
            "Missing column",
            f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(header) or 'none'}",
            "Give the official table with answers, tab-separated, with a header line.",
        )
    return list(header)


def _as_row(
    header: Sequence[str], cells: Sequence[str], path: Path, number: int
) -> dict[str, str | None]:
    if len(cells) != len(header):
        raise InputError(
            "Bad row",
            f"{path}, line {number}: {len(cells)} fields in place of {len(header)}",
            "Separate fields by single tabs, and quote fields that hold tabs or line breaks.",
        )
    return {
        column: None if cell in ABSENT else cell for column, cell in zip(header, cells, strict=True)
    }


def _resolve_pictures(
    rows: Sequence[tuple[int, Mapping[str, str | None]]], path: Path
) -> dict[int, str]:
    """Return the base64 picture of every row by index, references followed, texts shared."""
    given: dict[int, str] = {}
    shared: dict[str, str] = {}
    for number, row in rows:
        where = f"{path}, line {number}"
        index = _parse_index(row, where)
        if index in given:
            raise InputError("Repeated index", f"{where}: index {index} again", "Number rows once.")
        image = row["image"]
        if image is None:
            raise InputError("No picture", f"{where}, field image is empty", "Give base64 data.")
        given[index] = shared.setdefault(image, image)
    resolved = {}
    for (number, _), (index, image) in zip(rows, given.items(), strict=True):
        if len(image) <= _LONGEST_REFERENCE and image.isdecimal():
            image = _follow_reference(int(image), given, f"{path}, line {number}")
        resolved[index] = image
    checked: set[str] = set()
    for (number, _), image in zip(rows, resolved.values(), strict=True):
        if image not in checked:
            _check_base64(image, f"{path}, line {number}")
            checked.add(image)
    return resolved


def _parse_index(row: Mapping[str, str | None], where: str) -> int:
    text = row["index"] or ""
    if not text.isdecimal():
        raise InputError(
            "Bad index", f"{where}, field index: {text!r} is not a number", "Use whole numbers."
        )
    return int(text)


def _follow_reference(index: int, given: Mapping[int, str], where: str) -> str:
    image = given.get(index, "")
    if len(image) <= _LONGEST_REFERENCE:
        raise InputError(
            "No picture",
            f"{where}, field image refers to index {index}, which holds no picture",
            "Give base64 data, or the index of a row that has it.",
        )
    return image


def _check_base64(image: str, where: str) -> None:
    try:
        base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            "Bad picture", f"{where}, field image is not base64: {error}", "Encode it again."
        ) from error


def _parse_question(row: dict[str, str | None], image: str, where: str) -> Question:
    question = Question(
        index=_parse_index(row, where),
        question=row["question"] or "nan",
        hint=row.get("hint"),
        options=tuple(row.get(letter) for letter in LETTERS),
        answer=row["answer"] or "",
        category=row["category"] or "nan",
        l2_category=row["l2-category"] or "nan",
        split=row.get("split") or "none",
        image=image,
        row={**row, "image": ""},
    )
    if question.answer not in tuple(LETTERS):
        raise InputError(
            "No answer",
            f"{where}, field answer: {question.answer!r} is not one of A, B, C, D",
            "Only a table with answers can be scored.",
        )
    return question
