"""Verdicts: known answers, coverage, and what cannot be compared."""

import numpy as np
import pytest

from synth_agent import referee
from synth_agent.errors import InvalidInput


def test_interval_holds_the_mean_and_is_reproducible() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    low, high = referee.interval(scores)
    assert low < 60 < high
    assert (low, high) == referee.interval(scores)


def test_interval_matches_the_normal_approximation_for_many_questions() -> None:
    scores = [1.0] * 2_000 + [0.0] * 2_000
    low, high = referee.interval(scores)
    half_width = 100 * 1.96 * 0.5 / np.sqrt(4_000)
    assert low == pytest.approx(50 - half_width, abs=0.15)
    assert high == pytest.approx(50 + half_width, abs=0.15)


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        referee.interval([])


def test_equal_runs_are_inside_noise() -> None:
    scores = {str(i): float(i % 2) for i in range(100)}
    difference = referee.compare_scores(scores, scores)
    assert difference.points == 0
    assert difference.outcome == "inside noise"


def test_pairing_sees_a_small_consistent_gain() -> None:
    parent = {str(i): float(i % 2) for i in range(400)}
    child = dict(parent)
    for question in [q for q, score in parent.items() if score == 0][:20]:
        child[question] = 1.0
    difference = referee.compare_scores(parent, child)
    assert difference.points == pytest.approx(5.0)
    assert difference.outcome == "better"
    assert referee.compare_scores(child, parent).outcome == "worse"


def test_different_questions_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="same benchmark files"):
        referee.compare_scores({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0})


def test_runs_that_differ_by_chance_alone_are_rarely_called_better() -> None:
    generator = np.random.default_rng(7)
    wins = 0
    for _ in range(100):
        answers = generator.random((2, 200)) < 0.5
        parent, child = ({str(i): float(v) for i, v in enumerate(row)} for row in answers)
        wins += referee.compare_scores(parent, child).outcome == "better"
    assert wins <= 8


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        (["better", "inside noise"], "better"),
        (["worse", "inside noise"], "worse"),
        (["better", "worse"], "mixed"),
        (["inside noise", "inside noise"], "inside noise"),
    ],
)
def test_benchmarks_that_contradict_name_no_winner(outcomes: list, word: str) -> None:
    assert referee.overall(outcomes) == word
