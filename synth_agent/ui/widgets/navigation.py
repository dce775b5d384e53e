"""The line at the top: where one is, where one can go, and whether something runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from synth_agent.ui.text import clean, shorten
from synth_agent.ui.widgets.drawing import Drawing

PLACES = (
    ("home", "Home"),
    ("run", "Run"),
    ("results", "Results"),
    ("history", "History"),
    ("data", "Data"),
    ("planner", "Planner"),
)


class Place(Static):
    """The name of a screen; a click goes there."""

    @dataclass
    class Chosen(Message):
        """The user wants to go to a place."""

        place: str

    def __init__(self, place: str, label: str, *, is_here: bool) -> None:
        super().__init__(label, markup=False, classes="place -here" if is_here else "place")
        self.place = place

    def on_click(self) -> None:
        self.post_message(self.Chosen(self.place))


class NavigationBar(Horizontal):
    """Names of the screens, the workspace, and the live run."""

    def __init__(self, place: str, root: Path) -> None:
        super().__init__()
        self._place = place
        self._root = root

    def compose(self) -> ComposeResult:
        yield Static("synth-agent", classes="brand", markup=False)
        for key, (place, name) in enumerate(PLACES, start=1):
            yield Place(place, f"{key} {name}", is_here=place == self._place)
        yield Drawing(id="navigation-state")

    def on_mount(self) -> None:
        self.show_live(None)

    def show_live(self, run_id: str | None) -> None:
        """Show which run is live, or the workspace's name when none is."""
        words, style = clean(self._root.name), "$foreground-muted"
        if run_id is not None:
            words, style = f"▶ {clean(run_id)}", "$accent"

        def draw(width: int, height: int) -> Content:
            whole = f"{words} running" if run_id is not None else words
            shown = whole if cell_len(whole) <= width else shorten(words, width)
            return Content.styled(shown, style)

        self.query_one("#navigation-state", Drawing).show(draw)
