"""Pictures and conversations as the model takes them: preprocessing, the dataset, collation.

Preprocessing is Pillow and plain arithmetic and reproduces the original's pixels exactly, those of
very long pictures to a few levels of rounding. A picture
that is missing or broken, and a record that would train on the wrong picture, is an error that names
the record; nothing is replaced in silence.

Source: Mini-Gemini's training code, `mgm/train/train.py` (LazySupervisedDataset and collator) and
`mgm/mm_utils.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mgm.errors import InputError
from mgm.model import IGNORE_INDEX
from mgm.prompt import IMAGE_MARKER, Encoded, Template, encode

AspectRatio = Literal["pad", "square"]
DATA_JUICER_MARKER = "<__dj__image>"
UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
    TypeError,
    MemoryError,
)
"""What Pillow raises for pictures that it cannot or will not decode."""
_MOST_RESIZED_PIXELS = 2**25
"""Of a resized picture before it is cropped, four bytes each: 57 times as long as wide at 768."""
_NAMED = 5
"""Records named in a message; the rest is counted."""


def preprocess_image(
    image: Image.Image,
    size: int,
    aspect_ratio: AspectRatio,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Return a picture as the high-resolution tower takes it.

    Args:
        image: Any mode.
        size: S, side of the result in pixels.
        aspect_ratio: `pad` pastes on a square of the mean colour; `square` crops the centre.
        mean: Per channel, of values from 0 to 1.
        std: Likewise.

    Returns:
        (3, S, S), float32, normalised.
    """
    pixels = square_pixels(image, size, aspect_ratio, mean)
    return normalised(pixels, mean, std)


def square_pixels(
    image: Image.Image, size: int, aspect_ratio: AspectRatio, mean: Sequence[float]
) -> Tensor:
    """Return a picture squared and resized as bytes (3, S, S), not yet normalised."""
    pixels = _resize_and_crop(_squared(image.convert("RGB"), aspect_ratio, mean), size)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)  # (3, S, S)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return bytes (..., 3, S, S) as float32, normalised, on their device."""
    means = _per_channel(tuple(mean), pixels.device)
    return (pixels.float() / 255 - means) / _per_channel(tuple(std), pixels.device)


@cache  # making such a tensor waits for the accelerator
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def _squared(image: Image.Image, aspect_ratio: AspectRatio, mean: Sequence[float]) -> Image.Image:
    width, height = image.size
    if aspect_ratio == "square" or width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(value * 255) for value in mean)
    canvas = Image.new("RGB", (side, side), (red, green, blue))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(size * long / short)
    start = (longer - size) // 2
    if longer * size > _MOST_RESIZED_PIXELS:
        return _resized_centre(image, size, start * long / longer, size * long / longer)
    target = (size, longer) if width <= height else (longer, size)
    resized = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (start, 0) if width > height else (0, start)
    return resized.crop((left, top, left + size, top + size))


