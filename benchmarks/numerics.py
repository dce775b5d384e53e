"""Do fast numerics train as good a model as the reference does? Both, on one run of the mini world.

    python benchmarks/numerics.py demo --run 0002-similarity --seeds 1 2 3

Takes the configurations that a finished run of a demo workspace left in its logs, trains both stages
and answers both benchmarks with each numerics and seed, by the programs that the run started, and
writes only below `--work`. Prints scores and losses seed by seed and their spread over seeds; what
was trained already is taken from `--out` with the suffix `.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.miniworld_seeds import Record, run_with_config, spread

NUMERICS = ("reference", "fast")
COLUMNS = {"TextVQA": 1, "MMBench": 1, "MMBench plain": 1, "stage-1 loss": 3, "stage-2 loss": 3}
"""What is compared, and its digits."""


def main() -> int:
    """Train what is missing and print the table."""
    options = parse_arguments()
    raw = options.out.with_suffix(".jsonl")
    lines = raw.read_text("utf-8").splitlines() if raw.exists() else []
    records: list[Record] = [json.loads(line) for line in lines]
    known = {(record["numerics"], record["seed"]) for record in records}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for numerics in NUMERICS:
            if (numerics, seed) in known:
                continue
            records.append(experiment(options, numerics, seed))
            with raw.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
    report = table(records, options.run)
    print(report)
    options.out.with_suffix(".md").write_text(report + "\n", "utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--run", default="0002-similarity", help="the run that is repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for what is made, else a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/numerics"))
    options = parser.parse_args()
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: a spread needs two or more")
    options.workspace = options.workspace.resolve()
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="numerics-"))).resolve()
    return options


def experiment(options: argparse.Namespace, numerics: str, seed: int) -> Record:
    """Train both stages and answer both benchmarks with one kind of numerics and one seed."""
    folder = options.work / f"{numerics}-{seed}"
    started = time.monotonic()

    def run(program: str, name: str, **changed: Any) -> Path:
        """Run a stage as it was, but for what is changed, and return its output folder."""
        logs = options.workspace / "artifacts" / "logs" / options.run
        config = json.loads((logs / f"{name}.json").read_text("utf-8"))
        output: Path = folder / name
        changed |= {"numerics": numerics, "threads": options.threads, "output": str(output)}
        path = folder / f"{name}.json"
        run_with_config(program, path, {**config, **changed}, options.workspace)
        return output

    seeds = {"seed": seed, "data_seed": seed}
    pretrained = run("mgm.train", "pretrain", **seeds)
    projector = str(pretrained / "mm_projector.bin")
    finetuned = run("mgm.train", "finetune", projector=projector, **seeds)
    answering = {"checkpoint": str(finetuned), "projector": projector}
    textvqa, mmbench = (
        read(run("mgm.evaluate", f"evaluate-{name}", **answering) / "score.json")
        for name in ("textvqa", "mmbench")
    )
    return {
        "numerics": numerics,
        "seed": seed,
        "TextVQA": textvqa["score_percent"],
        "MMBench": mmbench["score_percent"],
        "MMBench plain": mmbench["metrics"]["vanilla_percent"],
        "stage-1 loss": read(pretrained / "train_state.json")["final_loss"],
        "stage-2 loss": read(finetuned / "train_state.json")["final_loss"],
        "seconds": round(time.monotonic() - started, 1),
    }


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def table(records: Sequence[Record], run: str) -> str:
    """Return the results as Markdown: seed by seed, then mean ± standard deviation [range]."""
    lines = [
        f"Run {run} of a demo workspace, trained again with both numerics",
        "",
        "| numerics | seed | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for record in sorted(records, key=lambda one: (one["seed"], NUMERICS.index(one["numerics"]))):
        cells = [f"{record[name]:.{digits}f}" for name, digits in COLUMNS.items()]
        lines.append(f"| {record['numerics']} | {record['seed']} | " + " | ".join(cells) + " |")
    for numerics in NUMERICS:
        chosen = [record for record in records if record["numerics"] == numerics]
        cells = [spread([one[name] for one in chosen], digits) for name, digits in COLUMNS.items()]
        lines.append(f"| {numerics} | all | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(difference(records, name) for name in COLUMNS)])


def difference(records: Sequence[Record], name: str) -> str:
    """Say how far the means lie apart, in standard deviations of the reference over seeds."""
    values = {
        numerics: [record[name] for record in records if record["numerics"] == numerics]
        for numerics in NUMERICS
    }
    apart = statistics.mean(values["fast"]) - statistics.mean(values["reference"])
    deviation = statistics.stdev(values["reference"])
    return (
        f"- {name}: fast minus reference {apart:+.3f}, the reference's standard deviation over "
        f"seeds is {deviation:.3f}: {abs(apart) / deviation:.2f} of it"
    )


if __name__ == "__main__":
    sys.exit(main())
