"""From what a language model wrote to a proposal, or to the words that say what is wrong with it.

Owns the JSON schema of a model's proposal, the reading of its reply, and every check that a proposal
has to pass before a person sees it. Whatever the program can compute is computed here and never taken
from the model: the cost, the seed of a replicate, the digest, the settings that are not changed.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from synth_agent.errors import InvalidInput, SynthAgentError, nearest
from synth_agent.fit import estimate_cost
from synth_agent.imported import list_imported
from synth_agent.planner.builtin import workspace_settings
from synth_agent.planner.context import imported_name
from synth_agent.planner.fencing import cut, visible
from synth_agent.recipes import (
    Recipe,
    list_recipes,
    load_catalogue,
    materialise,
    operators_with_places,
    recipe_from_mapping,
    validate_recipe,
)
from synth_agent.runs import Kind, Prediction, Proposal, Rejection, Run, digest
from synth_agent.wording import BENCHMARK_NAMES
from synth_agent.workspace import TrainSettings, Workspace

MOST_CHARACTERS = 200_000
MOST_DEPTH = 24
_MOST_STARTS = 64
_KNOWN_FIELDS = frozenset({"kind", "recipe", "hypothesis", "parent", "predictions", "evidence"})
_LEAST_FIELDS = 2
_WRAPPERS = ("proposal", "arguments", "parameters")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
_COMPARED = ("data", "model", "evaluate")
"""Sections that have to be equal for two runs to be comparable."""

TRAINING_FIELDS: Mapping[str, tuple[float, float]] = {
    "learning_rate": (1e-8, 1.0),
    "projector_learning_rate": (1e-8, 1.0),
    "epochs": (0.01, 20),
    "micro_batch_size": (1, 1024),
    "warmup_ratio": (0, 0.5),
    "weight_decay": (0, 1),
    "lora_rank": (1, 1024),
    "lora_alpha": (0.1, 4096),
    "lora_dropout": (0, 0.9),
    "method": (0, 0),
}
"""Training settings that a model may change, with the bounds of those that are numbers."""
METHODS: Mapping[str, tuple[str, ...]] = {"pretrain": ("projector",), "finetune": ("full", "lora")}

Text = Annotated[str, Field(max_length=4000)]


class _Given(BaseModel):
    """A part of what the model wrote. Names that are not asked for are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _GivenPrediction(_Given):
    benchmark: Annotated[str, Field(max_length=40)]
    expected: float
    low: float
    high: float


class _GivenProposal(_Given):
    kind: Kind
    title: Annotated[str, Field(min_length=1, max_length=300)]
    name: Annotated[str, Field(max_length=200)] = ""
    parent: Annotated[str, Field(max_length=200)] | None = None
    recipe: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    reason: Annotated[Text, Field(min_length=1)]
    hypothesis: Annotated[Text, Field(min_length=1)]
    refuted_by: Annotated[Text, Field(min_length=1)]
    evidence: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=30)]
    predictions: Annotated[list[_GivenPrediction], Field(max_length=10)]


@dataclass(frozen=True)
class Known:
    """What a proposal is checked against."""

    runs: Sequence[Run]
    rejections: Sequence[Rejection] = ()
    shown: Sequence[Proposal] = ()
    """Proposals of this conversation that nobody has decided about."""
    recipes: Sequence[Recipe] | None = None
    """The workspace's recipes if they are loaded."""


def schema() -> dict[str, Any]:
    """Return the JSON schema of the object that the model is asked for."""
    step = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
        "required": ["name"],
    }
    steps = {"type": "array", "items": step}
    branch = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "process": steps,
            "repeat": {"type": "integer", "minimum": 1},
            "sample": {"type": ["object", "null"]},
        },
        "required": ["name", "process"],
    }
    recipe = {
        "type": ["object", "null"],
        "properties": {
            "process": steps,
            "branches": {"type": "array", "items": branch},
            "deduplicate": {"type": "boolean"},
            "order": {"type": "object"},
        },
    }
    text = {"type": "string"}
    properties = {
        "kind": {"type": "string", "enum": list(get_args(Kind))},
        "name": text,
        "title": text,
        "parent": {"type": ["string", "null"]},
        "recipe": recipe,
        "settings": {"type": "object", "properties": _settings_schema()},
        "reason": text,
        "hypothesis": text,
        "refuted_by": text,
        "evidence": {"type": "array", "items": text},
        "predictions": {"type": "array", "items": _prediction_schema()},
    }
    required = [name for name in properties if name not in ("name", "recipe", "settings")]
    return {"type": "object", "properties": properties, "required": required}


