"""The evaluation sets as training data is compared with them: pictures' hashes, questions, answers.

Reads the files that `evaluate` in `synth.yaml` names. What was read is kept in
`artifacts/contamination/` under a digest of the files, so that pictures are hashed once.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mgm.errors import InputError
from mgm.textvqa import recover_question
from synth_agent.data import atomic_file
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.pictures import UNREADABLE, PictureHash, hash_bytes, hash_files
from synth_agent.wording import BENCHMARK_NAMES
from synth_agent.workspace import Workspace

FORMAT = 2
"""Counts changes of what is kept; files of another one are made again."""
_LONGEST_REFERENCE = 64
"""A picture of MMBench that is shorter is the index of the row that holds it."""
_OPTIONS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class EvaluationSet:
    """One benchmark's pictures and texts."""

    name: str
    key: str
    """Digest of the files that it was read from."""
    pictures: tuple[PictureHash, ...]
    questions: tuple[str, ...]
    """Distinct, as they are written."""
    answers: tuple[str, ...]
    """Distinct answers and options."""
    missing_pictures: int
    """Pictures that the questions name and that cannot be read."""


def evaluation_sets(
    workspace: Workspace, settings: Mapping[str, Any], digests: Digests
) -> list[EvaluationSet]:
    """Return the evaluation sets that settings name.

    Args:
        workspace: Paths are relative to its root.
        settings: The section `evaluate`.
        digests: Remembers what files hold.

    Raises:
        InvalidInput: A file of questions is missing or cannot be read.
    """
    return [
        _remembered(workspace, name, settings[name], digests)
        for name in BENCHMARK_NAMES
        if name in settings
    ]


def _remembered(
    workspace: Workspace, name: str, section: Mapping[str, Any], digests: Digests
) -> EvaluationSet:
    questions, pictures = _files(workspace, name, section)
    total = hashlib.sha256(f"{FORMAT}\0{name}\0".encode())
    for path in questions:
        total.update(digests.path(path).encode())
    for picture, path in pictures.items():
        content = digests.path(path) if path.is_file() else "missing"
        total.update(f"\0{picture}\0{content}".encode())
    key = total.hexdigest()[:24]
    file = workspace.artifacts / "contamination" / f"evaluation-{key}.json"
    try:
        return _loaded(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    made = _mmbench(key, questions[0]) if name == "mmbench" else _textvqa(key, questions, pictures)
    with atomic_file(file) as output:
        json.dump(asdict(made), output)
    return made


def _loaded(raw: Mapping[str, Any]) -> EvaluationSet:
    return EvaluationSet(
        raw["name"],
        raw["key"],
        tuple(PictureHash(one["digest"], one["dhash"]) for one in raw["pictures"]),
        tuple(raw["questions"]),
        tuple(raw["answers"]),
        raw["missing_pictures"],
    )


def _files(
    workspace: Workspace, name: str, section: Mapping[str, Any]
) -> tuple[list[Path], dict[str, Path]]:
    """Return the files of questions, and the pictures that are files of their own."""
    if name == "mmbench":
        return [workspace.path(section["questions"])], {}
    annotations, folder = workspace.path(section["annotations"]), workspace.path(section["images"])
    if section["questions"] is None:
        names = [f"{entry.get('image_id')}.jpg" for entry in _annotations(annotations)]
        return [annotations], {name: folder / name for name in dict.fromkeys(names)}
    questions = workspace.path(section["questions"])
    names = [str(entry.get("image")) for entry in _json_lines(questions)]
    return [questions, annotations], {name: folder / name for name in dict.fromkeys(names)}


def _textvqa(key: str, files: list[Path], pictures: Mapping[str, Path]) -> EvaluationSet:
    entries = _annotations(files[-1])
    if len(files) > 1:
        asked = [_question_of(str(entry.get("text", ""))) for entry in _json_lines(files[0])]
    else:
        asked = [str(entry.get("question", "")) for entry in entries]
    answers = [str(answer) for entry in entries for answer in entry.get("answers") or ()]
    hashes = hash_files(pictures)
    return EvaluationSet(
        "textvqa",
        key,
        tuple(hashes.values()),
        tuple(dict.fromkeys(asked)),
        tuple(dict.fromkeys(answers)),
        len(pictures) - len(hashes),
    )


def _question_of(prompt: str) -> str:
    """Return a prompt's question, without the OCR tokens and the instruction around it."""
    try:
        return recover_question(prompt)
    except InputError:
        return prompt.split("\n")[0]


def _mmbench(key: str, path: Path) -> EvaluationSet:
    questions: dict[str, None] = {}
    answers: dict[str, None] = {}
    encoded: dict[str, None] = {}
    for row in _table(path):
        questions[row.get("question") or ""] = None
        answers.update((row[option], None) for option in _OPTIONS if row.get(option))
        image = row.get("image") or ""
        if len(image) > _LONGEST_REFERENCE:
            encoded[image] = None
    hashes = []
    for image in encoded:
        try:
            hashes.append(hash_bytes(base64.b64decode(image, validate=True)))
        except (binascii.Error, *UNREADABLE):
            continue
    return EvaluationSet(
        "mmbench",
        key,
        tuple({one.digest: one for one in hashes}.values()),
        tuple(questions),
        tuple(answers),
        len(encoded) - len(hashes),
    )


def _annotations(path: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(path.read_bytes())["data"]
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, "no JSON object with a list `data`") from error
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise _unreadable(path, "no JSON object with a list `data`")
    return data


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # Texts may hold what `splitlines` takes for the end of a line.
        lines = path.read_text("utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise _unreadable(path, f"line {number} is not an object")
                yield entry
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except ValueError as error:
        raise _unreadable(path, str(error)) from error


def _table(path: Path) -> Iterator[dict[str, str]]:
    # Pictures are single fields of any length.
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> InvalidInput:
    return InvalidInput(
        "Cannot read evaluation set", f"{path}: {why}", "check the section evaluate of synth.yaml"
    )
