"""How fast and how large is MGM-2B on a GPU: training, answering, and the card's own ceilings.

    python benchmarks/gpu.py                      # every case, each in a process of its own
    python benchmarks/gpu.py --only ceilings,lora
    python benchmarks/gpu.py --list

True sizes, random weights, bfloat16. Prints a Markdown table beside what the original code reaches
on the same kind of card, the share of the card's arithmetic that is used, memory, and where the
time of a step goes; `--json FILE` keeps the raw records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_training import Case

HERE = Path(__file__).resolve().parent
SECONDS = 240
"""A case that takes longer is stopped and told."""
NEEDED_TFLOP = {"pretrain": 6.0, "lora": 8.0, "full": 11.5}
"""Arithmetic that one sample needs, with logits at labels only and nothing recomputed."""


@dataclass(frozen=True)
class Row:
    """A case and what is known of it."""

    case: Case
    original: str = ""
    """What the original code reaches on one H100, as measured."""
    goal: float | None = None


CASES: dict[str, Row] = {
    "stage1-8": Row(Case("stage 1, 8 samples a pass", "pretrain", 4864, 64), "26.5", 70),
    "stage1-32": Row(Case("stage 1, 32 samples a pass", "pretrain", 19456, 128), "28.8", 70),
    "lora": Row(Case("stage 2 LoRA r64", "lora", 8192, 128), "11.3 / 14.6", 42),
    "full": Row(Case("stage 2 full, float32 masters", "full", 8192, 128), "10.8 / 15.0", 38),
    "stage1-24gb": Row(
        Case("stage 1, 8 samples a pass, 23 GiB", "pretrain", 4864, 64, gib=23.0), "fits in 22.8"
    ),
    "lora-24gb": Row(
        Case("LoRA, 5,504 positions a pass, 23 GiB", "lora", 5504, 64, gib=23.0), "4 samples"
    ),
    "full-24gb": Row(
        Case("full, 24-bit masters, 8-bit moments, 23 GiB", "full", 5504, 64, 18, "split24", "8bit", 23.0),
        "needs 30 GB of the host",
    ),
    "stage1-16gb": Row(
        Case("stage 1, 8 samples a pass, 15 GiB", "pretrain", 4864, 64, gib=15.0), "cannot"
    ),
    "lora-16gb": Row(
        Case("LoRA, 4,096 positions a pass, recomputed, 15 GiB", "lora", 4096, 64, 18, gib=15.0),
        "cannot",
    ),
}


def run(program: str, argument: str) -> dict[str, Any]:
    """Run one case in a process of its own and return its record."""
    command = [sys.executable, str(HERE / program), argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=HERE.parent)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def training_table(records: Mapping[str, dict[str, Any]], tflops: float | None) -> str:
    """Return the rates and the memory of the training cases."""
    lines = [
        "| work | original, samples/s | here, samples/s | share of the ceiling | must reach "
        "| ms a step | allocated / reserved, GiB | first step, s |",
        "| --- " * 8 + "|",
    ]
    for key, row in CASES.items():
        record = records.get(key)
        if record is None:
            continue
        if "error" in record:
            lines.append(f"| {row.case.name} | {row.original} | {record['error']} |" + " |" * 5)
            continue
        rate = record["samples_per_second"]
        share = "" if tflops is None else f"{rate * NEEDED_TFLOP[row.case.stage] / tflops:.0%}"
        goal = "" if row.goal is None else f"{row.goal:g}"
        lines.append(
            f"| {row.case.name} | {row.original} | {rate:.1f} | {share} | {goal} "
            f"| {record['ms_per_step']:.0f} "
            f"| {record['allocated_gib']:.1f} / {record['reserved_gib']:.1f} "
            f"| {record['first_step_seconds']:.0f} |"
        )
    return "\n".join(lines)


def sections_table(records: Mapping[str, dict[str, Any]]) -> str:
    """Return where the time of a step goes, in milliseconds a sample."""
    names = (
        "towers",
        "mining and projector",
        "language model forward",
        "head and loss",
        "backward",
        "optimizer",
    )
    lines = ["| ms a sample | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for key, row in CASES.items():
        record = records.get(key)
        if record is None or "error" in record:
            continue
        values = (record["sections_ms"].get(name, 0.0) / record["samples"] for name in names)
        lines.append(f"| {row.case.name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", type=Path, help="file for the raw records")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the cases and print the tables."""
    options = parse_arguments()
    names = ["ceilings", *CASES, "textvqa", "mmbench"]
    if options.list:
        print("\n".join(names))
        return 0
    chosen = [name for name in options.only.split(",") if name] or names
    if unknown := [name for name in chosen if name not in names]:
        print(f"unknown case {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    records: dict[str, dict[str, Any]] = {}
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in CASES:
            records[name] = run("gpu_training.py", json.dumps(asdict(CASES[name].case)))
        elif name == "ceilings":
            records[name] = run("gpu_ceilings.py", "")
        else:
            records[name] = run("gpu_answering.py", name)
        if options.json is not None:
            options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    ceilings = records.get("ceilings", {})
    print(json.dumps(ceilings))
    print(training_table(records, ceilings.get("bf16_tflops")))
    print()
    print(sections_table(records))
    for name in ("textvqa", "mmbench"):
        if name in records:
            print(json.dumps({name: records[name]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
