"""Proposals, plans, runs, and the event log that runs are folded from.

`events.jsonl` is append-only with one writer, the run's worker. Everything a reader knows of a run
comes from its plan and these events; there is no second state to disagree with. A line that was
cut off by a crash is at the end and is ignored by readers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from synth_agent.errors import InvalidInput

try:
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]

BUILTIN_PLANNER = "built-in planner"
"""Who proposes when no model and no person does."""
STAGES = ("process", "pretrain", "finetune", "evaluate")
GPU_STAGES = frozenset(STAGES[1:])
"""Stages whose time counts against a limit in GPU-hours."""
Kind = Literal["baseline", "explore", "exploit", "replicate", "ablate"]
RunStatus = Literal[
    "approved", "running", "interrupted", "succeeded", "failed", "cancelled", "rejected"
]
StageStatus = Literal[
    "waiting", "running", "interrupted", "succeeded", "reused", "failed", "cancelled"
]
Verdict = Literal["baseline", "better", "worse", "inside noise", "mixed", "failed"]


def now() -> str:
    """Return the current time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def today() -> str:
    """Return the current day, UTC, ISO 8601."""
    return datetime.now(UTC).date().isoformat()


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces. Digests are taken from it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: object) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Cost:
    """What a run is expected to take."""

    seed_samples: int
    expected_samples: int | None
    """Samples after processing; None when no operator's retention is known."""
    seconds: float | None
    """Wall time; None before anything was measured on this machine."""
    basis: str
    """Where the two figures come from, in words."""


@dataclass(frozen=True)
class Prediction:
    """What somebody expects of one benchmark: this run minus its parent, in percentage points."""

    benchmark: str
    expected: float
    low: float
    """Ends of the interval that holds the difference with a probability of 80 %."""
    high: float
    by: str
    """Whose prediction: the name of a planner or of a model."""


@dataclass(frozen=True)
class Limits:
    """The part of a proposal that may run. What is not limited runs whole."""

    data_only: bool = False
    """Process the data and stop before training."""
    samples: int | None = None
    """Train on at most so many of the processed samples, drawn by the settings' cap seed."""
    gpu_hours: float | None = None
    """Stop the run, as cancelled, when training and evaluation have taken so many hours."""

    def words(self) -> str:
        """Return the limits in words, empty when there are none."""
        parts = []
        if self.data_only:
            parts.append("data only, no training")
        if self.samples is not None:
            parts.append(f"at most {self.samples:,} samples")
        if self.gpu_hours is not None:
            parts.append(f"at most {self.gpu_hours:g} GPU-hours")
        return ", ".join(parts)


@dataclass(frozen=True)
class Proposal:
    """An experiment that somebody suggests. Data only: it cannot be run.

    `recipe` is the complete Data-Juicer recipe as a mapping (see `recipes.Recipe`); `settings`
    is every setting that the stages will use (data, model, pretrain, finetune, evaluate, seed).
    """

    title: str
    slug: str
    """Short name for the run id: lower case letters, digits, hyphens."""
    kind: Kind
    reason: str
    evidence: tuple[str, ...]
    """Run ids or imported result names that the reason rests on."""
    parent: str | None
    """Run id that this one is compared with; None for the baseline."""
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any]
    cost: Cost
    proposed_by: str
    hypothesis: str = ""
    """What would have to be true for it to help."""
    predictions: tuple[Prediction, ...] = ()
    """Of whoever proposes and of the built-in model, benchmark by benchmark."""
    refuted_by: str = ""
    """The outcome that would show the hypothesis to be wrong."""
    alternatives: tuple[str, ...] = ()
    """sha256 of the proposals that were shown beside it: the choice is evidence too."""
    limits: Limits = Limits()

    def content(self) -> dict[str, Any]:
        """Return everything as plain data; what nobody said is left out.

        A field with a default can therefore be added without a change of older proposals' digests.
        """
        content = asdict(self)
        for name, default in _OPTIONAL.items():
            if getattr(self, name) == default:
                del content[name]
        return content

    @property
    def sha256(self) -> str:
        """Digest of everything shown to the approver."""
        return digest(self.content())