def _resized_centre(image: Image.Image, size: int, start: float, length: float) -> Image.Image:
    """Resize only what the crop keeps: a line of 3,000 x 1 pixels would take 7 GB as a whole.

    Args:
        image: A long picture.
        size: Side of the result.
        start: Where along the longer side the kept part begins, in pixels of the picture.
        length: Of the kept part, likewise.
    """
    width, height = image.size
    is_wide = width > height
    margin = math.ceil(2 * max(1.0, length / size)) + 1  # what the bicubic filter sees beyond it
    first = max(0, math.floor(start) - margin)
    last = min(max(width, height), math.ceil(start + length) + margin)
    begin, end = start - first, start + length - first
    part = image.crop((first, 0, last, height) if is_wide else (0, first, width, last))
    box = (begin, 0, end, height) if is_wide else (0, begin, width, end)
    return part.resize((size, size), Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its way into the model."""

    input_ids: Tensor
    """(B, T), padded on the right."""
    labels: Tensor
    attention_mask: Tensor
    pictures: tuple[int | None, ...]
    """Per image slot the position of its picture in `InstructionDataset.pictures`; None for the
    blank one that a text-only row consumes."""
    record_ids: tuple[str, ...]


class InstructionDataset:
    """LLaVA-format records, tokenised, with the pictures they name.

    Args:
        path: JSON array of records with `id`, `conversations` and optionally `image`.
        images: Folder that image paths are relative to.
        tokenizer: Of the language model.
        template: Conversation template.
        model_max_length: Longest sequence in tokens, pictures included.
        tokens_of_picture: Positions that a picture takes.

    Raises:
        InputError: Naming the file, the record and the fix.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "gemma",
        model_max_length: int = 2048,
        tokens_of_picture: int = 1,
    ) -> None:
        self.path = path
        self.images = images
        self.model_max_length = model_max_length
        self.tokens_of_picture = tokens_of_picture
        if tokenizer.pad_token_id is None:
            raise InputError(
                "Tokenizer without padding",
                f"{tokenizer.name_or_path}: it has no pad_token",
                "use the tokenizer of a Gemma instruction model",
            )
        self.pad_id = int(tokenizer.pad_token_id)
        self.records = read_records(path)
        check_records(path, self.records, images)
        self.encoded = [
            _encode_record(path, record, tokenizer, template, model_max_length)
            for record in self.records
        ]
        names = dict.fromkeys(record["image"] for record in self.records if "image" in record)
        self.pictures: list[str] = list(names)
        self._picture_of = {name: position for position, name in enumerate(self.pictures)}

    def __len__(self) -> int:
        return len(self.records)

    def record_id(self, index: int) -> str:
        """Return a record's own id, or its position when it has none."""
        return str(self.records[index].get("id", index))

    def picture_of(self, index: int) -> int | None:
        """Return the position in `pictures` of a record's picture; None when it has none."""
        record = self.records[index]
        return self._picture_of[record["image"]] if "image" in record else None

    def num_labels(self, index: int) -> int:
        """Return the tokens of a record that are learned: what is cut off is not."""
        return self.encoded[index].num_labels_within(self.model_max_length, self.tokens_of_picture)

    def without_labels(self) -> list[int]:
        """Return the records that teach nothing.

        Their answers could not be told from the rest, or are cut off.
        """
        return [index for index in range(len(self)) if self.num_labels(index) == 0]

    def modality_lengths(self) -> list[int]:
        """Return each record's length in words, negative without a picture."""
        lengths = []
        for index, record in enumerate(self.records):
            words = sum(len(message["value"].split()) for message in record["conversations"])
            if words == 0:
                raise InputError(
                    "Record without words",
                    f"{self.path}: record {self.record_id(index)}",
                    "leave it out, or set group_by_modality_length to false",
                )
            lengths.append(words if "image" in record else -words)
        return lengths

    def load_pixels(
        self, position: int, size: int, aspect_ratio: AspectRatio, mean: Sequence[float]
    ) -> Tensor:
        """Return picture `position` as bytes (3, size, size).

        Raises:
            InputError: If it cannot be decoded, naming the records that use it.
        """
        name = self.pictures[position]
        path = find_picture(self.images, name) or self.images / name
        try:
            with Image.open(path) as image:
                return square_pixels(image, size, aspect_ratio, mean)
        except UNREADABLE as error:
            users = [
                self.record_id(index)
                for index, record in enumerate(self.records)
                if record.get("image") == name
            ]
            raise InputError(
                "Picture cannot be read",
                f"{path}, used by record {_listed(users)}: {str(error) or 'out of memory'}",
                "replace the picture, or leave the record out of the data",
            ) from error

    def collate(self, indices: Sequence[int]) -> Batch:
        """Return the micro-batch of these records, padded to its longest row."""
        rows = [self.encoded[index] for index in indices]
        length = min(max(len(row.input_ids) for row in rows), self.model_max_length)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
        for position, row in enumerate(rows):
            cut = min(len(row.input_ids), length)
            ids[position, :cut] = torch.tensor(row.input_ids[:cut])
            labels[position, :cut] = torch.tensor(row.labels[:cut])
        return Batch(
            ids,
            labels,
            (ids != self.pad_id).long(),
            tuple(self.picture_of(index) for index in indices),
            tuple(self.record_id(index) for index in indices),
        )