def _prediction_schema() -> dict[str, Any]:
    number = {"type": "number"}
    return {
        "type": "object",
        "properties": {
            "benchmark": {"type": "string", "enum": list(BENCHMARK_NAMES)},
            "expected": number,
            "low": number,
            "high": number,
        },
        "required": ["benchmark", "expected", "low", "high"],
    }


def _settings_schema() -> dict[str, Any]:
    fields = {
        name: {"type": "string"} if name == "method" else {"type": "number"}
        for name in TRAINING_FIELDS
    }
    section = {"type": "object", "properties": fields, "additionalProperties": False}
    return {"pretrain": section, "finetune": section, "seed": {"type": "integer"}}


def read_reply(workspace: Workspace, text: str, known: Known, *, proposed_by: str) -> Proposal:
    """Return the first proposal of a reply that passes every check.

    Args:
        workspace: What the proposal is for.
        text: The reply: one JSON object, or objects among other text.
        known: What was tried, rejected and shown.
        proposed_by: Name of the model, for the record.

    Raises:
        InvalidInput: There is no valid proposal; its words say what is wrong with the first one.
    """
    if known.recipes is None:
        known = replace(known, recipes=list_recipes(workspace))
    problem: SynthAgentError | None = None
    for found in _objects(text):
        try:
            return validated(workspace, found, known, proposed_by=proposed_by)
        except SynthAgentError as error:
            problem = problem or error
    assert problem is not None
    raise InvalidInput(problem.title, problem.message, problem.hint) from problem


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a reply that look like proposals.

    Raises:
        InvalidInput: There is none.
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidInput(
            "The reply is too long", f"{len(text)} characters", f"at most {MOST_CHARACTERS}"
        )
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    position, starts, found = text.find("{"), 0, 0
    problem = "it holds no JSON object"
    while position >= 0 and starts < _MOST_STARTS:
        starts += 1
        end = position + 1
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if starts == 1:
                problem = f"it is not valid JSON: {str(error)[:200] or 'nested too deeply'}"
        else:
            value = _unwrapped(value)
            if _looks_like_a_proposal(value):
                _check_depth(value)
                found += 1
                yield value
            elif starts == 1:
                problem = "its object has none of the fields of a proposal"
        position = text.find("{", end)
    if not found:
        raise InvalidInput(
            "No proposal in the reply", problem, "send one JSON object with the fields asked for"
        )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unwrapped(value: Any) -> Any:
    for name in _WRAPPERS:
        if isinstance(value, dict) and len(value) <= 2 and isinstance(value.get(name), dict):
            return value[name]
    return value


def _looks_like_a_proposal(value: object) -> bool:
    return isinstance(value, dict) and len(_KNOWN_FIELDS & value.keys()) >= _LEAST_FIELDS


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise InvalidInput(
        "The reply is nested too deeply", f"over {MOST_DEPTH} levels", "write plain values"
    )


def validated(
    workspace: Workspace, value: Mapping[str, Any], known: Known, *, proposed_by: str
) -> Proposal:
    """Return the proposal that an object describes, every computed part computed.

    Raises:
        InvalidInput: naming the field and the fix.
    """
    given = _given(value)
    recipes = list_recipes(workspace) if known.recipes is None else known.recipes
    parent = _parent(given, known)
    recipe = _recipe(workspace, given, parent, recipes)
    settings = _settings(workspace, given, parent, known)
    _check_kind(given, recipe, settings, parent)
    _check_untried(given, recipe, settings, known)
    evidence = _evidence(workspace, given, known, recipes)
    recipe = _exported(_named(given, recipe, recipes))
    cost = estimate_cost(workspace, recipe, settings, known.runs)
    if cost.expected_samples == 0:
        raise InvalidInput("No sample is left", "field recipe", "loosen a threshold")
    return Proposal(
        title=cut(visible(given.title), 120),
        slug=recipe.name,
        kind=given.kind,
        reason=visible(given.reason),
        evidence=evidence,
        parent=parent.id if parent else None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings=settings,
        cost=cost,
        proposed_by=proposed_by,
        hypothesis=visible(given.hypothesis),
        predictions=_predictions(given, parent, proposed_by),
        refuted_by=visible(given.refuted_by),
    )


def _given(value: Mapping[str, Any]) -> _GivenProposal:
    try:
        return _GivenProposal.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        shown = cut(visible(repr(first.get("input"))[:400]), 120)
        raise InvalidInput("Wrong field", f"{place}: {shown}", str(first["msg"])[:200]) from error


