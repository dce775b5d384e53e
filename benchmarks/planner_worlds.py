"""Worlds for the planner benchmark: arms to choose from, and what a run of each arm measures.

A table world replays a published table; a simulated world draws hidden effects of operators, volume
saturation, the cap, duplicates, a penalty for captions too complex for the model, MMBench in two modes,
combinations that matter, and crashes. Neither shows a planner anything but recipes and results.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synth_agent.data_plans import Branch, DataPlan, Operator
from synth_agent.planner.features import Volume, featurise
from synth_agent.recipes import Recipe

Array = NDArray[np.float64]

NOISE = {"TextVQA": 2.0, "log TextVQA": 2.0, "MMBench": 10.0}
"""Standard deviation of one run: 100 x the relative score, or 100 x its logarithm."""
CAP_K = 200.0
SEED_K = 410.0
"""Thousand samples of the published seed set."""

OPERATORS: Mapping[str, tuple[str, str, Any]] = {
    "aesthetics": ("image_aesthetics_filter", "min_score", 0.3),
    "text_matching": ("image_text_matching_filter", "min_score", 0.5),
    "sim": ("image_text_similarity_filter", "min_score", 0.2),
    "words_num": ("words_num_filter", "min_num", 10),
    "watermark": ("image_watermark_filter", "prob_threshold", 0.8),
    "blip2_caption": ("image_captioning_mapper", "hf_img2seq", "blip2"),
    "llava_caption": ("image_captioning_mapper", "hf_img2seq", "llava"),
    "dedup": ("document_deduplicator", "lowercase", False),
    "text_length": ("text_length_filter", "min_len", 45),
    "image_shape": ("image_shape_filter", "min_width", 128),
    "clean": ("clean_links_mapper", "repl", ""),
}
"""Name in a table to operator, decisive parameter and its default."""

_DUPLICATED = re.compile(r"row(\d+) duplicated x(\d+)")
_STEP = re.compile(r"(\w+)(?:>=([\d.]+))?(?:\(default\))?")


@dataclass(frozen=True)
class Arm:
    """A recipe that can be run."""

    recipe: Recipe
    volume: Volume
    steps: tuple[str, ...]
    """Its operators as the table names them."""
    repeat: int

    @property
    def cost(self) -> float:
        """Expected cost in ordinary runs: generating captions takes half a run more."""
        return 1.0 + 0.5 * any("caption" in step for step in self.steps)


@dataclass(frozen=True, eq=False)
class World:
    """Arms and the truth about them. A planner sees `arms` only."""

    name: str
    arms: tuple[Arm, ...]
    truth: Mapping[str, Array]
    """TextVQA and MMBench to (M,): 100 x (relative score - 1), and 100 x the log ratio."""
    crash: Array
    """(M,) chances that a run ends without a result."""

    def features(self) -> Array:
        """Return the (M, F) vectors of the arms."""
        return np.array([featurise(arm.recipe, arm.volume) for arm in self.arms])

    def run(self, arm: int, generator: np.random.Generator) -> dict[str, float] | None:
        """Return what one run measures; None when it crashes."""
        noise = {name: float(generator.normal(0.0, NOISE[name])) for name in self.truth}
        if generator.random() < self.crash[arm]:
            return None
        result = {name: float(of[arm]) + noise[name] for name, of in self.truth.items()}
        return {**result, "log TextVQA": as_log(result["TextVQA"])}

    def permuted(self, order: NDArray[np.int64], results: NDArray[np.int64]) -> World:
        """Return the world with its arms in another order and, of those, the results in another.

        `order` alone must not matter to a planner; different `results` break the tie between recipes
        and results.
        """
        truth = {name: values[results] for name, values in self.truth.items()}
        arms = tuple(self.arms[position] for position in order)
        return World(self.name, arms, truth, self.crash[results])


def as_log(percent: float) -> float:
    """Return 100 x the logarithm of a relative score that is given as 100 x (score - 1)."""
    return 100 * math.log(max(1 + percent / 100, 0.01))


def build_arm(steps: Sequence[str], repeat: int, rows_k: float, effective_k: float) -> Arm:
    """Return the arm of steps as a table writes them, such as `sim>=0.32`.

    Raises:
        ValueError: an operator that `OPERATORS` does not name.
    """
    operators = []
    for step in steps:
        found = _STEP.fullmatch(step)
        if found is None or found[1] not in OPERATORS:
            raise ValueError(f"unknown step {step!r}: one of {', '.join(OPERATORS)}, with >=number")
        name, parameter, default = OPERATORS[found[1]]
        operators.append(Operator(name, {parameter: float(found[2]) if found[2] else default}))
    branch = Branch("all", tuple(operators), repeat)
    plan = DataPlan((branch,)) if repeat > 1 else None
    recipe = Recipe("arm", "arm", "", () if plan else tuple(operators), data_plan=plan)
    distinct = rows_k / repeat
    volume = Volume(min(distinct, effective_k), CAP_K, min(distinct / SEED_K, 1.0))
    return Arm(recipe, volume, tuple(steps), repeat)


def read_table(path: Path) -> World:
    """Read a table with the columns id, ops, rows_k, eff_k, MMBench, TextVQA (times a baseline)."""
    arms: dict[str, Arm] = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        again = _DUPLICATED.fullmatch(row["ops"].strip())
        steps = arms[again[1]].steps if again else tuple(s.strip() for s in row["ops"].split("|"))
        repeat = int(again[2]) if again else 1
        arms[row["id"]] = build_arm(steps, repeat, float(row["rows_k"]), float(row["eff_k"]))
    truth = {
        "TextVQA": np.array([100 * (float(row["TextVQA"]) - 1) for row in rows]),
        "MMBench": np.array([100 * math.log(float(row["MMBench"])) for row in rows]),
    }
    return World(path.stem, tuple(arms.values()), truth, np.zeros(len(rows)))


_FILTERS = ("sim", "text_matching", "aesthetics", "watermark", "words_num", "dedup", "text_length",
            "image_shape", "clean")  # fmt: skip
_GRADED = {"sim": (0.2, 0.4), "text_matching": (0.1, 0.98), "aesthetics": (0.2, 0.7)}


def simulate(seed: int, num_arms: int = 24) -> World:
    """Return a world with hidden effects: singles, pairs, triples, captions and repetitions."""
    generator = np.random.default_rng([20240, seed])
    effects = {name: generator.normal(0.0, 2.5) for name in _FILTERS}
    captions = {"blip2_caption": generator.normal(-0.5, 3.0), "llava_caption": -1.0}
    complexity = {"blip2_caption": 0.0, "llava_caption": abs(generator.normal(0.0, 4.0))}
    keeps = {name: generator.uniform(0.25, 1.0) for name in _FILTERS}
    pairs = {pair: generator.normal(0.0, 1.5) for pair in _pairs((*_FILTERS, *captions))}
    half = generator.uniform(20.0, 80.0)
    arms, quality, volumes = [], [], []
    for steps, repeat in _recipes(generator, num_arms):
        names = [step.split(">")[0] for step in steps]
        rows = SEED_K * float(np.prod([keeps.get(name, 1.0) for name in names]))
        effective = min(rows * repeat, CAP_K)
        arms.append(build_arm(steps, repeat, rows * repeat, effective))
        # A repeated sample teaches less each time it is seen.
        worth = min(rows, CAP_K) + 0.3 * (effective - min(rows, CAP_K))
        volumes.append(worth)
        total = sum(effects.get(name, 0.0) + captions.get(name, 0.0) for name in names)
        total += sum(pairs[pair] for pair in _pairs(names)) - sum(
            complexity.get(n, 0.0) for n in names
        )
        quality.append(total)
    learned = 1 - np.exp(-np.array(volumes) / half)
    full = 1 - math.exp(-CAP_K / half)
    text = np.array(quality) + 8.0 * (learned - full)
    own = generator.normal(0.0, 1.0, len(arms))
    high = generator.random(len(arms)) < 1 / (1 + np.exp(-(text - 1.0) / 2.0))
    mmbench = 4.0 * (text + own) + np.where(high, 80.0, 0.0) + generator.normal(0.0, 6.0, len(arms))
    truth = {"TextVQA": text + own, "MMBench": mmbench}
    crash = np.where([arm.cost > 1 for arm in arms], 0.10, 0.03)
    return World(f"world {seed}", tuple(arms), truth, crash)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    ordered = sorted(names)
    return [(a, b) for at, a in enumerate(ordered) for b in ordered[at + 1 :]]


def _recipes(generator: np.random.Generator, num_arms: int) -> list[tuple[tuple[str, ...], int]]:
    """Return distinct recipes of one to three filters, some with captions, some repeated."""
    found: dict[tuple[tuple[str, ...], int], None] = {}
    while len(found) < num_arms:
        count = int(generator.choice([1, 1, 2, 2, 3]))
        names = sorted(generator.choice(_FILTERS, count, replace=False))
        steps = [_graded(str(name), generator) for name in names]
        if generator.random() < 0.3:
            steps.append(str(generator.choice(["blip2_caption", "llava_caption"])))
        repeat = int(generator.choice([1, 1, 1, 1, 2, 4]))
        found[(tuple(steps), repeat)] = None
    return list(found)


def _graded(name: str, generator: np.random.Generator) -> str:
    if name not in _GRADED:
        return name
    low, high = _GRADED[name]
    return f"{name}>={generator.uniform(low, high):.2f}"
