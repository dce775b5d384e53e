"""Curves, intervals and bars as text."""

from __future__ import annotations

import math

import pytest

from synth_agent.ui.plots import Axis, axis_line, bar, interval_line, line_chart, nice_axis, number


def dots(rows: list[str]) -> list[tuple[int, int]]:
    """Return (column, row) of each braille dot of a chart's body."""
    found = []
    order = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
    for line, row in enumerate(rows):
        for cell, character in enumerate(row):
            bits = ord(character) - 0x2800
            if 0 <= bits < 256:
                for bit, (dx, dy) in enumerate(order):
                    if bits >> bit & 1:
                        found.append((2 * cell + dx, 4 * line + dy))
    return found


def test_a_falling_line_goes_from_the_top_left_to_the_bottom_right() -> None:
    chart = line_chart([(1, 4.0), (2, 2.0), (3, 0.0)], 40, 9)
    body = [row.partition("┤")[2] or row.partition("│")[2] for row in chart[:-1]]
    marked = dots(body)
    columns = max(len(row) for row in body)
    assert min(marked) == (0, 0)
    assert max(marked) == (2 * columns - 1, 4 * len(body) - 1)
    rows_by_column = [row for _, row in sorted(marked)]
    assert rows_by_column == sorted(rows_by_column)


def test_the_axes_carry_the_ends_as_numbers() -> None:
    chart = line_chart([(10, 1.0), (200, 4.0)], 50, 8)
    assert chart[0].lstrip().startswith("4.0 ┤")
    assert chart[-2].lstrip().startswith("1.0 ┤")
    assert chart[-1].split() == ["10", "200"]
    assert len(chart) == 8
    assert all(len(row) <= 50 for row in chart)


def test_values_that_are_not_numbers_are_left_out() -> None:
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]
    assert line_chart(points, 40, 6) == line_chart([(1, 2.0), (4, 1.0)], 40, 6)


@pytest.mark.parametrize("size", [(0, 0), (15, 10), (40, 2), (-3, 5)])
def test_no_room_gives_no_chart(size: tuple[int, int]) -> None:
    assert line_chart([(1, 1.0), (2, 2.0)], *size) == []


def test_no_point_gives_no_chart_and_one_point_gives_one() -> None:
    assert line_chart([], 40, 10) == []
    assert len(line_chart([(5, 1.0)], 40, 10)) == 10


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0.8, 3.97], 0.5, 4.0), ([34.2, 64.1], 30.0, 65.0), ([5.0, 5.0], 4.5, 5.5), ([], 0.0, 1.0)],
)
def test_axis_ends_are_round_and_hold_the_values(
    values: list[float], low: float, high: float
) -> None:
    axis = nice_axis(values)
    assert (axis.low, axis.high) == pytest.approx((low, high))


def test_an_interval_is_drawn_where_its_numbers_are() -> None:
    line = interval_line(40, 50, 60, axis=Axis(0, 100), width=101, marks={25: "┊"})
    assert line.index("├") == 40
    assert line.index("●") == 50
    assert line.index("┤") == 60
    assert line.index("┊") == 25
    assert len(line) == 101


def test_an_interval_never_hides_its_estimate() -> None:
    line = interval_line(50, 50, 50, axis=Axis(0, 100), width=20, marks={50: "┊"})
    assert line.count("●") == 1


@pytest.mark.parametrize("width", range(12))
def test_small_widths_are_kept(width: int) -> None:
    assert len(interval_line(1, 2, 3, axis=Axis(0, 4), width=width)) == width
    assert len(axis_line(Axis(0, 100), width)) <= max(width, 4)
    assert len(bar(0.5, width)) == width


def test_a_bar_clips_shares_outside_its_range() -> None:
    assert bar(-1, 4) == "────"
    assert bar(0.5, 4) == "━━──"
    assert bar(7, 4) == "━━━━"


def test_a_long_curve_keeps_its_ends() -> None:
    chart = line_chart([(step, 1.0 + 3.0 * (step == 99_999)) for step in range(100_000)], 60, 8)
    assert chart[-1].split() == ["0", "99999"]
    assert chart[0][-1] != " "


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_a_label_too(value: float) -> None:
    assert number(value) == "-"
