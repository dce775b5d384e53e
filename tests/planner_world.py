"""A small workspace with statistics and finished runs, and a model that says what a test tells it to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from synth_agent.data_keys import remember_data_key
from synth_agent.planner.builtin import propose_recipe
from synth_agent.planner.exchange import Reply, Request, ToolCall
from synth_agent.recipes import recipe_from_mapping
from synth_agent.runs import Comparison, Plan, Prediction, Proposal, Rejection, Run, Score, digest
from synth_agent.statistics import ColumnWriter, SampleRow, column_spec, write_samples
from synth_agent.workspace import Workspace

HEAD = "skip_op_error: false\nnp: 1\nauto_op_parallelism: false\n"
RECIPES = {
    "baseline": "# title: Nothing\n# reason: Keeps all.\n" + HEAD + "process: []\n",
    "short": "# title: Short\n# reason: s\n"
    + HEAD
    + "process:\n- words_num_filter: {min_num: 3}\n",
    "pair": "# title: Pair\n# reason: p\n"
    + HEAD
    + "process:\n- words_num_filter: {min_num: 5}\n- text_length_filter: {min_len: 9}\n",
}
ROWS = 40


def fill_workspace(workspace: Workspace, captions: Sequence[str] = ()) -> Workspace:
    """Write recipes, a seed set of 40 captions and their word counts, row i having i words."""
    workspace.recipes.mkdir()
    for name, text in RECIPES.items():
        (workspace.recipes / f"{name}.yaml").write_text(text)
    texts = [*captions, *(f"caption {i}" for i in range(len(captions), ROWS))]
    records = [{"id": f"s{i}", "text": text, "images": []} for i, text in enumerate(texts)]
    seed = workspace.path(workspace.settings.data.seed)
    seed.parent.mkdir(parents=True)
    seed.write_text("".join(json.dumps(record) + "\n" for record in records))
    root = workspace.artifacts / "statistics"
    rows = [SampleRow(f"s{i}", f"sample {i}", text, ()) for i, text in enumerate(texts)]
    write_samples(root, "data", rows)
    spec = column_spec("words_num_filter", {}, lambda path: path)
    assert spec is not None
    scores = {"num_words": [float(i) for i in range(len(rows))]}
    ColumnWriter(root, spec).append([row.sample for row in rows], scores)
    remember_data_key(root, hashlib.sha256(seed.read_bytes()).hexdigest(), "data")
    return workspace


def score(benchmark: str, percent: float) -> Score:
    return Score(
        benchmark, "val", "accuracy", percent, percent - 2, percent + 2, 10.0, 500, "", "", ""
    )


def finished(proposal: Proposal, number: int, **points: float) -> Run:
    """Return a succeeded run; `points` are differences to the parent."""
    run_id = f"{number:04d}-{proposal.slug}"
    run = Run(run_id, Plan(run_id, proposal, "a test", "", proposal.sha256), "succeeded")
    process = run.stages["process"]
    process.status = "succeeded"
    process.result = {
        "kept": 30,
        "seed_samples": ROWS,
        "digest": digest(proposal.recipe.get("process")),
    }
    for name, base in (("textvqa", 40.0), ("mmbench", 20.0)):
        run.scores[name] = score(name, base + points.get(name, 0.0))
        if proposal.parent:
            low, high = points.get(name, 0.0) - 1, points.get(name, 0.0) + 1
            run.comparisons[name] = Comparison(
                name, proposal.parent, points.get(name, 0.0), low, high, 500, "inside noise"
            )
    return run


def history(workspace: Workspace) -> list[Run]:
    """Return a finished baseline and a finished run of `short`."""
    runs: list[Run] = []
    for name in ("baseline", "short"):
        path = workspace.recipes / f"{name}.yaml"
        recipe = recipe_from_mapping(name, yaml.safe_load(path.read_text()))
        proposal = propose_recipe(workspace, recipe, runs)
        runs.append(finished(proposal, len(runs) + 1, textvqa=1.5, mmbench=-0.5))
    return runs


def long_history(workspace: Workspace, count: int) -> list[Run]:
    """Return so many finished runs, each with a threshold of its own."""
    runs = history(workspace)
    pattern = runs[1].plan.proposal
    for number in range(3, count + 1):
        process = [{"words_num_filter": {"min_num": number}}]
        if number % 3 == 0:
            process.append({"text_length_filter": {"min_len": number}})
        prediction = Prediction("textvqa", 1.0, 0.0, 2.0, "a test")
        proposal = replace(
            pattern,
            slug=f"words-{number}",
            recipe={**pattern.recipe, "name": f"words-{number}", "process": process},
            predictions=(prediction,),
        )
        runs.append(finished(proposal, number, textvqa=(number % 7) - 3.0, mmbench=number % 5))
    return runs


def rejection(run: Run, reason: str, number: int = 9) -> Rejection:
    return Rejection(f"{number:04d}-rejected", run.plan.proposal, reason, "a test", "")


def proposal_object(**changes: Any) -> dict[str, Any]:
    """Return what a careful model writes, with changes."""
    prediction = {"expected": 1.0, "low": -1.0, "high": 3.0}
    return {
        "kind": "explore",
        "name": "longer-captions",
        "title": "Keep longer captions",
        "parent": "0001-baseline",
        "recipe": {"process": [{"name": "words_num_filter", "parameters": {"min_num": 7}}]},
        "settings": {},
        "reason": "Short captions say little.",
        "hypothesis": "Longer captions teach more.",
        "refuted_by": "No gain on either benchmark.",
        "evidence": ["0002-short"],
        "predictions": [{"benchmark": name, **prediction} for name in ("textvqa", "mmbench")],
        **changes,
    }


def said(text: str, *calls: ToolCall, **fields: Any) -> Reply:
    finish = "tool_calls" if calls else "stop"
    return replace(Reply(text, calls, finish, "", 10, 10, "scripted"), **fields)


@dataclass
class Scripted:
    """Answers with the next thing of a script: text, a reply, an error, or what a function gives."""

    script: Iterator[Any]
    requests: list[Request] = field(default_factory=list)

    @classmethod
    def of(cls, *answers: Any) -> Scripted:
        return cls(iter(answers))

    def ask(
        self,
        request: Request,
        on_text: Callable[[str], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        self.requests.append(request)
        answer = next(self.script)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, dict):
            answer = json.dumps(answer)
        reply = said(answer) if isinstance(answer, str) else answer
        on_text(reply.text)
        if is_cancelled():
            return replace(reply, finish="cancelled")
        return reply


def files_of(root: Path) -> dict[str, str]:
    """Return the digest of every file of a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
