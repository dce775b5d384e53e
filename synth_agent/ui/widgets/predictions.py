"""Predictions as intervals on one scale, each predictor beside the others. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from synth_agent.runs import Prediction
from synth_agent.ui.plots import Axis, axis_line, interval_line, nice_axis
from synth_agent.ui.text import clean, fit
from synth_agent.wording import benchmark_name

ZERO_MARK = "┊"
_CROSSED = "┼"
_NUMBERS = 23
"""Cells of ` +12.3 [-10.2, +14.1]` and its margin."""
_LEAST_PLOT = 12


def predictions_content(predictions: Sequence[Prediction], width: int) -> Content:
    """Return every prediction, by benchmark, over one axis; zero is marked.

    Args:
        predictions: Of whoever proposes and of the built-in model.
        width: Cells.
    """
    if not predictions:
        return Content.styled("Nobody predicted anything.", "$foreground-muted")
    ends = [end for one in predictions for end in (one.low, one.expected, one.high)]
    axis = nice_axis(ends, zero=True)
    label_width = min(max(len(one.by) for one in predictions), max(8, width // 4))
    plot_width = width - label_width - _NUMBERS - 1
    lines: list[Content] = []
    for benchmark in dict.fromkeys(one.benchmark for one in predictions):
        mine = [one for one in predictions if one.benchmark == benchmark]
        words = f"  {clean(expectation_words(mine))}"
        lines.append(Content.assemble((benchmark_name(benchmark), "bold"), words))
        lines += [_row(one, axis, label_width, plot_width) for one in mine]
    if plot_width >= _LEAST_PLOT:
        indent = " " * (label_width + 1)
        lines.append(Content.styled(indent + axis_line(axis, plot_width), "$foreground-muted"))
    note = f"80 % intervals; {ZERO_MARK} or {_CROSSED} is no difference"
    lines.append(Content.styled(fit(note, width).rstrip(), "$foreground-muted"))
    return Content("\n").join(lines)


def _row(one: Prediction, axis: Axis, label_width: int, plot_width: int) -> Content:
    plot = ""
    if plot_width >= _LEAST_PLOT:
        plot = interval_line(
            one.low, one.expected, one.high, axis=axis, width=plot_width, marks={0.0: ZERO_MARK}
        )
        zero = axis.position(0.0, plot_width)
        if plot[zero] == "─":
            plot = plot[:zero] + _CROSSED + plot[zero + 1 :]
    return Content.assemble(
        fit(clean(one.by), label_width),
        " ",
        (plot, "$primary"),
        (f" {one.expected:+5.1f}", "bold"),
        (f" [{one.low:+.1f}, {one.high:+.1f}]", "$foreground-muted"),
    )


def expectation_words(predictions: Sequence[Prediction]) -> str:
    """Return what the predictions of one benchmark come to, in a few words."""
    meanings = dict.fromkeys(_meaning(one) for one in predictions)
    if len(predictions) == 1:
        return next(iter(meanings))
    if len(meanings) == 1:
        return f"{'both' if len(predictions) == 2 else 'all'} expect {next(iter(meanings))}"
    return "they differ: " + ", ".join(meanings)


def _meaning(one: Prediction) -> str:
    if one.low > 0:
        return "a gain"
    if one.high < 0:
        return "a loss"
    if one.expected > 0:
        return "a gain, not surely"
    return "a loss, not surely" if one.expected < 0 else "no difference"