_OPTIONAL = {f.name: f.default for f in fields(Proposal) if f.default is not MISSING}


@dataclass(frozen=True)
class Plan:
    """A proposal that a person approved. Only `pipeline.approve` makes one."""

    run_id: str
    proposal: Proposal
    approver: str
    approved_at: str
    sha256: str
    """Digest of the proposal as approved; launching refuses a plan that no longer matches it."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of all that the run reads, by name, as they were at approval; see `gate`."""


_UNSEALED = {f.name for f in fields(Plan)} - {"inputs"}


@dataclass(frozen=True)
class Rejection:
    """A proposal that a person turned down, and why. It is kept like a run: it teaches."""

    id: str
    proposal: Proposal
    reason: str
    by: str
    at: str


@dataclass(frozen=True)
class Score:
    """One benchmark's measured result, built from a predictions file of full length."""

    benchmark: str
    split: str
    metric: str
    percent: float
    low: float
    """Lower end of the 95 % bootstrap interval over questions, in percent."""
    high: float
    chance: float
    num_questions: int
    predictions_sha256: str
    predictions: str
    """Path of the predictions file, relative to the workspace root."""
    scorer: str
    """Fingerprint: name, version and digest of the scorer's source."""
    categories: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further metrics of the same predictions, in percent."""
    provenance: Literal["measured", "imported", "claimed"] = "measured"


@dataclass(frozen=True)
class Comparison:
    """A run against its parent on one benchmark, on the same questions."""

    benchmark: str
    parent: str
    difference: float
    """Percentage points, this run minus the parent."""
    low: float
    high: float
    """Interval of the difference. With a `basis` it covers questions, seeds and tries; without, it
    covers the questions only."""
    num_questions: int
    verdict: Verdict
    expected: float | None = None
    """What is left to expect of the difference, since it was looked at among others."""
    tries: int = 1
    """Candidates compared with the parent so far, this one included."""
    seeds: int = 1
    parent_seeds: int = 1
    question_sd: float | None = None
    """Standard deviations, percentage points: of the difference over questions, and of one run's
    score over seeds."""
    seed_sd: float | None = None
    assumed: bool = False
    """Whether `seed_sd` is assumed rather than measured in this workspace."""
    basis: str = ""
    """What the interval rests on, in words."""
    power: str = ""
    """What so many seeds can tell apart, and how many this difference would take, in words."""


@dataclass(frozen=True)
class Event:
    """One line of the event log.

    Kinds and their `fields`:
        run_started      pid, host, worker_version, resumed (bool)
        stage_started    stage, key, pid, pid_started, command
        stage_reused     stage, key, output
        progress         stage, step, total, unit, label, loss, lr, grad_norm,
                         samples_per_second, eta_seconds (those that are known)
        stage_finished   stage, key, status, exit_code, seconds, output, result, error
        score_recorded   score (a Score as a mapping)
        compared         comparison (a Comparison as a mapping)
        note             text
        run_finished     status, verdict, message, error
    """

    time: str
    kind: str
    fields: Mapping[str, Any]

    def line(self) -> str:
        """Return the event as its log line, newline included."""
        return json.dumps({"time": self.time, "kind": self.kind, **self.fields}) + "\n"


class EventLog:
    """Append events to a run's log. One writer only: the run's worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, kind: str, **fields: Any) -> Event:
        """Write one event; all but progress reach the disk before this returns."""
        event = Event(now(), kind, fields)
        self._write(event.line().encode())
        if kind != "progress":
            os.fsync(self._descriptor)
        return event

    def _write(self, line: bytes) -> None:
        """Write a whole line or, when the disk is full, nothing of it.

        The next event would follow on a half-written line, and both would be lost.
        """
        start = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise

    def close(self) -> None:
        """Close the log."""
        os.close(self._descriptor)


