"""The values of one stat for every row of a data set, as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from synth_agent.statistics.columns import Kind

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Values:
    """One stat of every row of a data set of N rows."""

    stat: str
    flat: Floats
    """(N,) numbers, or (V,) all the lists' numbers. Of strings, positions in `words`."""
    offsets: Integers | None
    """(N + 1,) where each row's list starts in `flat`; None when a row has one number."""
    known: Mask
    """(N,) False where the stat was not computed, failed or is not a number."""
    errors: Mapping[int, str]
    """Why rows failed."""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Guard the arrays: whoever asks next gets the same ones."""
        for array in (self.flat, self.offsets, self.known):
            if array is not None:
                array.setflags(write=False)

    def at(self, row: int) -> tuple[float, ...] | str:
        """Return the value of a row that has one: its numbers, or its string."""
        if self.words:
            return self.words[int(self.flat[row])]
        if self.offsets is None:
            return (float(self.flat[row]),)
        start, end = self.offsets[row], self.offsets[row + 1]
        return tuple(float(number) for number in self.flat[start:end])

    def per_row(self) -> Floats:
        """Return (N,) numbers: a list's mean, NaN for an empty list and where nothing is known."""
        if self.offsets is None:
            return np.where(self.known, self.flat, np.nan)
        lengths = np.diff(self.offsets)
        filled = lengths > 0
        means = np.full(len(lengths), np.nan)
        if filled.any():
            # reduceat is wrong for empty lists only, and between those that are not lies nothing.
            sums = np.add.reduceat(self.flat, self.offsets[:-1][filled])
            means[filled] = sums / lengths[filled]
        means[~self.known] = np.nan
        return means

    def numbers(self, mask: Mask | None = None) -> Floats:
        """Return all known numbers of the rows in `mask`, of every row without one."""
        rows = self.known if mask is None else self.known & mask
        if self.offsets is None:
            return self.flat[rows]
        return self.flat[np.repeat(rows, np.diff(self.offsets))]


def from_arrow(stat: str, kind: Kind, stored: Any, error: Any) -> Values:
    """Return arrow values, aligned with the rows of a data set, as numpy arrays."""
    messages = {
        int(row): str(error[int(row)])
        for row in np.flatnonzero(error.is_valid().to_numpy(zero_copy_only=False))
    }
    known = stored.is_valid().to_numpy(zero_copy_only=False).copy()
    known[list(messages)] = False
    if kind == "string":
        words = stored.dictionary_encode()
        flat = words.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.float64)
        return Values(stat, flat, None, known, messages, tuple(words.dictionary.to_pylist()))
    if kind == "number":
        flat = _to_floats(stored)
        return Values(stat, flat, None, known & ~np.isnan(flat), messages)
    lengths = pc.list_value_length(stored).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    flat = _to_floats(stored.flatten())
    bad = np.concatenate(([0], np.cumsum(np.isnan(flat), dtype=np.int64)))
    known &= bad[offsets[1:]] == bad[offsets[:-1]]
    return Values(stat, flat, offsets, known, messages)


def to_arrow(values: Values, kind: Kind) -> Any:
    """Return values as an arrow array with nulls where nothing is known."""
    unknown = pa.array(~values.known)
    if kind == "string":
        words = [values.words[int(i)] if i >= 0 else None for i in values.flat]
        return pa.array(words, pa.string(), mask=~values.known)
    if values.offsets is None:
        return pa.array(values.flat, mask=~values.known)
    offsets = pa.array(values.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.flat), mask=unknown)


def _to_floats(array: Any) -> Floats:
    return np.asarray(array.fill_null(np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)
