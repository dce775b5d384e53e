"""A git workspace whose baseline and one other recipe were measured: real plans and real logs."""

from __future__ import annotations

from pathlib import Path

from synth_agent.planner.builtin import propose_recipe
from synth_agent.recipes import load_recipe
from synth_agent.runs import STAGES, Run
from synth_agent.workspace import Workspace, open_workspace
from tests.planner_world import fill_workspace
from tests.ui.notebook import Writer, marks


def measured(workspace: Workspace, planner: str = "") -> Workspace:
    """Fill a git workspace, write two finished runs, and return it with a planner's settings.

    Args:
        workspace: Of the fixture `git_workspace`.
        planner: What `planner:` says in synth.yaml, as one line of YAML; empty for nothing.
    """
    fill_workspace(workspace)
    make_files(workspace)
    runs: list[Run] = []
    for number, (name, right) in enumerate((("baseline", 20), ("short", 23)), 1):
        recipe = load_recipe(workspace.recipes / f"{name}.yaml")
        writer = Writer(workspace, number, propose_recipe(workspace, recipe, runs))
        runs.append(_finished(writer, right, runs))
    if planner:
        with workspace.settings_file.open("a", encoding="utf-8") as file:
            file.write(f"planner: {planner}\n")
    return open_workspace(workspace.root)


def make_files(workspace: Workspace) -> None:
    """Make every file that the settings name and that is not there, so that a proposal may run."""
    settings = workspace.settings.model_dump(mode="json")
    evaluate = settings["evaluate"]
    model = {key: value for key, value in settings["model"].items() if key != "name"}
    for section in (settings["data"], model, evaluate["textvqa"], evaluate["mmbench"]):
        for value in section.values():
            path = workspace.path(value) if isinstance(value, str) else workspace.root
            if not path.exists():
                target: Path = path if path.suffix else path / "file"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("content", encoding="utf-8")


def _finished(writer: Writer, right: int, before: list[Run]) -> Run:
    from synth_agent import pipeline

    writer.start()
    writer.stage("process", {"kept": 40, "seed_samples": 40})
    for name in STAGES[1:]:
        writer.stage(name)
    scores = {
        "textvqa": writer.score("textvqa", marks(right, 50)),
        "mmbench": writer.score("mmbench", marks(right - 6, 40)),
    }
    for name, score in scores.items():
        if before:
            writer.compared(score, before[0].scores[name], before[0].id, "inside noise")
    writer.finish("succeeded", "inside noise" if before else "baseline")
    return pipeline.load_run(writer.workspace, writer.id)
