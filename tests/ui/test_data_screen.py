"""The Data screen over a real workspace: nothing at first, an analysis from the app, then samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable

from synth_agent.demo import prepare_demo
from synth_agent.miniworld import write_world
from synth_agent.overview import Overview, RecipeLine, Relations, StatisticDrift, StatisticLine
from synth_agent.ui.app import SynthAgentApp
from synth_agent.ui.plots import sparkline
from synth_agent.ui.relations import relations_content
from synth_agent.ui.screens.data import DataScreen
from synth_agent.ui.screens.samples import SamplesScreen
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.workspace import Workspace, open_workspace
from tests.ui.conftest import seen, settle
from tests.ui.folder_backend import FolderBackend

SIZES = {"num_seed_samples": 30, "num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
MODELLED = ("similarity", "matching", "recaption", "curriculum")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    write_world(tmp_path / "world", seed=5, **SIZES)
    prepare_demo(tmp_path / "demo", lambda line: None, tmp_path / "world")
    for recipe in (tmp_path / "demo" / "recipes").glob("*.yaml"):
        if recipe.stem.startswith(MODELLED):
            recipe.unlink()
    return open_workspace(tmp_path / "demo")


async def wait_until(pilot: Pilot[int], condition: Callable[[], bool]) -> None:
    for _ in range(600):
        await pilot.pause(0.05)
        if condition():
            return
    raise AssertionError("it did not happen in 30 seconds")


async def test_from_nothing_to_samples(workspace: Workspace) -> None:
    app = SynthAgentApp(workspace)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        await wait_until(pilot, lambda: isinstance(app.screen, DataScreen))
        screen = app.screen
        head = screen.query_one("#data-head", Drawing)
        await wait_until(pilot, lambda: "not analysed yet" in str(head.content))
        await pilot.press("a")
        recipes = screen.query_one("#recipes", DataTable)
        await wait_until(pilot, lambda: recipes.row_count > 0)
        rows = screen.query_one("#statistics", DataTable).row_count
        assert f"30 samples, {rows} statistics" in str(head.content)
        assert rows >= 15
        assert "Alike in TextVQA: " in str(head.content)
        recipes.move_cursor(row=recipes.get_row_index("dedup"))
        await pilot.press("c")
        relations = screen.query_one("#relations-words", Drawing)
        await wait_until(pilot, lambda: "Kolmogorov-Smirnov" in str(relations.content))
        assert not screen.query_one("#statistics").display
        assert "text_len" in str(relations.content)
        assert "rank correlations" in str(relations.content)
        await pilot.press("c")
        assert screen.query_one("#statistics").display
        assert recipes.get_cell_at((0, 1)).plain == "30"
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert len(screen.query_one("#statistics", DataTable).columns) == 4
        assert recipes.ordered_columns[0].get_render_width(recipes) > len("baseline")
        await pilot.press("enter")
        await wait_until(pilot, lambda: isinstance(app.screen, SamplesScreen))
        words = app.screen.query_one("#samples-words", Drawing)
        await wait_until(pilot, lambda: "document_deduplicator" in str(words.content))
        assert "drops" in str(words.content)


def test_a_narrow_pane_lists_the_strongest_pairs() -> None:
    names, nan = ("a", "b", "c"), float("nan")
    spearman = ((1.0, 0.25, -0.9), (0.25, 1.0, nan), (-0.9, nan, 1.0))
    drift = (StatisticDrift("a", 2.0, 1.0, 0.5, 0.25),)
    relations = Relations(names, spearman, "strict", drift, "")
    narrow = str(relations_content(relations, 40))
    assert narrow.index("-0.90  c, a") < narrow.index("+0.25  b, a")
    assert "nan" not in narrow
    wide = str(relations_content(relations, 100))
    assert "-90   -" in wide
    assert "+0.50    0.25" in wide
    unknown = Relations(names, spearman, "strict", (), "follows a mapper")
    assert "follows a mapper" in str(relations_content(unknown, 100))


def test_a_bin_that_holds_anything_is_seen() -> None:
    assert sparkline([0, 1, 1000]) == " ▁█"
    assert sparkline([0, 0]) == "  "


async def test_a_statistic_that_is_known_of_no_sample_has_a_row(backend: FolderBackend) -> None:
    nan = float("nan")
    unknown = StatisticLine("image_width", "image_shape_filter", (0,) * 24, nan, nan, nan, 300)
    overview = Overview(300, (unknown,), (RecipeLine("baseline", "As it is", 300, ""),))
    backend.overview = lambda: overview  # type: ignore[method-assign]
    app = SynthAgentApp(backend)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("5")
        await settle(pilot)
        row = app.screen.query_one("#statistics", DataTable).get_row_at(0)
        assert [cell.plain for cell in row[2:]] == ["-", "300", "-", "-"]


async def test_a_click_before_the_first_analysis_does_no_harm(backend: FolderBackend) -> None:
    backend.overview = lambda: None  # type: ignore[method-assign]
    app = SynthAgentApp(backend)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("5")
        for table in ("#statistics", "#recipes"):
            await pilot.click(table, offset=(3, 1))
            await settle(pilot)
            await pilot.click(table, offset=(3, 5))
            await settle(pilot)
        assert "not analysed yet" in seen(pilot)
