"""Stage 1 for seed sets of more samples than memory holds, and on a cluster: the same files.

Owns the index of a LLaVA file by id, on disk; the checks of stage 1 in one pass over the seed set; the
choice of at most as many samples as the cap from a `StreamedOutcome`; and what runs the chunks. Memory
holds some hundred bytes a sample for ids and row numbers, and the samples that are chosen.
"""

from __future__ import annotations

import argparse
import array
import hashlib
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synth_agent.data import (
    Sample,
    atomic_file,
    check_image_marker,
    check_llava_record,
    iter_samples,
    recipe_image_marker,
    restore_questions,
    with_kit_markers,
    write_llava,
    write_samples,
)
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.recipes import Recipe
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.pictures import check_pictures
from synth_agent.stages.progress import StageProgress
from synth_agent.stages.streaming import (
    LocalPool,
    Pool,
    StreamedOutcome,
    stream_branch,
)

_PART_SAMPLES = 10_000
_BLOCK_CHARACTERS = 1 << 20
_LONGEST_RECORD = 1 << 26
"""Characters; without a limit a slip in a large file would have all of it read."""
_KEY = np.dtype((np.void, 16))

Report = Callable[[int], None]
"""Called with how many samples are checked."""


class Originals:
    """The LLaVA records of a seed set, found by id without holding them.

    Args:
        path: LLaVA JSON array.
        folder: Existing folder for one file as large as the array.

    Raises:
        InvalidInput: naming the record and the field that is wrong.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._lines = folder / "original.jsonl"
        packed, offsets = bytearray(), array.array("q")
        with self._lines.open("wb") as file:
            for position, record in enumerate(_array_items(path)):
                check_llava_record(record, f"{path}, record {position}")
                packed += _key(record["id"])
                offsets.append(file.tell())
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        keys = np.frombuffer(bytes(packed), _KEY)
        # Of several records with one id the last counts, as it does where all are in memory.
        self._keys, last = np.unique(keys[::-1], return_index=True)
        self._offsets: npt.NDArray[np.int64] = np.array(offsets, np.int64)[::-1][last]

    def of(self, samples: Iterable[Sample]) -> list[dict[str, Any]]:
        """Return the records of the samples' ids, each once; ids without one are left out."""
        wanted = {str(sample.id): None for sample in samples}
        if not wanted or not len(self._keys):
            return []
        keys = np.frombuffer(b"".join(_key(identity) for identity in wanted), _KEY)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = self._offsets[places[self._keys[places] == keys]]
        records = []
        with self._lines.open("rb") as file:
            for offset in np.sort(found).tolist():
                file.seek(offset)
                records.append(json.loads(file.readline()))
        return records

    def restored(self, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        """Yield samples as conversations with the questions of their ids.

        Raises:
            InvalidInput: a sample's id has no record, or it has several distinct pictures.
        """
        for part in _parts(iter(samples)):
            yield from restore_questions((s.as_record() for s in part), self.of(part))


def check_seed(seed: Path, images: Path, originals: Originals, report: Report) -> int:
    """Check a seed set as stage 1 does before it runs a recipe, and return how many samples it has.

    Args:
        seed: Competition JSONL file.
        images: Folder of its pictures.
        originals: The records with its questions.
        report: Called with samples checked.

    Raises:
        InvalidInput: a bad line, a repeated id, an id without a question, an unusable picture, or no
            sample at all.
    """
    packed, lines, total = bytearray(), [], 0
    for part in _parts(iter_samples(seed)):
        for _ in originals.restored(part):
            pass
        check_pictures(part, images, lambda done, of: None)
        packed += b"".join(_key(sample.id) for sample in part)
        lines.append(np.array([sample.line for sample in part], np.int64))
        total += len(part)
        report(total)
    if not total:
        raise InvalidInput("No samples", f"{seed} has no record", "Give a non-empty JSONL file.")
    _check_ids(seed, np.frombuffer(bytes(packed), _KEY), np.concatenate(lines))
    return total


def process_large(recipe: Recipe, arguments: argparse.Namespace, progress: StageProgress) -> None:
    """Process the seed set by a linear recipe and write what `stages/process.py` writes.

    Args:
        recipe: A linear recipe that `why_not_in_chunks` has nothing against.
        arguments: Those of stage 1.
        progress: Of stage 1.

    Raises:
        InvalidInput: the seed set, its pictures or its questions are bad, or there is no cluster.
        SynthAgentError: an operator failed, or nothing is left.
    """
    output, images = arguments.output, arguments.images
    output.mkdir(parents=True, exist_ok=True)
    guard()

    def report(label: str, done: int, total: int) -> None:
        progress.update(step=done, total=total, unit="samples", label=label)

    with tempfile.TemporaryDirectory(dir=output, prefix=".work-") as name:
        work = Path(name).resolve()
        originals = Originals(arguments.original, work)
        total = check_seed(
            arguments.seed,
            images,
            originals,
            lambda done: report("checking samples", done, done),
        )
        check_image_marker(iter_samples(arguments.seed), recipe_image_marker(recipe.options))
        with open_pool(recipe, arguments, work / "operators") as pool:
            samples = iter_samples(arguments.seed)
            outcome = stream_branch(samples, total, images, pool, work / "chunks", report)
        if not outcome.num_rows:
            dropper = outcome.emptied_by or "the recipe"
            raise SynthAgentError(
                "No sample is left",
                f"{dropper} dropped the last one",
                "loosen the recipe's thresholds",
            )
        chosen = chosen_samples(outcome, images, arguments.cap, arguments.cap_seed)
        chosen = [with_kit_markers(sample, recipe.options) for sample in chosen]
        _write_outputs(output, outcome, chosen, originals)


@contextmanager
def open_pool(recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> Iterator[Pool]:
    """Yield what runs a recipe's chunks: this process, or the cluster that the person named.

    Args:
        recipe: A linear recipe.
        arguments: Of stage 1, with `executor` and `ray_address`.
        folder: For Data-Juicer's own files.
    """
    if arguments.executor != "ray":
        yield LocalPool(recipe, folder)
        return
    from synth_agent.stages.ray_executor import RayPool, RaySettings

    settings = RaySettings(arguments.ray_address or "")
    with RayPool(recipe, Path.cwd(), settings, arguments.threads) as pool:
        yield pool


def chosen_samples(outcome: StreamedOutcome, images: Path, cap: int, cap_seed: int) -> list[Sample]:
    """Return what is left, or as many as the cap in the order that stage 1 draws them.

    Raises:
        InvalidInput: a picture outside the image folder.
    """
    left = outcome.samples(images)
    if outcome.num_rows <= cap:
        return list(left)
    positions = random.Random(cap_seed).sample(range(outcome.num_rows), cap)
    wanted = set(positions)
    found = {place: sample for place, sample in enumerate(left) if place in wanted}
    return [found[place] for place in positions]


def _write_outputs(
    output: Path,
    outcome: StreamedOutcome,
    chosen: Sequence[Sample],
    originals: Originals,
) -> None:
    write_samples(output / "processed.jsonl", chosen)
    write_llava(output / "processed.json", originals.restored(chosen))
    kept = outcome.kept().tolist()
    dropped = {name: rows.tolist() for name, rows in outcome.dropped.items()}
    _write_json(output / "rows.json", {"kept": kept, "dropped": dropped})
    with (output / "processed.jsonl").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        "kept": len(chosen),
        "before_cap": outcome.num_rows,
        "seed_samples": outcome.seed_samples,
        "dropped": outcome.seed_samples - len(kept),
        "operators": [asdict(count) for count in outcome.counts],
        "digest": digest,
    }
    _write_json(output / "result.json", result)


def _write_json(path: Path, value: object) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def _check_ids(seed: Path, keys: npt.NDArray[np.void], lines: npt.NDArray[np.int64]) -> None:
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[which] != np.arange(len(keys)))
    if len(repeated):
        line, earlier = int(lines[repeated[0]]), int(lines[first[which[repeated[0]]]])
        raise InvalidInput(
            "Repeated id",
            f"{seed}, line {line}, field id: it is also on line {earlier}",
            "Give every sample an id of its own.",
        )


