"""Pictures as files: whether one can be read, what it holds, and what it looks like.

Owns the 64-bit difference hash and the search for near hashes. Needs Pillow and numpy only.

Source: the difference hash is Neal Krawetz's dHash ("Kind of Like That", 2013): grey levels of
9 x 8 cells, and a bit for each cell that is darker than its right neighbour.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_BITS = 64
MIN_SET_BITS = 6
"""A hash with fewer bits set, or clear, is of a picture too flat to be told from other flat ones."""
DIGEST_LENGTH = 32
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, MemoryError),
    Image.DecompressionBombError,
)
"""What Pillow raises for pictures that it cannot or will not decode."""
_CELLS = (9, 8)
_DRAFT = (144, 128)
_WORKERS = min(8, os.cpu_count() or 1)
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class PictureHash:
    """What a picture is known by."""

    digest: str
    """First half of the sha256 of its bytes, in hex."""
    dhash: int

    @property
    def is_flat(self) -> bool:
        """Whether the picture has too little structure to be compared by its looks."""
        return not MIN_SET_BITS <= self.dhash.bit_count() <= HASH_BITS - MIN_SET_BITS


def hash_bytes(content: bytes) -> PictureHash:
    """Return the hashes of a picture's bytes.

    Raises:
        One of `UNREADABLE`: It cannot be decoded.
    """
    digest = hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]
    with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
        warnings.simplefilter("ignore")
        # JPEG data is scaled while it is decoded; more than the cells need is kept.
        image.draft("L", _DRAFT)
        grey = image.convert("L").resize(_CELLS, Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)  # (8, 9)
    bits = levels[:, 1:] > levels[:, :-1]  # (8, 8)
    return PictureHash(digest, int.from_bytes(np.packbits(bits).tobytes(), "big"))


def hash_file(path: Path) -> PictureHash:
    """Return the hashes of a picture file; raises as `hash_bytes` does."""
    return hash_bytes(path.read_bytes())


def hash_files(
    paths: Mapping[str, Path], report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, PictureHash]:
    """Return the hashes of files by their names; those that cannot be read are left out.

    Args:
        paths: Files by name.
        report: Called with the files done and all files.
    """

    def try_hash(path: Path) -> PictureHash | None:
        try:
            return hash_file(path)
        except UNREADABLE:
            return None

    found: dict[str, PictureHash] = {}
    with ThreadPoolExecutor(_WORKERS) as pool:
        for done, (name, made) in enumerate(
            zip(paths, pool.map(try_hash, paths.values()), strict=True), 1
        ):
            if made is not None:
                found[name] = made
            report(done, len(paths))
    return found


def unreadable(
    paths: Mapping[str, Path], report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Decode every picture and return, for those that cannot be, why, by their names."""
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor(_WORKERS) as pool:
        for done, (name, reason) in enumerate(
            zip(paths, pool.map(why_unreadable, paths.values()), strict=True), 1
        ):
            if reason:
                reasons[name] = reason
            report(done, len(paths))
    return reasons


def why_unreadable(path: Path) -> str:
    """Return why a picture cannot be decoded, or an empty text."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            # A JPEG's data is read to its end at any scale, and an eighth is the fastest.
            image.draft("RGB", (1, 1))
            image.load()
    except FileNotFoundError:
        return "missing"
    except UNREADABLE as error:
        return "empty" if _is_empty(path) else f"unreadable, {type(error).__name__}"
    return ""


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def near_hashes(
    hashes: Sequence[int], references: Iterable[int], most_bits: int
) -> npt.NDArray[np.bool_]:
    """Return (N,) whether each hash differs from some reference in at most `most_bits` bits.

    Two hashes that differ in `d` bits agree in at least one of `d + 1` bands of bits, so only pairs
    that share a band are compared.
    """
    of = np.asarray(hashes, dtype=np.uint64)
    against = np.unique(np.asarray(list(references), dtype=np.uint64))
    near = np.zeros(len(of), dtype=np.bool_)
    if not len(of) or not len(against):
        return near
    edges = np.linspace(0, HASH_BITS, most_bits + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mask = np.uint64((1 << int(high - low)) - 1)
        shift = np.uint64(low)
        bands = (against >> shift) & mask
        order = np.argsort(bands, kind="stable")
        near |= _near_in_band((of >> shift) & mask, of, bands[order], against[order], most_bits)
    return near


def _near_in_band(
    bands: Hashes, hashes: Hashes, sorted_bands: Hashes, references: Hashes, most_bits: int
) -> npt.NDArray[np.bool_]:
    """Compare every hash with the references of its band, one reference of each at a time."""
    near = np.zeros(len(hashes), dtype=np.bool_)
    at = np.searchsorted(sorted_bands, bands, side="left")
    end = np.searchsorted(sorted_bands, bands, side="right")
    open_ones = np.flatnonzero(at < end)
    while len(open_ones):
        differing = np.bitwise_count(hashes[open_ones] ^ references[at[open_ones]])
        hit = differing <= most_bits
        near[open_ones[hit]] = True
        at[open_ones] += 1
        open_ones = open_ones[~hit & (at[open_ones] < end[open_ones])]
    return near
