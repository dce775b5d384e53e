"""Numbers turned into lines of text: curves, intervals and bars. Pure functions, no colour.

Curves are drawn in braille dots (two by four a cell); intervals as `├──●──┤` on a shared axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LEVELS = "▁▂▃▄▅▆▇█"
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the dot in row y and column x of a braille cell."""


@dataclass(frozen=True)
class Axis:
    """A range of values on a number of cells. `high` is above `low`."""

    low: float
    high: float

    def position(self, value: float, cells: int) -> int:
        """Return the cell of a value, 0 to cells - 1; values outside fall on the ends."""
        share = (value - self.low) / (self.high - self.low)
        return min(cells - 1, max(0, round(share * (cells - 1))))


def nice_axis(values: Sequence[float], *, zero: bool = False) -> Axis:
    """Return an axis with round ends around values; it is never empty.

    Args:
        values: What has to fit; values that are not finite are left out.
        zero: Include zero.
    """
    finite = [value for value in values if math.isfinite(value)]
    if zero:
        finite.append(0.0)
    if not finite:
        return Axis(0.0, 1.0)
    low, high = min(finite), max(finite)
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    unit = 10.0 ** math.floor(math.log10(high - low))
    unit = next(unit * part for part in (0.1, 0.2, 0.5, 1.0) if (high - low) / (unit * part) <= 10)
    return Axis(math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit)


def number(value: float) -> str:
    """Return an axis label of at most six characters for everyday values, `-` for no number."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100_000 or size < 0.001:
        return f"{value:.0e}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if size < 10 else f"{value:.1f}"


def numbers(values: Sequence[float]) -> list[str]:
    """Return the labels of one axis, all with as many decimals as the one that needs most."""
    labels = [number(value) for value in values]
    if any("e" in label for label in labels):
        return labels
    decimals = max((len(label.rstrip("0").partition(".")[2]) for label in labels), default=0)
    return [f"{value:.{decimals}f}" if value else "0" for value in values]


def line_chart(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """Return a curve with numbered axes.

    Args:
        points: (x, y) in order of x; points that are not finite are left out.
        width: Cells of the whole chart, labels included.
        height: Lines of the whole chart, the x labels included.

    Returns:
        `height` lines, or none when there is no room (under 16 x 3) or no point.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points or width < 16 or height < 3:
        return []
    y_axis = nice_axis([y for _, y in points])
    x_axis = Axis(points[0][0], max(points[-1][0], points[0][0] + 1))
    labels = _y_labels(y_axis, height - 1)
    margin = max(len(label) for label in labels)
    columns = width - margin - 2
    canvas = _braille(_thinned(points, 4 * columns), x_axis, y_axis, columns, height - 1)
    body = [
        f"{label:>{margin}} {'┤' if label else '│'}{row}"
        for label, row in zip(labels, canvas, strict=True)
    ]
    left, right = number(x_axis.low), number(points[-1][0])
    gap = max(1, columns - len(left) - len(right))
    return [*body, " " * (margin + 2) + left + " " * gap + right]


def _thinned(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """Return every n-th point and the last, so that a long run is drawn in constant time."""
    stride = -(-len(points) // most)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _y_labels(axis: Axis, rows: int) -> list[str]:
    labels = [""] * rows
    at = [0, rows // 2, rows - 1] if rows >= 5 else [0, rows - 1]
    values = [axis.high - (axis.high - axis.low) * row / max(1, rows - 1) for row in at]
    for row, label in zip(at, numbers(values), strict=True):
        labels[row] = label
    return labels


def _braille(
    points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, columns: int, rows: int
) -> list[str]:
    bits = [[0] * columns for _ in range(rows)]
    previous: tuple[int, int] | None = None
    for x, y in points:
        dot = (
            x_axis.position(x, columns * 2),
            rows * 4 - 1 - y_axis.position(y, rows * 4),
        )
        for column, row in _segment(previous or dot, dot):
            bits[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        previous = dot
    return ["".join(chr(_BRAILLE + cell) if cell else " " for cell in row) for row in bits]


def _segment(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of the straight line between two dots, both included."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]


def interval_line(
    low: float,
    value: float,
    high: float,
    *,
    axis: Axis,
    width: int,
    marks: Mapping[float, str] | None = None,
) -> str:
    """Return an interval on an axis: `┊   ├──●──┤  `.

    Args:
        low: Lower end.
        value: The estimate.
        high: Upper end.
        axis: Values at the first and the last cell.
        width: Cells.
        marks: Reference values, such as the chance level, and the character that shows each.
    """
    if width < 3:
        return " " * max(0, width)
    cells = [" "] * width
    for mark, character in (marks or {}).items():
        cells[axis.position(mark, width)] = character
    start, end = axis.position(low, width), axis.position(high, width)
    for cell in range(start, end + 1):
        cells[cell] = "─"
    cells[start], cells[end] = "├", "┤"
    cells[axis.position(value, width)] = "●"
    return "".join(cells)


def axis_line(axis: Axis, width: int) -> str:
    """Return the axis's ends and middle as numbers, in `width` cells."""
    left, middle, right = numbers([axis.low, (axis.low + axis.high) / 2, axis.high])
    if width < len(left) + len(middle) + len(right) + 4:
        return left.ljust(max(0, width - len(right))) + right if width >= 3 else ""
    cells = list(left.ljust(width - len(right)) + right)
    start = (width - len(middle)) // 2
    cells[start : start + len(middle)] = middle
    return "".join(cells)


def sparkline(counts: Sequence[int]) -> str:
    """Return a histogram one line high; a bin that holds anything is never blank."""
    most = max(counts, default=0)
    if most == 0:
        return " " * len(counts)
    levels = (math.ceil(count / most * len(_LEVELS)) for count in counts)
    return "".join(_LEVELS[level - 1] if level else " " for level in levels)


def bar(share: float, width: int) -> str:
    """Return a progress bar; `share` outside 0 to 1 is clipped."""
    if width <= 0:
        return ""
    filled = round(min(1.0, max(0.0, share)) * width)
    return "━" * filled + "─" * (width - filled)
