"""From a proposal to a running worker, and from the files of a run back to what is known of it.

`approve` is the only maker of plans and `launch` takes nothing else. What an approval covers is in
`gate`; the stages themselves are described in `stage_plan` and run by `worker`.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml

from synth_agent import __version__, journal
from synth_agent.data import atomic_file
from synth_agent.digests import Digests
from synth_agent.errors import Busy, Conflict, InvalidInput, SynthAgentError, nearest
from synth_agent.gate import approved_inputs, check_approval, check_limits, folder_inputs
from synth_agent.runs import (
    BUILTIN_PLANNER,
    Event,
    Plan,
    Proposal,
    Rejection,
    Run,
    dump_plan,
    dump_proposal,
    fold,
    gpu_seconds,
    load_plan,
    now,
    parse_events,
    proposal_from,
    today,
)
from synth_agent.secrets import redact
from synth_agent.stage_plan import refuse_impossible_starts
from synth_agent.workspace import RunPaths, Workspace, known_secrets, stage_environment

LEAST_FREE_BYTES = 1 << 30
_START_SECONDS = 30.0
_INPUTS = ("seed", "original", "instructions")
_PACKAGES = ("torch", "transformers", "peft", "numpy", "py-data-juicer", "textual")
_WORKER = (sys.executable, "-m", "synth_agent.worker")


def validate(workspace: Workspace, proposal: Proposal) -> None:
    """Check all that can be checked before hours are spent.

    Raises:
        InvalidInput: Naming the recipe's or the setting's field, the limit, the path, or what the
            training takes of the GPU, and the fix.
    """
    from synth_agent.recipes import load_catalogue, recipe_from_mapping, validate_recipe
    from synth_agent.training_fit import refuse_impossible

    mapping = dict(proposal.recipe)
    name = str(mapping.pop("name", proposal.slug))
    validate_recipe(recipe_from_mapping(name, mapping), load_catalogue(), workspace)
    check_settings(workspace, proposal.settings)
    check_limits(proposal)
    if not proposal.limits.data_only:
        refuse_impossible(workspace, proposal.settings)


def check_settings(workspace: Workspace, settings: Mapping[str, Any]) -> None:
    """Check the files, starts and batches, the first stage's method and the disk.

    Raises:
        InvalidInput: Naming the setting and the fix.
    """
    refuse_impossible_starts(settings)
    evaluate = settings["evaluate"]
    sections = {
        "data": settings["data"],
        "model": {k: v for k, v in settings["model"].items() if k != "name"},
        "evaluate.textvqa": evaluate["textvqa"],
        "evaluate.mmbench": evaluate["mmbench"],
    }
    for section, values in sections.items():
        for key, value in values.items():
            if isinstance(value, str) and not workspace.path(value).exists():
                raise InvalidInput(
                    "File is missing",
                    f"{workspace.settings_file}: {section}.{key} = {value!r}, "
                    f"but {workspace.path(value)} does not exist",
                    "put the file there or correct the path",
                )
    for stage in ("pretrain", "finetune"):
        whole, micro = (settings[stage][f"{name}_batch_size"] for name in ("global", "micro"))
        if whole % micro:
            raise InvalidInput(
                "Batch sizes do not fit",
                f"{workspace.settings_file}: {stage}.micro_batch_size = {micro} does not divide "
                f"{stage}.global_batch_size = {whole}",
                "choose a divisor of the global batch size",
            )
    if (method := settings["pretrain"]["method"]) != "projector":
        raise InvalidInput(
            "Wrong setting",
            f"{workspace.settings_file}: pretrain.method = {method!r}",
            "pretraining trains projector and mining: leave it out, or set finetune.method",
        )
    free = shutil.disk_usage(workspace.root).free
    if free < LEAST_FREE_BYTES:
        raise InvalidInput(
            "Disk is nearly full",
            f"{workspace.root} has {free >> 20} MiB free, at least 1024 MiB are needed",
            "free space or delete old folders under artifacts/",
        )


def approve(
    workspace: Workspace, proposal: Proposal, *, shown_sha256: str, approver: str, rule: str = ""
) -> Plan:
    """Make the plan of what a person saw, write its folder and commit it.

    The plan keeps the digest of everything that the run reads, as it is at this moment.

    Args:
        workspace: The workspace.
        proposal: What was shown.
        shown_sha256: The sha256 that was shown with it.
        approver: Name of the person.
        rule: Id of the standing rule that the person made, when it approves in their name.

    Raises:
        Conflict: If the proposal is not the one that was shown.
        InvalidInput: If nobody is named as the approver, or a limit makes no sense.
    """
    # A copy: whoever holds the proposal's mappings cannot change what is being approved.
    proposal = proposal_from(json.loads(json.dumps(proposal.content())))
    if proposal.sha256 != shown_sha256:
        raise Conflict(
            "Proposal changed",
            f"shown: {shown_sha256[:12]}, to be approved: {proposal.sha256[:12]}",
            "look at the proposal again and approve what it says",
        )
    check_person(approver)
    check_limits(proposal)
    digests = Digests(workspace)
    inputs = approved_inputs(workspace, proposal, digests)
    digests.save()
    run_id = _make_folder(workspace, proposal.slug)
    paths = workspace.run(run_id)
    recipe = {key: value for key, value in proposal.recipe.items() if key != "name"}
    paths.proposal.write_text(dump_proposal(proposal), "utf-8")
    paths.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    _keep_transcript(workspace, proposal, paths)
    environment = json.dumps(_environment(workspace, proposal, inputs), indent=2) + "\n"
    paths.environment.write_text(environment, "utf-8")
    inputs |= folder_inputs(workspace, run_id)
    name = f"rule {rule} of {approver}" if rule else approver
    plan = Plan(run_id, proposal, name, now(), proposal.sha256, inputs)
    # The plan makes the folder a run: it is there whole or not at all.
    with atomic_file(paths.plan) as file:
        file.write(dump_plan(plan))
    trailers = {"Run": run_id, "Parent": proposal.parent or "none", "Approver": name}
    journal.commit(workspace, [paths.root], f"run: {run_id} approved", trailers)
    return plan


def reject(workspace: Workspace, proposal: Proposal, *, reason: str, by: str) -> str:
    """Keep a proposal that was turned down, with the reason, and return its id.

    Raises:
        InvalidInput: If there is no reason.
    """
    if not reason.strip():
        raise InvalidInput(
            "Reason is missing", f"{proposal.slug}: ''", "say why; the next proposal respects it"
        )
    reason = redact(reason, known_secrets())
    run_id = _make_folder(workspace, proposal.slug)
    paths = workspace.run(run_id)
    paths.proposal.write_text(dump_proposal(proposal), "utf-8")
    _keep_transcript(workspace, proposal, paths)
    record = {"reason": reason, "by": by, "at": now(), "sha256": proposal.sha256}
    # It makes the folder a rejection: it is there whole or not at all.
    with atomic_file(_rejection_file(paths)) as file:
        yaml.safe_dump(record, file, sort_keys=False)
    journal.commit(workspace, [paths.root], f"run: {run_id} rejected", {"Run": run_id})
    return run_id


def _keep_transcript(workspace: Workspace, proposal: Proposal, paths: RunPaths) -> None:
    """Copy the day's exchanges with the model beside a proposal that it made."""
    exchanges = workspace.transcript(today())
    if BUILTIN_PLANNER not in proposal.proposed_by and exchanges.is_file():
        shutil.copyfile(exchanges, paths.transcript)


