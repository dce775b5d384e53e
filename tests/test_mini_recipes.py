"""Every recipe of the mini world runs, by Data-Juicer's own operators, on the mini world's models."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from synth_agent.demo import prepare_demo
from synth_agent.effective import read_training_list
from synth_agent.miniworld import write_world
from synth_agent.recipes import load_catalogue, load_recipe, validate_recipe
from synth_agent.stages import process
from synth_agent.workspace import open_workspace

RECIPES = sorted(
    path.stem for path in (Path(process.__file__).parents[1] / "miniworld/recipes").glob("*.yaml")
)
NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    world = root / "world"
    write_world(
        world,
        seed=5,
        num_seed_samples=NUM_SAMPLES,
        num_instructions=3,
        num_textvqa=3,
        num_mmbench=6,
    )
    prepare_demo(root / "workspace", lambda line: None, world)
    return root / "workspace"


def test_all_recipes_are_here() -> None:
    assert len(RECIPES) >= 9


def test_examples_of_the_page_on_recipes_are_valid(demo: Path) -> None:
    workspace = open_workspace(demo)
    page = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
    examples = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for number, text in enumerate(examples):
        path = demo / f"example-{number}.yaml"
        path.write_text(text, encoding="utf-8")
        validate_recipe(load_recipe(path), load_catalogue(), workspace)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(demo: Path, name: str) -> None:
    output = demo / "artifacts" / name
    arguments = {
        "recipe": f"recipes/{name}.yaml",
        "seed": "data/seed/seed.jsonl",
        "images": "data/seed",
        "original": "data/seed/stage_1.json",
        "output": str(output),
    }
    flags = [f"--{key}={value}" for key, value in arguments.items()]
    ran = subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process", *flags],
        cwd=demo,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads((output / "result.json").read_text())
    records = json.loads((output / "processed.json").read_text())
    assert len(records) == result["kept"] > 0
    if "branches" in result:
        _check_plan(output, result, len(records))
    if name == "recaption":
        assert result["kept"] == NUM_SAMPLES
        captions = [record["conversations"][1]["value"] for record in records]
        assert all(captions)
        assert not any("http" in caption or "www" in caption for caption in captions)
    elif name == "recaption-similarity":
        assert result["operators"][0]["after"] == 2 * NUM_SAMPLES


def _check_plan(output: Path, result: Mapping[str, Any], samples: int) -> None:
    """Every branch adds something, is a file of its own, and the counts agree."""
    shares = result["branches"]
    assert all(share["samples"] == share["taken"] * share["repeat"] > 0 for share in shares)
    assert sum(share["samples"] for share in shares) == result["merged"]
    assert result["merged"] - result["repetitions"] == result["before_cap"] == samples
    names = {f"branch-{n}-{share['name']}.yaml" for n, share in enumerate(shares, 1)}
    assert {path.name for path in output.glob("branch-*.yaml")} == names
    listed = read_training_list(output, output.parents[1] / "data" / "seed" / "seed.jsonl")
    assert len(listed.rows) == samples
    most = max(share["repeat"] for share in shares)
    assert max(Counter(listed.samples).values()) >= most
