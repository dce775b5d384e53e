"""Every run and every rejection, in one table. Two marked runs can be compared."""

from __future__ import annotations

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.color import Color, ColorParseError
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import DataTable

from synth_agent.runs import Rejection, Run
from synth_agent.ui.backend import Backend, Notebook
from synth_agent.ui.messages import ResultsRequested, RunRequested
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.compare import CompareScreen
from synth_agent.ui.text import STATES, VERDICTS, Sign, clean, clock, shorten
from synth_agent.ui.widgets.drawing import Drawing

_WIDE = 100
"""From this width on, every column fits."""
_OWN = -1
"""How the toolkit numbers the terminal's own colour."""
_COLUMNS = ("run", "samples", "TextVQA", "MMBench", "verdict", "state")
_MORE_COLUMNS = ("kind", "recipe", "time (UTC)")


class HistoryScreen(NotebookScreen):
    """The experiment log as a table, newest first."""

    PLACE = "history"
    BINDINGS = [
        Binding("space", "mark", "Mark", id="history.mark"),
        Binding("equals_sign", "compare", "Compare marked", key_display="=", id="history.compare"),
    ]

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._marked: list[str] = []
        self._rows: dict[str, list[Text]] = {}
        """What the table shows, by the id of the run or rejection."""

    def compose_body(self) -> ComposeResult:
        yield Drawing(id="history-head")
        yield DataTable(id="history", cursor_type="row")
        with VerticalScroll(id="history-detail", classes="panel"):
            yield Drawing(id="history-words")

    def on_mount(self) -> None:
        # A click on a table without columns is an error in the toolkit.
        self.query_one(DataTable).add_columns(*_COLUMNS)
        self.query_one(DataTable).focus()

    def on_resize(self) -> None:
        if self.is_ready and self.notebook is not None:
            self.show_notebook(self.notebook)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys of the table only while a run is in it."""
        has_runs = self.notebook is not None and bool(self.notebook.runs)
        return has_runs or action not in ("mark", "compare")

    def show_notebook(self, notebook: Notebook) -> None:
        self.refresh_bindings()
        rows = {run.id: self._run_cells(run) for run in reversed(notebook.runs)}
        rows |= {one.id: self._rejection_cells(one) for one in reversed(notebook.rejections)}
        self._fill(rows, is_wide=self.size.width >= _WIDE)
        words = (
            f"{_many(len(notebook.runs), 'run')}, "
            f"{_many(len(notebook.rejections), 'rejected proposal')}. "
            "enter opens, space marks two, = compares."
            if rows
            else "No runs yet. Press 1 and start with the baseline."
        )
        lines = [words, *(f"Predictions of {clean(one)}." for one in notebook.calibration)]
        content = Content.styled("\n".join(lines), "$foreground-muted")
        self.query_one("#history-head", Drawing).show(lambda width, height: content)
        self.query_one("#history-detail").display = bool(rows)

    def _fill(self, rows: dict[str, list[Text]], *, is_wide: bool) -> None:
        """Show rows; what stays stays in its place, and the cursor on its run."""
        labels = (*_COLUMNS, *(_MORE_COLUMNS if is_wide else ()))
        rows = {key: cells[: len(labels)] for key, cells in rows.items()}
        table = self.query_one(DataTable)
        if list(rows) == list(self._rows) and len(table.columns) == len(labels):
            for key, cells in rows.items():
                for label, cell, before in zip(labels, cells, self._rows[key], strict=True):
                    if (cell, cell.style) != (before, before.style):
                        table.update_cell(key, label, cell, update_width=True)
        else:
            row, chosen = table.cursor_row, self._key_under_cursor()
            table.clear(columns=True)
            for label in labels:
                table.add_column(label, key=label)
            for key, cells in rows.items():
                table.add_row(*cells, key=key)
            row = table.get_row_index(chosen) if chosen in rows else min(row, len(rows) - 1)
            table.move_cursor(row=max(0, row))
        self._rows = rows

    def _key_under_cursor(self) -> str:
        table = self.query_one(DataTable)
        if not table.row_count:
            return ""
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value or ""

    def _label_of(self, key: str) -> Text:
        mark = "●" if key in self._marked else " "
        return Text(f"{mark} {shorten(clean(key), 30 if self.size.width >= _WIDE else 16)}")

    def _run_cells(self, run: Run) -> list[Text]:
        proposal = run.plan.proposal
        kept = run.stages["process"].result.get("kept")
        return [
            self._label_of(run.id),
            Text(f"{kept:,}" if isinstance(kept, int) else "", justify="right"),
            _score_text(run, "textvqa"),
            _score_text(run, "mmbench"),
            self._sign_text(VERDICTS[run.verdict]) if run.verdict else Text(""),
            self._sign_text(STATES[run.status]),
            Text(proposal.kind),
            Text(shorten(clean(proposal.recipe.get("name", "")), 24)),
            Text(clock(run.finished or run.started or run.plan.approved_at)),
        ]

    def _rejection_cells(self, rejection: Rejection) -> list[Text]:
        proposal = rejection.proposal
        return [
            self._label_of(rejection.id),
            *(Text(""),) * 4,
            self._sign_text(STATES["rejected"]),
            Text(proposal.kind),
            Text(shorten(clean(proposal.recipe.get("name", "")), 24)),
            Text(clock(rejection.at)),
        ]

    def _sign_text(self, sign: Sign) -> Text:
        try:
            color = Color.parse(self.app.theme_variables[sign.style])
        except ColorParseError:  # a share of the terminal's own colour, which nobody knows
            return Text(sign.text)
        # The terminal's own foreground has no colour that could be named.
        style = "" if color.ansi == _OWN else f"rgb({color.r},{color.g},{color.b})"
        return Text(sign.text, style=style)

    @on(DataTable.RowHighlighted)
    def _follow_cursor(self, event: DataTable.RowHighlighted) -> None:
        words = self._detail(event.row_key.value)
        self.query_one("#history-words", Drawing).show(lambda width, height: words)
        self.query_one("#history-detail").scroll_home(animate=False)

    def _detail(self, key: str | None) -> Content:
        notebook = self.notebook
        if notebook is None:
            return Content("")
        run = notebook.run(key)
        if run is not None:
            return _described(run.plan.proposal.title, run.plan.proposal.reason)
        for rejection in notebook.rejections:
            if rejection.id == key:
                why = f"Rejected by {rejection.by}: {rejection.reason}"
                return _described(rejection.proposal.title, why)
        return Content("")

    @on(DataTable.RowSelected)
    def _open_row(self, event: DataTable.RowSelected) -> None:
        run = self.notebook.run(event.row_key.value) if self.notebook else None
        if run is None:
            self.notify("A rejected proposal has no run.", markup=False)
        elif run.scores:
            self.post_message(ResultsRequested(run.id))
        else:
            self.post_message(RunRequested(run.id))

    def action_mark(self) -> None:
        key = self._key_under_cursor()
        if self.notebook is None or not key:
            return
        if self.notebook.run(key) is None:
            self.notify("Only runs can be compared.", markup=False)
            return
        if key in self._marked:
            self._marked.remove(key)
        else:
            self._marked = [*self._marked[-1:], key]
        self.show_notebook(self.notebook)

    def action_compare(self) -> None:
        if self.notebook is None:
            return
        chosen = sorted(run.id for run in self.notebook.runs if run.id in self._marked)
        if len(chosen) != 2:
            self.notify("Mark two runs with space first.", markup=False)
            return
        runs = [run for run in self.notebook.runs if run.id in chosen]
        screen = CompareScreen(self.backend, runs[0], runs[1])
        screen.notebook = self.notebook
        self.app.push_screen(screen)


def _score_text(run: Run, benchmark: str) -> Text:
    score = run.scores.get(benchmark)
    return Text(f"{score.percent:.1f}" if score else "", justify="right")


def _described(title: str, reason: str) -> Content:
    return Content.assemble((clean(title), "bold"), "\n", (clean(reason), "$foreground-muted"))


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
