"""Data sets as files: the competition's JSONL (or Parquet), LLaVA's JSON, and the way between them.

Owns reading with validation, checking pictures and image markers, conversion in both directions,
mapping Data-Juicer's exported paths back, and atomic writing. Plain Python, one line at a time, so
that several hundred thousand samples are read in seconds; no torch, no Data-Juicer.

Source: the conversions follow Data-Juicer's `llava_to_dj` and `dj_to_llava` tools, the second with
the question restoring that the competition kit uses.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from synth_agent.errors import InvalidInput
from synth_agent.parquet import count_rows, is_parquet, iter_parquet

PLAIN_IMAGE_MARKER = "<image>"
DJ_IMAGE_MARKER = "<__dj__image>"
IMAGE_MARKERS = (PLAIN_IMAGE_MARKER, DJ_IMAGE_MARKER)
END_OF_CHUNK = "<|__dj__eoc|>"
SENTENCE_SEPARATOR = "\n"
ROW_ID_FIELD = "row_id"
_ROLE = re.compile(r"\[\[([a-zA-Z]*?)\]\]: ")
_DRIVE = re.compile(r"^[A-Za-z]:")

Record = Mapping[str, Any]
BroadcastPosition = Literal["before", "after", "follow"]


@dataclass(frozen=True)
class Sample:
    """One record of a seed or processed dataset.

    `images` are paths relative to the image folder. `line` is the line of the file, from 1.
    """

    id: str | int
    images: tuple[str, ...]
    text: str
    line: int = 0

    def as_record(self) -> dict[str, Any]:
        """Return the record as the competition's JSONL spells it."""
        return {"id": self.id, "images": list(self.images), "text": self.text}


@dataclass(frozen=True)
class UnusableImage:
    """A picture that a sample names and that cannot be opened, with the reason."""

    line: int
    id: str | int
    image: str
    reason: str
    """`missing`, `empty`, `not a file`, or why it cannot be decoded."""


def without_markers(text: str) -> str:
    """Return a sample's text without image markers and ends of chunks, on one line."""
    for marker in (*IMAGE_MARKERS, END_OF_CHUNK):
        text = text.replace(marker, " ")
    return " ".join(text.split())


