"""Which data is compared with the evaluation sets: the seed set, what a recipe keeps, a run's data.

The rules of comparing are those of `synth_agent.contamination`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from synth_agent.contamination import (
    Overlap,
    TrainingSample,
    known_hashes,
    known_overlaps,
    overlaps,
    training_hashes,
    unknown_pictures,
)
from synth_agent.data import read_samples
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.evaluation_sets import evaluation_sets
from synth_agent.pictures import PictureHash
from synth_agent.runs import Run
from synth_agent.statistics import Mask, StatisticsTable
from synth_agent.workspace import Workspace

MOST_UNKNOWN_PICTURES = 5_000
"""A run's record waits for no more pictures than these to be hashed."""
Report = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def seed_overlaps(
    workspace: Workspace,
    table: StatisticsTable,
    digests: Digests,
    keep: Mask | None = None,
    report: Report = _silent,
) -> list[Overlap]:
    """Return the overlap of the analysed seed set, or of the rows in `keep` (N,), with each set.

    Raises:
        InvalidInput: An evaluation set cannot be read.
    """
    sets = evaluation_sets(workspace, _evaluation(workspace), digests)
    positions = [i for i in range(table.num_rows) if keep is None or keep[i]]
    rows = table.rows(positions)
    samples = [TrainingSample(row.id, row.text, row.images) for row in rows]
    root = workspace.path(workspace.settings.data.images)
    return overlaps(
        workspace,
        samples,
        _key(row.sample for row in rows),
        sets,
        lambda: training_hashes(samples, root, known_hashes(table), report),
    )


def known_seed_overlaps(
    workspace: Workspace, table: StatisticsTable, digests: Digests
) -> list[Overlap] | None:
    """Return the overlaps of the analysed seed set if they were computed before."""
    try:
        sets = evaluation_sets(workspace, _evaluation(workspace), digests)
    except InvalidInput:
        return None
    key = table.remember(
        "contamination key", lambda: _key(row.sample for row in table.rows(range(table.num_rows)))
    )
    return known_overlaps(workspace, key, sets)


def run_overlaps(
    workspace: Workspace,
    run: Run,
    table: StatisticsTable | None,
    digests: Digests,
    *,
    most_unknown: int | None = None,
    report: Report = _silent,
) -> list[Overlap]:
    """Return the overlap of a run's processed data with each set.

    Args:
        workspace: Where the run is.
        run: Its settings name the evaluation sets.
        table: Statistics of the seed set, whose hashes are used; None without them.
        digests: Remembers what files hold.
        most_unknown: Refuse to hash more pictures than this.
        report: Called with the pictures hashed and all that have to be.

    Raises:
        InvalidInput: The run has no processed data, an evaluation set cannot be read, or too many
            pictures would have to be hashed.
    """
    stage = run.stages["process"]
    file = workspace.root / str(stage.output) / "processed.jsonl" if stage.output else None
    if file is None or not file.is_file():
        raise InvalidInput(
            "No processed data", f"{run.id} has none", "name a run whose first stage succeeded"
        )
    settings: Mapping[str, Any] = run.plan.proposal.settings
    sets = evaluation_sets(workspace, settings["evaluate"], digests)
    samples = [TrainingSample(str(one.id), one.text, one.images) for one in read_samples(file)]

    def images() -> dict[str, PictureHash]:
        known = known_hashes(table)
        missing = len(unknown_pictures(samples, known))
        if most_unknown is not None and missing > most_unknown:
            raise InvalidInput(
                "Pictures were not hashed",
                f"{missing:,} pictures have no hash",
                f"run: synth-agent contamination {run.id}",
            )
        return training_hashes(samples, _root(workspace, settings, file.parent), known, report)

    return overlaps(workspace, samples, f"run-{digests.path(file)}", sets, images)


def _root(workspace: Workspace, settings: Mapping[str, Any], processed: Path) -> Path:
    """Return the folder that the paths of a processed data set are relative to."""
    own = processed / "images"
    # Beside pictures that the recipe made, its links lead to the seed's.
    return own if own.is_dir() else workspace.path(str(settings["data"]["images"]))


def _evaluation(workspace: Workspace) -> dict[str, Any]:
    return workspace.settings.evaluate.model_dump(mode="json")


def _key(samples: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(samples).encode()).hexdigest()[:24]
