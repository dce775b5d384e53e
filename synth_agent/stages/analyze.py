"""Scores every sample of the seed set with filters of Data-Juicer, once, into the statistics table.

Run it from the workspace root:
`python -m synth_agent.stages.analyze --seed FILE.jsonl --images DIR --operators FILE.json
--statistics DIR --progress FILE --report FILE`.

Owns what `synth_agent.statistics` lays down on disk, through its writers. Only samples without a score
are worked on; scores are kept every few seconds, so a killed run loses no more than that. A sample
that cannot be scored gets the reason in place of a score. An operator whose packages or files are not
on this machine is reported and left out. Exit codes: 0 done, 1 another operator failed, 2 bad input,
130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synth_agent.data import Sample, atomic_file, read_samples
from synth_agent.data_keys import remember_data_key, sample_digest
from synth_agent.digests import Digests
from synth_agent.errors import EXIT_FAILED, EXIT_OK, Busy, InvalidInput
from synth_agent.pictures import hash_file
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.program import raise_if_stopped, run_program, use_threads
from synth_agent.stages.progress import StageProgress
from synth_agent.statistics import (
    OWN_SOURCES,
    ColumnSpec,
    ColumnWriter,
    SampleRow,
    column_spec,
    write_samples,
)
from synth_agent.workspace import open_workspace

STATS_FIELD = "__dj__stats__"
SECONDS_A_PART = 10.0
SAMPLES_A_PART = 50_000
_BLAMED_ON_OPERATOR = 16
"""So many failures in a row before any success are the operator's fault, not the samples'."""


@dataclass(frozen=True)
class ColumnReport:
    """What was done for one operator."""

    operator: str
    key: str
    scored: int
    """Distinct samples that got a score in this run."""
    known: int
    """Distinct samples that had one, or an error, before."""
    errors: int
    """Distinct samples that could not be scored, in this run."""
    seconds: float
    problem: str = ""
    """Why the operator could not be used at all."""
    is_absent: bool = False
    """Whether the problem is a package or a file that is not on this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and return its exit code."""
    arguments = _parser().parse_args(argv)
    use_threads(arguments.threads)

    def work(progress: StageProgress) -> int:
        with _only_one(arguments.statistics):
            reports = analyze(arguments, progress)
        failed = any(report.problem and not report.is_absent for report in reports)
        return EXIT_FAILED if failed else EXIT_OK

    return run_program("Analysis failed", arguments.progress, work)


def analyze(arguments: argparse.Namespace, progress: StageProgress) -> list[ColumnReport]:
    """Bring every wanted column up to date with the seed set and write the report.

    Raises:
        InvalidInput: the seed set, a picture's path or the list of operators is bad.
    """
    workspace = open_workspace(Path.cwd())
    digests = Digests(workspace)
    wanted = json.loads(arguments.operators.read_text("utf-8"))
    samples = read_samples(arguments.seed, unique_ids=True)
    rows = list(_sample_rows(samples, arguments.images, digests, progress))
    digests.save()
    data_key = hashlib.sha256("\n".join(row.sample for row in rows).encode()).hexdigest()[:24]
    write_samples(arguments.statistics, data_key, rows)
    remember_data_key(arguments.statistics, digests.path(arguments.seed), data_key)
    reports: list[ColumnReport] = []
    sizes = _PictureSizes()
    for position, (name, parameters) in enumerate(wanted, 1):
        spec = column_spec(name, parameters, lambda path: digests.path(workspace.path(path)))
        if spec is None:
            raise InvalidInput(
                "Nothing to score", f"{name}: text and pictures do not decide its scores", ""
            )
        column = _Column(spec, parameters, arguments, f"{position}/{len(wanted)} {name}", sizes)
        reports.append(column.fill(rows, samples, progress))
        _write_report(arguments.report, data_key, len(rows), reports)
    digests.save()
    return reports


class _Column:
    """One operator at work on the samples that have no score yet."""

    def __init__(
        self,
        spec: ColumnSpec,
        parameters: Mapping[str, Any],
        arguments: argparse.Namespace,
        label: str,
        sizes: _PictureSizes,
    ) -> None:
        self._sizes = sizes
        self._spec = spec
        self._parameters = dict(parameters)
        self._images = Path(os.path.abspath(arguments.images))  # noqa: PTH100  links are kept
        self._label = label
        self._retries = bool(arguments.retry_failed)
        self._writer = ColumnWriter(arguments.statistics, spec)
        self._has_scores = False
        self._operator: Any = None

    def fill(
        self, rows: Sequence[SampleRow], samples: Sequence[Sample], progress: StageProgress
    ) -> ColumnReport:
        """Score what is missing and return what was done."""
        started = time.monotonic()
        known = self._writer.known(with_errors=not self._retries)
        self._has_scores = bool(known)
        missing = {row.sample: i for i, row in enumerate(rows) if row.sample not in known}
        todo = list(missing.items())
        errors, problem, is_absent, done = 0, "", False, 0

        def report() -> None:
            progress.update(step=done, total=len(todo), unit="samples", label=self._label)

        report()
        try:
            for part in self._parts(todo, samples):
                errors += self._keep(part)
                done += len(part)
                report()
        except _Unusable as error:
            problem, is_absent = str(error), error.is_absent
        return ColumnReport(
            self._spec.operator,
            self._spec.key,
            done - errors,
            len({row.sample for row in rows}) - len(todo),
            errors,
            round(time.monotonic() - started, 3),
            problem,
            is_absent,
        )

    def _keep(self, part: Sequence[tuple[str, Mapping[str, Any] | str]]) -> int:
        """Write a part and return how many of it are errors."""
        failed = [isinstance(result, str) for _, result in part]
        values = {
            stat: [None if isinstance(r, str) else _plain(r[stat]) for _, r in part]
            for stat in self._spec.stats
        }
        reasons = [result if isinstance(result, str) else None for _, result in part]
        self._writer.append([sample for sample, _ in part], values, reasons)
        return sum(failed)

    def _parts(
        self, todo: Sequence[tuple[str, int]], samples: Sequence[Sample]
    ) -> Iterator[list[tuple[str, Mapping[str, Any] | str]]]:
        """Yield scored samples, as many as a few seconds give.

        Raises:
            _Unusable: the operator cannot be made, or fails on all of the first samples.
        """
        if not todo:
            return
        self._operator = self._make()
        size = self._operator.batch_size if self._operator.is_batched_op() else 1
        part: list[tuple[str, Mapping[str, Any] | str]] = []
        since = time.monotonic()
        # What failed before may fail again without the operator being at fault.
        succeeded = self._retries and self._has_scores
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            results = self._score([samples[i] for _, i in batch])
            succeeded = succeeded or any(not isinstance(result, str) for result in results)
            part += [(sample, result) for (sample, _), result in zip(batch, results, strict=True)]
            if not succeeded and (len(part) >= _BLAMED_ON_OPERATOR or len(part) == len(todo)):
                raise _Unusable(str(part[0][1]))
            is_late = time.monotonic() - since > SECONDS_A_PART
            if succeeded and (is_late or len(part) >= SAMPLES_A_PART):
                yield part
                part, since = [], time.monotonic()
        if part:
            yield part

    def _make(self) -> Any:
        if self._spec.operator in OWN_SOURCES:
            return _PictureHashes()
        from data_juicer.ops import load_ops

        from synth_agent.stages.operators import stand_in

        try:
            [operator] = load_ops([{self._spec.operator: self._parameters}])
            return self._sizes.watch(stand_in(operator))
        except Exception as error:
            raise_if_stopped()
            is_absent = isinstance(error, ImportError | FileNotFoundError)
            raise _Unusable(_reason(error), is_absent=is_absent) from error

    def _score(self, samples: Sequence[Sample]) -> list[Mapping[str, Any] | str]:
        """Return each sample's statistics, or why it has none."""
        try:
            return self._score_together(samples)
        except Exception as error:  # noqa: BLE001  whatever it is, it is kept as the reason
            raise_if_stopped()
            if len(samples) == 1:
                return [_reason(error)]
        return [result for sample in samples for result in self._score([sample])]

    def _score_together(self, samples: Sequence[Sample]) -> list[Mapping[str, Any] | str]:
        images = [[f"{self._images}/{image}" for image in sample.images] for sample in samples]
        batch: dict[str, list[Any]] = {
            "text": [sample.text for sample in samples],
            "images": images,
            STATS_FIELD: [{} for _ in samples],
        }
        made = self._operator.compute_stats(batch)[STATS_FIELD]
        return [_checked(stats, self._spec.stats) for stats in made]


