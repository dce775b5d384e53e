"""Running experiments within standing rules until a reason to stop comes up.

The loop proposes, finds the first rule that covers the proposal, approves it in the name of the
person who made the rule, launches it and waits. What no rule covers is left to a person.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from synth_agent import drafts, pipeline, rules
from synth_agent.errors import Conflict, InvalidInput, SynthAgentError
from synth_agent.headless import follow, narrate
from synth_agent.planner import Planner
from synth_agent.proposal_words import proposal_text
from synth_agent.runs import Plan, Proposal, Run
from synth_agent.wording import duration
from synth_agent.workspace import Workspace

StopCode = Literal[
    "budget",
    "runs",
    "not covered",
    "invalid",
    "nothing to propose",
    "failed twice",
    "cancelled",
    "stopped by a person",
    "error",
]
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_LEAST_SECONDS = 1.0
Launch = Callable[[Workspace, Plan], int]
Wait = Callable[[Workspace, str], Run]


@dataclass(frozen=True)
class Stop:
    """Why the loop stopped, and what it did."""

    code: StopCode
    reason: str
    hint: str
    """How to go on."""
    runs: tuple[str, ...]
    """Ids of the runs that it started, in order."""
    proposal: Proposal | None = None
    """What waits for a person's decision."""

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for `--json`."""
        return {
            "stopped": self.code,
            "reason": self.reason,
            "hint": self.hint,
            "runs": list(self.runs),
            "proposal": self.proposal.sha256 if self.proposal else None,
        }


def budget_seconds(text: str) -> float:
    """Read a duration such as `6h`, `90m`, `1h30m` or `2.5h`.

    Raises:
        InvalidInput: If it is no duration above zero.
    """
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in (match.groups() if match else "000"))
    total = 3600 * hours + 60 * minutes + seconds
    if match is None or total <= 0:
        raise InvalidInput("Bad budget", repr(text), "give a duration such as 6h, 90m or 1h30m")
    return total


class Auto:
    """One unattended session. `run` returns when it stops; nothing runs on without its run's limit.

    Args:
        workspace: The workspace.
        planner: Who proposes.
        seconds: Wall time for the session, from the call of `run`.
        most_runs: How many runs it may start; None for no limit of its own.
        say: Takes lines for people.
        launch: Starts a plan.
        wait: Returns a run when it ended.
    """

    def __init__(
        self,
        workspace: Workspace,
        planner: Planner,
        *,
        seconds: float,
        most_runs: int | None = None,
        say: Callable[[str], None] = narrate,
        launch: Launch = pipeline.launch,
        wait: Wait = follow,
    ) -> None:
        if most_runs is not None and most_runs < 1:
            raise InvalidInput("Bad number", f"max-runs = {most_runs}", "give 1 or more")
        self._workspace, self._planner = workspace, planner
        self._seconds, self._most_runs = seconds, most_runs
        self._say, self._launch, self._wait = say, launch, wait
        self._runs: list[str] = []
        self._failures: set[str] = set()
        self._live: str | None = None
        self._end = 0.0

    def run(self) -> Stop:
        """Work until there is a reason to stop, and return it."""
        self._end = time.monotonic() + self._seconds
        try:
            stop = self._finish_earlier()
            while stop is None:
                stop = self._one_run()
            return stop
        except KeyboardInterrupt:
            return self._interrupted()
        except SynthAgentError as error:
            reason = f"{error.title}: {error.message}"
            return Stop("error", reason, error.hint, tuple(self._runs))

    def _finish_earlier(self) -> Stop | None:
        """Wait for a live run; then finish the runs that a rule approved and that did not end."""
        live = pipeline.live_run(self._workspace)
        if live is not None:
            self._say(f"waiting for {live}, which is live")
            self._follow(live)
        standing = {s.id: s for s in rules.standing(self._workspace)}
        for run in pipeline.list_runs(self._workspace):
            rule = rules.rule_of(run.plan)
            if rule is None or run.status not in ("approved", "interrupted"):
                continue
            state = standing.get(rule)
            # A rule whose runs or hours are used up is used up by this very run.
            if state is None or state.rule is None or not _goes_on(state):
                self._say(f"{run.id} is left: {rule} does not stand any more")
                continue
            if (stop := self._no_room(run)) is not None:
                return stop
            self._say(f"{run.id} goes on, as {rule} approved it")
            try:
                stop = self._start(run.plan)
            except Conflict as error:
                self._say(f"{run.id} is left: {error}")
                continue
            if stop is not None:
                return stop
        return None

    def _no_room(self, earlier: Run | None = None) -> Stop | None:
        """Return why no run is started, or not that earlier one; None when there is room."""
        if self._most_runs is not None and len(self._runs) >= self._most_runs:
            return self._stop("runs", f"{len(self._runs)} runs were started, as many as allowed")
        if self._left() < _LEAST_SECONDS:
            return self._budget_spent()
        needed = None if earlier is None else earlier.plan.proposal.cost.seconds
        if earlier is None or needed is None:
            return None
        needed -= sum(stage.seconds or 0.0 for stage in earlier.stages.values())
        if needed <= self._left():
            return None
        reason = (
            f"{earlier.id}, which is approved, needs about {duration(needed)} more, "
            f"{duration(self._left())} is left"
        )
        return self._stop("budget", reason)

    def _one_run(self) -> Stop | None:
        if (stop := self._no_room()) is not None:
            return stop
        history = pipeline.list_runs(self._workspace)
        rejections = pipeline.list_rejections(self._workspace)
        proposal = self._planner.propose(self._workspace, history, rejections)
        if proposal is None:
            return self._stop("nothing to propose", "the planner has nothing left to propose")
        needed = proposal.cost.seconds
        if needed is not None and needed > self._left():
            reason = (
                f"the next run needs about {duration(needed)}, {duration(self._left())} is left"
            )
            return self._ask("budget", reason, proposal)
        try:
            pipeline.validate(self._workspace, proposal)
        except InvalidInput as error:
            return self._ask("invalid", f"the next proposal is not valid: {error}", proposal)
        state, refusals = rules.find_rule(self._workspace, proposal)
        if state is None:
            words = "; ".join(refusals) or "there are no rules"
            return self._ask("not covered", f"no rule covers the proposal ({words})", proposal)
        return self._approve(state.id, proposal)

    def _approve(self, rule_id: str, proposal: Proposal) -> Stop | None:
        hours = self._left() / 3600
        try:
            plan = rules.approve_under(self._workspace, rule_id, proposal, most_hours=hours)
        except Conflict as error:
            return self._ask("not covered", str(error), proposal)
        self._say(f"{plan.run_id} approved by {plan.approver}: {plan.proposal.title}")
        return self._start(plan)

    def _start(self, plan: Plan) -> Stop | None:
        self._live = plan.run_id
        self._launch(self._workspace, plan)
        self._runs.append(plan.run_id)
        return self._judge(self._follow(plan.run_id))

    def _follow(self, run_id: str) -> Run:
        self._live = run_id
        run = self._wait(self._workspace, run_id)
        self._live = None
        return run

    def _judge(self, run: Run) -> Stop | None:
        """Return why the loop ends with this run, or None."""
        if run.status == "cancelled":
            cap = run.plan.proposal.limits.gpu_hours
            spent = pipeline.gpu_seconds_of(self._workspace, run.id)
            if cap is not None and pipeline.is_cap_reached(cap, spent):
                return self._stop("budget", f"{run.id} was {run.message}")
            return self._stop("cancelled", f"{run.id} was cancelled by a person")
        if run.status in ("interrupted", "approved"):
            return self._stop("cancelled", f"the worker of {run.id} was killed")
        if run.status == "failed":
            failure = failure_of(run)
            if failure in self._failures:
                return self._stop("failed twice", f"{run.id} failed like one before: {failure}")
            self._failures.add(failure)
            self._say(f"{run.id} failed: {failure}")
        return None

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _budget_spent(self) -> Stop:
        return self._stop("budget", f"the budget of {duration(self._seconds)} is spent")

    def _ask(self, code: StopCode, reason: str, proposal: Proposal) -> Stop:
        drafts.keep(self._workspace, proposal)
        self._say(proposal_text(self._workspace, proposal))
        hint = f"decide yourself: synth-agent approve {proposal.sha256[:12]}"
        return Stop(code, reason, hint, tuple(self._runs), proposal)

    def _stop(self, code: StopCode, reason: str) -> Stop:
        hints: dict[str, str] = {
            "budget": "start it again with a budget, or look at `synth-agent rules list`",
            "runs": "start it again for more",
            "nothing to propose": "add a recipe to recipes/, or propose one by name",
            "failed twice": "see the log of the failed run, correct the cause and resume it",
            "cancelled": "resume the run, or start again to go on with the next",
        }
        return Stop(code, reason, hints.get(code, ""), tuple(self._runs))

    def _interrupted(self) -> Stop:
        # The worker has a session of its own: nothing of what runs is touched.
        live = pipeline.live_run(self._workspace)
        reason = "stopped on request; no run is live"
        hint = "go on with: synth-agent auto"
        if live is not None:
            reason = f"stopped on request; {live} goes on by itself"
            hint = (
                f"follow it with: synth-agent watch {live}; end it with: synth-agent cancel {live}"
            )
        elif self._live is not None:
            reason = f"stopped on request; {self._live} is approved and was not started"
            hint = f"start it with: synth-agent resume {self._live}"
        return Stop("stopped by a person", reason, hint, tuple(self._runs))


def failure_of(run: Run) -> str:
    """Return how a run failed: the stage and the error's title and first line, without numbers."""
    stage = next((s.name for s in run.stages.values() if s.status == "failed"), "start")
    error = run.error or {}
    first = str(error.get("message", "")).split("\n", 1)[0].replace(run.id, "RUN")
    return f"{stage}: {error.get('title', 'failed')}: {re.sub(r'[0-9]+', 'N', first)}"


def report(stop: Stop, *, as_json: bool) -> None:
    """Print why the loop stopped: JSON to stdout, or lines for people."""
    if as_json:
        print(json.dumps(stop.data()))
        return
    narrate(f"stopped: {stop.reason}")
    if stop.hint:
        narrate(f"what to do: {stop.hint}")


def _goes_on(state: rules.Standing) -> bool:
    return not state.problem or state.problem.endswith("used up")
