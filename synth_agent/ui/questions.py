"""Answered questions, read from the predictions file that `mgm.evaluate` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synth_agent.errors import InvalidInput


@dataclass(frozen=True)
class Question:
    """One answered question of a benchmark."""

    id: str
    benchmark: str
    category: str
    picture: str
    """Path of the picture, or empty when it is inside the benchmark's own file."""
    question: str
    """The whole prompt; its first line is the question itself for most."""
    answers: tuple[str, ...]
    prediction: str
    score: float
    """0 to 1."""
    parent_score: float | None = None
    """The same question's score in the parent run."""

    @property
    def is_right(self) -> bool:
        return self.score >= 0.5

    @property
    def is_changed(self) -> bool:
        """Whether the parent run did better or worse here."""
        return self.parent_score is not None and abs(self.parent_score - self.score) > 1e-9


def read_questions(path: Path, benchmark: str) -> list[Question]:
    """Read a predictions file.

    Raises:
        InvalidInput: If a line is not the record of an answered question.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        for count, line in enumerate(lines, start=1):
            try:
                found.append(_question(json.loads(line), benchmark))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput(
                    "Predictions cannot be read",
                    f"{path}:{count}: {error!r}",
                    "evaluate the run again: synth-agent resume RUN",
                ) from error
    return found


def _question(record: Mapping[str, Any], benchmark: str) -> Question:
    """Read one line of `mgm.evaluate`'s predictions file."""
    answers = record["answers"] if "answers" in record else [record["answer"]]
    return Question(
        id=str(record["key"]),
        benchmark=benchmark,
        category=str(record["category"] or ""),
        picture=str(record["image"]) if benchmark == "textvqa" else "",
        question=str(record["prompt"]),
        answers=tuple(str(answer) for answer in answers),
        prediction=str(record["prediction"]),
        score=float(record["score"]),
    )
