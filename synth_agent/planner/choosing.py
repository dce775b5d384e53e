"""Which experiment teaches most per GPU-hour: the knowledge gradient over recipes.

The knowledge gradient of an experiment is how much better, on average over its possible outcomes, the
best recipe known afterwards is believed to be than the best known before. Repeating a recipe is an
experiment like any other: it pays where the lead is inside the noise. The gain of an untried recipe that
differs in several ways from everything measured counts less, as its outcome could not be put down to one
of them.

Source: P. Frazier, W. Powell and S. Dayanik, The knowledge-gradient policy for correlated normal
beliefs, INFORMS Journal on Computing 21(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from synth_agent.planner.features import FAMILIES, FEATURES, STRICTNESS
from synth_agent.planner.model import Array, Belief, Beliefs, covariance, expectation, posterior

ATTRIBUTION = 0.25
"""Power of the number of differences that an untried recipe's gain is divided by: a mild preference for
single changes. Chosen on simulated worlds; a higher one holds back combinations that pay."""

MOST_JOINED = 2
"""Benchmarks that are learned from together; the choices of sizes grow with the power of this."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True, eq=False)
class Results:
    """N results of one benchmark: differences to the baseline."""

    positions: NDArray[np.int64]
    """(N,) position of each result's recipe among the candidates."""
    values: Array
    """(N,)"""
    noises: Array
    """(N,) standard deviations around the recipes' true differences."""
    unit: float
    """Standard deviation of an ordinary run."""


def believe(features: Array, results: Mapping[str, Results]) -> Beliefs:
    """Return what to believe of M recipes on each benchmark.

    Benchmarks that were measured by the same runs are learned from together; others stand alone.

    Args:
        features: (M, F) of `features.featurise`.
        results: What was measured, or imported, of some of them.
    """
    prior, expected = _prior(features.tobytes(), features.shape), expectation(features)
    names = tuple(results)
    means = np.zeros((len(names), len(features)))
    covariances = np.zeros((len(names), len(names), len(features), len(features)))
    for group in _measured_together(results):
        of = [results[names[at]] for at in group]
        values, noises = (np.stack(part, axis=1) for part in zip(*_columns(of), strict=True))
        units = np.array([one.unit for one in of])
        mean, cov = posterior(prior, expected, of[0].positions, values, noises, units)
        means[group] = mean
        covariances[np.ix_(group, group)] = cov
    return Beliefs(names, means, covariances)


def _columns(results: Sequence[Results]) -> list[tuple[Array, Array]]:
    return [(one.values, one.noises) for one in results]


def _measured_together(results: Mapping[str, Results]) -> list[list[int]]:
    """Return positions of benchmarks whose results are of the same runs, few at a time."""
    groups: dict[bytes, list[list[int]]] = {}
    for at, of in enumerate(results.values()):
        found = groups.setdefault(of.positions.tobytes(), [[]])
        if len(found[-1]) == MOST_JOINED:
            found.append([])
        found[-1].append(at)
    return [group for of in groups.values() for group in of]


@lru_cache(maxsize=64)
def _prior(content: bytes, shape: tuple[int, ...]) -> Array:
    return covariance(np.frombuffer(content, dtype=np.float64).reshape(shape))


def knowledge_gradient(belief: Belief, tried: Sequence[int], noise: float) -> Array:
    """Return the (M,) expected gains of the best known recipe by one run of each recipe.

    Args:
        belief: Of M recipes; the baseline, whose difference is 0, is known and is none of them.
        tried: Positions of the recipes that may be named best without the run.
        noise: Standard deviation of the run.
    """
    variance = np.maximum(np.diag(belief.covariance), 0.0)
    moves = belief.covariance / np.sqrt(variance + noise**2)[None, :]  # (M, M): of row, by column
    own = belief.mean[:, None] + np.diag(moves)[:, None] * _NODES  # (M, Z)
    best = np.maximum(own, 0.0)
    known = 0.0
    if len(tried):
        rows = np.asarray(tried, dtype=np.int64)
        others = belief.mean[rows, None, None] + moves[rows][:, :, None] * _NODES  # (T, M, Z)
        best = np.maximum(best, others.max(axis=0))
        known = max(0.0, float(belief.mean[rows].max()))
    gains: Array = np.maximum(best @ _WEIGHTS - known, 0.0)
    return gains


def changes(features: Array, measured: Sequence[int]) -> NDArray[np.int64]:
    """Return in how many ways each of M recipes differs from the nearest measured one, or baseline.

    A family that is added or left out, another threshold of the same family, and another repetition
    are a difference each. Tidying texts and dropping repetitions go along with other steps.
    """
    known = np.vstack([np.zeros((1, features.shape[1])), features[sorted(set(measured))]])
    nearest: NDArray[np.int64] = _differences(features, known).min(axis=1)
    return nearest


def differences(one: Array, other: Array) -> int:
    """Return in how many ways two recipes differ, from their (F,) vectors; see `changes`."""
    return int(_differences(one[None], other[None])[0, 0])


def _differences(left: Array, right: Array) -> NDArray[np.int64]:
    """Return the (M, K) numbers of differences of (M, F) and (K, F) vectors."""
    unlike = left[:, None, :] != right[None, :, :]
    both = (left[:, None, :] > 0) & (right[None, :, :] > 0)
    count: NDArray[np.int64] = unlike[:, :, [_AT[name] for name in _COUNTED]].sum(axis=2)
    for family in STRICTNESS:
        count += both[:, :, _AT[family]] & unlike[:, :, _AT[f"{family}, strictness"]]
    return count


_TIDYING = ("text cleaning", "deduplication")
_COUNTED = (
    *(family for family in FAMILIES if family not in _TIDYING),
    "long captions",
    "repetition",
    "ordered",
)
_AT = {name: position for position, name in enumerate(FEATURES)}


def information_per_cost(gains: Array, counts: NDArray[np.int64], costs: Array) -> Array:
    """Return the (M,) expected gains per cost, less where differences are many."""
    result: Array = gains / np.maximum(counts, 1) ** ATTRIBUTION / costs
    return result
