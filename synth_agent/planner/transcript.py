"""The record of every exchange with a language model, and what can be read from it.

One JSON line per exchange, appended and on the disk before its reply is used; failures and cancelled
exchanges too. Secrets are taken out first, and the digest of a request is that of what is recorded,
so that a recording can be replayed without any key.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synth_agent import runs
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.planner.budget import Usage
from synth_agent.planner.exchange import (
    BudgetSpent,
    ContextTooLong,
    EndpointError,
    Reply,
    Request,
    ToolCall,
)
from synth_agent.secrets import redact_value

_ERRORS: dict[str, type[SynthAgentError]] = {
    kind.__name__: kind for kind in (InvalidInput, EndpointError, ContextTooLong, BudgetSpent)
}


@dataclass(frozen=True)
class Exchange:
    """A request and what came of it: a reply or an error."""

    request: Mapping[str, Any]
    """`Request.content()` without secrets."""
    reply: Reply | None
    error: Mapping[str, str] | None
    """`kind`, `title`, `message`, `hint` of a failure."""
    usage: Usage
    """Of all attempts, those that failed included."""
    seconds: float
    attempts: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """Model, address, and how the request was put; nothing secret."""
    thinking: str = ""
    time: str = ""

    @property
    def digest(self) -> str:
        """sha256 of the request as recorded."""
        return runs.digest(self.request)

    def raised(self) -> SynthAgentError | None:
        """Return the recorded failure as the error that it was."""
        if self.error is None:
            return None
        kind = _ERRORS.get(self.error.get("kind", ""), EndpointError)
        return kind(*(self.error.get(name, "") for name in ("title", "message", "hint")))


def request_content(request: Request, secrets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a request as it is recorded: plain data without secrets."""
    content: dict[str, Any] = redact_value(request.content(), secrets)
    return content


def error_content(error: SynthAgentError) -> dict[str, str]:
    """Return an error as it is recorded."""
    return {"kind": type(error).__name__, **error.as_dict()}


class Transcript:
    """Appends exchanges to a file. Safe to share between threads of one process.

    Args:
        path: JSON lines file; it and its folder are made when missing, and a last line that a crash
            has cut off is dropped.

    Raises:
        InvalidInput: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with _reported(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))

    def append(self, exchange: Exchange, secrets: tuple[str, ...] = ()) -> None:
        """Write one exchange; it is on the disk when this returns.

        Raises:
            InvalidInput: the file cannot be written.
        """
        line = _line(exchange, secrets)
        with self._lock, _reported(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                _write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_transcript(path: Path) -> tuple[Exchange, ...]:
    """Return the exchanges of a transcript, oldest first. A last line that is cut off is ignored.

    Raises:
        InvalidInput: the file is not there, or a line before the last is no exchange.
    """
    with _reported(path):
        data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
        try:
            found.append(_exchange(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                "Not a transcript",
                f"{path} line {number}: {type(error).__name__}: {error}",
                "give a transcript.jsonl that this program has written",
            ) from error
    return tuple(found)


def spent(path: Path) -> tuple[Usage, ...]:
    """Return what each exchange of a transcript has used; nothing when there is no file."""
    return tuple(exchange.usage for exchange in read_transcript(path)) if path.exists() else ()


def _line(exchange: Exchange, secrets: tuple[str, ...]) -> bytes:
    record = {
        "time": exchange.time or runs.now(),
        "digest": exchange.digest,
        "request": exchange.request,
        "options": exchange.options,
        "reply": None if exchange.reply is None else asdict(exchange.reply),
        "error": exchange.error,
        "usage": asdict(exchange.usage),
        "seconds": round(exchange.seconds, 3),
        "attempts": exchange.attempts,
    }
    if exchange.thinking:
        record["thinking"] = exchange.thinking
    # Field names are not touched: only texts inside them can hold a secret.
    written = {name: redact_value(value, secrets) for name, value in record.items()}
    text = json.dumps(written, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate has no UTF-8; as an escape it is valid JSON and reads back the same.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _exchange(record: Mapping[str, Any]) -> Exchange:
    reply = record["reply"]
    made = None
    if reply is not None:
        calls = tuple(ToolCall(**call) for call in reply["tool_calls"])
        made = Reply(**{**reply, "tool_calls": calls})
    return Exchange(
        request=record["request"],
        reply=made,
        error=record["error"],
        usage=Usage(**record["usage"]),
        seconds=record["seconds"],
        attempts=record["attempts"],
        options=record["options"],
        thinking=record.get("thinking", ""),
        time=record["time"],
    )


def _write_all(descriptor: int, line: bytes) -> None:
    """Write a whole line or, when the disk is full, nothing of it."""
    start = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


class _reported:
    """Turns the system's errors over a file into one that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            raise InvalidInput(
                "Cannot use the transcript",
                f"{self._path}: {error.strerror or error}",
                "check the path, its permissions and the space on the disk",
            ) from error


def differences(recorded: Any, asked: Any, path: str = "") -> Iterator[str]:
    """Yield where two plain values differ, in order, each in one short line."""
    if isinstance(recorded, Mapping) and isinstance(asked, Mapping):
        for name in [*recorded, *(name for name in asked if name not in recorded)]:
            inner = f"{path}.{name}" if path else str(name)
            if name not in asked or name not in recorded:
                yield f"{inner}: only in the {'recording' if name in recorded else 'request'}"
            else:
                yield from differences(recorded[name], asked[name], inner)
    elif isinstance(recorded, list) and isinstance(asked, list):
        for position, (one, other) in enumerate(zip(recorded, asked, strict=False)):
            yield from differences(one, other, f"{path}[{position}]")
        if len(recorded) != len(asked):
            yield f"{path}: {len(recorded)} recorded, {len(asked)} asked"
    elif isinstance(recorded, str) and isinstance(asked, str) and recorded != asked:
        pairs = enumerate(zip(recorded, asked, strict=False))
        shorter = min(len(recorded), len(asked))
        at = next((position for position, (one, other) in pairs if one != other), shorter)
        start = max(0, at - 20)
        said = recorded[start : at + 40], asked[start : at + 40]
        yield f"{path} from character {at}: recorded {said[0]!r}, asked {said[1]!r}"
    elif recorded != asked:
        yield f"{path}: recorded {recorded!r}, asked {asked!r}"
