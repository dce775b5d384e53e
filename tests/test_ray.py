"""Recipes on a Ray cluster of two nodes leave what they leave on one machine.

The cluster and its driver are a process of their own: this file, run as a program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MINI_CLIP = ROOT / "synth_agent" / "miniworld" / "assets" / "clip"
RECIPES = ROOT / "synth_agent" / "miniworld" / "recipes"
SAMPLES = 48
CHUNK = 7
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(not MINI_CLIP.is_dir(), reason="the mini world's CLIP is not there"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the driver found, by case."""
    root = tmp_path_factory.mktemp("ray")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(root / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(root)],
        cwd=root,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Mapping[str, Any] = json.loads((root / "report.json").read_text("utf-8"))
    return found


def test_the_cluster_has_two_nodes_and_both_work(report: Mapping[str, Any]) -> None:
    assert report["nodes"] == 2
    assert report["workers"] == 2


def test_leaves_what_one_machine_leaves(report: Mapping[str, Any]) -> None:
    assert report["cluster"] == report["whole"]
    [similarity, repeated] = report["whole"]["counts"]
    assert SAMPLES > similarity[2] > repeated[2] > 0


def test_a_failure_names_operator_and_sample(report: Mapping[str, Any]) -> None:
    error = report["missing picture"]
    assert error["title"] == "Operator failed"
    assert "image_text_similarity_filter" in error["message"]
    assert "(id sample-17)" in error["message"]


def test_a_workspace_that_nodes_do_not_have(report: Mapping[str, Any]) -> None:
    error = report["no workspace"]
    assert error["title"] == "Workspace not on a machine of the cluster"
    assert "elsewhere" in error["message"]


def test_operators_that_draw_are_refused() -> None:
    from synth_agent.errors import InvalidInput
    from synth_agent.recipes import Operator, Recipe
    from synth_agent.stages.ray_executor import RayPool, RaySettings

    recipe = Recipe("r", "", "", (Operator("image_captioning_mapper", {}),), {})
    pool = RayPool(recipe, Path.cwd(), RaySettings("auto"))
    with pytest.raises(InvalidInput, match="image_captioning_mapper.*executor: default"), pool:
        pass


@pytest.mark.parametrize("address", ["", "local", "127.0.0.1:1", "ray://127.0.0.1:none"])
def test_a_cluster_is_never_started(address: str) -> None:
    from synth_agent.errors import InvalidInput
    from synth_agent.recipes import Recipe
    from synth_agent.stages.ray_executor import RayPool, RaySettings

    with (
        pytest.raises(InvalidInput, match="ray_address"),
        RayPool(Recipe("r", "", "", (), {}), Path.cwd(), RaySettings(address)),
    ):
        pass


def _make_samples(root: Path) -> list[Any]:
    """Write pictures of boxes; every third text names another colour, and texts repeat."""
    from PIL import Image, ImageDraw

    from synth_agent.data import Sample

    samples = []
    for number in range(SAMPLES):
        told = number - number % 8 // 7
        shown, named = COLOURS[number % 6], COLOURS[(told + (told % 3 == 0)) % 6]
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).rectangle((8, 8, 30 + number % 20, 40), fill=shown)
        picture.save(root / f"{number}.png")
        text = f"<__dj__image>\na {named} box, number {told % 4} <|__dj__eoc|>"
        samples.append(Sample(f"sample-{number}", (f"{number}.png",), text))
    return samples


def _similarity(recipe: Any, samples: list[Any], root: Path) -> Any:
    """Return the mini world's recipe with a threshold that half of these samples reach."""
    from dataclasses import replace

    from synth_agent.stages.branch import load_records, seed_records

    step, *rest = recipe.operators
    records = seed_records(samples, root)
    dataset, [operator, *_] = load_records(recipe, records, root / "scores")
    scored = operator.run(dataset, reduce=False)
    scores = sorted(stats["image_text_similarity"][0] for stats in scored["__dj__stats__"])
    middle = (scores[SAMPLES // 2 - 1] + scores[SAMPLES // 2]) / 2
    chosen = replace(step, parameters=step.parameters | {"min_score": middle})
    return replace(recipe, operators=(chosen, *rest))


def _summary(rows: list[dict[str, Any]], outcome: Any) -> dict[str, Any]:
    return {
        "rows": rows,
        "counts": [[count.name, count.before, count.after] for count in outcome.counts],
        "dropped": {name: list(map(int, gone)) for name, gone in outcome.dropped.items()},
    }


def _on_cluster(recipe: Any, samples: list[Any], root: Path, address: str) -> dict[str, Any]:
    """Run the recipe, then again with a picture that is not there."""
    from synth_agent.errors import SynthAgentError
    from synth_agent.stages.ray_executor import RayPool, RaySettings
    from synth_agent.stages.streaming import stream_branch

    def run(pool: Any, place: str) -> Any:
        return stream_branch(samples, SAMPLES, root, pool, root / place, lambda *_: None, CHUNK)

    with RayPool(recipe, root, RaySettings(address)) as pool:
        outcome = run(pool, "chunks")
        found = {
            "workers": pool.num_workers,
            "cluster": _summary(list(outcome.rows()), outcome),
        }
        (root / "17.png").unlink()
        try:
            run(pool, "failing")
        except SynthAgentError as error:
            found["missing picture"] = error.as_dict()
    try:
        with RayPool(recipe, root / "elsewhere", RaySettings(address, workers=1)):
            pass
    except SynthAgentError as error:
        found["no workspace"] = error.as_dict()
    return found


def _drive(root: Path) -> None:
    """Start two nodes, run the mini world's recipe and write the report."""
    import ray
    from ray.cluster_utils import Cluster

    from synth_agent.recipes import load_recipe
    from synth_agent.stages.branch import run_branch, seed_records
    from synth_agent.stages.datajuicer import guard

    guard()
    (root / "models").mkdir()
    (root / "models" / "clip").symlink_to(MINI_CLIP)
    samples = _make_samples(root)
    recipe = _similarity(load_recipe(RECIPES / "similarity.yaml"), samples, root)
    records = seed_records(samples, root)
    whole = run_branch(recipe, records, samples, root / "whole", 0, lambda *_: None)
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        found = _on_cluster(recipe, samples, root, cluster.address)
        ray.init(address=cluster.address, log_to_driver=False)
        found["nodes"] = sum(member["Alive"] for member in ray.nodes())
        ray.shutdown()
    finally:
        cluster.shutdown()
    found["whole"] = _summary(whole.rows, whole)
    (root / "report.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _drive(Path(sys.argv[1]))
