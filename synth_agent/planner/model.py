"""The statistical model behind the built-in planner: a Gaussian process over recipe features.

It turns results, differences to the baseline with a noise of their own, into a mean, a spread and an
80 % interval for any recipe, run or not, on each benchmark. The covariance is scikit-learn's, with fixed
hyperparameters stated below. What is learned from the results is the size of the effects on each
benchmark and how far an effect on one is an effect on the other, by the evidence of each of a few
values, averaged rather than picked, as few results cannot pick. Prior mean: no difference. All share one
eigendecomposition, which is why the posterior is computed here and not by `GaussianProcessRegressor`,
which would be fitted once for each; the tests hold it against that.

Sources: C. Rasmussen and C. Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5;
E. Bonilla, K. Chai and C. Williams, Multi-task Gaussian process prediction, NIPS 2007 (benchmarks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import logsumexp

from synth_agent.planner.features import FAMILIES, FEATURES, STRICTNESS

Array = NDArray[np.float64]

SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Standard deviation of an operator family's effect in units of a run's noise; equally likely at first.
From effects that no affordable number of runs would tell from nothing to those that one run shows."""

LINKS = (0.0, 0.5, 0.9)
"""Correlation of effects between benchmarks; equally likely at first. Both measure one trained model, so
that what helps one mostly helps the other; 0 lets the results deny it."""

LINEAR_SHARE = 0.9
"""Part of an effect's variance that adds up over operators; the rest is particular to combinations."""
COMBINATION_LENGTH = 1.0
"""Distance in feature space at which two combinations are related by exp(-1/2): one family differs."""
PAIR_SHARE = 0.1
"""Variance of what two families do together beyond either, as a share of one family's effect: two steps
seldom simply add up, but their joint effect is smaller than their own."""
RECIPE_SHARE = 0.1
"""Variance that is a recipe's own, no neighbour tells of it, as a share of one family's effect."""
SHORTAGE_LOSS = 1.0
"""Prior loss by a 64-fold shortage of samples, as of a learning curve, in sizes of one effect."""
ADDITIVE_WEIGHTS = {"processed": 0.5, "operators": 0.0, "volume": 0.5, "dropped": 0.0}
"""Entries that matter less, or not by themselves, to what adds up; the others count 1."""
GRADE_WEIGHT = 0.5
"""Weight of entries that grade or count, against those that tell whether a family is present."""
INTERVAL_Z = 1.2815515655446004
"""Standard normal quantile of an interval that holds 80 %."""


@dataclass(frozen=True)
class Belief:
    """What is believed of M recipes' true differences to the baseline, in the units of the results."""

    mean: Array
    """(M,)"""
    covariance: Array
    """(M, M)"""

    @property
    def sd(self) -> Array:
        """Return the (M,) standard deviations."""
        variance: Array = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        return variance

    def interval(self, noise: float) -> tuple[Array, Array]:
        """Return the (M,) ends of the 80 % intervals of one further measurement with this noise."""
        half = INTERVAL_Z * np.sqrt(self.sd**2 + noise**2)
        return self.mean - half, self.mean + half


def covariance(features: Array) -> Array:
    """Return the (N, N) prior covariance of N different recipes, for effects of size 1.

    Args:
        features: (N, F) vectors of `features.featurise`; equal ones are still two recipes.
    """
    linear, combination = _kernels()
    result: Array = np.asarray(linear(_additive(features)) + combination(features * _weights()))
    result = result + PAIR_SHARE * _pairs(features) + RECIPE_SHARE * np.eye(len(features))
    # The recipe that changes nothing differs from the baseline by nothing.
    changes = np.any(features != 0.0, axis=1).astype(np.float64)
    return np.asarray(result * np.outer(changes, changes))


def expectation(features: Array) -> Array:
    """Return the (N,) prior means of N recipes, for effects of size 1: fewer samples teach less."""
    return np.asarray(-SHORTAGE_LOSS * features[:, FEATURES.index("volume")], dtype=np.float64)


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    # Here, as it takes a second that an app that proposes nothing need not wait for.
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

    linear = ConstantKernel(LINEAR_SHARE) * DotProduct(sigma_0=0.0)
    combination = ConstantKernel(1.0 - LINEAR_SHARE) * RBF(COMBINATION_LENGTH)
    return linear, combination


def _pairs(features: Array) -> Array:
    """Return the (N, N) numbers of pairs of families that two recipes share, weighted by presence."""
    present = features[:, [FEATURES.index(name) for name in (*FAMILIES, "long captions")]]
    both, twice = present @ present.T, present**2 @ (present**2).T
    return np.asarray((both**2 - twice) / 2.0)


