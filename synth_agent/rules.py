"""Standing rules: what a person approves in advance, within a budget and until a date.

Owns `rules.yaml` of the workspace, which only `add` and `revoke` write; an entry that was edited
otherwise no longer has its sha256 and is void. Planners do not import this module.
"""

from __future__ import annotations

import fcntl
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from synth_agent import journal, pipeline
from synth_agent.data import atomic_file
from synth_agent.errors import Conflict, InvalidInput, nearest
from synth_agent.gate import changed_inputs, with_limits
from synth_agent.recipe_policy import REVIEWED_OPERATORS
from synth_agent.recipes import (
    does_same,
    list_recipes,
    load_catalogue,
    recipe_from_mapping,
    steps_of,
)
from synth_agent.runs import Plan, Proposal, Run, digest, load_plan, now
from synth_agent.workspace import Workspace

RuleKind = Literal["replicates", "recipes", "filters"]
KINDS: tuple[RuleKind, ...] = ("replicates", "recipes", "filters")
DEFAULT_DAYS = 7.0
_MOST_DAYS = 3650
_USE = re.compile(r"rule (r[0-9]+) of .+")
_ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Rule:
    """What may be approved in a person's name."""

    id: str
    kind: RuleKind
    gpu_hours: float
    """Of training and evaluation, over all runs that the rule approves."""
    max_runs: int
    by: str
    at: str
    expires: str
    settings_sha256: str
    """Digest of the settings that a run must have; their seed is free."""
    recipes: Mapping[str, str] = field(default_factory=dict)
    """Digests of the recipes by name; empty for `filters`."""
    run: str = ""
    """Whose replicates are meant."""
    revoked_by: str = ""
    revoked_at: str = ""

    @property
    def sha256(self) -> str:
        """Digest of all of it."""
        return digest(asdict(self))

    def words(self) -> str:
        """Return the rule as a sentence."""
        what = {
            "replicates": f"replicates of {self.run}",
            "recipes": f"the recipes {', '.join(self.recipes)}",
            "filters": "recipes of filters only",
        }[self.kind]
        revoked = f"; revoked by {self.revoked_by} on {self.revoked_at}" if self.revoked_by else ""
        return (
            f"{what}, up to {self.gpu_hours:g} GPU-hours and {self.max_runs} runs, until "
            f"{self.expires[:16]} UTC, by {self.by}{revoked}"
        )


