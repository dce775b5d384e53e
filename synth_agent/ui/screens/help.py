"""The keys that work where the user is, from the same bindings that dispatch them."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from synth_agent.ui.text import fit


class HelpScreen(ModalScreen[None]):
    """List keys and what they do."""

    BINDINGS = [Binding("escape,question_mark,q", "dismiss", "Close", id="help.close")]

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog help-card"):
            yield Static(Content.styled("Keys here", "bold"))
            with VerticalScroll(classes="dialog-text"):
                lines = [
                    Content.assemble((fit(key, 12), "$accent"), description)
                    for key, description in self._keys
                ]
                yield Static(Content("\n").join(lines))
            yield Static(
                Content.styled(
                    "Everything is in the command palette too (ctrl+p). "
                    "tab moves the focus. esc closes.",
                    "$foreground-muted",
                )
            )

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()
