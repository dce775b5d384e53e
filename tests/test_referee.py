"""Verdicts: known answers, coverage, and what cannot be compared."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from synth_agent import referee
from synth_agent.errors import InvalidInput
from synth_agent.noise import SeedNoise, pooled


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


QUESTIONS = 150
SEED_SD = 0.05


def _arm(
    generator: np.random.Generator, difficulty: np.ndarray, seeds: int, gain: float = 0.0
) -> list[dict[str, float]]:
    """Return answers of `seeds` runs: a run's seed shifts all its questions, then each is drawn."""
    runs = []
    for _ in range(seeds):
        chance = np.clip(difficulty + gain + generator.normal(0, SEED_SD), 0, 1)
        runs.append(
            {str(i): float(v) for i, v in enumerate(generator.random(len(chance)) < chance)}
        )
    return runs


def _percent(arm: list[dict[str, float]]) -> list[float]:
    return [100 * float(np.mean(list(run.values()))) for run in arm]


def _claims(world: int, baseline_seeds: int, plans: int = 10) -> bool:
    """Tell whether any of some plans that change nothing is called better as it finishes."""
    generator = np.random.default_rng(world)
    difficulty = generator.uniform(0.2, 0.8, QUESTIONS)
    baseline = _arm(generator, difficulty, baseline_seeds)
    noise = pooled([_percent(baseline)])
    assert noise is not None
    for number in range(1, plans + 1):
        child = _arm(generator, difficulty, 1)
        if referee.judge(child, baseline, noise, tries=number).outcome == "better":
            return True
    return False


@pytest.mark.parametrize("baseline_seeds", [2, 5])
def test_ten_plans_that_change_nothing_claim_no_improvement(baseline_seeds: int) -> None:
    assert sum(_claims(world, baseline_seeds) for world in range(200)) <= 10


@pytest.mark.parametrize("benchmark", ["TextVQA", "MMBench"])
def test_real_seeds_of_one_recipe_claim_no_improvement_over_themselves(benchmark: str) -> None:
    """Ten real seeds of each mini-world recipe: three as the parent, seven as if they were plans."""
    path = Path(__file__).parents[1] / "benchmarks/results/miniworld_seeds.jsonl"
    recipes: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        recipes[record["recipe"]].append(record[benchmark])
    noise = pooled(list(recipes.values()))
    assert noise is not None
    generator, wrong, draws = np.random.default_rng(0), 0, 100
    for scores in recipes.values():
        for _ in range(draws):
            runs = [{"q": score / 100} for score in generator.permutation(scores)]
            wrong += any(
                referee.judge([run], runs[:3], noise, tries=number).outcome == "better"
                for number, run in enumerate(runs[3:], 1)
            )
    assert wrong <= 0.05 * draws * len(recipes)


def test_the_questions_interval_alone_would_claim_improvements() -> None:
    """What the corrections are for: without them most of the same worlds hold a false claim."""
    wrong = 0
    for world in range(20):
        generator = np.random.default_rng(world)
        difficulty = generator.uniform(0.2, 0.8, QUESTIONS)
        (baseline,) = _arm(generator, difficulty, 1)
        children = _arm(generator, difficulty, 10)
        paired = ([child[q] - baseline[q] for q in baseline] for child in children)
        wrong += any(referee.interval(differences)[0] > 0 for differences in paired)
    assert wrong >= 5


def test_false_claims_keep_their_rate_when_seeds_are_the_only_noise() -> None:
    """Nothing is conservative here: the rate over ten tries is near what the level says."""
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(1_000):
        baseline, *children = ({"q": 0.5 + x} for x in generator.normal(0, 0.02, 11))
        noise = SeedNoise(2.0, 1e9, 2.0, False, "known")
        wrong += any(
            referee.judge([child], [baseline], noise, tries=number).outcome == "better"
            for number, child in enumerate(children, 1)
        )
    assert 0.02 * 1_000 <= wrong <= 0.05 * 1_000


def test_a_true_effect_of_three_deviations_is_found() -> None:
    found = 0
    for world in range(200):
        generator = np.random.default_rng(world)
        difficulty = generator.uniform(0.3, 0.5, QUESTIONS)
        noise = SeedNoise(100 * SEED_SD, 20, 7.0, False, "known")
        deviation = np.sqrt(2 * SEED_SD**2 + 2 * 0.24 / QUESTIONS)
        child = _arm(generator, difficulty, 1, gain=3 * deviation)
        found += referee.judge(child, _arm(generator, difficulty, 1), noise).outcome == "better"
    assert found >= 160


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    held = 0
    for world in range(300):
        generator = np.random.default_rng(world)
        difficulty = generator.uniform(0.2, 0.6, QUESTIONS)
        child, parent = (_arm(generator, difficulty, 4, gain) for gain in (0.1, 0.0))
        noise = pooled([_percent(child), _percent(parent)])
        assert noise is not None
        judgement = referee.judge(child, parent, noise)
        held += judgement.low <= 10 <= judgement.high
    assert held >= 0.94 * 300


