"""Stage 1: the seed set through the recipe's operators, into the dataset that the model trains on.

Run it from the workspace root:
`python -m synth_agent.stages.process --recipe FILE --seed FILE.jsonl --images DIR
--original stage_1.json --cap N --cap-seed S --output DIR --progress FILE`.

Owns the files of a processed dataset: `processed.jsonl` (competition format), `processed.json`
(LLaVA, for training), `rows.json` (which seed rows are left and where the others went) and
`result.json`, written last. Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from synth_agent.data import (
    ROW_ID_FIELD,
    Sample,
    atomic_file,
    read_llava,
    read_samples,
    relative_samples,
    restore_questions,
    write_llava,
    write_samples,
)
from synth_agent.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, SynthAgentError
from synth_agent.recipe_checks import check_models, check_options
from synth_agent.recipes import Recipe, load_recipe
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.pictures import check_pictures
from synth_agent.stages.progress import StageProgress

EXIT_TERMINATED = 143


@dataclass(frozen=True)
class OperatorCount:
    """What one operator did: samples before and after, and wall time."""

    name: str
    before: int
    after: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What the recipe left, and where the seed rows that are gone went."""

    rows: list[dict[str, Any]]
    counts: tuple[OperatorCount, ...]
    dropped: dict[str, list[int]]
    """Rows that an operator dropped, under `position. name`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and return its exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    # Read when torch is imported. Threads that wait for each other cost small models half the time.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with StageProgress(arguments.progress) as progress:
        try:
            process(arguments, progress)
        except SynthAgentError as error:
            traceback.print_exc()
            progress.error(error)
            return error.exit_code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001  the process's outermost edge
            traceback.print_exc()
            described = f"{type(error).__name__}: {error}"
            progress.error(SynthAgentError("Processing failed", described, "see the stage's log"))
            return EXIT_FAILED
    return EXIT_OK


def process(arguments: argparse.Namespace, progress: StageProgress) -> None:
    """Process the seed set and write the outputs.

    Raises:
        InvalidInput: the recipe, the seed set or its pictures are bad.
        SynthAgentError: an operator failed, or nothing is left.
    """
    recipe = load_recipe(arguments.recipe)
    check_options(str(arguments.recipe), recipe.options)
    for position, operator in enumerate(recipe.operators, 1):
        where = f"{arguments.recipe}, operator {position} ({operator.name})"
        check_models(where, operator.parameters, Path.cwd())
    seed = read_samples(arguments.seed, unique_ids=True)
    original = read_llava(arguments.original)
    # A record that training could not use is found before the recipe runs, not after.
    for _ in restore_questions((sample.as_record() for sample in seed), original):
        pass
    check_pictures(
        seed,
        arguments.images,
        lambda done, total: progress.update(
            step=done, total=total, unit="pictures", label="checking pictures"
        ),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    outcome = run_recipe(recipe, seed, arguments, progress)
    samples = list(relative_samples(outcome.rows, seed, arguments.images))
    if not samples:
        emptied = next((c.name for c in outcome.counts if c.after == 0), "the recipe")
        raise SynthAgentError(
            "No sample is left", f"{emptied} dropped the last one", "loosen the recipe's thresholds"
        )
    if len(samples) > arguments.cap:
        positions = random.Random(arguments.cap_seed).sample(range(len(samples)), arguments.cap)
        samples = [samples[position] for position in positions]
    _write_outputs(arguments.output, samples, original, seed, outcome)


def run_recipe(
    recipe: Recipe, seed: Sequence[Sample], arguments: argparse.Namespace, progress: StageProgress
) -> Outcome:
    """Drive the recipe's operators one by one, in this process.

    Raises:
        SynthAgentError: an operator failed, or samples were lost without its decision.
    """
    progress.update(step=0, total=len(seed), unit="samples", label="starting Data-Juicer")
    guard()
    from synth_agent.stages.running import OperatorFailed, describe_rows, run_operator

    with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".work-") as folder:
        dataset, operators = _load(recipe, seed, arguments.images, Path(folder).resolve())
        lost = sorted(set(range(len(seed))) - set(dataset[ROW_ID_FIELD]))
        if lost:
            raise OperatorFailed(
                "Samples lost", f"Data-Juicer did not load {describe_rows(lost, seed)}", ""
            )
        _seed_generators(arguments.cap_seed)
        counts, dropped = [], {}
        for position, operator in enumerate(operators, 1):
            label = f"{position}/{len(operators)} {operator._name}"
            started, before = time.monotonic(), dataset[ROW_ID_FIELD]

            def report(done: int, total: int, label: str = label) -> None:
                progress.update(step=done, total=total, unit="samples", label=label)

            dataset = run_operator(operator, dataset, seed, report)
            after = dataset[ROW_ID_FIELD] if len(dataset) else []
            seconds = round(time.monotonic() - started, 3)
            counts.append(OperatorCount(operator._name, len(before), len(after), seconds))
            dropped[f"{position}. {operator._name}"] = sorted(set(before) - set(after))
            if not len(dataset):
                break
        rows = dataset.select_columns([ROW_ID_FIELD, "text", "images"]).to_list()
    for row in rows:
        row["id"] = seed[row[ROW_ID_FIELD]].id
    return Outcome(rows, tuple(counts), dropped)


def _load(recipe: Recipe, seed: Sequence[Sample], images: Path, folder: Path) -> tuple[Any, Any]:
    """Return the seed set as Data-Juicer's dataset, with row ids, and the recipe's operators."""
    from data_juicer.config import init_configs
    from data_juicer.core.data.dataset_builder import DatasetBuilder
    from data_juicer.ops import load_ops

    _write_input(folder / "input.jsonl", seed, images)
    # Data-Juicer's cache does not know when a model folder's content changes: none is used.
    mapping = recipe.mapping() | {
        "dataset_path": str(folder / "input.jsonl"),
        "export_path": str(folder / "export" / "output.jsonl"),
        "skip_op_error": False,
        "use_cache": False,
        "ds_cache_dir": str(folder / "cache"),
    }
    config_file = folder / "recipe.yaml"
    config_file.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
    config = init_configs(["--config", str(config_file)])
    dataset = DatasetBuilder(config, executor_type="default").load_dataset()
    return dataset, load_ops(config.process)


def _write_input(path: Path, seed: Sequence[Sample], images: Path) -> None:
    # Links are kept: the image folder is often one.
    root = os.path.abspath(images)  # noqa: PTH100
    with path.open("w", encoding="utf-8") as file:
        for row_id, sample in enumerate(seed):
            record = {
                "id": str(sample.id),
                "images": [os.path.join(root, image) for image in sample.images],  # noqa: PTH118
                "text": sample.text,
                ROW_ID_FIELD: row_id,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _seed_generators(seed: int) -> None:
    """Seed what operators that draw at random draw from; Data-Juicer seeds nothing itself."""
    random.seed(seed)
    import numpy as np

    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _write_outputs(
    output: Path,
    samples: Sequence[Sample],
    original: Sequence[dict[str, Any]],
    seed: Sequence[Sample],
    outcome: Outcome,
) -> None:
    write_samples(output / "processed.jsonl", samples)
    write_llava(
        output / "processed.json",
        restore_questions((sample.as_record() for sample in samples), original),
    )
    kept = sorted({row[ROW_ID_FIELD] for row in outcome.rows})
    _write_json(output / "rows.json", {"kept": kept, "dropped": outcome.dropped})
    with (output / "processed.jsonl").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        "kept": len(samples),
        "before_cap": len(outcome.rows),
        "seed_samples": len(seed),
        "dropped": len(seed) - len(kept),
        "operators": [asdict(count) for count in outcome.counts],
        "digest": digest,
    }
    _write_json(output / "result.json", result)


def _write_json(path: Path, value: object) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m synth_agent.stages.process", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--recipe", type=Path, required=True, help="recipe file")
    parser.add_argument("--seed", type=Path, required=True, help="seed set, competition JSONL")
    parser.add_argument("--images", type=Path, required=True, help="folder of the seed's pictures")
    parser.add_argument("--original", type=Path, required=True, help="LLaVA file with questions")
    parser.add_argument("--cap", type=int, default=200_000, help="most samples that are left")
    parser.add_argument("--cap-seed", type=int, default=1024, help="seed of the sampling")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the models")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--progress", type=Path, help="file for progress lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
