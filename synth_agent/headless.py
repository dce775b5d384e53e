"""Following a run line by line, and showing results as text. Data to stdout, narration to stderr.

The same facts as the app shows, for terminals without one, for logs and for scripts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from synth_agent import pipeline
from synth_agent.runs import STAGES, Event, EventTail, Run, Score
from synth_agent.summary import memory_sentences
from synth_agent.weighting import weigh
from synth_agent.wording import basis_words, benchmark_name, duration
from synth_agent.workspace import Workspace

POLL_SECONDS = 0.2
QUIET_SECONDS = 5.0
"""At most one progress line of a stage in this time."""
_ENDED = ("succeeded", "failed", "cancelled", "interrupted")


def narrate(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)


def tell_refused(workspace: Workspace) -> None:
    """Say so where git refused commits of the log, and why."""
    from synth_agent import journal

    if words := journal.refusal(workspace):
        narrate(f"! {words}")


def follow(workspace: Workspace, run_id: str, *, since: str = "") -> Run:
    """Print a run's events as they come until it ends, and return it as it then is.

    Args:
        workspace: The workspace.
        run_id: The run.
        since: Time in ISO format; earlier events are not printed.
    """
    last_line: dict[str, float] = {}
    for event in _events_until_end(workspace, run_id):
        line = describe(event)
        if line is None or event.time < since:
            continue
        if event.kind == "progress":
            key = f"{event.fields['stage']}/{event.fields.get('label', '')}"
            finished = event.fields["step"] == event.fields["total"]
            if not finished and time.monotonic() - last_line.get(key, 0.0) < QUIET_SECONDS:
                continue
            last_line[key] = time.monotonic()
        narrate(line)
    run = pipeline.load_run(workspace, run_id)
    if run.status == "approved":
        log = workspace.logs(run_id) / "worker.log"
        why = f" ({log})" if log.is_file() else ""
        narrate(f"{run_id} was not started{why}: start it with: synth-agent resume {run_id}")
    return run


def _events_until_end(workspace: Workspace, run_id: str) -> Iterator[Event]:
    tail = EventTail(workspace.run(run_id).events)
    while True:
        is_live = pipeline.live_run(workspace) == run_id
        status = pipeline.load_run(workspace, run_id).status
        # Nobody started it, or its worker ended before it could write an event.
        ended = status in _ENDED or (status == "approved" and not is_live)
        yield from tail.read()
        if ended:
            return
        time.sleep(POLL_SECONDS)


def describe(event: Event) -> str | None:
    """Return an event as one line, or None when it has nothing to say."""
    describer = _DESCRIBERS.get(event.kind)
    return describer(event.fields) if describer is not None else None


def _stage_started(fields: Mapping[str, Any]) -> str:
    return f"  {fields['stage']:<9} started"


def _stage_reused(fields: Mapping[str, Any]) -> str:
    return f"  {fields['stage']:<9} reused {fields.get('output') or ''}"


def _progress(fields: Mapping[str, Any]) -> str:
    total = fields.get("total") or 0
    count = f"{fields['step']}/{total}" if total else str(fields["step"])
    parts = [f"  {fields['stage']:<9}", fields.get("label") or "", count, fields["unit"]]
    for name, text in (("loss", "loss {:.3f}"), ("lr", "lr {:.2e}")):
        if fields.get(name) is not None:
            parts.append(text.format(fields[name]))
    if fields.get("samples_per_second"):
        parts.append(f"{fields['samples_per_second']:.1f}/s")
    if fields.get("eta_seconds") is not None:
        parts.append(f"ETA {duration(fields['eta_seconds'])}")
    return " ".join(part for part in parts if part)


def _stage_finished(fields: Mapping[str, Any]) -> str:
    error = fields.get("error")
    tail = f": {error['title']}: {error['message']}" if error else ""
    return f"  {fields['stage']:<9} {fields['status']} in {duration(fields['seconds'])}{tail}"


def _note(fields: Mapping[str, Any]) -> str:
    return f"  note: {fields['text']}"


def _run_finished(fields: Mapping[str, Any]) -> str:
    verdict = f", verdict: {fields['verdict']}" if fields.get("verdict") else ""
    error = fields.get("error")
    text = f"  run {fields['status']}{verdict}"
    if error:
        text += f"\n  {error['title']}: {error['message']}"
        text += f"\n  what to do: {error['hint']}" if error.get("hint") else ""
    return text


_DESCRIBERS = {
    "stage_started": _stage_started,
    "stage_reused": _stage_reused,
    "progress": _progress,
    "stage_finished": _stage_finished,
    "note": _note,
    "run_finished": _run_finished,
}


def score_text(score: Score) -> str:
    """Return a score with its interval and chance level."""
    name = benchmark_name(score.benchmark)
    return (
        f"{name:<8} {score.percent:5.1f} % [{score.low:.1f}, {score.high:.1f}]  "
        f"chance {score.chance:.1f} %  {score.num_questions} questions  ({score.metric})"
    )


def run_text(run: Run, weights: Mapping[str, float]) -> str:
    """Return a run's samples, scores, comparison and verdict, and the user's weighting if any."""
    result = run.stages["process"].result
    lines = [f"{run.id}  {run.plan.proposal.title}"]
    if "kept" in result:
        lines.append(f"  samples  {result['kept']:,} of {result['seed_samples']:,}")
    lines += [f"  note     {sentence}" for sentence in memory_sentences(run)]
    lines += [f"  {score_text(score)}" for score in run.scores.values()]
    for comparison in run.comparisons.values():
        name = benchmark_name(comparison.benchmark)
        lines.append(
            f"  {name:<8} {comparison.difference:+5.1f} points "
            f"[{comparison.low:+.1f}, {comparison.high:+.1f}] against {comparison.parent}: "
            f"{comparison.verdict}"
        )
        c = comparison
        words = basis_words(c.difference, c.expected, c.basis, c.power)
        lines.append(f"  note     {words}")
    if (weighted := weigh(list(run.comparisons.values()), weights)) is not None:
        lines.append(f"  weighted {weighted.line()}")
    # A run of the data alone has no verdict, and its status is none.
    lines.append(f"  verdict  {run.verdict}" if run.verdict else f"  status   {run.status}")
    return "\n".join(lines)


def run_data(run: Run) -> dict[str, Any]:
    """Return a run as plain data, for `--json`."""
    return {
        "id": run.id,
        "status": run.status,
        "verdict": run.verdict,
        "title": run.plan.proposal.title,
        "recipe": run.plan.proposal.recipe["name"],
        "kind": run.plan.proposal.kind,
        "parent": run.plan.proposal.parent,
        "plan_sha256": run.plan.sha256,
        "stages": {
            name: {
                "status": run.stages[name].status,
                "seconds": run.stages[name].seconds,
                "result": dict(run.stages[name].result),
                "output": run.stages[name].output,
            }
            for name in STAGES
        },
        "scores": {name: asdict(score) for name, score in run.scores.items()},
        "comparisons": {name: asdict(value) for name, value in run.comparisons.items()},
        "error": dict(run.error) if run.error else None,
        "started": run.started,
        "finished": run.finished,
    }
