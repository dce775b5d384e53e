"""Why a proposal is turned down. A reason is required: it teaches the planner and the readers."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static


class ReasonScreen(ModalScreen[str | None]):
    """Ask for the reason; None when the user goes back."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back", id="reason.back")]

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content.assemble(("Reject  ", "bold"), self._title))
            yield Input(placeholder="Reason, in a sentence", id="reason")
            yield Static("", id="reason-problem", markup=False)
            with Horizontal(classes="dialog-buttons"):
                yield Button(" Back  esc ", id="back")
                yield Button(" Reject  enter ", id="reject", variant="error")

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    @on(Input.Submitted)
    def _submit(self) -> None:
        reason = self.query_one(Input).value.strip()
        if reason:
            self.dismiss(reason)
        else:
            problem = Content.styled("A reason is needed: it is kept in the log.", "$error")
            self.query_one("#reason-problem", Static).update(problem)

    @on(Button.Pressed)
    def _press(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "reject":
            self._submit()
        else:
            self.dismiss(None)
