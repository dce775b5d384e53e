"""A run's scores with their uncertainty, its difference from its parent, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable

from synth_agent.changes import Change, OperatorChanges
from synth_agent.data import without_markers
from synth_agent.runs import Run
from synth_agent.ui.backend import Backend, Notebook
from synth_agent.ui.messages import QuestionsRead, RunRequested
from synth_agent.ui.plots import bar
from synth_agent.ui.questions import Question
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.text import clean, fit, shorten
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.scoreboard import (
    benchmarks,
    difference_block,
    forest,
    verdict_words,
    weighted_lines,
)
from synth_agent.wording import benchmark_name

FILTERS = ("all", "wrong", "right", "changed")
_MOST_ROWS = 500
_TABLE_BESIDE = 110
"""From this width on the questions stand beside the scores, where the focus can start."""
_OTHER_COLUMNS = 2 + 12 + 16 + 4 * 2 + 1
"""Cells of the marks, predictions and answers, of the padding and of the scroll bar."""


class QuestionTable(DataTable[Text]):
    """The list of questions; it reports its width, on which its columns depend."""

    @dataclass
    class Resized(Message):
        """The table has another width."""

        width: int

    def on_resize(self, event: events.Resize) -> None:
        self.post_message(self.Resized(event.size.width))


class ResultsScreen(NotebookScreen):
    """Show the results of one run, the newest with scores unless another was asked for."""

    PLACE = "results"
    BINDINGS = [
        Binding("f", "filter", "Filter questions", id="results.filter"),
        Binding("b", "benchmark", "Other benchmark", id="results.benchmark"),
        Binding("v", "run", "Stages", id="results.run"),
    ]

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._wanted: str | None = None
        self._run: Run | None = None
        self._questions: list[Question] = []
        self._filter = "all"
        self._benchmark: str | None = None
        self._listed: list[Question] = []

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="results"):
            yield Drawing(id="results-head")
            with Horizontal(id="results-columns", classes="columns"):
                with Vertical(classes="wide-column"):
                    yield Drawing(id="forest", classes="panel")
                    yield Drawing(id="against", classes="panel")
                    yield Drawing(id="categories", classes="panel")
                    yield Drawing(id="operators", classes="panel")
                with Vertical(id="questions-panel", classes="panel"):
                    yield QuestionTable(id="questions", cursor_type="row")
                    yield Drawing(id="question")

    def on_mount(self) -> None:
        self.query_one("#forest").border_title = "Scores, 95 % intervals"
        self.query_one("#against").border_title = "Difference"
        self.query_one("#categories").border_title = "Categories"
        self.query_one("#operators").border_title = "Data"
        self.query_one("#questions-panel").border_title = "Questions"
        narrow = self.app.size.width < _TABLE_BESIDE
        self.query_one("#results" if narrow else "#questions").focus()
        self._show_nothing()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys of a result only while there is one."""
        return action == "leave" or self._run is not None

    def open(self, run_id: str) -> None:
        """Show a run's results."""
        self._wanted = run_id
        if self.is_ready and self.notebook is not None:
            self.show_notebook(self.notebook)

    def show_notebook(self, notebook: Notebook) -> None:
        scored = [run for run in notebook.runs if run.scores]
        run = notebook.run(self._wanted) if self._wanted else (scored[-1] if scored else None)
        if run is None or not run.scores:
            self._show_nothing()
            return
        is_other = self._run is None or self._run.id != run.id
        grew = self._run is not None and set(self._run.scores) != set(run.scores)
        self._run = run
        self.refresh_bindings()
        parent = notebook.run(run.plan.proposal.parent)
        self._draw_scores(run, parent)
        if is_other or grew:
            self._questions, self._benchmark = [], next(iter(run.scores))
            self._list_questions()
            self._read_questions(run)

    def _show_nothing(self) -> None:
        words = Content.styled(
            "No score yet. A run's results are here once it was evaluated.", "$foreground-muted"
        )
        self.query_one("#results-head", Drawing).show(lambda width, height: words)
        self.query_one("#results-columns").display = False
        self._run = None
        self.refresh_bindings()

    def _draw_scores(self, run: Run, parent: Run | None) -> None:
        self.query_one("#results-columns").display = True
        head = Content.assemble(
            (clean(run.id), "bold"), f"  {clean(run.plan.proposal.title)}\n", verdict_words(run)
        )
        self.query_one("#results-head", Drawing).show(lambda width, height: head)
        rows = ([(parent.id, parent)] if parent is not None else []) + [(run.id, run)]
        names = benchmarks([run])
        self.query_one("#forest", Drawing).show(
            lambda width, height: Content("\n\n").join(forest(rows, n, width) for n in names)
        )
        self.query_one("#against", Drawing).show(
            lambda width, height: against_content(run, width, self.backend.weights)
        )
        self.query_one("#categories", Drawing).show(
            lambda width, height: categories_content(run, parent, width)
        )

    @work(thread=True, exclusive=True, exit_on_error=False, group="questions")
    def _read_questions(self, run: Run) -> None:
        self.post_message(
            QuestionsRead(run.id, self.backend.questions(run), self.backend.changes(run))
        )

    @on(QuestionsRead)
    def _keep_questions(self, message: QuestionsRead) -> None:
        if self._run is not None and message.run_id == self._run.id:
            self._questions = message.questions
            self._list_questions()
            run, changes = self._run, message.changes
            self.query_one("#operators", Drawing).show(
                lambda width, height: operators_content(run, changes, width)
            )

    def _list_questions(self) -> None:
        chosen = [q for q in self._questions if q.benchmark == self._benchmark]
        matching = [question for question in chosen if passes(question, self._filter)]
        self._listed = matching[:_MOST_ROWS]
        table = self.query_one(QuestionTable)
        cursor = table.cursor_row
        table.clear(columns=True)
        table.add_columns("", "question", "prediction", "answers")
        room = max(12, table.size.width - _OTHER_COLUMNS)
        for question in self._listed:
            table.add_row(*_cells(question, room))
        name = benchmark_name(self._benchmark or "")
        more = f", first {_MOST_ROWS} shown" if len(matching) > _MOST_ROWS else ""
        title = f"{name} questions: {self._filter}, {len(matching):,} of {len(chosen):,}{more}"
        self.query_one("#questions-panel").border_title = Content(title)
        table.move_cursor(row=min(cursor, max(0, len(self._listed) - 1)))
        self._show_question(table.cursor_row)

    @on(DataTable.RowHighlighted)
    def _follow_cursor(self, event: DataTable.RowHighlighted) -> None:
        self._show_question(event.cursor_row)

    def _show_question(self, row: int) -> None:
        if row < len(self._listed):
            words = question_content(self._listed[row])
        else:
            words = Content.styled("No question here. f changes the filter.", "$foreground-muted")
        self.query_one("#question", Drawing).show(lambda width, height: words)

    @on(QuestionTable.Resized)
    def _fit_columns(self) -> None:
        if self._questions:
            self._list_questions()

    def action_filter(self) -> None:
        self._filter = FILTERS[(FILTERS.index(self._filter) + 1) % len(FILTERS)]
        self._list_questions()

    def action_benchmark(self) -> None:
        if self._run is not None and self._benchmark is not None:
            names = list(self._run.scores)
            self._benchmark = names[(names.index(self._benchmark) + 1) % len(names)]
            self._list_questions()

    def action_run(self) -> None:
        if self._run is not None:
            self.post_message(RunRequested(self._run.id))