@dataclass(frozen=True)
class Standing:
    """A rule of the file, what it has spent, and why it approves nothing, if it does not."""

    id: str
    rule: Rule | None
    problem: str
    """Empty while the rule stands."""
    runs: tuple[str, ...] = ()
    gpu_hours: float = 0.0
    """Measured for runs that ended; reserved up to their limit for those that did not."""

    def words(self) -> str:
        """Return the rule, what it has spent and whether it stands, as a sentence."""
        if self.rule is None:
            return f"{self.id}  {self.problem}"
        return (
            f"{self.id}  {self.rule.words()}; used {len(self.runs)} runs, {self.gpu_hours:.2g} "
            f"GPU-hours; {self.problem or 'stands'}"
        )

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for `--json`."""
        return {**asdict(self), "stands": not self.problem}

    @property
    def hours_left(self) -> float:
        return max(0.0, self.rule.gpu_hours - self.gpu_hours) if self.rule else 0.0


def add(
    workspace: Workspace,
    *,
    kind: RuleKind,
    gpu_hours: float,
    max_runs: int,
    by: str,
    days: float = DEFAULT_DAYS,
    run: str = "",
    recipes: Sequence[str] = (),
) -> Rule:
    """Write a rule in the name of a person and commit it.

    Args:
        workspace: The workspace.
        kind: `replicates` (of `run`), `recipes` (those named), or `filters`.
        gpu_hours: Budget over all of its runs.
        max_runs: How many runs it may approve.
        by: Name of the person who makes it.
        days: Until it expires.
        run: Id of an approved run, for `replicates`.
        recipes: Names of recipes of the workspace, for `recipes`.

    Raises:
        InvalidInput: Naming the field that is wrong.
        Conflict: If the run was not approved as it is, or its inputs changed.
    """
    _check_numbers(gpu_hours=gpu_hours, days=days)
    if days > _MOST_DAYS:
        raise InvalidInput("Bad rule", f"days = {days:g}", f"give at most {_MOST_DAYS} days")
    pipeline.check_person(by)
    if type(max_runs) is not int or max_runs < 1:
        raise InvalidInput("Bad rule", f"max_runs = {max_runs!r}", "give a whole number from 1")
    if kind not in KINDS:
        raise InvalidInput("Bad rule", f"kind = {kind!r}", nearest(str(kind), KINDS))
    if bool(run) != (kind == "replicates") or bool(recipes) != (kind == "recipes"):
        raise InvalidInput(
            "Bad rule",
            f"{kind}: run = {run!r}, recipes = {tuple(recipes)!r}",
            "replicates need a run id, recipes need names, filters need neither",
        )
    settings, digests = _covered(workspace, run, recipes)
    made = datetime.now(UTC)
    with _one_writer(workspace):
        entries = _read(workspace)
        rule = Rule(
            id=_next_id(workspace, entries),
            kind=kind,
            gpu_hours=float(gpu_hours),
            max_runs=max_runs,
            by=by,
            at=made.isoformat(timespec="milliseconds"),
            expires=(made + timedelta(days=days)).isoformat(timespec="milliseconds"),
            settings_sha256=settings,
            recipes=digests,
            run=run,
        )
        _write(workspace, [*entries, _entry(rule)], f"rules: {rule.id} added", rule.id)
    return rule


def revoke(workspace: Workspace, rule_id: str, *, by: str) -> Rule:
    """End a rule. Runs that it approved go on; they are cancelled like any other.

    Raises:
        InvalidInput: If there is no such rule, or it is void already.
    """
    pipeline.check_person(by)
    with _one_writer(workspace):
        entries = _read(workspace)
        places = [i for i, entry in enumerate(entries) if entry.get("id") == rule_id]
        rule = _parse(entries[places[0]]) if len(places) == 1 else None
        if rule is None:
            known = [str(entry.get("id")) for entry in entries]
            raise InvalidInput(
                "No such rule",
                f"{rules_file(workspace)}: {rule_id!r} is missing, doubled or void",
                nearest(rule_id, known) if known else "there are no rules",
            )
        revoked = replace(rule, revoked_by=by, revoked_at=now())
        entries[places[0]] = _entry(revoked)
        _write(workspace, entries, f"rules: {rule_id} revoked", rule_id)
    return revoked


def standing(workspace: Workspace, *, at: datetime | None = None) -> tuple[Standing, ...]:
    """Return every rule of the file with what it has spent.

    Raises:
        InvalidInput: If `rules.yaml` or a run cannot be read, so that nothing can be counted.
    """
    entries = _read(workspace)
    if not entries:
        return ()
    runs = pipeline.list_runs(workspace)
    names = [str(entry.get("id")) for entry in entries]
    return tuple(
        _standing(workspace, entry, names.count(name) > 1, runs, at or datetime.now(UTC))
        for name, entry in zip(names, entries, strict=True)
    )


def refusal(workspace: Workspace, state: Standing, proposal: Proposal) -> str:
    """Return why a rule does not cover a proposal; empty when it does."""
    rule = state.rule
    if rule is None or state.problem:
        return state.problem
    if digest(_settings(proposal.settings)) != rule.settings_sha256:
        return "its settings are not those that the rule was made for"
    seconds = proposal.cost.seconds
    if seconds is not None and seconds > state.hours_left * 3600:
        return f"it needs about {seconds / 3600:.2g} h, {state.hours_left:.2g} h are left"
    if rejected := _rejected_since(workspace, rule, proposal):
        return rejected
    name = str(proposal.recipe.get("name", ""))
    if rule.kind == "filters":
        return _other_operators(proposal)
    if name not in rule.recipes:
        return f"recipe {name!r} is not one of the rule's"
    if _recipe_digest(proposal.recipe) != rule.recipes[name]:
        return f"recipe {name!r} is not as it was when the rule was made"
    if rule.kind == "replicates":
        changed = changed_inputs(workspace, load_plan(workspace.run(rule.run).plan))
        if changed:
            return f"not what {rule.run} ran on: {', '.join(changed)} changed"
    return ""


def _rejected_since(workspace: Workspace, rule: Rule, proposal: Proposal) -> str:
    """Return who turned the same down after the rule was made, and why; empty when nobody did."""
    settings = _settings(proposal.settings)
    for rejection in pipeline.list_rejections(workspace):
        other = rejection.proposal
        # Both times are written by this program, in UTC to the millisecond.
        is_same = rejection.at >= rule.at and _settings(other.settings) == settings
        if is_same and does_same(other.recipe, proposal.recipe):
            return f"{rejection.by} rejected it ({rejection.id}): {rejection.reason}"
    return ""


def find_rule(workspace: Workspace, proposal: Proposal) -> tuple[Standing | None, tuple[str, ...]]:
    """Return the first rule that covers a proposal, and why each rule before it does not."""
    refusals: list[str] = []
    for state in standing(workspace):
        reason = refusal(workspace, state, proposal)
        if not reason:
            return state, tuple(refusals)
        refusals.append(f"{state.id}: {reason}")
    return None, tuple(refusals)


def approve_under(
    workspace: Workspace, rule_id: str, proposal: Proposal, *, most_hours: float = math.inf
) -> Plan:
    """Approve a proposal in the name of the person who made a rule.

    What runs is limited to the hours that the rule has left, or fewer.

    Raises:
        Conflict: If the rule does not cover it at this moment.
        InvalidInput: If the proposal is not valid.
    """
    pipeline.validate(workspace, proposal)
    with _one_writer(workspace):
        state = next((s for s in standing(workspace) if s.id == rule_id), None)
        reason = refusal(workspace, state, proposal) if state else "there is no such rule"
        if reason or state is None or state.rule is None:
            raise Conflict("Rule does not cover it", f"{rule_id}: {reason}", "ask for approval")
        own = proposal.limits.gpu_hours
        hours = min(state.hours_left, most_hours, math.inf if own is None else own)
        limited = with_limits(proposal, replace(proposal.limits, gpu_hours=hours))
        return pipeline.approve(
            workspace,
            limited,
            shown_sha256=limited.sha256,
            approver=state.rule.by,
            rule=rule_id,
        )


def rule_of(plan: Plan) -> str | None:
    """Return the id of the rule that approved a plan; None when a person did."""
    match = _USE.fullmatch(plan.approver)
    return match[1] if match else None


def rules_file(workspace: Workspace) -> Path:
    """Return where the rules are."""
    return workspace.root / "rules.yaml"


def _covered(workspace: Workspace, run: str, recipes: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the digests of the settings and of the recipes that a rule is made for."""
    if run:
        plan = pipeline.load_approved(workspace, run)
        changed = changed_inputs(workspace, plan)
        if changed:
            raise Conflict(
                "Not what was approved",
                f"{run}: changed since: {', '.join(changed)}",
                "approve and run it again, then make the rule for that run",
            )
        name = str(plan.proposal.recipe.get("name", ""))
        settings = digest(_settings(plan.proposal.settings))
        return settings, {name: _recipe_digest(plan.proposal.recipe)}
    known = {recipe.name: recipe for recipe in list_recipes(workspace)} if recipes else {}
    missing = [name for name in recipes if name not in known]
    if missing:
        raise InvalidInput(
            "No such recipe", f"{missing[0]!r} in {workspace.recipes}", nearest(missing[0], known)
        )
    found = {name: _recipe_digest(known[name].mapping()) for name in recipes}
    return digest(_settings(workspace.settings.model_dump(mode="json"))), found


