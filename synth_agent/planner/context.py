"""What a language model is told of a workspace: built from values, bounded, the stable part first.

Owns the choice of what is said and in which order, so that the prompt has the same size for 20 runs
and for 2,000. Everything that was written outside the program is fenced (see `fencing`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from synth_agent.catalogue import load_catalogue
from synth_agent.imported import ImportedResult, ImportedTable, list_imported
from synth_agent.noise import workspace_noise
from synth_agent.planner.fencing import cut, estimated_tokens, untrusted, visible
from synth_agent.recipe_policy import MODEL_PREFIX, refusal
from synth_agent.recipes import Recipe, list_recipes, steps_of
from synth_agent.runs import Prediction, Proposal, Rejection, Run
from synth_agent.weighting import weighting_words
from synth_agent.wording import BENCHMARK_NAMES, duration
from synth_agent.workspace import Workspace

DEFAULT_BUDGET = 4000
"""Tokens, by the estimate of `fencing.estimated_tokens`, of all sections together."""
_SHARES: Mapping[str, float] = {
    "goal": 0.07,
    "operators": 0.13,
    "recipes": 0.14,
    "imported": 0.07,
    "statistics": 0.09,
    "baseline": 0.05,
    "wishes": 0.07,
    "last": 0.05,
    "effects": 0.1,
    "rejected": 0.06,
    "untested": 0.04,
}
"""The most that a section may take of the budget; the runs get what is left."""
_STABLE = ("goal", "operators", "recipes", "imported", "statistics")
_BEST_RUNS = 4
_MOST_STATISTICS = 24
_MOST_REJECTIONS = 50
_NAMES_A_LINE = 4
_WORD = re.compile(r"[a-z_0-9]{1,40}")
_IMPORTED = re.compile(r"[a-z0-9-]{1,48}/[a-z0-9-]{1,32}")
_RUN_ID = re.compile(r"[0-9]{1,8}-[a-z0-9-]{1,64}")
_DEFAULTS_OF_STEPS = ("num_proc", "trust_remote_code", "horizontal_flip", "vertical_flip")


@dataclass(frozen=True)
class Section:
    """A part of the context under a title of its own."""

    name: str
    title: str
    lines: tuple[str, ...]
    left_out: int = 0
    """Lines that did not fit."""

    @property
    def is_stable(self) -> bool:
        """Whether it belongs to the part that stays the same from call to call."""
        return self.name in _STABLE

    def text(self) -> str:
        """Return the section as Markdown."""
        rest = [f"({self.left_out} more, not shown)"] if self.left_out else []
        return "\n".join([f"## {self.title}", *self.lines, *rest])


def render(sections: Iterable[Section]) -> str:
    """Return sections as one text."""
    return "\n\n".join(section.text() for section in sections)


def build_context(
    workspace: Workspace,
    runs: Sequence[Run],
    rejections: Sequence[Rejection],
    statistics: Sequence[str] = (),
    *,
    wishes: Sequence[str] = (),
    last: Proposal | None = None,
    recipes: Sequence[Recipe] | None = None,
    budget: int = DEFAULT_BUDGET,
) -> tuple[Section, ...]:
    """Return what a model needs to know, the stable sections first.

    Args:
        workspace: Goal, constraints and recipes.
        runs: All runs, oldest first.
        rejections: All rejected proposals, oldest first.
        statistics: Lines of `statistics_lines`.
        wishes: What the user asked for and has not taken back.
        last: The latest proposal of this conversation.
        recipes: The workspace's recipes if they are loaded.
        budget: Most tokens of everything, by `fencing.estimated_tokens`.

    Raises:
        InvalidInput: A recipe or an imported table of the workspace cannot be read.
    """
    recipes = list_recipes(workspace) if recipes is None else recipes
    given = _given(workspace, runs, rejections, statistics, wishes, last, recipes)
    sections, spent = [], 0
    for name, (title, lines) in given.items():
        total = len(rejections) if name == "rejected" else len(lines)
        section = _fitted(name, title, lines, total, int(budget * _SHARES[name]))
        if section.lines or section.left_out:
            sections.append(section)
            spent += estimated_tokens(section.text()) + 1
    sections.append(_runs_section(runs, budget - spent))
    return tuple(sections)


def _given(
    workspace: Workspace,
    runs: Sequence[Run],
    rejections: Sequence[Rejection],
    statistics: Sequence[str],
    wishes: Sequence[str],
    last: Proposal | None,
    recipes: Sequence[Recipe],
) -> dict[str, tuple[str, list[str]]]:
    """Return title and lines of every section but the runs, in their order."""
    return {
        "goal": ("Goal and constraints", _goal(workspace)),
        "operators": ("Usable operators", _operators(workspace)),
        "recipes": ("Recipes of the workspace", _recipe_lines(recipes)),
        "imported": (
            "Imported results: measured elsewhere, weak evidence",
            imported_lines(workspace),
        ),
        "statistics": ("Statistics of the seed set", list(statistics)),
        "baseline": ("Baseline and noise floor", _baseline(workspace, runs)),
        "wishes": ("Standing wishes of the user", [f"- {cut(visible(w), 300)}" for w in wishes]),
        "last": ("Your latest proposal", _suggested(last)),
        "effects": ("Effects by operator", _effects(runs)),
        "rejected": ("Rejected proposals, newest first", _rejected(rejections)),
        "untested": ("Not tested yet", _untested(recipes, runs)),
    }


def _fitted(name: str, title: str, lines: Sequence[str], total: int, budget: int) -> Section:
    """Return a section with as many of the lines, in their order, as its budget allows."""
    left = budget - estimated_tokens(f"## {title}\n(0000 more, not shown)\n")
    kept: list[str] = []
    for line in lines:
        left -= estimated_tokens(line) + 1
        if left < 0:
            break
        kept.append(line)
    return Section(name, title, tuple(kept), total - len(kept))


def _goal(workspace: Workspace) -> list[str]:
    settings = workspace.settings
    return [
        f"Goal: {cut(visible(settings.goal), 300)}",
        f"Model {settings.model.name}; at most {settings.data.sample_cap} samples are trained on; "
        f"pretrain {_training(settings.pretrain.model_dump())}; "
        f"finetune {_training(settings.finetune.model_dump())}.",
        f"Benchmarks: {', '.join(BENCHMARK_NAMES)}.{_weighting(settings.weights)}",
    ]


def _weighting(weights: Mapping[str, float]) -> str:
    if not weights:
        return ""
    return f" The user weighs them {weighting_words(weights)}; predict each by itself all the same."


def _training(section: Mapping[str, Any]) -> str:
    length = (
        f"{section['max_steps']} steps" if section["max_steps"] else f"{section['epochs']:g} ep"
    )
    return f"{section['method']}, lr {section['learning_rate']:g}, {length}"


def _operators(workspace: Workspace) -> list[str]:
    """Return the names that a recipe may use, a line for each kind."""
    kinds = defaultdict(list)
    for spec in load_catalogue().operators.values():
        if not refusal(spec) or spec.name in workspace.settings.allow_operators:
            kinds[spec.kind].append(spec.name)
    lines = []
    for kind, names in sorted(kinds.items()):
        ending = f"_{kind}"
        short = [name.removesuffix(ending) for name in names if name.endswith(ending)]
        whole = [name for name in names if not name.endswith(ending)]
        parts = [f"{', '.join(short)} (add {ending} to each)"] if short else []
        lines.append(f"{kind}: {'; '.join([*parts, *whole])}")
    return lines


def _recipe_lines(recipes: Sequence[Recipe]) -> list[str]:
    """Return the model folders that recipes name, and a line for each recipe."""
    folders: dict[str, set[str]] = defaultdict(set)
    for recipe in recipes:
        for operator in recipe.all_operators():
            for key, value in operator.parameters.items():
                if key.startswith(MODEL_PREFIX) and isinstance(value, str) and value:
                    folders[key].add(value)
    named = [
        f"Model folders, {key}: {', '.join(untrusted(value, 80) for value in sorted(values)[:3])}"
        for key, values in sorted(folders.items())
    ]
    return [*named[:6], *(f"- {recipe.name}: {steps_text(recipe, 150)}" for recipe in recipes)]


def steps_text(recipe: Recipe, most: int = 220) -> str:
    """Return a recipe's operators with the parameters that decide, in about so many characters.

    Names that the catalogue knows and numbers stand as they are, other text is fenced.
    """
    parts: list[str] = []
    for branch in recipe.branches:
        parts += [f"[{branch.name}:"] if branch.name else []
        steps = [_step_text(o.name, o.parameters) for o in branch.operators] or ["no operator"]
        parts += [f"{'> ' if position else ''}{step}" for position, step in enumerate(steps)]
        parts += [f"x{branch.repeat}"] if branch.repeat > 1 else []
        parts += [f"draw {branch.sample.count}"] if branch.sample else []
        parts += ["]"] if branch.name else []
    return _joined(parts, " ", most)


def _joined(parts: Sequence[str], separator: str, most: int) -> str:
    """Join whole parts, so that no fence is cut, and say where some are missing."""
    text = ""
    for position, part in enumerate(parts):
        longer = f"{text}{separator}{part}" if text else part
        if len(longer) > most and text:
            return f"{text}{separator}(and {len(parts) - position} more)"
        text = longer
    return text


def _step_text(name: str, parameters: Mapping[str, Any]) -> str:
    catalogue = load_catalogue()
    if name not in catalogue.operators:
        return untrusted(name, 60)
    known = catalogue.parameters(name)
    chosen = [
        f"{key if key in known else untrusted(key, 40)}="
        f"{value if key in known and value in known[key].choices else value_text(value)}"
        for key, value in parameters.items()
        if key not in _DEFAULTS_OF_STEPS
        and not key.startswith(MODEL_PREFIX)
        and (key not in known or known[key].default != value)
    ]
    return f"{name}({', '.join(chosen)})" if chosen else name


def value_text(value: object) -> str:
    """Return a parameter's value: numbers as they are, everything else fenced."""
    if value is None or isinstance(value, bool | int | float):
        return str(value)[:24]
    return untrusted(value, 60)


