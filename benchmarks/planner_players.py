"""Planners for the planner benchmark, behind one interface: choose an arm, say what is best.

Recorded choices of an LLM are played from a file; the built-in planner is the product's own model and
choice. Nobody sees the truth: only arms, and results of arms that were run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.planner_worlds import NOISE, Arm, Array
from synth_agent.planner.choosing import (
    Results,
    believe,
    changes,
    information_per_cost,
    knowledge_gradient,
)
from synth_agent.planner.model import Belief

Shares = Mapping[str, float]
"""Benchmark to weight: what counts as best. One benchmark, or several on the scales of `NOISE`."""


@dataclass
class Seen:
    """What a planner may look at."""

    arms: Sequence[Arm]
    features: Array
    shares: Shares
    tried: list[int] = field(default_factory=list)
    """Arms in the order they were run, crashed ones included."""
    results: list[dict[str, float] | None] = field(default_factory=list)

    @property
    def scored(self) -> list[int]:
        """Arms that gave a result, in the order they were run."""
        return [arm for arm, result in zip(self.tried, self.results, strict=True) if result]

    def value(self, result: Mapping[str, float]) -> float:
        """Return the weighted value of a result."""
        return sum(share * result[name] for name, share in self.shares.items())

    def observed(self) -> dict[int, float]:
        """Return the mean value of each arm that was measured."""
        values: dict[int, list[float]] = {}
        for arm, result in zip(self.tried, self.results, strict=True):
            if result:
                values.setdefault(arm, []).append(self.value(result))
        return {arm: float(np.mean(of)) for arm, of in values.items()}

    @property
    def noise(self) -> float:
        """Standard deviation of a run's value."""
        return math.sqrt(sum((share * NOISE[name]) ** 2 for name, share in self.shares.items()))


@dataclass(frozen=True)
class Choice:
    """What a planner wants to run."""

    arm: int
    is_replicate: bool = False
    """Whether it knows that the arm was run before and means to repeat it."""


class Player(Protocol):
    """A planner."""

    def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
        """Return the next experiment; an arm that does not exist counts as invalid."""
        ...

    def best(self, seen: Seen) -> tuple[int, float]:
        """Return the arm that it says is best, and the value that it claims for it."""
        ...


def best_observed(seen: Seen) -> tuple[int, float]:
    """Return the arm with the highest mean result, taken at its word."""
    observed = seen.observed()
    arm = max(observed, key=lambda one: observed[one], default=0)
    return arm, observed.get(arm, 0.0)


class RandomPlayer:
    """Arms not yet run, each as likely as the other."""

    def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
        left = [arm for arm in range(len(seen.arms)) if arm not in seen.tried]
        return Choice(int(generator.choice(left or range(len(seen.arms)))), not left)

    def best(self, seen: Seen) -> tuple[int, float]:
        return best_observed(seen)


class GreedyPlayer:
    """As AIDE works: three drafts, then always the nearest untried relative of the best so far."""

    drafts = 3

    def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
        left = [arm for arm in range(len(seen.arms)) if arm not in seen.tried]
        if len(seen.tried) < self.drafts or not left or not seen.scored:
            return RandomPlayer().choose(seen, generator)
        leader, _ = best_observed(seen)
        near = [len(set(seen.arms[arm].steps) ^ set(seen.arms[leader].steps)) for arm in left]
        closest = [arm for arm, distance in zip(left, near, strict=True) if distance == min(near)]
        return Choice(int(generator.choice(closest)))

    def best(self, seen: Seen) -> tuple[int, float]:
        return best_observed(seen)


class BuiltinPlayer:
    """The product's model and choice; claims what the model believes, not what was measured."""

    def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
        gains = knowledge_gradient(self._belief(seen), sorted(set(seen.scored)), seen.noise)
        costs = np.array([arm.cost for arm in seen.arms])
        rates = information_per_cost(gains, changes(seen.features, seen.scored), costs)
        crashed = set(seen.tried) - set(seen.scored)
        allowed = [arm for arm in range(len(seen.arms)) if arm not in crashed]
        arm = max(allowed, key=lambda one: (rates[one], -one))
        return Choice(arm, arm in seen.scored)

    def best(self, seen: Seen) -> tuple[int, float]:
        mean = self._belief(seen).mean
        arm = max(seen.scored, key=lambda one: float(mean[one]), default=0)
        return arm, float(mean[arm])

    def _belief(self, seen: Seen) -> Belief:
        results = [result for result in seen.results if result]
        positions = np.array(seen.scored, dtype=np.int64)
        # A run measures both benchmarks whichever is asked for; the other one is evidence too.
        names = {*seen.shares, "MMBench"}
        known = {
            name: Results(
                positions,
                np.array([result[name] for result in results]),
                np.full(len(results), NOISE[name]),
                NOISE[name],
            )
            for name in sorted(names)
        }
        return believe(seen.features, known).combined(seen.shares)


class RecordedPlayer:
    """Choices of an LLM, recorded for one table: a JSONL file, one list of row positions a session.

    Sessions are played in turn; where one is over, or names no row, the choice is invalid.
    """

    def __init__(self, path: Path) -> None:
        self._sessions = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
        self._played = 0
        self._now: list[int] = []

    def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
        if not seen.tried:
            self._now = self._sessions[self._played % len(self._sessions)]
            self._played += 1
        at = len(seen.tried)
        arm = self._now[at] if at < len(self._now) else -1
        return Choice(arm, arm in seen.tried)

    def best(self, seen: Seen) -> tuple[int, float]:
        return best_observed(seen)
