"""A screen as lines of text, from the picture that the app exports of it.

A picture holds each piece of text with the row and the cell where it stands. `lines_of` puts the pieces
back, so that a committed screen is read and compared as it looks: text, borders and their places.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from xml.etree import ElementTree

from rich.cells import cell_len

FOLDER = Path(__file__).parents[1] / "data" / "screens"
RENEW = "RENEW_SCREENS"
_SVG = "{http://www.w3.org/2000/svg}"
_CELL = 12.2
"""Width of a cell in the pictures."""
_LINE = re.compile(r"url\(#terminal-\d+-line-(\d+)\)")
_DIGEST = re.compile(r"[0-9a-f]{16,}")


def lines_of(svg: str, size: tuple[int, int]) -> list[str]:
    """Return the rows of a picture of an app of `size` columns and rows.

    Digests are written as zeros: they change with every setting that a run has.

    Raises:
        ValueError: If two pieces of text overlap, or one lies outside of the screen.
    """
    columns, height = size
    rows = [[" "] * columns for _ in range(height)]
    for piece in ElementTree.fromstring(svg).iter(f"{_SVG}text"):
        match = _LINE.fullmatch(piece.get("clip-path", ""))
        if match is None:
            continue
        text = (piece.text or "").rstrip("\n").replace("\xa0", " ")
        _put(rows, int(match[1]), round(float(piece.get("x", "0")) / _CELL), text)
    text = "\n".join("".join(row).rstrip() for row in rows)
    return _DIGEST.sub(lambda digest: "0" * len(digest[0]), text).split("\n")


def _put(rows: list[list[str]], row: int, column: int, text: str) -> None:
    for character in text:
        width = cell_len(character)
        if row >= len(rows) or column + width > len(rows[row]) or rows[row][column].strip():
            raise ValueError(f"{text!r} does not fit at row {row}, column {column}")
        rows[row][column] = character
        if width == 2:
            # A wide character takes the place of two; joined again, the row is as long as it looks.
            rows[row][column + 1] = ""
        column += width


def check_screen(name: str, lines: list[str]) -> None:
    """Compare a screen with the committed one; with RENEW_SCREENS=1 set, write it instead.

    Raises:
        AssertionError: If they differ, with the difference and how to renew.
    """
    path = FOLDER / f"{name}.txt"
    if os.environ.get(RENEW) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines != known:
        changes = difflib.unified_diff(
            known, lines, f"committed {name}", f"shown {name}", lineterm=""
        )
        told = "\n".join(changes)
        raise AssertionError(
            f"The screen {name} has changed:\n{told}\n"
            f"If it is meant to look so: {RENEW}=1 pytest tests/ui/test_screens.py, and look at the "
            f"files of tests/data/screens that changed."
        )
