"""TextVQA: question files, prompts, answer normalisation and the ten-answer accuracy.

Owns the benchmark's protocol. The scoring functions are pure; only the functions whose names start
with `read_` open files. Answering the questions is the work of `mgm.evaluate`.

Source: Singh et al., "Towards VQA Models That Can Read" (2019), with the accuracy of Antol et al.,
"VQA: Visual Question Answering" (2015), as the public TextVQA evaluator computes it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm.errors import InputError

INSTRUCTION = "Answer the question using a single word or phrase."
OCR_MARKER = "Reference OCR token: "
NUM_ANSWERS = 10

NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = (
    *(";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<"),
    *("@", "`", ",", "?", "!"),
)
# The public evaluator passes a regex flag in the place of the substitution count.
MAX_PERIODS_REMOVED = 32
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")

CONTRACTIONS = {
    "aint": "ain't",
    "arent": "aren't",
    "cant": "can't",
    "couldve": "could've",
    "couldnt": "couldn't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "didnt": "didn't",
    "doesnt": "doesn't",
    "dont": "don't",
    "hadnt": "hadn't",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hasnt": "hasn't",
    "havent": "haven't",
    "hed": "he'd",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "hes": "he's",
    "howd": "how'd",
    "howll": "how'll",
    "hows": "how's",
    "Id've": "I'd've",
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
    "isnt": "isn't",
    "itd": "it'd",
    "itd've": "it'd've",
    "it'dve": "it'd've",
    "itll": "it'll",
    "let's": "let's",
    "maam": "ma'am",
    "mightnt": "mightn't",
    "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've",
    "mightve": "might've",
    "mustnt": "mustn't",
    "mustve": "must've",
    "neednt": "needn't",
    "notve": "not've",
    "oclock": "o'clock",
    "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shant": "shan't",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "she's": "she's",
    "shouldve": "should've",
    "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "somebodyll": "somebody'll",
    "somebodys": "somebody's",
    "someoned": "someone'd",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "someonell": "someone'll",
    "someones": "someone's",
    "somethingd": "something'd",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "somethingll": "something'll",
    "thats": "that's",
    "thered": "there'd",
    "thered've": "there'd've",
    "there'dve": "there'd've",
    "therere": "there're",
    "theres": "there's",
    "theyd": "they'd",
    "theyd've": "they'd've",
    "they'dve": "they'd've",
    "theyll": "they'll",
    "theyre": "they're",
    "theyve": "they've",
    "twas": "'twas",
    "wasnt": "wasn't",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "weve": "we've",
    "werent": "weren't",
    "whatll": "what'll",
    "whatre": "what're",
    "whats": "what's",
    "whatve": "what've",
    "whens": "when's",
    "whered": "where'd",
    "wheres": "where's",
    "whereve": "where've",
    "whod": "who'd",
    "whod've": "who'd've",
    "who'dve": "who'd've",
    "wholl": "who'll",
    "whos": "who's",
    "whove": "who've",
    "whyll": "why'll",
    "whyre": "why're",
    "whys": "why's",
    "wont": "won't",
    "wouldve": "would've",
    "wouldnt": "wouldn't",
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "youd": "you'd",
    "youd've": "you'd've",
    "you'dve": "you'd've",
    "youll": "you'll",
    "youre": "you're",
    "youve": "you've",
}


@dataclass(frozen=True)
class Question:
    """One question as it is put to the model.

    `question_id` is the picture's id and not unique: several questions may share a picture.
    `image` is a file name relative to the image folder. `text` is the whole prompt text.
    """

    question_id: str
    image: str
    text: str
    category: str = "default"


@dataclass(frozen=True)
class Annotation:
    """The ten human answers to one question about one picture."""

    image_id: str
    question: str
    answers: tuple[str, ...]
    split: str = "val"


# Annotations by picture id and lower-cased question.
AnnotationIndex = Mapping[tuple[str, str], Annotation]


def read_questions(path: Path) -> list[Question]:
    """Read a question file: one JSON object a line with question_id, image, text, category.

    Raises:
        InputError: the file cannot be read, or a line is not such an object.
    """
    questions = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            questions.append(_parse_question(line, path, number))
    if not questions:
        raise InputError("No questions", f"{path} has no question", "Give a non-empty file.")
    return questions


def read_annotations(path: Path) -> list[Annotation]:
    """Read the official annotation JSON: `data[*]` with image_id, question and ten answers.

    Raises:
        InputError: the file cannot be read, or an entry lacks a field or has not ten answers.
    """
    entries = _read_data(path)
    return [_parse_annotation(entry, path, position) for position, entry in enumerate(entries)]


def read_ocr_tokens(path: Path) -> dict[str, list[str]]:
    """Read `data[*]` with image_id and ocr_tokens. The last entry of a picture counts.

    Raises:
        InputError: the file cannot be read, or an entry lacks a field.
    """
    tokens: dict[str, list[str]] = {}
    for position, entry in enumerate(_read_data(path)):
        where = f"{path}, data[{position}]"
        listed = entry.get("ocr_tokens")
        if not isinstance(listed, list):
            raise InputError(
                "No OCR tokens",
                f"{where}: field ocr_tokens is missing or not a list",
                "Give a file whose entries list ocr_tokens, or leave OCR tokens out.",
            )
        tokens[_required_text(entry, "image_id", where)] = [str(token) for token in listed]
    return tokens


def build_questions(
    annotations: Sequence[Annotation],
    ocr_tokens: Mapping[str, Sequence[str]] | None = None,
    image_suffix: str = ".jpg",
) -> list[Question]:
    """Make the question list from the annotations, in their order.

    Args:
        annotations: Questions with their picture ids.
        ocr_tokens: Tokens by picture id; None leaves the OCR line out of every prompt.
        image_suffix: Ending that turns a picture id into its file name.

    Raises:
        InputError: a question has a line break, so that it could not be recovered from its prompt.
    """
    questions = []
    for position, annotation in enumerate(annotations):
        if "\n" in annotation.question:
            raise InputError(
                "Question of several lines",
                f"data[{position}], field question: {annotation.question!r}",
                "Write the question on one line: it is matched by the first line of its prompt.",
            )
        tokens = None if ocr_tokens is None else ocr_tokens.get(annotation.image_id, ())
        questions.append(
            Question(
                question_id=annotation.image_id,
                image=annotation.image_id + image_suffix,
                text=prompt_text(annotation.question, tokens),
            )
        )
    return questions


def prompt_text(question: str, ocr_tokens: Sequence[str] | None = None) -> str:
    """Return the prompt text of a question: two lines, or three with OCR tokens."""
    lines = [question]
    if ocr_tokens is not None:
        lines.append(OCR_MARKER + ", ".join(" ".join(token.split()) for token in ocr_tokens))
    return "\n".join([*lines, INSTRUCTION])


def recover_question(prompt: str) -> str:
    """Return the lower-cased question that a prompt text asks.

    Raises:
        InputError: the prompt has none of the known layouts.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found is not None:
            return found.group(1).lower()
    elif OCR_MARKER in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_MARKER) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise InputError(
        "Unknown prompt layout",
        f"the question cannot be recovered from {prompt!r}",
        f"Use '<question>', optionally '{OCR_MARKER}...', and an instruction, a line each.",
    )


