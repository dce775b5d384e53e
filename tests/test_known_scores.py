"""Known scores change how long a recipe takes and nothing else, on the mini world's models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.analysis import analyze, wanted_operators
from synth_agent.demo import prepare_demo
from synth_agent.digests import Digests
from synth_agent.miniworld import write_world
from synth_agent.recipes import Operator, Recipe, dump_recipe, load_recipe
from synth_agent.workspace import Workspace, open_workspace, stage_environment

ROOT = Path(__file__).parents[1]
NUM_SAMPLES = 40
OUTPUTS = ("processed.jsonl", "processed.json", "rows.json")
COUNT = "scores_known_before"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A demo workspace whose seed set was analysed."""
    root = tmp_path_factory.mktemp("known")
    sizes = {"num_seed_samples": NUM_SAMPLES, "num_instructions": 3, "num_textvqa": 3}
    write_world(root / "world", seed=5, num_mmbench=6, **sizes)
    prepare_demo(root / "demo", lambda line: None, root / "world")
    opened = open_workspace(root / "demo")
    digests = Digests(opened)
    wanted, skipped = wanted_operators(opened, digests)
    assert not skipped
    report = analyze(opened, wanted, lambda record: None)
    assert all(not column["problem"] for column in report["columns"])
    yield opened
    shutil.rmtree(root)


def _process(
    workspace: Workspace, recipe: Recipe, statistics: Path | None = None
) -> tuple[dict[str, bytes], list[int], str]:
    """Run a recipe; return its outputs, how many scores each operator knew, and the log."""
    shutil.rmtree(workspace.root / "out", ignore_errors=True)
    (workspace.root / "tried.yaml").write_text(dump_recipe(recipe), "utf-8")
    flags = {"recipe": "tried.yaml", "seed": "data/seed/seed.jsonl", "images": "data/seed"}
    flags |= {"original": "data/seed/stage_1.json", "output": "out"}
    if statistics is not None:
        flags["statistics"] = str(statistics)
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "synth_agent.stages.warm",
            *(f"--{key}={value}" for key, value in flags.items()),
        ],
        cwd=workspace.root,
        env=stage_environment(workspace) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    made = {name: (workspace.root / "out" / name).read_bytes() for name in OUTPUTS}
    result = json.loads((workspace.root / "out" / "result.json").read_text())
    return made, [operator[COUNT] for operator in result["operators"]], ran.stderr


def _recipe(workspace: Workspace, name: str) -> Recipe:
    if name != "words":
        return load_recipe(workspace.recipes / f"{name}.yaml")
    steps = (
        Operator("words_num_filter", {"min_num": 5, "max_num": 12, "num_proc": 0}),
        Operator("document_deduplicator", {"num_proc": 0}),
        Operator("whitespace_normalization_mapper", {"num_proc": 0}),
        Operator("text_length_filter", {"min_len": 10, "num_proc": 0}),
    )
    return replace(load_recipe(workspace.recipes / "similarity.yaml"), operators=steps)


def _similarity(workspace: Workspace, **changes: Any) -> Recipe:
    recipe = _recipe(workspace, "similarity")
    first, *others = recipe.operators
    changed = Operator(first.name, {**first.parameters, **changes})
    return replace(recipe, operators=(changed, *others))


@pytest.mark.parametrize("name", ["similarity", "matching", "words", "image-quality"])
def test_the_result_is_the_same(workspace: Workspace, name: str) -> None:
    recipe = _recipe(workspace, name)
    without, none, _ = _process(workspace, recipe)
    assert not any(none)
    known, counts, _ = _process(workspace, recipe, workspace.artifacts / "statistics")
    assert known == without
    assert counts[0] == NUM_SAMPLES
    if name == "words":
        assert counts[1:] == [0, 0, 0]


def test_a_second_filter_compares_what_the_first_one_measured(workspace: Workspace) -> None:
    recipe = _similarity(workspace, min_score=0.2)
    first, *_ = recipe.operators
    flipped = Operator(first.name, {**first.parameters, "horizontal_flip": True, "min_score": 0.8})
    recipe = replace(recipe, operators=(first, flipped))
    without, _, _ = _process(workspace, recipe)
    known, counts, _ = _process(workspace, recipe, workspace.artifacts / "statistics")
    assert known == without
    assert counts == [NUM_SAMPLES, 0]


def test_scores_of_other_parameters_samples_and_models_are_not_used(workspace: Workspace) -> None:
    statistics = workspace.artifacts / "statistics"
    _, counts, _ = _process(workspace, _similarity(workspace, horizontal_flip=True), statistics)
    assert counts[0] == 0
    _, counts, _ = _process(workspace, _similarity(workspace, num_proc=1), statistics)
    assert counts[0] == 0
    [picture, other, *_] = sorted((workspace.root / "data/seed/images").iterdir())
    before = picture.read_bytes()
    picture.write_bytes(other.read_bytes())
    try:
        changed, counts, _ = _process(workspace, _similarity(workspace), statistics)
        assert counts[0] == 0
        assert changed == _process(workspace, _similarity(workspace))[0]
    finally:
        picture.write_bytes(before)
    config = workspace.root / "models/clip/config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    try:
        assert _process(workspace, _similarity(workspace), statistics)[1][0] == 0
    finally:
        config.write_text(text)


def test_a_damaged_table_is_not_used(workspace: Workspace, tmp_path: Path) -> None:
    recipe = _similarity(workspace)
    without, _, _ = _process(workspace, recipe)
    for name, damage in (("part-000000.parquet", b"PAR1 not any more"), ("column.json", b"{")):
        table = tmp_path / name
        shutil.copytree(workspace.artifacts / "statistics", table)
        for path in table.glob(f"columns/*/{name}"):
            path.write_bytes(damage)
        made, counts, log = _process(workspace, recipe, table)
        assert made == without
        assert counts[0] == 0
        assert "image_text_similarity_filter is scored anew" in log
    foreign = tmp_path / "foreign"
    shutil.copytree(workspace.artifacts / "statistics", foreign)
    for path in foreign.glob("columns/*/column.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_juicer": "0.1"}))
    made, counts, _ = _process(workspace, recipe, foreign)
    assert (made, counts[0]) == (without, 0)
