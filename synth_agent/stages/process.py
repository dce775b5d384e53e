"""Stage 1: the seed set through the recipe's operators, into the dataset that the model trains on.

Run it from the workspace root:
`python -m synth_agent.stages.process --recipe FILE --seed FILE.jsonl --images DIR
--original stage_1.json --cap N --cap-seed S --statistics DIR --output DIR --progress FILE`.

Owns the files of a processed dataset: `processed.jsonl` (competition format), `processed.json`
(LLaVA, for training), `rows.json` (which seed rows are left and where the others went),
`branch-N-NAME.yaml` (each branch of a data plan as a recipe that `dj-process` runs) and
`result.json`, written last. Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synth_agent.changes import OperatorChanges, write_changes
from synth_agent.data import (
    ROW_ID_FIELD,
    Sample,
    atomic_file,
    check_image_marker,
    count_records,
    read_llava,
    read_samples,
    recipe_image_marker,
    relative_samples,
    restore_questions,
    with_kit_markers,
    write_llava,
    write_samples,
)
from synth_agent.data_plans import DataPlan, Operator
from synth_agent.errors import EXIT_OK, SynthAgentError
from synth_agent.recipe_checks import check_models, check_options
from synth_agent.recipes import Recipe, dump_recipe, load_recipe, operators_with_places
from synth_agent.stages.assemble import assemble, in_order, measure
from synth_agent.stages.branch import Outcome, run_branch, seed_records
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.large import open_pool, process_large
from synth_agent.stages.made_pictures import adopt_pictures
from synth_agent.stages.pictures import check_pictures
from synth_agent.stages.program import run_program, use_threads
from synth_agent.stages.progress import StageProgress
from synth_agent.stages.streaming import stream_branch, why_not_in_chunks
from synth_agent.workspace import open_workspace

if TYPE_CHECKING:
    from synth_agent.stages.known_scores import KnownScores


@dataclass(frozen=True)
class Processed:
    """What a recipe made, and how."""

    rows: Sequence[Mapping[str, Any]]
    """The samples that are left, at most as many as the cap, in their order."""
    before_cap: Sequence[Mapping[str, Any]]
    outcomes: tuple[Outcome, ...]
    """Per branch; one for a linear recipe."""
    assembly: Mapping[str, Any] = field(default_factory=dict)
    """What `result.json` says of a data plan besides; empty for a linear recipe."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and return its exit code."""
    arguments = _parser().parse_args(argv)
    use_threads(arguments.threads)

    def work(progress: StageProgress) -> int:
        process(arguments, progress)
        return EXIT_OK

    return run_program("Processing failed", arguments.progress, work)


def process(arguments: argparse.Namespace, progress: StageProgress) -> None:
    """Process the seed set and write the outputs.

    Raises:
        InvalidInput: the recipe, the seed set or its pictures are bad.
        SynthAgentError: an operator failed, or nothing is left.
    """
    recipe = load_recipe(arguments.recipe)
    check_options(str(arguments.recipe), recipe.options)
    for where, operator in operators_with_places(recipe):
        check_models(where, operator.parameters, Path.cwd())
    if recipe.data_plan is None and _is_in_chunks(recipe, arguments):
        process_large(recipe, arguments, progress)
        return
    seed = read_samples(arguments.seed, unique_ids=True)
    original = read_llava(arguments.original)
    # A record that training could not use is found before the recipe runs, not after.
    for _ in restore_questions((sample.as_record() for sample in seed), original):
        pass
    # Under another marker, filters would see no picture, and training the marker as a word.
    check_image_marker(seed, recipe_image_marker(recipe.options))
    check_pictures(
        seed,
        arguments.images,
        lambda done, total: progress.update(
            step=done, total=total, unit="pictures", label="checking pictures"
        ),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    processed = run_recipe(recipe, seed, arguments, progress)
    _write_outputs(arguments, recipe, processed, seed, original)


def _is_in_chunks(recipe: Recipe, arguments: argparse.Namespace) -> bool:
    """Tell whether the recipe runs chunk by chunk: on a cluster, or with more samples than `large`."""
    if arguments.executor == "ray":
        return True
    if why_not_in_chunks(recipe) is not None or not arguments.seed.is_file():
        return False
    return count_records(arguments.seed) > int(arguments.large)


def run_recipe(
    recipe: Recipe, seed: Sequence[Sample], arguments: argparse.Namespace, progress: StageProgress
) -> Processed:
    """Drive the recipe's branches one after the other, in this process, and put them together.

    Raises:
        SynthAgentError: an operator failed, samples were lost without its decision, or none is left.
    """
    progress.update(step=0, total=len(seed), unit="samples", label="starting Data-Juicer")
    guard()
    with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".work-") as name:
        job = _Job(recipe, seed, arguments, progress, Path(name).resolve())
        if recipe.data_plan is None:
            return _capped(job.run_branch(1), arguments)
        return _assembled(job, recipe.data_plan)