def _parent(given: _GivenProposal, known: Known) -> Run | None:
    """Return the run that the proposal is compared with; None for the first baseline."""
    done = {run.id: run for run in known.runs if run.is_measured}
    if given.kind == "baseline":
        if given.parent is not None:
            raise InvalidInput("Baseline has a parent", "field parent", "write null")
        return None
    if not done:
        raise InvalidInput(
            "Nothing to compare with", "no run has succeeded", "propose the baseline first"
        )
    if given.parent in done:
        return done[given.parent]
    states = {run.id: run.status for run in known.runs}
    if given.parent in states:
        raise InvalidInput(
            "Parent was not measured",
            f"field parent: {given.parent} is {states[given.parent]}",
            "name a run that ended with scores",
        )
    raise InvalidInput(
        "No such run",
        f"field parent: {visible(str(given.parent))[:80]!r}",
        nearest(str(given.parent)[:80], list(done)[-20:]),
    )


def _recipe(
    workspace: Workspace, given: _GivenProposal, parent: Run | None, recipes: Sequence[Recipe]
) -> Recipe:
    """Return the proposal's recipe, checked, with every parameter written out."""
    catalogue = load_catalogue()
    if given.kind == "baseline":
        by_name = {recipe.name: recipe for recipe in recipes}
        if workspace.settings.baseline not in by_name:
            raise InvalidInput(
                "Baseline recipe is missing", workspace.settings.baseline, "a person has to add it"
            )
        return materialise(by_name[workspace.settings.baseline], catalogue)
    assert parent is not None
    before = _recipe_of(parent.plan.proposal)
    if given.recipe is None:
        if given.kind != "replicate":
            raise InvalidInput("Recipe is missing", "field recipe", "give process or branches")
        recipe = before
    else:
        steps = _plain_steps(given.recipe)
        # A model has no say in options: they tell where data lies and how errors are handled.
        options = {**before.options, "skip_op_error": False}
        recipe = recipe_from_mapping("proposal", {**options, **steps})
    validate_recipe(recipe, catalogue, workspace)
    return materialise(recipe, catalogue)


def _recipe_of(proposal: Proposal) -> Recipe:
    mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
    return recipe_from_mapping(str(proposal.recipe.get("name", proposal.slug)), mapping)