def _drop_torn_line(path: Path) -> None:
    """Cut a half-written last line, so that the next event starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as log:
            log.truncate(data.rfind(b"\n") + 1)


class EventTail:
    """Read a growing event log piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """Return the complete events that were appended since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return list(parse_events(data[:end].decode("utf-8", "replace").splitlines()))


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of log lines; lines that are not events are left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict):
            continue
        if isinstance(record.get("time"), str) and isinstance(record.get("kind"), str):
            yield Event(record.pop("time"), record.pop("kind"), record)


@dataclass
class StageState:
    """What is known of one stage of a run."""

    name: str
    status: StageStatus = "waiting"
    started: str | None = None
    seconds: float | None = None
    pid: int | None = None
    pid_started: float | None = None
    output: str | None = None
    key: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Run:
    """A run as its plan and events tell it. `status` never says running without a live worker:
    the reader that knows of the lock (`pipeline.load_run`) turns running into interrupted."""

    id: str
    plan: Plan
    status: RunStatus = "approved"
    stages: dict[str, StageState] = field(
        default_factory=lambda: {name: StageState(name) for name in STAGES}
    )
    scores: dict[str, Score] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    verdict: Verdict | None = None
    message: str = ""
    error: Mapping[str, str] | None = None
    started: str | None = None
    finished: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        """Whether it ended with scores; a run that was limited to its data ends without."""
        return self.status == "succeeded" and bool(self.scores)

    @property
    def settles(self) -> bool:
        """Whether its experiment need not be proposed again: it was done, is under way or failed."""
        if self.plan.proposal.limits.data_only:
            return False
        return self.status in ("succeeded", "failed", "running", "interrupted", "approved")

    def apply(self, event: Event) -> None:
        """Take one event into account.

        Raises:
            InvalidInput: If it is not what an event of its kind is.
        """
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is None:
            return
        try:
            handler(event)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(
                "Event log is damaged",
                f"runs/{self.id}/events.jsonl: {event.kind} of {event.time}: {error!r}",
                "restore it from git",
            ) from error

    def _on_run_started(self, event: Event) -> None:
        self.status = "running"
        self.started = self.started or event.time
        self.finished, self.error, self.message = None, None, ""

    def _on_stage_started(self, event: Event) -> None:
        self.stages[event.fields["stage"]] = StageState(
            name=event.fields["stage"],
            status="running",
            started=event.time,
            pid=event.fields.get("pid"),
            pid_started=event.fields.get("pid_started"),
            key=event.fields.get("key"),
        )

    def _on_stage_reused(self, event: Event) -> None:
        stage = self.stages[event.fields["stage"]]
        stage.status = "reused"
        stage.output, stage.key = event.fields.get("output"), event.fields.get("key")
        stage.result = event.fields.get("result") or {}

    def _on_progress(self, event: Event) -> None:
        stage = self.stages[event.fields["stage"]]
        stage.progress = event.fields
        loss = event.fields.get("loss")
        if loss is not None:
            step = event.fields["step"]
            while stage.losses and stage.losses[-1][0] >= step:
                stage.losses.pop()
            stage.losses.append((step, loss))

    def _on_stage_finished(self, event: Event) -> None:
        stage = self.stages[event.fields["stage"]]
        stage.status = _one_of(StageStatus, event.fields["status"])
        stage.seconds = event.fields.get("seconds")
        stage.output = event.fields.get("output")
        stage.result = event.fields.get("result") or {}
        stage.error = event.fields.get("error")

    def _on_score_recorded(self, event: Event) -> None:
        score = Score(**event.fields["score"])
        self.scores[score.benchmark] = score

    def _on_compared(self, event: Event) -> None:
        comparison = Comparison(**event.fields["comparison"])
        self.comparisons[comparison.benchmark] = comparison

    def _on_note(self, event: Event) -> None:
        self.notes.append(event.fields["text"])

    def _on_run_finished(self, event: Event) -> None:
        self.status = _one_of(RunStatus, event.fields["status"])
        verdict = event.fields.get("verdict")
        self.verdict = None if verdict is None else _one_of(Verdict, verdict)
        self.message = event.fields.get("message", "")
        self.error = event.fields.get("error")
        self.finished = event.time


def _one_of(words: Any, word: Any) -> Any:
    """Return a word of a `Literal`.

    Raises:
        ValueError: If it is none of them.
    """
    if word not in get_args(words):
        raise ValueError(f"{word!r} is none of {', '.join(get_args(words))}")
    return word


def fold(plan: Plan, events: Iterable[Event]) -> Run:
    """Return the run that a plan and its events describe.

    Raises:
        InvalidInput: If an event is not what one of its kind is.
    """
    run = Run(plan.run_id, plan)
    for event in events:
        run.apply(event)
    return run


def gpu_seconds(events: Iterable[Event]) -> float:
    """Return the wall time of training and evaluation, in seconds, summed over resumes.

    A stage whose worker died counts up to the last event that the worker wrote.
    """
    total, opened = 0.0, None
    last: datetime | None = None
    for event in events:
        time = datetime.fromisoformat(event.time)
        if event.kind == "stage_started" and event.fields["stage"] in GPU_STAGES:
            opened = opened or time
        elif event.kind in ("stage_finished", "run_started") and opened is not None:
            end = time if event.kind == "stage_finished" else last or time
            total += max(0.0, (end - opened).total_seconds())
            opened = None
        last = time
    if opened is not None and last is not None:
        total += max(0.0, (last - opened).total_seconds())
    return total


def dump_plan(plan: Plan) -> str:
    """Return a plan as YAML whose last line is the sha256 of the lines before it."""
    body = _yaml(asdict(plan) | {"proposal": plan.proposal.content()})
    return body + _seal(body.encode())


def dump_proposal(proposal: Proposal) -> str:
    """Return a proposal as YAML."""
    return _yaml(proposal.content())


def _yaml(value: Mapping[str, Any]) -> str:
    text: str = yaml.dump(
        _plain(value), Dumper=SafeDumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def load_plan(path: Path) -> Plan:
    """Read `plan.yaml`.

    Raises:
        InvalidInput: If the file is missing, is no plan, or was changed after approval.
    """
    try:
        content = path.read_bytes()
        raw = yaml.load(content, Loader=SafeLoader)
        proposal = proposal_from(raw["proposal"])
        known = {f.name: raw[f.name] for f in fields(Plan) if f.name != "inputs"}
        inputs = dict(raw.get("inputs", {}))
        plan = Plan(**{**known, "proposal": proposal, "inputs": inputs})
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput("Not a plan", f"{path}: {error}", "restore it from git") from error
    body, mark, _ = content.rpartition(b"\nseal: ")
    # Plans that are older than seals carry no inputs either, so they cannot be launched.
    is_sealed = bool(mark) and content == body + b"\n" + _seal(body + b"\n").encode()
    if plan.proposal.sha256 != plan.sha256 or not (is_sealed or set(raw) == _UNSEALED):
        raise InvalidInput(
            "Plan changed after approval",
            f"{path}: its content no longer has the sha256 that was approved",
            "restore it from git, or propose the change and approve it",
        )
    return plan


def _seal(body: bytes) -> str:
    return f"seal: {hashlib.sha256(body).hexdigest()}\n"


def proposal_from(raw: Mapping[str, Any]) -> Proposal:
    """Build a proposal from plain data as `Proposal.content` gives it.

    Raises:
        KeyError, TypeError: If a field is missing or unknown.
    """
    values = dict(raw)
    values["evidence"] = tuple(values["evidence"])
    values["cost"] = Cost(**values["cost"])
    predictions = values.get("predictions", ())
    values["predictions"] = tuple(Prediction(**prediction) for prediction in predictions)
    values["alternatives"] = tuple(values.get("alternatives", ()))
    values["limits"] = Limits(**values.get("limits", {}))
    return Proposal(**values)


def _plain(value: Any) -> Any:
    """Turn tuples into lists so that YAML stays free of Python tags."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