def index_annotations(annotations: Sequence[Annotation]) -> dict[tuple[str, str], Annotation]:
    """Index by picture id and lower-cased question; the last of equal keys counts."""
    return {(entry.image_id, entry.question.lower()): entry for entry in annotations}


def annotation_of(question: Question, index: AnnotationIndex) -> Annotation:
    """Return the annotation that belongs to a question.

    Raises:
        InputError: no annotation has this picture and this question.
    """
    asked = recover_question(question.text)
    annotation = index.get((question.question_id, asked))
    if annotation is None:
        raise InputError(
            "No annotation",
            f"question_id {question.question_id!r} with question {asked!r} is not annotated",
            "Use the annotation file that belongs to the question file.",
        )
    return annotation


def answer_line(question: Question, answer: str, answer_id: str, model_id: str) -> dict[str, Any]:
    """Return one line of the answer file (`bm1.jsonl`)."""
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer,
        "answer_id": answer_id,
        "model_id": model_id,
        "metadata": {},
    }


def normalize_answer(text: str) -> str:
    """Normalise an answer before comparison.

    Source: the answer processor of the public TextVQA evaluator, its deviations included: the
    intended look-behind before a period never applies, and at most 32 periods are removed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _normalize_words(_strip_punctuation(text))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy in 0..1 of a prediction against ten answers.

    With m matches among the nine others for each left-out answer: mean of min(1, m / 3).

    Raises:
        InputError: there are not exactly ten answers.
    """
    if len(answers) != NUM_ANSWERS:
        raise InputError(
            "Wrong number of answers",
            f"{len(answers)} answers in place of {NUM_ANSWERS}",
            "Every annotated question needs exactly ten answers.",
        )
    return accuracy_of_normalized(
        normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    )


