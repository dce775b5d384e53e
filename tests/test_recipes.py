"""Recipes: files, checks, differences, and the catalogue they are checked against."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput
from synth_agent.recipes import (
    Operator,
    Recipe,
    diff_recipes,
    dump_recipe,
    list_recipes,
    load_recipe,
    materialise,
    operators_with_places,
    recipe_from_mapping,
    validate_recipe,
)
from synth_agent.workspace import Settings, Workspace

ROOT = Path(__file__).parents[1]
SETS = (ROOT / "recipes", ROOT / "synth_agent" / "miniworld" / "recipes")
SHIPPED = sorted(path for folder in SETS for path in folder.glob("*.yaml"))
OPTIONS = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}


def _workspace(root: Path, *recipes: Path, **settings: Any) -> Workspace:
    (root / "synth.yaml").touch()
    (root / "recipes").mkdir(exist_ok=True)
    for recipe in recipes:
        (root / "recipes" / recipe.name).write_bytes(recipe.read_bytes())
        for _, operator in operators_with_places(load_recipe(recipe)):
            for name, value in operator.parameters.items():
                if name.startswith("hf_"):
                    (root / value).mkdir(parents=True, exist_ok=True)
    return Workspace(root, Settings(**settings))


def _recipe(name: str, /, **parameters: Any) -> Recipe:
    return Recipe("mine", "Mine", "", (Operator(name, parameters),), OPTIONS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_shipped_recipe_is_valid_complete_and_canonical(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether an optional package is installed here says nothing of the recipe.
    monkeypatch.setattr("synth_agent.recipe_order.missing_packages", lambda *_: ())
    recipe = load_recipe(path)
    assert recipe.title != recipe.name
    assert recipe.reason
    validate_recipe(recipe, load_catalogue(), _workspace(tmp_path, path))
    assert materialise(recipe, load_catalogue()) == recipe
    steps = operators_with_places(recipe)
    assert all(operator.parameters["num_proc"] == 0 for _, operator in steps)
    assert dump_recipe(recipe) == path.read_text(encoding="utf-8")
    assert recipe.options == {
        "dataset_path": "data/seed/seed.jsonl",
        "export_path": f"artifacts/processed/{recipe.name}.jsonl",
        **OPTIONS,
    }


def test_both_sets_hold_the_recipes_that_are_compared_first(tmp_path: Path) -> None:
    needed = {"baseline", "similarity", "similarity-strict", "dedup", "text-clean", "image-quality"}
    for folder in SETS:
        assert needed <= {path.stem for path in folder.glob("*.yaml")}
    workspace = _workspace(tmp_path, *SETS[1].glob("*.yaml"))
    listed = {recipe.name: recipe for recipe in list_recipes(workspace)}
    assert list(listed) == sorted(listed)
    assert listed["baseline"].operators == ()
    similarity = listed["similarity"]
    assert similarity.published == {"textvqa": 1.0606, "mmbench": 2.9151, "rows_k": 222, "row": 3}
    assert similarity.keeps == 0.57


def test_mapping_with_a_name_round_trips() -> None:
    recipe = load_recipe(SETS[0] / "similarity.yaml")
    again = recipe_from_mapping(recipe.name, {"name": recipe.name, **recipe.mapping()})
    assert again.mapping() == recipe.mapping()
    assert again.digest == recipe.digest
    moved = replace(recipe, options={**recipe.options, "export_path": "elsewhere.jsonl"})
    assert moved.digest == recipe.digest
    assert replace(recipe, operators=recipe.operators[:1]).digest != recipe.digest


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (_recipe("image_text_similarity"), ("image_text_similarity", "operator 1", "did you mean")),
        (_recipe("words_num_filter", min_nums=3), ("words_num_filter", "min_nums", "'min_num'")),
        (_recipe("words_num_filter", min_num="3"), ("mine.yaml", "min_num", "type int")),
        (_recipe("words_num_filter", min_num=True), ("min_num", "type int")),
        (_recipe("words_num_filter", min_num=9, max_num=3), ("min_num", "9", "max_num = 3")),
        (_recipe("text_length_filter", min_len=-1), ("min_len", "0 or more")),
        (_recipe("random_selector", select_ratio=3.5), ("select_ratio", "from 0 to 1")),
        (_recipe("special_characters_filter", max_ratio=float("nan")), ("max_ratio", "finite")),
        (_recipe("image_shape_filter", any_or_all="some"), ("any_or_all", "valid names: all, any")),
        (_recipe("image_text_similarity_filter", hf_clip="models/no"), ("hf_clip", "models/no")),
        (_recipe("image_text_similarity_filter"), ("hf_clip", "openai/clip-vit-base-patch32")),
        (_recipe("image_text_similarity_filter", hf_clip="/etc"), ("hf_clip", "relative")),
        (_recipe("image_text_similarity_filter", hf_clip="../x"), ("hf_clip", "relative")),
        (_recipe("words_num_filter", skip_op_error=True), ("skip_op_error", "batch")),
        (_recipe("words_num_filter", runtime_env={"pip": ["x"]}), ("runtime_env", "installs")),
        (_recipe("words_num_filter", tokenization=True), ("tokenization", "downloads")),
        (_recipe("text_length_filter", trust_remote_code=True), ("trust_remote_code",)),
        (_recipe("image_captioning_mapper", trust_remote_code=True), ("trust_remote_code",)),
        (_recipe("image_captioning_mapper", caption_num=0), ("caption_num", "1 or more")),
        (_recipe("python_lambda_mapper", lambda_str="lambda x: x"), ("runs code", "allow_operat")),
        (_recipe("flagged_words_filter"), ("flagged_words_filter", "downloads")),
        (_recipe("optimize_qa_mapper"), ("optimize_qa_mapper", "service")),
        (
            _recipe("general_fused_op", fused_op_list=[{"python_lambda_mapper": {}}]),
            ("python_lambda_mapper", "runs code"),
        ),
        (
            _recipe("general_fused_op", fused_op_list=[{"words_num_filter": {"min_num": -1}}]),
            ("words_num_filter", "min_num"),
        ),
    ],
)
def test_bad_operator_is_named_with_its_fix(
    recipe: Recipe, words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput) as caught:
        validate_recipe(recipe, load_catalogue(), _workspace(tmp_path))
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"skip_op_error": True}, "batch"),
        ({"custom_operator_paths": ["x.py"]}, "custom_operator_paths"),
        ({"open_monitor": True}, "open_monitor"),
        ({"dataset_path": "/data/seed.jsonl"}, "dataset_path"),
        ({"export_path": "s3://bucket/x"}, "export_path"),
        ({"export_path": "a/../../b"}, "export_path"),
        ({"np": 0}, "np"),
        ({"np": True}, "np"),
    ],
)
def test_bad_option_is_named(changed: dict[str, Any], word: str, tmp_path: Path) -> None:
    recipe = Recipe("mine", "Mine", "", (), {**OPTIONS, **changed})
    with pytest.raises(InvalidInput, match=word):
        validate_recipe(recipe, load_catalogue(), _workspace(tmp_path))


def test_errors_may_not_be_skipped_by_default(tmp_path: Path) -> None:
    recipe = Recipe("mine", "Mine", "", (), {"np": 1})
    with pytest.raises(InvalidInput, match="skip_op_error: false"):
        validate_recipe(recipe, load_catalogue(), _workspace(tmp_path))


def test_a_missing_package_is_named_with_its_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synth_agent.recipe_order.missing_packages", lambda *_: ("wordcount",))
    branches = [{"name": "a", "process": []}, {"name": "b", "process": [{"words_num_filter": {}}]}]
    recipe = recipe_from_mapping("mine", {**OPTIONS, "branches": branches})
    with pytest.raises(InvalidInput, match=r"branch 2 \(b\), operator 1 .* needs wordcount"):
        validate_recipe(recipe, load_catalogue(), _workspace(tmp_path))


def test_a_person_may_allow_a_refused_operator(tmp_path: Path) -> None:
    workspace = _workspace(tmp_path, allow_operators=("python_lambda_mapper",))
    validate_recipe(_recipe("python_lambda_mapper", lambda_str="x"), load_catalogue(), workspace)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("process: [", "YAML"),
        ("- a\n", "mapping"),
        ("np: 1\n", "process"),
        ("process: [words_num_filter]\n", "operator 1"),
        ("process:\n- {a: {}, b: {}}\n", "operator 1"),
        ("# published: textvqa=much\nprocess: []\n", "published"),
        ("# published: textvqa=1.0\nprocess: []\n", "give all of"),
        ("# published: textvqa=nan mmbench=1 rows_k=1 row=1\nprocess: []\n", "published"),
        ("# published: textvqa=1 mmbench=inf rows_k=1 row=1\nprocess: []\n", "published"),
        ("# published: textvqa=-1 mmbench=1 rows_k=1 row=1\nprocess: []\n", "published"),
        ("# keeps: -3\nprocess: []\n", "keeps"),
        ("process: !!python/object/apply:os.getcwd []\n", "YAML"),
    ],
)
def test_bad_recipe_file_is_named(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=word) as caught:
        load_recipe(path)
    assert "bad.yaml" in str(caught.value)


def test_header_lines_continue() -> None:
    recipe = replace(_recipe("words_num_filter"), reason="word " * 60 + "end")
    text = dump_recipe(recipe)
    assert max(map(len, text.splitlines())) <= 96
    assert "#   word" in text


def test_difference_is_per_operator_and_parameter() -> None:
    parent = Recipe(
        "a", "A", "", (Operator("x", {"p": 1, "q": 2}), Operator("y", {"r": "s"})), OPTIONS
    )
    child = Recipe(
        "b", "B", "", (Operator("x", {"p": 1, "q": 3}), Operator("z", {"t": None})), OPTIONS
    )
    lines = [f"{line.sign}{line.text}" for line in diff_recipes(parent, child)]
    assert lines == [" x", "-  q: 2", "+  q: 3", "-y", "-  r: s", "+z", "+  t: null"]
    assert all(line.sign == "+" for line in diff_recipes(None, child))
    assert [line.sign for line in diff_recipes(child, child)] == [" ", " "]


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too long"):
        load_recipe(Path("/dev/zero"))


def test_catalogue_has_every_operator() -> None:
    load_catalogue.cache_clear()
    catalogue = load_catalogue()
    sources = Counter(operator.source for operator in catalogue.operators.values())
    assert sources["data-juicer"] == 228
    assert set(sources) == {"data-juicer", "synth-agent"}
    similarity = catalogue.parameters("image_text_similarity_filter")
    assert similarity["min_score"].default == 0.1
    assert similarity["reduce_mode"].choices == ("avg", "max", "min")
    assert similarity["num_proc"].default is None
    assert catalogue.operators["image_text_similarity_filter"].summary.startswith("Filter to keep")
    assert not catalogue.operators["image_text_similarity_filter"].danger
    assert catalogue.operators["s3_upload_file_mapper"].danger


def test_recipes_do_not_import_data_juicer() -> None:
    code = (
        "import sys, synth_agent.recipes as r; r.load_catalogue();"
        "sys.exit(any(name in sys.modules for name in ('data_juicer', 'torch', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