@dataclass(frozen=True)
class _Job:
    """A recipe at work on the seed set, in a folder."""

    recipe: Recipe
    seed: Sequence[Sample]
    arguments: argparse.Namespace
    progress: StageProgress
    folder: Path

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        return seed_records(self.seed, self.arguments.images)

    @functools.cached_property
    def known(self) -> KnownScores | None:
        """Scores of the seed samples that need not be computed again."""
        from synth_agent.stages.known_scores import KnownScores

        root = self.arguments.statistics
        if root is None or not root.is_dir():
            return None
        workspace = open_workspace(Path.cwd())
        return KnownScores(root, workspace, self.seed, self.arguments.images)

    def run_branch(self, position: int) -> Outcome:
        """Run the branch at a position, counted from 1; a linear recipe is its only one."""
        recipe, prefix = self.recipe, ""
        if recipe.data_plan is not None:
            prefix = f"{position}/{len(recipe.branches)} {recipe.branches[position - 1].name}: "
            recipe = recipe.branch_recipe(position)

        def report(label: str, done: int, total: int) -> None:
            self.report(prefix + label, done, total)

        # The first branch draws as a linear recipe would, the others independently of it.
        generator_seed = self.arguments.cap_seed + position - 1
        folder = self.folder / f"branch-{position}"
        if self._is_in_chunks(recipe):
            images = self.arguments.images
            with open_pool(recipe, self.arguments, folder / "operators") as pool:
                streamed = stream_branch(
                    self.seed, len(self.seed), images, pool, folder / "chunks", report
                )
            return streamed.in_memory()
        return run_branch(
            recipe, self.records, self.seed, folder, generator_seed, report, self.known
        )

    def _is_in_chunks(self, recipe: Recipe) -> bool:
        """Tell whether a branch runs as a linear recipe of so many samples does.

        Scores of a model that are known save more than chunks do, and only the other way takes them.
        """
        if self.arguments.executor == "ray":
            return True
        if len(self.seed) <= self.arguments.large or why_not_in_chunks(recipe) is not None:
            return False
        return self.known is None or not self.known.saves_a_model(recipe.operators)

    def measure(self, operator: Operator, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Measure rows by a filter's statistic."""

        def report(done: int, total: int) -> None:
            self.report(f"ordering by {operator.name}", done, total)

        with tempfile.TemporaryDirectory(dir=self.folder, prefix="order-") as name:
            return measure(operator, rows, self.recipe, self.seed, Path(name), report)

    def report(self, label: str, done: int, total: int) -> None:
        self.progress.update(step=done, total=total, unit="samples", label=label)


def _capped(outcome: Outcome, arguments: argparse.Namespace) -> Processed:
    """Return what a linear recipe left, at most as many samples as the cap."""
    rows = outcome.rows
    if not rows:
        raise _nothing_left(f"{outcome.emptied_by or 'the recipe'} dropped the last one")
    if len(rows) > arguments.cap:
        positions = random.Random(arguments.cap_seed).sample(range(len(rows)), arguments.cap)
        rows = [rows[position] for position in positions]
    return Processed(rows, outcome.rows, (outcome,))


def _assembled(job: _Job, plan: DataPlan) -> Processed:
    """Run the branches of a data plan and return what it made of them."""
    arguments = job.arguments
    if plan.order.operator is not None:
        # An order that cannot be is found before the branches run, not after.
        example = next((record for record in job.records if record["images"]), job.records[0])
        job.measure(plan.order.operator, [example])
    outcomes = tuple(job.run_branch(position) for position in range(1, len(plan.branches) + 1))
    made = assemble(plan, [outcome.rows for outcome in outcomes], arguments.cap, arguments.cap_seed)
    for share in made.shares:
        if share.note:
            print(f"branch {share.name}: {share.note}", file=sys.stderr)
    if not made.rows:
        ends = (
            f"{share.name} ({outcome.emptied_by or 'nothing to begin with'})"
            for share, outcome in zip(made.shares, outcomes, strict=True)
        )
        raise _nothing_left(f"every branch was emptied: {', '.join(ends)}")
    rows, without_statistic = in_order(
        plan.order, made.rows, lambda operator: job.measure(operator, made.rows)
    )
    assembly = {
        "branches": [asdict(share) for share in made.shares],
        "merged": made.merged,
        "repetitions": made.repetitions,
        "order": plan.order.mapping(),
        "without_statistic": without_statistic,
    }
    return Processed(rows, made.before_cap, outcomes, assembly)


def _nothing_left(message: str) -> SynthAgentError:
    return SynthAgentError("No sample is left", message, "loosen the recipe's thresholds")


def _write_outputs(
    arguments: argparse.Namespace,
    recipe: Recipe,
    processed: Processed,
    seed: Sequence[Sample],
    original: Sequence[dict[str, Any]],
) -> None:
    output: Path = arguments.output
    rows, images = adopt_pictures(processed.rows, seed, arguments.images, output)
    samples = [
        with_kit_markers(sample, recipe.options) for sample in relative_samples(rows, seed, images)
    ]
    write_samples(output / "processed.jsonl", samples)
    write_llava(
        output / "processed.json",
        restore_questions((sample.as_record() for sample in samples), original),
    )
    kept = _row_ids(processed.before_cap)
    if recipe.data_plan is None:
        _write_json(output / "rows.json", {"kept": kept, "dropped": processed.outcomes[0].dropped})
    else:
        _write_json(output / "rows.json", _rows_of_branches(kept, len(seed), processed, recipe))
        _write_branches(output, processed, recipe, arguments.seed)
    with (output / "processed.jsonl").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        "kept": len(samples),
        "before_cap": len(processed.before_cap),
        "seed_samples": len(seed),
        "dropped": len(seed) - len(kept),
        "operators": list(_operator_counts(processed, recipe)),
        **processed.assembly,
        "digest": digest,
    }
    _write_json(output / "result.json", result)
    write_changes(output, list(_operator_changes(processed, recipe)))


