"""What past runs and imported results say of recipes, as results for the statistical model.

Owns the way from scores to differences: the noise of a difference, how much an imported result counts,
and the scale. Where a benchmark's scores fall into two heaps, the model works on the logarithm of the
ratio to the baseline, on which a jump between the heaps does not drown everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synth_agent.imported import ImportedTable
from synth_agent.noise import assumed_noise, replicates, seed_noise
from synth_agent.planner.choosing import Results
from synth_agent.planner.model import Array
from synth_agent.planner.published import Gains, published_gains
from synth_agent.recipes import Recipe, does_same, steps_of
from synth_agent.runs import Run, Score
from synth_agent.wording import BENCHMARK_NAMES

IMPORTED_SHARE = 1.0
"""Part of a published gain, in spreads of its own table, that is expected here in spreads of ours:
another data set and another model. Ratios do not carry over between a weak and a strong baseline."""
MOST_IMPORTED = 4.0
"""Published gains count as so many spreads at most."""
IMPORTED_NOISES = 4.0
"""Noise of an imported result in spreads of a run: sixteen of them weigh as much as one run here."""
UNKNOWN_BASELINE = 50.0
"""Score of a baseline that was not measured yet, in percent, for the size of imported gains."""
LEAST_SPREAD = 0.3
"""Spread between seeds, in points, below which a measured one is taken for luck."""
FEWEST_FOR_SHAPE = 6
"""Results below which nothing is said of how scores are spread."""


@dataclass(frozen=True)
class Scale:
    """How differences are put for the model: percentage points, or 100 times the log ratio."""

    logarithmic: bool
    baseline: float
    """The baseline's score in percent."""

    def enter(self, points: float) -> float:
        """Return a difference in percentage points on the model's scale."""
        if not self.logarithmic:
            return points
        return 100.0 * math.log(max(self.baseline + points, 0.1) / self.baseline)

    def leave(self, value: float) -> float:
        """Return a value of the model's scale in percentage points, a possible score."""
        if self.logarithmic:
            points = self.baseline * (math.exp(min(value, 700.0) / 100.0) - 1.0)
        else:
            points = value
        return min(max(points, -self.baseline), 100.0 - self.baseline)

    @property
    def slope(self) -> float:
        """Percentage points that a unit of the model's scale is, near the baseline."""
        return self.baseline / 100.0 if self.logarithmic else 1.0

    def noise(self, points: float, sd: float) -> float:
        """Return the standard deviation of a difference on the model's scale."""
        return 100.0 * sd / max(self.baseline + points, 1.0) if self.logarithmic else sd


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything known of one benchmark."""

    scale: Scale
    seed_sd: float
    """Spread of one run over training seeds, in percentage points."""
    seed_basis: str
    results: Results
    """On the scale."""
    baselines: int
    """Runs of the baseline."""
    measured: Mapping[int, tuple[float, ...]]
    """Percentage points over the baseline by a recipe's position, one a training seed."""


def gather(
    recipes: Sequence[Recipe],
    history: Sequence[Run],
    baseline: Recipe,
    settings: Mapping[str, Any],
    tables: Sequence[ImportedTable] = (),
) -> dict[str, Evidence]:
    """Return what is known, benchmark by benchmark.

    Args:
        recipes: The candidates; positions of results count in them.
        history: Runs; those that succeeded with these settings, seeds apart, count.
        baseline: The recipe that all differences are to.
        settings: The settings that the next run would have.
        tables: Imported tables; none where one of them is what is being replayed.
    """
    usable = [run for run in history if run.is_measured and comparable(run, settings)]
    names = dict.fromkeys(name for run in usable for name in run.scores)
    names = names or dict.fromkeys(BENCHMARK_NAMES)
    published = published_gains(recipes, tables)
    return {
        name: _of_benchmark(name, recipes, usable, baseline, settings, published) for name in names
    }


def comparable(run: Run, settings: Mapping[str, Any]) -> bool:
    """Tell whether a run differs from these settings in nothing but the seed and the machine."""
    before = run.plan.proposal.settings
    keys = (before.keys() | settings.keys()) - {"seed", "compute"}
    return all(before.get(key) == settings.get(key) for key in keys)


def same_steps(run: Run, recipe: Recipe) -> bool:
    """Tell whether a run had the steps of a recipe."""
    return does_same(run.plan.proposal.recipe, recipe.mapping())


