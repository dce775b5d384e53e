"""Repeated samples of an analysed data set: by text, by a picture's bytes, by a picture's looks.

Data-Juicer's `image_deduplicator` needs the package imagededup. The hashes counted here are our own
(`synth_agent.pictures`), so that duplicates are seen without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from synth_agent.pictures import PictureHash
from synth_agent.statistics import PICTURE_HASHES, Floats, StatisticsTable, column_spec

TEXT_COPIES = "text_copies"
IMAGE_COPIES = "image_copies"
LOOK_COPIES = "image_hash_copies"


@dataclass(frozen=True)
class Duplicates:
    """How often the samples of a data set of N rows are there."""

    copies: dict[str, Floats]
    """(N,) by kind: samples with this text, or with this sample's most frequent picture; NaN where a
    sample has no picture that was hashed. Flat pictures count as alike only when they are equal."""
    repeated: dict[str, int]
    """By kind: texts or pictures beyond the first of each."""


def duplicates(table: StatisticsTable) -> Duplicates:
    """Return the duplicates of a data set; those of pictures only where they were hashed."""
    return table.remember(("duplicates", table.parts_of(PICTURE_HASHES)), lambda: _count_all(table))


def _count_all(table: StatisticsTable) -> Duplicates:
    counted: dict[str, list[Sequence[Hashable]]] = {
        TEXT_COPIES: [(text.strip(),) for text in table.texts()]
    }
    spec = column_spec(PICTURE_HASHES, {}, str)
    if spec is not None and table.has(spec):
        contents, looks = table.values(spec, "image_digest"), table.values(spec, "image_dhash")
        by_content: list[Sequence[Hashable]] = []
        by_look: list[Sequence[Hashable]] = []
        for row in range(table.num_rows):
            known = bool(contents.known[row])
            digests = str(contents.at(row)).split() if known else []
            hashes = str(looks.at(row)).split() if known else []
            by_content.append(digests)
            by_look.append([_look(*pair) for pair in zip(digests, hashes, strict=True)])
        counted |= {IMAGE_COPIES: by_content, LOOK_COPIES: by_look}
    made = {kind: _copies(keys) for kind, keys in counted.items()}
    return Duplicates(
        {kind: copies for kind, (copies, _) in made.items()},
        {kind: repeated for kind, (_, repeated) in made.items()},
    )


def _look(content: str, dhash: str) -> Hashable:
    return content if PictureHash(content, int(dhash, 16)).is_flat else dhash


def _copies(keys: Sequence[Sequence[Hashable]]) -> tuple[Floats, int]:
    counts = Counter(key for row in keys for key in set(row))
    copies = np.array([max((counts[key] for key in row), default=np.nan) for row in keys], float)
    return copies, sum(counts.values()) - len(counts)
