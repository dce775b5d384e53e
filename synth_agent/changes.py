"""What each operator of a recipe did to single samples, for people to look at.

Data-Juicer's own tracer pairs the rows before and after a mapper by position, which is wrong where one
sample becomes several, and keeps one file for all operators of a name. Here rows are paired by the
seed row that they come from, operator by operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from synth_agent.data import atomic_file

CHANGES_NAME = "changes.json"
MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Change:
    """One sample that an operator dropped or changed."""

    id: str
    """The seed sample's id."""
    before: str
    after: str | None
    """The text that it was given; None when the sample was dropped."""


@dataclass(frozen=True)
class OperatorChanges:
    """Some of the samples that an operator dropped or changed."""

    operator: str
    """`position. name`, after the branch's name where there are branches."""
    changes: tuple[Change, ...]


def spread(found: Sequence[int], count: int = MOST_EXAMPLES) -> list[int]:
    """Return up to `count` members, evenly spread over the sequence."""
    if len(found) <= count:
        return list(found)
    return [found[index * len(found) // count] for index in range(count)]


def write_changes(folder: Path, changes: Sequence[OperatorChanges]) -> None:
    """Write `changes.json` of a processed data set."""
    with atomic_file(folder / CHANGES_NAME) as file:
        json.dump([asdict(one) for one in changes], file, ensure_ascii=False, indent=1)
        file.write("\n")


def read_changes(folder: Path) -> list[OperatorChanges]:
    """Read what `write_changes` wrote; nothing where a data set has no such file."""
    try:
        records: list[Mapping[str, object]] = json.loads((folder / CHANGES_NAME).read_text("utf-8"))
        return [
            OperatorChanges(
                str(record["operator"]),
                tuple(Change(**change) for change in record["changes"]),  # type: ignore[attr-defined]
            )
            for record in records
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
