"""What does a small recipe cost besides its operators, and what do known scores save?

Two parts of `benchmarks/data.py`, which runs them. Wall times of whole processes, by turns. First a
recipe without a model on a few samples: `dj-process`, and the process stage without a warm worker,
with one that just started and with one that is loaded, all on the same recipe file. Then a changed
threshold of the similarity filter on all samples of the workspace, from scratch and with the scores
that the statistics table holds. Kept ids are compared throughout.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL_SEED = "data/seed/small.jsonl"
PLAIN = "artifacts/plain.jsonl"
SMALL = [{"words_num_filter": {"min_num": 5, "max_num": 12, "num_proc": 0}}]
OPTIONS = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
THRESHOLDS = (0.8, 0.78)
STAGE = "synth_agent.stages.process"
WARM = "synth_agent.stages.warm"

Row = tuple[str, str, list[float], int]
Environment = Mapping[str, str]


def print_rows(rows: list[Row]) -> None:
    """Print what was measured, as Markdown."""
    print("| recipe | run by | median s | all s | samples left |\n| --- | --- | --- | --- | --- |")
    for recipe, how, seconds, left in rows:
        each = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"| {recipe} | {how} | {statistics.median(seconds):.2f} | {each} | {left} |")


def overhead(demo: Path, num_samples: int, repetitions: int) -> list[Row]:
    """Time a recipe that costs nothing, by Data-Juicer's program and by ours."""
    lines = (demo / "data/seed/seed.jsonl").read_text("utf-8").splitlines(keepends=True)
    (demo / SMALL_SEED).write_text("".join(lines[:num_samples]), "utf-8")
    write_recipe(demo, "small", SMALL, SMALL_SEED)
    environment = stage_environment(demo)
    program = str(Path(sys.executable).with_name("dj-process"))

    def plain() -> None:
        run([program, "--config", "small.yaml"], demo, environment)

    def stage(module: str) -> Callable[[], None]:
        return lambda: run_stage(module, demo, "small.yaml", SMALL_SEED, environment)

    def loaded() -> None:
        run([sys.executable, "-c", LOADED], demo, environment)

    times: dict[str, list[float]] = {name: [] for name in HOW}
    plain()
    stage(STAGE)()
    for _ in range(repetitions):
        times["dj-process"].append(timed(plain))
        expected = kept_ids(demo / PLAIN)
        times["own"].append(timed(stage(STAGE)))
        check(demo, expected)
        end_worker(demo)
        times["absent"].append(timed(stage(WARM)))
        check(demo, expected)
        end_worker(demo)
        loaded()
        times["first"].append(timed(stage(WARM)))
        check(demo, expected)
        times["later"].append(timed(stage(WARM)))
        check(demo, expected)
    end_worker(demo)
    recipe = f"words_num_filter, {num_samples} samples"
    return [(recipe, HOW[name], seconds, len(expected)) for name, seconds in times.items()]


HOW = {
    "dj-process": "dj-process",
    "own": "the stage in a process of its own",
    "absent": "first, and no worker was started before",
    "first": "first, the worker was started with the app",
    "later": "later",
}
LOADED = """
import time
from pathlib import Path
from synth_agent.stages.warm import LOG, start_warm
from synth_agent.workspace import open_workspace
start_warm(open_workspace(Path.cwd()))
while "loaded" not in LOG.read_text():
    time.sleep(0.05)
"""


