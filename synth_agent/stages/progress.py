"""Progress of a stage as JSON lines in a file that others tail; the format of `mgm.progress`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType

from synth_agent.errors import SynthAgentError
from synth_agent.runs import now

MIN_SECONDS_BETWEEN_UPDATES = 0.2


class StageProgress:
    """Append progress records to a file.

    Args:
        path: File to append to; None makes every call a no-op.
    """

    def __init__(self, path: Path | None) -> None:
        self._descriptor: int | None = None
        self._last = 0.0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def update(self, *, step: int, total: int, unit: str, label: str, **numbers: float) -> None:
        """Record that `step` of `total` units are done; ends are always written, the rest seldom.

        Args:
            step: Units done.
            total: Units in all.
            unit: What is counted, in the plural.
            label: Part of the stage at work, such as an operator's name.
            numbers: Further measured values.
        """
        moment = time.monotonic()
        if 0 < step < total and moment - self._last < MIN_SECONDS_BETWEEN_UPDATES:
            return
        self._last = moment
        self._write({"step": step, "total": total, "unit": unit, "label": label, **numbers})

    def error(self, error: SynthAgentError) -> None:
        """Record why the stage stops."""
        self._write({"error": error.as_dict()})

    def _write(self, record: dict[str, object]) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, (json.dumps({"time": now(), **record}) + "\n").encode())
