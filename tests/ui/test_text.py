"""Text from outside: nothing of it may act on the terminal or be read as markup."""

from __future__ import annotations

import unicodedata

import pytest

from synth_agent.ui.text import clean, clock, fit, last_return, shorten
from tests.ui.notebook import HOSTILE


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]8;;http://evil\x07link\x1b]8;;\x07", "link"),
        ("\x1b]0;title\x1b\\after", "after"),
        ("a\x1bPpayload\x1b\\b", "ab"),
        ("a\nb", "a b"),
        ("tab\there", "tab here"),
        ("bell\x07", "bell\ufffd"),
        ("null\x00", "null\ufffd"),
        ("\u202etxt.exe", "\ufffdtxt.exe"),
        ("zero\u200bwidth", "zero\ufffdwidth"),
        ("路标 [bold]", "路标 [bold]"),
    ],
)
def test_what_would_act_is_shown_or_dropped(raw: str, shown: str) -> None:
    assert clean(raw) == shown


def test_no_control_character_is_left() -> None:
    everything = "".join(chr(code) for code in range(0x3000)) + HOSTILE
    left = [c for c in clean(everything) if unicodedata.category(c) in ("Cc", "Cs")]
    assert left == []


def test_lines_are_kept_where_asked() -> None:
    assert clean("a\r\nb\nc", lines=True) == "a\nb\nc"


def test_text_is_cut_by_cells_and_not_by_characters() -> None:
    assert fit("路标在左边", 6) == "路标… " or fit("路标在左边", 6) == "路标 …"
    assert shorten("short", 10) == "short"
    assert fit("abc", 5) == "abc  "
    assert fit("abc", 0) == ""


def test_a_progress_line_shows_its_last_state() -> None:
    assert last_return("1%\r50%\r100%\r") == "100%"


def test_a_missing_time_is_a_dash() -> None:
    assert clock(None) == "–"
    assert clock("2026-11-20T08:41:00.000+00:00") == "11-20 08:41"