def known_scores(demo: Path, repetitions: int) -> list[Row]:
    """Time a changed threshold with and without the scores of the statistics table."""
    environment = stage_environment(demo)
    run([sys.executable, "-c", ANALYSE], demo, environment)
    model = {"hf_clip": "models/clip", "num_proc": 0}
    for threshold in THRESHOLDS:
        step = {"image_text_similarity_filter": {**model, "min_score": threshold}}
        write_recipe(demo, recipe_name(threshold), [step], "data/seed/seed.jsonl")
    run([sys.executable, "-c", LOADED], demo, environment)
    known = ("--statistics", "artifacts/statistics")
    scratch: dict[str, list[float]] = {WARM: [], STAGE: []}
    reused: dict[str, list[float]] = {WARM: [], STAGE: []}
    changed = f"{recipe_name(THRESHOLDS[1])}.yaml"
    seed = "data/seed/seed.jsonl"
    run_stage(WARM, demo, f"{recipe_name(THRESHOLDS[0])}.yaml", seed, environment)
    for _ in range(repetitions):
        for module in (WARM, STAGE):
            scratch[module].append(
                timed(lambda m=module: run_stage(m, demo, changed, seed, environment))
            )
            expected = kept_ids(demo / "artifacts/ours/processed.jsonl")
            reused[module].append(
                timed(lambda m=module: run_stage(m, demo, changed, seed, environment, *known))
            )
            check(demo, expected)
            told = json.loads((demo / "artifacts/ours/result.json").read_text("utf-8"))
            assert told["operators"][0]["scores_known_before"] == told["seed_samples"]
    end_worker(demo)
    recipe = f"similarity {THRESHOLDS[0]} -> {THRESHOLDS[1]}, {told['seed_samples']} samples"
    where = {WARM: "warm", STAGE: "process of its own"}
    return [
        (recipe, f"{what}, {where[module]}", times[module], len(expected))
        for module in (WARM, STAGE)
        for what, times in (("from scratch", scratch), ("scores known", reused))
    ]


ANALYSE = """
from pathlib import Path
from synth_agent.analysis import analyze
from synth_agent.workspace import open_workspace
wanted = (("image_text_similarity_filter", {"hf_clip": "models/clip"}),)
analyze(open_workspace(Path.cwd()), wanted, lambda record: None)
"""


def recipe_name(threshold: float) -> str:
    """Return a name without a dot, which a recipe's may not have."""
    return f"at-{round(100 * threshold)}"


def stage_environment(demo: Path) -> Environment:
    """Return the environment of a stage, with this checkout's package."""
    from synth_agent.workspace import open_workspace, stage_environment

    return stage_environment(open_workspace(demo)) | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def write_recipe(demo: Path, name: str, steps: list[dict[str, Any]], seed: str) -> None:
    """Write a recipe that `dj-process` runs too; JSON is YAML."""
    places = {"dataset_path": seed, "export_path": PLAIN}
    recipe = {**places, **OPTIONS, "process": steps}
    (demo / f"{name}.yaml").write_text(json.dumps(recipe), "utf-8")


def run_stage(
    module: str, demo: Path, recipe: str, seed: str, environment: Environment, *more: str
) -> None:
    """Run the process stage by one of its two modules."""
    flags = ["--recipe", recipe, "--seed", seed, "--images", "data/seed"]
    flags += ["--original", "data/seed/stage_1.json", "--output", "artifacts/ours", *more]
    log = run([sys.executable, "-m", module, *flags], demo, environment)
    if "not run by the warm worker" in log:
        raise RuntimeError(log)


def run(command: list[str], demo: Path, environment: Environment) -> str:
    """Run a program in the workspace and return what it wrote to its error stream."""
    done = subprocess.run(command, cwd=demo, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stderr


def end_worker(demo: Path) -> None:
    """End the workspace's warm worker, if there is one, by taking its socket away."""
    from synth_agent.stages.warm import LOCK, SOCKET

    if not (demo / SOCKET).exists():
        return
    (demo / SOCKET).unlink()
    while subprocess.run(["flock", "-n", str(demo / LOCK), "true"]).returncode:
        time.sleep(0.05)


def timed(work: Callable[[], None]) -> float:
    """Return the wall seconds of a call."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def kept_ids(path: Path) -> list[str]:
    """Return the ids in a data set."""
    return [str(json.loads(line)["id"]) for line in path.read_text("utf-8").splitlines()]


def check(demo: Path, expected: list[str]) -> None:
    """Make sure that our stage kept the same samples."""
    kept = kept_ids(demo / "artifacts/ours/processed.jsonl")
    if kept != expected:
        raise RuntimeError(f"kept {len(kept)} samples, expected {len(expected)}")
