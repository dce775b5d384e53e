"""A workspace with a written history: real plan files and real event logs, pinned times."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from synth_agent.runs import (
    STAGES,
    Comparison,
    Cost,
    Event,
    Plan,
    Proposal,
    Score,
    dump_plan,
    dump_proposal,
)
from synth_agent.workspace import Workspace, open_workspace

HOSTILE = "[bold]not bold[/] \x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07 \u202eback"
"""Text that a terminal or a markup parser would act on."""
SETTINGS_TEXT = """\
goal: Which data recipe makes the mini model better?
baseline: baseline
model: {name: mgm-mini}
"""
RECIPES: dict[str, list[dict[str, Any]]] = {
    "baseline": [],
    "similarity": [
        {"image_text_similarity_filter": {"min_score": 0.32, "max_score": 1.0}},
    ],
    "words": [{"words_num_filter": {"min_num": 5, "max_num": 40}}],
}


def make_workspace(root: Path) -> Workspace:
    """Return a new workspace with recipes, in a git repository, with no run yet."""
    (root / "recipes").mkdir(parents=True)
    (root / "data" / "seed").mkdir(parents=True)
    (root / "synth.yaml").write_text(SETTINGS_TEXT, "utf-8")
    (root / ".gitignore").write_text("artifacts/\n", "utf-8")
    records = [json.dumps({"id": str(i), "text": "a sign"}) for i in range(300)]
    (root / "data" / "seed" / "seed.jsonl").write_text("\n".join(records) + "\n", "utf-8")
    for command in (
        ["init", "-q", "-b", "main"],
        ["config", "user.name", "Ada"],
        ["config", "user.email", "ada@localhost"],
    ):
        subprocess.run(["git", "-C", str(root), *command], check=True, timeout=600)
    return open_workspace(root)


def proposal_for(workspace: Workspace, recipe: str, parent: str | None) -> Proposal:
    """Return a proposal as a planner makes it."""
    settings = workspace.settings.model_dump(mode="json")
    sections = ("seed", "data", "model", "pretrain", "finetune", "evaluate", "compute")
    return Proposal(
        title=f"Try the recipe {recipe}",
        slug=recipe,
        kind="baseline" if parent is None else "explore",
        reason="Pairs whose caption does not describe the picture teach the wrong words.",
        evidence=(parent,) if parent else (),
        parent=parent,
        recipe={"name": recipe, "process": RECIPES[recipe]},
        settings={section: settings[section] for section in sections},
        cost=Cost(300, 204, 110.0, "samples: the recipe's note; time: median of this workspace"),
        proposed_by="built-in planner",
    )


class Writer:
    """Writes one run's files with times that do not depend on the clock."""

    def __init__(self, workspace: Workspace, number: int, proposal: Proposal) -> None:
        self.workspace = workspace
        self.id = f"{number:04d}-{proposal.slug}"
        self._minute = number * 10
        self.paths = workspace.run(self.id)
        self.paths.root.mkdir(parents=True)
        plan = Plan(self.id, proposal, "ada", self._time(), proposal.sha256)
        self.paths.plan.write_text(dump_plan(plan), "utf-8")
        self.paths.proposal.write_text(dump_proposal(proposal), "utf-8")
        self.plan = plan
        workspace.logs(self.id).mkdir(parents=True, exist_ok=True)

    def _time(self) -> str:
        self._minute += 1
        return f"2026-11-20T{8 + self._minute // 60:02d}:{self._minute % 60:02d}:00.000+00:00"

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        with self.paths.events.open("a", encoding="utf-8") as log:
            log.write(Event(self._time(), kind, fields).line())

    def stage(self, name: str, result: Mapping[str, Any] | None = None) -> None:
        """Write a stage from its start to its end."""
        self.event("stage_started", stage=name, key="k", pid=1, pid_started=0.0, command=[])
        if name in ("pretrain", "finetune"):
            self.losses(name, 40, 40)
        self.event(
            "stage_finished", stage=name, key="k", status="succeeded", exit_code=0, seconds=34.0,
            output=f"artifacts/{name}", result=dict(result or {}), error=None,
        )  # fmt: skip

    def losses(self, stage: str, steps: int, total: int) -> None:
        """Write a falling loss."""
        for step in range(1, steps + 1):
            self.event(
                "progress", stage=stage, step=step, total=total, unit="step",
                loss=0.8 + 3.2 * math.exp(-step / 9) + 0.08 * math.sin(step * 1.7), lr=1e-3,
                grad_norm=1.2, samples_per_second=21.5, eta_seconds=(total - step) * 1.5,
            )  # fmt: skip

    def start(self) -> None:
        """Write that a worker began."""
        self.event("run_started", pid=1, host="here", worker_version="1", resumed=False)

    def log(self, stage: str, text: str) -> None:
        """Write a stage's log file."""
        (self.workspace.logs(self.id) / f"{stage}.log").write_text(text, "utf-8", newline="")

    def score(self, benchmark: str, marks: Mapping[str, float], width: float = 6.0) -> Score:
        """Write a predictions file and the score built from it."""
        folder = self.workspace.artifacts / "predictions" / self.id / benchmark
        folder.mkdir(parents=True)
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as lines:
            for question, mark in marks.items():
                lines.write(json.dumps(_record(benchmark, question, mark)) + "\n")
        percent = 100 * sum(marks.values()) / len(marks)
        score = Score(
            benchmark=benchmark, split="val", metric="accuracy", percent=percent,
            low=percent - width, high=percent + width,
            chance=25.0 if benchmark == "mmbench" else 1.6, num_questions=len(marks),
            predictions_sha256="0" * 64,
            predictions=str((folder / "predictions.jsonl").relative_to(self.workspace.root)),
            scorer="test", categories={"reading": percent + 3, "counting": percent - 4},
        )  # fmt: skip
        self.event("score_recorded", score=asdict(score))
        return score

    def compared(self, score: Score, before: Score, parent: str, verdict: str) -> None:
        """Write a comparison."""
        difference = score.percent - before.percent
        comparison = Comparison(
            benchmark=score.benchmark, parent=parent, difference=difference, low=difference - 5,
            high=difference + 5, num_questions=score.num_questions, verdict=verdict,
        )  # type: ignore[arg-type]  # fmt: skip
        self.event("compared", comparison=asdict(comparison))

    def finish(
        self, status: str, verdict: str | None, error: Mapping[str, str] | None = None
    ) -> None:
        """Write the run's end."""
        self.event("run_finished", status=status, verdict=verdict, message="", error=error)


