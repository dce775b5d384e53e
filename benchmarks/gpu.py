"""How fast and how large is MGM-2B on a GPU: training, answering, and the card's own ceilings.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only ceilings,lora
    python benchmarks/gpu.py --list

True sizes, random weights, bfloat16. Prints Markdown tables: rates beside what the original code
reaches on the same kind of card, the share of the card's arithmetic that is used, where the time of
a step goes, and memory as predicted and as measured. `--json FILE` keeps the raw records; given one
that exists, it prints its tables, after measuring what `--only` names.
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

from benchmarks.gpu_training import GIB, Case
from mgm.config import ModelConfig
from mgm.memory import Method, Plan, predict

HERE = Path(__file__).resolve().parent
NEEDED_TFLOP = {"pretrain": 6.0, "lora": 8.0, "full": 11.5}
"""Arithmetic that one sample needs, with logits at labels only and nothing recomputed."""


@dataclass(frozen=True)
class Row:
    """A case and what is known of it."""

    case: Case
    original: str = ""
    """What the original code reaches on one H100, as measured."""
    goal: float | None = None


ROWS = (
    Row(
        Case(
            "full, 24-bit masters, 8-bit moments, 23 GiB",
            "full",
            5504,
            18,
            "split24",
            "8bit",
            23.0,
            3,
        ),
        "30 GB of the host",
    ),
    Row(Case("full, 24-bit masters, recomputed", "full", 8192, 18, "split24", "8bit")),
    Row(Case("full, 24-bit masters", "full", 4096, 0, "split24", "8bit")),
    Row(Case("stage 2 full, float32 masters", "full", 8192, steps=3), "10.8 / 15.0", 38),
    Row(Case("full, small passes", "full", 4096)),
    Row(Case("full, recomputed", "full", 8192, 18)),
    Row(Case("stage 1, 8 samples a pass", "pretrain", 5120, steps=3), "26.5", 70),
    Row(Case("stage 1, 32 samples a pass", "pretrain", 19456, steps=3), "28.8", 70),
    Row(Case("stage 1, half recomputed", "pretrain", 9728, 9)),
    Row(Case("stage 1, 8 samples a pass, 15 GiB", "pretrain", 5120, gib=15.0), "22.8 GiB"),
    Row(Case("stage 2 LoRA r64", "lora", 8192, steps=3), "11.3 / 14.6", 42),
    Row(Case("LoRA, large passes", "lora", 12288)),
    Row(Case("LoRA, 5,504 positions, 23 GiB", "lora", 5504, gib=23.0), "4 samples"),
    Row(Case("LoRA, recomputed, 15 GiB", "lora", 4096, 18, gib=15.0), "cannot"),
)


def methods() -> dict[str, list[Row]]:
    """Return the rows by what they share a process for."""
    found: dict[str, list[Row]] = {}
    for row in ROWS:
        stage, masters, _ = row.case.method
        name = "full-24bit" if masters == "split24" else stage
        found.setdefault(name, []).append(row)
    return found


def run(program: str, argument: str, seconds: float) -> list[dict[str, Any]]:
    """Run a program of this folder and return what it printed, also where it was stopped."""
    command = [sys.executable, str(HERE / program), argument]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds, cwd=HERE.parent
        )
        printed = done.stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    lines = (line for line in printed.splitlines() if line.startswith("{"))
    return [json.loads(line) for line in lines]


def training_table(records: Mapping[str, dict[str, Any]], tflops: float | None) -> str:
    """Return the rates and the memory of the training cases."""
    lines = [
        "| work | original, samples/s | here, samples/s | share of the ceiling | must reach "
        "| allocated / reserved, GiB | first step, s |",
        "| --- " * 7 + "|",
    ]
    for row in ROWS:
        record = records.get(row.case.name)
        if record is None or "error" in record:
            why = "not measured" if record is None else record["error"]
            lines.append(f"| {row.case.name} | {row.original} | {why} |" + " |" * 4)
            continue
        rate = record["samples_per_second"]
        share = "" if tflops is None else f"{rate * NEEDED_TFLOP[row.case.stage] / tflops:.0%}"
        goal = "" if row.goal is None else f"{row.goal:g}"
        lines.append(
            f"| {row.case.name} | {row.original} | {rate:.1f} | {share} | {goal} "
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
        "whole step",
    )
    lines = ["| ms a sample | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for name, record in records.items():
        if "sections_ms" not in record:
            continue
        values = (record["sections_ms"].get(one, 0.0) / record["samples"] for one in names)
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def memory_table(records: Mapping[str, dict[str, Any]]) -> str:
    """Return predicted and measured memory side by side."""
    config = ModelConfig.preset("mgm-2b")
    lines = [
        "| work | positions | recomputed layers | predicted, GiB | measured, GiB | off by "
        "| reserved: predicted, measured |",
        "| --- " * 7 + "|",
    ]
    for row in ROWS:
        record = records.get(row.case.name)
        if record is None or "error" in record:
            continue
        case = row.case
        method: Method = "projector" if case.stage == "pretrain" else case.stage
        plan = Plan(method, case.tokens, case.recomputed_layers, case.master_weights, case.moments)
        memory = predict(config, plan)
        predicted, measured = memory.peak / GIB, record["allocated_gib"]
        lines.append(
            f"| {case.name} | {case.tokens} | {case.recomputed_layers} "
            f"| {predicted:.1f} | {measured:.1f} | {predicted / measured - 1:+.1%} "
            f"| {memory.reserved / GIB:.1f}, {record['reserved_gib']:.1f} |"
        )
    return "\n".join(lines)


def answering_table(records: Mapping[str, dict[str, Any]]) -> str:
    """Return the rates of answering, preprocessing included."""
    lines = [
        "| answering | original, questions/s | here, questions/s | must reach | reserved, GiB |",
        "| --- " * 5 + "|",
    ]
    for name, record in records.items():
        if "questions_per_second" in record:
            lines.append(
                f"| {name} | {record['original']} | {record['questions_per_second']:.1f} "
                f"| {record['goal']} | {record['reserved_gib']:.1f} |"
            )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="limit of each part")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", type=Path, help="file for the raw records")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the parts and print the tables."""
    options = parse_arguments()
    parts = methods()
    names = ["ceilings", *parts, "answering"]
    if options.list:
        print("\n".join(names))
        return 0
    chosen = [name for name in options.only.split(",") if name] or names
    if unknown := [name for name in chosen if name not in names]:
        print(f"unknown part {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    records: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.exists():
        records = json.loads(options.json.read_text(encoding="utf-8"))
        chosen = [] if not options.only else chosen
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in parts:
            cases = json.dumps([asdict(row.case) for row in parts[name]])
            found = run("gpu_training.py", cases, options.seconds)
        else:
            found = run(f"gpu_{name}.py", "", options.seconds)
        for record in found:
            records.setdefault(record["name"], {}).update(record)
        if options.json is not None:
            options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    ceilings = records.get("ceilings", {})
    tables = (
        json.dumps(ceilings),
        training_table(records, ceilings.get("bf16_tflops")),
        sections_table(records),
        memory_table(records),
        answering_table(records),
    )
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
