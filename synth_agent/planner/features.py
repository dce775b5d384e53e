"""What the statistical planner sees of a recipe: a short vector of named numbers from 0 to 1.

Read from the recipe's operators and parameters and from the samples that it is expected to leave; no
result goes in. A data plan is the mean of its branches, each weighted by how often it is repeated.
Pure: the same recipe and counts always give the same vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synth_agent.data_plans import Branch, Operator
from synth_agent.recipes import Recipe

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "similarity": ("image_text_similarity", "phrase_grounding"),
    "matching": ("image_text_matching",),
    "aesthetics": ("image_aesthetics",),
    "picture safety": ("watermark", "nsfw", "face"),
    "picture shape": ("image_shape", "image_aspect_ratio", "image_size", "image_blur"),
    "text cleaning": ("normalization", "clean_", "remove_", "fix_unicode"),
    "text shape": (
        "words_num",
        "text_length",
        "character_repetition",
        "word_repetition",
        "special_characters",
        "alphanumeric",
        "average_line_length",
        "token_num",
        "language_id",
        "perplexity",
        "stopwords",
        "flagged_words",
        "text_action",
        "text_entity",
    ),
    "deduplication": ("deduplicator",),
    "selection": ("selector",),
    "new captions": ("image_captioning", "mllm", "sentence_augmentation", "optimize_", "generate_"),
    "new pictures": ("diffusion", "image_blur_mapper", "image_tagging", "augmentation"),
}
"""Operator family to parts of the names of its operators."""

LONG_CAPTIONERS = ("llava", "qwen", "mllm", "gpt")
"""Parts of operator or model names of captioners that write paragraphs, not sentences."""

STRICTNESS: Mapping[str, tuple[str, float, float]] = {
    "similarity": ("min_score", 0.15, 0.40),
    "matching": ("min_score", 0.0, 1.0),
    "aesthetics": ("min_score", 0.0, 1.0),
}
"""Family to the parameter whose value says how much it drops, and the values that count as 0 and 1.
CLIP similarities of real captions lie between the two; the other two scores are probabilities."""

_COUNTS = ("long captions", "processed", "operators", "repetition", "volume", "dropped", "ordered")

FEATURES: tuple[str, ...] = (
    *FAMILIES,
    *(f"{family}, strictness" for family in STRICTNESS),
    *_COUNTS,
)
"""Names of the vector's entries, in order."""

MOST_OPERATORS = 12
MOST_REPEATS = 8
SMALLEST_VOLUME = 1 / 64
"""Share of the cap below which the volume counts as 1, the largest shortage."""


@dataclass(frozen=True)
class Volume:
    """How much data a recipe is expected to leave; None where that is not known."""

    effective: float | None
    """Samples that training sees at most once an epoch: after the cap, without repetitions."""
    cap: float
    """Most samples that the same training takes of any recipe, or the seed set if that is less."""
    share_kept: float | None
    """Samples left before repetition, as a share of the seed set."""


def featurise(recipe: Recipe, volume: Volume) -> NDArray[np.float64]:
    """Return the (F,) vector of a recipe, each entry from 0 to 1, named by `FEATURES`.

    The recipe without operators is zero but for what its volume says. An unknown volume counts as
    full: an unknown shortage is no evidence.
    """
    weights = np.array([branch.repeat for branch in recipe.branches], dtype=np.float64)
    weights /= weights.sum()
    rows = np.array([_of_branch(branch) for branch in recipe.branches])
    counts = _counts(recipe, volume)
    return np.concatenate([weights @ rows, counts]).clip(0.0, 1.0)


def describe(vector: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Return the entries of a vector that are not zero, by name."""
    return {
        name: float(value) for name, value in zip(FEATURES, vector, strict=True) if value != 0.0
    }


def family_of(operator: str) -> str:
    """Return the family of an operator by its name; empty when it belongs to none."""
    for family, parts in FAMILIES.items():
        if any(part in operator for part in parts):
            return family
    return ""


def _of_branch(branch: Branch) -> NDArray[np.float64]:
    """Return presence of each family, strictness of the graded ones, and long captions."""
    present = dict.fromkeys(FAMILIES, 0.0)
    strict = dict.fromkeys(STRICTNESS, 0.0)
    long = 0.0
    for operator in branch.operators:
        family = family_of(operator.name)
        if not family:
            continue
        present[family] = 1.0
        if family in STRICTNESS:
            strict[family] = max(strict[family], _strictness(operator, family))
        long = max(long, float(family == "new captions" and _writes_paragraphs(operator)))
    return np.array([*present.values(), *strict.values(), long])


def _strictness(operator: Operator, family: str) -> float:
    parameter, low, high = STRICTNESS[family]
    value = operator.parameters.get(parameter)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0.0
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _writes_paragraphs(operator: Operator) -> bool:
    models = (str(v) for k, v in operator.parameters.items() if k.startswith("hf_"))
    return any(
        part in text.lower() for text in (operator.name, *models) for part in LONG_CAPTIONERS
    )


def _counts(recipe: Recipe, volume: Volume) -> NDArray[np.float64]:
    operators = max(len(branch.operators) for branch in recipe.branches)
    repeats = max(branch.repeat for branch in recipe.branches)
    plan = recipe.data_plan
    shortage = 0.0
    if volume.effective is not None and volume.cap > 0:
        share = min(max(volume.effective / volume.cap, SMALLEST_VOLUME), 1.0)
        shortage = math.log(share) / math.log(SMALLEST_VOLUME)
    return np.array(
        [
            float(plan is not None or operators > 0),
            operators / MOST_OPERATORS,
            math.log(min(repeats, MOST_REPEATS)) / math.log(MOST_REPEATS),
            shortage,
            0.0 if volume.share_kept is None else 1.0 - volume.share_kept,
            float(plan is not None and plan.order.by == "statistic"),
        ]
    )
