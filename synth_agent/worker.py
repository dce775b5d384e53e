"""The worker of one run: runs its stages, writes its events, judges it and commits it.

    python -m synth_agent.worker RUN_ID [--workspace DIR]

It holds the workspace's lock for its life and is the only writer of the run's event log. SIGTERM
only sets a flag; the loop passes it on to the stage. Exit codes: 0 the run ended in a stated
status, whatever it is; others are those of `errors`.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from synth_agent import __version__, journal
from synth_agent.digests import Digests
from synth_agent.errors import EXIT_OK, Busy, InvalidInput, SynthAgentError
from synth_agent.gate import changed_under, check_approval
from synth_agent.pipeline import (
    gpu_seconds_of,
    is_cap_reached,
    last_lines,
    load_approved,
    load_run,
    question_scores,
    read_events,
)
from synth_agent.referee import interval, overall
from synth_agent.runs import GPU_STAGES, EventLog, Plan, Run, Score, Verdict, now
from synth_agent.stage_plan import BUILDERS, Context, Stage, StageBuilder
from synth_agent.summary import write_index, write_summary
from synth_agent.verdicts import compare_runs
from synth_agent.workspace import Workspace, open_workspace, stage_environment

GRACE_SECONDS = 40.0
"""A launcher of several ranks may give them 30 s, so a stage gets longer."""
_POLL_SECONDS = 0.1
_FORWARD_SECONDS = 0.25


class StageFailed(SynthAgentError):
    """A stage ended without its outputs."""


class Cancelled(Exception):
    """The run was asked to stop; the text says by what."""


class CancelFlag:
    """Set by SIGTERM or SIGINT, or when the run's GPU-hours are used up; read by the stage loop."""

    def __init__(self) -> None:
        self.requested = False
        self.reason = "stopped on request"
        self._gpu_hours: float | None = None
        self._spent = 0.0
        self._since: float | None = None

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.requested = True

    def limit(self, gpu_hours: float | None, spent: float) -> None:
        """Set the cap, in hours, and the seconds that count against it already."""
        self._gpu_hours, self._spent = gpu_hours, spent

    def start(self, stage: str) -> None:
        """Count the time from here on if it is a stage that counts."""
        self._since = time.monotonic() if stage in GPU_STAGES else None
        self.look()

    def end(self) -> None:
        """Count no longer."""
        if self._since is not None:
            self._spent += time.monotonic() - self._since
        self._since = None

    def look(self) -> bool:
        """Return whether to stop."""
        if self._gpu_hours is not None and self._since is not None and not self.requested:
            spent = self._spent + time.monotonic() - self._since
            if is_cap_reached(self._gpu_hours, spent):
                self.requested = True
                self.reason = f"stopped by its limit of {self._gpu_hours:g} GPU-hours"
        return self.requested


class ProgressTail:
    """Forward a stage's progress to the event log, at most four times a second."""

    def __init__(self, path: Path, stage: str, events: EventLog) -> None:
        self._path, self._stage, self._events = path, stage, events
        self._offset = path.stat().st_size if path.exists() else 0
        self._first: tuple[float, int] | None = None
        self._last: dict[str, Any] | None = None
        self._sent = 0.0
        self._step, self._label = 0, None
        self.error: dict[str, str] | None = None

    def forward(self, *, final: bool = False) -> None:
        """Read the new lines and write at most one event; the final call writes what is left."""
        if self._path.exists():
            with self._path.open("rb") as source:
                source.seek(self._offset)
                data = source.read()
            end = data.rfind(b"\n") + 1
            self._offset += end
            for line in data[:end].splitlines():
                self._take(line)
        if self._last is not None and (final or time.monotonic() - self._sent > _FORWARD_SECONDS):
            self._events.append("progress", stage=self._stage, **self._last)
            self._last, self._sent = None, time.monotonic()

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        record.pop("time", None)
        if "error" in record:
            self.error = record["error"]
            return
        step, total = record.get("step", 0), record.get("total", 0)
        if self._first is None or step < self._step or record.get("label") != self._label:
            self._first = (time.monotonic(), step)
        self._step, self._label = step, record.get("label")
        done, seconds = step - self._first[1], time.monotonic() - self._first[0]
        if done > 0 and total:
            record["eta_seconds"] = round((total - step) * seconds / done, 1)
        self._last = record


