"""Records as Parquet files: a data set whose columns are the fields of JSONL records.

Owns reading in batches and writing whole files. pyarrow is imported when first needed, so that reading
JSONL stays light.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synth_agent.errors import InvalidInput

SUFFIX = ".parquet"
_BATCH_ROWS = 10_000


def is_parquet(path: Path) -> bool:
    """Tell by its name whether a file is Parquet."""
    return path.suffix.lower() == SUFFIX


def iter_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row from 1, record) of a file; a field that is null is left out.

    Raises:
        InvalidInput: the file is not there or not Parquet.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield row, {key: value for key, value in record.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(
            "Cannot read Parquet", f"{path}: {reason}", "give a Parquet file, or check the path"
        ) from error


def count_rows(path: Path) -> int:
    """Return the number of rows of a file from its footer alone.

    Raises:
        InvalidInput: the file is not there or not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            "Cannot read Parquet", f"{path}: {error}", "give a Parquet file, or check the path"
        ) from error


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """Write records atomically and return their number.

    Raises:
        InvalidInput: a field has values of several kinds, which a column cannot hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist([dict(record) for record in records])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidInput(
            "Fields of several kinds",
            f"{path}: {str(error).splitlines()[0]}",
            "give a field, such as id, one kind of value in every record, or write JSONL",
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return len(records)