def imported_name(table: ImportedTable, result: ImportedResult) -> str:
    """Return the name by which a proposal's evidence refers to an imported result."""
    return f"{table.name}/{result.id}"


def _imported_text(name: str) -> str:
    return name if _IMPORTED.fullmatch(name) else untrusted(name, 80)


def imported_lines(workspace: Workspace) -> list[str]:
    """Return a line for each imported result that has gains, the largest smallest gain first."""
    found = [
        (min(result.gains.values()), table, result)
        for table in list_imported(workspace)
        for result in table.results
        if result.gains
    ]
    found.sort(key=lambda one: (-one[0], imported_name(one[1], one[2])))
    return [
        f"- {_imported_text(imported_name(table, result))} {untrusted(result.recipe, 110)}: "
        + ", ".join(
            f"{value_text(name) if name not in BENCHMARK_NAMES else name} x{gain:.2f}"
            for name, gain in sorted(result.gains.items())
        )
        for _, table, result in found
    ]


def _baseline(workspace: Workspace, runs: Sequence[Run]) -> list[str]:
    done = [run for run in runs if run.is_measured]
    baseline = next((r for r in reversed(done) if r.plan.proposal.kind == "baseline"), None)
    if baseline is None:
        return ["No baseline has succeeded yet: it comes first."]
    scores = ", ".join(
        f"{name} {s.percent:.1f} [{s.low:.1f}, {s.high:.1f}] of {s.num_questions} questions, "
        f"chance {s.chance:.1f}"
        for name, s in sorted(baseline.scores.items())
    )
    floor = {name: workspace_noise(done, name, baseline) for name in sorted(baseline.scores)}
    known = "; ".join(f"{name} {noise.sd:.2f}, {noise.basis}" for name, noise in floor.items())
    return [
        f"{run_name(baseline.id)}: {scores}",
        f"Spread between training seeds (sd, points): {known}",
    ]