def work(
    workspace: Workspace,
    run_id: str,
    flag: CancelFlag,
    builders: Mapping[str, StageBuilder] = BUILDERS,
) -> None:
    """Run a plan to a stated status. The caller holds the lock.

    Raises:
        InvalidInput: If the plan is not the one that was approved.
        Conflict: If what it runs changed since it was approved.
    """
    plan = load_approved(workspace, run_id)
    check_approval(workspace, plan)
    flag.limit(plan.proposal.limits.gpu_hours, gpu_seconds_of(workspace, run_id))
    before = load_run(workspace, run_id)
    events = EventLog(workspace.run(run_id).events)
    resumed = before.started is not None
    events.append(
        "run_started",
        pid=os.getpid(),
        host=socket.gethostname(),
        worker_version=__version__,
        resumed=resumed,
    )
    try:
        others = _others(workspace, run_id)
        for run in (before, *others):
            end_survivor(run)
        _record_missed(workspace, others)
        outputs = _run_stages(workspace, plan, builders, events, flag)
        if plan.proposal.limits.data_only:
            verdict, message = None, "data only: no training was approved"
        else:
            verdict, message = _judge(workspace, plan, outputs["evaluate"], events)
        events.append(
            "run_finished", status="succeeded", verdict=verdict, message=message, error=None
        )
    except Cancelled as stop:
        _finish(events, "cancelled", str(stop), None)
    except SynthAgentError as error:
        _finish(events, "failed", error.message, error)
    except OSError as error:
        failure = _system_error(workspace, error)
        _finish(events, "failed", failure.message, failure)
    finally:
        events.close()
    _record(workspace, run_id)


def _others(workspace: Workspace, run_id: str) -> list[Run]:
    """Return the other runs that can be read; one that is damaged does not stop this one."""
    runs = []
    for path in sorted(workspace.runs.glob("[0-9]*/plan.yaml")):
        if path.parent.name == run_id:
            continue
        try:
            runs.append(load_run(workspace, path.parent.name))
        except SynthAgentError as error:
            print(f"{now()} {error}", file=sys.stderr)
    return runs


_FULL_BYTES = 2**20
"""With less than this free, a stage that failed failed for want of space."""


def _system_error(workspace: Workspace, error: OSError) -> SynthAgentError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return SynthAgentError("System error", str(error), "correct the cause and resume the run")
    return SynthAgentError(*_disk_full(workspace.root, error.filename))


def _disk_full(folder: Path, path: object = None) -> tuple[str, str, str]:
    free = shutil.disk_usage(folder).free
    return (
        "Disk is full",
        f"{path or folder}: {free:,} bytes are free",
        "free space, for instance old folders under artifacts/, and resume the run",
    )


def end_survivor(run: Run) -> None:
    """End a stage that outlived an earlier worker, so that two never write one folder."""
    for stage in run.stages.values():
        is_open = stage.status in ("running", "interrupted")
        if not is_open or stage.pid is None or stage.pid_started is None:
            continue
        try:
            process = psutil.Process(stage.pid)
            if abs(process.create_time() - stage.pid_started) > 1:
                continue
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except psutil.TimeoutExpired:
                process.kill()
        except psutil.NoSuchProcess:
            continue


def _run_stages(
    workspace: Workspace,
    plan: Plan,
    builders: Mapping[str, StageBuilder],
    events: EventLog,
    flag: CancelFlag,
) -> dict[str, Path]:
    digests, outputs = Digests(workspace), dict[str, Path]()
    for name, build in builders.items():
        if plan.proposal.limits.data_only and name != "process":
            break
        if flag.requested:
            raise Cancelled(flag.reason)
        check_approval(workspace, plan, digests, finished=outputs)
        stage = build(Context(workspace, plan, digests, dict(outputs)))
        digests.save()
        if stage.output.is_dir() and not stage.missing(stage.output):
            relative = str(stage.output.relative_to(workspace.root))
            result = _result(stage)
            events.append("stage_reused", stage=name, key=stage.key, output=relative, result=result)
        else:
            flag.start(name)
            if flag.requested:
                raise Cancelled(flag.reason)
            try:
                _run_stage(workspace, plan, stage, events, flag, digests)
            finally:
                flag.end()
        outputs[name] = stage.output
    return outputs


