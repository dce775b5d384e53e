"""The standing wishes of the talk; choosing one takes it back."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from synth_agent.ui.text import clean


class WishesScreen(ModalScreen[str | None]):
    """Answer with the wish to take back, or None."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back", id="wishes.back")]

    def __init__(self, wishes: Sequence[str]) -> None:
        super().__init__()
        self._wishes = wishes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog choose-card"):
            yield Static(Content.styled("Wishes that hold for every proposal", "bold"))
            yield OptionList(*(Option(Content(clean(wish))) for wish in self._wishes))
            yield Static(Content.styled("enter takes it back, esc goes back", "$foreground-muted"))

    def on_mount(self) -> None:
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._wishes[event.option_index])
