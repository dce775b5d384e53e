"""Converting a data set from one file format to another, and proving that it comes back.

A file holds either samples (the competition's JSONL, or Parquet with the same fields) or LLaVA's JSON
array of conversations; what it is, is seen from its content, what it becomes, from its name. Samples
come in two styles: captions, whose questions are in LLaVA's file of the seed set, and dialogs, whose
texts say `[[human]]: ...` and `[[gpt]]: ...`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from synth_agent.data import (
    DJ_IMAGE_MARKER,
    IMAGE_MARKERS,
    PLAIN_IMAGE_MARKER,
    Record,
    Sample,
    dialogs_to_llava,
    image_marker,
    iter_records,
    llava_to_dj,
    read_llava,
    relative_image,
    restore_questions,
    samples_of,
    with_image_marker,
    write_llava,
    write_samples,
)
from synth_agent.errors import InvalidInput
from synth_agent.parquet import is_parquet, write_parquet

Kind = Literal["samples", "conversations"]


@dataclass(frozen=True)
class Options:
    """How to convert where the files leave a choice."""

    original: Path | None = None
    """LLaVA file with the question of each id; captions become conversations by it."""
    captions: bool = False
    """Make captions of conversations: the answers without their questions."""
    marker: str | None = None
    """Image marker of the samples that are written; None leaves that of samples as it is, and gives
    those made of conversations Data-Juicer's."""
    images: Path | None = None
    """Image folder that absolute paths are made relative to."""
    keep_ids: bool = False
    """Leave numeric ids as they are; Data-Juicer's converter makes them text."""


@dataclass(frozen=True)
class Conversion:
    """What was converted."""

    records: int
    source: Kind
    target: Kind
    marker: str | None
    """Image marker of the samples, None when no text has one."""
    changed: tuple[str, ...]
    """Ids of records that converting back does not give again as they were, other fields apart."""
    left_out: tuple[str, ...] = ()
    """Fields of the source that the target has no place for."""


def convert(source: Path, target: Path, options: Options) -> Conversion:
    """Convert a file and convert the result back in memory to see what was lost.

    Raises:
        InvalidInput: A record is bad, image markers are mixed or left inside an answer, questions
            are needed and not given, or the target's name tells no format.
    """
    _check_names(source, target)
    to_samples = target.suffix != ".json"
    if _holds_conversations(source):
        conversations = read_llava(source)
        if not to_samples:
            write_llava(target, conversations)
            return _unchanged(len(conversations), "conversations", None)
        samples = _as_samples(conversations, options)
        _write_samples(target, samples)
        changed = _conversations_changed(conversations, samples, options)
        marker = image_marker(samples)
        return Conversion(
            len(samples),
            "conversations",
            "samples",
            marker,
            changed,
            tuple(_other_fields(conversations)),
        )
    left_out: dict[str, None] = {}
    samples = _read_samples(source, options, left_out)
    marker = image_marker(samples)
    if to_samples:
        if options.marker is not None:
            samples = [with_image_marker(sample, options.marker) for sample in samples]
            marker = image_marker(samples)
        _write_samples(target, samples)
        return Conversion(len(samples), "samples", "samples", marker, (), tuple(left_out))
    conversations = _as_conversations(samples, marker, options)
    write_llava(target, conversations)
    changed = _samples_changed(samples, conversations, marker, options)
    return Conversion(len(samples), "samples", "conversations", marker, changed, tuple(left_out))


def _unchanged(records: int, kind: Kind, marker: str | None) -> Conversion:
    return Conversion(records, kind, kind, marker, ())


def _check_names(source: Path, target: Path) -> None:
    if target.suffix not in (".json", ".jsonl", ".parquet"):
        raise InvalidInput(
            "Unknown format",
            f"{target.name}: {target.suffix or 'no suffix'}",
            "name it *.json for LLaVA, *.jsonl or *.parquet for samples",
        )
    if source.resolve() == target.resolve():
        raise InvalidInput("Same file", str(source), "give the result another name")


def _holds_conversations(path: Path) -> bool:
    """Tell by its first character whether a file is LLaVA's array."""
    if is_parquet(path):
        return False
    try:
        with path.open("rb") as file:
            while block := file.read(4096):
                if block.strip():
                    return block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise InvalidInput(
            "Cannot read file", f"{path}: {error.strerror}", "check the path"
        ) from error
    return False


def _other_fields(conversations: Sequence[Record]) -> dict[str, None]:
    """Return the fields of conversations, and of their messages, that samples do not have."""
    found = {key: None for record in conversations for key in record}
    for record in conversations:
        found.update(
            (f"conversations.{key}", None)
            for message in record["conversations"]
            for key in message
            if key not in ("from", "value")
        )
    return {key: None for key in found if key not in ("id", "image", "conversations")}


