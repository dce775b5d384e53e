"""Scores as text: intervals on a shared axis with the chance level, and differences in words.

Pure functions from runs to `Content`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from textual.content import Content

from synth_agent.runs import Comparison, Run, Score
from synth_agent.ui.plots import Axis, axis_line, interval_line, nice_axis
from synth_agent.ui.text import VERDICTS, clean, fit
from synth_agent.wording import basis_words, benchmark_name

CHANCE_MARK = "┊"
_NUMBERS = 21
"""Cells of ` 54.2 [50.2, 58.1]` and its margin."""
_LEAST_BASIS = 20
"""Cells below which a part of what an interval rests on says nothing."""


def forest(rows: Sequence[tuple[str, Run]], benchmark: str, width: int) -> Content:
    """Return one benchmark's scores of several runs, one line each, over one axis.

    Args:
        rows: Label and run; runs without this score are said to have none.
        benchmark: Which score.
        width: Cells.
    """
    scores = [run.scores[benchmark] for _, run in rows if benchmark in run.scores]
    if not scores:
        return Content.styled(f"{benchmark_name(benchmark)}: no score yet", "$foreground-muted")
    label_width = min(max(len(label) for label, _ in rows), max(8, width // 3))
    plot_width = width - label_width - _NUMBERS - 2
    axis = nice_axis([score.high for score in scores] + [scores[0].chance], zero=True)
    lines = [_heading(scores[0])]
    for label, run in rows:
        lines.append(_row(label, run.scores.get(benchmark), axis, label_width, plot_width))
    if plot_width >= 12:
        indent = " " * (label_width + 1)
        lines.append(Content.styled(indent + axis_line(axis, plot_width), "$foreground-muted"))
    return Content("\n").join(lines)


def _heading(score: Score) -> Content:
    return Content.assemble(
        (benchmark_name(score.benchmark), "bold"),
        (
            f"  {clean(score.metric)}, {score.num_questions:,} questions, "
            f"chance {score.chance:.1f} {CHANCE_MARK}",
            "$foreground-muted",
        ),
    )


def _row(label: str, score: Score | None, axis: Axis, label_width: int, plot_width: int) -> Content:
    name = fit(clean(label), label_width)
    if score is None:
        return Content.assemble(name, (" no score", "$foreground-muted"))
    plot = ""
    if plot_width >= 12:
        plot = interval_line(
            score.low,
            score.percent,
            score.high,
            axis=axis,
            width=plot_width,
            marks={score.chance: CHANCE_MARK},
        )
    return Content.assemble(
        name,
        " ",
        (plot, "$primary"),
        (f" {score.percent:5.1f}", "bold"),
        (f" [{score.low:4.1f}, {score.high:4.1f}]", "$foreground-muted"),
    )


def difference_line(comparison: Comparison, width: int) -> Content:
    """Return a difference with its interval and verdict in one line."""
    sign = VERDICTS[comparison.verdict]
    figure = Content.assemble(
        f"{fit(benchmark_name(comparison.benchmark), 9)}",
        (f"{comparison.difference:+5.1f} points", "bold"),
        (f" [{comparison.low:+.1f}, {comparison.high:+.1f}]  ", "$foreground-muted"),
        (sign.text, f"bold ${sign.style}"),
    )
    room = width - figure.cell_length
    if room < _LEAST_BASIS:
        return figure
    return Content.assemble(figure, (_whole_parts(_basis(comparison), room), "$foreground-muted"))


def _whole_parts(text: str, room: int) -> str:
    """Return as much of a list of facts as fits, none of them cut in the middle."""
    parts = text.split(", ")
    fitting = [", ".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((one for one in reversed(fitting) if cell_len(one) <= room), "")


def _basis(comparison: Comparison) -> str:
    """Return what an interval rests on, the most telling first, since a line leaves off the rest."""
    if not comparison.basis or comparison.expected is None or comparison.seed_sd is None:
        return f"  {comparison.num_questions:,} questions, 95 % paired interval"
    assumed = " assumed" if comparison.assumed else ""
    return (
        f"  expect {comparison.expected:+.1f}, seeds {comparison.seeds}:{comparison.parent_seeds}, "
        f"seed spread {comparison.seed_sd:.1f}{assumed}, try {comparison.tries}, "
        f"{comparison.num_questions:,} questions"
    )


def difference_block(comparison: Comparison, width: int) -> Content:
    """Return a difference in one line, and below it what to expect and what the interval rests on."""
    lines = [difference_line(comparison, width)]
    if comparison.basis and comparison.expected is not None:
        basis, power = clean(comparison.basis), clean(comparison.power)
        words = basis_words(comparison.difference, comparison.expected, basis, power)
        lines += _wrapped(words, width)
    return Content("\n").join(lines)


def weighted_lines(
    comparisons: Sequence[Comparison], weights: Mapping[str, float], width: int
) -> list[Content]:
    """Return the difference in the user's weighting and what it is made of; none without weights."""
    from synth_agent.weighting import (
        weigh,  # here: numpy, which an app without weights need not load
    )

    weighted = weigh(comparisons, weights)
    if weighted is None:
        return []
    lines = _wrapped(weighted.words(), width)
    if (one := weighted.judgement) is not None:
        sign = VERDICTS[one.outcome]
        figure = Content.assemble(
            fit("Weighted", 9),
            (f"{one.points:+5.1f} points", "bold"),
            (f" [{one.low:+.1f}, {one.high:+.1f}]  ", "$foreground-muted"),
            (sign.text, f"bold ${sign.style}"),
        )
        lines = [figure, *lines]
    return lines


def _wrapped(words: str, width: int) -> list[Content]:
    lines = Content(words).wrap(max(10, width - 2))
    return [Content.assemble("  ", line).stylize("$foreground-muted") for line in lines]


def benchmarks(runs: Sequence[Run]) -> list[str]:
    """Return the benchmarks that the runs have scores of, in order of first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def verdict_words(run: Run) -> Content:
    """Return what a finished run means, in a sentence."""
    if run.verdict is None:
        return Content("")
    sign = VERDICTS[run.verdict]
    covered = (
        "what questions, seeds and the number of tries explain."
        if all(comparison.basis for comparison in run.comparisons.values())
        else "the choice of questions; another seed may differ."
    )
    meaning = {
        "baseline": "Later runs are compared with this one.",
        "better": f"A gain beyond {covered}",
        "worse": f"A loss beyond {covered}",
        "inside noise": "The difference is no larger than chance explains: no change was shown.",
        "mixed": "One benchmark gained and another lost.",
        "failed": "The run did not reach a score.",
    }[run.verdict]
    return Content.assemble(
        ("Verdict  ", "$foreground-muted"), (sign.text, f"bold ${sign.style}"), f"  {meaning}"
    )