def test_replicates_narrow_the_interval_and_more_tries_widen_it() -> None:
    generator = np.random.default_rng(5)
    difficulty = generator.uniform(0.2, 0.8, QUESTIONS)
    child, parent = (_arm(generator, difficulty, 2) for _ in range(2))
    noise = SeedNoise(5.0, 30, 6.0, True, "assumed from elsewhere")
    one = referee.judge(child[:1], parent[:1], noise)
    two = referee.judge(child, parent, noise)
    tenth = referee.judge(child, parent, noise, tries=10)
    widths = [judgement.high - judgement.low for judgement in (two, one)]
    assert widths[0] < widths[1]
    assert tenth.high - tenth.low > widths[0]
    assert (two.seeds, two.parent_seeds, two.assumed) == (2, 2, True)
    assert "2 seeds against 2" in two.basis
    assert "assumed from elsewhere" in two.basis
    assert "95 % interval" in two.basis
    assert "try 10" in tenth.basis


def test_recipes_that_scatter_more_than_the_pooled_figure_are_judged_by_their_own() -> None:
    parent = [{"q": 0.40}, {"q": 0.50}, {"q": 0.60}]
    child = [{"q": 0.10}, {"q": 0.90}, {"q": 1.00}]
    noise = SeedNoise(1.0, 60, 1.2, False, "known")
    judgement = referee.judge(child, parent, noise)
    assert judgement.outcome == "inside noise"
    assert judgement.seed_sd == pytest.approx(np.sqrt((100 + np.var([10, 90, 100], ddof=1)) / 2))
    assert "35.6 points, these runs' own spread, beyond the usual 1.0 points" in judgement.basis
    one = referee.judge([child[2]], [parent[2]], noise)
    assert (one.outcome, one.seed_sd) == ("better", 1.0)
    assert "own spread" not in one.basis


def test_levels_of_all_tries_add_up_to_the_stated_chance() -> None:
    assert referee.level(1) == pytest.approx(0.05)
    one_sided = sum(referee.level(tries) / 2 for tries in range(1, 100_000))
    assert one_sided == pytest.approx(referee.FALSE_CLAIMS, abs=1e-5)
    with pytest.raises(ValueError, match="at least one try"):
        referee.level(0)


def test_arms_without_runs_or_with_other_questions_are_refused() -> None:
    noise = SeedNoise(1.0, 60, 1.2, False, "known")
    with pytest.raises(ValueError, match="at least one run"):
        referee.judge([], [{"q": 1.0}], noise)
    with pytest.raises(InvalidInput, match="same benchmark files"):
        referee.judge([{"q": 1.0}, {"p": 1.0}], [{"q": 1.0}], noise)
    with pytest.raises(InvalidInput, match="same benchmark files"):
        referee.judge([{}], [{}], noise)


def test_shrinkage_undoes_the_luck_of_the_best() -> None:
    generator = np.random.default_rng(11)
    claimed, expected, true = [], [], []
    for _ in range(400):
        effects = generator.normal(0, 1.0, 8)
        parent = generator.normal(0, 1.0)
        points = effects + generator.normal(0, 1.5, 8) - parent
        shrunk = referee.shrink(points.tolist(), [1.5**2] * 8, 1.0)
        best = int(np.argmax(points))
        claimed.append(points[best])
        expected.append(shrunk[best])
        true.append(effects[best])
    assert np.mean(claimed) - np.mean(true) > 1.0
    assert abs(np.mean(expected) - np.mean(true)) < 0.25


def test_shrinkage_keeps_what_noise_cannot_make() -> None:
    assert referee.shrink([60.0], [80.0], 40.0)[0] > 50
    assert abs(referee.shrink([1.0], [80.0], 40.0)[0]) < 0.5
    assert referee.shrink([2.0, 3.0], [0.0, 0.0], 0.0).tolist() == [2.0, 3.0]


