"""The seed set as its statistics tell it, and what every recipe would keep of it.

The statistics give way to their correlations and the chosen recipe's drift and come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import DataTable
from textual.worker import get_current_worker

from synth_agent.overview import Overview, RecipeLine, StatisticLine
from synth_agent.ui.backend import Backend
from synth_agent.ui.messages import AnalysisEnded, AnalysisProgressed, DataRead, RelationsRead
from synth_agent.ui.plots import bar, number, sparkline
from synth_agent.ui.relations import relations_content
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.samples import SamplesScreen
from synth_agent.ui.text import clean, shorten
from synth_agent.ui.widgets.drawing import Drawing

_BAR_WIDTH = 24
_STATISTICS = ("statistic", "distribution", "median", "unknown", "lowest", "highest")
_FEW_STATISTICS = 4
"""Columns where there is no room for all."""
_WIDE = 110
_RECIPES = ("recipe", "keeps", "share")


class DataScreen(NotebookScreen):
    """Statistics and recipes; an analysis is started from here."""

    PLACE = "data"
    BINDINGS = [
        Binding("a", "analyze", "Analyse", id="data.analyze"),
        Binding("c", "toggle_relations", "Correlations, drift", id="data.relations"),
    ]

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._overview: Overview | None = None
        self._is_analysing = False
        self._chosen = ""
        """Name of the recipe under the cursor."""

    def compose_body(self) -> ComposeResult:
        yield Drawing(id="data-head")
        with Horizontal(id="data"):
            yield DataTable(id="statistics", cursor_type="none")
            with VerticalScroll(id="relations"):
                yield Drawing(id="relations-words")
            yield DataTable(id="recipes", cursor_type="row")
        yield Drawing(id="data-detail", classes="panel")

    def on_mount(self) -> None:
        self.query_one("#statistics").border_title = "Statistics of the seed set"
        self.query_one("#recipes").border_title = "What each recipe keeps"
        relations = self.query_one("#relations")
        relations.border_title = "Drift and correlations"
        relations.display = False
        self._say("Reading the statistics …")
        self._clear_tables(_FEW_STATISTICS)
        self.query_one("#recipes", DataTable).focus()

    def on_screen_resume(self) -> None:
        """Read again: recipes and seed set may have changed."""
        if not self._is_analysing:
            self._read()

    @work(thread=True, exclusive=True, exit_on_error=False, group="data")
    def _read(self) -> None:
        self.post_message(DataRead(self.backend.overview()))

    @on(DataRead)
    def _show_data(self, message: DataRead) -> None:
        self._overview = message.overview
        self._draw_tables()
        self._read_relations_if_seen()

    def action_toggle_relations(self) -> None:
        """Show correlations and drift in the place of the statistics, or the statistics again."""
        relations, statistics = self.query_one("#relations"), self.query_one("#statistics")
        relations.display, statistics.display = not relations.display, relations.display
        self._read_relations_if_seen()

    def _read_relations_if_seen(self) -> None:
        if self.query_one("#relations").display:
            self._show_words("Computing …")
            self._read_relations(self._chosen)

    @work(thread=True, exclusive=True, exit_on_error=False, group="relations")
    def _read_relations(self, recipe: str) -> None:
        worker = get_current_worker()
        relations = self.backend.relations(recipe)
        if not worker.is_cancelled:
            self.post_message(RelationsRead(relations))

    @on(RelationsRead)
    def _show_relations(self, message: RelationsRead) -> None:
        relations = message.relations
        if relations is None:
            self._show_words("The seed set was not analysed yet.")
            return
        self.query_one("#relations-words", Drawing).show(
            lambda width, height: relations_content(relations, width)
        )

    def _show_words(self, words: str) -> None:
        content = Content.styled(words, "$foreground-muted")
        self.query_one("#relations-words", Drawing).show(lambda width, height: content)

    def on_resize(self) -> None:
        if self._overview is not None:
            self._draw_tables()

    def _draw_tables(self) -> None:
        overview = self._overview
        statistics = self.query_one("#statistics", DataTable)
        recipes = self.query_one("#recipes", DataTable)
        most = len(_STATISTICS) if self.size.width >= _WIDE else _FEW_STATISTICS
        row = recipes.cursor_row
        self._clear_tables(most)
        if overview is None:
            self._say("The seed set was not analysed yet. Press a: every sample is scored once.")
            return
        for line in overview.statistics:
            statistics.add_row(*_statistic_cells(line)[:most])
        cells = [_recipe_cells(recipe, overview.num_samples) for recipe in overview.recipes]
        recipes.clear(columns=True)
        for position, label in enumerate(_RECIPES):
            # A table that is filled again under the same keys does not widen by itself.
            width = max([len(label), *(row[position].cell_len for row in cells)])
            recipes.add_column(label, width=width)
        for recipe, row_cells in zip(overview.recipes, cells, strict=True):
            recipes.add_row(*row_cells, key=recipe.name)
        recipes.move_cursor(row=row)
        self._say(
            f"{overview.num_samples:,} samples, {len(overview.statistics)} statistics. "
            "enter shows what a recipe keeps and drops."
            + (f"\nAlike {overview.contamination}" if overview.contamination else "")
        )

    def _clear_tables(self, num_statistics: int) -> None:
        """Leave only the heads. A click on a table without columns is an error in the toolkit."""
        columns = {"#statistics": _STATISTICS[:num_statistics], "#recipes": _RECIPES}
        for selector, labels in columns.items():
            table = self.query_one(selector, DataTable)
            table.clear(columns=True)
            table.add_columns(*labels)

    def _say(self, words: str) -> None:
        content = Content.styled(words, "$foreground-muted")
        self.query_one("#data-head", Drawing).show(lambda width, height: content)

    def action_analyze(self) -> None:
        """Score what has no score yet."""
        if not self._is_analysing:
            self._is_analysing = True
            self._say("Starting the analysis …")
            self._analyze()

    @work(thread=True, exclusive=True, exit_on_error=False, group="analysis")
    def _analyze(self) -> None:
        worker = get_current_worker()
        problems: list[str] = []

        def report(record: Mapping[str, Any]) -> None:
            self.post_message(AnalysisProgressed(record["label"], record["step"], record["total"]))

        try:
            problems = self.backend.analyze(report, lambda: worker.is_cancelled)
        finally:
            self.post_message(AnalysisEnded(problems))

    @on(AnalysisProgressed)
    def _show_progress(self, message: AnalysisProgressed) -> None:
        share = message.step / message.total if message.total else 1.0
        self._say(
            f"{clean(message.label)}  {bar(share, _BAR_WIDTH)}  {message.step:,}/{message.total:,}"
        )

    @on(AnalysisEnded)
    def _end_analysis(self, message: AnalysisEnded) -> None:
        self._is_analysing = False
        for problem in message.problems:
            self.notify(f"Not scored: {clean(problem)}", severity="warning", markup=False)
        self._read()

    @on(DataTable.RowHighlighted, "#recipes")
    def _follow_cursor(self, event: DataTable.RowHighlighted) -> None:
        recipes = self._overview.recipes if self._overview else ()
        chosen = next((r for r in recipes if r.name == event.row_key.value), None)
        words = _described(chosen) if chosen else Content("")
        if chosen is not None and chosen.name != self._chosen:
            self._chosen = chosen.name
            self._read_relations_if_seen()
        self.query_one("#data-detail", Drawing).show(lambda width, height: words)

    @on(DataTable.RowSelected, "#recipes")
    def _open_samples(self, event: DataTable.RowSelected) -> None:
        name = event.row_key.value
        if name is not None:
            screen = SamplesScreen(self.backend, name)
            screen.notebook = self.notebook
            self.app.push_screen(screen)


def _statistic_cells(line: StatisticLine) -> list[Text]:
    low, median, high = (
        Text(number(value), justify="right") for value in (line.low, line.median, line.high)
    )
    unknown = Text(f"{line.unknown:,}" if line.unknown else "", justify="right")
    name = Text(shorten(clean(line.stat), 26))
    return [name, Text(sparkline(line.counts)), median, unknown, low, high]


def _recipe_cells(line: RecipeLine, num_samples: int) -> list[Text]:
    name = Text(shorten(clean(line.name), 24))
    if line.kept is None:
        return [name, Text("?", justify="right"), Text("not known before it runs")]
    share = line.kept / num_samples if num_samples else 0.0
    return [name, Text(f"{line.kept:,}", justify="right"), Text(f"{bar(share, 12)} {share:.0%}")]


def _described(line: RecipeLine) -> Content:
    return Content.assemble(
        (clean(line.title), "bold"), "\n", (clean(line.why), "$foreground-muted")
    )
