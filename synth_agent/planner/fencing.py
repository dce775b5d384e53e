"""Text that nobody of the project wrote, made safe to show to a language model and to a terminal.

Captions, file names, logs, notes and what a model once said may hold anything: instructions, the
control tokens of a model, terminal escapes, characters that turn the direction of a line or that
nobody sees. They are stripped, cut, escaped and put between `<untrusted>` and `</untrusted>`. Inside
there is no `<` and no `>`, so that no text can close its fence or spell a control token.
"""

from __future__ import annotations

import math
import re

import regex

OPENING, CLOSING = "<untrusted>", "</untrusted>"
MOST_CHARACTERS = 300

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]{0,2000}(?:\x07|\x1b\\)|\x1b[P^_X][^\x1b]{0,2000}\x1b\\"
)
_HIDDEN = regex.compile(
    r"[[\p{C}\u2028\u2029\ufe00-\ufe0f\U000e0100-\U000e01ef]--[\n\t]]+", regex.V1
)
"""Control, format, surrogate, private and unassigned characters, and variation selectors."""
_ANGLES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    | dict.fromkeys("\uff1c\ufe64", "&lt;")
    | dict.fromkeys("\uff1e\ufe65", "&gt;")
)
_WORD_CHARACTERS = re.compile(r"[A-Za-z\s_]")


def visible(text: str, *, lines: bool = False) -> str:
    """Return a text without terminal escapes, control, direction and invisible characters.

    Args:
        text: Any text.
        lines: Keep line breaks and tabs; otherwise every run of spaces becomes one space.
    """
    shown = _HIDDEN.sub("", _ESCAPES.sub("", text))
    return shown if lines else " ".join(shown.split())


def cut(text: str, most: int) -> str:
    """Return at most so many characters of a text, with an ellipsis where something is missing."""
    return text if len(text) <= most else f"{text[: max(0, most - 1)].rstrip()}…"


def untrusted(text: object, most: int = MOST_CHARACTERS) -> str:
    """Return a text of unknown origin between fences, on one line.

    Args:
        text: What was read; no more than a few times `most` characters of it are looked at.
        most: Characters that are shown before escaping.
    """
    escaped = cut(visible(str(text)[: 4 * most]), most).translate(_ANGLES)
    return f"{OPENING}{escaped}{CLOSING}"


def estimated_tokens(text: str) -> int:
    """Return an upper estimate of a text's tokens under any common tokenizer.

    Letters, spaces and underscores count a third; digits, signs and everything outside ASCII count
    one each, since tokenizers split numbers into digits and rare characters into pieces.
    """
    words = len(_WORD_CHARACTERS.findall(text))
    return len(text) - words + math.ceil(words / 3)
