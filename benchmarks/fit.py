"""Does a training take the memory that was predicted? Prediction beside measurement, on a GPU.

    python benchmarks/fit.py
    python benchmarks/fit.py --json fit.json

True sizes, random weights, bfloat16, the product's own trainer. Each line is two optimizer steps at
one setting; memory is the allocator's peak of the second. Settings of one method share a process.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_training import GIB, Case, build
from mgm.config import ModelConfig
from mgm.execution import PackedExecution
from mgm.memory import Plan, predict
from mgm.training_state import TrainingState

CASES = {
    "stage 1": Case("stage 1", "pretrain", 4864, 32),
    "LoRA r64": Case("LoRA r64", "lora", 5504, 32),
    "full, float32": Case("full, float32", "full", 8192, 32),
    "full, split24, 8bit": Case(
        "full, split24, 8bit", "full", 8192, 32, master_weights="split24", moments="8bit"
    ),
}
SETTINGS = {
    "stage 1": [(2432, 0), (4864, 0), (4864, 9), (9728, 0), (9728, 18), (19456, 0)],
    "LoRA r64": [(2816, 0), (5504, 0), (5504, 9), (8192, 0), (8192, 18), (12288, 0)],
    "full, float32": [(4096, 0), (8192, 0), (8192, 18)],
    "full, split24, 8bit": [(4096, 0), (5504, 18), (8192, 0), (8192, 18)],
}
"""Positions of a pass, and layers that are recomputed."""


def measure(name: str) -> list[dict[str, Any]]:
    """Return a record for each setting of a method."""
    trainer, _ = build(CASES[name])
    execution = trainer.execution
    assert isinstance(execution, PackedExecution)
    state, records = TrainingState(""), []
    trainer.step(state)
    for tokens, recomputed in SETTINGS[name]:
        execution.budget, execution._language.recomputed_layers = tokens, recomputed
        gc.collect()
        torch.cuda.empty_cache()
        trainer.step(state)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.step(state)
        torch.cuda.synchronize()
        case = replace(CASES[name], tokens=tokens, recomputed_layers=recomputed)
        records.append(
            {
                **asdict(case),
                "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                "seconds": time.monotonic() - started,
                "out_of_memory": state.out_of_memory,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Return prediction and measurement side by side."""
    config = ModelConfig.preset("mgm-2b")
    lines = [
        "| method | positions a pass | recomputed layers | predicted, GiB | measured, GiB | off by "
        "| reserved: predicted, measured |",
        "| --- " * 7 + "|",
    ]
    for record in records:
        stage = record["stage"]
        plan = Plan(
            "projector" if stage == "pretrain" else stage,
            record["tokens"],
            record["recomputed_layers"],
            record["master_weights"],
            record["moments"],
        )
        memory = predict(config, plan)
        predicted, measured = memory.peak / GIB, record["allocated_gib"]
        lines.append(
            f"| {record['name']} | {record['tokens']} | {record['recomputed_layers']} "
            f"| {predicted:.1f} | {measured:.1f} | {predicted / measured - 1:+.1%} "
            f"| {memory.reserved / GIB:.1f}, {record['reserved_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure every method in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for the raw records; read if it exists")
    parser.add_argument("--method", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method)))
        return 0
    records: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        records = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        for name in CASES:
            command = [sys.executable, __file__, "--method", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            records += json.loads(done.stdout.strip().splitlines()[-1])
        if options.json is not None:
            options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
