"""Queries over a table that come from outside: one SELECT at a time, without files or network."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from synth_agent.errors import InvalidInput, SynthAgentError

MAX_RESULT_BYTES = 1 << 20
QUERY_MEMORY = "1GB"
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


@dataclass(frozen=True)
class QueryResult:
    """What a query found."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool
    """Whether there was more than the limits let through."""


class Database:
    """A database in memory that holds one Arrow table as the view `samples`; not for two threads."""

    def __init__(self, samples: Any) -> None:
        self._connection = duckdb.connect(":memory:")
        self._connection.register("samples", samples)
        for setting in _SETTINGS:
            self._connection.execute(f"SET {setting}")

    def query(self, sql: str, limit_rows: int, timeout_s: float, limit_bytes: int) -> QueryResult:
        """Run one SELECT.

        Args:
            sql: One statement in DuckDB's dialect.
            limit_rows: Most rows that are returned.
            timeout_s: Seconds after which it is interrupted.
            limit_bytes: Most bytes of text that are returned.

        Raises:
            InvalidInput: not one SELECT, or the database refuses it.
            SynthAgentError: it took too long.
        """
        _check_select(self._connection, sql)
        timer = threading.Timer(timeout_s, self._connection.interrupt)
        timer.start()
        try:
            # The newline ends a comment that the statement may close with.
            cursor = self._connection.execute(
                f"SELECT * FROM (\n{sql.strip().rstrip(';')}\n) LIMIT {limit_rows + 1}"
            )
            columns = tuple(column[0] for column in cursor.description or ())
            rows = cursor.fetchall()
        except duckdb.InterruptException as error:
            raise SynthAgentError(
                "Query took too long", f"more than {timeout_s:g} s", "ask for less at a time"
            ) from error
        except duckdb.Error as error:
            raise _refused(error) from error
        finally:
            timer.cancel()
        return _bounded(columns, rows, limit_rows, limit_bytes)


def _check_select(database: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = database.extract_statements(sql)
    except duckdb.Error as error:
        raise _refused(error) from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InvalidInput("Not a query", sql.strip()[:200], "write one SELECT statement")


def _refused(error: duckdb.Error) -> InvalidInput:
    return InvalidInput(
        "Query failed",
        str(error).strip().splitlines()[0],
        "the view is `samples`; its columns are row, id, sample, text, images and the stats",
    )


def _bounded(
    columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]], limit_rows: int, limit_bytes: int
) -> QueryResult:
    kept: list[tuple[Any, ...]] = []
    size = 0
    for row in rows[:limit_rows]:
        size += len(json.dumps(row, default=str, ensure_ascii=False).encode())
        if size > limit_bytes:
            break
        kept.append(row)
    return QueryResult(columns, tuple(kept), len(kept) < len(rows))