def passes(question: Question, chosen: str) -> bool:
    """Tell whether a question belongs to a filter."""
    if chosen == "wrong":
        return not question.is_right
    if chosen == "right":
        return question.is_right
    if chosen == "changed":
        return question.is_changed
    return True


def mark(question: Question) -> str:
    """Return right or wrong as a glyph, with an arrow where the parent did otherwise."""
    sign = "✓" if question.is_right else "✗"
    if not question.is_changed or question.parent_score is None:
        return sign
    return sign + ("▲" if question.score > question.parent_score else "▼")


def _cells(question: Question, room: int) -> list[Text]:
    return [
        Text(mark(question)),
        Text(fit(clean(question.question.partition("\n")[0]), room)),
        Text(fit(clean(question.prediction), 12)),
        Text(fit(", ".join(clean(answer) for answer in question.answers), 16)),
    ]


def question_content(question: Question) -> Content:
    """Return one question with everything that is known of it."""
    word = "right" if question.is_right else "wrong"
    style = "$success" if question.is_right else "$error"
    before = ""
    if question.parent_score is not None:
        before = f", parent run {100 * question.parent_score:.0f}"
    distinct = list(dict.fromkeys(clean(answer) for answer in question.answers))
    rows = [
        ("Question", clean(question.question, lines=True)),
        ("Answers", ", ".join(distinct) or "not in the predictions file"),
        ("Prediction", clean(question.prediction) or "empty"),
        ("Picture", clean(question.picture) or "inside the benchmark's file"),
        ("Category", clean(question.category)),
    ]
    lines = [
        Content.assemble((fit(name, 12), "$foreground-muted"), text) for name, text in rows if text
    ]
    score = f"{mark(question)} {word}"
    lines.append(
        Content.assemble(
            (fit("Score", 12), "$foreground-muted"),
            (score, f"bold {style}"),
            f"  {100 * question.score:.0f} of 100{before}",
        )
    )
    return Content("\n").join(lines)


