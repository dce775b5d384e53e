"""Two or three proposals side by side. Choosing one shows it at the gate; nothing is approved here."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from synth_agent.runs import Prediction, Proposal
from synth_agent.ui.text import clean, fit
from synth_agent.ui.widgets.drawing import Draw, Drawing
from synth_agent.wording import benchmark_name, duration

_SIDE_BY_SIDE = 120
"""From this width on the proposals stand in columns."""


class AlternativesScreen(ModalScreen[Proposal | None]):
    """Answer with the proposal to look at, or None."""

    BINDINGS = [
        Binding("escape", "dismiss(None)", "Back", id="alternatives.back"),
        Binding("1", "choose(0)", "First", show=False, id="alternatives.first"),
        Binding("2", "choose(1)", "Second", show=False, id="alternatives.second"),
        Binding("3", "choose(2)", "Third", show=False, id="alternatives.third"),
    ]

    def __init__(self, proposals: Sequence[Proposal]) -> None:
        super().__init__()
        self._proposals = proposals

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog alternatives-card"):
            yield Static(Content.styled("Which one first?", "bold"))
            with VerticalScroll(id="alternatives-scroll"), Horizontal(id="alternatives-columns"):
                for number in range(len(self._proposals)):
                    with Vertical(classes="alternative panel"):
                        yield Drawing(id=f"alternative-{number}")
            with Horizontal(classes="dialog-buttons"):
                for number in range(len(self._proposals)):
                    yield Button(f" Look at {number + 1}  {number + 1} ", id=f"choose-{number}")
                yield Button(" Back  esc ", id="back")

    def on_mount(self) -> None:
        for number, proposal in enumerate(self._proposals):
            content = self._draw(number, proposal)
            self.query_one(f"#alternative-{number}", Drawing).show(content)
        self.query_one("#alternatives-scroll").focus()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < _SIDE_BY_SIDE, "-stacked")

    def _draw(self, number: int, proposal: Proposal) -> Draw:
        return lambda width, height: alternative_content(number + 1, proposal, width)

    def action_choose(self, number: int) -> None:
        if number < len(self._proposals):
            self.dismiss(self._proposals[number])

    @on(Button.Pressed)
    def _press(self, event: Button.Pressed) -> None:
        event.stop()
        name = str(event.button.id)
        if name == "back":
            self.dismiss(None)
        else:
            self.action_choose(int(name.removeprefix("choose-")))


def alternative_content(number: int, proposal: Proposal, width: int) -> Content:
    """Return what distinguishes a proposal from those beside it."""
    cost = proposal.cost
    samples = "unknown" if cost.expected_samples is None else f"about {cost.expected_samples:,}"
    facts = [
        ("kind", f"{proposal.kind}, recipe {clean(proposal.recipe['name'])}"),
        ("samples", samples),
        ("time", duration(cost.seconds)),
        *((benchmark_name(one.benchmark), _expected(one)) for one in proposal.predictions),
        ("from", clean(proposal.proposed_by)),
        ("sha256", proposal.sha256[:16]),
    ]
    lines = [Content.styled(f"{number}  {clean(proposal.title)}", "bold")]
    for name, text in facts:
        label = (fit(name, 9), "$foreground-muted")
        wrapped = Content(text).wrap(max(10, width - 9))
        lines += [Content.assemble(label if not n else " " * 9, w) for n, w in enumerate(wrapped)]
    reason = clean(proposal.hypothesis or proposal.reason)
    lines += [Content(""), *Content(reason).wrap(max(10, width))]
    return Content("\n").join(lines)


def _expected(one: Prediction) -> str:
    return f"{one.expected:+.1f} [{one.low:+.1f}, {one.high:+.1f}] {clean(one.by)}"
