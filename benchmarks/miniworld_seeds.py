"""How much does a recipe matter in the mini world, and how much does the training seed?

    python benchmarks/miniworld_seeds.py demo --recipes baseline similarity --seeds 5
    python benchmarks/miniworld_seeds.py demo --seeds 10 --jobs 8 --device cuda

Trains and evaluates a demo workspace's settings with several seeds on each recipe's data, by the same
programs that a run starts. Prints a table: scores over seeds, the difference from the baseline with
the p-value of the exact permutation test over seeds, and how well the first stage's loss predicts the
score (Spearman's rank correlation). Writes the raw records and the table beside `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Record = dict[str, Any]
SCORES = ("TextVQA", "MMBench", "MMBench plain")


def main() -> int:
    """Run the experiments and print the table."""
    options = parse_arguments()
    settings = yaml.safe_load((options.workspace / "synth.yaml").read_text("utf-8"))
    work = options.work or options.workspace / "artifacts" / "benchmark"
    data = {name: processed(options, settings, work, name) for name in options.recipes}
    jobs = list(itertools.product(range(options.seeds), options.recipes))
    records: list[Record] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(experiment, options, settings, work, recipe, data[recipe], seed)
            for seed, recipe in jobs
        ]
        for done in as_completed(waiting):
            records.append(done.result())
            print(f"{len(records)}/{len(jobs)} {json.dumps(records[-1])}", file=sys.stderr)
    if options.append:
        lines = options.out.with_suffix(".jsonl").read_text("utf-8").splitlines()
        records = [*map(json.loads, lines), *records]
        options.recipes = list(dict.fromkeys(record["recipe"] for record in records))
    records.sort(key=lambda record: (options.recipes.index(record["recipe"]), record["seed"]))
    report = table(records, options)
    print(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    options.out.with_suffix(".jsonl").write_text(lines, "utf-8")
    options.out.with_suffix(".md").write_text(report + "\n", "utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["baseline", "similarity"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processed", type=Path, help="folder with RECIPE/processed.json")
    parser.add_argument("--work", type=Path, help="folder for what is made")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/miniworld_seeds"))
    parser.add_argument(
        "--append", action="store_true", help="add to the records that --out already holds"
    )
    options = parser.parse_args()
    options.workspace = options.workspace.resolve()
    return options


def processed(
    options: argparse.Namespace, settings: Mapping[str, Any], work: Path, recipe: str
) -> Path:
    """Return the recipe's processed samples, made by the process stage unless they are given."""
    if options.processed is not None:
        return Path(options.processed / recipe / "processed.json").resolve()
    output = work / "processed" / recipe
    if not (output / "result.json").exists():
        data = settings["data"]
        arguments = {
            "recipe": options.workspace / "recipes" / f"{recipe}.yaml",
            "seed": data["seed"],
            "images": data["images"],
            "original": data["original"],
            "cap": data.get("sample_cap", 200_000),
            "cap-seed": data.get("sample_cap_seed", 1024),
            "output": output,
            "progress": work / f"{recipe}.progress.jsonl",
        }
        flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        run_program(["synth_agent.stages.process", *flags], options.workspace)
    return output / "processed.json"


def experiment(
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    work: Path,
    recipe: str,
    data: Path,
    seed: int,
) -> Record:
    """Train both stages and answer both benchmarks with one seed."""
    folder = work / f"{recipe}-{seed}"
    model, files, answers = settings["model"], settings["data"], settings["evaluate"]
    machine = {"device": options.device, "threads": options.threads}
    parts = {key: model[key] for key in model if key != "name"}
    common = {**parts, **machine, "model": model["name"], "seed": seed, "data_seed": seed}
    started = time.monotonic()
    pretrain = {**settings["pretrain"], **common, "stage": "pretrain", "data": str(data)}
    pretrain |= {"images": files["images"], "output": str(folder / "pretrain")}
    run_with_config("mgm.train", folder / "pretrain.json", pretrain, options.workspace)
    finetune = {**settings["finetune"], **common, "stage": "finetune"}
    finetune |= {
        "projector": str(folder / "pretrain" / "mm_projector.bin"),
        "data": files["instructions"],
        "images": files["instruction_images"],
        "output": str(folder / "finetune"),
    }
    run_with_config("mgm.train", folder / "finetune.json", finetune, options.workspace)
    answering = {**parts, **machine, "checkpoint": str(folder / "finetune")}
    answering |= {"batch_size": answers["batch_size"], "dtype": answers["dtype"]}
    score = {}
    for benchmark in ("textvqa", "mmbench"):
        asked = answers[benchmark]
        config = {
            **answering,
            "benchmark": benchmark,
            "questions": asked.get("questions") or asked["annotations"],
            "images": asked.get("images"),
            "output": str(folder / benchmark),
            "max_new_tokens": asked["max_new_tokens"],
        }
        run_with_config("mgm.evaluate", folder / f"{benchmark}.json", config, options.workspace)
        score[benchmark] = json.loads((folder / benchmark / "score.json").read_text("utf-8"))
    losses = {
        stage: json.loads((folder / stage / "train_state.json").read_text("utf-8"))["final_loss"]
        for stage in ("pretrain", "finetune")
    }
    return {
        "recipe": recipe,
        "seed": seed,
        "samples": len(json.loads(data.read_text("utf-8"))),
        "TextVQA": score["textvqa"]["score_percent"],
        "MMBench": score["mmbench"]["score_percent"],
        "MMBench plain": score["mmbench"]["metrics"]["vanilla_percent"],
        "categories": {
            name: value["score_percent"] for name, value in score["mmbench"]["categories"].items()
        },
        "pretrain_loss": losses["pretrain"],
        "finetune_loss": losses["finetune"],
        "seconds": round(time.monotonic() - started, 1),
    }