def _parts(samples: Iterator[Sample]) -> Iterator[Sequence[Sample]]:
    while part := list(itertools.islice(samples, _PART_SAMPLES)):
        yield part


def _key(identity: object) -> bytes:
    return hashlib.blake2b(str(identity).encode(), digest_size=_KEY.itemsize).digest()


def _array_items(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON array of objects, one at a time.

    Raises:
        InvalidInput: unreadable, not JSON, or not an array.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _items(_Text(file), path)
    except OSError as error:
        raise InvalidInput(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("Not JSON", f"{path}: {error}", "Give a JSON array.") from error


def _items(text: _Text, path: Path) -> Iterator[Any]:
    if text.next_mark() != "[":
        raise InvalidInput("Not a list", f"{path} is not a JSON array", "Give a JSON array.")
    text.skip()
    if text.next_mark() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            mark = text.next_mark()
            text.skip()
            if mark == "]":
                break
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", "", text.taken)
    if text.next_mark():
        raise json.JSONDecodeError("Extra data", "", text.taken)


class _Text:
    """The part of a text file that is not parsed yet, read as it is needed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._buffer = ""
        self._place = 0
        self._decoder = json.JSONDecoder()
        self.taken = 0
        """Characters before the buffer."""

    def next_mark(self) -> str:
        """Return the next character that is not space, "" at the end."""
        while True:
            while self._place < len(self._buffer) and self._buffer[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._more(_BLOCK_CHARACTERS):
                return ""

    def skip(self) -> None:
        """Go past the character that `next_mark` returned."""
        self._place += 1

    def value(self) -> Any:
        """Return the JSON object that comes next.

        Raises:
            json.JSONDecodeError: there is none.
        """
        self.next_mark()
        size = _BLOCK_CHARACTERS
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._buffer, self._place)
            except json.JSONDecodeError:
                # Whether it is wrong or only cut off shows when there is no more to read.
                if len(self._buffer) > _LONGEST_RECORD or not self._more(size):
                    raise
                size *= 2
            else:
                return value

    def _more(self, size: int) -> bool:
        block = self._file.read(size)
        self.taken += self._place
        self._buffer = self._buffer[self._place :] + block
        self._place = 0
        return bool(block)