def _record(benchmark: str, question: str, mark: float) -> dict[str, Any]:
    return {
        "key": question,
        "question_id": question,
        "image": f"{question}.png",
        "prompt": f"What does sign {question} say? {HOSTILE if question == '0' else ''}\nAnswer.",
        "prediction": "stop" if mark else "go",
        "score": mark,
        "category": "reading",
        **({"answers": ["stop", "halt"]} if benchmark == "textvqa" else {"answer": "B"}),
    }


def marks(right: int, total: int) -> dict[str, float]:
    """Return `total` questions of which the first `right` are answered right."""
    return {str(i): float(i < right) for i in range(total)}


def finished_run(
    workspace: Workspace,
    number: int,
    recipe: str,
    parent: Writer | None,
    right: tuple[int, int],
    verdict: str,
) -> Writer:
    """Write a complete run with both benchmarks."""
    run = Writer(workspace, number, proposal_for(workspace, recipe, parent.id if parent else None))
    run.start()
    run.stage("process", {"kept": 204 if parent else 300, "seed_samples": 300})
    for name in STAGES[1:]:
        run.stage(name)
    run.log("finetune", "step 40 loss 0.8\n" + HOSTILE + "\n")
    run.scores = {  # type: ignore[attr-defined]
        "textvqa": run.score("textvqa", marks(right[0], 50)),
        "mmbench": run.score("mmbench", marks(right[1], 40)),
    }
    if parent is not None:
        for name, score in run.scores.items():  # type: ignore[attr-defined]
            run.compared(score, parent.scores[name], parent.id, verdict)  # type: ignore[attr-defined]
    run.finish("succeeded", verdict)
    return run


def rename(proposal: Proposal, title: str) -> Proposal:
    """Return the proposal under another title."""
    return replace(proposal, title=title)
