"""Progress as data: one JSON object a line, appended to a file that others may tail.

Nothing here is meant for people; the reader decides how a step, a loss or an error is shown.
Each line is written with a single `write`, so that a reader never sees half of a record that is
followed by another.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from mgm.errors import InputError


class Progress:
    """Append progress records to a file, or drop them when there is no file.

    Args:
        path: File to append to; None makes every call a no-op.
    """

    def __init__(self, path: Path | None) -> None:
        self._descriptor: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Further updates are dropped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def update(
        self, *, step: int, total: int, unit: str, label: str = "", **numbers: float | None
    ) -> None:
        """Record that `step` of `total` units are done.

        Args:
            step: Units done.
            total: Units in all; 0 when unknown.
            unit: What is counted, in the plural: `samples`, `steps`, `questions`.
            label: Part of the stage at work, for example an operator's name.
            numbers: Measured values such as `loss`, `lr`, `grad_norm`, `samples_per_second`.
        """
        record: dict[str, object] = {"step": step, "total": total, "unit": unit}
        if label:
            record["label"] = label
        record.update({name: value for name, value in numbers.items() if value is not None})
        self._write(record)

    def error(self, error: InputError) -> None:
        """Record why the program stops."""
        self._write({"error": error.as_dict()})

    def _write(self, record: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
        os.write(self._descriptor, (json.dumps(stamped) + "\n").encode())