def _row_ids(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the seed rows that samples come from, each once."""
    return sorted({row[ROW_ID_FIELD] for row in rows})


def _rows_of_branches(
    kept: Sequence[int], seed_samples: int, processed: Processed, recipe: Recipe
) -> dict[str, Any]:
    """Return which seed rows are left in all, and per branch what its operators did to them."""
    branches = [
        {"name": branch.name, "kept": _row_ids(outcome.rows), "dropped": outcome.dropped}
        for branch, outcome in zip(recipe.branches, processed.outcomes, strict=True)
    ]
    gone = sorted(set(range(seed_samples)) - set(kept))
    return {"kept": kept, "dropped": {"every branch": gone}, "branches": branches}


def _operator_counts(processed: Processed, recipe: Recipe) -> Iterator[dict[str, Any]]:
    for branch, outcome in zip(recipe.branches, processed.outcomes, strict=True):
        for count in outcome.counts:
            yield asdict(count) | ({"branch": branch.name} if branch.name else {})


def _operator_changes(processed: Processed, recipe: Recipe) -> Iterator[OperatorChanges]:
    for branch, outcome in zip(recipe.branches, processed.outcomes, strict=True):
        for one in outcome.changes:
            label = f"{branch.name}: {one.operator}" if branch.name else one.operator
            yield OperatorChanges(label, one.changes)


def _write_branches(output: Path, processed: Processed, recipe: Recipe, seed: Path) -> None:
    """Write each branch as a recipe of its own, which `dj-process` runs from the workspace root."""
    places = {
        "dataset_path": os.path.relpath(seed),
        "export_path": f"artifacts/processed/{recipe.name}.jsonl",
    }
    recipe = replace(recipe, options={**places, **recipe.options})
    for position, outcome in enumerate(processed.outcomes, 1):
        branch = _as_it_ran(recipe.branch_recipe(position), outcome)
        with atomic_file(output / f"{branch.name}.yaml") as file:
            file.write(dump_recipe(branch))


def _as_it_ran(branch: Recipe, outcome: Outcome) -> Recipe:
    """Return a branch with an operator wherever its samples were measured anew."""
    if not outcome.measured_anew:
        return branch
    steps: list[Operator] = []
    for position, operator in enumerate(branch.operators, 1):
        if position in outcome.measured_anew:
            steps.append(Operator("forget_measurements_mapper", {"num_proc": 0}))
        steps.append(operator)
    path = str(Path(__file__).with_name("forget_measurements.py"))
    options = {**branch.options, "custom_operator_paths": [path]}
    return replace(branch, operators=tuple(steps), options=options)


def _write_json(path: Path, value: object) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1)
        file.write("\n")


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
    parser.add_argument("--executor", choices=("default", "ray"), default="default")
    parser.add_argument("--ray-address", help="cluster to run the operators on, HOST:PORT")
    parser.add_argument(
        "--large", type=int, default=100_000, help="samples above which chunks are made"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the models")
    parser.add_argument("--statistics", type=Path, help="folder with scores that are known")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--progress", type=Path, help="file for progress lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
