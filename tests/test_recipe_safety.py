"""Recipes from anybody: hostile ones are refused, valid ones are what Data-Juicer accepts too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.catalogue import COSTS, NEEDS, load_catalogue
from synth_agent.errors import InvalidInput
from synth_agent.operator_commands import operators
from synth_agent.recipe_order import check_packages, missing_packages
from synth_agent.recipe_policy import REVIEWED_OPERATORS
from synth_agent.recipes import load_recipe, validate_recipe
from synth_agent.workspace import Settings, Workspace
from tests.hostile_recipes import CASES, Case, plan, step, written
from tests.valid_recipes import random_recipes

ROOT = Path(__file__).parents[1]

HANGS_AT = 10.0
"""Seconds of the processor: a refusal takes milliseconds, a bomb that is unpacked takes minutes."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with model folders, good and bad."""
    root = tmp_path_factory.mktemp("workspace")
    outside = tmp_path_factory.mktemp("outside")
    for path in (
        *("clip/model.safetensors", "pickled/pytorch_model.bin", "code/model.safetensors"),
        *("code/modeling.py", "deep/model.safetensors", "deep/unet/diffusion.ckpt"),
        *("sd/unet/model.safetensors", "qa/model.safetensors"),
        *("mixed/pytorch_model.bin", "mixed/other.safetensors"),
    ):
        file = root / "models" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "models" / "out").symlink_to(outside, target_is_directory=True)
    (root / "synth.yaml").touch()
    return Workspace(root, Settings())


def _judge(text: str, workspace: Workspace) -> None:
    path = workspace.root / "recipe.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    validate_recipe(load_recipe(path), load_catalogue(), workspace)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_recipe_is_refused_at_once(case: Case, workspace: Workspace) -> None:
    started = time.process_time()  # what the machine does beside it does not count
    with pytest.raises(InvalidInput) as caught:
        _judge(case.text, workspace)
    assert time.process_time() - started < HANGS_AT
    error = caught.value
    assert case.word.lower() in str(error).lower()
    assert "recipe" in error.message
    assert error.hint
    assert len(str(error)) < 9000
    assert "\x1b" not in str(error)