def launch(workspace: Workspace, plan: Plan, *, program: Sequence[str] = _WORKER) -> int:
    """Start the detached worker of a plan and return its process id.

    Raises:
        Busy: If another run is live.
        Conflict: If the plan is not the approved one, or what it runs changed since.
        SynthAgentError: If the worker ended before it took the lock.
    """
    if load_approved(workspace, plan.run_id) != plan:
        raise Conflict(
            "Not the approved plan",
            f"{workspace.run(plan.run_id).plan} holds another one",
            "launch what `approve` returned",
        )
    return resume(workspace, plan.run_id, program=program)


def resume(workspace: Workspace, run_id: str, *, program: Sequence[str] = _WORKER) -> int:
    """Start a worker that continues a run where it stopped; see `launch`.

    Raises:
        Conflict: If the run has succeeded or used up its GPU-hours, or what it runs changed.
    """
    plan = load_approved(workspace, run_id)
    if read_events(workspace, run_id).status == "succeeded":
        raise Conflict("Run has finished", run_id, "approve a new proposal to run it again")
    cap = plan.proposal.limits.gpu_hours
    if cap is not None and is_cap_reached(cap, gpu_seconds_of(workspace, run_id)):
        raise Conflict(
            "GPU-hours are used up",
            f"{run_id}: limited to {cap:g} GPU-hours",
            "approve a proposal with a higher limit; finished stages and checkpoints are reused",
        )
    live = live_run(workspace)
    if live is not None:
        raise Busy("A run is live", f"run {live} holds {workspace.lock}", "wait or cancel it")
    check_approval(workspace, plan)
    log_file = workspace.logs(run_id) / "worker.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = stage_environment(workspace)
    with log_file.open("ab") as log:
        worker = subprocess.Popen(
            [*program, run_id, "--workspace", str(workspace.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=workspace.root,
            env=environment,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if lock_holder(workspace) == (worker.pid, run_id) or worker.poll() == 0:
            return worker.pid
        if worker.poll() is not None:
            break
        time.sleep(0.02)
    raise SynthAgentError("Worker did not start", last_lines(log_file), f"see {log_file}")


def load_approved(workspace: Workspace, run_id: str) -> Plan:
    """Return the plan of a run.

    Raises:
        InvalidInput: If it is missing or was changed.
        Conflict: If it is another run's, copied there.
    """
    path = _plan_file(workspace, run_id)
    plan = load_plan(path)
    if plan.run_id != run_id:
        raise Conflict(
            "Approval of another run",
            f"{path} approves {plan.run_id}",
            "an approval is good for one run: propose it again and approve that",
        )
    return plan


def _plan_file(workspace: Workspace, run_id: str) -> Path:
    """Return the plan of a run that is there, whatever it holds.

    Raises:
        InvalidInput: If there is no such run.
    """
    path = workspace.run(run_id).plan
    if Path(run_id).name == run_id and path.is_file():
        return path
    names = [folder.name for folder in _folders(workspace, "plan.yaml")]
    hint = nearest(run_id, names) if names else "no run was approved yet: synth-agent propose"
    raise InvalidInput("No such run", f"{run_id!r} in {workspace.runs}", hint)


def cancel(workspace: Workspace, run_id: str) -> None:
    """Ask the run's worker to stop.

    Raises:
        Conflict: If the run is not live.
    """
    holder = lock_holder(workspace)
    if holder is None or holder[1] != run_id:
        raise Conflict("Run is not live", f"no worker runs {run_id}", "nothing to cancel")
    os.kill(holder[0], signal.SIGTERM)


def live_run(workspace: Workspace) -> str | None:
    """Return the id of the run whose worker is alive."""
    holder = lock_holder(workspace)
    return None if holder is None else holder[1]


def lock_holder(workspace: Workspace) -> tuple[int, str] | None:
    """Return process id and run id of the live worker; alive means that the lock is held."""
    try:
        with workspace.lock.open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, run_id = lock.read().strip().partition(" ")
                return (int(pid), run_id) if pid and run_id else None
    except FileNotFoundError:
        return None
    return None


def load_run(workspace: Workspace, run_id: str) -> Run:
    """Return what is known of a run.

    Raises:
        InvalidInput: If there is no such run, or its plan or event log is damaged.
    """
    paths = workspace.run(run_id)
    plan = load_plan(_plan_file(workspace, run_id))
    live = live_run(workspace)
    run = _fold(paths, plan)
    if run.status == "running" and live != run_id:
        run.status = "interrupted"
        for stage in run.stages.values():
            if stage.status == "running":
                stage.status = "interrupted"
    elif run.finished is not None and live == run_id:
        # The worker still writes the summary and the commit.
        run.status = "running"
    return run


def read_events(workspace: Workspace, run_id: str) -> Run:
    """Return what the plan and the events alone say, for the worker, who is alive itself."""
    paths = workspace.run(run_id)
    return _fold(paths, load_plan(_plan_file(workspace, run_id)))


def gpu_seconds_of(workspace: Workspace, run_id: str) -> float:
    """Return the measured wall time of a run's training and evaluation, in seconds."""
    paths = workspace.run(run_id)
    try:
        return gpu_seconds(_events(paths))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "Event log is damaged", f"{paths.events}: {error!r}", "restore it from git"
        ) from error


def is_cap_reached(gpu_hours: float, seconds: float) -> bool:
    """Tell whether so many seconds use up a limit; half a second is not worth a start."""
    return seconds >= gpu_hours * 3600 - 0.5


def _fold(paths: RunPaths, plan: Plan) -> Run:
    return fold(plan, _events(paths))


def _events(paths: RunPaths) -> Iterator[Event]:
    text = paths.events.read_bytes().decode("utf-8", "replace") if paths.events.exists() else ""
    return parse_events(text.split("\n"))


def list_runs(
    workspace: Workspace, damaged: Callable[[SynthAgentError], None] | None = None
) -> list[Run]:
    """Return the approved runs, oldest first.

    Args:
        workspace: The workspace.
        damaged: Called for each run that cannot be read, which is then left out.

    Raises:
        InvalidInput: If a run cannot be read and nobody asked to be told.
    """
    runs = []
    for folder in _folders(workspace, "plan.yaml"):
        try:
            runs.append(load_run(workspace, folder.name))
        except InvalidInput as error:
            if damaged is None:
                raise
            damaged(error)
    return runs


def list_rejections(
    workspace: Workspace, damaged: Callable[[SynthAgentError], None] | None = None
) -> list[Rejection]:
    """Return the rejected proposals, oldest first.

    Args:
        workspace: The workspace.
        damaged: Called for each rejection that cannot be read, which is then left out.

    Raises:
        InvalidInput: If a rejection cannot be read and nobody asked to be told.
    """
    rejections = []
    for folder in _folders(workspace, "rejection.yaml"):
        try:
            rejections.append(_load_rejection(workspace.run(folder.name)))
        except InvalidInput as error:
            if damaged is None:
                raise
            damaged(error)
    return rejections


def _load_rejection(paths: RunPaths) -> Rejection:
    path = paths.proposal
    try:
        proposal = proposal_from(yaml.safe_load(path.read_text("utf-8")))
        path = _rejection_file(paths)
        record = yaml.safe_load(path.read_text("utf-8"))
        said = [str(record[name]) for name in ("reason", "by", "at")]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput("Not a rejection", f"{path}: {error}", "restore it from git") from error
    return Rejection(paths.root.name, proposal, *said)


def question_scores(predictions: Path) -> dict[str, float]:
    """Return the score of each question.

    Rows of one circular group are one question, which counts only if all of them are right; a
    group without its main row is left out, as in the benchmark's own score.

    Raises:
        InvalidInput: If the file cannot be read or holds something else.
    """
    scores: dict[str, float] = {}
    main: set[str] = set()
    try:
        text = predictions.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            "Predictions are missing",
            f"{predictions}: {error.strerror}",
            "resume the run that made them; only what is missing is computed",
        ) from error
    except UnicodeDecodeError as error:
        raise _damaged_predictions(predictions, 0, error) from error
    # Answers may hold what `splitlines` takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            key = str(record.get("group", record["key"]))
            is_main = "group" not in record or str(record["question_id"]) == key
            score = float(record["score"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged_predictions(predictions, number, error) from error
        if is_main:
            main.add(key)
        scores[key] = min(scores.get(key, 1.0), score)
    return {key: score for key, score in scores.items() if key in main}


def _damaged_predictions(path: Path, line: int, error: Exception) -> InvalidInput:
    return InvalidInput(
        "Predictions are damaged",
        f"{path}, line {line}: {type(error).__name__}: {error}",
        "delete the folder and resume the run: only what is missing is computed",
    )


def last_lines(path: Path, count: int = 12) -> str:
    """Return the end of a log."""
    if not path.exists():
        return f"{path} was not written"
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-count:])


def _folders(workspace: Workspace, marker: str) -> list[Path]:
    return sorted(path.parent for path in workspace.runs.glob(f"[0-9]*/{marker}"))


def check_person(name: str) -> None:
    """Refuse an approver who is nobody, or who reads like a standing rule."""
    if not name.strip() or name.split()[0] == "rule":
        raise InvalidInput("Approver is missing", repr(name), "give the name of a person")


def _make_folder(workspace: Workspace, slug: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", slug):
        raise InvalidInput("Bad slug", repr(slug), "use lower case letters, digits and hyphens")
    workspace.runs.mkdir(exist_ok=True)
    with journal.one_writer(workspace):
        taken = [int(p.name[:4]) for p in workspace.runs.iterdir() if p.name[:4].isdigit()]
        run_id = f"{max(taken, default=0) + 1:04d}-{slug}"
        (workspace.runs / run_id).mkdir()
    return run_id


def _rejection_file(paths: RunPaths) -> Path:
    return paths.root / "rejection.yaml"


def _environment(
    workspace: Workspace, proposal: Proposal, inputs: Mapping[str, str]
) -> dict[str, Any]:
    data = proposal.settings.get("data", {})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "synth_agent": __version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "code": {
            "process": inputs["code: data processing"],
            "pretrain": inputs["code: training and evaluation"],
        },
        "git_head": journal.head(workspace),
        "seeds": {
            "model": proposal.settings.get("seed"),
            "sample_cap": data.get("sample_cap_seed"),
        },
        "inputs": {name: inputs[f"data.{name}"] for name in _INPUTS if name in data},
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
