"""An error as a card: what happened, where, and what to do. The app goes on behind it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from synth_agent.ui.text import clean


class ErrorScreen(ModalScreen[None]):
    """Show an error's title, message and hint."""

    BINDINGS = [
        Binding("escape,enter", "dismiss", "Close", id="error.close"),
        Binding("y", "copy", "Copy", id="error.copy"),
    ]

    def __init__(self, title: str, message: str, hint: str) -> None:
        super().__init__()
        self._title = clean(title)
        self._message = clean(message, lines=True)
        self._hint = clean(hint, lines=True)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog error-card"):
            yield Static(Content.styled(f"✗ {self._title}", "bold $error"))
            with VerticalScroll(classes="dialog-text"):
                yield Static(self._message, markup=False)
                if self._hint:
                    hint = Content.assemble(("What to do  ", "$foreground-muted"), self._hint)
                    yield Static(hint, classes="hint")
            with Horizontal(classes="dialog-buttons"):
                yield Button(" Close  esc ", id="close", variant="primary")
                yield Button(" Copy  y ", id="copy")

    def on_mount(self) -> None:
        self.query_one("#close", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "copy":
            self.action_copy()
        else:
            self.dismiss()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(f"{self._title}\n{self._message}\n{self._hint}")
        self.notify("Copied.")
