"""Scoring the seed set once: complete, incremental, safe from kills, and exact for every recipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from synth_agent import analysis
from synth_agent.cli import main
from synth_agent.demo import prepare_demo
from synth_agent.digests import Digests
from synth_agent.duplicates import duplicates
from synth_agent.fit import estimate_cost
from synth_agent.formats import Options, convert
from synth_agent.miniworld import write_world
from synth_agent.planner.builtin import workspace_settings
from synth_agent.recipes import list_recipes
from synth_agent.statistics import ColumnWriter
from synth_agent.workspace import Workspace, open_workspace

NUM_SAMPLES = 60
SIZES = {"num_seed_samples": NUM_SAMPLES, "num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
CHEAP = ["text_length_filter", "image_shape_filter"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_world(root / "world", seed=5, **SIZES)
    prepare_demo(root / "workspace", lambda line: None, root / "world")
    return root / "workspace"


@pytest.fixture(scope="module")
def analysed(demo: Path) -> Workspace:
    workspace = open_workspace(demo)
    report = score(workspace)
    assert {column["problem"] for column in report["columns"]} == {""}
    return workspace


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(demo, tmp_path / "copy", ignore=shutil.ignore_patterns("artifacts"))
    return open_workspace(tmp_path / "copy")


def score(workspace: Workspace, *operators: str) -> dict[str, Any]:
    wanted, _ = analysis.wanted_operators(workspace, Digests(workspace))
    chosen = tuple(want for want in wanted if not operators or want[0] in operators)
    return analysis.analyze(workspace, chosen, lambda record: None)


def scored(report: dict[str, Any]) -> set[int]:
    return {column["scored"] for column in report["columns"]}


def test_every_sample_gets_every_score(analysed: Workspace) -> None:
    table = analysis.open_table(analysed, Digests(analysed))
    assert table is not None
    assert table.num_rows == NUM_SAMPLES
    for spec in table.columns():
        for stat in spec.stats:
            assert table.values(spec, stat).known.all(), stat
    operators = {spec.operator for spec in table.columns()}
    assert {"image_text_similarity_filter", "image_text_matching_filter"} < operators


@pytest.mark.parametrize("name", ["similarity", "matching", "image-quality", "dedup"])
def test_retention_is_what_the_run_keeps(analysed: Workspace, name: str) -> None:
    [recipe] = [recipe for recipe in list_recipes(analysed) if recipe.name == name]
    digests = Digests(analysed)
    table = analysis.open_table(analysed, digests)
    assert table is not None
    made = analysis.recipe_retention(analysed, recipe, table, digests)
    output = analysed.artifacts / "ran" / name
    data = analysed.settings.data
    flags = {
        "recipe": f"recipes/{name}.yaml",
        "seed": data.seed,
        "images": data.images,
        "original": data.original,
        "output": str(output),
    }
    subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process"]
        + [f"--{key}={value}" for key, value in flags.items()],
        cwd=analysed.root,
        check=True,
        capture_output=True,
        timeout=600,
    )
    rows = json.loads((output / "rows.json").read_text())
    assert made.rows is not None
    assert made.rows.tolist() == rows["kept"]
    cost = estimate_cost(analysed, recipe, workspace_settings(analysed), [])
    assert cost.expected_samples == len(rows["kept"])
    assert "statistics" in cost.basis


def test_only_new_samples_are_scored(copied: Workspace) -> None:
    seed = copied.path(copied.settings.data.seed)
    lines = seed.read_text().splitlines(keepends=True)
    seed.write_text("".join(lines[:40]))
    first = score(copied, *CHEAP)
    seed.write_text("".join(lines))
    second = score(copied, *CHEAP)
    third = score(copied, *CHEAP)
    assert scored(first).isdisjoint({0})
    for column, again in zip(first["columns"], second["columns"], strict=True):
        assert again["known"] == column["scored"]
        assert 0 < again["scored"] <= 20
    assert scored(third) == {0}


def test_a_sample_that_cannot_be_scored_says_why(copied: Workspace) -> None:
    picture = copied.path(copied.settings.data.images) / "images" / "000007.jpg"
    picture.write_bytes(b"no picture")
    report = score(copied, *CHEAP)
    errors = {column["operator"]: column["errors"] for column in report["columns"]}
    assert errors == {"text_length_filter": 0, "image_shape_filter": 1}
    digests = Digests(copied)
    table = analysis.open_table(copied, digests)
    assert table is not None
    [spec] = [spec for spec in table.columns() if spec.operator == "image_shape_filter"]
    values = table.values(spec, "image_width")
    assert list(values.errors) == [7]
    assert "cannot identify image" in values.errors[7]


def test_a_killed_analysis_goes_on_where_it_was(copied: Workspace) -> None:
    wanted, _ = analysis.wanted_operators(copied, Digests(copied))
    code = (
        "import sys, json; from pathlib import Path; from synth_agent import analysis;"
        "from synth_agent.workspace import open_workspace;"
        "analysis.analyze(open_workspace(Path(sys.argv[1])), json.loads(sys.argv[2]), print)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(copied.root), json.dumps(wanted)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    columns = analysis.statistics_root(copied) / "columns"
    for _ in range(600):
        if len(list(columns.glob("*/part-*.parquet"))) >= 3:
            break
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    report = score(copied)
    known = [column["known"] for column in report["columns"]]
    assert sum(count > 0 for count in known) >= 3
    assert all(column["scored"] + column["known"] == max(known) for column in report["columns"])


def test_commands(analysed: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["-w", str(analysed.root)]
    assert main([*where, "statistics", "--json"]) == 0
    stats = {row["stat"]: row for row in json.loads(capsys.readouterr().out)}
    assert stats["image_text_similarity"]["missing"] == 0
    assert main([*where, "retention", "similarity", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert 0 < kept["kept"] < kept["samples"] == NUM_SAMPLES
    assert main([*where, "retention", "similarity"]) == 0
    assert f"kept: {kept['kept']} of {NUM_SAMPLES}" in capsys.readouterr().out
    assert main([*where, "retention", "matching-doubled"]) == 0
    shown = capsys.readouterr().out
    assert "branch " in shown
    assert "x 2 = " in shown
    assert main([*where, "retention", "matching-doubled", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kept"] == sum(branch["samples"] for branch in plan["branches"])
    assert main([*where, "samples", "similarity", "1", "-n", "2", "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert len(drawn["kept"]) == len(drawn["dropped"]) == 2
    dropped = [example["values"]["image_text_similarity"][0] for example in drawn["dropped"]]
    assert max(dropped) < 0.8
    assert main([*where, "samples", "similarity", "9"]) == 2
    assert main([*where, "samples", "similarity", "1", "-n", "0"]) == 2
    assert main([*where, "samples", "similarity", "1", "--seed", "-1"]) == 2
    assert "No such operator" in capsys.readouterr().err


def test_retention_needs_an_analysis(copied: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-w", str(copied.root), "retention", "similarity"]) == 2
    assert "synth-agent analyze" in capsys.readouterr().err


def test_what_failed_is_tried_again_when_asked(copied: Workspace) -> None:
    picture = copied.path(copied.settings.data.images) / "images" / "000007.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:300])
    assert {c["errors"] for c in score(copied, "image_shape_filter", "picture_hashes")["columns"]}
    wanted, _ = analysis.wanted_operators(copied, Digests(copied))
    hashes = tuple(want for want in wanted if want[0] == "picture_hashes")
    [again] = analysis.analyze(copied, hashes, lambda record: None)["columns"]
    assert (again["scored"], again["errors"]) == (0, 0)
    [retried] = analysis.analyze(copied, hashes, lambda record: None, retry_failed=True)["columns"]
    assert (retried["scored"], retried["errors"], retried["problem"]) == (0, 1, "")
    # A sample whose scoring succeeds at last, as after a shortage of memory.
    digests = Digests(copied)
    table = analysis.open_table(copied, digests)
    assert table is not None
    [spec] = [spec for spec in table.columns() if spec.operator == "picture_hashes"]
    [failed] = table.values(spec, "image_dhash").errors
    writer = ColumnWriter(analysis.statistics_root(copied), spec)
    sample = table.rows([failed])[0].sample
    assert sample not in writer.known(with_errors=False)
    values = {"image_digest": ["00"], "image_dhash": ["0" * 16]}
    writer.append([sample], values)
    assert sample in writer.known(with_errors=False)
    [done] = analysis.analyze(copied, hashes, lambda record: None, retry_failed=True)["columns"]
    assert (done["scored"], done["errors"]) == (0, 0)


def test_correlation_and_drift_commands(
    analysed: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["-w", str(analysed.root)]
    assert main([*where, "statistics", "--correlation", "--json"]) == 0
    matrix = json.loads(capsys.readouterr().out)
    names, values = matrix["names"], matrix["values"]
    assert values[names.index("text_len")][names.index("text_len")] == pytest.approx(1)
    assert values[names.index("text_len")][names.index("num_words")] > 0.8
    assert main([*where, "statistics", "--drift", "similarity", "--json"]) == 0
    drift = {line["name"]: line for line in json.loads(capsys.readouterr().out)["drift"]}
    moved = drift["image_text_similarity"]
    assert moved["median"] > moved["whole_median"]
    assert 0 < moved["drift"]["kolmogorov_smirnov"] <= 1
    assert main([*where, "statistics", "--drift", "baseline"]) == 0
    assert "keeps 60 of 60" in capsys.readouterr().out
    assert main([*where, "statistics", "--drift", "recaption"]) == 2
    assert "not known before it runs" in capsys.readouterr().err


def test_contamination_of_a_seed_that_holds_an_evaluation_picture(
    copied: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    [evaluation, *_] = sorted((copied.root / "data/textvqa/train_images").glob("*.jpg"))
    seed_picture = copied.path(copied.settings.data.images) / "images" / "000003.jpg"
    seed_picture.write_bytes(evaluation.read_bytes())
    score(copied, "picture_hashes")
    where = ["-w", str(copied.root), "contamination"]
    assert main([*where, "--json"]) == 0
    textvqa, mmbench = json.loads(capsys.readouterr().out)
    assert (textvqa["benchmark"], mmbench["benchmark"]) == ("textvqa", "mmbench")
    assert textvqa["equal_pictures"] == 1
    assert "000000003" in textvqa["examples"]
    assert textvqa["pictures"] == NUM_SAMPLES
    assert main([*where, "baseline"]) == 0
    assert "TextVQA: 1 equal" in capsys.readouterr().out
    view = analysis.overview(copied, 8)
    assert view is not None
    assert view.contamination.startswith("in TextVQA: ")
    assert main([*where, "no-such"]) == 2


def test_duplicates_are_counted(copied: Workspace) -> None:
    images = copied.path(copied.settings.data.images) / "images"
    for name in ("000011", "000012"):
        (images / f"{name}.jpg").write_bytes((images / "000010.jpg").read_bytes())
    score(copied, *CHEAP, "picture_hashes")
    table = analysis.open_table(copied, Digests(copied))
    assert table is not None
    found = duplicates(table)
    copies = found.copies["image_copies"][10:13].tolist()
    assert copies[0] >= 3
    assert len(set(copies)) == 1
    assert found.repeated["image_copies"] >= 2
    assert found.repeated["image_hash_copies"] >= found.repeated["image_copies"]
    texts = table.texts()
    assert found.repeated["text_copies"] == len(texts) - len(set(texts))


def test_a_parquet_seed_set_is_the_same_seed_set(copied: Workspace) -> None:
    data = copied.settings.data
    convert(copied.path(data.seed), copied.root / "data/seed/seed.parquet", Options())
    settings = copied.settings_file.read_text().replace(data.seed, "data/seed/seed.parquet")
    copied.settings_file.write_text(settings)
    workspace = open_workspace(copied.root)
    report = score(workspace, "text_length_filter")
    assert report["num_samples"] == NUM_SAMPLES
    table = analysis.open_table(workspace, Digests(workspace))
    assert table is not None
    assert table.rows([3])[0].id == "000000003"
    output = workspace.artifacts / "ran"
    arguments = {
        "recipe": "recipes/dedup.yaml",
        "seed": "data/seed/seed.parquet",
        "images": data.images,
        "original": data.original,
        "output": str(output),
    }
    subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process"]
        + [f"--{key}={value}" for key, value in arguments.items()],
        cwd=workspace.root,
        check=True,
        capture_output=True,
        timeout=600,
    )
    assert json.loads((output / "result.json").read_text())["seed_samples"] == NUM_SAMPLES