def _additive(features: Array) -> Array:
    """Return the (N, F) entries whose effects add up."""
    parts = features * [ADDITIVE_WEIGHTS.get(name, 1.0) for name in FEATURES]
    for graded in STRICTNESS:
        # Around the middle, so that a graded family is no less certain than another.
        grade, present = FEATURES.index(f"{graded}, strictness"), FEATURES.index(graded)
        parts[:, grade] = GRADE_WEIGHT * (features[:, grade] - 0.5 * features[:, present])
    return parts


@lru_cache(maxsize=1)
def _weights() -> Array:
    counted = {"operators", "repetition", "volume", "dropped", "ordered"}
    return np.array([GRADE_WEIGHT if name in counted or "," in name else 1.0 for name in FEATURES])


@dataclass(frozen=True, eq=False)
class Beliefs(Mapping[str, Belief]):
    """What is believed of M recipes on each of B benchmarks, and how these beliefs hang together."""

    names: tuple[str, ...]
    means: Array
    """(B, M)"""
    covariances: Array
    """(B, B, M, M)"""

    def __getitem__(self, name: str) -> Belief:
        if name not in self.names:
            raise KeyError(name)
        at = self.names.index(name)
        return Belief(self.means[at], self.covariances[at, at])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def combined(self, shares: Mapping[str, float]) -> Belief:
        """Return the belief about the weighted sum over the benchmarks that are named."""
        share = np.array([shares.get(name, 0.0) for name in self.names])
        covariance = np.einsum("b,bcmk,c->mk", share, self.covariances, share)
        return Belief(share @ self.means, np.asarray(covariance))


def posterior(
    prior: Array,
    expected: Array,
    observed: NDArray[np.int64],
    values: Array,
    noises: Array,
    units: Array,
) -> tuple[Array, Array]:
    """Return what to believe of M recipes after N results on B benchmarks at once.

    Args:
        prior: (M, M) covariance of the recipes for effects of size 1, from `covariance`.
        expected: (M,) prior means for effects of size 1, from `expectation`.
        observed: (N,) position of the recipe of each result; one may occur several times.
        values: (N, B) differences to the baseline.
        noises: (N, B) standard deviations of the results around the recipes' true differences. With
            several benchmarks a result counts on each by its mean square noise in units.
        units: (B,) standard deviations of an ordinary run, in which `SIZES` are counted.

    Returns:
        Means (B, M) and covariances (B, B, M, M).
    """
    relative = np.sqrt(np.mean((noises / units) ** 2, axis=1))  # (N,)
    whitened = prior[np.ix_(observed, observed)] / np.outer(relative, relative)
    roots, vectors = eigh(whitened) if len(observed) else (np.zeros(0), np.zeros((0, 0)))
    roots = np.maximum(roots, 0.0)
    cross = (prior[:, observed] / relative) @ vectors  # (M, N)
    results = vectors.T @ (values / units / relative[:, None])  # (N, B)
    usual = vectors.T @ (expected[observed] / relative)  # (N,)
    sizes, across = _effects(SIZES, LINKS, len(units))
    strengths, axes = np.linalg.eigh(across)  # (G, B), (G, B, B)
    strengths = np.maximum(strengths, 0.0)[:, :, None]
    surprises = results.T[None] - sizes[:, :, None] * usual  # (G, B, N)
    rotated = axes.transpose(0, 2, 1) @ surprises
    spread = strengths * roots + 1.0
    evidence = -0.5 * np.sum(rotated**2 / spread + np.log(spread), axis=(1, 2))
    weights = np.exp(evidence - logsumexp(evidence))  # (G,)
    learned = axes @ (strengths * rotated / spread)
    means = sizes[:, :, None] * expected + learned @ cross.T  # (G, B, M)
    mean = np.einsum("g,gbm->bm", weights, means)
    told = np.einsum(
        "gbi,gci,gin->bcn",
        weights[:, None, None] * axes,
        axes,
        strengths**2 / spread,
        optimize=True,
    )
    before = np.einsum("g,gbc->bc", weights, across)
    after = before[:, :, None, None] * prior - (cross * told[:, :, None, :]) @ cross.T
    apart = (np.sqrt(weights)[:, None, None] * (means - mean)).reshape(len(sizes), -1)
    between = (apart.T @ apart).reshape(*mean.shape, *mean.shape).transpose(0, 2, 1, 3)
    scale = np.outer(units, units)[:, :, None, None]
    return mean * units[:, None], (after + between) * scale


@lru_cache(maxsize=8)
def _effects(
    each: tuple[float, ...], linked: tuple[float, ...], num_benchmarks: int
) -> tuple[Array, Array]:
    """Return (G, B) sizes of effects and (G, B, B) covariances over benchmarks, equally likely."""
    links = linked if num_benchmarks > 1 else (0.0,)
    choices = list(product(product(each, repeat=num_benchmarks), links))
    sizes = np.array([size for size, _ in choices])
    link = np.array([link for _, link in choices])[:, None, None]
    shape = link + (1.0 - link) * np.eye(num_benchmarks)
    return sizes, shape * sizes[:, :, None] * sizes[:, None, :]
