"""How much of the training data is in the evaluation sets, by pictures and by texts.

A picture counts as equal when its bytes are, and as near when its 64-bit difference hash is at most
four bits away (flat pictures, whose hash says nothing, are compared by bytes only). A text counts when
it shares eight words in a row with a question or an answer, or when one of its sentences, or several in
a row, are a whole question. Words are compared in lower case without punctuation.

Owns the results in `artifacts/contamination/`, kept under digests of what was compared.

Source: eight words in a row are the unit of Chowdhery et al., "PaLM" (2022), section 8; one match is
enough here, where PaLM asks for 70 % of a question.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synth_agent.data import DJ_IMAGE_MARKER, END_OF_CHUNK, PLAIN_IMAGE_MARKER, atomic_file
from synth_agent.evaluation_sets import EvaluationSet
from synth_agent.pictures import PictureHash, hash_files, near_hashes
from synth_agent.runs import digest
from synth_agent.statistics import PICTURE_HASHES, StatisticsTable, column_spec
from synth_agent.wording import benchmark_name
from synth_agent.workspace import Workspace

NEAR_BITS = 4
WORDS_IN_A_ROW = 8
RULES = 3
"""Counts changes of the rules; results under another number are computed again."""
_NAMED = 10
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"[\n.?!\u3002]|\[\[[a-zA-Z]*\]\]:")
_MARKERS = (DJ_IMAGE_MARKER, PLAIN_IMAGE_MARKER, END_OF_CHUNK)


@dataclass(frozen=True)
class TrainingSample:
    """What is compared of a sample."""

    id: str
    text: str
    images: tuple[str, ...]
    """Paths relative to the image folder."""


@dataclass(frozen=True)
class Overlap:
    """What training data shares with one evaluation set."""

    benchmark: str
    evaluation_pictures: int
    questions: int
    samples: int
    pictures: int
    """Distinct training pictures that were compared."""
    unread_pictures: int
    """Training pictures that could not be read."""
    equal_pictures: int
    near_pictures: int
    """Training pictures that are near and not equal."""
    texts: int
    """Samples whose text matches."""
    flagged_samples: int
    """Samples with an equal or near picture or a matching text."""
    examples: tuple[str, ...]
    """Ids of the first flagged samples."""
    unread_evaluation_pictures: int = 0
    """Pictures of the evaluation set that could not be read, and so were compared with nothing."""

    def short(self) -> str:
        """Return how much is equal or near, in a few words."""
        pictures = self.equal_pictures + self.near_pictures
        name = benchmark_name(self.benchmark)
        return f"in {name}: {pictures:,} pictures, {self.texts:,} texts{self._not_compared()}"

    def line(self) -> str:
        """Return the overlap as one line."""
        unread = f", {self.unread_pictures:,} pictures unread" if self.unread_pictures else ""
        return (
            f"{benchmark_name(self.benchmark)}: {self.equal_pictures:,} equal and "
            f"{self.near_pictures:,} near of {self.pictures:,} pictures, {self.texts:,} matching "
            f"texts of {self.samples:,}{unread}{self._not_compared()}"
        )

    def _not_compared(self) -> str:
        """Return how many pictures nothing was compared with, as nothing equals those."""
        unread = self.unread_evaluation_pictures
        if not unread:
            return ""
        return f"; {unread:,} of {self.evaluation_pictures + unread:,} evaluation pictures unread"


def known_hashes(table: StatisticsTable | None) -> dict[str, PictureHash]:
    """Return the hashes of an analysed seed set's pictures by their paths; empty without them."""
    spec = column_spec(PICTURE_HASHES, {}, str)
    if table is None or spec is None or not table.has(spec):
        return {}
    digests, hashes = table.values(spec, "image_digest"), table.values(spec, "image_dhash")
    found: dict[str, PictureHash] = {}
    for position, row in enumerate(table.rows(range(table.num_rows))):
        if not row.images or not hashes.known[position]:
            continue
        made = str(digests.at(position)).split(), str(hashes.at(position)).split()
        for image, content, dhash in zip(row.images, *made, strict=True):
            found[image] = PictureHash(content, int(dhash, 16))
    return found


def overlaps(
    workspace: Workspace,
    samples: Sequence[TrainingSample],
    data_key: str,
    sets: Sequence[EvaluationSet],
    images: Callable[[], Mapping[str, PictureHash]],
) -> list[Overlap]:
    """Return the overlap with each evaluation set, computed once for a data set.

    Args:
        workspace: Keeps the results.
        samples: The training data.
        data_key: Names the content of the training data, pictures included.
        sets: Evaluation sets.
        images: Returns the hashes of the training pictures by path; called when they are needed.
    """
    found = []
    hashes: Mapping[str, PictureHash] | None = None
    for evaluation in sets:
        file = _file(workspace, data_key, evaluation)
        known = _read(file)
        if known is None:
            hashes = images() if hashes is None else hashes
            known = overlap(samples, hashes, evaluation)
            with atomic_file(file) as output:
                json.dump(asdict(known), output, indent=1)
                output.write("\n")
        found.append(known)
    return found