class _PictureSizes:
    """Widths and heights that one filter measured, for another that needs no more than them.

    Decoding pictures is most of the work of the cheap statistics, and is done once for both.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def watch(self, operator: Any) -> Any:
        """Return the operator, made to remember sizes or to use those that are remembered."""
        if operator._name not in ("image_shape_filter", "image_aspect_ratio_filter"):
            return operator
        measure = operator.compute_stats
        is_shape = operator._name == "image_shape_filter"

        def measured(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            if not is_shape:
                self._fill_ratios(batch)
            made: dict[str, list[Any]] = measure(batch)
            if is_shape:
                for images, stats in zip(batch["images"], made[STATS_FIELD], strict=True):
                    sizes = zip(stats["image_width"], stats["image_height"], strict=True)
                    self._known.update(zip(images, sizes, strict=True))
            return made

        operator.compute_stats = measured
        return operator

    def _fill_ratios(self, batch: dict[str, list[Any]]) -> None:
        for images, stats in zip(batch["images"], batch[STATS_FIELD], strict=True):
            sizes = [self._known.get(image) for image in images]
            if images and all(sizes):
                stats["aspect_ratios"] = [size[0] / size[1] for size in sizes if size]


class _PictureHashes:
    """What pictures are known by, asked for as a filter of Data-Juicer is."""

    def is_batched_op(self) -> bool:
        return False

    def compute_stats(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Fill in the statistics of every sample of the batch; raises for a picture as Pillow does."""
        for images, stats in zip(batch["images"], batch[STATS_FIELD], strict=True):
            hashes = [hash_file(Path(image)) for image in images]
            stats["image_digest"] = " ".join(made.digest for made in hashes)
            stats["image_dhash"] = " ".join(f"{made.dhash:016x}" for made in hashes)
        return batch


