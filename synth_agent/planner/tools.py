"""The tools that a language model may call. They read; none of them writes, runs or spends.

Owns their descriptions and their execution: `run_tool` answers with JSON text of at most 8 kB, 50 rows
and 5 seconds. A wrong call is answered with what is wrong and how to correct it. Text that comes from
data, files or people is fenced (see `fencing`).
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from synth_agent import pipeline, verdicts
from synth_agent.catalogue import OperatorSpec, load_catalogue
from synth_agent.errors import InvalidInput, SynthAgentError, nearest
from synth_agent.fit import estimate_cost
from synth_agent.planner.context import prediction_words, run_line, run_name, steps_text
from synth_agent.planner.exchange import ToolSpec
from synth_agent.planner.fencing import cut, untrusted, visible
from synth_agent.planner.reply import plain_process
from synth_agent.recipe_checks import parameters_as_checked
from synth_agent.recipe_policy import refusal
from synth_agent.recipes import Recipe, list_recipes, recipe_from_mapping, validate_recipe
from synth_agent.runs import Run
from synth_agent.workspace import Workspace

if TYPE_CHECKING:
    from synth_agent.plan_retention import PlanRetention
    from synth_agent.statistics import StatisticsTable

MOST_BYTES = 8_000
MOST_ROWS = 50
MOST_SECONDS = 5.0
_MOST_ARGUMENTS = 20_000
_MOST_EXAMPLES = 8
_CELL = 300
_OF_EVERY_FILTER = ("min_closed_interval", "max_closed_interval", "reversed_range")
_FIGURE = r"-?\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,3})?"
_NUMBER = re.compile(rf"{_FIGURE}|\[{_FIGURE}(, {_FIGURE})*\]|true|false|-?inf|nan")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_STEPS: Mapping[str, Any] = {
    "recipe": {"type": "string", "description": "name of a recipe of the workspace"},
    "process": {
        "type": "array",
        "description": "or steps in place of a name, as in a proposal: "
        '[{"name": OPERATOR, "parameters": {...}}, ...]',
        "items": {"type": "object"},
    },
}


def _spec(name: str, description: str, properties: Mapping[str, Any], *required: str) -> ToolSpec:
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
    return ToolSpec(name, description, schema)


TOOLS: tuple[ToolSpec, ...] = (
    _spec(
        "statistics",
        "One read-only SELECT (DuckDB) over the view `samples`: row, id, sample, text, images and a "
        f"column for each statistic of the seed set. At most {MOST_ROWS} rows. Empty: the columns.",
        {"sql": {"type": "string"}},
    ),
    _spec(
        "samples",
        "Samples that one operator of a recipe keeps and drops, with their scores.",
        {
            **_STEPS,
            "operator": {
                "type": "integer",
                "minimum": 1,
                "description": "its position from 1, branch after branch",
            },
            "count": {"type": "integer", "minimum": 1, "maximum": _MOST_EXAMPLES},
        },
    ),
    _spec("retention", "A recipe's steps, and what each operator leaves of the seed set.", _STEPS),
    _spec(
        "operators",
        "All about one operator by its name; or the usable ones that a word occurs in.",
        {"name": {"type": "string"}, "word": {"type": "string"}},
    ),
    _spec(
        "runs",
        "All about one run by its id; or one line for each run, newest first.",
        {
            "run": {"type": "string"},
            "status": {"type": "string"},
            "offset": {"type": "integer", "minimum": 0},
        },
    ),
    _spec(
        "compare",
        "Paired difference of two runs on the questions that both answered.",
        {"earlier": {"type": "string"}, "later": {"type": "string"}},
        "earlier",
        "later",
    ),
    _spec("fit", "What a recipe would take: samples and time, with the basis.", _STEPS),
)


@dataclass(frozen=True)
class _Call:
    """One call: where it reads and what it was given."""

    workspace: Workspace
    arguments: Mapping[str, Any]
    loaded: Sequence[Run] | None

    def runs(self) -> Sequence[Run]:
        if self.loaded is not None:
            return self.loaded
        return pipeline.list_runs(self.workspace, lambda _: None)

    def text(self, name: str) -> str:
        return str(self.arguments.get(name, "")).strip()

    def run(self, name: str) -> Run:
        runs = {run.id: run for run in self.runs()}
        wanted = self.text(name)
        if wanted not in runs:
            hint = nearest(wanted, list(runs)[-20:]) if runs else "there is no run yet"
            raise InvalidInput("No such run", f"{name} = {wanted[:80]!r}", hint)
        return runs[wanted]


def run_tool(
    workspace: Workspace, name: str, arguments_text: str, runs: Sequence[Run] | None = None
) -> str:
    """Execute one call and return its answer, JSON text of at most `MOST_BYTES` bytes.

    Args:
        workspace: What is read.
        name: Name of a tool.
        arguments_text: JSON object of the arguments, as a model wrote it.
        runs: The runs if they are loaded; None loads them when they are needed.

    Returns:
        The answer, or an object with `error` and `fix` for a call that cannot be answered.
    """
    try:
        tool = _TOOLS.get(name)
        if tool is None:
            raise InvalidInput("No such tool", visible(name)[:80], nearest(name[:80], _TOOLS))
        call = _Call(workspace, _read_arguments(name, arguments_text), runs)
        answer = _in_time(lambda: tool(call))
    except SynthAgentError as error:
        what = f"{error.title}: {error.message}"
        answer = {"error": untrusted(what, 600), "fix": untrusted(error.hint, 400)}
    return _bounded(answer)


def _read_arguments(name: str, text: str) -> dict[str, Any]:
    """Read and check the arguments of a call.

    Raises:
        InvalidInput: Not JSON, not an object, an unknown name or a wrong type.
    """
    if len(text) > _MOST_ARGUMENTS:
        raise InvalidInput(
            "Arguments are too long", f"{len(text)} characters", f"at most {_MOST_ARGUMENTS}"
        )
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidInput("Arguments are not JSON", str(error)[:200], "send one object") from error
    if not isinstance(arguments, dict):
        raise InvalidInput("Arguments are not an object", text[:80], 'send {"name": value}')
    schema = next(spec for spec in TOOLS if spec.name == name).parameters
    for key, value in arguments.items():
        if key not in schema["properties"]:
            raise InvalidInput("Unknown argument", key[:80], nearest(key, schema["properties"]))
        _check_argument(key, value, schema["properties"][key])
    for key in schema["required"]:
        if key not in arguments:
            raise InvalidInput("Argument is missing", key, f"give {key}")
    return arguments


def _check_argument(name: str, value: object, schema: Mapping[str, Any]) -> None:
    wanted = {"string": str, "integer": int, "array": list}[schema["type"]]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise InvalidInput("Wrong type", f"{name} = {str(value)[:80]}", f"give {schema['type']}")
    if isinstance(value, int):
        low, high = schema.get("minimum", 0), schema.get("maximum", 1_000_000)
        if not low <= value <= high:
            raise InvalidInput("Out of range", f"{name} = {value}", f"from {low} to {high}")


def _in_time(work: Callable[[], Any]) -> Any:
    """Return what `work` returns within the time that a call may take.

    Work that takes longer goes on unseen until it ends: it only reads.

    Raises:
        SynthAgentError: What it raised, or that it took too long.
    """
    done: dict[str, Any] = {}

    def target() -> None:
        try:
            done["answer"] = work()
        except SynthAgentError as error:
            done["error"] = error
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A damaged file of the workspace must not end the conversation.
            done["error"] = SynthAgentError(
                "It cannot be read", f"{type(error).__name__}: {error}", "ask for something else"
            )

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS)
    if "error" in done:
        raise done["error"]
    if "answer" not in done:
        raise SynthAgentError(
            "It took too long", f"more than {MOST_SECONDS:g} s", "ask for less at a time"
        )
    return done["answer"]


def _bounded(answer: Any) -> str:
    """Return an answer as JSON text; rows of the longest list are left out until it fits."""
    text = _dump(answer)
    while len(text.encode()) > MOST_BYTES and isinstance(answer, dict):
        lists = {key: value for key, value in answer.items() if isinstance(value, list) and value}
        if not lists:
            break
        longest = max(lists, key=lambda key: len(_dump(lists[key])))
        kept = lists[longest][: len(lists[longest]) * 3 // 4]
        answer = {**answer, longest: kept, "truncated": True}
        text = _dump(answer)
    if len(text.encode()) > MOST_BYTES:
        return _dump({"error": "The answer is too long", "fix": "ask for less at a time"})
    return text


def _dump(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _statistics(call: _Call) -> dict[str, Any]:
    table = _table(call.workspace)
    sql = call.text("sql").rstrip().rstrip(";")
    if not sql:
        names = ["row", "id", "sample", "text", "images", *table.column_names()]
        return {"rows": table.num_rows, "columns": names}
    # Values are cut inside the database, which works on a few rows at a time: a query for long
    # texts then takes little memory. The newline ends a comment that the statement may close with.
    query = f"SELECT left(CAST(COLUMNS(*) AS VARCHAR), {_CELL}) FROM (\n{sql}\n)"
    found = table.query(query, MOST_ROWS, MOST_SECONDS - 0.5, limit_bytes=MOST_BYTES)
    rows = [[_cell(value) for value in row] for row in found.rows]
    columns = [name if _NAME.fullmatch(name) else untrusted(name, 80) for name in found.columns]
    return {"columns": columns, "rows": rows, "truncated": found.truncated}


def _cell(value: object) -> object:
    """Return a number or a list of numbers as it is, and any other text fenced."""
    if value is None:
        return None
    text = str(value)
    return text if _NUMBER.fullmatch(text) else untrusted(text, _CELL)


def _samples(call: _Call) -> dict[str, Any]:
    from synth_agent.analysis import example_line
    from synth_agent.retention import examples

    counted = _counted(call)
    steps = [
        (branch, position)
        for branch in counted.branches
        for position in range(len(branch.retention.operators))
    ]
    number = int(call.arguments.get("operator", 1))
    if number > len(steps):
        raise InvalidInput("No such operator", f"operator = {number}", f"it has {len(steps)}")
    branch, position = steps[number - 1]
    count = int(call.arguments.get("count", 3))
    drawn = examples(branch.retention, position, _table(call.workspace), count, seed=0)
    return {
        "branch": branch.branch.name,
        "operator": branch.retention.operators[position].name,
        "kept": [untrusted(example_line(one), _CELL) for one in drawn.kept],
        "dropped": [untrusted(example_line(one), _CELL) for one in drawn.dropped],
    }


def _counted(call: _Call) -> PlanRetention:
    """Return what the recipe that a call names would make of the seed set."""
    from synth_agent.digests import Digests
    from synth_agent.plan_retention import plan_retention

    workspace, digests = call.workspace, Digests(call.workspace)
    recipe, table = _recipe(call), _table(workspace)
    return plan_retention(recipe, table, lambda path: digests.path(workspace.path(path)))


def _retention(call: _Call) -> dict[str, Any]:
    counted, workspace = _counted(call), call.workspace
    branches = [
        {
            "branch": branch.branch.name,
            "operators": [
                {"name": o.name, "before": o.before, "after": o.after, "why": cut(o.why, 200)}
                for o in branch.retention.operators
            ],
            "samples": branch.samples,
        }
        for branch in counted.branches
    ]
    return {
        "steps": steps_text(_recipe(call), 1_500),
        "seed_samples": counted.num_rows,
        "samples": counted.samples,
        "cap": workspace.settings.data.sample_cap,
        "why_not_known": untrusted(counted.why) if counted.why else "",
        "branches": branches,
    }


def _operators(call: _Call) -> dict[str, Any]:
    catalogue = load_catalogue()
    allowed = call.workspace.settings.allow_operators
    if name := call.text("name"):
        if name not in catalogue.operators:
            raise InvalidInput(
                "Unknown operator", name[:80], nearest(name[:80], catalogue.operators)
            )
        return _operator(catalogue.operators[name], allowed)
    word = call.text("word").lower()
    usable = [s for s in catalogue.operators.values() if not refusal(s) or s.name in allowed]
    found = [s for s in usable if word in f"{s.name} {s.summary}".lower()]
    listed = [
        {"name": s.name, "kind": s.kind, "cost": s.cost, "summary": untrusted(s.summary, 160)}
        for s in found[:MOST_ROWS]
    ]
    return {"usable": len(usable), "found": len(found), "operators": listed}


def _operator(spec: OperatorSpec, allowed: Sequence[str]) -> dict[str, Any]:
    parameters = [
        {
            "name": p.name,
            "accepts": list(p.accepts),
            "required": p.required,
            "default": untrusted(p.default, 120) if isinstance(p.default, str) else p.default,
            "minimum": p.minimum,
            "maximum": p.maximum,
            "choices": list(p.choices)[:20],
        }
        for p in parameters_as_checked(spec.name, load_catalogue()).values()
        if p.name in spec.parameters or p.name in _OF_EVERY_FILTER
    ]
    return {
        "name": spec.name,
        "kind": spec.kind,
        "summary": untrusted(spec.summary, 600),
        "cost": spec.cost,
        "needs": list(spec.needs),
        "usable": not refusal(spec) or spec.name in allowed,
        "refused_because": refusal(spec),
        "parameters": parameters,
    }


def _runs(call: _Call) -> dict[str, Any]:
    if call.text("run"):
        return _run(call.run("run"))
    runs = call.runs()
    by_id = {run.id: run for run in runs}
    status, offset = call.text("status"), int(call.arguments.get("offset", 0))
    chosen = [run for run in reversed(runs) if status in ("", run.status, run.verdict)]
    lines = [
        run_line(run, by_id.get(run.plan.proposal.parent or ""))
        for run in chosen[offset : offset + MOST_ROWS]
    ]
    return {"runs": len(chosen), "offset": offset, "lines": lines}


def _run(run: Run) -> dict[str, Any]:
    proposal = run.plan.proposal
    recipe = {key: value for key, value in proposal.recipe.items() if key != "name"}
    stages = {
        name: {"status": stage.status, "seconds": stage.seconds, "samples": _kept(stage.result)}
        for name, stage in run.stages.items()
    }
    return {
        "id": run_name(run.id),
        "status": run.status,
        "verdict": run.verdict,
        "kind": proposal.kind,
        "parent": None if proposal.parent is None else run_name(proposal.parent),
        "title": untrusted(proposal.title, 200),
        "reason": untrusted(proposal.reason, 800),
        "hypothesis": untrusted(proposal.hypothesis, 400),
        "steps": steps_text(recipe_from_mapping("recipe", recipe), 1200),
        "stages": stages,
        "scores": {
            name: {"percent": s.percent, "low": s.low, "high": s.high, "n": s.num_questions}
            for name, s in run.scores.items()
        },
        "comparisons": {
            name: {"points": c.difference, "low": c.low, "high": c.high, "verdict": c.verdict}
            for name, c in run.comparisons.items()
        },
        "predictions": prediction_words(proposal.predictions, run),
        "error": untrusted(run.error.get("message", ""), 400) if run.error else "",
        "notes": [untrusted(note) for note in run.notes[-5:]],
    }


def _kept(result: Mapping[str, Any]) -> int | None:
    kept = result.get("kept")
    return kept if isinstance(kept, int) else None


def _compare(call: _Call) -> dict[str, Any]:
    earlier, later = call.run("earlier"), call.run("later")
    found = verdicts.compare_runs(call.workspace, earlier.id, later.id)
    return {
        "earlier": run_name(earlier.id),
        "later": run_name(later.id),
        "differences": [
            {
                "benchmark": c.benchmark,
                "points": c.difference,
                "low": c.low,
                "high": c.high,
                "expected": c.expected,
                "questions": c.num_questions,
                "verdict": c.verdict,
                "basis": c.basis,
                "power": c.power,
            }
            for c in found
        ],
    }


def _fit(call: _Call) -> dict[str, Any]:
    settings = call.workspace.settings.model_dump(mode="json")
    cost = estimate_cost(call.workspace, _recipe(call), settings, call.runs())
    return {
        "seed_samples": cost.seed_samples,
        "samples": cost.expected_samples,
        "seconds": cost.seconds,
        "basis": untrusted(cost.basis, 400),
    }


def _recipe(call: _Call) -> Recipe:
    """Return the recipe that a call names or spells out, checked.

    Raises:
        InvalidInput: There is no such recipe, or it may not be used.
    """
    if "process" in call.arguments:
        steps = plain_process(call.arguments["process"])
        mapping = {"skip_op_error": False, "process": steps}
        recipe = recipe_from_mapping("asked", mapping)
        validate_recipe(recipe, load_catalogue(), call.workspace)
        return recipe
    recipes = {recipe.name: recipe for recipe in list_recipes(call.workspace)}
    name = call.text("recipe")
    if name not in recipes:
        raise InvalidInput("No such recipe", name[:80], nearest(name[:80], recipes))
    return recipes[name]


def _table(workspace: Workspace) -> StatisticsTable:
    from synth_agent.analysis import open_table
    from synth_agent.digests import Digests

    table = open_table(workspace, Digests(workspace))
    if table is None:
        raise InvalidInput(
            "No statistics", "the seed set was not analysed", "a person runs `synth-agent analyze`"
        )
    return table


_TOOLS: Mapping[str, Callable[[_Call], dict[str, Any]]] = {
    "statistics": _statistics,
    "samples": _samples,
    "retention": _retention,
    "operators": _operators,
    "runs": _runs,
    "compare": _compare,
    "fit": _fit,
}