def find_picture(images: Path, name: str) -> Path | None:
    """Return the file of a picture, None where there is none.

    Records of the published instructions name some pictures otherwise than they are handed out: those
    of OCR-VQA all as JPEG, those of Visual Genome by the folders of its two parts. The original
    looks for them as this does, under the written name first.
    """
    names = [name]
    if "ocr" in str(images / name):
        names.append(name.replace(".jpg", ".png"))
    if "VG_100K" in name:
        names.append(name.replace("VG_100K_2", "images").replace("VG_100K", "images"))
    return next((images / one for one in names if (images / one).is_file()), None)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a LLaVA JSON file.

    Raises:
        InputError: If the file is missing, is not JSON, or is not an array of objects.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("Data file cannot be read", f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "give one JSON array of records, saved as UTF-8"
        raise InputError("Data file is not JSON", f"{path}: {error}", hint) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError("Data file is not a LLaVA file", f"{path}: expected an array of objects")
    if not records:
        raise InputError("Data file is empty", f"{path}", "training needs at least one record")
    return records


def check_records(path: Path, records: Sequence[Mapping[str, Any]], images: Path) -> None:
    """Refuse records that would train on nothing or on the wrong picture.

    An image marker inside an answer, or in a second message, makes one record consume two
    pictures, after which every following row of the batch sees another row's picture.

    Raises:
        InputError: Naming the first records of the first problem found.
    """
    found: dict[str, list[str]] = {}
    for index, record in enumerate(records):
        name = str(record.get("id", index))
        problem = _problem(record, images)
        if problem == "missing":
            name = f"{name} ({record['image']})"
        if problem is not None:
            found.setdefault(problem, []).append(name)
    hints = {
        **_PROBLEMS,
        "missing": ("Pictures are missing", f"put them under {images}, or {_OUT}"),
    }
    for problem, (title, hint) in hints.items():
        if problem in found:
            raise InputError(title, f"{path}: record {_listed(found[problem])}", hint)


_OUT = "leave the records out"
_PROBLEMS = {
    "malformed": (
        "Records without a conversation",
        "each record needs `conversations`: messages with text in `from` and `value`",
    ),
    "half": (
        "Text with half a character",
        "a surrogate such as \\ud83d stands alone, as where a text was cut: mend it, or leave the "
        "records out",
    ),
    "image": (
        "Records whose image is no path",
        "`image` is one path as text; leave the key out where there is no picture",
    ),
    "marked": (
        "Image marker in the text",
        f"an answer must not hold {IMAGE_MARKER}, and no text {DATA_JUICER_MARKER}: "
        "convert with the marker that the data uses",
    ),
    "marked twice": (
        "Image marker in several messages",
        f"a record has one picture, so one message holds {IMAGE_MARKER}: take it out of the others",
    ),
}
"""Title and fix of what can be wrong with a record, in the order in which it is told."""


def _problem(record: Mapping[str, Any], images: Path) -> str | None:
    """Return what is wrong with a record, None where nothing is."""
    messages: Any = record.get("conversations")
    if not _is_conversation(messages):
        return "malformed"
    if not all(_is_whole(message["value"]) for message in messages):
        return "half"
    if any(DATA_JUICER_MARKER in message["value"] for message in messages):
        return "marked"
    if "image" not in record:
        return None
    if not isinstance(record["image"], str) or not record["image"]:
        return "image"
    marked = [message["from"] for message in messages if IMAGE_MARKER in message["value"]]
    if "gpt" in marked:
        return "marked"
    if len(marked) > 1:
        return "marked twice"
    return "missing" if find_picture(images, record["image"]) is None else None


def _is_conversation(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("from"), str)
            and isinstance(message.get("value"), str)
            for message in messages
        )
    )


def _is_whole(text: str) -> bool:
    """Tell whether a text can be written in UTF-8, which JSON does not ask for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode_record(
    path: Path,
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    model_max_length: int,
) -> Encoded:
    try:
        return encode(
            record["conversations"], tokenizer, template, "image" in record, model_max_length
        )
    except InputError as error:
        raise InputError(
            error.title, f"{path}: record {record.get('id')}: {error.message}", error.hint
        ) from error


def _listed(names: Sequence[str]) -> str:
    """Name the first few and count the rest."""
    shown = ", ".join(names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