class _Unusable(Exception):
    """The operator cannot be used; the message is the reason."""

    def __init__(self, reason: str, *, is_absent: bool = False) -> None:
        super().__init__(reason)
        self.is_absent = is_absent


def _sample_rows(
    samples: Sequence[Sample], images: Path, digests: Digests, progress: StageProgress
) -> Iterator[SampleRow]:
    """Yield every sample with the digest of its text and its pictures' contents."""
    for done, sample in enumerate(samples, 1):
        paths = [images / image for image in sample.images]
        # A picture that is not there is an error of the operators that read it, not of others.
        contents = [digests.path(path) if path.is_file() else "missing" for path in paths]
        progress.update(step=done, total=len(samples), unit="samples", label="reading the seed set")
        yield SampleRow(
            str(sample.id), sample_digest(sample.text, contents), sample.text, sample.images
        )


def _checked(stats: Mapping[str, Any], wanted: Sequence[str]) -> Mapping[str, Any] | str:
    for key in wanted:
        if key not in stats:
            return f"the operator gave no {key}"
        value = stats[key]
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(number, float) and number != number for number in values):
            return f"{key} is not a number"
    return stats


def _plain(value: Any) -> Any:
    """Return a score as plain numbers, text or a list of numbers."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [float(number) for number in value]
    return float(value)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _write_report(
    path: Path | None, data_key: str, num_samples: int, reports: Sequence[ColumnReport]
) -> None:
    if path is None:
        return
    with atomic_file(path) as file:
        columns = [asdict(report) for report in reports]
        json.dump(
            {"data_key": data_key, "num_samples": num_samples, "columns": columns}, file, indent=1
        )
        file.write("\n")


@contextmanager
def _only_one(statistics: Path) -> Iterator[None]:
    """Hold the table's lock; a column has one writer.

    Raises:
        Busy: another analysis is at work.
    """
    statistics.mkdir(parents=True, exist_ok=True)
    with (statistics / "analysis.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                "An analysis is at work", f"{lock.name} is held", "wait for it to end"
            ) from None
        guard()
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m synth_agent.stages.analyze", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=Path, required=True, help="seed set, JSONL or Parquet")
    parser.add_argument("--images", type=Path, required=True, help="folder of the seed's pictures")
    parser.add_argument(
        "--operators", type=Path, required=True, help="JSON list of [operator, parameters]"
    )
    parser.add_argument("--statistics", type=Path, required=True, help="folder of the table")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the models")
    parser.add_argument(
        "--retry-failed", action="store_true", help="score what could not be scored once more"
    )
    parser.add_argument("--report", type=Path, help="JSON file for what was done")
    parser.add_argument("--progress", type=Path, help="file for progress lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
