"""Samples laid end to end: which go together, and the tensors of one packed row.

The objective stays that of padded micro-batches: a label's weight is one over the labels of its
micro-batch and over the micro-batches of the step, wherever the sample is packed. So packing decides
about speed and memory, not about the result.

Shape legend: T positions of a row, P positions taken by pictures, R positions that predict a label,
N tokens of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgm.model import IGNORE_INDEX, IMAGE_TOKEN_ID
from mgm.packed import Segments, padded_length
from mgm.prompt import Encoded


@dataclass(frozen=True)
class Sample:
    """One record on its way into a packed row."""

    index: int
    """Of the record in its data set."""
    encoded: Encoded
    pictures: tuple[int, ...]
    """Positions of its pictures in the data set, one for each image token."""
    length: int
    """Positions that it takes, pictures included, after cutting."""
    num_labels: int
    """Labels left after cutting."""
    weight: float = 0.0
    """Of each of its labels in the loss of the step."""


@dataclass(frozen=True)
class PackedRow:
    """Several samples as one row."""

    ids: Tensor
    """(T,), zero where a picture's rows go and in the tail."""
    segments: Segments
    image_places: Tensor
    """(P,): where the pictures' rows go."""
    image_rows: Tensor | None
    """(P,): which rows of all pictures' (pictures * N) go there; None for all, in order."""
    label_places: Tensor
    """(R,): positions whose hidden state predicts a label."""
    targets: Tensor
    """(R,): the labels."""
    weights: Tensor
    """(R,), float32."""
    pictures: tuple[int, ...]
    indices: tuple[int, ...]
    """Records of the row, in order."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PackedRow:
        """Return the row with every tensor changed: pinned, or on another device."""
        return replace(
            self,
            ids=change(self.ids),
            segments=replace(
                self.segments,
                bounds=change(self.segments.bounds),
                positions=change(self.segments.positions),
            ),
            image_places=change(self.image_places),
            image_rows=None if self.image_rows is None else change(self.image_rows),
            label_places=change(self.label_places),
            targets=change(self.targets),
            weights=change(self.weights),
        )


def make_sample(
    index: int,
    encoded: Encoded,
    picture: int | None,
    *,
    tokens_of_picture: int,
    limit: int | None,
    pad_id: int,
) -> Sample:
    """Return a record as it will be packed, cut to `limit` positions.

    A padding token that somebody wrote into a text is left out, as the mask of padded rows does.
    """
    if pad_id in encoded.input_ids:
        pairs = zip(encoded.input_ids, encoded.labels, strict=True)
        kept = [(token, label) for token, label in pairs if token != pad_id]
        encoded = Encoded([token for token, _ in kept], [label for _, label in kept])
    count = encoded.input_ids.count(IMAGE_TOKEN_ID)
    length = len(encoded.input_ids) + count * (tokens_of_picture - 1)
    cut = length if limit is None else min(length, limit)
    labels = sum(place < cut for place, _ in _label_places(encoded, tokens_of_picture))
    pictures = () if picture is None else (picture,) * count
    return Sample(index, encoded, pictures, cut, labels)


def pack(samples: Sequence[Sample], budget: int, rows: int = 1) -> list[list[Sample]]:
    """Spread samples over as few rows of at most `budget` positions as fit, evenly.

    Args:
        samples: In any order. One longer than the budget gets a row of its own.
        budget: Positions of a row.
        rows: The number of rows is a multiple of this, as long as there are samples enough.

    Returns:
        Rows of samples; each sample exactly once, no row empty.
    """
    total = sum(sample.length for sample in samples)
    count = max(1, -(-total // budget))
    longest_first = sorted(samples, key=lambda sample: (-sample.length, sample.index))
    while True:
        count = min(-(-count // rows) * rows, len(samples))
        found = _spread(longest_first, count)
        over = any(len(row) > 1 and sum(s.length for s in row) > budget for row in found)
        if not over or count == len(samples):
            return found
        count += 1


def _spread(longest_first: Sequence[Sample], count: int) -> list[list[Sample]]:
    rows: list[list[Sample]] = [[] for _ in range(count)]
    filled = [0] * count
    for sample in longest_first:
        lightest = min(range(count), key=filled.__getitem__)
        rows[lightest].append(sample)
        filled[lightest] += sample.length
    return rows


def packed_row(samples: Sequence[Sample], tokens_of_picture: int) -> PackedRow:
    """Lay samples end to end, with a tail up to an even length."""
    ids: list[int] = []
    image_places: list[Tensor] = []
    image_rows: list[Tensor] = []
    labels: list[tuple[int, int, float]] = []
    pictures: list[int] = []
    is_cut = False
    for sample in samples:
        start, place = len(ids), 0
        for token in sample.encoded.input_ids:
            if token == IMAGE_TOKEN_ID:
                taken = max(0, min(tokens_of_picture, sample.length - place))
                image_places.append(start + place + torch.arange(taken))
                image_rows.append(len(image_rows) * tokens_of_picture + torch.arange(taken))
                is_cut |= taken < tokens_of_picture
            place += tokens_of_picture if token == IMAGE_TOKEN_ID else 1
        ids += _spliced(sample.encoded.input_ids, tokens_of_picture)[: sample.length]
        pictures += sample.pictures
        labels += [
            (start + place - 1, label, sample.weight)
            for place, label in _label_places(sample.encoded, tokens_of_picture)
            if place < sample.length
        ]
    lengths = [sample.length for sample in samples]
    tail = padded_length(len(ids)) - len(ids)
    if tail:
        ids += [0] * tail
        lengths.append(tail)
    places, targets, weights = zip(*labels, strict=True) if labels else ((), (), ())
    none = torch.zeros(0, dtype=torch.long)
    return PackedRow(
        torch.tensor(ids),
        Segments.of(lengths),
        torch.cat(image_places) if image_places else none,
        torch.cat(image_rows) if is_cut else None,
        torch.tensor(places, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(weights, dtype=torch.float32),
        tuple(pictures),
        tuple(sample.index for sample in samples),
    )


def _spliced(ids: Sequence[int], tokens_of_picture: int) -> list[int]:
    """Return the ids with each image token replaced by as many zeros as a picture has rows."""
    spliced: list[int] = []
    for token in ids:
        spliced += [0] * tokens_of_picture if token == IMAGE_TOKEN_ID else [token]
    return spliced


def _label_places(encoded: Encoded, tokens_of_picture: int) -> list[tuple[int, int]]:
    """Return (position after splicing, label) of every label that a position before it predicts."""
    found, place = [], 0
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != IGNORE_INDEX and place:
            found.append((place, label))
        place += tokens_of_picture if token == IMAGE_TOKEN_ID else 1
    return found