def test_shrinkage_agrees_with_the_matrix_formula() -> None:
    points, own, shared = np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, 0.5]), 0.7
    angles = (np.arange(96) + 0.5) * np.pi / 192
    total, weights = np.zeros(3), 0.0
    for spread in (np.sqrt(own.mean() + shared) * np.tan(angles)) ** 2:
        covariance = np.diag(spread + own) + shared
        solved = np.linalg.solve(covariance, points)
        weight = np.exp(-0.5 * points @ solved) / np.sqrt(np.linalg.det(covariance))
        total, weights = total + weight * spread * solved, weights + weight
    expected = total / weights
    found = referee.shrink(points.tolist(), own.tolist(), shared)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_judgement_says_what_to_expect_of_a_claim() -> None:
    noise = SeedNoise(2.0, 60, 2.4, False, "known")
    judgement = referee.judge([{"q": 0.531}], [{"q": 0.50}], noise)
    assert judgement.words().startswith("claimed +3.1, expect +")
    assert 0 < judgement.shrunk < 3.1
    rival = referee.measure([{"q": 0.50}], [{"q": 0.50}], noise)
    among = referee.judge([{"q": 0.531}], [{"q": 0.50}], noise, tries=5, rivals=[rival] * 4)
    assert among.shrunk < judgement.shrunk


def test_seeds_needed_are_those_of_the_normal_approximation() -> None:
    spreads = {(0.02, 0.026): 10, (0.02, 0.02): 16, (0.02, 0.01): 63, (0.01, 0.02): 4}
    for (spread, difference), seeds in spreads.items():
        assert referee.seeds_needed(difference, spread) == seeds


def test_seeds_and_detectable_difference_agree() -> None:
    for tries, degrees in ((1, np.inf), (4, 6.0)):
        difference = referee.detectable_difference(5, 2.0, 0.5, tries=tries, degrees=degrees)
        assert referee.seeds_needed(difference, 2.0, 0.5, tries=tries, degrees=degrees) == 5
        assert referee.power(difference, 5, 2.0, 0.5, tries=tries, degrees=degrees) == (
            pytest.approx(0.8, abs=1e-6)
        )


def test_power_is_the_rate_at_which_judgements_find_an_effect() -> None:
    generator = np.random.default_rng(2)
    found = 0
    for _ in range(1_000):
        child, parent = 0.5 + generator.normal(0, 0.02, (2, 4))
        noise = pooled([(100 * generator.normal(0, 0.02, 7)).tolist(), 100 * child, 100 * parent])
        assert noise is not None
        better, worse = ([{"q": float(score)} for score in arm] for arm in (child + 0.04, parent))
        found += referee.judge(better, worse, noise).outcome == "better"
    assert found / 1_000 == pytest.approx(referee.power(4.0, 4, 2.0, degrees=6), abs=0.06)


def test_replicates_that_hardly_scatter_tell_every_difference() -> None:
    noise = pooled([[100 / 3, 100 / 3, 100 / 3], [100 / 7, 100 / 7, 100 / 7 + 1e-12]])
    assert noise is not None
    assert 0 < noise.sd < 1e-9
    words = referee.power_words(1, 1.0, noise)
    assert words == "1 seed tells 0.0 points apart; you would need 1 for 1.0 points"
    assert referee.power(1.0, 1_000, noise.sd, degrees=1.0) == pytest.approx(1.0)


def test_power_in_words() -> None:
    noise = SeedNoise(2.0, 1e9, 2.0, False, "known")
    assert referee.power_words(3, 2.0, noise) == (
        "3 seeds tell 4.6 points apart; you would need 16 for 2.0 points"
    )
    assert "no number of seeds is enough for 0.5" in referee.power_words(1, 0.5, noise, 1.0)


def test_one_figure_is_made_of_two_benchmarks_only_with_the_users_weights() -> None:
    noise = SeedNoise(1.0, 1e9, 1.0, False, "known")
    up = referee.judge([{"q": 0.9}], [{"q": 0.5}], noise)
    down = referee.judge([{"q": 0.2}], [{"q": 0.5}], noise)
    assert referee.overall([up.outcome, down.outcome]) == "mixed"
    both = {"textvqa": up, "mmbench": down}
    joined = referee.combine(both, {"textvqa": 1.0, "mmbench": 0.5})
    assert joined.points == pytest.approx(40 - 15)
    assert joined.high - joined.low == pytest.approx(1.5 * (up.high - up.low))
    assert joined.outcome == "better"
    assert "weights that you set" in joined.basis
    with pytest.raises(InvalidInput, match="one weight"):
        referee.combine(both, {"textvqa": 1.0})
