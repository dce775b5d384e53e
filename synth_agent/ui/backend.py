"""What the app asks of the rest: one protocol, and its implementation over a workspace.

The app knows nothing else of the pipeline, the planner, recipes or git. Every method may touch the
disk, so the app calls them in threads only. Modules are imported when first needed, which keeps the
first paint fast.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from synth_agent.changes import OperatorChanges, read_changes
from synth_agent.errors import InvalidInput
from synth_agent.runs import Comparison, EventTail, Limits, Plan, Proposal, Rejection, Run
from synth_agent.ui.questions import Question, read_questions

if TYPE_CHECKING:
    from synth_agent.effective import Effective
    from synth_agent.overview import Overview, Relations
    from synth_agent.planner.conversation import Conversation
    from synth_agent.recipes import DiffLine, Recipe
    from synth_agent.rules import Standing
    from synth_agent.workspace import Workspace

OperatorExamples = tuple[str, list[str], list[str]]
"""An operator with its counts, and samples that it keeps and drops, as text."""
_LOG_BYTES = 64 * 1024
_LOG_LINES = 400
_BINS = 24
_EXAMPLES = 4
MOST_ALTERNATIVES = 3
"""Proposals side by side, the one that is being looked at included."""


@dataclass(frozen=True)
class Notebook:
    """Everything the workspace's history says at one moment."""

    runs: tuple[Run, ...]
    """Oldest first."""
    rejections: tuple[Rejection, ...]
    live: str | None
    """Id of the run that a worker works on."""
    pending_commits: int = 0
    """Commits that git refused so far; they are made later."""
    damaged: tuple[str, ...] = ()
    """What is wrong with each run that cannot be read."""
    calibration: tuple[str, ...] = ()
    """How well each predictor did, in words, once there are enough runs to say so."""

    def run(self, run_id: str | None) -> Run | None:
        """Return a run by its id."""
        return next((run for run in self.runs if run.id == run_id), None)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe that a person can ask for."""

    name: str
    title: str
    reason: str


class Backend(Protocol):
    """The calls that the app needs. All may block; errors are `SynthAgentError`."""

    @property
    def root(self) -> Path: ...
    @property
    def goal(self) -> str: ...
    @property
    def baseline(self) -> str:
        """Name of the baseline recipe."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """The user's weighting of the benchmarks; mostly empty."""
        ...

    def without_secrets(self, text: str) -> str: ...
    def app_log(self) -> Path: ...
    def notebook(self) -> Notebook: ...
    def run(self, run_id: str) -> Run: ...
    def live_run(self) -> str | None: ...
    def events(self, run_id: str) -> EventTail: ...
    def log_lines(self, run_id: str, stage: str) -> list[str]: ...
    def next_proposal(self) -> Proposal | None: ...
    def recipes(self) -> list[RecipeChoice]: ...
    def proposal_of(self, recipe_name: str) -> Proposal: ...
    def recipe_text(self, proposal: Proposal) -> str: ...
    def edited(self, proposal: Proposal, text: str) -> Proposal: ...
    def limited(self, proposal: Proposal, limits: Limits) -> Proposal: ...
    def alternatives(self, proposal: Proposal) -> tuple[Proposal, ...]: ...
    def expected_effective(self, proposal: Proposal) -> Effective | None: ...
    def validate(self, proposal: Proposal) -> None: ...
    def difference(self, proposal: Proposal) -> list[DiffLine]: ...
    def difference_of_runs(self, earlier: str, later: str) -> list[DiffLine]: ...
    def approve(self, proposal: Proposal, shown_sha256: str) -> Plan: ...
    def reject(self, proposal: Proposal, reason: str) -> str: ...
    def launch(self, plan: Plan) -> None: ...
    def resume(self, run_id: str) -> None: ...
    def cancel(self, run_id: str) -> None: ...
    def compare(self, earlier: str, later: str) -> list[Comparison]: ...
    def early_words(self, run: Run, history: Sequence[Run]) -> tuple[str, ...]: ...
    def questions(self, run: Run) -> list[Question]: ...
    def changes(self, run: Run) -> list[OperatorChanges]: ...
    def overview(self) -> Overview | None: ...
    def analyze(
        self, report: Callable[[Mapping[str, Any]], None], is_cancelled: Callable[[], bool]
    ) -> list[str]: ...
    def relations(self, recipe_name: str) -> Relations | None: ...
    def examples(self, recipe_name: str) -> list[OperatorExamples]: ...
    def conversation(self) -> Conversation | None: ...
    def planner_words(self) -> str: ...
    def exchanges(self) -> Path: ...
    def rules(self) -> tuple[Standing, ...]: ...
    def revoke(self, rule_id: str) -> None: ...