def _plain_steps(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps as a recipe file holds them; only fields of steps are taken."""
    if recipe.get("branches") is not None:
        if recipe.get("process"):
            raise InvalidInput(
                "Two kinds of steps", "field recipe: process and branches", "leave out one"
            )
        branches = recipe["branches"]
        if not isinstance(branches, list):
            raise InvalidInput("Wrong field", "recipe.branches is no list", "give a list")
        made = [
            {**branch, "process": _plain_process(branch.get("process"))}
            if isinstance(branch, dict)
            else branch
            for branch in branches
        ]
        kept = {
            k: recipe[k] for k in ("merge", "deduplicate", "order") if recipe.get(k) is not None
        }
        return {"branches": made, **kept}
    return {"process": _plain_process(recipe.get("process"))}


def _plain_process(process: object) -> object:
    """Return `{"name": x, "parameters": y}` as `{x: y}`; anything else stays for the check."""
    if not isinstance(process, list):
        return process
    return [
        {str(entry["name"]): entry.get("parameters") or {}}
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.keys() <= {"name", "parameters"}
        else entry
        for entry in process
    ]


def _settings(
    workspace: Workspace, given: _GivenProposal, parent: Run | None, known: Known
) -> dict[str, Any]:
    """Return the settings of the run: the parent's, where they may differ, with the changes."""
    settings = workspace_settings(workspace)
    if parent is not None:
        before = parent.plan.proposal.settings
        for section in _COMPARED:
            if before.get(section) != settings.get(section):
                raise InvalidInput(
                    "Parent is not comparable",
                    f"field parent: {parent.id} ran with other {section} settings",
                    "name a run with the present settings, or propose the baseline",
                )
        settings |= {key: before[key] for key in ("pretrain", "finetune", "seed") if key in before}
    for name, changes in given.settings.items():
        if name in METHODS:
            settings[name] = _changed(name, settings[name], changes)
        elif name != "seed":
            raise InvalidInput(
                "Setting may not be changed",
                f"field settings: {visible(name)[:60]}",
                "valid names: pretrain, finetune, seed",
            )
    if given.kind == "baseline" and given.settings:
        raise InvalidInput("Baseline with changes", "field settings", "leave it empty")
    return settings | {"seed": _seed(given, settings, known)}


def _changed(section: str, before: Mapping[str, Any], changes: object) -> dict[str, Any]:
    if not isinstance(changes, dict):
        raise InvalidInput("Wrong field", f"settings.{section}", "give an object")
    for name, value in changes.items():
        place = f"settings.{section}.{visible(str(name))[:60]}"
        if name not in TRAINING_FIELDS:
            raise InvalidInput(
                "Setting may not be changed", place, nearest(str(name)[:60], TRAINING_FIELDS)
            )
        _check_training(place, section, name, value)
    if "epochs" in changes and before.get("max_steps"):
        raise InvalidInput(
            "Setting has no effect",
            f"settings.{section}.epochs: the stage takes {before['max_steps']} steps",
            "leave it out",
        )
    changed = {**before, **changes}
    try:
        TrainSettings.model_validate(changed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            "Wrong setting", f"settings.{section}.{place}", str(first["msg"])[:200]
        ) from error
    whole, micro = changed["global_batch_size"], changed["micro_batch_size"]
    if whole % micro:
        raise InvalidInput(
            "Batch sizes do not fit",
            f"settings.{section}.micro_batch_size = {micro} does not divide {whole}",
            "give a divisor",
        )
    return changed


def _check_training(place: str, section: str, name: str, value: object) -> None:
    if name == "method":
        if value not in METHODS[section]:
            raise InvalidInput("Unknown method", place, f"one of {', '.join(METHODS[section])}")
        return
    low, high = TRAINING_FIELDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= float(str(value)) <= high:
        raise InvalidInput(
            "Out of range", f"{place}: {str(value)[:40]}", f"give a number from {low:g} to {high:g}"
        )


def _seed(given: _GivenProposal, settings: Mapping[str, Any], known: Known) -> int:
    """Return the seed: for a replicate one that no run of the workspace has used."""
    wanted = given.settings.get("seed")
    if given.kind != "replicate":
        if wanted is not None and wanted != settings["seed"]:
            raise InvalidInput(
                "A seed is not a change",
                "field settings.seed",
                "leave it out, or propose a replicate",
            )
        return int(settings["seed"])
    used = {run.plan.proposal.settings.get("seed") for run in known.runs}
    if wanted is None:
        free = int(settings["seed"])
        while free in used:
            free += 1
        return free
    if type(wanted) is not int or not 0 <= wanted < 2**31 or wanted in used:
        raise InvalidInput(
            "Bad seed", f"settings.seed: {str(wanted)[:40]}", "leave it out: it is chosen for you"
        )
    return wanted


def _check_kind(
    given: _GivenProposal,
    recipe: Recipe,
    settings: Mapping[str, Any],
    parent: Run | None,
) -> None:
    """Check that the proposal is of the kind that it says."""
    if parent is None:
        return
    catalogue = load_catalogue()
    before = materialise(_recipe_of(parent.plan.proposal), catalogue)
    is_same_recipe = _steps_digest(before) == _steps_digest(recipe)
    sections = ("pretrain", "finetune")
    is_same = is_same_recipe and all(
        settings[section] == parent.plan.proposal.settings.get(section) for section in sections
    )
    if given.kind == "replicate" and not is_same:
        raise InvalidInput(
            "A replicate repeats its parent",
            f"field kind: recipe or settings differ from {parent.id}",
            "leave recipe and settings out, or choose explore or exploit",
        )
    if given.kind != "replicate" and is_same:
        raise InvalidInput(
            "Nothing changes",
            f"field recipe: it does what {parent.id} did",
            "change something, or choose kind replicate",
        )
    if given.kind == "ablate" and not _is_part(recipe, before):
        raise InvalidInput(
            "An ablation only removes",
            f"field recipe: it is not the recipe of {parent.id} without some of its operators",
            "leave out operators of the parent and change nothing else",
        )


def _is_part(recipe: Recipe, whole: Recipe) -> bool:
    """Tell whether a recipe has some of another's operators, unchanged, and not all."""
    mine, others = (
        Counter(digest([o.name, dict(o.parameters)]) for _, o in operators_with_places(one))
        for one in (recipe, whole)
    )
    return mine < others


def _steps_digest(recipe: Recipe) -> str:
    """Return what tells apart what two recipes do; options and names of branches do not."""
    return replace(recipe, options={}).digest


def _check_untried(
    given: _GivenProposal, recipe: Recipe, settings: Mapping[str, Any], known: Known
) -> None:
    mine = _identity(recipe, settings, with_seed=given.kind == "replicate")
    for run in known.runs:
        if run.settles and _is(run.plan.proposal, mine):
            hint = "propose something else, or a replicate of it"
            raise InvalidInput("It was tried", f"run {run.id} ({run.status})", hint)
    for rejection in known.rejections:
        if _is(rejection.proposal, mine):
            raise InvalidInput(
                "It was rejected",
                f"{rejection.id}: {visible(rejection.reason)[:200]}",
                "propose something else that respects the reason",
            )
    for proposal in known.shown:
        if _is(proposal, mine):
            raise InvalidInput(
                "It was shown already", visible(proposal.title)[:120], "propose something else"
            )


_Identity = tuple[str, dict[str, Any]]


def _identity(recipe: Recipe, settings: Mapping[str, Any], *, with_seed: bool) -> _Identity:
    sections = [*_COMPARED, "pretrain", "finetune", *(["seed"] if with_seed else [])]
    return _steps_digest(recipe), {section: settings.get(section) for section in sections}


def _is(proposal: Proposal, identity: _Identity) -> bool:
    """Tell whether a proposal would do the same."""
    steps, settings = identity
    if any(proposal.settings.get(name) != value for name, value in settings.items()):
        return False
    try:
        return _steps_digest(materialise(_recipe_of(proposal), load_catalogue())) == steps
    except InvalidInput:
        return False


def _evidence(
    workspace: Workspace, given: _GivenProposal, known: Known, recipes: Sequence[Recipe]
) -> tuple[str, ...]:
    ids = {run.id for run in known.runs} | {rejection.id for rejection in known.rejections}
    published = {
        f"published table, row {recipe.published['row']:.0f}"
        for recipe in recipes
        if recipe.published
    }
    published |= {
        imported_name(table, result)
        for table in list_imported(workspace)
        for result in table.results
    }
    for position, name in enumerate(given.evidence):
        if name not in ids and name not in published:
            hint = (
                nearest(name[:80], sorted(ids)[-20:]) if ids else "there is no run: leave it empty"
            )
            raise InvalidInput("No such run", f"evidence.{position}: {visible(name)[:80]}", hint)
    if ids and not given.evidence and given.kind != "baseline":
        raise InvalidInput("Evidence is missing", "field evidence", "name a run it rests on")
    return tuple(dict.fromkeys(given.evidence))


def _predictions(given: _GivenProposal, parent: Run | None, by: str) -> tuple[Prediction, ...]:
    if parent is None:
        return ()
    wanted = set(parent.scores) or set(BENCHMARK_NAMES)
    named = [prediction.benchmark for prediction in given.predictions]
    if set(named) != wanted or len(named) != len(wanted):
        raise InvalidInput(
            "Predictions do not fit the benchmarks",
            f"field predictions: {visible(', '.join(named))[:120] or 'none'}",
            f"give one for each of {', '.join(sorted(wanted))}",
        )
    for position, p in enumerate(given.predictions):
        numbers = (p.low, p.expected, p.high)
        if not all(math.isfinite(n) and abs(n) <= 100 for n in numbers):
            raise InvalidInput(
                "Out of range", f"predictions.{position}", "give percentage points, -100 to 100"
            )
        if not p.low <= p.expected <= p.high or p.low == p.high:
            raise InvalidInput(
                "Interval is not one",
                f"predictions.{position}: low {p.low:g}, expected {p.expected:g}, high {p.high:g}",
                "give low <= expected <= high, and an interval that is not empty",
            )
    return tuple(Prediction(p.benchmark, p.expected, p.low, p.high, by) for p in given.predictions)


def _named(given: _GivenProposal, recipe: Recipe, recipes: Sequence[Recipe]) -> Recipe:
    """Give the recipe a name that no other recipe of the workspace has."""
    if given.kind in ("baseline", "replicate"):
        return recipe
    name = given.name if _SLUG.fullmatch(given.name) else _slug(given.title)
    mark = _steps_digest(recipe)[:6]
    name = name or f"{given.kind}-{mark}"
    taken = {known.name for known in recipes}
    if name in taken:
        name = f"{name[:41].rstrip('-')}-{mark}"
    return replace(recipe, name=name, title=cut(visible(given.title), 120))


def _slug(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")


def _exported(recipe: Recipe) -> Recipe:
    """Let the recipe write under its own name when it is run by hand."""
    if "export_path" not in recipe.options:
        return recipe
    path = f"artifacts/processed/{recipe.name}.jsonl"
    return replace(recipe, options={**recipe.options, "export_path": path})
