"""A block of text that is laid out anew for whatever size it gets."""

from __future__ import annotations

from collections.abc import Callable

from textual import events
from textual.content import Content
from textual.widgets import Static

Draw = Callable[[int, int], Content]
"""From cells and lines to text."""


class Drawing(Static):
    """Text drawn by a function of the room there is. No markup is interpreted."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__("", id=id, classes=classes, markup=False)
        self._draw: Draw | None = None

    def show(self, draw: Draw) -> None:
        """Draw with this function from here on."""
        self._draw = draw
        self._redraw()

    def on_resize(self, event: events.Resize) -> None:
        self._redraw()

    def _redraw(self) -> None:
        if self._draw is not None and self.content_size.width > 0:
            self.update(self._draw(self.content_size.width, self.content_size.height))
