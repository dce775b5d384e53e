"""Features, the Gaussian process, the knowledge gradient, evidence and calibration."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from synth_agent.data_plans import Branch, DataPlan, Operator, Order
from synth_agent.imported import ImportedResult, ImportedStep, ImportedTable
from synth_agent.planner import model
from synth_agent.planner.calibration import FEWEST_RUNS, calibrate, outcomes
from synth_agent.planner.choosing import (
    Results,
    believe,
    changes,
    information_per_cost,
    knowledge_gradient,
)
from synth_agent.planner.evidence import Scale, two_heaps
from synth_agent.planner.features import FEATURES, Volume, describe, family_of, featurise
from synth_agent.planner.model import Belief, covariance, expectation, posterior
from synth_agent.planner.published import published_gains
from synth_agent.recipes import Recipe
from synth_agent.runs import Comparison, Cost, Plan, Prediction, Proposal, Run

FULL = Volume(200.0, 200.0, 1.0)
SIMILARITY = Operator("image_text_similarity_filter", {"min_score": 0.3})
STRICT = Operator("image_text_similarity_filter", {"min_score": 0.36})
AESTHETICS = Operator("image_aesthetics_filter", {"min_score": 0.5})
CAPTIONS = Operator("image_captioning_mapper", {"hf_img2seq": "models/blip2"})
LLAVA = Operator("image_captioning_mapper", {"hf_img2seq": "models/llava-7b"})


def linear(*operators: Operator) -> Recipe:
    return Recipe("r", "r", "", operators)


def vector(recipe: Recipe, volume: Volume = FULL) -> dict[str, float]:
    return describe(featurise(recipe, volume))


def several() -> np.ndarray:
    recipes = [(), (SIMILARITY,), (AESTHETICS,), (SIMILARITY, AESTHETICS), (CAPTIONS,), (LLAVA,)]
    return np.array([featurise(linear(*operators), FULL) for operators in recipes])


def results(positions: Sequence[int], values: Sequence[float], unit: float = 2.0) -> Results:
    noises = np.full(len(positions), unit)
    return Results(np.array(positions, dtype=np.int64), np.array(values), noises, unit)


def test_the_recipe_without_operators_is_zero() -> None:
    assert vector(linear()) == {}


def test_features_are_named_bounded_and_graded() -> None:
    mild, strict = vector(linear(SIMILARITY)), vector(linear(STRICT))
    assert mild["similarity"] == strict["similarity"] == 1.0
    assert 0 < mild["similarity, strictness"] < strict["similarity, strictness"] < 1
    assert "long captions" not in vector(linear(CAPTIONS))
    assert vector(linear(LLAVA))["long captions"] == 1.0
    absurd = Operator("image_text_similarity_filter", {"min_score": math.inf})
    far = featurise(linear(*([absurd] * 50)), Volume(1e-9, 200.0, 5.0))
    assert far.shape == (len(FEATURES),)
    assert far.min() >= 0.0
    assert far.max() <= 1.0


def test_a_data_plan_is_the_mean_of_its_branches_by_repetition() -> None:
    order = Order("statistic", operator=SIMILARITY)
    plan = DataPlan((Branch("a", (SIMILARITY,), 3), Branch("b", (CAPTIONS,))), order=order)
    found = vector(Recipe("p", "p", "", (), data_plan=plan), Volume(50.0, 200.0, 0.25))
    assert found["similarity"] == pytest.approx(0.75)
    assert found["new captions"] == pytest.approx(0.25)
    assert found["repetition"] == pytest.approx(math.log(3) / math.log(8))
    assert found["ordered"] == 1.0
    assert found["volume"] == pytest.approx(math.log(4) / math.log(64))
    assert found["dropped"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("operator", "family"),
    [
        ("image_text_similarity_filter", "similarity"),
        ("document_minhash_deduplicator", "deduplication"),
        ("clean_links_mapper", "text cleaning"),
        ("image_watermark_filter", "picture safety"),
        ("image_diffusion_mapper", "new pictures"),
        ("audio_duration_filter", ""),
    ],
)
def test_families_go_by_the_operators_name(operator: str, family: str) -> None:
    assert family_of(operator) == family


def test_the_posterior_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SIZES", (3.0,))
    features = several()[1:]
    kernel = ConstantKernel(1.7, "fixed") * RBF(1.3, "fixed")
    observed, values = np.array([0, 1, 3, 1]), np.array([2.0, -1.0, 4.0, 0.5])
    noises = np.array([0.5, 1.0, 2.0, 1.5])
    unit = 0.8
    means, covariances = posterior(
        kernel(features),
        np.zeros(5),
        observed,
        values[:, None],
        noises[:, None],
        np.array([unit]),
    )
    theirs = GaussianProcessRegressor(
        ConstantKernel((3.0 * unit) ** 2, "fixed") * kernel, alpha=noises**2, optimizer=None
    ).fit(features[observed], values)
    mean, cov = theirs.predict(features, return_cov=True)
    np.testing.assert_allclose(means[0], mean, atol=1e-8)
    np.testing.assert_allclose(covariances[0, 0], cov, atol=1e-8)


def test_sizes_are_averaged_by_their_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    features = several()
    prior, expected = covariance(features), expectation(features)
    observed, values, noises = np.array([1, 2, 4]), np.array([30.0, -20.0, 9.0]), np.full(3, 2.0)
    mixed, _ = posterior(
        prior, expected, observed, values[:, None], noises[:, None], np.array([2.0])
    )
    means, densities = [], []
    for size in model.SIZES:
        total = (2.0 * size) ** 2 * prior[np.ix_(observed, observed)] + np.diag(noises**2)
        gain = (2.0 * size) ** 2 * prior[:, observed] @ np.linalg.inv(total)
        means.append(gain @ values)
        _, log_determinant = np.linalg.slogdet(total)
        densities.append(-0.5 * (values @ np.linalg.solve(total, values) + log_determinant))
    weights = np.exp(np.array(densities) - max(densities))
    np.testing.assert_allclose(mixed[0], weights @ np.array(means) / weights.sum(), atol=1e-8)


def test_without_results_nothing_but_less_data_is_expected_to_matter() -> None:
    few = featurise(linear(SIMILARITY), Volume(20.0, 200.0, 0.1))
    features = np.vstack([several(), few])
    belief = believe(features, {"textvqa": results([], [])})["textvqa"]
    assert belief.mean[0] == belief.sd[0] == 0.0
    np.testing.assert_allclose(belief.mean[:6], 0.0)
    assert belief.mean[6] < 0
    assert (belief.sd[1:] > 0).all()


def test_results_teach_relatives_and_are_shrunk() -> None:
    belief = believe(several(), {"textvqa": results([1], [6.0])})["textvqa"]
    assert 0 < belief.mean[3] < belief.mean[1] < 6.0
    assert belief.mean[3] > abs(belief.mean[4])
    repeated = believe(several(), {"textvqa": results([1] * 9, [6.0] * 9)})["textvqa"]
    assert belief.mean[1] < repeated.mean[1] < 6.0
    assert repeated.sd[1] < belief.sd[1]


def test_what_helps_on_one_benchmark_is_expected_on_the_other_until_results_deny_it() -> None:
    rising, falling = [12.0, 10.0, 14.0], [-12.0, -10.0, -14.0]
    silent = results([1, 2, 3], [0.0, 0.0, 0.0])
    alone = believe(several(), {"a": results([1, 2, 3], [4.0, -4.0, 0.0])})["a"]
    both = {"a": results([1, 2, 3], [4.0, -4.0, 0.0]), "b": results([1, 2, 3], [40.0, -40.0, 0.0])}
    together = believe(several(), both)
    assert together["a"].mean[1] > alone.mean[1]
    assert together["a"].sd[1] < alone.sd[1]
    linked = together.combined({"a": 0.5, "b": 0.5})
    apart = 0.25 * (together["a"].covariance + together["b"].covariance)
    assert linked.covariance[1, 1] > apart[1, 1]
    denied = believe(several(), {"a": results([1, 2, 3], rising), "b": results([1, 2, 3], falling)})
    assert denied["b"].mean[1] < 0 < denied["a"].mean[1]
    other_runs = believe(several(), {"a": silent, "b": results([4], [40.0])})
    assert not other_runs.covariances[0, 1].any()


def test_two_benchmarks_give_the_posterior_of_one_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SIZES", (2.0,))
    monkeypatch.setattr(model, "LINKS", (0.5,))
    prior, observed = covariance(several()), np.array([1, 3, 3])
    values, units = np.array([[1.0, 9.0], [4.0, -3.0], [2.0, 0.0]]), np.array([2.0, 5.0])
    noises = np.ones((3, 1)) * units
    means, covariances = posterior(prior, np.zeros(6), observed, values, noises, units)
    across = 4.0 * np.outer(units, units) * np.array([[1.0, 0.5], [0.5, 1.0]])
    total = np.kron(across, prior)
    rows = np.concatenate([observed, observed + 6])
    measured = total[np.ix_(rows, rows)] + np.diag(np.repeat(units**2, 3))
    gain = total[:, rows] @ np.linalg.inv(measured)
    np.testing.assert_allclose(means.ravel(), gain @ values.T.ravel(), atol=1e-8)
    after = covariances.transpose(0, 2, 1, 3).reshape(12, 12)
    np.testing.assert_allclose(after, total - gain @ total[rows], atol=1e-8)


def imported(rows: Sequence[tuple[tuple[ImportedStep, ...], float]]) -> ImportedTable:
    found = tuple(
        ImportedResult(str(at), "", steps, 1, None, {}, {"textvqa": gain})
        for at, (steps, gain) in enumerate(rows)
    )
    return ImportedTable("t", "s", "2024", "base", {"textvqa": 0.02}, "", found)


def test_imported_rows_belong_to_recipes_of_the_same_steps() -> None:
    similar = ImportedStep("image_text_similarity_filter", ">=0.31", "")
    vague = ImportedStep("image_aesthetics_filter", "default", "")
    unknown = ImportedStep("", "", "frobnicate(7)")
    table = imported([((similar,), 1.04), ((vague,), 1.02), ((similar, unknown), 1.5)])
    dedup = Operator("document_deduplicator", {})
    recipes = [linear(AESTHETICS), linear(SIMILARITY, dedup), linear(STRICT), linear()]
    ((position, gains),) = published_gains(recipes, (table,))
    assert position == 1
    assert gains == {"textvqa": pytest.approx(math.log(1.04) / 0.02)}
    assert published_gains(recipes, ()) == ()
    noted = replace(linear(SIMILARITY), published={"textvqa": 1.04})
    assert [at for at, _ in published_gains([noted, *recipes], (table,))] == [0]


def test_the_interval_holds_what_it_says_and_little_more_where_the_model_is_right() -> None:
    generator = np.random.default_rng(3)
    features = several()
    prior = covariance(features)[1:, 1:]
    held = []
    for _ in range(400):
        size = generator.choice(model.SIZES)
        truth = generator.multivariate_normal(np.zeros(5), (2 * size) ** 2 * prior)
        measured = truth + generator.normal(0, 2.0, 5)
        known = results([1, 2, 3], measured[:3])
        low, high = believe(features, {"b": known})["b"].interval(2.0)
        held.append(low[4] <= measured[3] <= high[4])
    # One normal stands for the mixture of sizes, whose middle is fuller.
    assert 0.8 <= np.mean(held) <= 0.92


def test_the_knowledge_gradient_is_that_of_one_gaussian() -> None:
    belief = Belief(np.array([1.0]), np.array([[4.0]]))
    move = 4.0 / math.sqrt(4.0 + 1.0)
    ratio = 1.0 / move
    density = math.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + math.erf(ratio / math.sqrt(2)))
    assert knowledge_gradient(belief, [], 1.0)[0] == pytest.approx(
        move * (ratio * below + density), rel=0.03
    )


def test_repeating_pays_while_the_lead_is_inside_the_noise_only() -> None:
    means, wide, narrow = np.array([3.0, 2.9]), np.diag([4.0, 4.0]), np.diag([0.01, 0.01])
    open_lead = knowledge_gradient(Belief(means, wide), [0, 1], 2.0)
    settled = knowledge_gradient(Belief(np.array([9.0, 1.0]), narrow), [0, 1], 2.0)
    assert open_lead.min() > 0.2
    assert settled.max() < 1e-6


def test_several_changes_at_once_count_less() -> None:
    features = several()
    assert changes(features, []).tolist() == [0, 1, 1, 2, 1, 2]
    assert changes(features, [1]).tolist() == [0, 0, 1, 1, 1, 2]
    rates = information_per_cost(np.ones(2), np.array([1, 2]), np.array([2.0, 2.0]))
    assert rates[1] < rates[0] == 0.5


def test_a_hundred_candidates_and_three_hundred_runs_take_seconds_at_most() -> None:
    generator = np.random.default_rng(0)
    features = generator.random((100, len(FEATURES)))
    known = results(generator.integers(0, 100, 300).tolist(), generator.normal(0, 3, 300).tolist())
    covariance(features)  # the import of the library is not what is timed
    started = time.process_time()  # what the machine does beside it does not count
    belief = believe(features, {"textvqa": known})["textvqa"]
    knowledge_gradient(belief, list(range(100)), 2.0)
    assert time.process_time() - started < 5.0


def test_two_heaps_are_told_from_one_and_from_an_outlier() -> None:
    assert two_heaps([40, 42, 44, 45, 80, 82, 84])
    assert not two_heaps([40, 42, 44, 45, 46, 47, 90])
    assert not two_heaps([40, 45, 50, 55, 60, 65, 70])
    assert not two_heaps([40, 80])


def test_the_logarithmic_scale_goes_there_and_back_and_stays_possible() -> None:
    scale = Scale(True, 40.0)
    assert scale.leave(scale.enter(12.5)) == pytest.approx(12.5)
    assert scale.leave(1e6) == 60.0
    assert scale.leave(-1e6) == -40.0
    assert scale.noise(40.0, 2.0) == pytest.approx(2.5)
    assert Scale(False, 40.0).noise(40.0, 2.0) == 2.0


def judged(number: int, measured: float, *predictions: Prediction) -> Run:
    cost = Cost(0, None, None, "")
    proposal = Proposal("", "x", "explore", "", (), None, {}, {}, cost, "", predictions=predictions)
    run = Run(f"{number:04d}-x", Plan("", proposal, "", "", ""), "succeeded")
    run.comparisons["textvqa"] = Comparison("textvqa", "", measured, 0, 0, 9, "inside noise")
    return run


def test_hits_misses_and_interval_scores() -> None:
    run = judged(
        1,
        5.0,
        Prediction("textvqa", 4.0, 2.0, 5.0, "a"),
        Prediction("textvqa", 1.0, 0.0, 2.0, "b"),
        Prediction("mmbench", 1.0, 0.0, 2.0, "b"),
    )
    first, second = outcomes(run)
    assert (first.hit, first.score) == (True, 3.0)
    assert (second.hit, second.score) == (False, pytest.approx(2.0 + 10 * 3.0))
    assert [one.by for one in calibrate([run])] == ["a", "b"]
    assert outcomes(replace_status(run)) == ()


def replace_status(run: Run) -> Run:
    return replace(run, status="failed")


def test_calibration_is_shown_after_ten_runs() -> None:
    runs = [judged(n, 1.0 * n, Prediction("textvqa", 4, 0, 8, "m")) for n in range(1, 11)]
    (few,) = calibrate(runs[:-1])
    (enough,) = calibrate(runs)
    assert (few.is_shown, enough.is_shown) == (False, True)
    assert (few.runs, FEWEST_RUNS) == (9, 10)
    assert "9 of the 10 runs" in few.words()
    assert (enough.hits, enough.coverage) == (8, 0.8)
    assert "8 of 10 intervals held" in enough.words()
