"""The statistical model behind the built-in planner: a Gaussian process over recipe features.

One benchmark at a time, it turns results, differences to the baseline with a noise of their own, into
a mean, a spread and an 80 % interval for any recipe, run or not. The covariance is scikit-learn's, with
fixed hyperparameters stated below; what is learned from the results is the size of the effects, by the
evidence of each of a few sizes, averaged rather than picked, as few results cannot pick. Prior mean: no
difference. All sizes share one eigendecomposition, which is why the posterior is computed here and not
by `GaussianProcessRegressor`, which would be fitted once for each; the tests hold it against that.

Source: C. Rasmussen and C. Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import logsumexp

from synth_agent.planner.features import FEATURES, STRICTNESS

Array = NDArray[np.float64]

SIZES = (1.0, 2.0, 4.0, 8.0)
"""Standard deviation of an operator family's effect in units of a run's noise; equally likely at first.
From effects that no affordable number of runs would tell from nothing to those that one run shows."""

LINEAR_SHARE = 0.9
"""Part of an effect's variance that adds up over operators; the rest is particular to combinations."""
COMBINATION_LENGTH = 1.0
"""Distance in feature space at which two combinations are related by exp(-1/2): one family differs."""
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
    result = result + RECIPE_SHARE * np.eye(len(features))
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


def posterior(
    prior: Array,
    expected: Array,
    observed: NDArray[np.int64],
    values: Array,
    noises: Array,
    unit: float,
) -> Belief:
    """Return what to believe of M recipes after N results.

    Args:
        prior: (M, M) covariance of the recipes for effects of size 1, from `covariance`.
        expected: (M,) prior means for effects of size 1, from `expectation`.
        observed: (N,) position of the recipe of each result; one may occur several times.
        values: (N,) differences to the baseline.
        noises: (N,) standard deviation of each result around the recipe's true difference.
        unit: Standard deviation of an ordinary run, in which `SIZES` are counted.
    """
    sizes = unit * np.asarray(SIZES)
    whitened = prior[np.ix_(observed, observed)] / np.outer(noises, noises)
    roots, vectors = eigh(whitened) if len(observed) else (np.zeros(0), np.zeros((0, 0)))
    roots = np.maximum(roots, 0.0)
    surprises = values - sizes[:, None] * expected[observed]  # (S, N)
    rotated = (surprises / noises) @ vectors  # (S, N)
    cross = (prior[:, observed] / noises) @ vectors  # (M, N)
    spread = sizes[:, None] ** 2 * roots[None, :] + 1.0  # (S, N)
    evidence = -0.5 * np.sum(rotated**2 / spread + np.log(spread), axis=1)
    weights = np.exp(evidence - logsumexp(evidence))
    means = sizes[:, None] * expected + sizes[:, None] ** 2 * (
        (rotated / spread) @ cross.T
    )  # (S, M)
    mean = weights @ means
    total = float(weights @ sizes**2) * prior
    total -= (cross * (weights @ (sizes[:, None] ** 4 / spread))) @ cross.T
    total += (weights[:, None] * (means - mean)).T @ (means - mean)
    return Belief(mean, total)
