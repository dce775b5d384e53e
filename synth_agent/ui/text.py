"""Foreign text made safe to show, and the words and glyphs of states.

Text from data, logs and models may hold terminal escapes, markup and invisible direction marks.
`clean` makes them visible or drops them; what it returns is only ever put into `Content` or
`Text`, which interpret no markup. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # operating system command, such as a link
    r"|\x1b[PX^_][^\x1b]*\x1b\\"  # device control and other strings
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]"  # colours, cursor movement
)
_INVISIBLE = frozenset("\u200b\u200e\u200f\u2028\u2029\u2060\ufeff")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sign:
    """How a state is shown: a glyph and a word, so that colour never stands alone."""

    glyph: str
    word: str
    style: str
    """Name of a theme colour without its `$`."""

    @property
    def text(self) -> str:
        return f"{self.glyph} {self.word}"


STATES = {
    "approved": Sign("◌", "approved", "foreground-muted"),
    "running": Sign("▶", "running", "accent"),
    "interrupted": Sign("‖", "interrupted", "warning"),
    "succeeded": Sign("✓", "done", "success"),
    "failed": Sign("✗", "failed", "error"),
    "cancelled": Sign("■", "cancelled", "warning"),
    "rejected": Sign("⊘", "rejected", "foreground-muted"),
    "waiting": Sign("·", "waiting", "foreground-muted"),
    "reused": Sign("↺", "reused", "success"),
}

VERDICTS = {
    "baseline": Sign("○", "baseline", "foreground-muted"),
    "better": Sign("▲", "better", "success"),
    "worse": Sign("▼", "worse", "error"),
    "inside noise": Sign("≈", "inside noise", "foreground-muted"),
    "mixed": Sign("◆", "mixed", "warning"),
    "failed": Sign("✗", "failed", "error"),
}


def clean(text: object, *, lines: bool = False) -> str:
    """Return text without control characters, escape sequences or direction overrides.

    Args:
        text: Anything; it is turned into a string.
        lines: Keep line ends. Otherwise they become spaces.
    """
    plain = _ESCAPE_SEQUENCE.sub("", str(text)).expandtabs(4)
    plain = plain.replace("\r\n", "\n")
    return "".join(_visible(character, lines) for character in plain)


def _visible(character: str, lines: bool) -> str:
    if character == "\n":
        return "\n" if lines else " "
    if character in _INVISIBLE:
        return _REPLACEMENT
    category = unicodedata.category(character)
    if category in ("Cc", "Cs") or (category == "Cf" and character != "\u200d"):
        return _REPLACEMENT
    return character


def last_return(line: str) -> str:
    """Return what a terminal would show of a line that carriage returns overwrite."""
    return line.rstrip("\r").rpartition("\r")[2]


def fit(text: str, width: int) -> str:
    """Return text cut or padded to a number of terminal cells; a cut ends in an ellipsis."""
    if width <= 0:
        return ""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


def shorten(text: str, width: int) -> str:
    """Return text cut to a number of terminal cells, without padding."""
    return text if cell_len(text) <= width else fit(text, width)


def clock(time: str | None) -> str:
    """Return an ISO time as `11-21 03:28`, or a dash."""
    return time[5:16].replace("T", " ") if time else "–"
