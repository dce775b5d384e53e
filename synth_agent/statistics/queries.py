"""Queries over a table that come from outside: one SELECT at a time, without files or network.

They run in a process of their own (`query_process`), which holds the table: the database counts
neither the memory nor the time of single functions, such as `repeat('x', 2000000000)`, so the system
bounds the memory, and whoever asks ends the process when the time is over.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from synth_agent.errors import InvalidInput, SynthAgentError

MAX_RESULT_BYTES = 1 << 20
_STARTING_SECONDS = 60.0
"""How long the process may take to load the database; on an idle machine it is half a second."""
_ENDING_SECONDS = 0.5
"""A query that the database can interrupt is ended by it, so that the process stays."""


@dataclass(frozen=True)
class QueryResult:
    """What a query found."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool
    """Whether there was more than the limits let through."""


class Database:
    """A database in a process of its own, whose view `samples` is an Arrow table.

    Not for two threads. The process is started by the first query, and again after one that had to
    be ended with it; it ends when nobody holds the database.
    """

    def __init__(self, samples: Any) -> None:
        self._file = tempfile.TemporaryFile(prefix="synth-agent-")  # noqa: SIM115
        place = f"/proc/self/fd/{self._file.fileno()}"
        with pa.OSFile(place, "wb") as sink, pa.ipc.new_file(sink, samples.schema) as writer:
            writer.write_table(samples)
        self._process: subprocess.Popen[bytes] | None = None

    def query(self, sql: str, limit_rows: int, timeout_s: float, limit_bytes: int) -> QueryResult:
        """Run one SELECT.

        Args:
            sql: One statement in DuckDB's dialect.
            limit_rows: Most rows that are returned.
            timeout_s: Seconds after which it is interrupted.
            limit_bytes: Most bytes of text that are returned.

        Raises:
            InvalidInput: not one SELECT, or the database refuses it.
            SynthAgentError: it took too long or too much memory.
        """
        process = self._started()
        request = {"sql": sql, "rows": limit_rows, "seconds": timeout_s, "bytes": limit_bytes}
        answer = self._ask(process, request, timeout_s + _ENDING_SECONDS)
        if answer is None:
            raise _too_long(timeout_s)
        if "refused" in answer:
            raise InvalidInput(*answer["refused"])
        if answer.get("failed") == "time":
            raise _too_long(timeout_s)
        if "failed" in answer:
            raise SynthAgentError(
                "Query took too much memory", sql.strip()[:200], "ask for less at a time"
            )
        rows = tuple(tuple(row) for row in answer["rows"])
        return QueryResult(tuple(answer["columns"]), rows, answer["truncated"])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        descriptor = self._file.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "synth_agent.statistics.query_process", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env={name: text for name, text in os.environ.items() if not name.startswith("OPENAI_")},
        )
        weakref.finalize(self, _end, process)
        if self._ask(process, None, _STARTING_SECONDS) is None:
            raise SynthAgentError("Queries cannot run", "the database did not start", "try again")
        self._process = process
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], request: Any, seconds: float
    ) -> dict[str, Any] | None:
        """Send a request, if any, and return the answer; None, and no process, if none came."""
        assert process.stdin is not None and process.stdout is not None
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            line = _read_line(process.stdout.fileno(), seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            _end(process)
            return None
        if not line.endswith(b"\n"):
            _end(process)  # the system ended it, which it does where memory is short
            return {"failed": "memory"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _read_line(descriptor: int, seconds: float) -> bytes | None:
    """Return what comes up to the end of a line or of the stream, None where time is over first."""
    deadline = time.monotonic() + seconds
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                break
            found += piece
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _too_long(seconds: float) -> SynthAgentError:
    return SynthAgentError(
        "Query took too long", f"more than {seconds:g} s", "ask for less at a time"
    )