class WorkspaceBackend:
    """The backend over a real workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._known_files: dict[str, list[tuple[str, int, int]]] = {}
        self._notebook: Notebook | None = None
        self._conversation: Conversation | None = None

    @property
    def root(self) -> Path:
        return self._workspace.root

    @property
    def goal(self) -> str:
        return self._workspace.settings.goal

    @property
    def baseline(self) -> str:
        return self._workspace.settings.baseline

    @property
    def weights(self) -> Mapping[str, float]:
        return self._workspace.settings.weights

    def without_secrets(self, text: str) -> str:
        """Return a text as it may be shown, sent and kept: no key and no password is in it."""
        from synth_agent.secrets import redact
        from synth_agent.workspace import known_secrets

        return redact(text, known_secrets())

    def app_log(self) -> Path:
        """Return where the app writes its own defects."""
        return self._workspace.artifacts / "logs" / "app.log"

    def notebook(self) -> Notebook:
        """Return the history; only runs whose files or liveness changed are read again."""
        from synth_agent import journal, pipeline

        live = pipeline.live_run(self._workspace)
        files = self._files()
        refused = len(journal.pending(self._workspace))
        known = self._notebook
        state = (live, refused, files)
        if known is not None and state == (known.live, known.pending_commits, self._known_files):
            return known
        found: list[str] = []
        runs = self._changed_runs(known, files, live)
        if runs is None:
            runs = tuple(pipeline.list_runs(self._workspace, lambda e: found.append(str(e))))
        rejections = pipeline.list_rejections(self._workspace, lambda e: found.append(str(e)))
        self._known_files = files
        words = calibration_words(runs)
        self._notebook = Notebook(runs, tuple(rejections), live, refused, tuple(found), words)
        return self._notebook

    def _changed_runs(
        self,
        known: Notebook | None,
        files: dict[str, list[tuple[str, int, int]]],
        live: str | None,
    ) -> tuple[Run, ...] | None:
        """Return the runs with those read that changed or came; None if all have to be read."""
        if known is None or known.damaged:
            return None
        changed = {name for name in files if files[name] != self._known_files.get(name)}
        changed |= {name for name in (live, known.live) if name is not None}
        kept = {run.id: run for run in known.runs if run.id not in changed}
        planned = [
            name
            for name, entries in files.items()
            if name[0].isdigit() and any(entry[0] == "plan.yaml" for entry in entries)
        ]
        try:
            return tuple(kept.get(name) or self.run(name) for name in planned)
        except InvalidInput:
            return None

    def _files(self) -> dict[str, list[tuple[str, int, int]]]:
        """Return name, size and time of the files of each run, by the run's folder."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for path in sorted(self._workspace.runs.glob("*/*")):
            if path.suffix in (".yaml", ".jsonl"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # removed meanwhile, or an editor's lock, which is a dangling link
                entry = (path.name, status.st_size, status.st_mtime_ns)
                found.setdefault(path.parent.name, []).append(entry)
        return found

    def run(self, run_id: str) -> Run:
        from synth_agent import pipeline

        return pipeline.load_run(self._workspace, run_id)

    def live_run(self) -> str | None:
        from synth_agent import pipeline

        return pipeline.live_run(self._workspace)

    def events(self, run_id: str) -> EventTail:
        return EventTail(self._workspace.run(run_id).events)

    def log_lines(self, run_id: str, stage: str) -> list[str]:
        """Return the last lines of a stage's log; none when it has not started."""
        path = self._workspace.logs(run_id) / f"{stage}.log"
        if not path.is_file():
            return []
        with path.open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(0, size - _LOG_BYTES))
            text = log.read().decode("utf-8", "replace")
        lines = text.split("\n")
        return [line for line in lines if line.strip()][-_LOG_LINES:]

    def next_proposal(self) -> Proposal | None:
        """Return what the planner would do next; None when there is nothing left."""
        from synth_agent import pipeline
        from synth_agent.planner import BuiltinPlanner

        return BuiltinPlanner().propose(
            self._workspace,
            pipeline.list_runs(self._workspace, lambda error: None),
            pipeline.list_rejections(self._workspace, lambda error: None),
        )

    def recipes(self) -> list[RecipeChoice]:
        from synth_agent.recipes import list_recipes

        return [
            RecipeChoice(recipe.name, recipe.title, recipe.reason)
            for recipe in list_recipes(self._workspace)
        ]

    def proposal_of(self, recipe_name: str) -> Proposal:
        """Return a proposal for a recipe of the workspace.

        Raises:
            InvalidInput: If there is no such recipe.
        """
        from synth_agent.errors import nearest
        from synth_agent.recipes import list_recipes

        recipes = {recipe.name: recipe for recipe in list_recipes(self._workspace)}
        if recipe_name not in recipes:
            raise InvalidInput(
                "No such recipe", f"{recipe_name!r} in recipes/", nearest(recipe_name, recipes)
            )
        return self._propose(recipes[recipe_name])

    def _propose(self, recipe: Recipe) -> Proposal:
        from synth_agent import pipeline
        from synth_agent.planner import propose_recipe

        history = pipeline.list_runs(self._workspace, lambda error: None)
        return propose_recipe(self._workspace, recipe, history)

    def recipe_text(self, proposal: Proposal) -> str:
        """Return a proposal's recipe as the YAML that a person edits."""
        import yaml

        mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
        return yaml.safe_dump(_plain(mapping), sort_keys=False, allow_unicode=True, width=100)

    def edited(self, proposal: Proposal, text: str) -> Proposal:
        """Return the proposal with its recipe replaced by an edited text, checked.

        Raises:
            InvalidInput: If the text is no YAML mapping or no recipe that may run.
        """
        from synth_agent.recipes import recipe_from_mapping

        name = str(proposal.recipe["name"])
        mapping = _recipe_mapping(text)
        if mapping == _plain({k: v for k, v in proposal.recipe.items() if k != "name"}):
            self.validate(proposal)
            return proposal
        if not name.endswith("-edited"):
            name = f"{name}-edited"
        recipe = replace(
            recipe_from_mapping(name, mapping),
            title=proposal.title,
            reason=f"{proposal.reason} Its recipe was edited by hand before the decision.",
        )
        edited = replace(
            self._with_settings(self._propose(recipe), recipe, proposal),
            title=proposal.title,
            reason=recipe.reason,
            proposed_by=_editor(proposal),
        )
        if proposal.limits != Limits():
            edited = self.limited(edited, proposal.limits)
        self.validate(edited)
        return edited

    def _with_settings(self, made: Proposal, recipe: Recipe, proposal: Proposal) -> Proposal:
        """Return a proposal for an edited recipe under the settings that were proposed with it."""
        if made.settings == proposal.settings:
            return made
        from synth_agent import pipeline
        from synth_agent.fit import estimate_cost
        from synth_agent.planner.builtin import predict

        history = pipeline.list_runs(self._workspace, lambda error: None)
        parent = next((run for run in history if run.id == proposal.parent), None)
        settings = proposal.settings
        return replace(
            made,
            kind=proposal.kind,
            parent=proposal.parent,
            evidence=proposal.evidence,
            settings=settings,
            cost=estimate_cost(self._workspace, recipe, settings, history),
            predictions=predict(self._workspace, recipe, settings, history, parent),
        )

    def limited(self, proposal: Proposal, limits: Limits) -> Proposal:
        """Return the part of a proposal that keeps to limits.

        Raises:
            InvalidInput: If a limit makes no sense or is wider than one that the proposal has.
        """
        from synth_agent.gate import with_limits

        return with_limits(proposal, limits)

    def alternatives(self, proposal: Proposal) -> tuple[Proposal, ...]:
        """Return the proposal and what the planner would do besides, each naming the others.

        The one that was given comes first, unless it is not valid; one alone means that there is
        nothing else to try.
        """
        from synth_agent.alternatives import propose_alternatives, side_by_side

        found = propose_alternatives(self._workspace, MOST_ALTERNATIVES)
        try:
            self.validate(proposal)
        except InvalidInput:
            return found
        others = [
            one
            for one in found
            if (one.recipe, one.settings["seed"]) != (proposal.recipe, proposal.settings["seed"])
        ]
        shown = (proposal, *others)[:MOST_ALTERNATIVES]
        return side_by_side(self._workspace, shown)

    def expected_effective(self, proposal: Proposal) -> Effective | None:
        """Return what training would see of a proposal's samples, None when nothing tells it."""
        from synth_agent.fit import expected_effective
        from synth_agent.recipes import recipe_from_mapping

        mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
        recipe = recipe_from_mapping(str(proposal.recipe["name"]), mapping)
        return expected_effective(self._workspace, recipe, proposal.settings)

    def validate(self, proposal: Proposal) -> None:
        """Check all that can be checked before it runs.

        Raises:
            InvalidInput: Naming what is wrong.
        """
        from synth_agent import pipeline
        from synth_agent.stages.warm import start_warm

        pipeline.validate(self._workspace, proposal)
        if self._workspace.settings.compute.warm_worker:
            # While the proposal is being read, so that an approved run does not wait for it.
            start_warm(self._workspace)

    def difference(self, proposal: Proposal) -> list[DiffLine]:
        """Return the recipe against its parent's, or against nothing for the first run."""
        parent = self.run(proposal.parent).plan.proposal.recipe if proposal.parent else None
        return _difference(parent, proposal.recipe)

    def difference_of_runs(self, earlier: str, later: str) -> list[DiffLine]:
        return _difference(
            self.run(earlier).plan.proposal.recipe, self.run(later).plan.proposal.recipe
        )

    def approve(self, proposal: Proposal, shown_sha256: str) -> Plan:
        from synth_agent import pipeline

        return pipeline.approve(
            self._workspace, proposal, shown_sha256=shown_sha256, approver=getpass.getuser()
        )

    def reject(self, proposal: Proposal, reason: str) -> str:
        from synth_agent import pipeline

        reason = self.without_secrets(reason)
        return pipeline.reject(self._workspace, proposal, reason=reason, by=getpass.getuser())

    def launch(self, plan: Plan) -> None:
        from synth_agent import pipeline

        pipeline.launch(self._workspace, plan)

    def resume(self, run_id: str) -> None:
        from synth_agent import pipeline

        pipeline.resume(self._workspace, run_id)

    def cancel(self, run_id: str) -> None:
        from synth_agent import pipeline

        pipeline.cancel(self._workspace, run_id)

    def compare(self, earlier: str, later: str) -> list[Comparison]:
        from synth_agent import verdicts

        return verdicts.compare_runs(self._workspace, earlier, later)

    def early_words(self, run: Run, history: Sequence[Run]) -> tuple[str, ...]:
        """Return what the run's loss so far says of its scores, with how often that was right."""
        from synth_agent.early import early_verdicts

        return tuple(one.words() for one in early_verdicts(run, history))

    def questions(self, run: Run) -> list[Question]:
        """Return the run's questions with predictions, each with its parent's score if known."""
        parent = run.plan.proposal.parent
        before: dict[tuple[str, str], float] = {}
        if parent is not None:
            for record in self._answered(self.run(parent)):
                before[record.benchmark, record.id] = record.score
        return [
            replace(record, parent_score=before.get((record.benchmark, record.id)))
            for record in self._answered(run)
        ]

    def changes(self, run: Run) -> list[OperatorChanges]:
        """Return some samples that the run's operators dropped or changed."""
        output = run.stages["process"].output
        return read_changes(self._workspace.path(output)) if output else []

    def overview(self) -> Overview | None:
        """Return the seed set's statistics, None before the first analysis."""
        from synth_agent import analysis

        return analysis.overview(self._workspace, _BINS)

    def analyze(
        self, report: Callable[[Mapping[str, Any]], None], is_cancelled: Callable[[], bool]
    ) -> list[str]:
        """Score what has no score yet, and return what could not be scored, in words."""
        from synth_agent import analysis
        from synth_agent.digests import Digests

        digests = Digests(self._workspace)
        wanted, skipped = analysis.wanted_operators(self._workspace, digests)
        digests.save()
        done = analysis.analyze(self._workspace, wanted, report, is_cancelled)
        problems = [f"{skip.operator}: {skip.why}" for skip in skipped]
        return problems + [
            f"{column['operator']}: {column['problem']}"
            for column in done["columns"]
            if column["problem"]
        ]

    def relations(self, recipe_name: str) -> Relations | None:
        """Return correlations and a recipe's drift, None before the first analysis."""
        from synth_agent import analysis

        return analysis.relations(self._workspace, recipe_name)

    def examples(self, recipe_name: str) -> list[OperatorExamples]:
        """Return each known operator of a recipe with samples that it keeps and drops, as text."""
        from synth_agent import analysis

        return analysis.example_lines(self._workspace, recipe_name, _EXAMPLES)

    def conversation(self) -> Conversation | None:
        """Return the talk with the workspace's model; None when no model is asked for.

        Raises:
            InvalidInput: If a setting or the key is missing.
        """
        from synth_agent.planner.factory import make_conversation

        if self._conversation is None:
            self._conversation = make_conversation(self._workspace)
        return self._conversation

    def planner_words(self) -> str:
        """Return which planner proposes and what its model has used, in one line."""
        from synth_agent.planner.factory import describe

        return describe(self._workspace)

    def exchanges(self) -> Path:
        """Return the file that exchanges with the model are appended to."""
        from synth_agent.planner.factory import session_transcript

        return session_transcript(self._workspace)

    def rules(self) -> tuple[Standing, ...]:
        """Return every standing rule with what it has spent."""
        from synth_agent import rules

        return rules.standing(self._workspace)

    def revoke(self, rule_id: str) -> None:
        """End a standing rule, in the name of the person at the keyboard."""
        from synth_agent import rules

        rules.revoke(self._workspace, rule_id, by=getpass.getuser())

    def _answered(self, run: Run) -> list[Question]:
        found: list[Question] = []
        pictures = Path(run.plan.proposal.settings["evaluate"]["textvqa"]["images"])
        for score in run.scores.values():
            path = self._workspace.path(score.predictions)
            if path.is_file():
                found += [
                    replace(question, picture=str(pictures / question.picture))
                    if question.picture
                    else question
                    for question in read_questions(path, score.benchmark)
                ]
        return found


def calibration_words(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return how well each predictor did, for those with enough runs."""
    if not any(run.plan.proposal.predictions for run in runs):
        return ()
    from synth_agent.planner.calibration import calibrate

    return tuple(one.words() for one in calibrate(runs) if one.is_shown)


def _recipe_mapping(text: str) -> dict[str, Any]:
    from synth_agent.recipe_yaml import read_mapping

    mapping = read_mapping(text, "recipe")
    if not isinstance(mapping, dict):
        raise InvalidInput("Not a recipe", "the text is not a mapping", "write `process:` first")
    return mapping


def _difference(parent: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> list[DiffLine]:
    from synth_agent.recipes import diff_recipes, recipe_from_mapping

    before = recipe_from_mapping(str(parent["name"]), parent) if parent is not None else None
    return list(diff_recipes(before, recipe_from_mapping(str(recipe["name"]), recipe)))


def _editor(proposal: Proposal) -> str:
    edit = f"{getpass.getuser()}, editing "
    return proposal.proposed_by if edit in proposal.proposed_by else edit + proposal.proposed_by


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
