"""Samples that each operator of a recipe keeps and drops, spread over its scores."""

from __future__ import annotations

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content

from synth_agent.ui.backend import Backend, OperatorExamples
from synth_agent.ui.messages import SamplesDrawn
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.text import clean, shorten
from synth_agent.ui.widgets.drawing import Drawing


class SamplesScreen(NotebookScreen):
    """What a recipe would do, seen on single samples."""

    PLACE = "data"
    BINDINGS = [Binding("escape", "leave", "Back", id="samples.back")]

    def __init__(self, backend: Backend, recipe: str) -> None:
        super().__init__(backend)
        self._recipe = recipe

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="samples"):
            yield Drawing(id="samples-words")

    def on_mount(self) -> None:
        self.query_one("#samples").focus()
        self._draw_samples()

    @work(thread=True, exclusive=True, exit_on_error=False, group="samples")
    def _draw_samples(self) -> None:
        self.post_message(SamplesDrawn(self.backend.examples(self._recipe)))

    @on(SamplesDrawn)
    def _show_samples(self, message: SamplesDrawn) -> None:
        self.query_one("#samples-words", Drawing).show(
            lambda width, height: samples_content(self._recipe, message.operators, width)
        )


def samples_content(recipe: str, operators: list[OperatorExamples], width: int) -> Content:
    """Return the samples of every operator, a line each."""
    lines = [Content.styled(f"What {clean(recipe)} keeps and drops", "bold")]
    if not operators:
        lines.append(
            Content.styled("The recipe has no operator: it keeps all.", "$foreground-muted")
        )
    for title, kept, dropped in operators:
        lines += [Content(""), Content.styled(clean(title), "$accent")]
        for word, style, found in (("keeps", "$success", kept), ("drops", "$error", dropped)):
            for text in found:
                line = shorten(clean(text), max(10, width - 9))
                lines.append(Content.assemble((f"  {word}  ", style), line))
    return Content("\n").join(lines)
