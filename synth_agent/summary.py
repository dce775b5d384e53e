"""The pages that people read: `summary.md` of a run and the index `runs/README.md`.

Both are written from the event log alone and can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from synth_agent.runs import Run
from synth_agent.wording import BENCHMARK_NAMES, SEED_CAVEAT, benchmark_name
from synth_agent.workspace import Workspace


def write_summary(workspace: Workspace, run: Run) -> Path:
    """Write `summary.md` of a run and return its path."""
    proposal = run.plan.proposal
    lines = [f"# {run.id}: {run.verdict or run.status}", "", proposal.title, "", proposal.reason]
    result = run.stages["process"].result
    if "kept" in result:
        lines += ["", f"Samples: {result['kept']:,} of {result['seed_samples']:,}."]
    if run.message and not run.error:
        lines += ["", run.message]
    if run.error:
        lines += ["", f"{run.error['title']}: {run.error['message']}"]
    if run.scores:
        lines += ["", "| benchmark | score | 95 % interval | chance | questions |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {benchmark_name(name)} | {s.percent:.2f} | {s.low:.2f} to {s.high:.2f} "
            f"| {s.chance:.2f} | {s.num_questions} |"
            for name, s in run.scores.items()
        ]
    for name, c in run.comparisons.items():
        lines += [
            "",
            f"{benchmark_name(name)} against {c.parent}: {c.difference:+.2f} points, "
            f"95 % interval {c.low:+.2f} to {c.high:+.2f}: {c.verdict}.",
        ]
    if run.comparisons:
        lines += ["", SEED_CAVEAT]
    path = workspace.run(run.id).summary
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_index(workspace: Workspace, runs: Sequence[Run]) -> Path:
    """Write `runs/README.md` of all runs, newest first, and return its path."""
    lines = ["# Runs", "", "| run | title | verdict | TextVQA | MMBench |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for run in sorted(runs, key=lambda run: run.id, reverse=True):
        scores = [
            f"{run.scores[name].percent:.2f}" if name in run.scores else ""
            for name in BENCHMARK_NAMES
        ]
        title = run.plan.proposal.title.replace("|", "\\|")
        cells = [f"[{run.id}]({run.id}/)", title, run.verdict or run.status, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    path = workspace.runs / "README.md"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
