"""The pages that people read: `summary.md` of a run and the index `runs/README.md`.

Both are written from the event log, the summary's contamination from the run's processed data too, and
can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synth_agent.changes import read_changes
from synth_agent.data import without_markers
from synth_agent.errors import SynthAgentError
from synth_agent.runs import Run
from synth_agent.wording import BENCHMARK_NAMES, basis_words, benchmark_name
from synth_agent.workspace import Workspace


def write_summary(workspace: Workspace, run: Run) -> Path:
    """Write `summary.md` of a run and return its path."""
    proposal = run.plan.proposal
    lines = [f"# {run.id}: {run.verdict or run.status}", "", proposal.title, "", proposal.reason]
    result = run.stages["process"].result
    if "kept" in result:
        lines += ["", f"Samples: {result['kept']:,} of {result['seed_samples']:,}."]
        lines += _operator_lines(result.get("operators", ()))
        lines += _change_lines(workspace, run)
        lines += _contamination_lines(workspace, run)
    for sentence in memory_sentences(run):
        lines += ["", sentence]
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
            f"interval {c.low:+.2f} to {c.high:+.2f}: {c.verdict}. "
            + basis_words(c.difference, c.expected, c.basis, c.power),
        ]
    path = workspace.run(run.id).summary
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def memory_sentences(run: Run) -> list[str]:
    """Return a sentence for each training that ran out of memory: when, and how it went on."""
    sentences = []
    for name, stage in run.stages.items():
        times = stage.result.get("out_of_memory", ())
        told = "; ".join(f"at step {one['step']}, going on with {one['then']}" for one in times)
        if told:
            sentences.append(f"Stage {name} ran out of memory {told}; its batch stayed the same.")
    return sentences


def _operator_lines(operators: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of what each operator was given and left."""
    if not operators:
        return []
    has_branches = any("branch" in operator for operator in operators)
    header = ["operator", "samples before", "after", "dropped", "seconds"]
    header = ["branch", *header] if has_branches else header
    lines = ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for operator in operators:
        before, after = operator["before"], operator["after"]
        cells = [
            operator["name"],
            f"{before:,}",
            f"{after:,}",
            f"{max(0, before - after):,}",
            f"{operator['seconds']:.1f}",
        ]
        cells = [operator.get("branch", ""), *cells] if has_branches else cells
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _change_lines(workspace: Workspace, run: Run) -> list[str]:
    """Return some of the samples that each operator dropped or changed."""
    output = run.stages["process"].output
    told = read_changes(workspace.path(output)) if output else []
    lines = []
    for one in told:
        for change in one.changes:
            after = "dropped" if change.after is None else f"became {_quoted(change.after)}"
            lines.append(f"- {one.operator}: id {change.id}, {_quoted(change.before)} {after}")
    return ["", "Some samples that operators dropped or changed:", "", *lines] if lines else []


def _quoted(text: str) -> str:
    """Return a caption as one line of Markdown code, its markers and its end left out if long."""
    words = without_markers(text).replace("`", "'")
    return f"`{words if len(words) <= 120 else words[:119] + '…'}`"


def _contamination_lines(workspace: Workspace, run: Run) -> list[str]:
    """Return what the processed data shares with each evaluation set, or why it is not known."""
    # Arrow and DuckDB are loaded by no run that failed before its first stage ended.
    from synth_agent.analysis import open_table
    from synth_agent.contamination_report import MOST_UNKNOWN_PICTURES, run_overlaps
    from synth_agent.digests import Digests

    digests = Digests(workspace)
    try:
        table = open_table(workspace, digests)
        found = run_overlaps(workspace, run, table, digests, most_unknown=MOST_UNKNOWN_PICTURES)
    except SynthAgentError as error:
        return ["", f"Contamination: not computed. {error.title}: {error.message}"]
    finally:
        digests.save()
    return ["", "Contamination:", "", *(f"- {overlap.line()}" for overlap in found)]


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
