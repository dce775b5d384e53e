"""The gate over the real planner, recipes, pipeline and git. No worker is started."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from synth_agent.runs import Plan, load_plan
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.ui.screens.home import HomeScreen
from synth_agent.workspace import Workspace
from tests.ui.conftest import Open, seen, settle
from tests.ui.notebook import make_workspace

RECIPES = Path(__file__).parents[2] / "recipes"


class Unlaunched(WorkspaceBackend):
    """The real backend, except that a launch is recorded instead of starting a worker."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.launched: list[Plan] = []

    def launch(self, plan: Plan) -> None:
        self.launched.append(plan)


@pytest.fixture
def real(tmp_path: Path) -> Unlaunched:
    """A workspace in which the baseline and one other recipe may run."""
    workspace = make_workspace(tmp_path / "notebook")
    for name in ("baseline", "words"):
        shutil.copy(RECIPES / f"{name}.yaml", workspace.recipes)
    settings = workspace.settings.model_dump(mode="json")
    evaluate = settings["evaluate"]
    model = {k: v for k, v in settings["model"].items() if k != "name"}
    for section in (settings["data"], model, evaluate["textvqa"], evaluate["mmbench"]):
        for value in section.values():
            path = workspace.path(value) if isinstance(value, str) else workspace.root
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return Unlaunched(workspace)


async def open_gate(pilot: Pilot[int]) -> None:
    await settle(pilot)
    await pilot.press("p")
    await settle(pilot)


def subjects(root: Path) -> str:
    """Return the subjects of the commits."""
    command = ["git", "-C", str(root), "log", "--format=%s"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


async def test_the_baseline_is_proposed_first_and_its_approval_is_committed(
    real: Unlaunched, open_app: Open
) -> None:
    async with open_app(real, (120, 50)) as pilot:
        await settle(pilot)
        assert "Measure the baseline" in seen(pilot)
        await open_gate(pilot)
        shown = seen(pilot)
        assert "300 of 300 (100 %)" in shown
        await pilot.press("a")
        await settle(pilot)
        (plan,) = real.launched
        assert plan.sha256[:16] in shown
        assert load_plan(real.root / "runs" / plan.run_id / "plan.yaml") == plan
        assert plan.run_id in subjects(real.root)
        assert "◌ approved" in seen(pilot)


async def test_an_edited_recipe_is_checked_by_the_catalogue(
    real: Unlaunched, open_app: Open
) -> None:
    async with open_app(real, (160, 60)) as pilot:
        await open_gate(pilot)
        await pilot.press("o")
        await settle(pilot)
        await pilot.press("down", "enter")
        await settle(pilot)
        assert "words_num_filter" in seen(pilot)
        await pilot.press("e")
        editor = pilot.app.screen.query_one(TextArea)
        good = editor.text
        editor.text = good.replace("min_num: 10", "min_numb: 10")
        await pilot.pause(0.4)
        await settle(pilot)
        assert "cannot run" in seen(pilot)
        assert "min_num" in seen(pilot)
        editor.text = good.replace("min_num: 10", "min_num: 12")
        await pilot.pause(0.4)
        await settle(pilot)
        assert "✓ checked" in seen(pilot)
        await pilot.press("escape", "a")
        await settle(pilot)
        (plan,) = real.launched
        (operator,) = plan.proposal.recipe["process"]
        assert operator["words_num_filter"]["min_num"] == 12
        assert plan.run_id == "0001-words-edited"


async def test_a_rejection_is_kept_and_shown(real: Unlaunched, open_app: Open) -> None:
    async with open_app(real, (140, 40)) as pilot:
        await open_gate(pilot)
        await pilot.press("r")
        await settle(pilot)
        pilot.app.screen.query_one(Input).value = "not today"
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(pilot.app.screen, HomeScreen)
        (rejection,) = real.notebook().rejections
        assert rejection.reason == "not today"
        await pilot.press("4")
        await settle(pilot)
        assert "⊘ rejected" in seen(pilot)


async def test_a_missing_file_is_said_before_anything_runs(
    real: Unlaunched, open_app: Open
) -> None:
    (real.root / "models" / "gemma-2b-it").unlink()
    async with open_app(real) as pilot:
        await open_gate(pilot)
        text = seen(pilot)
        assert "cannot run File is missing" in text
        assert "model.language_model" in text
        await pilot.press("a")
        await settle(pilot)
        assert real.launched == []
        assert not list(real.root.glob("runs/*/plan.yaml"))
