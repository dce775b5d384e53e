"""A linear recipe on more samples than memory holds: chunk by chunk, with only hashes in memory.

Owns which recipes can be run so, how samples are cut into chunks, the chunks' files, and which
repeated samples go. The operators run by `stages/running.py`, as in `stages/branch.py`; the rows that
are left are the same. What runs the chunks is a pool: `LocalPool` in this process, or the one of
`stages/ray_executor.py` on a cluster.

An operator that decides each sample by itself runs on a chunk at a time. A deduplicator hashes chunk
by chunk; 25 bytes a sample are held until all are hashed, and of equal ones the first is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from synth_agent.data import ROW_ID_FIELD, Sample
from synth_agent.recipes import Recipe
from synth_agent.stages.branch import OperatorCount, Outcome, Report, load_records, seed_records
from synth_agent.stages.running import OperatorFailed, describe_rows, run_operator

CHUNK_SAMPLES = 50_000
RECORD_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(pa.string()),
        "text": pa.string(),
        ROW_ID_FIELD: pa.int64(),
    }
)
HASHED_DEDUPLICATORS = ("document_deduplicator", "image_deduplicator")
SAME_EVERY_TIME = (
    "batched_image_captioning_mapper",
    "clean_copyright_mapper",
    "clean_email_mapper",
    "clean_html_mapper",
    "clean_ip_mapper",
    "clean_links_mapper",
    "expand_macro_mapper",
    "fix_unicode_mapper",
    "forget_measurements_mapper",
    "punctuation_normalization_mapper",
    "remove_long_words_mapper",
    "remove_repeat_sentences_mapper",
    "remove_specific_chars_mapper",
    "remove_words_with_incorrect_substrings_mapper",
    "replace_content_mapper",
    "sentence_split_mapper",
    "whitespace_normalization_mapper",
)
"""Mappers whose result follows from the sample alone. Others draw from generators that all samples
share, or call a service, so that cutting the samples into chunks would change what they make."""
_NOT_BY_SAMPLE = ("audio_nmf_snr_filter", "suffix_filter")
_KEY_BYTES = 16
_KEY_GROUPS = 16

Keys = npt.NDArray[np.void]
RowIds = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OperatorKind:
    """What of a Data-Juicer operator decides how it is run."""

    name: str
    bases: frozenset[str]

    @property
    def is_deduplicator(self) -> bool:
        return "Deduplicator" in self.bases

    @property
    def is_mapper(self) -> bool:
        return "Mapper" in self.bases

    @property
    def measures(self) -> bool:
        return bool(self.bases & {"Filter", "Deduplicator"})


@dataclass(frozen=True)
class Segment:
    """Operators that run on a chunk without knowing of the others; a deduplicator ends one."""

    start: int
    stop: int
    forget_before: frozenset[int]
    """Positions, from 0, before which measurements from before a mapper are forgotten."""


@dataclass(frozen=True)
class ChunkTask:
    """A segment's operators and the samples to run them on."""

    index: int
    segment: Segment
    table: Any
    """`pyarrow.Table` of the chunk's samples, with whatever was measured of them."""


@dataclass(frozen=True)
class ChunkStep:
    """What one operator did to one chunk."""

    before: int
    after: int
    seconds: float
    dropped: RowIds


@dataclass(frozen=True)
class ChunkDone:
    """A chunk after a segment's operators."""

    index: int
    table: Any
    """`pyarrow.Table`; when the segment ends with a deduplicator, before it dropped any."""
    steps: tuple[ChunkStep, ...]
    """Fewer than the segment has operators when one left nothing."""
    measured_anew: frozenset[int]
    """Positions, from 1."""
    keys: Keys | None = None
    """(N,) what samples are compared by, when the segment ends with a deduplicator."""
    keyless: Mask | None = None
    """(N,) samples that equal no other, whatever their key."""


class Pool(Protocol):
    """What runs chunks."""

    @property
    def operators(self) -> tuple[OperatorKind, ...]:
        """The recipe's operators."""

    def run(self, tasks: Iterable[ChunkTask]) -> Iterator[ChunkDone]:
        """Yield every task's result, in any order, with few tasks taken ahead of the results."""


