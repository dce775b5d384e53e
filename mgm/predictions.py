"""Answers of an evaluation that is under way, safe on disk batch by batch.

Owns the partial file alone; the finished predictions are `mgm.evaluate`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Predictions:
    """Answers so far, on disk as soon as a batch is done.

    The file's first line names what the answers depend on; a file of another run is discarded.
    Every further line is one whole batch, and a line that was cut off does not count.

    Args:
        path: The partial file.
        fingerprint: What the answers depend on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.answers: dict[int, str] = {}
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        intact = self._read(fingerprint)
        self._file = path.open("r+b" if intact else "w+b")
        self._file.truncate(intact)
        self._file.seek(intact)
        if not intact:
            self._append({"fingerprint": fingerprint})

    def add(self, batch: Mapping[int, str]) -> None:
        """Keep the answers of a batch, by position."""
        self._append({"answers": sorted(batch.items())})
        self.answers.update(batch)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: str) -> int:
        """Read what is there and return the number of bytes that hold whole lines."""
        if not self._path.exists():
            return 0
        intact = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            if intact == 0:
                if record.get("fingerprint") != fingerprint:
                    return 0
            elif (answers := _answers(record)) is None:
                break
            else:
                self.answers.update(answers)
            intact += len(line)
        return intact


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _answers(record: Mapping[str, Any]) -> dict[int, str] | None:
    """Return the answers of a line by position, None where it holds something else."""
    try:
        answers = {int(place): text for place, text in record["answers"]}
    except (KeyError, TypeError, ValueError):
        return None
    return answers if all(isinstance(text, str) for text in answers.values()) else None
