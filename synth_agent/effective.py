"""The effective training set: how many samples the first training stage sees, and how often each.

Counted from the rows of a processed dataset, or from the rows that a recipe is known to make before
it runs. The arithmetic of steps is that of `mgm.train`, which applies whole steps only and leaves out
what is left over at the end of an epoch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synth_agent.catalogue import load_catalogue
from synth_agent.data import read_samples
from synth_agent.data_plans import drawn
from synth_agent.errors import InvalidInput


@dataclass(frozen=True)
class Training:
    """The settings of a training stage that decide how many samples it sees."""

    global_batch_size: int = 256
    micro_batch_size: int = 8
    epochs: float = 1.0
    max_steps: int = 0
    """Optimizer steps; 0 means as many as `epochs` gives."""

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Training:
        """Read them from the settings of a stage, such as `settings["pretrain"]`."""
        return cls(
            section["global_batch_size"],
            section["micro_batch_size"],
            section["epochs"],
            section["max_steps"],
        )

    def steps_per_epoch(self, num_samples: int) -> int:
        """Return the optimizer steps of one pass; a last one may lack part of a micro-batch."""
        per_step = self.global_batch_size // self.micro_batch_size
        return max(1, math.ceil(num_samples / self.micro_batch_size) // per_step)

    def steps(self, num_samples: int) -> int:
        """Return the optimizer steps of the whole stage."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(num_samples))

    def seen(self, num_samples: int) -> int:
        """Return how many samples, repetitions counted, go into those steps."""
        per_epoch = self.steps_per_epoch(num_samples)
        epochs, rest = divmod(self.steps(num_samples), per_epoch)
        whole = min(num_samples, per_epoch * self.global_batch_size)
        return epochs * whole + min(whole, rest * self.global_batch_size)


@dataclass(frozen=True)
class Ladder:
    """Samples on their way from the seed set to the cap."""

    seed_samples: int
    after_filters: int
    """What the operators leave, all branches together, with what deduplicators dropped."""
    after_duplicates: int
    """What the operators leave, all branches together."""
    merged: int
    """After the drawing, repeating and merging of a data plan; of a linear recipe the same."""


@dataclass(frozen=True)
class Effective:
    """What the first training stage makes of a recipe's samples."""

    ladder: Ladder
    samples: int
    """After the cap."""
    unique: int
    """Distinct ones among them."""
    steps: int
    """Optimizer steps."""
    seen: int
    """Samples that go into those steps, repetitions and epochs counted."""
    mean_passes: float
    """How often a distinct sample is seen, on average."""
    max_passes: int
    """How often the most frequent one is seen, at most: what an epoch leaves over is by chance."""


@dataclass(frozen=True)
class TrainingList:
    """The samples that training reads, in the order of their file; it shuffles them by itself."""

    rows: tuple[int, ...]
    """The seed row of each sample, from 0."""
    samples: tuple[int, ...]
    """A number for each sample, equal where id, text and pictures are."""


def effective(ladder: Ladder, samples: Sequence[Hashable], training: Training) -> Effective:
    """Return the effective set of the samples that are left after the cap.

    Args:
        ladder: The counts before the cap.
        samples: At least one; equal ones are one sample that occurs several times.
        training: Settings of the stage.
    """
    occurrences = Counter(samples)
    total, steps = len(samples), training.steps(len(samples))
    seen = training.seen(total)
    epochs = math.ceil(steps / training.steps_per_epoch(total))
    return Effective(
        ladder=ladder,
        samples=total,
        unique=len(occurrences),
        steps=steps,
        seen=seen,
        mean_passes=seen / len(occurrences),
        max_passes=min(max(occurrences.values()) * epochs, seen),
    )


def capped(rows: Sequence[int], cap: int, seed: int) -> list[int]:
    """Return the rows that a run's cap leaves, in the order they had."""
    if len(rows) <= cap:
        return list(rows)
    return [rows[position] for position in drawn(len(rows), cap, seed)]


def processed_effective(processed: Path, seed: Path, training: Training) -> Effective:
    """Return the effective set of a processed dataset, counted from its rows.

    Args:
        processed: Folder that the process stage wrote.
        seed: The seed set that it was made from.
        training: Settings of the first training stage.

    Raises:
        InvalidInput: a file of the folder is missing or damaged, or it is of another seed set.
    """
    listed = read_training_list(processed, seed)
    return effective(read_ladder(processed), listed.samples, training)


def read_ladder(processed: Path) -> Ladder:
    """Return the counts of a processed dataset.

    Raises:
        InvalidInput: `result.json` is missing or damaged.
    """
    path = processed / "result.json"
    result = _read_json(path)
    try:
        left = [branch["left"] for branch in result.get("branches", ())] or [result["before_cap"]]
        dropped = sum(
            count["before"] - count["after"]
            for count in result["operators"]
            if is_deduplicator(count["name"])
        )
        after = sum(left)
        return Ladder(result["seed_samples"], after + dropped, after, result["before_cap"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            "Not a processed dataset", f"{path}: field {error}", "process it again"
        ) from error


def read_training_list(processed: Path, seed: Path) -> TrainingList:
    """Return the seed row of every sample that training reads, in their order.

    Args:
        processed: Folder that the process stage wrote.
        seed: The seed set that it was made from.

    Raises:
        InvalidInput: a file is missing or damaged, or the folder is of another seed set.
    """
    row_of = {sample.id: row for row, sample in enumerate(read_samples(seed, unique_ids=True))}
    path = processed / "rows.json"
    left = _read_json(path).get("kept")
    if not isinstance(left, list):
        raise InvalidInput("Not a processed dataset", f"{path}: field kept", "process it again")
    known = set(left)
    rows, numbers = [], []
    distinct: dict[Hashable, int] = {}
    for sample in read_samples(processed / "processed.jsonl"):
        row = row_of.get(sample.id)
        if row not in known or row is None:
            raise InvalidInput(
                "Another seed set",
                f"{processed / 'processed.jsonl'}, line {sample.line}: id {sample.id!r} is not "
                f"what {path.name} says of {seed}",
                "process the seed set again",
            )
        rows.append(row)
        numbers.append(distinct.setdefault((row, sample.text, sample.images), len(distinct)))
    return TrainingList(tuple(rows), tuple(numbers))


def is_deduplicator(name: str) -> bool:
    """Tell whether an operator drops repetitions."""
    operator = load_catalogue().operators.get(name)
    return operator is not None and operator.kind == "deduplicator"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidInput(
            "Not a processed dataset", f"{path}: {error.strerror}", "process it again"
        ) from error
    except ValueError as error:
        raise InvalidInput(
            "Not a processed dataset", f"{path}: {error}", "process it again"
        ) from error
    if not isinstance(value, dict):
        raise InvalidInput("Not a processed dataset", f"{path}: {value!r}", "process it again")
    return value