def known_overlaps(
    workspace: Workspace, data_key: str, sets: Sequence[EvaluationSet]
) -> list[Overlap] | None:
    """Return the overlaps that were computed before, None when one of them was not."""
    found = [_read(_file(workspace, data_key, evaluation)) for evaluation in sets]
    complete = [overlap for overlap in found if overlap is not None]
    return complete if len(complete) == len(found) else None


def training_hashes(
    samples: Iterable[TrainingSample],
    root: Path,
    known: Mapping[str, PictureHash],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, PictureHash]:
    """Return the hashes of all pictures that can be read; only unknown ones are opened.

    Args:
        samples: The training data.
        root: Image folder.
        known: Hashes by path.
        report: Called with the pictures done and all that are opened.
    """
    unknown = unknown_pictures(samples, known)
    return {**known, **hash_files({image: root / image for image in unknown}, report)}


def unknown_pictures(
    samples: Iterable[TrainingSample], known: Mapping[str, PictureHash]
) -> list[str]:
    """Return the paths of the pictures without a hash, each once."""
    every = dict.fromkeys(image for sample in samples for image in sample.images)
    return [image for image in every if image not in known]


def overlap(
    samples: Sequence[TrainingSample],
    hashes: Mapping[str, PictureHash],
    evaluation: EvaluationSet,
) -> Overlap:
    """Return what samples share with an evaluation set."""
    every = list(dict.fromkeys(image for sample in samples for image in sample.images))
    named = [image for image in every if image in hashes]
    contents = {picture.digest for picture in evaluation.pictures}
    equal = {image for image in named if hashes[image].digest in contents}
    structured = [i for i in named if i not in equal and not hashes[i].is_flat]
    references = [picture.dhash for picture in evaluation.pictures if not picture.is_flat]
    hits = near_hashes([hashes[image].dhash for image in structured], references, NEAR_BITS)
    near = {image for image, hit in zip(structured, hits, strict=True) if hit}
    matches = Matcher(evaluation.questions, evaluation.answers)
    texts = {text: matches(text) for text in {sample.text for sample in samples}}
    suspects = equal | near
    flagged = [s.id for s in samples if texts[s.text] or not suspects.isdisjoint(s.images)]
    return Overlap(
        evaluation.name,
        len(evaluation.pictures),
        len(evaluation.questions),
        len(samples),
        len(named),
        len(every) - len(named),
        len(equal),
        len(near),
        sum(texts[sample.text] for sample in samples),
        len(flagged),
        tuple(flagged[:_NAMED]),
        evaluation.missing_pictures,
    )


class Matcher:
    """Tells whether a text shares eight words in a row, or a whole question, with given texts."""

    def __init__(self, questions: Sequence[str], answers: Iterable[str]) -> None:
        asked = [_words(question) for question in questions]
        self._questions = {" ".join(words) for words in asked if words}
        # A question may hold a full stop itself ("Dr.", "3.5"), and then is several sentences here.
        # Those of eight words and more are found by their words.
        short = (
            q for q, words in zip(questions, asked, strict=True) if len(words) < WORDS_IN_A_ROW
        )
        self._most_sentences = max((len(_sentences(question)) for question in short), default=0)
        told = (_words(answer) for answer in answers)
        self._runs = {run for words in (*asked, *told) for run in _runs(words)}

    def __call__(self, text: str) -> bool:
        for marker in _MARKERS:
            text = text.replace(marker, " ")
        if any(run in self._runs for run in _runs(_words(text))):
            return True
        sentences = _sentences(text)
        return any(
            " ".join(sentences[start:stop]) in self._questions
            for start in range(len(sentences))
            for stop in range(start + 1, min(start + self._most_sentences, len(sentences)) + 1)
        )


def _sentences(text: str) -> list[str]:
    """Return the words of each sentence that has any."""
    # Full-width marks are ends of sentences in their plain form.
    parts = _SENTENCE_END.split(unicodedata.normalize("NFKC", text))
    return [" ".join(words) for part in parts if (words := _words(part))]


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _runs(words: Sequence[str]) -> Iterator[str]:
    for start in range(len(words) - WORDS_IN_A_ROW + 1):
        yield " ".join(words[start : start + WORDS_IN_A_ROW])


def _file(workspace: Workspace, data_key: str, evaluation: EvaluationSet) -> Path:
    key = digest({"data": data_key, "evaluation": evaluation.key, "rules": RULES})[:24]
    return workspace.artifacts / "contamination" / f"overlap-{key}.json"


def _read(path: Path) -> Overlap | None:
    try:
        raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return Overlap(**{**raw, "examples": tuple(raw["examples"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
