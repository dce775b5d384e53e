"""Looking through a data set before anything is computed from it: records, markers, pictures.

Where the stages stop at the first problem, everything that is wrong is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from synth_agent.data import (
    DJ_IMAGE_MARKER,
    END_OF_CHUNK,
    IMAGE_MARKERS,
    Sample,
    UnusableImage,
    image_marker,
    read_llava,
    read_samples,
)
from synth_agent.errors import InvalidInput
from synth_agent.pictures import unreadable


@dataclass(frozen=True)
class Layout:
    """Where the parts of a data set are."""

    samples: Path
    images: Path
    original: Path | None
    """LLaVA file with the questions, None when there is none."""


@dataclass(frozen=True)
class DataReport:
    """What is in a data set and what is wrong with it."""

    layout: Layout
    num_samples: int
    num_pictures: int
    """Distinct pictures that the samples name."""
    marker: str | None
    problems: tuple[str, ...]
    """What is wrong besides pictures, a line each."""
    unusable: tuple[UnusableImage, ...]
    """Pictures that are missing or cannot be decoded, by sample."""


def find_layout(folder: Path) -> Layout:
    """Return the parts of a folder laid out as the competition's seed sets of 10,000 and 400,000 are.

    Such a folder holds one JSONL (or Parquet) file of samples, the pictures that it names by paths
    relative to the folder, and `stage_1.json` with the questions.

    Raises:
        InvalidInput: There is no such file, or more than one.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".jsonl", ".parquet") and path.is_file()
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InvalidInput(
            "No single file of samples",
            f"{folder}: {names}",
            "name the file in place of the folder",
        )
    original = folder / "stage_1.json"
    return Layout(found[0], folder, original if original.is_file() else None)


def check_data(layout: Layout, report: Callable[[int, int], None]) -> DataReport:
    """Check every record and decode every picture.

    Args:
        layout: The data set.
        report: Called with the pictures done and all pictures.

    Raises:
        InvalidInput: A line is no sample.
    """
    samples = read_samples(layout.samples)
    pictures = dict.fromkeys(image for sample in samples for image in sample.images)
    marker, problems = None, list(_repeated_ids(samples))
    try:
        marker = image_marker(samples)
    except InvalidInput as error:
        problems.append(f"{error.title}: {error.message}")
    if marker not in (None, DJ_IMAGE_MARKER):
        problems.append(
            f"texts say {marker}, and recipes look for {DJ_IMAGE_MARKER}: replace it with "
            f"synth-agent convert --marker '{DJ_IMAGE_MARKER}', or name it as image_special_token "
            "in every recipe"
        )
    problems += _unusable_texts(samples)
    problems += _without_question(samples, layout.original)
    reasons = unreadable({image: layout.images / image for image in pictures}, report)
    unusable = tuple(
        UnusableImage(sample.line, sample.id, image, reasons[image])
        for sample in samples
        for image in sample.images
        if image in reasons
    )
    return DataReport(layout, len(samples), len(pictures), marker, tuple(problems), unusable)


def _repeated_ids(samples: Sequence[Sample]) -> Iterator[str]:
    first_line: dict[str, int] = {}
    repeated = [s for s in samples if first_line.setdefault(str(s.id), s.line) != s.line]
    if repeated:
        one = repeated[0]
        yield (
            f"{len(repeated):,} repeated ids: {one.id!r} on lines {first_line[str(one.id)]} and "
            f"{one.line}"
        )


def _unusable_texts(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield what training could not use, or would use for something else."""
    kinds = {
        "have a picture and no image marker, or a marker and no picture": _is_unmarked,
        "have more or fewer image markers than pictures": _is_marked_wrongly,
        "keep a marker inside the caption, where training takes it for words": _keeps_marker,
        "have several distinct pictures, of which training takes one": _has_several_pictures,
    }
    for what, is_so in kinds.items():
        found = [sample for sample in samples if is_so(sample)]
        if found:
            yield f"{len(found):,} samples {what}: line {found[0].line}, id {found[0].id!r}"


def _markers(sample: Sample) -> int:
    return sum(sample.text.count(marker) for marker in IMAGE_MARKERS)


def _is_unmarked(sample: Sample) -> bool:
    return bool(_markers(sample)) != bool(sample.images)


def _is_marked_wrongly(sample: Sample) -> bool:
    return not _is_unmarked(sample) and _markers(sample) != len(sample.images)


def _keeps_marker(sample: Sample) -> bool:
    # A dialog says who speaks, and may name its picture in any question.
    if sample.text.lstrip().startswith("[["):
        return False
    caption = sample.text.strip().removesuffix(END_OF_CHUNK).strip()
    for marker in IMAGE_MARKERS:
        caption = caption.removeprefix(marker).removesuffix(marker)
    return any(marker in caption for marker in (*IMAGE_MARKERS, END_OF_CHUNK))


def _has_several_pictures(sample: Sample) -> bool:
    return len(set(sample.images)) > 1


def _without_question(samples: Sequence[Sample], original: Path | None) -> Iterator[str]:
    if original is None:
        return
    try:
        known = {str(record["id"]) for record in read_llava(original)}
    except InvalidInput as error:
        yield f"{error.title}: {error.message}"
        return
    unknown = [sample for sample in samples if str(sample.id) not in known]
    if unknown:
        yield (
            f"{len(unknown):,} samples have no question in {original.name}: "
            f"line {unknown[0].line}, id {unknown[0].id!r}"
        )