def against_content(run: Run, width: int, weights: Mapping[str, float]) -> Content:
    """Return the run's differences from its parent, benchmark by benchmark, and as they are weighed."""
    if not run.comparisons:
        return Content.styled(
            "Compared with nothing: this is where comparisons start.", "$foreground-muted"
        )
    parent = next(iter(run.comparisons.values())).parent
    head = Content.styled(f"against {clean(parent)}", "$foreground-muted")
    comparisons = list(run.comparisons.values())
    lines = [difference_block(comparison, width) for comparison in comparisons]
    lines += weighted_lines(comparisons, weights, width)
    return Content("\n").join([head, *lines])


def categories_content(run: Run, parent: Run | None, width: int) -> Content:
    """Return the scores by category, with the parent's beside them."""
    lines: list[Content] = []
    for name, score in run.scores.items():
        before = parent.scores[name].categories if parent and name in parent.scores else {}
        if score.categories:
            lines.append(Content.styled(benchmark_name(name), "$foreground-muted"))
        for category, percent in score.categories.items():
            lines.append(_category_line(category, percent, before.get(category), width))
    if not lines:
        return Content.styled("The benchmarks report no categories.", "$foreground-muted")
    return Content("\n").join(lines)


def operators_content(run: Run, changes: Sequence[OperatorChanges], width: int) -> Content:
    """Return what each operator kept, and some of the samples that it dropped or changed."""
    counts = run.stages["process"].result.get("operators", ())
    if not counts:
        return Content.styled("The recipe has no operators.", "$foreground-muted")
    examples = {one.operator: one.changes for one in changes}
    lines: list[Content] = []
    position, branch = 0, ""
    for count in counts:
        position = position + 1 if count.get("branch", "") == branch else 1
        branch = count.get("branch", "")
        name = f"{position}. {count['name']}"
        numbers = f"{count['before']:,} → {count['after']:,}"
        label = f"{branch}: {name}" if branch else name
        room = max(8, width - len(numbers) - 2)
        lines.append(Content.assemble(fit(clean(label), room), "  ", (numbers, "bold")))
        lines += [change_content(change, width) for change in examples.get(label, ())]
    return Content("\n").join(lines)


def change_content(change: Change, width: int) -> Content:
    """Return one sample that was dropped (−) or changed (→), on one line."""
    text = change.before if change.after is None else change.after
    sign, style = ("−", "$error") if change.after is None else ("→", "$success")
    room = max(8, width - 4)
    words = clean(without_markers(text))
    return Content.assemble("  ", (sign, style), " ", (shorten(words, room), "$foreground-muted"))


def _category_line(category: str, percent: float, before: float | None, width: int) -> Content:
    name_width = min(30, max(10, width // 3))
    change = f" {percent - before:+5.1f}" if before is not None else ""
    bar_width = max(0, min(40, width - name_width - 16))
    return Content.assemble(
        fit(clean(category), name_width),
        " ",
        (bar(percent / 100, bar_width), "$primary"),
        (f" {percent:5.1f}", "bold"),
        (change, "$foreground-muted"),
    )
