"""What the command line prints stays text: no escape of a file name or a caption reaches the terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Controls but line breaks and tabs, marks that turn the direction, and halves of characters."""


def escaped(text: str) -> str:
    """Return a text with its controls spelled as JSON spells them."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape all that is printed inside."""
    with redirect_stdout(_Escaped(sys.stdout)), redirect_stderr(_Escaped(sys.stderr)):
        yield


class _Escaped(io.TextIOBase):
    """A stream before another one."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, text: str, /) -> int:
        self._target.write(escaped(text))
        return len(text)

    def flush(self) -> None:
        self._target.flush()

    def isatty(self) -> bool:
        return self._target.isatty()

    def fileno(self) -> int:
        return self._target.fileno()

    def writable(self) -> bool:
        return True
