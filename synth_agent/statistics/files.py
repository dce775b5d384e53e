"""The files of the statistics: samples of a data set, and columns of scores in parts.

Every file appears under its name only when it is complete. Parts are added and never changed, and
the latest value of a sample is the one that counts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from synth_agent.catalogue import SUPPORTED_VERSION
from synth_agent.errors import InvalidInput
from synth_agent.statistics.columns import OWN_SOURCES, SOURCES, ColumnSpec, Kind

_ARROW: Mapping[Kind, pa.DataType] = {
    "number": pa.float64(),
    "list": pa.list_(pa.float64()),
    "string": pa.string(),
}
_DATA_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_PART = re.compile(r"part-(\d+)\.parquet")


@dataclass(frozen=True)
class SampleRow:
    """One sample of a data set."""

    id: str
    sample: str
    """Hex digest of the text and of the pictures' contents."""
    text: str
    images: tuple[str, ...]


def write_samples(root: Path, data_key: str, samples: Iterable[SampleRow]) -> Path:
    """Write the list of a data set's samples, completely or not at all, and return its path."""
    rows = list(samples)
    table = pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int64()),
            "id": pa.array([row.id for row in rows], pa.string()),
            "sample": pa.array([row.sample for row in rows], pa.string()),
            "text": pa.array([row.text for row in rows], pa.string()),
            "images": pa.array([list(row.images) for row in rows], pa.list_(pa.string())),
        }
    )
    path = samples_file(root, data_key)
    _write_table(table, path)
    return path


def read_samples(root: Path, data_key: str) -> Any:
    """Return a data set's samples as an Arrow table in their order: row, id, sample, text, images.

    Raises:
        InvalidInput: the data set was not analysed, or its file cannot be read.
    """
    path = samples_file(root, data_key)
    if not path.exists():
        raise InvalidInput("No statistics", f"{path} does not exist", "analyse the data set first")
    samples = _read_table(path, ["row", "id", "sample", "text", "images"])
    return samples.sort_by("row").combine_chunks()


class ColumnWriter:
    """Adds scores to one column, a part at a time. Only one process may write a column."""

    def __init__(self, root: Path, spec: ColumnSpec) -> None:
        self.spec = spec
        self._folder = _folder(root, spec)
        self._folder.mkdir(parents=True, exist_ok=True)
        document = self._folder / "column.json"
        if not document.exists():
            _publish(document, json.dumps(spec.document(), indent=1).encode() + b"\n")

    def known(self, *, with_errors: bool = True) -> set[str]:
        """Return the digests of the samples that have a score, or an error unless told otherwise."""
        known: set[str] = set()
        for part in _parts(self._folder):
            if with_errors:
                known.update(_read_table(part, ["sample"])["sample"].to_pylist())
                continue
            table = _read_table(part, ["sample", "error"])
            scored = table["error"].is_null()
            # The latest part decides.
            known -= set(table["sample"].filter(pc.invert(scored)).to_pylist())
            known |= set(table["sample"].filter(scored).to_pylist())
        return known

    def append(
        self,
        samples: Sequence[str],
        values: Mapping[str, Sequence[Any]],
        errors: Sequence[str | None] | None = None,
    ) -> Path:
        """Write one part, completely or not at all.

        Args:
            samples: Digests of the samples. One that has a value already gets the new one.
            values: For each stats key, a value per sample as `compute_stats` gives it; None where
                there is an error. Numbers are stored as a run compares them, which is rounded.
            errors: Why a sample has no value; None for a sample that has one.

        Returns:
            The part's path.
        """
        if set(values) != set(self.spec.stats):
            raise ValueError(f"values of {sorted(values)}, expected {list(self.spec.stats)}")
        arrays: dict[str, pa.Array] = {"sample": pa.array(samples, pa.string())}
        for stat in self.spec.stats:
            stored = _ARROW[self.spec.kind(stat)]
            arrays[stat] = pa.array(_as_compared(pa.array(values[stat], stored)), stored)
        arrays["error"] = pa.array(errors or [None] * len(samples), pa.string())
        for leftover in self._folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        parts = _parts(self._folder)
        number = _number(parts[-1]) + 1 if parts else 0
        path = self._folder / f"part-{number:06d}.parquet"
        _write_table(pa.table(arrays), path)
        return path