def _effects(runs: Sequence[Run]) -> list[str]:
    """Return a line for each operator that some finished run added, dropped or changed."""
    by_id = {run.id: run for run in runs}
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    times: dict[tuple[str, str], int] = defaultdict(int)
    tables: dict[str, dict[str, list[Any]]] = {}
    for run in runs:
        parent = by_id.get(run.plan.proposal.parent or "")
        if not run.comparisons or parent is None:
            continue
        if parent.id not in tables:
            tables[parent.id] = _operator_table(parent.plan.proposal.recipe)
        mine = _operator_table(run.plan.proposal.recipe)
        for change in _changed_operators(tables[parent.id], mine):
            times[change] += 1
            for name, comparison in run.comparisons.items():
                found[change][name].append(comparison.difference)
    order = sorted(times, key=lambda change: (-times[change], change))
    lines = [
        f"- {sign} {_name(operator)}: {times[sign, operator]} runs, "
        + ", ".join(
            f"{name} {fmean(points):+.1f} ({min(points):+.1f} to {max(points):+.1f})"
            for name, points in sorted(found[sign, operator].items())
        )
        for sign, operator in order
    ]
    if not lines:
        return []
    return ["Mean points against the parent; changes made together share the credit.", *lines]


def _changed_operators(
    old: Mapping[str, list[Any]], new: Mapping[str, list[Any]]
) -> Iterator[tuple[str, str]]:
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            yield "with", name
        elif name not in new:
            yield "without", name
        elif old[name] != new[name]:
            yield "changed", name


