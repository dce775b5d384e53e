"""Recipes compared on data quality: from statistics, from processed sets, and by running them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from synth_agent.catalogue import load_catalogue
from synth_agent.data import read_samples
from synth_agent.data_keys import remember_data_key
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.recipes import load_recipe, materialise, recipe_from_mapping
from synth_agent.statistics import (
    PICTURE_HASHES,
    ColumnSpec,
    ColumnWriter,
    SampleRow,
    column_spec,
    write_samples,
)
from synth_agent.strategies import (
    DRAWS,
    JUDGE,
    NGRAMS,
    Comparison,
    Strategy,
    distinct,
    operator_rates,
    words_of,
)
from synth_agent.strategy_command import cells, strategies
from synth_agent.workspace import Workspace, open_workspace

CLIP = Path(__file__).parents[1] / "synth_agent" / "miniworld" / "assets" / "clip"
OPTIONS = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
CAPTIONS = ("a red ring", "a red ring", "one blue  square and a star", "stop", "two green  rings")
SCORES = (0.9, 0.9, 0.6, 0.2, 0.8)


def _write_recipe(workspace: Workspace, name: str, **steps: Any) -> None:
    recipe = materialise(recipe_from_mapping(name, {**OPTIONS, **steps}), load_catalogue())
    text = yaml.safe_dump(recipe.mapping(), sort_keys=False)
    (workspace.recipes / f"{name}.yaml").write_text(f"# title: {name}\n{text}")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Five samples on four pictures, and recipes; nothing was analysed."""
    seed = tmp_path / "data" / "seed"
    seed.mkdir(parents=True)
    records, original = [], []
    for number, caption in enumerate(CAPTIONS):
        image = f"{max(number, 1)}.png"
        Image.new("RGB", (16, 16), (number * 40, 0, 0)).save(seed / image)
        text = f"<__dj__image>\n{caption} <|__dj__eoc|>"
        records.append({"id": f"s{number}", "images": [image], "text": text})
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "x"}]
        original.append({"id": f"s{number}", "image": image, "conversations": turns})
    (seed / "seed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (seed / "stage_1.json").write_text(json.dumps(original))
    (tmp_path / "synth.yaml").write_text("goal: test\n")
    shutil.copytree(CLIP, tmp_path / "models" / "clip")
    (tmp_path / "recipes").mkdir()
    made = open_workspace(tmp_path)
    similarity = {JUDGE: {"hf_clip": "models/clip", "min_score": 0.5}}
    words = {"words_num_filter": {"min_num": 4}}
    branch = {"name": "fitting", "process": [similarity], "repeat": 2, "sample": None}
    plan = {"branches": [branch], "merge": "concatenate", "deduplicate": False}
    _write_recipe(made, "baseline", process=[])
    _write_recipe(made, "fitting", process=[similarity])
    _write_recipe(made, "twice", **plan, order={"by": "given"})
    _write_recipe(made, "tidy", process=[{"whitespace_normalization_mapper": {}}, words])
    return made


def _rows(workspace: Workspace) -> list[SampleRow]:
    samples = read_samples(workspace.path(workspace.settings.data.seed))
    return [SampleRow(str(s.id), f"digest {i}", s.text, s.images) for i, s in enumerate(samples)]


def _analyse(workspace: Workspace, spec: ColumnSpec, values: dict[str, Sequence[Any]]) -> None:
    """Write given values in place of an analysis."""
    root, rows, digests = workspace.artifacts / "statistics", _rows(workspace), Digests(workspace)
    write_samples(root, "key", rows)
    seed = workspace.path(workspace.settings.data.seed)
    remember_data_key(root, digests.path(seed), "key")
    ColumnWriter(root, spec).append([row.sample for row in rows], values)


def _similarity(workspace: Workspace) -> ColumnSpec:
    digests = Digests(workspace)
    spec = column_spec(
        JUDGE, {"hf_clip": "models/clip"}, lambda path: digests.path(workspace.path(path))
    )
    assert spec is not None
    return spec


def _compare(workspace: Workspace, name: str) -> Strategy:
    comparison = Comparison(workspace, Digests(workspace))
    return comparison.strategy(load_recipe(workspace.recipes / f"{name}.yaml"))


def test_without_statistics_nothing_is_claimed(workspace: Workspace) -> None:
    found = _compare(workspace, "fitting")
    assert found == Strategy("fitting", "fitting", 5, notes=found.notes)
    assert "not analysed" in found.notes[0]
    assert set(cells(found)) == {"-"}


def test_figures_come_from_statistics_where_the_outcome_is_known(workspace: Workspace) -> None:
    _analyse(
        workspace,
        _similarity(workspace),
        {"image_text_similarity": [[score] for score in SCORES]},
    )
    fitting = _compare(workspace, "fitting")
    assert (fitting.kept, fitting.source, fitting.seed_samples) == (4, "statistics", 5)
    assert fitting.mean_words == pytest.approx((3 + 3 + 6 + 3) / 4)
    assert fitting.similarity == pytest.approx((0.75, 0.85, 0.9))
    assert fitting.repeated_texts == pytest.approx(1 / 4)
    assert fitting.repeated_pictures == pytest.approx(1 / 4)
    assert fitting.distinct_1 is None, "too few words"
    assert fitting.seconds is None, "no rate was measured"
    twice = _compare(workspace, "twice")
    assert (twice.kept, twice.similarity) == (8, pytest.approx((0.75, 0.85, 0.9)))
    assert twice.repeated_texts == pytest.approx(5 / 8)
    tidy = _compare(workspace, "tidy")
    assert (tidy.kept, tidy.source) == (None, "")
    assert tidy.notes[0].startswith("run to know: whitespace_normalization_mapper")
    hashes = column_spec(PICTURE_HASHES, {}, lambda path: path)
    assert hashes is not None
    same = {"image_digest": ["a", "a", "a", "b", "c"], "image_dhash": ["0"] * 5}
    _analyse(workspace, hashes, same)
    assert _compare(workspace, "fitting").repeated_pictures == pytest.approx(2 / 4)


def test_running_fills_what_was_not_known(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(recipes=["tidy"], run=True, json=True)
    assert strategies(workspace, options) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["error"] is None
    assert (found["kept"], found["source"], found["notes"]) == (4, "processed", [])
    assert found["mean_words"] == pytest.approx((3 + 3 + 6 + 3) / 4)
    low, middle, high = found["similarity"]
    assert -1 <= low <= middle <= high <= 1
    assert found["seconds_source"] == "measured"
    again = argparse.Namespace(recipes=["tidy", "baseline"], run=False, json=False)
    assert strategies(workspace, again) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["recipe", "kept", "share"]
    assert table[1].split()[:3] == ["tidy", "4", "80.0%"]
    assert " 0 s" in table[1]
    bad = argparse.Namespace(recipes=["tdy"], run=False, json=True)
    with pytest.raises(InvalidInput, match="did you mean 'tidy'"):
        strategies(workspace, bad)


def test_failed_recipe_is_told_and_the_others_go_on(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_recipe(workspace, "empty", process=[{"words_num_filter": {"min_num": 1000}}])
    _write_recipe(
        workspace,
        "refused",
        process=[{"image_blur_mapper": {"save_dir": "artifacts/images/refused"}}],
    )
    options = argparse.Namespace(recipes=["empty", "refused"], run=True, json=True)
    assert strategies(workspace, options) == 1
    empty, refused = json.loads(capsys.readouterr().out)
    assert empty["error"]["title"] == "No sample is left"
    assert refused["error"]["title"] == "Operator refused"
    assert not list((workspace.artifacts / "processed").glob("*"))


def test_diversity_does_not_depend_on_size() -> None:
    texts = [" ".join(f"word{(7 * i + j * j) % 97}" for j in range(8)) for i in range(500)]
    small, large = distinct(texts, 1), distinct(texts * 20, 1)
    assert small == pytest.approx(97 / NGRAMS)
    assert large == pytest.approx(small)
    assert distinct(["one word"] * (NGRAMS // 2), 1) == pytest.approx(2 / NGRAMS)
    assert distinct(["one word"] * (NGRAMS - 1), 2) is None
    assert distinct([], 1) is None
    assert distinct([f"{i} x" for i in range(NGRAMS)], 2) == 1.0
    assert distinct([str(i) for i in range(10 * NGRAMS)], 1) == 1.0
    assert DRAWS > 1


def test_words_leave_markers_out() -> None:
    text = "<__dj__image>\nDon't STOP, it's 3 o'clock! <|__dj__eoc|>"
    assert words_of(text) == ("don't", "stop", "it's", "3", "o'clock")
    assert words_of("<image>\n<|__dj__eoc|>") == ()


def test_rates_are_seconds_a_sample() -> None:
    first = {"operators": [{"name": "a", "before": 10, "seconds": 1.0}]}
    second = {"operators": [{"name": "a", "before": 30, "seconds": 1.0}]}
    nothing = {"operators": [{"name": "b", "before": 0, "seconds": 1.0}]}
    assert operator_rates([first, second, nothing]) == {"a": pytest.approx(0.05)}
