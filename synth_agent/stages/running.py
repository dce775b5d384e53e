"""Running one Data-Juicer operator with its progress counted and its failures named.

The operators are Data-Juicer's own, some of them computed many samples at a time. Their methods are
wrapped so that rows are counted as they are worked on, a failing row is found, and a score that is
not a number stops the run in place of dropping its sample silently.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from synth_agent.data import ROW_ID_FIELD, Sample
from synth_agent.errors import SynthAgentError
from synth_agent.stages import endpoint_operators  # noqa: F401  registers them
from synth_agent.stages.diffusion import with_bounded_draws
from synth_agent.stages.operators import stand_in
from synth_agent.stages.program import raise_if_stopped

STATS_FIELD = "__dj__stats__"
WORKING_METHODS = {"Mapper": "process", "Filter": "compute_stats", "Deduplicator": "compute_hash"}
SHRINKING = ("Filter", "Deduplicator", "Selector", "Grouper", "Aggregator")
_NAMED = 5

Report = Callable[[int, int], None]


class OperatorFailed(SynthAgentError):
    """An operator raised, or lost samples that it may not lose."""


def run_operator(operator: Any, dataset: Any, seed: Sequence[Sample], report: Report) -> Any:
    """Run an operator on a dataset that carries row ids.

    Args:
        operator: A Data-Juicer operator.
        dataset: Its input, a `NestedDataset` with the row id field.
        seed: The seed samples; a row id is a position in this list.
        report: Called with rows done and rows in all.

    Returns:
        The dataset that is left.

    Raises:
        OperatorFailed: naming the operator and, where one is to blame, the sample.
    """
    name, total = operator._name, len(dataset)
    if not operator.num_proc:
        operator = with_bounded_draws(stand_in(operator))
    watched = _Watched(operator, dataset, seed, report)
    report(0, total)
    try:
        with watched:
            result = operator.run(dataset)
    except SynthAgentError:
        raise
    except Exception as error:
        raise_if_stopped()
        reason = str(error).strip().splitlines() or [""]
        raise OperatorFailed(
            "Operator failed",
            f"{name}{watched.blamed()}: {type(error).__name__}: {reason[0]}",
            _fix(error),
        ) from error
    report(total, total)
    if not _has_kind(operator, SHRINKING):
        _check_nothing_lost(name, dataset, result, seed)
    return result


def _fix(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install the package, or leave the operator out"
    return "the stage's log has the whole traceback"


class _Watched:
    """Wraps the method of an operator that does its work, and puts it back."""

    def __init__(self, operator: Any, dataset: Any, seed: Sequence[Sample], report: Report) -> None:
        self._operator = operator
        self._dataset = dataset
        self._seed = seed
        self._total = len(dataset)
        self._report = report
        self._done = 0
        self._failed: list[int] = []
        self._method = next(
            (method for kind, method in WORKING_METHODS.items() if _has_kind(operator, (kind,))),
            None,
        )

    def __enter__(self) -> None:
        # Worker processes would each count from zero.
        if self._method is None or self._operator.num_proc:
            return
        work = getattr(self._operator, self._method)

        @functools.wraps(work)
        def watched(rows: Any, *arguments: Any, **options: Any) -> Any:
            ids = list(rows[ROW_ID_FIELD])
            try:
                made = work(rows, *arguments, **options)
            except Exception:
                raise_if_stopped()
                self._failed = self._culprits(work, ids)
                raise
            if self._method == "compute_stats":
                self._check_scores(ids, made[STATS_FIELD])
            self._done += len(ids)
            self._report(self._done, self._total)
            return made

        setattr(self._operator, self._method, watched)
        self._original = work

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_original") and self._method is not None:
            setattr(self._operator, self._method, self._original)

    def blamed(self) -> str:
        """Return the samples that were at work when the operator raised, as text."""
        if not self._failed:
            return ""
        return f" on {describe_rows(self._failed, self._seed)}"

    def _culprits(self, do: Callable[..., Any], ids: Sequence[int]) -> list[int]:
        """Return the rows of a failed batch that are to blame: few, or the operator itself is."""
        if len(ids) == 1:
            return list(ids)
        alone = (row_id for row_id in ids if self._fails_alone(do, row_id))
        found = list(itertools.islice(alone, _NAMED + 1))
        return found if len(found) <= min(_NAMED, len(ids) - 1) else []

    def _fails_alone(self, do: Callable[..., Any], row_id: int) -> bool:
        """Tell whether one row of a failed batch fails by itself."""
        row = self._rows_by_id()[row_id]
        batch: dict[str, list[Any]] = {key: [value] for key, value in row.items()}
        if self._method == "compute_stats":
            batch.setdefault(STATS_FIELD, [{}])
        try:
            do(batch)
        except Exception:  # noqa: BLE001  whatever it is, the caller raises the batch's own error
            raise_if_stopped()
            return True
        return False

    @functools.cache  # noqa: B019  lives as long as one operator's run
    def _rows_by_id(self) -> dict[int, dict[str, Any]]:
        return {row[ROW_ID_FIELD]: row for row in self._dataset.to_list()}

    def _check_scores(self, ids: Sequence[int], stats: Sequence[Mapping[str, Any]]) -> None:
        for row_id, scores in zip(ids, stats, strict=True):
            for key, value in scores.items():
                values = value if isinstance(value, list | tuple) else (value,)
                if any(isinstance(number, float) and math.isnan(number) for number in values):
                    raise OperatorFailed(
                        "Score is not a number",
                        f"{self._operator._name}, sample id {self._seed[row_id].id}: {key} = NaN",
                        "check the model's weights and the sample's picture",
                    )


def describe_rows(rows: Sequence[int], seed: Sequence[Sample]) -> str:
    """Return the ids of rows as text: the first few and how many."""
    named = ", ".join(str(seed[row_id].id) for row_id in rows[:_NAMED])
    rest = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{len(rows)} sample{'s' if len(rows) > 1 else ''} (id {named}{rest})"


def _check_nothing_lost(name: str, before: Any, after: Any, seed: Sequence[Sample]) -> None:
    lost = sorted(set(before[ROW_ID_FIELD]) - set(after[ROW_ID_FIELD]))
    if lost:
        raise OperatorFailed(
            "Samples lost",
            f"{name} changes samples and may not drop any, but lost {describe_rows(lost, seed)}",
            "filter such samples before this operator, or let it keep the original sample",
        )


def _has_kind(operator: Any, kinds: Sequence[str]) -> bool:
    return any(base.__name__ in kinds for base in type(operator).__mro__)