def _operator_table(recipe: Mapping[str, Any]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = defaultdict(list)
    lists = [recipe.get("process", ())]
    lists += [branch.get("process", ()) for branch in recipe.get("branches", ())]
    for listed in lists:
        for entry in listed or ():
            for name, parameters in entry.items():
                table[str(name)].append(parameters or {})
    return table


def _name(operator: str) -> str:
    return operator if operator in load_catalogue().operators else untrusted(operator, 60)


def run_name(run_id: str) -> str:
    """Return a run id, fenced if it is none that the program would give."""
    return run_id if _RUN_ID.fullmatch(run_id) else untrusted(run_id, 80)


def _runs_section(runs: Sequence[Run], budget: int) -> Section:
    """Return a line a run: the latest baseline, the best and then the newest that fit, in order."""
    title = "Runs, oldest first; older ones are in the effects"
    left = budget - estimated_tokens(f"## {title}\n(00000 more, not shown)\n")
    by_id = {run.id: run for run in runs}
    place = {run.id: position for position, run in enumerate(runs)}
    chosen: dict[str, str] = {}
    for run in _in_order_of_interest(runs):
        if run.id in chosen:
            continue
        line = run_line(run, by_id.get(run.plan.proposal.parent or ""))
        left -= estimated_tokens(line) + 1
        if left < 0:
            break
        chosen[run.id] = line
    lines = tuple(chosen[run_id] for run_id in sorted(chosen, key=place.__getitem__))
    return Section("runs", title, lines or ("none",), len(runs) - len(chosen))


def _in_order_of_interest(runs: Sequence[Run]) -> Iterator[Run]:
    newest = list(reversed(runs))
    yield from newest[:1]
    yield from [run for run in newest if run.plan.proposal.kind == "baseline"][:1]
    for name in BENCHMARK_NAMES:
        compared = [run for run in newest if name in run.comparisons]
        compared.sort(key=lambda run: -run.comparisons[name].difference)
        yield from compared[:_BEST_RUNS]
    yield from newest


def run_line(run: Run, parent: Run | None) -> str:
    """Return a run on one line: parent, change, samples, results, predictions, notes."""
    proposal = run.plan.proposal
    parts = [f"- {run_name(run.id)} {proposal.kind}"]
    if proposal.parent:
        parts.append(f"vs {run_name(proposal.parent)}: {_change(run, parent)}")
    result = run.stages["process"].result
    if isinstance(kept := result.get("kept"), int):
        parts.append(f"{kept} samples")
    parts += [_benchmark_text(run, name) for name in sorted(run.scores)]
    parts.append(run.verdict or run.status)
    if judged := prediction_words(proposal.predictions, run):
        parts.append(judged)
    if run.error:
        parts.append(f"error {untrusted(run.error.get('title', ''), 80)}")
    if run.notes:
        parts.append(f"note {untrusted(run.notes[-1], 100)}")
    return "; ".join(parts)


def _change(run: Run, parent: Run | None) -> str:
    if parent is None:
        return "parent is not known"
    before, after = parent.plan.proposal, run.plan.proposal
    signs = [*_recipe_change(before.recipe, after.recipe), *_settings_change(before, after)]
    return _joined(signs, ", ", 160) or "nothing"


def _recipe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what a recipe adds, drops and changes, operator by operator."""
    if steps_of(before) == steps_of(after):
        return []
    old, new = _operator_table(before), _operator_table(after)
    changes = []
    for sign, name in _changed_operators(old, new):
        if sign == "with":
            changes.append(f"+{_step_text(name, new[name][0])}")
        elif sign == "without":
            changes.append(f"-{_name(name)}")
        else:
            changes.append(f"{_name(name)}: {_parameter_change(old[name][0], new[name][0])}")
    return changes or ["order, drawing or repetition"]


def _parameter_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    return ", ".join(
        f"{key if _WORD.fullmatch(key) else untrusted(key, 40)} "
        f"{value_text(old.get(key))} to {value_text(new.get(key))}"
        for key in changed[:4]
    )


def _settings_change(before: Proposal, after: Proposal) -> list[str]:
    changes = []
    if before.settings.get("seed") != after.settings.get("seed"):
        changes.append(f"seed {value_text(after.settings.get('seed'))}")
    for section in ("pretrain", "finetune"):
        old, new = before.settings.get(section) or {}, after.settings.get(section) or {}
        changes += [
            f"{section}.{k}={value_text(new[k])}" for k in new if k in old and old[k] != new[k]
        ]
    return changes


def _benchmark_text(run: Run, name: str) -> str:
    score, comparison = run.scores[name], run.comparisons.get(name)
    if comparison is None:
        return f"{name} {score.percent:.1f} [{score.low:.1f}, {score.high:.1f}] n={score.num_questions}"
    return (
        f"{name} {score.percent:.1f}, {comparison.difference:+.1f} "
        f"[{comparison.low:+.1f}, {comparison.high:+.1f}] n={comparison.num_questions}"
    )


def prediction_words(predictions: Sequence[Prediction], run: Run) -> str:
    """Return which predictions of a run's differences came true; empty when none can be judged."""
    judged = [
        f"{p.benchmark} {'hit' if p.low <= run.comparisons[p.benchmark].difference <= p.high else 'missed'}"
        for p in predictions
        if p.benchmark in run.comparisons
    ]
    return f"predicted {', '.join(judged[:4])}" if judged else ""


def _rejected(rejections: Sequence[Rejection]) -> list[str]:
    lines = []
    for rejection in reversed(rejections[-_MOST_REJECTIONS:]):
        proposal = rejection.proposal
        name = untrusted(proposal.recipe.get("name", proposal.slug), 60)
        lines.append(f"- {proposal.kind} {name}, because {untrusted(rejection.reason, 160)}")
    return lines


def _untested(recipes: Sequence[Recipe], runs: Sequence[Run]) -> list[str]:
    tried = {str(run.plan.proposal.recipe.get("name")) for run in runs}
    used = {name for run in runs for name in _operator_table(run.plan.proposal.recipe)}
    left = [recipe.name for recipe in recipes if recipe.name not in tried]
    unused = sorted(
        {_name(o.name) for r in recipes for o in r.all_operators() if o.name not in used}
    )
    groups = [("Recipes without a run", left), ("Their operators without a run", unused)]
    return [
        f"{title}: {', '.join(names[start : start + _NAMES_A_LINE])}"
        for title, names in groups
        for start in range(0, len(names), _NAMES_A_LINE)
    ]


def _suggested(proposal: Proposal | None) -> list[str]:
    if proposal is None:
        return []
    cost = proposal.cost
    samples = "unknown" if cost.expected_samples is None else str(cost.expected_samples)
    return [
        f"{proposal.kind} {untrusted(proposal.title, 120)} against {run_name(proposal.parent or 'none')}; {samples} "
        f"samples, {duration(cost.seconds)}; reason {untrusted(proposal.reason, 200)}"
    ]


def statistics_lines(workspace: Workspace) -> tuple[str, ...]:
    """Return the size of the seed set and the spread of each of its scores, by operator.

    Nothing is computed that the statistics table does not hold; without a table a line says so.
    """
    from synth_agent.analysis import open_table
    from synth_agent.digests import Digests

    table = open_table(workspace, Digests(workspace))
    if table is None:
        return ("The seed set was not analysed yet: `synth-agent analyze`.",)
    lines = [f"{table.num_rows} samples. Statistic: least, quartiles, greatest."]
    for name, (spec, stat) in table.column_names().items():
        if stat not in spec.numeric_stats or len(lines) > _MOST_STATISTICS:
            continue
        found = table.quantiles(spec, (0.0, 0.25, 0.5, 0.75, 1.0), stat=stat)
        if found[0] == found[0]:
            lines.append(f"{name}: {', '.join(f'{number:.3g}' for number in found)}")
    return tuple(lines)