def _run_stage(
    workspace: Workspace,
    plan: Plan,
    stage: Stage,
    events: EventLog,
    flag: CancelFlag,
    digests: Digests,
) -> None:
    started, code = time.monotonic(), 0
    stage.partial.mkdir(parents=True, exist_ok=True)
    logs = workspace.logs(plan.run_id)
    logs.mkdir(parents=True, exist_ok=True)
    for path, config in stage.configs.items():
        path.write_text(json.dumps(config, indent=2), "utf-8")
    tail = ProgressTail(logs / f"{stage.name}.progress.jsonl", stage.name, events)
    error: dict[str, str] | None = None
    with (logs / f"{stage.name}.log").open("ab") as log:
        for command in stage.commands:
            code = _run_command(workspace, stage, command, log, events, tail, flag)
            if code or flag.requested:
                break
    missing = stage.missing(stage.partial)
    changed = changed_under(workspace, plan, digests, stage.name)
    if changed:
        _set_aside(stage, _void_folder(workspace, stage))
    if flag.requested and (code or missing):
        status = "cancelled"
    elif changed:
        status, error = "failed", _void(workspace, plan, stage, changed)
    elif code or missing:
        status = "failed"
        error = _failure(stage, code, missing, logs / f"{stage.name}.log", tail.error)
    else:
        status = "succeeded"
        if stage.output.exists():
            shutil.rmtree(stage.output)
        stage.partial.rename(stage.output)
    events.append(
        "stage_finished",
        stage=stage.name,
        key=stage.key,
        status=status,
        exit_code=code,
        seconds=round(time.monotonic() - started, 3),
        output=str(stage.output.relative_to(workspace.root)) if status == "succeeded" else None,
        result=_result(stage) if status == "succeeded" else {},
        error=error,
    )
    if status == "cancelled":
        raise Cancelled(flag.reason)
    if error is not None:
        raise StageFailed(error["title"], error["message"], error.get("hint", ""))


def _void_folder(workspace: Workspace, stage: Stage) -> Path:
    return workspace.artifacts / "void" / f"{stage.name}-{stage.output.name}"


def _set_aside(stage: Stage, void: Path) -> None:
    """Move what a stage has made of other inputs to where no later start finds it."""
    if void.exists():
        shutil.rmtree(void)
    void.parent.mkdir(exist_ok=True)
    stage.partial.rename(void)


def _void(workspace: Workspace, plan: Plan, stage: Stage, changed: Sequence[str]) -> dict[str, str]:
    return {
        "title": "Approval is void",
        "message": f"{plan.run_id}: changed while {stage.name} read it: {', '.join(changed)}; what "
        f"it made is set aside in {_void_folder(workspace, stage)}",
        "hint": "put it back as it was and resume the run, or propose again and approve what is "
        "there",
    }


def _run_command(
    workspace: Workspace,
    stage: Stage,
    command: Sequence[str],
    log: IO[bytes],
    events: EventLog,
    tail: ProgressTail,
    flag: CancelFlag,
) -> int:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=workspace.root,
        env=stage_environment(workspace),
        start_new_session=True,
    )
    try:
        pid_started = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        pid_started = None
    try:
        events.append(
            "stage_started",
            stage=stage.name,
            key=stage.key,
            pid=process.pid,
            pid_started=pid_started,
            command=list(command),
        )
        while process.poll() is None and not flag.look():
            tail.forward()
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            _stop(process)
    tail.forward(final=True)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure(
    stage: Stage, code: int, missing: Sequence[str], log: Path, reported: dict[str, str] | None
) -> dict[str, str]:
    """Return what went wrong: the full disk, else what the stage reported, else its exit."""
    # A stage on a full disk may not even get to say so in its log.
    is_full = shutil.disk_usage(stage.partial).free < _FULL_BYTES
    told = last_lines(log) + (reported["message"] if reported else "")
    if "No space left on device" in told or (is_full and not reported):
        title, message, hint = _disk_full(stage.partial)
        return {"title": title, "message": message, "hint": hint}
    if reported:
        return reported
    if code:
        message = f"exit code {code}\n{last_lines(log)}"
    else:
        message = f"{stage.partial} lacks {', '.join(missing)}"
    return {"title": f"Stage {stage.name} failed", "message": message, "hint": f"see {log}"}


def _result(stage: Stage) -> dict[str, Any]:
    if stage.result is None:
        files = sorted(stage.output.glob("*/score.json"))
        scores = (json.loads(path.read_text("utf-8")) for path in files)
        return {score["benchmark"]: score["score_percent"] for score in scores}
    loaded: dict[str, Any] = json.loads((stage.output / stage.result).read_text("utf-8"))
    loaded.pop("settings", None)  # already in the plan
    return loaded


def _judge(
    workspace: Workspace, plan: Plan, output: Path, events: EventLog
) -> tuple[Verdict | None, str]:
    """Record scores and comparisons; return the verdict, or None and why there is none."""
    for folder in sorted(path.parent for path in output.glob("*/score.json")):
        score = read_score(workspace, folder)
        events.append("score_recorded", score=asdict(score))
    parent = plan.proposal.parent
    if parent is None:
        return "baseline", ""
    try:
        comparisons = compare_runs(workspace, parent, plan.run_id)
    except InvalidInput as error:
        return None, f"not compared with {parent}: {error}"
    if not comparisons:
        return None, f"not compared with {parent}: it has no score"
    for comparison in comparisons:
        events.append("compared", comparison=asdict(comparison))
    outcomes = [c.verdict for c in comparisons if c.verdict in ("better", "worse", "inside noise")]
    return overall(outcomes), ""  # type: ignore[arg-type]