_SETTINGS = ("data", "model", "pretrain", "finetune", "evaluate")


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a rule binds: all but the seed and the machine's."""
    return {section: settings[section] for section in _SETTINGS if section in settings}


def _recipe_digest(mapping: Mapping[str, Any]) -> str:
    return digest({key: value for key, value in mapping.items() if key != "name"})


def _other_operators(proposal: Proposal) -> str:
    """Return why a recipe does more than leave samples out; empty when it does not."""
    mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
    recipe = recipe_from_mapping(str(proposal.recipe.get("name", proposal.slug)), mapping)
    if recipe.data_plan is not None:
        return f"it is a data plan with {', '.join(steps_of(mapping))}, not a list of filters"
    catalogue = load_catalogue()
    for operator in recipe.operators:
        spec = catalogue.operators.get(operator.name)
        if spec is None or spec.kind != "filter" or operator.name not in REVIEWED_OPERATORS:
            kind = spec.kind if spec else "unknown"
            return f"{operator.name} is not a reviewed filter ({kind})"
    return ""


def _standing(
    workspace: Workspace,
    entry: Mapping[str, Any],
    is_doubled: bool,
    runs: Sequence[Run],
    at: datetime,
) -> Standing:
    rule_id, rule = str(entry.get("id")), _parse(entry)
    if rule is None:
        return Standing(rule_id, None, "void: it was not written by `synth-agent rules`")
    used = [run for run in runs if rule_of(run.plan) == rule.id]
    hours = sum(_hours(workspace, run) for run in used)
    problem = ""
    if is_doubled:
        problem = "void: its id occurs twice"
    elif rule.revoked_by:
        problem = f"revoked by {rule.revoked_by}"
    elif datetime.fromisoformat(rule.expires) <= at:
        problem = f"expired on {rule.expires[:16]} UTC"
    elif len(used) >= rule.max_runs:
        problem = f"its {rule.max_runs} runs are used up"
    elif pipeline.is_cap_reached(rule.gpu_hours, hours * 3600):
        problem = f"its {rule.gpu_hours:g} GPU-hours are used up"
    return Standing(rule_id, rule, problem, tuple(run.id for run in used), hours)


