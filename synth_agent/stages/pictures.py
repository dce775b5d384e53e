"""Opening every picture of a dataset before anything is computed from it.

An operator that meets a broken picture halfway would waste the work before it; Data-Juicer's own
answer is to drop the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from synth_agent.data import Sample
from synth_agent.errors import InvalidInput
from synth_agent.pictures import why_unreadable

_NAMED = 5


def check_pictures(
    samples: Sequence[Sample], root: Path, report: Callable[[int, int], None]
) -> None:
    """Decode every picture.

    Args:
        samples: Samples with pictures relative to `root`.
        root: Image folder.
        report: Called with pictures done and pictures in all.

    Raises:
        InvalidInput: pictures that are missing or cannot be decoded, naming ids and files.
    """
    pictures = list(dict.fromkeys(image for sample in samples for image in sample.images))
    reasons: dict[str, str] = {}
    report(0, len(pictures))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checked = pool.map(lambda image: why_unreadable(root / image), pictures)
        for count, (image, reason) in enumerate(zip(pictures, checked, strict=True), 1):
            if reason:
                reasons[image] = reason
            report(count, len(pictures))
    if reasons:
        raise _unusable(samples, root, reasons)


def _unusable(samples: Sequence[Sample], root: Path, reasons: dict[str, str]) -> InvalidInput:
    bad = [(s.id, image) for s in samples for image in s.images if image in reasons]
    named = [f"id {identity} ({image}: {reasons[image]})" for identity, image in bad[:_NAMED]]
    rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return InvalidInput(
        "Unusable pictures",
        f"{len(bad)} records name pictures under {root} that cannot be read: "
        f"{'; '.join(named)}{rest}",
        "restore the files, or take these records out of the seed set",
    )
