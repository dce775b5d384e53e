"""What does the data engine cost? All of its figures, in one run on one machine.

    python benchmarks/data.py
    python benchmarks/data.py demo --parts operators thresholds
    python benchmarks/data.py --parts operators --true-size --device cuda --samples 2048

Prints Markdown, a table for each part:

operators   Data-Juicer's operators and ours: samples a second, and the largest difference of a score
overhead    a small recipe by `dj-process` and by the process stage, with and without a warm worker
retention   what a recipe keeps after a moved threshold, counted from the scores of many samples
thresholds  a changed threshold run from scratch, and with the scores that are known

`demo` is a demo workspace, of which the benchmark makes a copy; without one it makes its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import data_operators  # noqa: E402
from data_overhead import known_scores, overhead, print_rows  # noqa: E402
from data_retention import print_retention  # noqa: E402


def main() -> int:
    """Measure and print the chosen parts."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if options.parts != ["retention"] and not options.true_size:
            options.workspace = own_workspace(options, Path(folder) / "demo")
        load = os.getloadavg()[0]
        print(f"{os.cpu_count()} CPUs ({platform.machine()}), load {load:.1f} at the start")
        for part in options.parts:
            title, work = PARTS[part]
            print(f"\n## {title}\n", flush=True)
            work(options)
            sys.stdout.flush()
    return 0


def _operators(options: argparse.Namespace) -> None:
    data_operators.print_operators(options)


def _overhead(options: argparse.Namespace) -> None:
    print_rows(overhead(options.workspace, options.small_samples, options.repetitions))


def _retention(options: argparse.Namespace) -> None:
    print_retention(options.rows, options.repeats)


def _thresholds(options: argparse.Namespace) -> None:
    print_rows(known_scores(options.workspace, options.repetitions))


PARTS: Mapping[str, tuple[str, Callable[[argparse.Namespace], None]]] = {
    "operators": ("Data-Juicer's operators and ours", _operators),
    "overhead": ("Fixed overhead of a small recipe", _overhead),
    "retention": ("What a recipe keeps, counted from scores", _retention),
    "thresholds": ("A changed threshold", _thresholds),
}


def own_workspace(options: argparse.Namespace, folder: Path) -> Path:
    """Return a copy of the demo workspace that is named, or a new one."""
    from synth_agent.demo import prepare_demo
    from synth_agent.miniworld import write_world

    if options.workspace is not None:
        shutil.copytree(options.workspace, folder, symlinks=True)
        return folder
    world = folder.with_name("world")
    sizes = {"num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
    write_world(world, seed=0, num_seed_samples=options.seed_samples, **sizes)
    prepare_demo(folder, lambda line: None, world)
    return folder


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path, nargs="?", help="a demo workspace")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), help="default: all")
    parser.add_argument("--seed-samples", type=int, default=1600, help="of the workspace it makes")
    parser.add_argument("--small-samples", type=int, default=200, help="of the small recipe")
    parser.add_argument("--repetitions", type=int, default=5, help="of every process")
    parser.add_argument("--rows", type=int, default=400_000, help="samples with made-up scores")
    parser.add_argument("--repeats", type=int, default=30, help="answers of each kind")
    data_operators.add_options(parser)
    options = parser.parse_args()
    if options.true_size and options.parts is None:
        options.parts = ["operators", "retention"]
    options.parts = options.parts or list(PARTS)
    if options.true_size and {"overhead", "thresholds"} & set(options.parts):
        parser.error("--true-size is for the operators; run the other parts by themselves")
    data_operators.settle(options)
    return options


if __name__ == "__main__":
    sys.exit(main())
