"""Two runs side by side: recipe difference, scores, and the paired differences."""

from __future__ import annotations

from collections.abc import Mapping

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content

from synth_agent.errors import SynthAgentError
from synth_agent.runs import Comparison, Run
from synth_agent.ui.backend import Backend
from synth_agent.ui.messages import RunsCompared
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.text import clean
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.recipe_diff import difference_content
from synth_agent.ui.widgets.scoreboard import benchmarks, difference_block, forest, weighted_lines
from synth_agent.ui.widgets.stages import sample_counts


class CompareScreen(NotebookScreen):
    """Compare an earlier and a later run on the questions that both answered."""

    PLACE = "history"
    BINDINGS = [Binding("escape", "leave", "Back", id="compare.back")]

    def __init__(self, backend: Backend, earlier: Run, later: Run) -> None:
        super().__init__(backend)
        self._earlier, self._later = earlier, later

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="compare"):
            yield Drawing(id="compare-head")
            yield Drawing(id="compare-scores", classes="panel")
            yield Drawing(id="compare-differences", classes="panel")
            yield Drawing(id="compare-recipe", classes="panel")

    def on_mount(self) -> None:
        self.query_one("#compare-scores").border_title = "Scores, 95 % intervals"
        self.query_one("#compare-differences").border_title = "Later minus earlier"
        self.query_one("#compare-recipe").border_title = "Recipe, earlier (-) and later (+)"
        self.query_one("#compare").focus()
        earlier, later = self._earlier, self._later
        head = Content.assemble(
            (clean(earlier.id), "bold"), ("  and  ", "$foreground-muted"), (clean(later.id), "bold")
        )
        rows = [(earlier.id, earlier), (later.id, later)]
        self.query_one("#compare-head", Drawing).show(lambda width, height: head)
        self.query_one("#compare-scores", Drawing).show(
            lambda width, height: scores_of_two(rows, width)
        )
        self._compare(earlier.id, later.id)

    @work(thread=True, exclusive=True, exit_on_error=False, group="compare")
    def _compare(self, earlier: str, later: str) -> None:
        difference = self.backend.difference_of_runs(earlier, later)
        try:
            comparisons, problem = self.backend.compare(earlier, later), ""
        except SynthAgentError as error:
            comparisons, problem = [], f"{error.title}: {error.message}"
        self.post_message(RunsCompared(comparisons, difference, problem))

    @on(RunsCompared)
    def _show_comparison(self, message: RunsCompared) -> None:
        changes = difference_content(message.difference)
        self.query_one("#compare-differences", Drawing).show(
            lambda width, height: comparison_words(
                message.comparisons, message.problem, width, self.backend.weights
            )
        )
        self.query_one("#compare-recipe", Drawing).show(lambda width, height: changes)


def scores_of_two(rows: list[tuple[str, Run]], width: int) -> Content:
    """Return the samples and the scores of two runs."""
    lines = [
        Content.styled(f"{clean(label)}: {counts}", "$foreground-muted")
        for label, run in rows
        if (counts := sample_counts(run.stages["process"]))
    ]
    names = benchmarks([run for _, run in rows])
    blocks = [forest(rows, name, width) for name in names]
    if lines:
        blocks.append(Content("\n").join(lines))
    return Content("\n\n").join(blocks) if blocks else Content("Neither run has a score.")


def comparison_words(
    comparisons: list[Comparison], problem: str, width: int, weights: Mapping[str, float]
) -> Content:
    """Return the differences, or why there are none."""
    if problem:
        return Content.styled(clean(problem), "$warning")
    if not comparisons:
        return Content.styled("No benchmark was answered by both runs.", "$foreground-muted")
    lines = [difference_block(comparison, width) for comparison in comparisons]
    return Content("\n").join([*lines, *weighted_lines(comparisons, weights, width)])