def _hours(workspace: Workspace, run: Run) -> float:
    measured = pipeline.gpu_seconds_of(workspace, run.id) / 3600
    limit = run.plan.proposal.limits.gpu_hours
    return measured if run.status in _ENDED or limit is None else max(measured, limit)


def _parse(entry: Mapping[str, Any]) -> Rule | None:
    """Return the rule that an entry holds, or None if the entry is not as it was written."""
    values = {key: value for key, value in entry.items() if key != "sha256"}
    if set(values) != {f.name for f in fields(Rule)}:
        return None
    try:
        rule = Rule(**values)
        return rule if rule.sha256 == entry.get("sha256") else None
    except (TypeError, ValueError):
        return None


def _entry(rule: Rule) -> dict[str, Any]:
    return {**asdict(rule), "sha256": rule.sha256}


def _next_id(workspace: Workspace, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return an id that no entry and no run's approval has, so that budgets never mix."""
    names = [str(entry.get("id")) for entry in entries]
    names += [rule_of(run.plan) or "" for run in pipeline.list_runs(workspace)]
    numbers = [int(name[1:]) for name in names if re.fullmatch(r"r[0-9]+", name)]
    return f"r{max(numbers, default=0) + 1}"


def _read(workspace: Workspace) -> list[dict[str, Any]]:
    path = rules_file(workspace)
    if not path.exists():
        return []
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
        entries = (raw or {})["rules"] if raw else []
        if not all(isinstance(entry, dict) for entry in entries):
            raise TypeError("an entry is not a mapping")
        return list(entries)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InvalidInput("Rules cannot be read", f"{path}: {error}", "restore it from git") from (
            error
        )


def _write(
    workspace: Workspace, entries: Sequence[Mapping[str, Any]], message: str, rule_id: str
) -> None:
    path = rules_file(workspace)
    with atomic_file(path) as file:
        file.write("# Written by `synth-agent rules`. An entry that is edited by hand is void.\n")
        yaml.safe_dump({"rules": list(entries)}, file, sort_keys=False, allow_unicode=True)
    journal.commit(workspace, [path], message, {"Rule": rule_id})


@contextmanager
def _one_writer(workspace: Workspace) -> Iterator[None]:
    """Let one process at a time change rules or spend their budgets."""
    workspace.artifacts.mkdir(parents=True, exist_ok=True)
    with (workspace.artifacts / "rules.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise InvalidInput("Bad rule", f"{name} = {value!r}", "give a number above 0")
