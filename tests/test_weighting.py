"""One figure of both benchmarks: only where the user weighs them, beside them, and never surer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.planner.assessment import assess
from synth_agent.planner.builtin import BuiltinPlanner, propose_recipe, workspace_settings
from synth_agent.planner.context import build_context, render
from synth_agent.planner.evidence import Scale
from synth_agent.recipes import Recipe, list_recipes
from synth_agent.runs import Comparison, Run
from synth_agent.ui.backend import Notebook
from synth_agent.ui.screens.compare import comparison_words
from synth_agent.ui.screens.results import against_content
from synth_agent.ui.widgets.overview import baseline_run, best_run, scores_content
from synth_agent.weighting import weigh
from synth_agent.workspace import Workspace, load_settings, open_workspace, setting_origins
from tests.planner_world import RECIPES, fill_workspace, finished

PLAIN = {
    "textvqa": Comparison("textvqa", "0001-baseline", 4.0, 1.0, 7.0, 500, "better"),
    "mmbench": Comparison("mmbench", "0001-baseline", -2.0, -8.0, 4.0, 100, "inside noise"),
}


def weighed(workspace: Workspace, weights: str) -> Workspace:
    """Return the workspace with the weights in its settings."""
    with workspace.settings_file.open("a", encoding="utf-8") as file:
        file.write(f"goal_weights: {weights}\n")
    return open_workspace(workspace.root)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{textvqa: 0.5, mmbench: 0.5}", {"textvqa": 0.5, "mmbench": 0.5}),
        ("{textvqa: 3, mmbench: 1}", {"textvqa": 0.75, "mmbench": 0.25}),
        ("{mmbench: 7}", {"mmbench": 1.0}),
        ("null", {}),
    ],
)
def test_only_the_proportion_of_weights_matters(
    git_workspace: Workspace, written: str, expected: dict[str, float]
) -> None:
    workspace = weighed(git_workspace, written)
    assert workspace.settings.weights == expected
    assert any(name.startswith("goal_weights") for name, _, _ in setting_origins(workspace))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("{textvga: 1}", r"goal_weights\.textvga.*did you mean 'textvqa'"),
        ("{textvqa: 0, mmbench: 0}", "add up to 0"),
        ("{}", "add up to 0"),
        ("{textvqa: -1, mmbench: 2}", r"goal_weights\.textvqa = -1"),
        ("{textvqa: .inf}", r"goal_weights\.textvqa"),
        ("{textvqa: .nan}", r"goal_weights\.textvqa"),
        ("0.5", "goal_weights"),
    ],
)
def test_weights_that_say_nothing_are_refused(tmp_path: Path, written: str, named: str) -> None:
    path = tmp_path / "synth.yaml"
    path.write_text(f"goal_weights: {written}\n")
    with pytest.raises(InvalidInput, match=named) as raised:
        load_settings(path)
    assert str(path) in str(raised.value)


def test_without_weights_there_is_no_figure(git_workspace: Workspace) -> None:
    assert weigh(list(PLAIN.values()), git_workspace.settings.weights) is None


def test_the_interval_is_never_narrower_than_any_dependence_allows() -> None:
    found = weigh(list(PLAIN.values()), {"textvqa": 0.5, "mmbench": 0.5})
    assert found is not None
    assert found.judgement is not None
    one = found.judgement
    assert (one.points, one.low, one.high) == pytest.approx((1.0, -3.5, 5.5))
    assert one.outcome == "inside noise"
    # Of normal differences, the widest that the interval of the sum can be is at correlation 1.
    sds = [(c.high - c.low) / 2 / 1.96 for c in PLAIN.values()]
    for correlation in (-1.0, 0.0, 0.5, 1.0):
        variance = 0.25 * (sds[0] ** 2 + sds[1] ** 2 + 2 * correlation * sds[0] * sds[1])
        assert (one.high - one.low) / 2 >= 1.96 * math.sqrt(max(variance, 0)) - 1e-9


def test_intervals_without_seeds_are_said_to_be_that() -> None:
    found = weigh(list(PLAIN.values()), {"textvqa": 0.5, "mmbench": 0.5})
    assert found is not None
    assert "your weighting, 0.5 TextVQA + 0.5 MMBench" in found.line()
    assert "covers questions only" in found.line()
    based = [replace(one, basis="b", expected=one.difference) for one in PLAIN.values()]
    covered = weigh(based, {"textvqa": 0.5, "mmbench": 0.5})
    assert covered is not None
    assert "questions only" not in covered.line()


def test_a_benchmark_that_was_not_compared_leaves_no_figure() -> None:
    found = weigh([PLAIN["textvqa"]], {"textvqa": 0.5, "mmbench": 0.5})
    assert found is not None
    assert found.judgement is None
    assert "no figure, as MMBench was not compared" in found.line()


@pytest.fixture
def filled(git_workspace: Workspace) -> Workspace:
    filled = fill_workspace(git_workspace)
    untried = RECIPES["short"].replace("min_num: 3", "min_num: 9")
    (filled.recipes / "long.yaml").write_text(untried)
    return filled


def recipe_of(workspace: Workspace, name: str) -> Recipe:
    return next(recipe for recipe in list_recipes(workspace) if recipe.name == name)


def opposed(workspace: Workspace) -> list[Run]:
    """Return runs of which `short` gains on TextVQA what it loses on MMBench, and `pair` the reverse."""
    runs: list[Run] = []
    gains: list[tuple[str, dict[str, float]]] = [
        ("baseline", {}),
        ("short", {"textvqa": 15.0, "mmbench": -15.0}),
        ("pair", {"textvqa": -15.0, "mmbench": 15.0}),
    ]
    for number, (name, points) in enumerate(gains, 1):
        proposal = propose_recipe(workspace, recipe_of(workspace, name), runs)
        runs.append(finished(proposal, number, **points))
    return runs


def leader(workspace: Workspace, runs: list[Run]) -> str | None:
    recipes = list_recipes(workspace)
    baseline = recipe_of(workspace, "baseline")
    found = assess(workspace, recipes, baseline, workspace_settings(workspace), runs).leader
    return None if found is None else found.recipe.name


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("{textvqa: 1}", "short"), ("{textvqa: 9, mmbench: 1}", "short"), ("{mmbench: 1}", "pair")],
)
def test_the_planner_goes_for_what_the_user_weighs(
    filled: Workspace, weights: str, expected: str
) -> None:
    runs = opposed(filled)
    workspace = weighed(filled, weights)
    assert leader(workspace, runs) == expected
    proposal = BuiltinPlanner().propose(workspace, runs, ())
    assert proposal is not None
    assert "in your weighting (" in proposal.reason
    assert {one.benchmark for one in proposal.predictions} == {"textvqa", "mmbench"}


def test_without_weights_the_planner_says_nothing_of_them(filled: Workspace) -> None:
    runs = opposed(filled)
    proposal = BuiltinPlanner().propose(filled, runs, ())
    assert proposal is not None
    assert "weighting" not in proposal.reason
    assert "weighs" not in render(build_context(filled, runs, ()))
    weighty = weighed(filled, "{textvqa: 2, mmbench: 1}")
    assert "weighs them 0.667 TextVQA + 0.333 MMBench" in render(build_context(weighty, runs, ()))


def test_weights_are_no_setting_of_a_run(filled: Workspace) -> None:
    runs = opposed(filled)
    before = propose_recipe(filled, recipe_of(filled, "short"), runs)
    after = propose_recipe(weighed(filled, "{mmbench: 1}"), recipe_of(filled, "short"), runs)
    assert before.settings == after.settings


def test_the_slope_of_a_scale_is_that_of_its_curve() -> None:
    for scale in (Scale(False, 40.0), Scale(True, 40.0), Scale(True, 3.0)):
        step = 1e-4
        assert scale.slope == pytest.approx((scale.leave(step) - scale.leave(0.0)) / step, rel=1e-3)


@pytest.mark.parametrize("width", [60, 100])
def test_the_views_show_the_weighting_beside_the_benchmarks(filled: Workspace, width: int) -> None:
    runs = opposed(filled)
    weights = {"textvqa": 0.75, "mmbench": 0.25}
    notebook = Notebook(tuple(runs), (), None)
    views: list[tuple[Any, Any]] = [
        (against_content(runs[1], width, weights), against_content(runs[1], width, {})),
        (
            comparison_words(list(PLAIN.values()), "", width, weights),
            comparison_words(list(PLAIN.values()), "", width, {}),
        ),
        (
            scores_content(notebook, "baseline", width, weights),
            scores_content(notebook, "baseline", width, {}),
        ),
    ]
    for shown, without in views:
        assert "Weighted" in shown.plain
        assert "0.75 TextVQA + 0.25 MMBench" in " ".join(shown.plain.split())
        assert "eight" not in without.plain
        assert shown.plain.count("TextVQA") > without.plain.count("TextVQA") > 0
        lines = shown.plain.split("\n")
        start = next(at for at, line in enumerate(lines) if line.startswith("Weighted"))
        assert max(map(len, lines[start : start + 2])) <= width


def test_the_best_run_is_the_best_as_it_is_weighed(filled: Workspace) -> None:
    runs = opposed(filled)
    notebook = Notebook(tuple(runs), (), None)
    for weights, name in (({"textvqa": 1.0}, "0002-short"), ({"mmbench": 1.0}, "0003-pair")):
        found = best_run(notebook, runs[0], weights)
        assert found is not None
        assert found.id == name


def test_a_repeated_baseline_does_not_hide_what_was_compared_with_the_first(
    filled: Workspace,
) -> None:
    runs = opposed(filled)
    again = finished(replace(runs[0].plan.proposal, parent=None), 9)
    found = baseline_run(Notebook((*runs, again), (), None), "baseline")
    assert found is not None
    assert found.id == runs[0].id
    alone = baseline_run(Notebook((runs[0], again), (), None), "baseline")
    assert alone is not None
    assert alone.id == again.id