def run_with_config(module: str, path: Path, config: Mapping[str, Any], workspace: Path) -> None:
    """Start a program of `mgm` with a configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=1), "utf-8")
    run_program([module, "--config", str(path)], workspace)


def run_program(arguments: list[str], folder: Path) -> None:
    """Run a module in a folder; its output is shown only when it fails."""
    repository = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (repository, os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0:
        raise SystemExit(f"{arguments[0]} failed:\n{finished.stdout}\n{finished.stderr}")


def table(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{options.seeds} seeds, device {options.device}, {options.threads} threads, "
        f"{options.jobs} at a time",
        "",
        "| recipe | samples | " + " | ".join(f"{name}: mean ± sd [range]" for name in SCORES),
        "|---|---|" + "---|" * len(SCORES),
    ]
    lines[2] += " | stage-1 loss | seconds |"
    lines[3] += "---|---|"
    for recipe in options.recipes:
        chosen = [record for record in records if record["recipe"] == recipe]
        cells = [spread([record[name] for record in chosen]) for name in SCORES]
        loss = spread([record["pretrain_loss"] for record in chosen], digits=2)
        seconds = f"{statistics.mean(record['seconds'] for record in chosen):.0f}"
        row = [recipe, str(chosen[0]["samples"]), *cells, loss, seconds]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *differences(records, options.recipes), *prediction(records)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean, standard deviation and range of values over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return (
        f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f} "
        f"[{min(values):.{digits}f}, {max(values):.{digits}f}]"
    )


def differences(records: Sequence[Record], recipes: Sequence[str]) -> list[str]:
    """Compare every recipe with the first."""
    lines = []
    for recipe, name in itertools.product(recipes[1:], SCORES):
        ours = [record[name] for record in records if record["recipe"] == recipe]
        base = [record[name] for record in records if record["recipe"] == recipes[0]]
        points = statistics.mean(ours) - statistics.mean(base)
        lines.append(
            f"{recipe} against {recipes[0]}, {name}: {points:+.1f} points, "
            f"p = {permutation_p(ours, base):.2g} (two-sided, exact permutation over seeds), "
            f"{sum(a > b for a in ours for b in base)} of {len(ours) * len(base)} pairs higher"
        )
    return lines


def permutation_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value of a difference in means by all ways to deal the values."""
    values = np.array([*first, *second])
    observed = abs(np.mean(first) - np.mean(second))
    dealt = [
        abs(values[list(chosen)].mean() - np.delete(values, list(chosen)).mean())
        for chosen in itertools.combinations(range(len(values)), len(first))
    ]
    return float(np.mean(np.array(dealt) >= observed - 1e-9))


def prediction(records: Sequence[Record]) -> list[str]:
    """Say how the first stage's loss ranks with the scores inside each recipe."""
    lines = []
    for recipe in dict.fromkeys(record["recipe"] for record in records):
        chosen = [record for record in records if record["recipe"] == recipe]
        if len(chosen) < 5:
            continue
        losses = [record["pretrain_loss"] for record in chosen]
        parts = [
            f"{name} {rank_correlation(losses, [record[name] for record in chosen]):+.2f}"
            for name in SCORES
        ]
        lines.append(
            f"rank correlation of stage-1 loss and score, {recipe}, {len(chosen)} seeds: "
            + ", ".join(parts)
        )
    return lines


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def ranks(values: Sequence[float]) -> list[float]:
    """Return the mean rank of each value."""
    ordered = sorted(values)
    return [
        statistics.mean(i for i, other in enumerate(ordered) if other == value) for value in values
    ]


if __name__ == "__main__":
    sys.exit(main())