@dataclass(frozen=True)
class StreamedOutcome:
    """What a recipe left of a data set, in files."""

    seed_samples: int
    num_rows: int
    counts: tuple[OperatorCount, ...]
    """Seconds are summed over chunks, wherever they ran."""
    dropped: Mapping[str, RowIds]
    """Rows that an operator dropped, sorted, under `position. name`."""
    measured_anew: tuple[int, ...]
    """As in `branch.Outcome`."""
    files: _ChunkFiles

    @property
    def emptied_by(self) -> str | None:
        """The operator that dropped the last sample, None while there is one."""
        return next((count.name for count in self.counts if count.after == 0), None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield row id, seed id, text and absolute picture paths of each sample, in seed order."""
        for index in range(self.files.num_chunks):
            start, ids, _ = self.files.seed_part(index)
            table = self.files.read(index).select([ROW_ID_FIELD, "text", "images"])
            for row in table.to_pylist():
                yield row | {"id": ids[row[ROW_ID_FIELD] - start]}

    def samples(self, images: Path) -> Iterator[Sample]:
        """Yield the samples that are left, with the paths that the seed used.

        Raises:
            InvalidInput: a picture outside the image folder.
        """
        from synth_agent.data import relative_samples

        for index in range(self.files.num_chunks):
            start, ids, paths = self.files.seed_part(index)
            seed = _SeedPart(start, ids, paths)
            table = self.files.read(index).select([ROW_ID_FIELD, "text", "images"])
            rows = (row | {"id": ids[row[ROW_ID_FIELD] - start]} for row in table.to_pylist())
            yield from relative_samples(rows, seed, images)

    def in_memory(self) -> Outcome:
        """Return the same as `run_branch` returns it."""
        dropped = {name: rows.tolist() for name, rows in self.dropped.items()}
        return Outcome(list(self.rows()), self.counts, dropped, self.measured_anew)

    def kept(self) -> RowIds:
        """Return the seed rows that are left, sorted, each once."""
        parts = [
            np.unique(self.files.read(index)[ROW_ID_FIELD].to_numpy())
            for index in range(self.files.num_chunks)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])


def why_not_in_chunks(recipe: Recipe) -> str | None:
    """Return why chunks could change what a linear recipe makes, None if they would not."""
    for operator in recipe.operators:
        # Data-Juicer's filters are named so, and each decides a sample by its own statistics.
        is_filter = operator.name.endswith("_filter") and operator.name not in _NOT_BY_SAMPLE
        if not (is_filter or operator.name in (*SAME_EVERY_TIME, *HASHED_DEDUPLICATORS)):
            return f"{operator.name} may not decide each sample by itself alone"
    return None


def stream_branch(
    samples: Iterable[Sample],
    total: int,
    images: Path,
    pool: Pool,
    folder: Path,
    report: Report,
    chunk_samples: int = CHUNK_SAMPLES,
) -> StreamedOutcome:
    """Drive a linear recipe's operators over samples that are read as they are needed.

    Args:
        samples: The seed samples; a row id is a position in it.
        total: How many there are; for the progress.
        images: Folder of the seed's pictures.
        pool: Runs the recipe's operators on chunks.
        folder: Empty folder for the chunks; the outcome reads from it, so it has to outlive that.
        report: Called with a label, samples done and samples in all.
        chunk_samples: Samples a chunk.

    Raises:
        SynthAgentError: an operator failed, or samples were lost without its decision.
    """
    files = _ChunkFiles(folder)
    run = _Run(pool.operators, files)
    incoming: Iterator[tuple[int, Any]] = files.first(samples, images, chunk_samples)
    if not pool.operators:
        # A baseline keeps everything, and its chunks have to be on disk like any other's.
        for index, table in incoming:
            files.write(index, table)
            report("reading the seed set", files.num_samples, total)
        files.close({})
    for segment in segments(pool.operators):
        label = run.label(segment)
        done, report_total = 0, total
        report(label, 0, report_total)
        tasks = (ChunkTask(index, segment, table) for index, table in incoming if len(table))
        for result in pool.run(tasks):
            run.add(segment, result)
            done += result.steps[0].before
            report(label, done, max(report_total, done))
        run.close(segment)
        if not files.num_rows:
            break
        total = files.num_rows
        incoming = files.all()
    return run.outcome()


def segments(operators: Sequence[OperatorKind]) -> tuple[Segment, ...]:
    """Cut a recipe's operators after each deduplicator."""
    forget, is_stale = set(), False
    for position, operator in enumerate(operators):
        if is_stale and operator.measures:
            forget.add(position)
            is_stale = False
        is_stale = is_stale or operator.is_mapper
    stops = [i + 1 for i, operator in enumerate(operators) if operator.is_deduplicator]
    edges = sorted({0, *stops, len(operators)})
    return tuple(Segment(a, b, frozenset(forget)) for a, b in itertools.pairwise(edges))


def first_of_equals(keys: Sequence[Keys], keyless: Sequence[Mask]) -> list[Mask]:
    """Return, in the shapes that came in, which samples are the first with their key."""
    keep = [mask.copy() for mask in keyless]
    firsts = [part.view(np.uint8).reshape(-1, _KEY_BYTES)[:, 0] % _KEY_GROUPS for part in keys]
    # Equal keys are in one group; sorting all at once would take several times their memory.
    for group in range(_KEY_GROUPS):
        places = [np.flatnonzero(first == group) for first in firsts]
        members = [part[place] for part, place in zip(keys, places, strict=True)]
        if not sum(map(len, members)):
            continue
        is_first = np.zeros(sum(map(len, members)), np.bool_)
        is_first[np.unique(np.concatenate(members), return_index=True)[1]] = True
        parts = np.split(is_first, np.cumsum([len(place) for place in places])[:-1])
        for mask, place, part in zip(keep, places, parts, strict=True):
            mask[place] |= part
    return keep


class LocalPool:
    """Runs chunks one after the other, in this process.

    Args:
        recipe: A linear recipe.
        folder: For Data-Juicer's own files.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._runner = ChunkRunner(recipe, folder)

    @property
    def operators(self) -> tuple[OperatorKind, ...]:
        return self._runner.operators

    def run(self, tasks: Iterable[ChunkTask]) -> Iterator[ChunkDone]:
        """Yield every task's result, in order."""
        yield from map(self._runner.run, tasks)


class ChunkRunner:
    """A recipe's operators, loaded once, for any number of chunks.

    Args:
        recipe: A linear recipe.
        folder: For Data-Juicer's own files.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        # Data-Juicer makes operators from a whole configuration, which has to name a data set.
        example = {"id": "", "images": [], "text": "", ROW_ID_FIELD: 0}
        self._operators = load_records(recipe, [example], folder)[1]
        self.operators = tuple(
            OperatorKind(op._name, frozenset(base.__name__ for base in type(op).__mro__))
            for op in self._operators
        )

    def run(self, task: ChunkTask) -> ChunkDone:
        """Run a segment's operators on one chunk.

        Raises:
            SynthAgentError: an operator failed, or samples were lost without its decision.
        """
        dataset = _dataset(task.table)
        seed = _SeedPart.of_table(task.table)
        steps: list[ChunkStep] = []
        anew: set[int] = set()
        for position in range(task.segment.start, task.segment.stop):
            started, before = time.monotonic(), _row_ids(dataset)
            if position in task.segment.forget_before:
                fresh = _without_measurements(dataset)
                if fresh is not dataset:
                    anew.add(position + 1)
                    dataset = fresh
            operator = self._operators[position]
            if self.operators[position].is_deduplicator:
                dataset, keys, keyless = _hashed(operator, dataset, seed)
                step = ChunkStep(len(before), len(before), _since(started), before[:0])
                table = _table(dataset)
                return ChunkDone(task.index, table, (*steps, step), frozenset(anew), keys, keyless)
            dataset = run_operator(operator, dataset, seed, lambda done, total: None)
            after = _row_ids(dataset)
            dropped = np.setdiff1d(before, after)
            steps.append(ChunkStep(len(before), len(after), _since(started), dropped))
            if not len(after):
                break
        return ChunkDone(task.index, _table(dataset), tuple(steps), frozenset(anew))


class _Run:
    """Adds up what chunks report."""

    def __init__(self, operators: Sequence[OperatorKind], files: _ChunkFiles) -> None:
        self._operators = operators
        self._files = files
        self._before = [0] * len(operators)
        self._after = [0] * len(operators)
        self._seconds = [0.0] * len(operators)
        self._dropped: list[dict[int, RowIds]] = [{} for _ in operators]
        self._anew: set[int] = set()
        self._keys: dict[int, tuple[Keys, Mask, RowIds]] = {}

    def label(self, segment: Segment) -> str:
        """Return what the progress calls a segment."""
        names = [operator.name for operator in self._operators[segment.start : segment.stop]]
        many = f"{segment.start + 1} to {segment.stop}" if len(names) > 1 else f"{segment.stop}"
        return f"{many}/{len(self._operators)} {', '.join(names)}"

    def add(self, segment: Segment, result: ChunkDone) -> None:
        """Count a chunk and put it on disk."""
        for position, step in enumerate(result.steps, segment.start):
            self._before[position] += step.before
            self._after[position] += step.after
            self._seconds[position] += step.seconds
            self._dropped[position][result.index] = step.dropped
        self._anew |= result.measured_anew
        if result.keys is not None and result.keyless is not None:
            # A view would keep the whole chunk in memory.
            row_ids = np.array(result.table[ROW_ID_FIELD].to_numpy())
            self._keys[result.index] = (result.keys, result.keyless, row_ids)
        self._files.write(result.index, result.table)

    def close(self, segment: Segment) -> None:
        """Let the deduplicator at the segment's end drop the repeated samples."""
        position = segment.stop - 1
        if not self._operators[position].is_deduplicator:
            self._files.close({})
            return
        started = time.monotonic()
        indices = sorted(self._keys)
        parts = [self._keys[index] for index in indices]
        masks = first_of_equals([part[0] for part in parts], [part[1] for part in parts])
        for index, mask, (_, _, row_ids) in zip(indices, masks, parts, strict=True):
            gone = np.setdiff1d(row_ids, row_ids[mask])
            self._dropped[position][index] = gone
        self._after[position] = int(sum(mask.sum() for mask in masks))
        self._seconds[position] += _since(started)
        self._keys.clear()
        self._files.close(dict(zip(indices, masks, strict=True)))

    def outcome(self) -> StreamedOutcome:
        """Return what is left after the operators that had samples to work on."""
        ran = [position for position, before in enumerate(self._before) if before]
        counts = tuple(
            OperatorCount(
                self._operators[i].name,
                self._before[i],
                self._after[i],
                round(self._seconds[i], 3),
            )
            for i in ran
        )
        dropped = {
            f"{i + 1}. {self._operators[i].name}": np.concatenate(
                [np.empty(0, np.int64), *(rows for _, rows in sorted(self._dropped[i].items()))]
            )
            for i in ran
        }
        files = self._files
        anew = tuple(sorted(self._anew))
        return StreamedOutcome(files.num_samples, files.num_rows, counts, dropped, anew, files)


@dataclass
class _ChunkFiles:
    """The chunks on disk: what the seed says of them, and the samples that are left of each."""

    folder: Path
    num_chunks: int = 0
    num_samples: int = 0
    num_rows: int = 0
    _rows: dict[int, int] = field(default_factory=dict)
    _masks: dict[int, Mask] = field(default_factory=dict)

    def first(
        self, samples: Iterable[Sample], images: Path, chunk_samples: int
    ) -> Iterator[tuple[int, Any]]:
        """Cut samples into chunks, note what the seed says of each, and yield them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        source = iter(samples)
        while part := list(itertools.islice(source, chunk_samples)):
            index, start = self.num_chunks, self.num_samples
            self.num_chunks += 1
            self.num_samples += len(part)
            noted = [[sample.id, list(sample.images)] for sample in part]
            document = json.dumps({"start": start, "samples": noted}, ensure_ascii=False)
            self._seed_file(index).write_text(document, encoding="utf-8")
            records = seed_records(part, images)
            for row_id, record in enumerate(records, start):
                record[ROW_ID_FIELD] = row_id
            yield index, pa.Table.from_pylist(records, RECORD_SCHEMA)

    def all(self) -> Iterator[tuple[int, Any]]:
        """Yield the chunks of which samples are left."""
        for index in range(self.num_chunks):
            if self._rows.get(index):
                yield index, self.read(index)

    def read(self, index: int) -> Any:
        """Return the samples that are left of a chunk, as a `pyarrow.Table`."""
        if index not in self._rows:
            return RECORD_SCHEMA.empty_table()
        with pa.OSFile(str(self._chunk_file(index)), "rb") as file:
            table = pa.ipc.open_file(file).read_all()
        mask = self._masks.get(index)
        return table if mask is None else table.filter(pa.array(mask))

    def write(self, index: int, table: Any) -> None:
        """Write a chunk in place of the one that was read.

        Its mask is done with: the chunk was read through it.
        """
        self._masks.pop(index, None)
        partial = self._chunk_file(index).with_suffix(".partial")
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        partial.replace(self._chunk_file(index))
        self._rows[index] = len(table)

    def close(self, masks: Mapping[int, Mask]) -> None:
        """End a segment; samples outside the masks are gone."""
        self._masks.update(masks)
        self._rows.update({index: int(mask.sum()) for index, mask in masks.items()})
        self.num_rows = sum(self._rows.values())

    def seed_part(self, index: int) -> tuple[int, list[str | int], list[list[str]]]:
        """Return a chunk's first row id, and the seed's ids and relative paths of its samples."""
        document = json.loads(self._seed_file(index).read_text(encoding="utf-8"))
        ids = [identity for identity, _ in document["samples"]]
        return document["start"], ids, [paths for _, paths in document["samples"]]

    def _seed_file(self, index: int) -> Path:
        return self.folder / f"seed-{index:06d}.json"

    def _chunk_file(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.arrow"


class _SeedPart(Sequence[Sample]):
    """The seed's samples of one chunk, under their row ids."""

    def __init__(
        self, start: int, ids: Sequence[str | int], images: Sequence[Sequence[str]]
    ) -> None:
        self._start, self._ids, self._images = start, ids, images
        self._place: dict[int, int] | None = None

    @classmethod
    def of_table(cls, table: Any) -> _SeedPart:
        """Return the samples of a chunk; of those with one row id, one."""
        part = cls(0, table["id"].to_pylist(), [()] * len(table))
        part._place = {row_id: i for i, row_id in enumerate(table[ROW_ID_FIELD].to_pylist())}
        return part

    @overload
    def __getitem__(self, row_id: int) -> Sample: ...
    @overload
    def __getitem__(self, row_id: slice) -> Sequence[Sample]: ...
    def __getitem__(self, row_id: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(row_id, slice):
            return [self[i] for i in range(*row_id.indices(len(self)))]
        place = row_id - self._start if self._place is None else self._place[row_id]
        return Sample(self._ids[place], tuple(self._images[place]), "")

    def __len__(self) -> int:
        return self._start + len(self._ids)


def _dataset(table: Any) -> Any:
    """Return a chunk as Data-Juicer's data set, in memory."""
    from data_juicer.core.data import NestedDataset
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return NestedDataset(Dataset(InMemoryTable(table)))


def _table(dataset: Any) -> Any:
    """Return a data set as a `pyarrow.Table` that knows the columns' types."""
    return dataset.flatten_indices().data.table.combine_chunks()


def _row_ids(dataset: Any) -> RowIds:
    table = dataset.select_columns([ROW_ID_FIELD]).with_format("numpy")
    return np.asarray(table[:][ROW_ID_FIELD], np.int64) if len(dataset) else np.empty(0, np.int64)


def _without_measurements(dataset: Any) -> Any:
    """Return the data set without what was measured of its samples; itself if there is nothing."""
    from synth_agent.stages.forget_measurements import FORGOTTEN

    stale = [name for name in FORGOTTEN if name in dataset.column_names]
    return dataset.remove_columns(stale) if stale else dataset


def _hashed(operator: Any, dataset: Any, seed: Sequence[Sample]) -> tuple[Any, Keys, Mask]:
    """Return the samples with a deduplicator's hashes, their keys, and which equal no other.

    The operator's own `compute_hash` is called for each sample. Data-Juicer's way there, a map over
    the data set, takes several times as long for the same hashes.
    """
    from data_juicer.utils.constant import HashKeys

    names = [HashKeys.hash]
    if operator._name == "image_deduplicator":
        names = [HashKeys.imagehash, *names] if operator.consider_text else [HashKeys.imagehash]
    known = [name for name in names if name in dataset.column_names]
    columns = dataset.select_columns([ROW_ID_FIELD, "text", "images", *known])
    rows = _table(columns).to_pylist()
    hashes = [_hashes_of(operator, row, names, seed) for row in rows]
    for place, name in enumerate(names):
        if name not in known:
            dataset = dataset.add_column(name, [values[place] for values in hashes])
    packed = b"".join(_key(values) for values in hashes)
    keys = np.frombuffer(packed, dtype=np.dtype((np.void, _KEY_BYTES)))
    # The image deduplicator keeps every sample without pictures, unless it looks at texts too.
    keyless = np.array([values == ("",) for values in hashes], dtype=np.bool_)
    return dataset, keys, keyless


def _hashes_of(
    operator: Any, row: dict[str, Any], names: Sequence[str], seed: Sequence[Sample]
) -> tuple[str, ...]:
    row_id = row.pop(ROW_ID_FIELD)
    try:
        made = operator.compute_hash(row)
    except Exception as error:
        where = describe_rows([row_id], seed)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OperatorFailed(
            "Operator failed",
            f"{operator._name} on {where}: {type(error).__name__}: {reason}",
            "the stage's log has the whole traceback",
        ) from error
    return tuple(made[name] for name in names)


def _key(values: tuple[str, ...]) -> bytes:
    joined = json.dumps(values).encode()
    return hashlib.blake2b(joined, digest_size=_KEY_BYTES).digest()


def _since(started: float) -> float:
    return time.monotonic() - started
