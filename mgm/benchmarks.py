"""What a benchmark asks, which pictures it shows, and how its answers are scored and written.

Puts `mgm.textvqa` and `mgm.mmbench` behind one interface for `mgm.evaluate`. It opens question
files and pictures and writes the competition kit's answer files; it never sees a model.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Protocol

from PIL import Image

from mgm import mmbench, textvqa
from mgm.data import UNREADABLE
from mgm.errors import InputError
from mgm.files import write_atomically

SCORER_VERSION = "1"
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Item:
    """One question: what is put to the model after the picture, and the picture's key."""

    text: str
    image: str


@dataclass(frozen=True)
class Result:
    """Scores of all predictions of one benchmark.

    `chance_percent` is what answering without looking gives. `categories` maps a name to its
    score in percent and its number of questions. `metrics` are further scores in percent.
    """

    metric: str
    score_percent: float
    chance_percent: float
    categories: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]


class Benchmark(Protocol):
    """A set of questions about pictures."""

    name: str
    split: str
    scorer: ModuleType
    items: Sequence[Item]

    def picture(self, key: str) -> Image.Image:
        """Open a picture."""

    def prediction_lines(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Return a line of the predictions file for every answer, in the order of the items.

        `key` names a question uniquely and equally in all runs; `score` is in 0..1.
        """

    def score(self, answers: Sequence[str]) -> Result:
        """Score one answer to every item."""

    def write_kit_files(self, folder: Path, answers: Sequence[str], model_id: str) -> None:
        """Write the answer files of the competition kit."""


class TextVQA:
    """TextVQA questions with their annotations.

    Args:
        questions: Question file (.jsonl), or the annotation file itself.
        images: Folder with the pictures.
        annotations: Annotation file; may be None when `questions` is one.
        ocr_tokens: File with OCR tokens, used when prompts are made from annotations.

    Raises:
        InputError: a bad file, a question without annotation, or a missing picture.
    """

    name: str = "textvqa"
    scorer: ModuleType = textvqa

    def __init__(
        self,
        questions: Path,
        images: Path,
        annotations: Path | None = None,
        ocr_tokens: Path | None = None,
    ) -> None:
        self._folder = images
        is_question_file = questions.suffix == ".jsonl"
        if is_question_file and annotations is None:
            raise InputError(
                "No annotations",
                f"{questions} is a question file and holds no answers",
                "Name the annotation JSON with --annotations.",
            )
        entries = textvqa.read_annotations(annotations or questions)
        if is_question_file:
            asked = textvqa.read_questions(questions)
        else:
            tokens = None if ocr_tokens is None else textvqa.read_ocr_tokens(ocr_tokens)
            asked = [self._with_suffix(q) for q in textvqa.build_questions(entries, tokens)]
        index = textvqa.index_annotations(entries)
        self._questions = asked
        self._annotations = [textvqa.annotation_of(question, index) for question in asked]
        self._keys = _unique_keys(asked)
        self._check_pictures(questions)
        self.split = ", ".join(sorted({entry.split for entry in self._annotations}))
        self.items: Sequence[Item] = [Item(question.text, question.image) for question in asked]

    def picture(self, key: str) -> Image.Image:
        """Open a picture of the folder."""
        path = self._folder / key
        return _open_picture(path.read_bytes, str(path))

    def prediction_lines(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Return a line for every answer."""
        rows = zip(self._keys, self._questions, self._annotations, answers, strict=True)
        return [
            {
                "key": key,
                "question_id": question.question_id,
                "image": question.image,
                "prompt": question.text,
                "prediction": answer,
                "answers": list(annotation.answers),
                "score": textvqa.accuracy(answer, annotation.answers),
                "category": question.category,
            }
            for key, question, annotation, answer in rows
        ]

    def score(self, answers: Sequence[str]) -> Result:
        """Score by the mean accuracy over all questions."""
        lines = self.prediction_lines(answers)
        return Result(
            metric="vqa_accuracy",
            score_percent=_percent([line["score"] for line in lines]),
            chance_percent=100
            * textvqa.chance_accuracy([entry.answers for entry in self._annotations]),
            categories=_by_category((line["category"], line["score"]) for line in lines),
            metrics={},
        )

    def write_kit_files(self, folder: Path, answers: Sequence[str], model_id: str) -> None:
        """Write `bm1.jsonl`."""
        pairs = zip(self._questions, answers, strict=True)
        write_lines(
            folder / "bm1.jsonl",
            [
                textvqa.answer_line(question, answer, _answer_id(model_id, number), model_id)
                for number, (question, answer) in enumerate(pairs)
            ],
        )

    def _with_suffix(self, question: textvqa.Question) -> textvqa.Question:
        stem = question.question_id
        for suffix in IMAGE_SUFFIXES:
            if (self._folder / (stem + suffix)).is_file():
                return replace(question, image=stem + suffix)
        return question

    def _check_pictures(self, questions: Path) -> None:
        for number, question in enumerate(self._questions, start=1):
            where = f"{questions}, question {number}, field image"
            path = PurePosixPath(question.image)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(
                    "Picture outside the folder",
                    f"{where}: {question.image!r}",
                    "Name pictures relative to the folder of --images.",
                )
            if not (self._folder / path).is_file():
                raise InputError(
                    "Missing picture",
                    f"{where}: {self._folder / path} does not exist",
                    "Check --images, or fetch the benchmark's pictures.",
                )


class MMBench:
    """MMBench rows with their pictures.

    Args:
        questions: The benchmark's table.
        language: Language of the request for a letter, "en" or "cn".

    Raises:
        InputError: a bad table.
    """

    name: str = "mmbench"
    scorer: ModuleType = mmbench

    def __init__(self, questions: Path, language: str = "en") -> None:
        self._file = questions
        self._questions = mmbench.read_questions(questions)
        self._rounds = [mmbench.rounds(question)[0] for question in self._questions]
        self._keys = [mmbench.picture_key(question) for question in self._questions]
        self._shown = dict(zip(self._keys, self._questions, strict=True))
        self.split = ", ".join(sorted({question.split for question in self._questions}))
        self.items: Sequence[Item] = [
            Item(asked.model_text(language), key)
            for asked, key in zip(self._rounds, self._keys, strict=True)
        ]

    def picture(self, key: str) -> Image.Image:
        """Decode a picture of the table."""
        question = self._shown[key]
        where = f"{self._file}, index {question.index}, field image"
        return _open_picture(lambda: mmbench.decode_picture(question), where)

    def prediction_lines(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """Return a line for every answer; `score` is the row's own exact match."""
        hits = mmbench.exact_vanilla(self._questions, self._by_index(answers)).hits
        rows = zip(self._rounds, self._keys, answers, strict=True)
        return [
            {
                "key": str(asked.question.index),
                "question_id": asked.question.index,
                "group": asked.question.group,
                "image": key,
                "prompt": asked.prompt,
                "prediction": answer,
                "answer": asked.question.answer,
                "score": float(hits[asked.question.index]),
                "category": asked.question.category,
                "l2_category": asked.question.l2_category,
            }
            for asked, key, answer in rows
        ]

    def score(self, answers: Sequence[str]) -> Result:
        """Score by the kit's circular exact match, other ways of scoring beside it."""
        questions, predictions = self._questions, self._by_index(answers)
        circular = mmbench.exact_circular(questions, predictions)
        by_index = {question.index: question for question in questions}
        pairs = [(by_index[index], float(hit)) for index, hit in circular.hits.items()]
        inferred = mmbench.inferred_vanilla
        return Result(
            metric="circular_exact_match",
            score_percent=circular.percent,
            chance_percent=100 * mmbench.chance_circular(questions),
            categories=_by_category(
                [(question.category, hit) for question, hit in pairs]
                + [(f"l2: {question.l2_category}", hit) for question, hit in pairs]
            ),
            metrics={
                "vanilla_percent": mmbench.exact_vanilla(questions, predictions).percent,
                "vanilla_chance_percent": 100 * mmbench.chance_vanilla(questions),
                "vlmevalkit_circular_percent": mmbench.inferred_circular(
                    questions, predictions
                ).percent,
                "vlmevalkit_vanilla_percent": inferred(questions, predictions).percent,
                "vlmevalkit_vanilla_0_percent": inferred(
                    questions, predictions, first_only=True
                ).percent,
            },
        )

    def write_kit_files(self, folder: Path, answers: Sequence[str], model_id: str) -> None:
        """Write the answers file and the upload file, in the kit's folders."""
        split = self._file.stem
        pairs = zip(self._rounds, answers, strict=True)
        write_lines(
            folder / "answers" / split / f"{model_id}.jsonl",
            [
                mmbench.answer_line(asked, answer, _answer_id(model_id, number), model_id)
                for number, (asked, answer) in enumerate(pairs)
            ],
        )
        columns = set(self._questions[0].row)
        # The kit makes no upload file from a table without the columns it drops.
        if columns.issuperset(mmbench.COLUMNS_NOT_UPLOADED):
            mmbench.write_upload(
                folder / "answers_upload" / split / f"{model_id}.xlsx",
                self._questions,
                self._by_index(answers),
            )

    def _by_index(self, answers: Sequence[str]) -> dict[int, str]:
        return {
            question.index: answer
            for question, answer in zip(self._questions, answers, strict=True)
        }


def scorer_fingerprint(scorer: ModuleType) -> dict[str, str]:
    """Return name, version and the sha256 of a scorer's source."""
    source = Path(str(scorer.__file__)).read_bytes()
    return {
        "name": scorer.__name__,
        "version": SCORER_VERSION,
        "sha256": hashlib.sha256(source).hexdigest(),
    }


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def _open_picture(read: Callable[[], bytes], where: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(read()))
        picture.load()
    except UNREADABLE as error:
        reason = str(error) or "out of memory"
        raise InputError(
            "Unreadable picture", f"{where}: {reason}", "Fetch the picture again."
        ) from error
    return picture


def _unique_keys(questions: Sequence[textvqa.Question]) -> list[str]:
    """Name every question by picture and wording; a repeated question gets a number."""
    seen: dict[str, int] = defaultdict(int)
    keys = []
    for question in questions:
        key = f"{question.question_id}/{textvqa.recover_question(question.text)}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def _answer_id(model_id: str, number: int) -> str:
    # The kit draws these at random; a derived id keeps equal runs equal byte for byte.
    return hashlib.sha256(f"{model_id}/{number}".encode()).hexdigest()[:22]


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _by_category(pairs: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for category, score in pairs:
        groups[category].append(score)
    return {
        category: {"score_percent": _percent(scores), "num_questions": len(scores)}
        for category, scores in sorted(groups.items())
    }
