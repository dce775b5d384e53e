"""What data plans would make, from given scores, against the merging that the process stage does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from synth_agent.data import ROW_ID_FIELD
from synth_agent.data_plans import Branch, DataPlan, Draw, Order
from synth_agent.plan_retention import plan_retention
from synth_agent.recipes import Operator, Recipe
from synth_agent.retention import retention
from synth_agent.stages.assemble import assemble
from synth_agent.statistics import (
    ColumnWriter,
    SampleRow,
    StatisticsTable,
    column_spec,
    write_samples,
)

ROWS = 80
NUM_TEXTS = 50
CASES = 120
MAPPER = Operator("clean_links_mapper", {})
DEDUPLICATOR = Operator("document_deduplicator", {})


def digest_of(model: str) -> str:
    return f"digest of {model}"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> StatisticsTable:
    """80 rows of 50 texts; row i has i words."""
    root = tmp_path_factory.mktemp("statistics")
    samples = [
        SampleRow(f"id {i}", f"sample {i}", f"text {i % NUM_TEXTS}", ()) for i in range(ROWS)
    ]
    write_samples(root, "data", samples)
    spec = column_spec("words_num_filter", {}, digest_of)
    assert spec is not None
    scores = {"num_words": [float(i) for i in range(ROWS)]}
    ColumnWriter(root, spec).append([sample.sample for sample in samples], scores)
    return StatisticsTable.open(root, "data")


def words(low: int, high: int) -> Operator:
    return Operator("words_num_filter", {"min_num": low, "max_num": high})


def plan_of(*branches: Branch, deduplicate: bool = False) -> Recipe:
    plan = DataPlan(branches, deduplicate=deduplicate, order=Order("shuffled", 1))
    return Recipe("plan", "plan", "", (), {}, data_plan=plan)


def left_by(branch: Branch) -> list[int]:
    """The rows that a branch of `random_plan` leaves, worked out by hand."""
    filter_, *more = branch.operators
    low, high = filter_.parameters["min_num"], filter_.parameters["max_num"]
    rows = [row for row in range(ROWS) if low <= row <= high]
    if not more:
        return rows
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(row % NUM_TEXTS, row)
    return list(first.values())


def random_plan(generator: np.random.Generator) -> Recipe:
    deduplicate = bool(generator.integers(2))
    branches = []
    for number in range(int(generator.integers(1, 4))):
        low, high = (int(value) for value in generator.integers(0, ROWS, 2))
        more = (DEDUPLICATOR,) if generator.integers(2) else ()
        repeat = 1 if deduplicate else int(generator.integers(1, 4))
        draw = Draw(int(generator.integers(1, ROWS)), int(generator.integers(99)))
        drawn = draw if generator.integers(2) else None
        branches.append(Branch(f"b{number}", (words(low, high), *more), repeat, drawn))
    return plan_of(*branches, deduplicate=deduplicate)


def test_rows_and_counts_are_those_of_the_stage(table: StatisticsTable) -> None:
    generator = np.random.default_rng(3)
    emptied = 0
    for _ in range(CASES):
        recipe = random_plan(generator)
        assert recipe.data_plan is not None
        lists = [left_by(branch) for branch in recipe.branches]
        rows = [
            [{ROW_ID_FIELD: row, "text": f"text {row % NUM_TEXTS}"} for row in r] for r in lists
        ]
        made = assemble(recipe.data_plan, rows, ROWS * 20, 0)
        told = plan_retention(recipe, table, digest_of)
        assert told.known
        assert told.rows is not None
        assert told.rows.tolist() == [row[ROW_ID_FIELD] for row in made.before_cap]
        assert (told.merged, told.repetitions) == (made.merged, made.repetitions)
        assert told.samples == len(made.before_cap)
        for branch, share in zip(told.branches, made.shares, strict=True):
            assert (branch.left, branch.taken, branch.samples) == (
                share.left,
                share.taken,
                share.samples,
            )
            assert branch.note == share.note
            emptied += share.left == 0
    assert 0 < emptied < CASES


def test_a_linear_recipe_is_one_branch(table: StatisticsTable) -> None:
    recipe = Recipe("linear", "linear", "", (words(10, 70), DEDUPLICATOR), {})
    told = plan_retention(recipe, table, digest_of)
    kept = retention(recipe, table, digest_of)
    assert told.rows is not None
    assert told.rows.tolist() == np.flatnonzero(kept.keep).tolist()
    assert told.samples == kept.kept == 50
    assert told.why == ""
    everything = plan_retention(Recipe("baseline", "baseline", "", (), {}), table, digest_of)
    assert everything.samples == ROWS


def test_a_branch_with_a_mapper_is_not_known_and_says_so(table: StatisticsTable) -> None:
    known = Branch("known", (words(0, 9),), repeat=3)
    mapped = Branch("mapped", (words(10, 29), MAPPER, words(0, 99)), sample=Draw(5, 1))
    told = plan_retention(plan_of(known, mapped), table, digest_of)
    assert not told.known
    assert (told.samples, told.merged, told.repetitions, told.rows) == (None,) * 4
    assert [branch.samples for branch in told.branches] == [30, None]
    counts = [(o.before, o.after) for o in told.branches[1].retention.operators]
    assert counts == [(ROWS, 20), (20, None), (None, None)]
    assert told.why.startswith("branch mapped: clean_links_mapper: it changes samples")
    alone = plan_retention(plan_of(known), table, digest_of)
    assert alone.samples == 30
    emptied = replace(mapped, operators=(words(900, 999), MAPPER))
    assert plan_retention(plan_of(known, emptied), table, digest_of).samples == 30


def test_the_linear_answer_for_a_plan_is_that_it_is_not_known(table: StatisticsTable) -> None:
    told = retention(plan_of(Branch("a", (words(0, 9),))), table, digest_of)
    assert told.kept is None
    assert [operator.known for operator in told.operators] == [False]
    assert "branch" in told.operators[0].why


@pytest.mark.parametrize("available", [0, 4, 5, 6, 80])
def test_a_draw_takes_all_when_there_are_fewer(available: int) -> None:
    branch = Branch("a", (), sample=Draw(5, 2))
    taken: Sequence[int] = branch.taken(available)
    assert len(taken) == min(5, available)
    assert list(taken) == sorted(set(taken))
    assert all(0 <= position < available for position in taken)
    assert bool(branch.note(available)) == (available < 5)
