"""What the frozen towers say about the pictures of a data set.

Either every picture is encoded once and kept (`cached`), or each batch is encoded when it is needed.
Keeping is exact while the towers are deterministic, so it excludes drop path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mgm.data import InstructionDataset
from mgm.errors import InputError
from mgm.model import MGM, TowerFeatures
from mgm.progress import Progress

ENCODING_BATCH = 32
_GIB = 2**30


class PictureFeatures:
    """Features of a data set's pictures by position; None stands for the blank picture.

    Args:
        model: Its towers are run.
        dataset: Gives the pictures.
        workers: Threads that decode pictures.
        aspect_ratio: How pictures become square.
    """

    def __init__(
        self, model: MGM, dataset: InstructionDataset, workers: int, aspect_ratio: str
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._aspect_ratio = aspect_ratio
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._cached: TowerFeatures | None = None
        self._blank: TowerFeatures | None = None

    def cache(self, progress: Progress) -> None:
        """Encode every picture once.

        Raises:
            InputError: If drop path makes the towers random, or the features exceed memory.
        """
        if self._model.config.has_drop_path and self._model.training:
            raise InputError(
                "Features cannot be cached",
                "drop_path = true makes the high-resolution tower random in training",
                "set drop_path to false, or cache_features to false",
            )
        total = len(self._dataset.pictures)
        parts: list[TowerFeatures] = []
        for start in range(0, total, ENCODING_BATCH):
            positions = list(range(start, min(start + ENCODING_BATCH, total)))
            parts.append(self._encode(positions).to(device="cpu"))
            if start == 0:
                _refuse_if_too_large(parts[0], len(positions), total)
            progress.update(
                step=positions[-1] + 1, total=total, unit="images", label="encoding images"
            )
        self._blank = self._encode([None]).to(device="cpu")
        self._cached = TowerFeatures.cat([*parts, self._blank])

    def of(self, pictures: Sequence[int | None]) -> TowerFeatures:
        """Return the features of a batch's pictures, on the model's device."""
        if self._cached is None:
            return self._encode(pictures)
        blank = len(self._cached) - 1
        rows = [blank if position is None else position for position in pictures]
        return self._cached[rows].to(device=self._model.device)

    def _encode(self, pictures: Sequence[int | None]) -> TowerFeatures:
        size = self._model.config.image_size_aux
        loaded = list(self._pool.map(self._load, pictures))
        images = torch.stack(
            [torch.zeros(3, size, size) if image is None else image for image in loaded]
        )  # (I, 3, S, S)
        return self._model.towers(None, images.to(self._model.device))

    def _load(self, position: int | None) -> Tensor | None:
        if position is None:
            return None
        config = self._model.config
        return self._dataset.load_picture(
            position,
            config.image_size_aux,
            "pad" if self._aspect_ratio == "pad" else "square",
            config.image_mean,
            config.image_std,
        )


def _refuse_if_too_large(part: TowerFeatures, num_pictures: int, total: int) -> None:
    tensors = [part.low, *part.stages]
    needed = total / num_pictures * sum(t.numel() * t.element_size() for t in tensors)
    available = _available_memory()
    if available is not None and needed > 0.6 * available:
        raise InputError(
            "Features do not fit in memory",
            f"{total} pictures need {needed / _GIB:.1f} GiB, {available / _GIB:.1f} GiB are free",
            "set cache_features to false",
        )


def _available_memory() -> int | None:
    """Return the memory in bytes that can be taken without swapping; None where unknown."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            return _kibibytes(lines) * 1024
    except (OSError, LookupError):
        return None


def _kibibytes(lines: Iterator[str]) -> int:
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise LookupError("MemAvailable")
