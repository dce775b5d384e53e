"""The history at a glance: best against baseline, recent runs, the live run, what happened last.

Pure functions from a notebook to `Content`.
"""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content

from synth_agent.runs import Rejection, Run
from synth_agent.ui.backend import Notebook
from synth_agent.ui.text import STATES, VERDICTS, clean, clock, fit, shorten
from synth_agent.ui.widgets.scoreboard import benchmarks, difference_line, forest, weighted_lines
from synth_agent.ui.widgets.stages import current_stage, progress_words
from synth_agent.wording import benchmark_name

_RECENT = 6


def goal_content(goal: str, notebook: Notebook) -> Content:
    """Return the goal, and warnings: commits that git refuses, runs that cannot be read."""
    line = Content.assemble(("Goal  ", "$foreground-muted"), (clean(goal), "bold"))
    warnings = [f"! left out: {clean(problem)}" for problem in notebook.damaged]
    if notebook.pending_commits:
        refused = f"! git refused {notebook.pending_commits} commit(s) of the log"
        warnings.append(f"{refused}; they are made later.")
    return Content("\n").join([line, *(Content.styled(words, "$warning") for words in warnings)])


def finished_runs(notebook: Notebook) -> list[Run]:
    """Return the runs with scores, oldest first."""
    return [run for run in notebook.runs if run.status == "succeeded" and run.scores]


def baseline_run(notebook: Notebook, recipe: str) -> Run | None:
    """Return the latest finished baseline that a run was compared with, or else the latest.

    A baseline that is repeated with another seed has no run beside it yet.
    """
    finished = finished_runs(notebook)
    found = [run for run in finished if run.plan.proposal.recipe.get("name") == recipe]
    parents = {run.plan.proposal.parent for run in finished}
    compared = [run for run in found if run.id in parents]
    known = compared or found
    return known[-1] if known else None


def best_run(notebook: Notebook, baseline: Run | None, weights: Mapping[str, float]) -> Run | None:
    """Return the run with the highest mean score, as the user weighs it, of those with the baseline."""
    others = [
        run
        for run in finished_runs(notebook)
        if baseline is not None and run.plan.proposal.parent == baseline.id
    ]
    return max(others, key=lambda run: _mean_score(run, weights), default=None)


def _mean_score(run: Run, weights: Mapping[str, float]) -> float:
    shares = {name: weights.get(name, 0.0) if weights else 1.0 for name in run.scores}
    total = sum(shares.values())
    return (
        sum(share * run.scores[n].percent for n, share in shares.items()) / total if total else 0.0
    )


def scores_content(
    notebook: Notebook, baseline_name: str, width: int, weights: Mapping[str, float]
) -> Content:
    """Return the baseline and the best run per benchmark, and their difference in words."""
    baseline = baseline_run(notebook, baseline_name)
    if baseline is None:
        return Content.styled(
            "No score yet. The baseline comes first: every later run is compared with it.",
            "$foreground-muted",
        )
    best = best_run(notebook, baseline, weights)
    rows = [(baseline.id, baseline)] + ([(best.id, best)] if best else [])
    blocks = [forest(rows, name, width) for name in benchmarks([run for _, run in rows])]
    if best is None:
        blocks.append(Content.styled("No other run was compared with it yet.", "$foreground-muted"))
    else:
        lines = [difference_line(comparison, width) for comparison in best.comparisons.values()]
        count = sum(1 for r in finished_runs(notebook) if r.plan.proposal.parent == baseline.id)
        by = "your weighting" if weights else "the mean score"
        caution = f"Best of {count} by {by}: the highest of several runs is lucky in part."
        lines += weighted_lines(list(best.comparisons.values()), weights, width)
        lines += [Content.styled(caution, "$foreground-muted")] if count > 1 else []
        blocks.append(Content("\n").join(lines))
    return Content("\n\n").join(blocks)


def recent_content(notebook: Notebook, width: int) -> Content:
    """Return the newest runs, one line each, newest first."""
    if not notebook.runs:
        return Content.styled("No runs yet.", "$foreground-muted")
    return Content("\n").join(_run_line(run, width) for run in notebook.runs[: -_RECENT - 1 : -1])


def _run_line(run: Run, width: int) -> Content:
    state = VERDICTS[run.verdict] if run.verdict else STATES[run.status]
    scores = "  ".join(
        f"{benchmark_name(name)} {score.percent:.1f}" for name, score in run.scores.items()
    )
    name_width = max(8, min(28, width - 14 - len(scores) - 2))
    return Content.assemble(
        fit(clean(run.id), name_width),
        " ",
        (fit(state.text, 14), f"${state.style}"),
        (" " + scores, "$foreground-muted"),
    )


def live_content(notebook: Notebook, width: int) -> Content:
    """Return the live run's stage and progress, or that nothing runs."""
    run = notebook.run(notebook.live)
    if run is None:
        return Content.styled("Nothing is running.", "$foreground-muted")
    stage = run.stages[current_stage(run)]
    return Content.assemble(
        (shorten(clean(run.id), width), "bold"),
        "\n",
        (f"{STATES[stage.status].text} ", f"${STATES[stage.status].style}"),
        f"{stage.name}\n",
        progress_words(stage, width),
    )


def events_content(notebook: Notebook, width: int) -> Content:
    """Return what happened last, newest first."""
    happened: list[tuple[str, str]] = []
    for run in notebook.runs:
        happened += run_moments(run)
    happened += [(r.at, rejection_words(r)) for r in notebook.rejections]
    happened.sort(reverse=True)
    lines = [
        Content.assemble(
            (clock(time) + "  ", "$foreground-muted"), shorten(text, max(8, width - 13))
        )
        for time, text in happened[:_RECENT]
    ]
    if not lines:
        return Content.styled("Nothing has happened yet.", "$foreground-muted")
    return Content("\n").join(lines)


def run_moments(run: Run) -> list[tuple[str, str]]:
    """Return when the run was approved, started and finished, in words."""
    moments = [(run.plan.approved_at, f"{clean(run.id)} approved by {clean(run.plan.approver)}")]
    if run.started:
        moments.append((run.started, f"{clean(run.id)} started"))
    if run.finished:
        outcome = run.verdict or STATES[run.status].word
        moments.append((run.finished, f"{clean(run.id)} ended: {outcome}"))
    return moments


def rejection_words(rejection: Rejection) -> str:
    """Return a rejection in one line."""
    return f"rejected {clean(rejection.proposal.title)}: {clean(rejection.reason)}"