def _noting_fields(
    records: Iterable[tuple[int, Record]], others: dict[str, None]
) -> Iterator[tuple[int, Record]]:
    """Yield records and add their fields that samples do not have to `others`."""
    for line, record in records:
        others.update((key, None) for key in record if key not in ("id", "images", "text"))
        yield line, record


def _read_samples(path: Path, options: Options, left_out: dict[str, None]) -> list[Sample]:
    records = _noting_fields(iter_records(path), left_out)
    if options.images is not None:
        # Links are kept: the image folder is often one.
        root = Path(os.path.abspath(options.images))  # noqa: PTH100
        records = (
            (line, _with_relative_images(record, root, f"{path}, line {line}"))
            for line, record in records
        )
    samples = list(samples_of(records, path))
    if not samples:
        raise InvalidInput("No samples", f"{path} has no record", "give a file with records")
    return samples


def _with_relative_images(record: Record, root: Path, where: str) -> dict[str, Any]:
    images = record.get("images")
    if not isinstance(images, list):
        return dict(record)
    return {**record, "images": [relative_image(image, (), root, where) for image in images]}


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    if is_parquet(path):
        write_parquet(path, [sample.as_record() for sample in samples])
    else:
        write_samples(path, samples)


def _as_samples(conversations: Sequence[Record], options: Options) -> list[Sample]:
    for number, record in enumerate(conversations, 1):
        values = [message["value"] for message in record["conversations"]]
        if any(DJ_IMAGE_MARKER in value for value in values):
            raise InvalidInput(
                "Wrong image marker",
                f"record {number}, id {record['id']!r}: {DJ_IMAGE_MARKER} in a conversation",
                f"conversations mark a picture by {PLAIN_IMAGE_MARKER}",
            )
    made = llava_to_dj(conversations, text_ids=not options.keep_ids, only_captions=options.captions)
    samples = samples_of(enumerate(made, 1), Path("the result"))
    marker = options.marker or DJ_IMAGE_MARKER
    return [with_image_marker(sample, marker) for sample in samples]


def _as_conversations(
    samples: Sequence[Sample], marker: str | None, options: Options
) -> list[dict[str, Any]]:
    if _are_dialogs(samples):
        plain = [with_image_marker(sample, PLAIN_IMAGE_MARKER) for sample in samples]
        return list(dialogs_to_llava([sample.as_record() for sample in plain]))
    if options.original is None:
        raise InvalidInput(
            "No questions",
            "the samples are captions, and their questions are in another file",
            "give it with --original, such as stage_1.json",
        )
    token = marker or DJ_IMAGE_MARKER
    records = (sample.as_record() for sample in samples)
    made = list(restore_questions(records, read_llava(options.original), token))
    for sample, record in zip(samples, made, strict=True):
        if any(other in record["conversations"][1]["value"] for other in IMAGE_MARKERS):
            raise InvalidInput(
                "Image marker inside a caption",
                f"line {sample.line}, id {sample.id!r}: training takes it for a picture",
                f"keep {token} at an end of the text, once",
            )
    return made


def _are_dialogs(samples: Sequence[Sample]) -> bool:
    return samples[0].text.lstrip().startswith("[[")


def _samples_changed(
    samples: Sequence[Sample],
    conversations: Sequence[Record],
    marker: str | None,
    options: Options,
) -> tuple[str, ...]:
    captions = not _are_dialogs(samples)
    keep = Options(captions=captions, marker=marker or options.marker, keep_ids=True)
    back = (_as_samples([record], keep)[0] for record in conversations)
    return _differing(
        ((str(s.id), s.images, s.text), (str(b.id), b.images, b.text))
        for s, b in zip(samples, back, strict=True)
    )


def _conversations_changed(
    conversations: Sequence[Record], samples: Sequence[Sample], options: Options
) -> tuple[str, ...]:
    records = (with_image_marker(s, PLAIN_IMAGE_MARKER).as_record() for s in samples)
    back = (
        restore_questions(records, conversations, PLAIN_IMAGE_MARKER)
        if options.captions
        else dialogs_to_llava(records)
    )
    return _differing(
        ((str(before["id"]), _parts(before)), (str(after["id"]), _parts(after)))
        for before, after in zip(conversations, back, strict=True)
    )


def _parts(record: Record) -> tuple[object, ...]:
    messages = ((message["from"], message["value"]) for message in record["conversations"])
    return (record.get("image") or "", *messages)


def _differing(
    pairs: Iterable[tuple[tuple[object, ...], tuple[object, ...]]],
) -> tuple[str, ...]:
    return tuple(str(before[0]) for before, after in pairs if before != after)
