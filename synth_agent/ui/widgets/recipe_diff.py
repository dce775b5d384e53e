"""A recipe's difference as signed and coloured lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.content import Content

from synth_agent.ui.text import clean

if TYPE_CHECKING:
    from synth_agent.recipes import DiffLine

_STYLES = {"+": "$success", "-": "$error"}


def difference_content(lines: Sequence[DiffLine]) -> Content:
    """Return the lines, each with its sign in front, or a word that nothing differs."""
    if not any(line.sign in _STYLES for line in lines):
        same = Content.styled("the recipes do the same", "$foreground-muted")
        return Content("\n").join([same, *(_line(line) for line in lines)])
    return Content("\n").join(_line(line) for line in lines)


def _line(line: DiffLine) -> Content:
    style = _STYLES.get(line.sign, "$foreground-muted")
    return Content.styled(f"{line.sign} {clean(line.text)}", style)
