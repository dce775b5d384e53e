"""The process that queries run in: it holds the table, and the system bounds its memory.

    python -m synth_agent.statistics.query_process DESCRIPTOR

The descriptor is that of an Arrow file, the view `samples`. After one line that says it is ready,
each line of standard input is a request, and each of standard output an answer, both JSON; it ends
with its input.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa  # type: ignore[import-untyped]

QUERY_MEMORY = "1GB"
MOST_MEMORY = 3 * 2**30
"""Of the process, beside the mapped table. What is beyond it is refused, or ends the process."""
_SETTINGS = (
    f"memory_limit = '{QUERY_MEMORY}'",
    "threads = 2",
    "temp_directory = ''",
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "python_enable_replacements = false",
    "enable_external_access = false",
    "lock_configuration = true",
)


def connect(samples: Any) -> duckdb.DuckDBPyConnection:
    """Return a database in memory that holds one Arrow table as the view `samples`."""
    connection = duckdb.connect(":memory:")
    connection.register("samples", samples)
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    return connection


def answer(connection: duckdb.DuckDBPyConnection, request: dict[str, Any]) -> dict[str, Any]:
    """Run the query of a request; see `Database.query` for its limits."""
    sql = request["sql"]
    refused = _check_select(connection, sql)
    if refused is not None:
        return refused
    timer = threading.Timer(request["seconds"], connection.interrupt)
    timer.start()
    try:
        # The newline ends a comment that the statement may close with.
        cursor = connection.execute(
            f"SELECT * FROM (\n{sql.strip().rstrip(';')}\n) LIMIT {request['rows'] + 1}"
        )
        columns = [column[0] for column in cursor.description or ()]
        rows = cursor.fetchall()
    except duckdb.InterruptException:
        return {"failed": "time"}
    except (duckdb.OutOfMemoryException, MemoryError):
        return {"failed": "memory"}
    except duckdb.Error as error:
        return _refused(error)
    finally:
        timer.cancel()
    kept = _bounded(rows[: request["rows"]], request["bytes"])
    return {"columns": columns, "rows": kept, "truncated": len(kept) < len(rows)}


def _check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any] | None:
    """Return why a text is not one SELECT, None where it is."""
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        return _refused(error)
    if len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT:
        return None
    return {"refused": ("Not a query", sql.strip()[:200], "write one SELECT statement")}


def _refused(error: duckdb.Error) -> dict[str, Any]:
    hint = "the view is `samples`; its columns are row, id, sample, text, images and the stats"
    return {"refused": ("Query failed", str(error).strip().splitlines()[0], hint)}


def _bounded(rows: Sequence[tuple[Any, ...]], limit_bytes: int) -> list[tuple[Any, ...]]:
    kept: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        size += len(
            json.dumps(row, default=str, skipkeys=True, ensure_ascii=False).encode(errors="replace")
        )
        if size > limit_bytes:
            break
        kept.append(row)
    return kept


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line, default=str, skipkeys=True) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    table = pa.ipc.open_file(pa.memory_map(f"/proc/self/fd/{sys.argv[1]}")).read_all()
    connection = connect(table)
    _tell({"ready": True})
    for line in sys.stdin:
        _tell(answer(connection, json.loads(line)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
