"""Statistics that need a model or a package of their own: analysis, retention and the run agree."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synth_agent import analysis, recipe_policy
from synth_agent.cli import main
from synth_agent.demo import prepare_demo
from synth_agent.digests import Digests
from synth_agent.miniworld import write_world
from synth_agent.recipes import list_recipes
from synth_agent.workspace import Workspace, open_workspace
from tests.tiny_models import (
    save_aesthetics_predictor,
    save_detector,
    save_image_classifier,
    save_tagger,
)

NUM_SAMPLES = 24
AESTHETICS = "aesthetics-predictor-v2-linear"
WATERMARK = ("image_watermark_filter", "hf_watermark_model", "models/watermark")


def needs(module: str, package: str) -> Any:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"the package {package} is not installed"
    )


CASES = [
    pytest.param(WATERMARK, "prob_threshold", id="watermark"),
    pytest.param(("image_nsfw_filter", "hf_nsfw_model", "models/nsfw"), "max_score", id="nsfw"),
    pytest.param(
        ("image_aesthetics_filter", "hf_scorer_model", f"models/{AESTHETICS}"),
        "max_score",
        id="aesthetics",
        marks=needs("aesthetics_predictor", "simple-aesthetics-predictor"),
    ),
    pytest.param(
        ("phrase_grounding_recall_filter", "hf_owlvit", "models/owlvit"),
        "max_recall",
        id="phrases",
        marks=needs("nltk", "nltk"),
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace without recipes, with a model folder for every operator that is tested."""
    root = tmp_path_factory.mktemp("statistics")
    sizes = {"num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
    write_world(root / "world", seed=5, num_seed_samples=NUM_SAMPLES, **sizes)
    prepare_demo(root / "workspace", lambda line: None, root / "world")
    for recipe in (root / "workspace" / "recipes").rglob("*.yaml"):
        recipe.unlink()
    models = root / "workspace" / "models"
    save_image_classifier(models / "watermark", seed=1)
    save_image_classifier(models / "nsfw", seed=2)
    save_detector(models / "owlvit")
    save_tagger(root / "workspace" / "nltk_data")
    if importlib.util.find_spec("aesthetics_predictor") is not None:
        save_aesthetics_predictor(models / AESTHETICS)
    return root / "workspace"


@pytest.fixture
def workspace(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    shutil.copytree(world, tmp_path / "copy", symlinks=True)
    monkeypatch.setenv("NLTK_DATA", str(world / "nltk_data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return open_workspace(tmp_path / "copy")


def _write_recipe(workspace: Workspace, operator: tuple[str, str, str], **bounds: float) -> None:
    name, parameter, folder = operator
    lines = [f"    {key}: {value}" for key, value in {parameter: folder, **bounds}.items()]
    head = "# title: Tried\n# reason: It is tried.\nskip_op_error: false\nnp: 1\n"
    head += "auto_op_parallelism: false\nprocess:\n"
    text = head + f"- {name}:\n" + "\n".join([*lines, "    num_proc: 0"]) + "\n"
    (workspace.root / "recipes" / "tried.yaml").write_text(text, "utf-8")


def _scores(workspace: Workspace, operator: str) -> list[float]:
    wanted, skipped = analysis.wanted_operators(workspace, Digests(workspace))
    assert skipped == ()
    chosen = tuple(want for want in wanted if want[0] == operator)
    [column] = analysis.analyze(workspace, chosen, lambda record: None)["columns"]
    assert (column["problem"], column["errors"]) == ("", 0)
    table = analysis.open_table(workspace, Digests(workspace))
    assert table is not None
    [spec] = [spec for spec in table.columns() if spec.operator == operator]
    values = table.values(spec, spec.main_stat)
    assert values.known.all()
    return [float(score) for row in range(NUM_SAMPLES) for score in values.at(row)]


def _processed_rows(workspace: Workspace) -> list[int]:
    data = workspace.settings.data
    arguments = {
        "recipe": "recipes/tried.yaml",
        "seed": data.seed,
        "images": data.images,
        "original": data.original,
        "output": "artifacts/tried",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process"]
        + [f"--{key}={value}" for key, value in arguments.items()],
        cwd=workspace.root,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads((workspace.root / "artifacts/tried/rows.json").read_text("utf-8"))
    return list(rows["kept"])


@pytest.mark.parametrize(("operator", "bound"), CASES)
def test_analysis_retention_and_run_agree(
    workspace: Workspace, operator: tuple[str, str, str], bound: str
) -> None:
    _write_recipe(workspace, operator)
    scores = _scores(workspace, operator[0])
    lowest, *_, highest = sorted(set(scores))
    assert lowest < highest
    lower = {"min_score": -1.0} if operator[0] == "image_aesthetics_filter" else {}
    _write_recipe(workspace, operator, **lower, **{bound: (lowest + highest) / 2})
    [recipe] = list_recipes(workspace)
    digests = Digests(workspace)
    table = analysis.open_table(workspace, digests)
    assert table is not None
    made = analysis.recipe_retention(workspace, recipe, table, digests)
    assert made.rows is not None
    kept = _processed_rows(workspace)
    assert made.rows.tolist() == kept
    assert 0 < len(kept) < NUM_SAMPLES


def test_watermark_scores_are_the_models_own(workspace: Workspace) -> None:
    import torch
    from transformers import AutoImageProcessor, ViTForImageClassification

    _write_recipe(workspace, WATERMARK)
    folder = workspace.root / WATERMARK[2]
    model = ViTForImageClassification.from_pretrained(folder).eval()
    process = AutoImageProcessor.from_pretrained(folder)
    images = workspace.path(workspace.settings.data.images) / "images"
    scores = _scores(workspace, WATERMARK[0])
    for score, path in zip(scores, sorted(images.glob("*.jpg")), strict=True):
        with Image.open(path) as picture, torch.no_grad():
            logits = model(**process(picture.convert("RGB"), return_tensors="pt")).logits
        assert score == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-5)
    assert np.std(scores) > 1e-4


def test_a_missing_package_is_left_out_unless_asked_for(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_recipe(workspace, WATERMARK)
    absent = (("no_such_module", "no-such-package"),)
    monkeypatch.setitem(recipe_policy.PACKAGES, WATERMARK[0], absent)
    where = ["-w", str(workspace.root), "analyze"]
    assert main(where) == 0
    told = capsys.readouterr()
    assert f"left out: {WATERMARK[0]}: needs no-such-package" in told.err
    assert "text_length_filter" in told.out
    assert main([*where, "--operator", WATERMARK[0]]) == 2
    assert "install no-such-package" in capsys.readouterr().err


def test_an_operator_that_fails_for_another_reason_is_an_error(workspace: Workspace) -> None:
    _write_recipe(workspace, WATERMARK)
    (workspace.root / WATERMARK[2] / "preprocessor_config.json").write_text("{}", "utf-8")
    (workspace.root / WATERMARK[2] / "config.json").write_text("{}", "utf-8")
    assert main(["-w", str(workspace.root), "analyze"]) == 1


@needs("nltk", "nltk")
def test_data_that_are_missing_are_named_with_the_command(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_recipe(workspace, ("phrase_grounding_recall_filter", "hf_owlvit", "models/owlvit"))
    monkeypatch.setenv("NLTK_DATA", str(workspace.root / "nothing"))
    monkeypatch.setenv("HOME", str(workspace.root))
    shutil.rmtree(workspace.root / "nltk_data")
    where = ["-w", str(workspace.root), "analyze"]
    assert main(where) == 0
    assert "python -m nltk.downloader punkt_tab" in capsys.readouterr().out
    assert main([*where, "--operator", "phrase_grounding_recall_filter"]) == 1
