"""Drift of a recipe and correlations of the statistics as text. Pure functions."""

from __future__ import annotations

import math

from textual.content import Content

from synth_agent.overview import Relations
from synth_agent.ui.plots import bar, number
from synth_agent.ui.text import clean, shorten

_NAME = 26
_CELL = 4
_BAR = 10
_STRONG = 0.5
_MOST_PAIRS = 12


def relations_content(relations: Relations, width: int) -> Content:
    """Return a recipe's drift, and below it the correlations, for a width in cells.

    Where the matrix is too wide, the strongest pairs are listed in its place.
    """
    lines = [*_drift_lines(relations, width), Content("")]
    if _NAME + _CELL * (len(relations.names) + 1) <= width:
        lines.append(Content.styled("Rank correlation (Spearman), in hundredths", "bold"))
        lines += _matrix_lines(relations)
    else:
        lines.append(Content.styled("Strongest rank correlations (Spearman)", "bold"))
        lines += _pair_lines(relations)
    return Content("\n").join(lines)


def _drift_lines(relations: Relations, width: int) -> list[Content]:
    title = Content.styled(f"What {clean(relations.recipe)} keeps, against all", "bold")
    if relations.why:
        return [title, Content.styled(clean(relations.why), "$foreground-muted")]
    has_bars = width >= _NAME + 32 + _BAR + 2
    head = f"{'':<{_NAME}}{'median':>8}{'of all':>8}{'mean':>8}{'KS':>8}"
    lines = [title, Content.styled(head, "$foreground-muted")]
    for line in relations.drift:
        text = (
            f"{shorten(clean(line.name), _NAME - 1):<{_NAME}}{number(line.median):>8}"
            f"{number(line.whole_median):>8}{line.standardised_mean_difference:>+8.2f}"
            f"{line.kolmogorov_smirnov:>8.2f}"
        )
        lines.append(
            Content(text + (f"  {bar(line.kolmogorov_smirnov, _BAR)}" if has_bars else ""))
        )
    legend = "mean in standard deviations of all; KS: Kolmogorov-Smirnov distance"
    return [*lines, Content.styled(legend, "$foreground-muted")]


def _matrix_lines(relations: Relations) -> list[Content]:
    numbers = "".join(f"{position:>{_CELL}}" for position in range(1, len(relations.names) + 1))
    lines = [Content.styled(f"{'':<{_NAME + _CELL}}{numbers}", "$foreground-muted")]
    for position, (name, row) in enumerate(zip(relations.names, relations.spearman, strict=True)):
        cells = [
            (f"{_cell(value):>{_CELL}}", "$accent" if abs(value) >= _STRONG else "")
            for value in row[:position]
        ]
        label = f"{position + 1:>{_CELL - 1}} {shorten(clean(name), _NAME - 1):<{_NAME}}"
        lines.append(Content.assemble(label, *cells))
    return lines


def _pair_lines(relations: Relations) -> list[Content]:
    names = relations.names
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(relations.spearman)
        for j, value in enumerate(row[:i])
        if math.isfinite(value)
    ]
    strongest = sorted(pairs, key=lambda pair: -abs(pair[0]))[:_MOST_PAIRS]
    return [Content(f"{value:>+6.2f}  {clean(a)}, {clean(b)}") for value, a, b in strongest]


def _cell(value: float) -> str:
    """Return a correlation in hundredths."""
    return f"{100 * value:.0f}" if math.isfinite(value) else "-"