def read_score(workspace: Workspace, folder: Path) -> Score:
    """Build a score from a benchmark's folder.

    Raises:
        StageFailed: If the predictions do not give the score that the program wrote.
    """
    raw = json.loads((folder / "score.json").read_text("utf-8"))
    predictions = folder / "predictions.jsonl"
    values = list(question_scores(predictions).values())
    percent = float(raw["score_percent"])
    mean = 100 * sum(values) / len(values)
    if abs(mean - percent) > 0.06:
        raise StageFailed(
            "Score does not follow from the predictions",
            f"{predictions} gives {mean:.2f}, score.json says {percent:.2f}",
            "delete the folder and resume the run",
        )
    low, high = interval(values)
    return Score(
        benchmark=raw["benchmark"],
        split=raw["split"],
        metric=raw["metric"],
        percent=percent,
        low=low,
        high=high,
        chance=float(raw["chance_percent"]),
        num_questions=len(values),
        predictions_sha256=raw["predictions_sha256"],
        predictions=str(predictions.relative_to(workspace.root)),
        scorer=" ".join(str(part) for part in raw["scorer"].values()),
        categories={name: part["score_percent"] for name, part in raw["categories"].items()},
        extra=raw["metrics"],
    )


def _finish(events: EventLog, status: str, message: str, error: SynthAgentError | None) -> None:
    try:
        events.append(
            "run_finished",
            status=status,
            verdict="failed" if status == "failed" else None,
            message=message,
            error=error.as_dict() if error else None,
        )
    except OSError as cause:
        # On a full disk the log cannot say it; the run then reads as interrupted.
        print(f"{now()} cannot record that the run {status}: {cause}", file=sys.stderr)


def _record(workspace: Workspace, run_id: str) -> None:
    run, paths = read_events(workspace, run_id), workspace.run(run_id)
    try:
        if run.scores:
            record = {
                "scores": {name: asdict(score) for name, score in run.scores.items()},
                "comparisons": {name: asdict(value) for name, value in run.comparisons.items()},
            }
            paths.scores.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        write_summary(workspace, run)
        index = write_index(workspace, [*_others(workspace, run_id), run])
        trailers = {"Run": run_id, "Parent": run.plan.proposal.parent or "none"}
        trailers["Verdict"] = run.verdict or run.status
        for name, label in (("textvqa", "TextVQA"), ("mmbench", "MMBench")):
            if name in run.scores:
                trailers[label] = f"{run.scores[name].percent:.2f}"
        message = f"run: {run_id} {run.verdict or run.status}"
        journal.commit(workspace, [paths.root, index], message, trailers)
    except OSError as error:
        print(f"{now()} the run's record is incomplete: {error}", file=sys.stderr)


def _record_missed(workspace: Workspace, others: Sequence[Run]) -> None:
    """Record the runs that ended and whose worker was killed before it had written that down."""
    for run in others:
        log = workspace.run(run.id).events
        if run.finished is not None and journal.is_unrecorded(workspace, log):
            _record(workspace, run.id)


def hold_lock(workspace: Workspace, run_id: str) -> IO[str]:
    """Take the workspace's lock; it is free again when the file is closed or the process dies.

    Raises:
        Busy: If another worker holds it.
    """
    workspace.artifacts.mkdir(parents=True, exist_ok=True)
    lock = workspace.lock.open("a+")
    # A reader that asks whether the lock is held takes it shared for an instant.
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02)
    else:
        lock.close()
        raise Busy("A run is live", f"{workspace.lock} is held", "wait or cancel it")
    lock.truncate(0)
    lock.write(f"{os.getpid()} {run_id}")
    lock.flush()
    return lock


def main(
    arguments: Sequence[str] | None = None, builders: Mapping[str, StageBuilder] = BUILDERS
) -> int:
    """Run the worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m synth_agent.worker")
    parser.add_argument("run_id")
    parser.add_argument("--workspace", type=Path, default=Path())
    options = parser.parse_args(arguments)
    # Who sees the lock may ask to stop: the signals are listened to before it is taken.
    flag = CancelFlag()
    signal.signal(signal.SIGTERM, flag.request)
    signal.signal(signal.SIGINT, flag.request)
    try:
        workspace = open_workspace(options.workspace)
        with hold_lock(workspace, options.run_id):
            work(workspace, options.run_id, flag, builders)
    except SynthAgentError as error:
        print(f"{error.title}: {error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