def trainings(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without repetitions: those of the same steps and seed are one training.

    The first counts, as it does for the spread between seeds.
    """
    found: dict[tuple[str, object], Run] = {}
    for run in runs:
        proposal = run.plan.proposal
        found.setdefault((repr(steps_of(proposal.recipe)), proposal.settings.get("seed")), run)
    return list(found.values())


def two_heaps(values: Sequence[float]) -> bool:
    """Tell whether values fall into two heaps: one gap is wider than half of their range.

    At least two values lie on either side, so that a single outlier is no heap.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) < FEWEST_FOR_SHAPE or ordered[-1] == ordered[0]:
        return False
    gaps = np.diff(ordered)[1:-1]
    return bool(gaps.max() > 0.5 * (ordered[-1] - ordered[0]))


def _of_benchmark(
    name: str,
    recipes: Sequence[Recipe],
    runs: Sequence[Run],
    baseline: Recipe,
    settings: Mapping[str, Any],
    published: Sequence[tuple[int, Gains]],
) -> Evidence:
    scored = trainings([run for run in runs if name in run.scores])
    zero = [run.scores[name] for run in scored if same_steps(run, baseline)]
    level = float(np.mean([score.percent for score in zero])) if zero else UNKNOWN_BASELINE
    assumed = assumed_noise(name, str(settings["model"]["name"]), level)
    groups = [[run.scores[name].percent for run in g] for g in replicates(scored, name).values()]
    spread = seed_noise(groups, assumed)
    sd = max(spread.sd, LEAST_SPREAD)
    heaps = level > 0 and two_heaps([run.scores[name].percent for run in scored])
    scale = Scale(heaps, level)
    rows = [
        *(_measured(recipes, run, name, scale, sd, len(zero)) for run in scored if zero),
        *((at, *_imported(gains[name], scale, sd)) for at, gains in published if name in gains),
    ]
    known = [row for row in rows if row is not None]
    table: Array = np.array(known, dtype=np.float64).reshape(-1, 3)
    results = Results(table[:, 0].astype(np.int64), table[:, 1], table[:, 2], scale.noise(0.0, sd))
    return Evidence(
        scale, sd, spread.basis, results, len(zero), _by_recipe(recipes, scored, name, level)
    )


def _by_recipe(
    recipes: Sequence[Recipe], runs: Sequence[Run], name: str, level: float
) -> dict[int, tuple[float, ...]]:
    """Return the points over a level of each recipe that was run."""
    found: dict[int, tuple[float, ...]] = {}
    for run in runs:
        position = _position(recipes, run)
        if position is not None:
            points = run.scores[name].percent - level
            found[position] = (*found.get(position, ()), points)
    return found


def _position(recipes: Sequence[Recipe], run: Run) -> int | None:
    return next((at for at, recipe in enumerate(recipes) if same_steps(run, recipe)), None)


def _measured(
    recipes: Sequence[Recipe], run: Run, name: str, scale: Scale, sd: float, baselines: int
) -> tuple[int, float, float] | None:
    """Return position, value and noise of a run, None for a recipe that is no candidate."""
    position = _position(recipes, run)
    if position is None:
        return None
    score = run.scores[name]
    points = score.percent - scale.baseline
    # The baseline was measured too, the more exactly the more often.
    noise = math.sqrt(sd**2 * (1 + 1 / baselines) + question_spread(run, name, score) ** 2)
    return position, scale.enter(points), scale.noise(points, noise)


def question_spread(run: Run, name: str, score: Score) -> float:
    """Return the spread by the choice of questions; paired with the parent where that is known.

    The interval of a comparison with a basis covers seeds and tries as well, which are no part of it.
    """
    comparison = run.comparisons.get(name)
    if comparison is not None and comparison.question_sd is not None:
        return comparison.question_sd
    ends = score if comparison is None or comparison.basis else comparison
    return (ends.high - ends.low) / 3.92


def _imported(gain: float, scale: Scale, sd: float) -> tuple[float, float]:
    """Return value and noise of the weak result that a published gain, in spreads, is."""
    points = IMPORTED_SHARE * min(max(gain, -MOST_IMPORTED), MOST_IMPORTED) * sd
    # A score stays above zero for its logarithm, and a loss a loss where the baseline hardly is.
    points = min(max(points, min(1.0 - scale.baseline, 0.0)), 100.0 - scale.baseline)
    return scale.enter(points), scale.noise(points, IMPORTED_NOISES * sd)
