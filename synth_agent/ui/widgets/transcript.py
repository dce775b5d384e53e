"""What was said in the talk with the planner, as text. Pure functions; no markup is interpreted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from textual.content import Content

from synth_agent.ui.talk import Said, Who
from synth_agent.ui.text import clean, fit

_LABELS: dict[Who, tuple[str, str, str]] = {
    "you": ("you", "bold $primary", "bold"),
    "planner": ("planner", "$accent", ""),
    "tools": ("looked at", "$foreground-muted", "$foreground-muted"),
    "note": ("note", "$foreground-muted", "$foreground-muted"),
    "proposal": ("proposal", "bold $accent", ""),
}
"""How each is called, the style of that, and the style of what was said."""
_INDENT = 11
_LONGEST_LINE = 110
"""Cells: longer lines are hard to read."""


def transcript_content(said: Sequence[Said], width: int) -> Content:
    """Return what was said, each with who said it beside its first line."""
    lines: list[Content] = []
    for number, one in enumerate(said):
        if number and one.who == "you":
            lines.append(Content(""))
        lines += said_lines(one, width)
    return Content("\n").join(lines)


def said_lines(said: Said, width: int) -> Iterator[Content]:
    """Yield the lines of one piece."""
    label, label_style, style = _LABELS[said.who]
    room = max(10, min(_LONGEST_LINE, width - _INDENT))
    is_first = True
    for paragraph in clean(said.text, lines=True).rstrip().split("\n"):
        for line in Content(paragraph).wrap(room) if paragraph.strip() else (Content(""),):
            name = fit(label if is_first else "", _INDENT)
            words = line.stylize(style) if style else line
            yield Content.assemble((name, label_style), words)
            is_first = False