def read_columns(root: Path) -> tuple[ColumnSpec, ...]:
    """Return the columns on disk of this Data-Juicer version, by operator and key."""
    specs = []
    for path in (root / "columns").glob("*/column.json"):
        document = _read_document(path)
        if document.get("data_juicer") != SUPPORTED_VERSION:
            continue
        if document["operator"] in SOURCES or document["operator"] in OWN_SOURCES:
            specs.append(
                ColumnSpec(
                    document["operator"],
                    document["parameters"],
                    document["models"],
                    tuple(document["stats"]),
                )
            )
    return tuple(sorted(specs, key=lambda spec: (spec.operator, spec.key)))


def part_names(root: Path, spec: ColumnSpec) -> tuple[str, ...]:
    """Return the names of a column's parts, which tell apart its states on disk."""
    return _part_names(_folder(root, spec))


def read_scores(root: Path, spec: ColumnSpec, stat: str) -> Any:
    """Return all that was written for a stat as an Arrow table, the latest first: sample, stat, error.

    Raises:
        InvalidInput: a part cannot be read.
    """
    kind = spec.kind(stat)
    schema = pa.schema({"sample": pa.string(), stat: _ARROW[kind], "error": pa.string()})
    parts = _parts(_folder(root, spec))
    tables = [_read_table(part, schema.names).cast(schema) for part in parts][::-1]
    return pa.concat_tables([_reverse(table) for table in tables] or [schema.empty_table()])


def _as_compared(scores: Any) -> Any:
    """Return scores as filters get to see them in a run.

    Between scoring and comparing, a run's data set holds scores as JSON of ten decimals, which also
    turns what is not finite into null. Reading such a number back is not correctly rounded, so only
    the same encoder gives the same bits.
    """
    from pandas.io.json import (  # type: ignore[import-untyped]
        ujson_dumps,
        ujson_loads,
    )

    return ujson_loads(ujson_dumps(scores.to_pylist()))


def samples_file(root: Path, data_key: str) -> Path:
    """Return the file of a data set's samples.

    Raises:
        InvalidInput: the key may not be a file's name.
    """
    if not _DATA_KEY.fullmatch(data_key):
        raise InvalidInput("Bad data key", repr(data_key), "use letters, digits, '-', '_' and '.'")
    return root / "samples" / f"{data_key}.parquet"


def _folder(root: Path, spec: ColumnSpec) -> Path:
    return root / "columns" / spec.key


def _number(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    assert match is not None
    return int(match[1])


def _part_names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if _PART.fullmatch(p.name)))
    except FileNotFoundError:
        return ()


def _parts(folder: Path) -> list[Path]:
    """Return a column's parts, the oldest first."""
    return sorted((folder / name for name in _part_names(folder)), key=_number)


def _reverse(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.arange(table.num_rows)[::-1]))


def _read_table(path: Path, columns: Sequence[str]) -> Any:
    try:
        return pq.read_table(path, use_threads=False).select(list(columns))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InvalidInput(
            "Statistics cannot be read",
            f"{path}: {str(error).splitlines()[0]}",
            "delete this file and analyse the data set again",
        ) from error


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not {"operator", "parameters", "models", "stats"} <= set(document):
            raise ValueError("a field is missing")
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            "Statistics cannot be read", f"{path}: {error}", "delete its folder and analyse again"
        ) from error
    return dict(document)


def _write_table(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    _publish(path, sink.getvalue())


def _publish(path: Path, content: Any) -> None:
    """Write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
