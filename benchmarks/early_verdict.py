"""How often the loss so far tells the better half of the runs, and what several starts are worth.

    python benchmarks/early_verdict.py                         # the recorded mini-world seeds
    python benchmarks/early_verdict.py --workspace DIR         # loss curves of a workspace's runs

The recorded seeds hold the loss at the end of stage 1, so they tell what that loss is worth when
stage 2 is still to come. A workspace's event logs hold whole curves, and the loss is read at
several shares of stage 1. Runs of one recipe are compared with each other; all recipes together
are shown as well, where the loss mostly tells the recipes' data apart, not their runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from synth_agent import pipeline  # noqa: E402
from synth_agent.early import (  # noqa: E402
    LEAST_RUNS,
    Finished,
    HitRate,
    Starts,
    hit_rate,
    loss_at,
    starts_effect,
    wilson,
)
from synth_agent.noise import replicate_key  # noqa: E402
from synth_agent.workspace import open_workspace  # noqa: E402

SHARES = (0.25, 0.5, 0.75, 1.0)
STARTS = (Starts(2), Starts(3), Starts(4), Starts(6), Starts(6, keep=2))
Groups = Mapping[str, Sequence[Finished]]


def main() -> int:
    """Measure and print the tables; with --out, write them too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workspace", type=Path, help="read the curves of its runs")
    parser.add_argument(
        "--seeds", type=Path, default=Path("benchmarks/results/miniworld_seeds.jsonl")
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    parts = ["# Loss of stage 1 against the final score"]
    if options.workspace is None:
        for benchmark in ("TextVQA", "MMBench"):
            parts += table(benchmark, 1.0, recorded(options.seeds, benchmark))
    else:
        parts += ["", "Finished runs of one workspace, losses from their event logs."]
        for benchmark in ("textvqa", "mmbench"):
            for share in SHARES:
                parts += table(benchmark, share, curves(options.workspace, benchmark, share))
    text = "\n".join(parts) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, "utf-8")
    return 0


def recorded(path: Path, benchmark: str) -> Groups:
    """Return recipe to runs of `miniworld_seeds.py`'s records."""
    groups: dict[str, list[Finished]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        groups[record["recipe"]].append(Finished(record["pretrain_loss"], record[benchmark]))
    return groups


def curves(folder: Path, benchmark: str, share: float) -> Groups:
    """Return plan to runs of a workspace, with the loss of stage 1 at a share of it."""
    groups: dict[str, list[Finished]] = defaultdict(list)
    for run in pipeline.list_runs(open_workspace(folder)):
        loss, key = loss_at(run.stages["pretrain"], share), replicate_key(run)
        if loss is not None and key is not None and benchmark in run.scores:
            groups[key].append(Finished(loss, run.scores[benchmark].percent))
    return groups


def table(benchmark: str, share: float, groups: Groups) -> list[str]:
    """Return one benchmark's tables as Markdown lines."""
    told = {name: runs for name, runs in groups.items() if len(runs) >= LEAST_RUNS}
    lines = ["", f"## {benchmark}, loss at {100 * share:.0f} % of stage 1", ""]
    everyone = [run for runs in groups.values() for run in runs]
    if len(everyone) < LEAST_RUNS:
        return [*lines, f"Not enough runs: {len(everyone)} of {LEAST_RUNS}."]
    lines += ["| runs | hits | 95 % interval | Brier score |", "|---|---|---|---|"]
    rates = {name: hit_rate(runs) for name, runs in told.items()}
    lines += [row(name[:24], rate) for name, rate in rates.items()]
    if rates:
        lines.append(row("inside recipes, together", joined(list(rates.values()))))
    lines.append(row("all recipes mixed", hit_rate(everyone)))
    if not told:
        return lines
    lines += ["", "| starts | kept | effect on the score, points | spread before, after |"]
    lines.append("|---|---|---|---|")
    for starts in (replace(option, share=share) for option in STARTS):
        if starts.count <= min(map(len, told.values())):
            effect = starts_effect(list(told.values()), starts)
            lines.append(
                f"| {starts.count} | {starts.keep} | {effect.points:+.1f} "
                f"[{effect.low:+.1f}, {effect.high:+.1f}] | "
                f"{effect.spread_before:.1f}, {effect.spread_after:.1f} |"
            )
    return lines


def joined(rates: Sequence[HitRate]) -> HitRate:
    """Add up hit rates that were measured apart."""
    runs, hits = sum(rate.num_runs for rate in rates), sum(rate.hits for rate in rates)
    brier = float(np.average([r.brier for r in rates], weights=[r.num_runs for r in rates]))
    return HitRate(runs, hits, *wilson(hits, runs), brier)


def row(name: str, rate: HitRate) -> str:
    """Return one line of the table of hit rates."""
    return (
        f"| {name}, {rate.num_runs} | {rate.hits} | "
        f"{100 * rate.low:.0f} to {100 * rate.high:.0f} % | {rate.brier:.3f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
