"""Several GPUs against one, at the true sizes: how much faster, and is it the same training.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_scaling.py --json scaling.json
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_scaling.py --only full,full-zero2
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_scaling.py --preset mgm-mini

Every case is trained by all processes together and then by the first alone, from the same random
weights and the same records; the global batch is the same, so the losses should be. Prints a
Markdown table; `--json FILE` keeps the raw records. `--preset mgm-mini` tries it without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_training import GIB, SAMPLES, Case, build
from mgm.distributed import ALONE, Group, joined
from mgm.trainer import Trainer
from mgm.training_state import TrainingState

WARM_STEPS = 2
CASES: Mapping[str, tuple[Case, Mapping[str, Any]]] = {
    "stage 1": (Case("stage 1", "pretrain", 9728, steps=4), {}),
    "lora": (Case("lora", "lora", 8192, steps=4), {"lora_dropout": 0.0}),
    "full": (Case("full", "full", 8192, steps=4), {}),
    "full-zero2": (Case("full-zero2", "full", 8192, steps=4), {"deepspeed": "zero2"}),
}
"""Dropout draws other numbers in each process, so the adapters' is off."""


def measure(name: str, preset: str, group: Group, *, is_spread: bool = True) -> dict[str, Any]:
    """Train some steps and return rate, memory and losses.

    Args:
        name: Of the case.
        preset: The model's sizes.
        group: Of the processes that train.
        is_spread: With the case's own settings for several processes.
    """
    case, changes = CASES[name]
    own = changes if is_spread else {**changes, "deepspeed": "none"}
    trainer, state = build(case, preset, group, warmup_ratio=0.0, **own), TrainingState("")
    numbers = [timed_step(trainer, state) for _ in range(WARM_STEPS)]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    numbers += [timed_step(trainer, state) for _ in range(case.steps)]
    seconds = sorted(one for one, _, _ in numbers[WARM_STEPS:])
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    return {
        "processes": group.size,
        "samples": SAMPLES[case.stage],
        "samples_per_second": SAMPLES[case.stage] / seconds[len(seconds) // 2],
        "seconds": seconds,
        "allocated_gib": peak,
        "out_of_memory": list(state.out_of_memory),
        "losses": [loss for _, loss, _ in numbers],
        "gradient_norms": [norm for _, _, norm in numbers],
    }


def timed_step(trainer: Trainer, state: TrainingState) -> tuple[float, float, float]:
    """Do one optimizer step; return its seconds, the mean loss and the norm of the gradient."""
    started = time.monotonic()
    loss, norm, *_ = trainer.step(state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started, loss, norm


def release() -> None:
    """Give back the memory of the trainer before."""
    gc.collect()
    torch.cuda.empty_cache()


def compare(name: str, together: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a case: both measurements, and how they differ."""
    pairs = zip(together["losses"], alone["losses"], strict=True)
    return {
        "name": name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "scaling": together["samples_per_second"] / alone["samples_per_second"],
        "largest_loss_difference": max(abs(one - other) / abs(other) for one, other in pairs),
        "together": together,
        "alone": alone,
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of all cases."""
    lines = [
        "| case | GPUs | samples/s | one GPU, samples/s | scaling | losses differ by at most "
        "| GiB a GPU: together, alone |",
        "| --- " * 7 + "|",
    ]
    for record in records:
        together, alone = record["together"], record["alone"]
        lines.append(
            f"| {record['name']} | {together['processes']} "
            f"| {together['samples_per_second']:.1f} | {alone['samples_per_second']:.1f} "
            f"| {record['scaling']:.2f} | {record['largest_loss_difference']:.1e} "
            f"| {together['allocated_gib']:.1f}, {alone['allocated_gib']:.1f} |"
        )
    return "\n".join(lines)


def run(names: Sequence[str], preset: str, group: Group) -> list[dict[str, Any]]:
    """Measure the cases; the first process returns the records, the others none."""
    records = []
    for name in names:
        together = measure(name, preset, group)
        release()
        if group.is_first:
            alone = measure(name, preset, ALONE, is_spread=False)
            release()
            records.append(compare(name, together, alone))
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        group.any(False)  # the others wait for the first
    return records


def main() -> int:
    """Measure, and let the first process tell it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--preset", default="mgm-2b", help="the model's sizes")
    parser.add_argument("--json", type=Path, help="file for the raw records")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        print(f"unknown case {', '.join(unknown)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with joined(wanted) as group:
        records = run(names, options.preset, group)
        if group.is_first:
            if options.json is not None:
                options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
            print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
