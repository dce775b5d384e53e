"""Expected samples and the effective set of linear recipes and data plans, before they run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.analysis import statistics_root
from synth_agent.data_keys import remember_data_key
from synth_agent.data_plans import Branch, DataPlan, Draw
from synth_agent.digests import Digests
from synth_agent.effective import Ladder
from synth_agent.fit import estimate_cost, expected_effective, relative_times
from synth_agent.planner.builtin import workspace_settings
from synth_agent.recipes import Operator, Recipe
from synth_agent.runs import Cost, Plan, Proposal, Run
from synth_agent.statistics import ColumnWriter, SampleRow, column_spec, write_samples
from synth_agent.workspace import Settings, Workspace

ROWS = 40
MAPPER = Operator("clean_links_mapper", {})
DEDUPLICATOR = Operator("document_deduplicator", {})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A seed set of 40 rows; nothing is known of it."""
    (tmp_path / "synth.yaml").touch()
    made = Workspace(tmp_path, Settings())
    seed = made.path(made.settings.data.seed)
    seed.parent.mkdir(parents=True)
    lines = [json.dumps({"id": f"s{i}", "images": [], "text": text_of(i)}) for i in range(ROWS)]
    seed.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return made


@pytest.fixture
def analysed(workspace: Workspace) -> Workspace:
    """With the scores of one filter: row i has i words."""
    root = statistics_root(workspace)
    samples = [SampleRow(f"s{i}", f"sample {i}", text_of(i), ()) for i in range(ROWS)]
    write_samples(root, "data", samples)
    spec = column_spec("words_num_filter", {}, str)
    assert spec is not None
    scores = {"num_words": [float(i) for i in range(ROWS)]}
    ColumnWriter(root, spec).append([sample.sample for sample in samples], scores)
    seed = workspace.path(workspace.settings.data.seed)
    remember_data_key(root, Digests(workspace).path(seed), "data")
    return workspace


def text_of(row: int) -> str:
    """Of 30 texts, the first ten occur twice."""
    return f"text {row % 30}"


def words(low: int, high: int) -> Operator:
    return Operator("words_num_filter", {"min_num": low, "max_num": high})


def plan_of(*branches: Branch, **more: Any) -> Recipe:
    return Recipe("plan", "plan", "", (), {}, data_plan=DataPlan(branches), **more)


def settings_of(workspace: Workspace, cap: int = 1000, batch: int = 8) -> dict[str, Any]:
    settings = workspace_settings(workspace)
    settings["data"]["sample_cap"] = cap
    settings["pretrain"] |= {"global_batch_size": batch, "micro_batch_size": 2}
    return settings


def finished(recipe: Recipe, **result: int) -> Run:
    proposal = Proposal(
        "", "x", "explore", "", (), None, {"name": "x", **recipe.mapping()}, {},
        Cost(ROWS, None, None, ""), "a test",
    )  # fmt: skip
    run = Run("0001-x", Plan("0001-x", proposal, "", "", proposal.sha256), "succeeded")
    stage = replace(run.stages["process"], status="succeeded", result=result)
    return replace(run, stages={**run.stages, "process": stage})


LOW = Branch("low", (words(0, 9),))
HIGH = Branch("high", (words(5, 39), DEDUPLICATOR), 2, Draw(6, 1))


def test_a_plan_is_counted_from_the_statistics(analysed: Workspace) -> None:
    cost = estimate_cost(analysed, plan_of(LOW, HIGH), settings_of(analysed), ())
    assert (cost.seed_samples, cost.expected_samples) == (ROWS, 22)
    assert "statistics" in cost.basis
    capped = estimate_cost(analysed, plan_of(LOW, HIGH), settings_of(analysed, cap=15), ())
    assert capped.expected_samples == 15


def test_a_plan_that_is_not_known_goes_by_its_note_or_by_nothing(analysed: Workspace) -> None:
    mapped = Branch("mapped", (MAPPER,))
    noted = plan_of(LOW, mapped, keeps=1.25)
    settings = settings_of(analysed)
    assert estimate_cost(analysed, noted, settings, ()).expected_samples == 50
    unknown = estimate_cost(analysed, plan_of(LOW, mapped), settings, ())
    assert unknown.expected_samples is None
    assert "not known" in unknown.basis
    assert expected_effective(analysed, noted, settings) is None


