"""How long do the statistics of many samples take, and how much memory does a recipe need for them?

    python benchmarks/scale.py analysis --samples 20000 --folder DIR
    python benchmarks/scale.py recipe --samples 250000 --how memory --folder DIR
    python benchmarks/scale.py recipe --samples 250000 --how chunks --folder DIR
    python benchmarks/scale.py recipe --samples 250000 --how stage --folder DIR

Makes small samples (a distinct text of about 90 characters, and one of a few pictures of 48x48 pixels,
hard-linked under a name of its own for `analysis`), and prints JSON: seconds, processor seconds,
samples a second and the largest resident memory of the process and its children.
`analysis` runs `synth_agent.stages.analyze` on the statistics that need no model and says what each of
them took. `recipe` runs two filters and a deduplicator, with all samples in memory, in chunks, or in
chunks with what stage 1 does before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PICTURES = 64
SIDE = 48
POLL_SECONDS = 0.1
WORDS = "a red blue green box cup dog tree on under beside the small large old table with".split()
FILTERS = (("words_num_filter", {"min_num": 5}), ("text_length_filter", {"min_len": 60}))
DEDUPLICATOR = ("document_deduplicator", {})
REPEATED = 20
"""Every so many samples, one repeats the text of the one before it."""


SEED, IMAGES, ORIGINAL = "data/seed/seed.jsonl", "data/seed", "data/seed/stage_1.json"
CAP = 200_000
QUESTION = {"from": "human", "value": "<image>\nDescribe the picture in one sentence."}

Rows = Iterator[tuple[str | int, str]]


@dataclass
class Peak:
    """The most memory that a process and its children held, and their processor time."""

    resident_bytes: int = 0
    processor_seconds: float = 0.0


def make_workspace(folder: Path, samples: int, *, own_pictures: bool) -> Path:
    """Write a workspace with that many samples, once, and return its root."""
    root = folder / f"{samples}-{'own' if own_pictures else 'shared'}"
    if (root / "synth.yaml").exists():
        return root
    seed = root / "data" / "seed"
    pictures = seed / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        colour = (number * 4, 255 - number * 4, number * 37 % 256)
        Image.new("RGB", (SIDE + number, SIDE), colour).save(pictures / f"{number}.jpg")
    with (root / SEED).open("w") as file, (root / ORIGINAL).open("w") as original:
        for number, record in enumerate(_records(samples, seed if own_pictures else None)):
            file.write(json.dumps(record) + "\n")
            conversations = [QUESTION, {"from": "gpt", "value": record["text"]}]
            asked = {"id": record["id"], "image": record["images"][0]}
            original.write(",\n" if number else "[")
            json.dump({**asked, "conversations": conversations}, original)
        original.write("]\n")
    (root / "synth.yaml").touch()
    return root


def _records(samples: int, links: Path | None) -> Iterator[dict[str, Any]]:
    """Yield records; with a folder for links, each has a picture file of its own."""
    draw = random.Random(0)
    text = ""
    for number in range(samples):
        if number % REPEATED or not text:
            words = " ".join(draw.choices(WORDS, k=draw.randint(4, 24)))
            text = f"<__dj__image>\n{words}, number {number} <|__dj__eoc|>"
        image = f"pictures/{number % PICTURES}.jpg"
        if links is not None:
            source, image = links / image, f"links/{number // 1000}/{number}.jpg"
            (links / image).parent.mkdir(parents=True, exist_ok=True)
            (links / image).unlink(missing_ok=True)
            os.link(source, links / image)
        yield {"id": f"sample-{number}", "images": [image], "text": text}


def run_watched(command: list[str], root: Path) -> tuple[float, Peak]:
    """Run a command in a folder and return seconds and what it used.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(root / "cache"),
    }
    started, peak = time.monotonic(), Peak()
    with (root / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        _look(watched, peak)
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - started, peak


def _look(process: psutil.Process, peak: Peak) -> None:
    try:
        family = [process, *process.children(recursive=True)]
        resident = sum(member.memory_info().rss for member in family)
        times = [member.cpu_times() for member in family]
    except psutil.NoSuchProcess:
        return
    peak.resident_bytes = max(peak.resident_bytes, resident)
    peak.processor_seconds = max(peak.processor_seconds, sum(t.user + t.system for t in times))


def measure_analysis(root: Path, samples: int) -> dict[str, Any]:
    """Score every sample by the statistics that need no model."""
    from synth_agent.analysis import PICTURE_STATISTICS, TEXT_STATISTICS

    operators = root / "operators.json"
    operators.write_text(json.dumps([[n, {}] for n in (*TEXT_STATISTICS, *PICTURE_STATISTICS)]))
    statistics = root / "artifacts" / f"statistics-{time.time_ns()}"
    report = root / "report.json"
    command = [sys.executable, "-m", "synth_agent.stages.analyze", "--seed", SEED]
    command += ["--images", IMAGES, "--operators", str(operators), "--report", str(report)]
    command += ["--statistics", str(statistics), "--threads", "1"]
    seconds, peak = run_watched(command, root)
    columns = {c["operator"]: c["seconds"] for c in json.loads(report.read_text())["columns"]}
    rest = round(seconds - sum(columns.values()), 1)
    return _figures(samples, seconds, peak) | {
        "seconds_of": columns | {"start, reading the seed set and its pictures' digests": rest}
    }


def measure_recipe(root: Path, samples: int, how: str, only_filters: bool) -> dict[str, Any]:
    """Run the recipe with all samples in memory, or in chunks."""
    command = [sys.executable, __file__, "run-recipe", "--how", how, "--folder", str(root)]
    command += ["--samples", str(samples), *(["--only-filters"] if only_filters else [])]
    seconds, peak = run_watched(command, root)
    result = json.loads((root / f"{how}.json").read_text())
    return _figures(samples, seconds, peak) | {"how": how} | result


def run_recipe(root: Path, samples: int, how: str, only_filters: bool) -> None:
    """Run the recipe in this process and write what is left of the samples."""
    import tempfile

    from synth_agent.recipes import Operator, Recipe
    from synth_agent.stages.datajuicer import guard

    guard()
    chosen = FILTERS if only_filters else (*FILTERS, DEDUPLICATOR)
    steps = tuple(Operator(name, {**given, "num_proc": 0}) for name, given in chosen)
    options = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
    recipe = Recipe("scale", "", "", steps, options)
    run = {"memory": _in_memory, "chunks": _in_chunks, "stage": _as_a_stage}[how]
    with tempfile.TemporaryDirectory(dir=root) as name:
        rows, counts = run(recipe, root, samples, Path(name))
        total, kept = hashlib.sha256(), 0
        for identity, text in rows:
            kept += 1
            total.update(f"{identity} {text}\n".encode())
    result = {
        "kept": kept,
        "rows_digest": total.hexdigest()[:16],
        "operators": {count.name: count.seconds for count in counts},
    }
    (root / f"{how}.json").write_text(json.dumps(result))


def _in_memory(recipe: Any, root: Path, samples: int, work: Path) -> tuple[Rows, Any]:
    from synth_agent.data import read_samples
    from synth_agent.stages.branch import run_branch, seed_records

    seed = read_samples(root / SEED)
    records = seed_records(seed, root / IMAGES)
    outcome = run_branch(recipe, records, seed, work / "operators", 0, lambda *_: None)
    return ((row["id"], row["text"]) for row in outcome.rows), outcome.counts


def _in_chunks(recipe: Any, root: Path, samples: int, work: Path) -> tuple[Rows, Any]:
    from synth_agent.data import iter_samples
    from synth_agent.stages.streaming import LocalPool, stream_branch

    pool = LocalPool(recipe, work / "operators")
    seed, images = iter_samples(root / SEED), root / IMAGES
    outcome = stream_branch(seed, samples, images, pool, work / "chunks", lambda *_: None)
    return ((row["id"], row["text"]) for row in outcome.rows()), outcome.counts


def _as_a_stage(recipe: Any, root: Path, samples: int, work: Path) -> tuple[Rows, Any]:
    """Check the inputs, run the recipe in chunks and write at most `CAP` samples of what is left."""
    from synth_agent.data import iter_samples, write_llava, write_samples
    from synth_agent.stages.large import Originals, check_seed, chosen_samples
    from synth_agent.stages.streaming import LocalPool, stream_branch

    seed, images = root / SEED, root / IMAGES
    originals = Originals(root / ORIGINAL, work)
    count = check_seed(seed, images, originals, lambda done: None)
    pool = LocalPool(recipe, work / "operators")
    outcome = stream_branch(
        iter_samples(seed), count, images, pool, work / "chunks", lambda *_: None
    )
    chosen = chosen_samples(outcome, images, CAP, 1024)
    write_samples(work / "processed.jsonl", chosen)
    write_llava(work / "processed.json", originals.restored(chosen))
    return ((sample.id, sample.text) for sample in chosen), outcome.counts


def _figures(samples: int, seconds: float, peak: Peak) -> dict[str, Any]:
    return {
        "samples": samples,
        "seconds": round(seconds, 1),
        "processor_seconds": round(peak.processor_seconds, 1),
        "samples_a_second": round(samples / seconds),
        "peak_resident_mib": round(peak.resident_bytes / 2**20),
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("analysis", "recipe", "run-recipe"))
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--how", choices=("memory", "chunks", "stage"), default="stage")
    parser.add_argument("--only-filters", action="store_true", help="leave the deduplicator out")
    parser.add_argument("--folder", type=Path, required=True, help="where to make the samples")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.what == "run-recipe":
        run_recipe(folder, arguments.samples, arguments.how, arguments.only_filters)
        return
    root = make_workspace(folder, arguments.samples, own_pictures=arguments.what == "analysis")
    if arguments.what == "analysis":
        print(json.dumps(measure_analysis(root, arguments.samples), indent=1))
    else:
        only_filters = arguments.only_filters
        result = measure_recipe(root, arguments.samples, arguments.how, only_filters)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