def iter_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a competition JSONL or Parquet file; blank lines are skipped.

    Raises:
        InvalidInput: naming the line and the field that is wrong.
    """
    yield from samples_of(iter_records(path), path)


def samples_of(records: Iterable[tuple[int, Record]], path: Path) -> Iterator[Sample]:
    """Yield numbered records as samples.

    Args:
        records: Line numbers and records.
        path: Where they come from, for error messages.

    Raises:
        InvalidInput: naming the line and the field that is wrong.
    """
    for number, record in records:
        where = f"{path}, line {number}"
        yield Sample(
            id=_sample_id(record, where),
            images=_image_paths(record, where),
            text=_text(record, "text", where, may_be_empty=True),
            line=number,
        )


def read_samples(path: Path, *, unique_ids: bool = False) -> list[Sample]:
    """Read all samples.

    Args:
        path: Competition JSONL file.
        unique_ids: Refuse an id that occurs twice, as in a seed dataset. Synthetic samples may
            share the id of the seed sample whose question they answer.

    Raises:
        InvalidInput: a bad line, no sample at all, or a repeated id.
    """
    samples = list(iter_samples(path))
    if not samples:
        raise InvalidInput("No samples", f"{path} has no record", "Give a non-empty JSONL file.")
    if unique_ids:
        first_line: dict[str, int] = {}
        for sample in samples:
            earlier = first_line.setdefault(str(sample.id), sample.line)
            if earlier != sample.line:
                raise InvalidInput(
                    "Repeated id",
                    f"{path}, line {sample.line}, field id: {sample.id!r} is also on line "
                    f"{earlier}",
                    "Give every sample an id of its own.",
                )
    return samples


def iter_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a JSONL or Parquet file; blank lines are skipped.

    A file whose name ends in .parquet is Parquet, and its lines are its rows, from 1.

    Raises:
        InvalidInput: unreadable file, or a line that is not a JSON object in UTF-8.
    """
    if is_parquet(path):
        yield from iter_parquet(path)
        return
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}, line {number}")
    except OSError as error:
        raise InvalidInput(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error


def count_records(path: Path) -> int:
    """Return the number of records of a JSONL or Parquet file.

    Raises:
        InvalidInput: the file cannot be read.
    """
    if is_parquet(path):
        return count_rows(path)
    try:
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise InvalidInput(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error


def read_llava(path: Path) -> list[dict[str, Any]]:
    """Read a LLaVA JSON array: id, optional image, conversations of from and value.

    Raises:
        InvalidInput: naming the record and the field that is wrong.
    """
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error
    except RecursionError as error:
        raise InvalidInput("Nested too deeply", str(path), "Give a flat JSON array.") from error
    except ValueError as error:
        raise InvalidInput("Not JSON", f"{path}: {error}", "Give a JSON array.") from error
    if not isinstance(records, list):
        raise InvalidInput("Not a list", f"{path} is not a JSON array", "Give a JSON array.")
    for position, record in enumerate(records):
        check_llava_record(record, f"{path}, record {position}")
    return records


def unusable_images(samples: Iterable[Sample], image_root: Path) -> list[UnusableImage]:
    """List every picture that is missing, empty or not a file, in the order of the samples."""
    reasons: dict[str, Literal["missing", "empty", "not a file"] | None] = {}
    found = []
    for sample in samples:
        for image in sample.images:
            if image not in reasons:
                reasons[image] = _why_unusable(image_root / image)
            reason = reasons[image]
            if reason is not None:
                found.append(UnusableImage(sample.line, sample.id, image, reason))
    return found


def image_marker(samples: Iterable[Sample]) -> str | None:
    """Return the image marker that the texts use, None when no text has one.

    Raises:
        InvalidInput: both markers occur. A converter that looks for one of them would leave the
            other inside the caption, where training takes it for a second picture.
    """
    first_line: dict[str, int] = {}
    for sample in samples:
        for marker in IMAGE_MARKERS:
            if marker in sample.text:
                first_line.setdefault(marker, sample.line)
    if len(first_line) > 1:
        lines = ", ".join(f"{marker} on line {line}" for marker, line in first_line.items())
        raise InvalidInput(
            "Mixed image markers",
            f"field text: {lines}",
            f"Use one of {' and '.join(IMAGE_MARKERS)} in the whole file.",
        )
    return next(iter(first_line), None)


def check_image_marker(samples: Iterable[Sample], expected: str) -> None:
    """Check that no text uses another image marker than the expected one.

    Raises:
        InvalidInput: naming the first line and the number of lines that do.
    """
    others = [marker for marker in IMAGE_MARKERS if marker != expected]
    wrong = [s.line for s in samples if any(marker in s.text for marker in others)]
    if wrong:
        raise InvalidInput(
            "Wrong image marker",
            f"line {wrong[0]}, field text: {' or '.join(others)} in place of {expected} "
            f"({len(wrong)} lines in all)",
            f"Replace it by {expected}, or name the marker of the whole file as image_special_token "
            "in the recipe.",
        )


def with_image_marker(sample: Sample, marker: str) -> Sample:
    """Return the sample with every image marker in its text replaced by `marker`."""
    text = sample.text
    for other in IMAGE_MARKERS:
        if other != marker:
            text = text.replace(other, marker)
    return sample if text == sample.text else replace(sample, text=text)


def recipe_image_marker(options: Mapping[str, Any]) -> str:
    """Return the image marker that a recipe with these global options reads and writes."""
    return str(options.get("image_special_token") or DJ_IMAGE_MARKER)


def with_kit_markers(sample: Sample, options: Mapping[str, Any]) -> Sample:
    """Return what a recipe made with the markers that the competition's converter looks for.

    Args:
        sample: A sample that a recipe made.
        options: The recipe's global options, which may name other markers.
    """
    text = sample.text.replace(recipe_image_marker(options), DJ_IMAGE_MARKER)
    text = text.replace(str(options.get("eoc_special_token") or END_OF_CHUNK), END_OF_CHUNK)
    return sample if text == sample.text else replace(sample, text=text)


def restore_questions(
    records: Iterable[Record],
    original: Sequence[Record],
    image_token: str = DJ_IMAGE_MARKER,
) -> Iterator[dict[str, Any]]:
    """Turn captions into LLaVA conversations with the question that the seed asked for each id.

    Args:
        records: Records with id, text and images.
        original: LLaVA records of the seed. The last of several with one id counts.
        image_token: Marker removed from both ends of a caption.

    Raises:
        InvalidInput: an id that the seed does not have, several distinct pictures, or no text.
    """
    by_id = {str(record["id"]): record for record in original}
    for number, record in enumerate(records, start=1):
        where = f"record {number}"
        seed = by_id.get(str(_sample_id(record, where)))
        if seed is None:
            raise InvalidInput(
                "Unknown id",
                f"{where}, field id: {record['id']!r} is not in the original dataset",
                "A synthetic sample carries the id of the seed sample whose question it answers.",
            )
        if len(seed["conversations"]) < 2:
            raise InvalidInput(
                "Unpaired conversation",
                f"id {seed['id']!r} of the original dataset has no answer",
                "Give the original dataset's question and answer for every id.",
            )
        question, answer = seed["conversations"][:2]
        caption = _clean(_text(record, "text", where, may_be_empty=True), image_token)
        conversations = [dict(question), {"from": answer["from"], "value": caption}]
        yield _llava_record(seed["id"], conversations, record, where)


def dialogs_to_llava(
    records: Iterable[Record],
    image_token: str = PLAIN_IMAGE_MARKER,
    *,
    keep_only_first_image: bool = True,
) -> Iterator[dict[str, Any]]:
    """Turn texts of the form `[[role]]: sentence` into LLaVA conversations.

    Args:
        records: Records with id, text and images.
        image_token: Marker that counts as a picture.
        keep_only_first_image: Remove the marker from the ends of every sentence but the first.

    Raises:
        InvalidInput: sentences that do not pair up, several distinct pictures, or no text.
    """
    for number, record in enumerate(records, start=1):
        where = f"record {number}"
        identity = _sample_id(record, where)
        parts = _ROLE.split(_text(record, "text", where, may_be_empty=True))
        if parts[0] == "":
            parts = parts[1:]
        if len(parts) % 4 != 0:
            raise InvalidInput(
                "Unpaired conversation",
                f"{where}, field text, id {identity!r}: questions and answers do not pair up",
                "Write [[human]]: ... and [[gpt]]: ... by turns.",
            )
        turns = zip(parts[::2], parts[1::2], strict=True)
        conversations = [
            {
                "from": role,
                "value": _clean(
                    sentence, image_token if position and keep_only_first_image else None
                ),
            }
            for position, (role, sentence) in enumerate(turns)
        ]
        yield _llava_record(identity, conversations, record, where)


def llava_to_dj(
    records: Iterable[Record],
    *,
    text_ids: bool = True,
    split_chunks: bool = False,
    broadcast_image: BroadcastPosition | None = None,
    image_token: str = PLAIN_IMAGE_MARKER,
    end_with_chunk: bool = True,
    only_captions: bool = False,
) -> Iterator[dict[str, Any]]:
    """Turn LLaVA conversations into Data-Juicer records.

    Args:
        records: LLaVA records.
        text_ids: Turn numeric ids into text.
        split_chunks: End every exchange with the end-of-chunk marker.
        broadcast_image: Repeat the picture in every exchange, with its marker before or after the
            question or where the first question has it; needs `split_chunks`.
        image_token: Image marker of the conversations.
        end_with_chunk: End the text with the end-of-chunk marker.
        only_captions: Keep a marker and the answer of every exchange, and no question.

    Raises:
        InvalidInput: an odd number of messages, a marker inside the first question, or
            broadcasting without `split_chunks`.
    """
    if broadcast_image is not None and not split_chunks:
        raise InvalidInput(
            "Options exclude each other",
            "broadcast_image needs split_chunks",
            "Set split_chunks, or leave broadcast_image out.",
        )
    separator = f" {END_OF_CHUNK}{SENTENCE_SEPARATOR}" if split_chunks else SENTENCE_SEPARATOR
    for number, record in enumerate(records, start=1):
        exchanges = _exchanges(record, f"record {number}, field conversations")
        image = record.get("image", "")
        images: list[str] = []
        if image:
            exchanges = _with_markers(exchanges, broadcast_image, image_token, number)
            images = [image] * (len(exchanges) if broadcast_image else min(1, len(exchanges)))
        text = separator.join(_as_text(pair, image_token, only_captions) for pair in exchanges)
        yield {
            "id": str(record["id"]) if text_ids else record["id"],
            "text": f"{text} {END_OF_CHUNK}" if end_with_chunk else text,
            "images": images,
        }


def relative_samples(
    exported: Iterable[Record],
    seed: Sequence[Sample],
    image_root: Path,
    row_field: str = ROW_ID_FIELD,
) -> Iterator[Sample]:
    """Yield what Data-Juicer exported with paths relative to the image folder again.

    Data-Juicer writes absolute paths. The row id carried through the recipe names the seed sample
    that a row came from, and with it the path the seed used; a picture that the recipe made is
    taken relative to the image folder. Every other field is dropped.

    Args:
        exported: Rows with id, text, images and the row id.
        seed: The seed samples; a row id is a position in this list.
        image_root: Image folder.
        row_field: Name of the field with the row id.

    Raises:
        InvalidInput: a row without a valid row id, or a picture outside the image folder.
    """
    # Links are kept: the image folder is often one.
    root = Path(os.path.abspath(image_root))  # noqa: PTH100
    for number, row in enumerate(exported, start=1):
        where = f"exported row {number}"
        row_id = row.get(row_field)
        if not isinstance(row_id, int) or not 0 <= row_id < len(seed):
            raise InvalidInput(
                "No row id",
                f"{where}, field {row_field}: {row_id!r} is not a row of the seed dataset",
                "Keep the row id through the whole recipe.",
            )
        paths = row.get("images") or ()
        yield Sample(
            id=_sample_id(row, where),
            images=tuple(relative_image(path, seed[row_id].images, root, where) for path in paths),
            text=_text(row, "text", where, may_be_empty=True),
            line=number,
        )


def write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Write a competition JSONL file atomically and return the number of samples."""
    count = 0
    with atomic_file(path) as file:
        for sample in samples:
            file.write(json.dumps(sample.as_record(), ensure_ascii=False) + "\n")
            count += 1
    return count


def write_llava(path: Path, records: Iterable[Record]) -> int:
    """Write a LLaVA JSON array atomically and return the number of records.

    Raises:
        InvalidInput: the file name does not end in .json, which training tells formats by.
    """
    if path.suffix != ".json":
        raise InvalidInput(
            "Wrong file name", f"{path} does not end in .json", "Name the file *.json."
        )
    listed = list(records)
    with atomic_file(path) as file:
        json.dump(listed, file)
    return len(listed)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears under `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_image_path(image: object, where: str) -> str:
    """Return the path if it stays under the image folder.

    Raises:
        InvalidInput: empty, absolute, a URL, or climbing out with `..`.
    """
    if not isinstance(image, str) or not image:
        raise InvalidInput("Bad image path", f"{where}: {image!r}", "Give a relative path.")
    parts = image.replace("\\", "/").split("/")
    if parts[0] == "" or _DRIVE.match(image) or "://" in image or "\0" in image or ".." in parts:
        raise InvalidInput(
            "Image outside the image folder",
            f"{where}: {image!r}",
            "Give a path relative to the image folder, without '..'.",
        )
    _check_characters(image, where)
    return image


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidInput("Not UTF-8", f"{where}: {error.reason}", "Save as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InvalidInput(
            "Not JSON", f"{where}, column {error.colno}: {error.msg}", "Write one object a line."
        ) from error
    except ValueError as error:
        raise InvalidInput("Not JSON", f"{where}: {error}", "Write a shorter number.") from error
    except RecursionError as error:
        raise InvalidInput("Nested too deeply", where, "Write one flat object a line.") from error
    if not isinstance(record, dict):
        raise InvalidInput("Not an object", f"{where} is not a JSON object", "Fix the line.")
    return record


def _sample_id(record: Record, where: str) -> str | int:
    identity = record.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise InvalidInput(
            "Bad id", f"{where}, field id: {identity!r}", "Give a text or a whole number."
        )
    if isinstance(identity, str):
        _check_characters(identity, f"{where}, field id")
    return identity


def _text(record: Record, field: str, where: str, *, may_be_empty: bool = False) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not (value or may_be_empty):
        raise InvalidInput(
            "Bad text", f"{where}, field {field}: {value!r} is not a text", f"Add {field}."
        )
    _check_characters(value, f"{where}, field {field}")
    return value


def _check_characters(value: str, where: str) -> None:
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            "Broken character",
            f"{where}: half of a surrogate pair at position {error.start}",
            "Write the whole character.",
        ) from error


def _image_paths(record: Record, where: str) -> tuple[str, ...]:
    images = record.get("images")
    if images is None:
        return ()
    if not isinstance(images, list):
        raise InvalidInput(
            "Bad images", f"{where}, field images: {images!r} is not a list", "Give a list."
        )
    return tuple(check_image_path(image, f"{where}, field images") for image in images)


def check_llava_record(record: object, where: str) -> None:
    """Check one record of a LLaVA file.

    Raises:
        InvalidInput: naming the place and the field that is wrong.
    """
    if not isinstance(record, dict):
        raise InvalidInput("Not an object", f"{where} is not a JSON object", "Fix the record.")
    _sample_id(record, where)
    if record.get("image") not in (None, ""):
        check_image_path(record["image"], f"{where}, field image")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise InvalidInput(
            "No conversations", f"{where}, field conversations", "Give a list of messages."
        )
    for position, message in enumerate(conversations):
        place = f"{where}, conversations[{position}]"
        if not isinstance(message, dict):
            raise InvalidInput("Not an object", f"{place} is not an object", "Fix the message.")
        _text(message, "from", place)
        _text(message, "value", place, may_be_empty=True)


def _why_unusable(path: Path) -> Literal["missing", "empty", "not a file"] | None:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    return None if status.st_size else "empty"


def _clean(sentence: str, image_token: str | None) -> str:
    sentence = sentence.strip().removesuffix(END_OF_CHUNK).strip()
    if image_token is not None:
        sentence = sentence.removeprefix(image_token).strip()
        sentence = sentence.removesuffix(image_token).strip()
    return sentence


def _llava_record(
    identity: str | int, conversations: list[dict[str, str]], record: Record, where: str
) -> dict[str, Any]:
    images = sorted(set(record.get("images") or ()))
    if len(images) > 1:
        raise InvalidInput(
            "Several pictures",
            f"{where}, field images, id {identity!r}: {len(images)} distinct pictures",
            "A LLaVA record has one picture; split the record.",
        )
    made: dict[str, Any] = {"id": identity, "conversations": conversations}
    if images:
        made["image"] = images[0]
    return made


def _exchanges(record: Record, where: str) -> list[tuple[Record, Record]]:
    messages = record["conversations"]
    if len(messages) % 2:
        raise InvalidInput(
            "Unpaired conversation",
            f"{where}, id {record['id']!r}: {len(messages)} messages",
            "Give every question an answer.",
        )
    return list(zip(messages[::2], messages[1::2], strict=True))


def _with_markers(
    exchanges: Sequence[tuple[Record, Record]],
    broadcast: BroadcastPosition | None,
    token: str,
    number: int,
) -> list[tuple[Record, Record]]:
    """Check the first question's marker and repeat it in the others when asked to."""
    first = exchanges[0][0]["value"] if exchanges else token
    if not (first.startswith(token) or first.endswith(token)):
        raise InvalidInput(
            "Misplaced image marker",
            f"record {number}, conversations[0]: {token} is neither at the start nor at the end",
            f"Put {token} at one end of the first question.",
        )
    if broadcast is None:
        return list(exchanges)
    before = first.startswith(token) if broadcast == "follow" else broadcast == "before"
    repeated = list(exchanges[:1])
    for question, answer in exchanges[1:]:
        parts = (token, question["value"]) if before else (question["value"], token)
        repeated.append(({**question, "value": SENTENCE_SEPARATOR.join(parts)}, answer))
    return repeated


def _as_text(exchange: tuple[Record, Record], token: str, only_caption: bool) -> str:
    question, answer = exchange
    if only_caption:
        return f"{token}{SENTENCE_SEPARATOR}{answer['value']}"
    return SENTENCE_SEPARATOR.join(
        f"[[{message['from']}]]: {message['value']}" for message in (question, answer)
    )


def relative_image(path: object, seed_images: Sequence[str], root: Path, where: str) -> str:
    """Return a picture's path relative to the image folder.

    Args:
        path: As Data-Juicer wrote it.
        seed_images: Paths of the seed sample; the one that `path` ends in is returned.
        root: Image folder; `path` may be relative to it.
        where: For error messages.

    Raises:
        InvalidInput: The picture is outside the image folder.
    """
    if not isinstance(path, str) or not path:
        raise InvalidInput("Bad image path", f"{where}, field images: {path!r}", "Give a path.")
    for image in seed_images:
        if path == image or path.endswith(f"/{image}"):
            return image
    absolute = Path(os.path.abspath(root / path))  # noqa: PTH100
    for candidate, base in ((absolute, root), (absolute.resolve(), root.resolve())):
        if candidate.is_relative_to(base):
            return candidate.relative_to(base).as_posix()
    raise InvalidInput(
        "Image outside the image folder",
        f"{where}, field images: {path!r} is not under {root}",
        "Let operators write their pictures under the image folder.",
    )