def test_without_statistics_a_plan_is_not_taken_for_the_baseline(workspace: Workspace) -> None:
    settings = settings_of(workspace)
    assert estimate_cost(workspace, plan_of(LOW), settings, ()).expected_samples is None
    assert expected_effective(workspace, plan_of(LOW), settings) is None
    baseline = Recipe("baseline", "", "", (), {})
    assert estimate_cost(workspace, baseline, settings, ()).expected_samples == ROWS
    told = expected_effective(workspace, baseline, settings)
    assert told is not None
    assert told.ladder == Ladder(ROWS, ROWS, ROWS, ROWS)
    assert (told.samples, told.unique, told.steps) == (ROWS, ROWS, 5)


def test_only_a_run_of_the_same_plan_on_as_many_samples_is_measured(workspace: Workspace) -> None:
    settings = settings_of(workspace, cap=30)
    run = finished(plan_of(LOW), kept=12, before_cap=33, seed_samples=ROWS)
    same = estimate_cost(workspace, plan_of(LOW), settings, (run,))
    assert same.expected_samples == 30
    assert "0001-x" in same.basis
    assert estimate_cost(workspace, plan_of(HIGH), settings, (run,)).expected_samples is None
    other = finished(plan_of(LOW), kept=12, seed_samples=ROWS + 1)
    assert estimate_cost(workspace, plan_of(LOW), settings, (other,)).expected_samples is None


def timed(recipe: Recipe, settings: dict[str, Any], kept: int) -> Run:
    run = finished(recipe, kept=kept, seed_samples=ROWS)
    times = {"process": 10.0, "pretrain": 500.0, "finetune": 50.0, "evaluate": 40.0}
    stages = {
        name: replace(run.stages[name], status="succeeded", seconds=seconds)
        for name, seconds in times.items()
    }
    proposal = replace(run.plan.proposal, settings=settings)
    return replace(run, stages=stages, plan=replace(run.plan, proposal=proposal))


def test_a_run_on_fewer_samples_is_as_much_shorter_as_it_has_fewer_steps(
    analysed: Workspace,
) -> None:
    settings = settings_of(analysed)  # one epoch, 8 samples a step
    whole, few = Recipe("whole", "", "", (), {}), Recipe("few", "", "", (words(0, 15),), {})
    history = [timed(whole, settings, ROWS)]
    cost = estimate_cost(analysed, few, settings, history)
    assert (cost.expected_samples, cost.seconds) == (16, 10 + 500 * 2 / 5 + 50 + 40)
    assert "stage 1 by its steps" in cost.basis
    assert estimate_cost(analysed, whole, settings, history).seconds == 600
    again = [*history, timed(few, settings, 16)]  # took 500 s for 2 steps instead of 5
    assert estimate_cost(analysed, few, settings, again).seconds == 100 + (200 + 500) / 2
    assert relative_times(settings, history, ROWS, [ROWS, 16, None]) == [1, pytest.approx(0.5), 1]


def test_where_settings_fix_the_steps_samples_do_not_change_the_time(analysed: Workspace) -> None:
    settings = settings_of(analysed)
    settings["pretrain"] |= {"max_steps": 400}
    history = [timed(Recipe("whole", "", "", (), {}), settings, ROWS)]
    few = Recipe("few", "", "", (words(0, 15),), {})
    cost = estimate_cost(analysed, few, settings, history)
    assert (cost.expected_samples, cost.seconds) == (16, 600)
    assert "by its steps" not in cost.basis
    assert relative_times(settings, history, ROWS, [16]) == [1]


def test_the_effective_set_of_a_plan(analysed: Workspace) -> None:
    told = expected_effective(analysed, plan_of(LOW, HIGH), settings_of(analysed))
    assert told is not None
    # Rows 5 to 39 hold the texts of rows 5 to 9 twice.
    assert told.ladder == Ladder(ROWS, 10 + 35, 10 + 30, 22)
    assert told.samples == 22
    assert 13 <= told.unique <= 16
    assert (told.steps, told.seen) == (2, 16)
    assert told.mean_passes == 16 / told.unique
    assert told.max_passes in (2, 3)
    capped = expected_effective(analysed, plan_of(LOW, HIGH), settings_of(analysed, cap=4))
    assert capped is not None
    assert (capped.samples, capped.steps, capped.ladder.merged) == (4, 1, 22)


def test_the_effective_set_of_a_linear_recipe(analysed: Workspace) -> None:
    recipe = Recipe("linear", "", "", (words(0, 35), DEDUPLICATOR), {})
    told = expected_effective(analysed, recipe, settings_of(analysed))
    assert told is not None
    assert told.ladder == Ladder(ROWS, 36, 30, 30)
    assert (told.unique, told.steps, told.max_passes) == (30, 3, 1)
    nothing = Recipe("nothing", "", "", (words(90, 99),), {})
    assert expected_effective(analysed, nothing, settings_of(analysed)) is None