def test_the_table_has_hundreds_of_different_cases() -> None:
    assert len(CASES) >= 200
    assert len({case.text for case in CASES}) == len(CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_random_valid_recipes_are_accepted_here_and_by_data_juicer(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "input.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    places = {"dataset_path": "input.jsonl", "export_path": "export/output.jsonl"}
    recipes = random_recipes(200, seed=1024)
    for number, steps in enumerate(recipes):
        _judge(written(steps), workspace)
        (tmp_path / f"{number:03}.yaml").write_text(written(steps, **places), encoding="utf-8")
    control = [step("words_num_filter", min_num="many")]
    (tmp_path / "control.yaml").write_text(written(control, **places), encoding="utf-8")
    assert len({operator for steps in recipes for own in steps for operator in own}) > 25
    program = [sys.executable, "-m", "tests.valid_recipes", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, check=True)
    answer = json.loads((tmp_path / "refused.json").read_text(encoding="utf-8"))
    assert list(answer) == ["control.yaml"], answer


PERMITTED: dict[str, dict[str, Any]] = {
    "image_blur_mapper": {"save_dir": "artifacts/pictures", "radius": 3.0},
    "image_diffusion_mapper": {
        "hf_diffusion": "models/sd",
        "caption_key": "text",
        "save_dir": "artifacts/pictures",
    },
    "generate_qa_from_text_mapper": {
        "hf_model": "models/qa",
        "sampling_params": {"temperature": 0.7, "max_new_tokens": 64},
    },
    "optimize_qa_mapper": {"api_or_hf_model": "gpt-4o", "is_hf_model": False},
    "endpoint_rewriting_mapper": {"api_model": "gpt-4o", "cache_dir": "artifacts/cache/x"},
    "calibrate_qa_mapper": {"api_model": "gpt-4o", "system_prompt": "Correct the answer."},
}


@pytest.mark.parametrize("name", PERMITTED)
def test_a_persons_permission_lets_an_operator_have_what_it_needs(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether the operator's packages are installed here is not the question.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    text = written([step(name, **PERMITTED[name])])
    with pytest.raises(InvalidInput, match="allow_operators"):
        _judge(text, workspace)
    allowed = Workspace(workspace.root, Settings(allow_operators=(name,)))
    _judge(text, allowed)
    _judge(plan([step(name, **PERMITTED[name])]), allowed)
    other = "python_lambda_mapper"
    with pytest.raises(InvalidInput, match=other):
        _judge(written([step(name, **PERMITTED[name]), step(other, lambda_str="x")]), allowed)


@pytest.mark.parametrize(
    ("name", "given", "word"),
    [
        ("image_blur_mapper", {}, "save_dir"),
        ("image_blur_mapper", {"save_dir": "data/seed"}, "artifacts"),
        ("image_blur_mapper", {"save_dir": "/tmp"}, "save_dir"),
        ("endpoint_rewriting_mapper", {"api_model": ""}, "api_model"),
        ("endpoint_rewriting_mapper", {"api_model": "m", "cache_dir": "data/seed"}, "cache_dir"),
        ("image_diffusion_mapper", {"save_dir": "artifacts/x"}, "hf_diffusion"),
        (
            "image_diffusion_mapper",
            {"save_dir": "artifacts/x", "hf_diffusion": "models/sd"},
            "hf_img2seq",
        ),
        (
            "image_diffusion_mapper",
            {"save_dir": "artifacts/x", "hf_diffusion": "models/deep", "caption_key": "text"},
            "diffusion.ckpt",
        ),
        ("generate_qa_from_text_mapper", {}, "hf_model"),
        ("generate_qa_from_text_mapper", {"hf_model": "https://x/y"}, "hf_model"),
        (
            "generate_qa_from_text_mapper",
            {"hf_model": "models/qa", "model_params": {"trust_remote_code": True}},
            "trust_remote_code",
        ),
        ("optimize_qa_mapper", {}, "api_or_hf_model"),
        (
            "optimize_qa_mapper",
            {"api_or_hf_model": "gpt-4o", "is_hf_model": False, "api_endpoint": "http://x"},
            "api_endpoint",
        ),
        (
            "optimize_qa_mapper",
            {"api_or_hf_model": "http://10.0.0.1/v1", "is_hf_model": False},
            "api_or_hf_model",
        ),
        ("calibrate_qa_mapper", {"model_params": {"base_url": "http://10.0.0.1"}}, "base_url"),
        (
            "calibrate_qa_mapper",
            {"sampling_params": {"extra_headers": {"a": "b"}}},
            "extra_headers",
        ),
    ],
)
def test_a_permission_lifts_nothing_else(
    name: str, given: dict[str, Any], word: str, workspace: Workspace
) -> None:
    allowed = Workspace(workspace.root, Settings(allow_operators=(name,)))
    with pytest.raises(InvalidInput, match=word):
        _judge(written([step(name, **given)]), allowed)


def test_missing_packages_are_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_packages("image_deduplicator", {}) == ("imagededup",)
    assert missing_packages("words_num_filter", {"min_num": 1}) == ()
    inner: list[dict[str, Any]] = [{"fix_unicode_mapper": {}}]
    assert missing_packages("general_fused_op", {"fused_op_list": inner}) == ("ftfy",)
    with pytest.raises(InvalidInput, match="operator 2 .image_deduplicator. needs imagededup"):
        check_packages("mine.yaml", [("clean_links_mapper", {}), ("image_deduplicator", {})])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_packages("mine.yaml", [("image_deduplicator", {})])


def test_the_catalogue_says_what_an_operator_needs_and_costs() -> None:
    known = load_catalogue().operators
    similarity = known["image_text_similarity_filter"]
    assert set(similarity.needs) == {"text", "images", "model", "gpu"}
    assert (similarity.cost, similarity.is_threshold) == ("model", True)
    assert known["optimize_qa_mapper"].cost == "service"
    assert known["image_captioning_mapper"].cost == "generation"
    assert known["image_shape_filter"].cost == "picture"
    assert known["words_num_filter"].needs == ("text",)
    assert not known["clean_links_mapper"].is_threshold
    assert known["image_deduplicator"].packages == ("imagededup",)
    own = {name for name, spec in known.items() if spec.source == "synth-agent"}
    assert own == {
        "batched_image_aesthetics_filter",
        "batched_image_captioning_mapper",
        "batched_image_text_matching_filter",
        "batched_image_text_similarity_filter",
        "endpoint_question_mapper",
        "endpoint_rewriting_mapper",
        "forget_measurements_mapper",
    }
    stock = set(similarity.parameters)
    batched = set(known["batched_image_text_similarity_filter"].parameters)
    assert batched == stock | {"pairs_per_call", "dtype"}
    for spec in known.values():
        assert set(spec.needs) <= set(NEEDS)
        assert spec.cost in COSTS


def test_reviewed_operators_are_in_the_catalogue_and_loading_it_is_quick() -> None:
    seconds = []
    for _ in range(5):
        load_catalogue.cache_clear()
        started = time.process_time()
        catalogue = load_catalogue()
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.3
    assert catalogue.operators.keys() >= REVIEWED_OPERATORS
    assert not any(catalogue.operators[name].danger for name in REVIEWED_OPERATORS)


def test_operators_are_listed_and_shown(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(**given: Any) -> str:
        options = {"operator": None, "all": False, "json": False} | given
        assert operators(workspace, Namespace(**options)) == 0
        return capsys.readouterr().out

    listed = shown()
    assert "words_num_filter" in listed
    assert "python_lambda_mapper" not in listed
    everything = shown(all=True)
    assert len(everything.splitlines()) == len(load_catalogue().operators)
    assert "(refused)" in everything
    detail = shown(operator="image_blur_mapper")
    assert "allow_operators" in detail
    assert "save_dir: null or str" in detail
    data = json.loads(shown(operator="random_selector", json=True))
    assert data["parameters"]["select_ratio"]["maximum"] == 1
    with pytest.raises(InvalidInput, match="words_num_filter"):
        shown(operator="words_nun_filter")
