"""The demo: a workspace of its own with the mini world in it, and its unattended run.

Everything is written by the seeded generator or copied from the package, so it needs no network.
"""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from synth_agent import journal, pipeline
from synth_agent.errors import EXIT_FAILED, EXIT_OK, InvalidInput
from synth_agent.headless import follow, narrate, run_data, run_text
from synth_agent.imported import bring_shipped
from synth_agent.planner import BuiltinPlanner
from synth_agent.proposal_words import proposal_text
from synth_agent.runs import Proposal, Run
from synth_agent.wording import duration
from synth_agent.workspace import SETTINGS_NAME, Workspace, open_workspace

WORLD_SEED = 1
_MODEL_PARTS = ("clip", "convnext", "gemma", "blip2", "blip")
_IGNORED = "artifacts/\ndata/\nmodels/\n"
_README = """# A demo workspace of synth-agent

`synth.yaml` holds the settings, `recipes/` what can be tried, `runs/` one folder a run.
`data/` and `models/` are the mini world; they are written again by `synth-agent demo` and are
therefore not in git.
"""

Report = Callable[[str], None]


def prepare_demo(root: Path, report: Report, data: Path | None = None) -> Workspace:
    """Make the demo workspace, or complete and open the one that is there.

    Args:
        root: Folder of the workspace.
        report: Called with a line for each thing that is done.
        data: Folder written by `write_world` to move in; None writes the usual world.

    Raises:
        InvalidInput: If the folder holds something else.
    """
    root = root.resolve()
    if not (root / SETTINGS_NAME).exists():
        _refuse_foreign(root)
        root.mkdir(parents=True, exist_ok=True)
        _write_settings(root)
    _write_models(root, report)
    if data is not None:
        data.rename(root / "data")
    _write_data(root, report)
    if not (root / ".git").exists():
        _init_repository(root, report)
    return open_workspace(root)


def _refuse_foreign(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InvalidInput(
            "Not a demo workspace",
            f"{root} exists, is not empty and has no {SETTINGS_NAME}",
            "name another folder: synth-agent demo DIR",
        )


def _write_settings(root: Path) -> None:
    """Write the files that are committed; `synth.yaml` last, since it marks a workspace."""
    world = resources.files("synth_agent.miniworld")
    recipes = root / "recipes"
    recipes.mkdir(exist_ok=True)
    for source, target in (
        (world.joinpath("recipes"), recipes),
        (world.joinpath("recipes", "by-permission"), recipes / "by-permission"),
    ):
        target.mkdir(exist_ok=True)
        for recipe in sorted(source.iterdir(), key=lambda entry: entry.name):
            if recipe.name.endswith(".yaml"):
                (target / recipe.name).write_text(recipe.read_text(encoding="utf-8"), "utf-8")
    bring_shipped(root)
    (root / ".gitignore").write_text(_IGNORED, "utf-8")
    (root / "README.md").write_text(_README, "utf-8")
    settings = world.joinpath("synth.yaml").read_text(encoding="utf-8")
    (root / SETTINGS_NAME).write_text(settings, "utf-8")


def _write_models(root: Path, report: Report) -> None:
    """Copy or unpack the shipped model parts that are missing, each complete or not at all.

    Raises:
        InvalidInput: If the installation lacks a part.
    """
    assets = resources.files("synth_agent.miniworld").joinpath("assets")
    for part in _MODEL_PARTS:
        target = root / "models" / part
        if target.exists():
            continue
        report(f"copying model part {part}")
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        packed = assets.joinpath(f"{part}.zip")
        with resources.as_file(packed if packed.is_file() else assets.joinpath(part)) as source:
            if source.suffix == ".zip":
                shutil.unpack_archive(source, partial)
            elif source.is_dir():
                shutil.copytree(source, partial)
            else:
                raise InvalidInput(
                    "Model part is missing",
                    f"{source}: not there",
                    "install synth-agent again, or build it: "
                    f"python -m synth_agent.miniworld.build --part {part}",
                )
        partial.rename(target)


def _write_data(root: Path, report: Report) -> None:
    from synth_agent.miniworld import write_world

    data = root / "data"
    if data.exists():
        return
    partial = root / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_world(partial, seed=WORLD_SEED, progress=report)
    partial.rename(data)


def _init_repository(root: Path, report: Report) -> None:
    """Start the repository. A machine without a git identity gets one for this repository only."""
    report("starting the git repository")
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True, timeout=60)
    identity = subprocess.run(
        ["git", "-C", str(root), "config", "user.email"], capture_output=True, timeout=60
    )
    if identity.returncode != 0:
        for key, value in (("name", "synth-agent demo"), ("email", "demo@localhost")):
            subprocess.run(
                ["git", "-C", str(root), "config", f"user.{key}", value], check=True, timeout=60
            )
    paths = [root / SETTINGS_NAME, root / ".gitignore", root / "README.md"]
    paths += sorted((root / "recipes").rglob("*.yaml"))
    paths += sorted(path for path in (root / "runs").rglob("*") if path.is_file())
    journal.commit(open_workspace(root), paths, "Start a demo workspace with the mini world")


def run_demo(workspace: Workspace, *, as_json: bool) -> int:
    """Run the demo unattended: the baseline, the best recipe by evidence, and the comparison.

    The choice looks only at the runs of this call, so that a second call asks for the same
    experiments and finds every stage done.

    Returns:
        The exit code.
    """
    started = time.monotonic()
    history: list[Run] = []
    for _ in range(2):
        proposal = BuiltinPlanner().propose(workspace, history, ())
        if proposal is None:
            break
        run = _run_unattended(workspace, proposal)
        history.append(run)
        if run.status != "succeeded":
            break
    _print_results(workspace, history, as_json=as_json)
    narrate(f"finished in {duration(time.monotonic() - started)}")
    succeeded = len(history) == 2 and all(run.status == "succeeded" for run in history)
    return EXIT_OK if succeeded else EXIT_FAILED


def _run_unattended(workspace: Workspace, proposal: Proposal) -> Run:
    """Show, approve and run a proposal. The person who asked for the demo is its approver."""
    narrate("\n" + proposal_text(workspace, proposal))
    pipeline.validate(workspace, proposal)
    plan = pipeline.approve(
        workspace,
        proposal,
        shown_sha256=proposal.sha256,
        approver=f"{getpass.getuser()}, by starting the unattended demo",
    )
    narrate(f"approved as run {plan.run_id}")
    pipeline.launch(workspace, plan)
    try:
        return follow(workspace, plan.run_id)
    except KeyboardInterrupt:
        narrate(f"stopping run {plan.run_id}; continue it with: synth-agent resume {plan.run_id}")
        pipeline.cancel(workspace, plan.run_id)
        raise


def _print_results(workspace: Workspace, history: list[Run], *, as_json: bool) -> None:
    commits = journal.log(workspace)
    if as_json:
        print(json.dumps({"runs": [run_data(run) for run in history], "commits": commits}))
        return
    for run in history:
        print()
        print(run_text(run, workspace.settings.weights))
    print("\ngit log of the workspace, newest first")
    for line in commits:
        print(f"  {line}")
