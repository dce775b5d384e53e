"""Pictures drawn by a diffusion model: the shipped recipe on a tiny pipeline, and the bound on draws."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from synth_agent.demo import prepare_demo
from synth_agent.miniworld import write_world
from synth_agent.stages.diffusion import MOST_DRAWS, draw_picture
from synth_agent.stages.made_pictures import SYNTHETIC
from tests.tiny_models import save_stable_diffusion

RECIPE = Path(__file__).parents[1] / "recipes" / "by-permission" / "diffusion-regeneration.yaml"
MADE = Path("artifacts/images/diffusion-regeneration")
NUM_SAMPLES = 24
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="the package diffusers is not installed (extra: diffusion)",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusion")
    sizes = {"num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
    write_world(root / "world", seed=5, num_seed_samples=NUM_SAMPLES, **sizes)
    prepare_demo(root / "workspace", lambda line: None, root / "world")
    save_stable_diffusion(root / "workspace" / "models" / "tiny-diffusion")
    return root / "workspace"


def _adapted(workspace: Path, name: str, *, accepts: str | None = None) -> Path:
    """Write the shipped recipe with the models' folders of the workspace.

    `hf_img2seq` stays: captions are given, and the folder that it names is not read.
    """
    text = RECIPE.read_text("utf-8")
    text = text.replace("models/clip-vit-base-patch32", "models/clip")
    text = text.replace("models/stable-diffusion-v1-5", "models/tiny-diffusion")
    if accepts is not None:
        assert text.count("min_score: 0.32") == 1
        text = text.replace("min_score: 0.32", f"min_score: {accepts}")
    path = workspace / "recipes" / f"{name}.yaml"
    path.write_text(text, "utf-8")
    return path


def _run(workspace: Path, recipe: Path, output: str) -> tuple[Path, dict[str, Any]]:
    arguments = {
        "recipe": str(recipe.relative_to(workspace)),
        "seed": "data/seed/seed.jsonl",
        "images": "data/seed",
        "original": "data/seed/stage_1.json",
        "output": f"artifacts/processed/{output}",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process"]
        + [f"--{key}={value}" for key, value in arguments.items()],
        cwd=workspace,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "/40 [" not in ran.stderr, "a progress bar for every picture"
    made = workspace / "artifacts" / "processed" / output
    return made, json.loads((made / "result.json").read_text("utf-8"))


def _seed_files(workspace: Path) -> dict[str, bytes]:
    folder = workspace / "data" / "seed"
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_diffusers
def test_the_shipped_recipe_runs(workspace: Path) -> None:
    before = _seed_files(workspace)
    output, result = _run(workspace, _adapted(workspace, "as-shipped"), "as-shipped")
    fitting, unfitting, drawn, accepted = result["operators"]
    assert drawn["name"] == "image_diffusion_mapper"
    assert drawn["before"] == drawn["after"] == unfitting["after"] == accepted["before"] > 0
    assert result["kept"] == fitting["after"] + accepted["after"]
    pictures = sorted((workspace / MADE).iterdir())
    assert len(pictures) == drawn["after"]
    assert _seed_files(workspace) == before
    assert len(json.loads((output / "processed.json").read_text("utf-8"))) == result["kept"]


@needs_diffusers
def test_pictures_that_are_drawn_belong_to_the_set_and_come_again(workspace: Path) -> None:
    # Noise of a pipeline without training fits no caption: the last filter lets all of it pass.
    recipe = _adapted(workspace, "accepting", accepts="-1.0")
    output, result = _run(workspace, recipe, "first")
    fitting, regenerated = result["branches"]
    assert regenerated["samples"] > 0
    lines = (output / "processed.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == fitting["samples"] + regenerated["samples"]
    for number, record in enumerate(records):
        [name] = record["images"]
        is_drawn = number >= fitting["samples"]
        assert name.startswith(f"{SYNTHETIC}/") == is_drawn
        with Image.open(output / "images" / name) as picture:
            picture.load()
            if is_drawn:
                original = workspace / "data" / "seed" / "images" / f"{record['id'][-6:]}.jpg"
                with Image.open(original) as before:
                    assert picture.size == before.size
                    assert picture.tobytes() != before.tobytes()
    _, again = _run(workspace, recipe, "second")
    assert again["digest"] == result["digest"]


class _Refused:
    """A pipeline whose safety checker accepts one draw at most."""

    safety_checker = object()

    def __init__(self, accepts: int) -> None:
        self.draws = 0
        self._accepts = accepts

    def __call__(self, image: Image.Image, **options: Any) -> SimpleNamespace:
        self.draws += 1
        is_refused = self.draws != self._accepts
        return SimpleNamespace(images=[image], nsfw_content_detected=[is_refused])


def test_a_picture_that_is_always_refused_stops_the_run_and_names_the_caption() -> None:
    picture = Image.new("RGB", (30, 20))
    third = _Refused(3)
    assert draw_picture(third, "a red ball", picture, 0.8, 7.5).size == (30, 20)
    assert third.draws == 3
    never = _Refused(0)
    with pytest.raises(ValueError, match=f"refused {MOST_DRAWS} pictures of 'a red ball'"):
        draw_picture(never, "a red ball", picture, 0.8, 7.5)
    assert never.draws == MOST_DRAWS