def accuracy_of_normalized(prediction: str, answers: Sequence[str]) -> float:
    """Return `accuracy` of texts that are normalised already."""
    matches = [answer == prediction for answer in answers]
    total = sum(matches)
    scores = [min(1.0, (total - match) / 3) for match in matches]
    return sum(scores) / len(scores)


def chance_accuracy(answers: Sequence[Sequence[str]]) -> float:
    """Return the mean accuracy in 0..1 of the most frequent answer given to every question.

    Among equally frequent answers the one that is met first is taken.
    """
    normalized = [[normalize_answer(answer) for answer in group] for group in answers]
    counts = Counter(answer for group in normalized for answer in group)
    if not counts:
        return 0.0
    favourite = counts.most_common(1)[0][0]
    return sum(accuracy_of_normalized(favourite, group) for group in normalized) / len(normalized)


def _strip_punctuation(text: str) -> str:
    result = text
    comma_in_number = _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_word_edge or comma_in_number else " ")
    return _LOOSE_PERIOD.sub("", result, count=MAX_PERIODS_REMOVED)


def _normalize_words(text: str) -> str:
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("Not a text file", f"{path}: {error}", "Save it as UTF-8.") from error


def _read_data(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            "Not JSON", f"{path}, line {error.lineno}: {error.msg}", "Give the annotation JSON."
        ) from error
    entries = document.get("data") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            "No annotations",
            f"{path}: field data is missing, empty or not a list",
            'Give a JSON object whose "data" lists the questions.',
        )
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(
                "Bad annotation", f"{path}, data[{position}] is not an object", "Fix the entry."
            )
    return entries


def _parse_question(line: str, path: Path, number: int) -> Question:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError("Not JSON", f"{where}: {error.msg}", "Write one object a line.") from error
    if not isinstance(record, dict):
        raise InputError("Bad question", f"{where} is not a JSON object", "Fix the line.")
    return Question(
        question_id=_required_text(record, "question_id", where),
        image=_required_text(record, "image", where),
        text=_required_text(record, "text", where),
        category=str(record.get("category", "default")),
    )


def _parse_annotation(entry: dict[str, Any], path: Path, position: int) -> Annotation:
    where = f"{path}, data[{position}]"
    answers = entry.get("answers")
    if not isinstance(answers, list) or len(answers) != NUM_ANSWERS:
        found = f"{len(answers)} answers" if isinstance(answers, list) else "no list of answers"
        raise InputError(
            "Wrong number of answers",
            f"{where}, field answers: {found} in place of {NUM_ANSWERS}",
            "Every question needs exactly ten answers.",
        )
    if not all(isinstance(answer, str | int | float) for answer in answers):
        raise InputError(
            "Answers are no texts",
            f"{where}, field answers: {answers[0]!r}",
            "Give ten texts, as TextVQA does; VQA's own files hold an object for each answer.",
        )
    return Annotation(
        image_id=_required_text(entry, "image_id", where),
        question=_required_text(entry, "question", where),
        answers=tuple(str(answer) for answer in answers),
        split=str(entry.get("set_name") or "val"),
    )


def _required_text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise InputError(
            "Missing field",
            f"{where}, field {field}: expected a non-empty text, found {value!r}",
            f"Add {field}.",
        )
    return value
