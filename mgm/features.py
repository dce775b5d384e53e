"""What the frozen towers say about the pictures of a data set.

Either every picture is encoded once and kept, or each pass's pictures are encoded when it is their
turn; then pictures that were announced are decoded meanwhile. Keeping is exact while the towers are
deterministic, so it excludes drop path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mgm.data import AspectRatio, InstructionDataset, normalised
from mgm.errors import InputError
from mgm.model import MGM, TowerFeatures
from mgm.progress import Progress
from mgm.read_ahead import ReadAhead
from mgm.vision import low_resolution_views

ENCODING_BATCH = 32
_GIB = 2**30

Towers = Callable[[Tensor | None, Tensor], TowerFeatures]
"""Normalised pictures (low resolution or None, high resolution) -> features."""


class PictureFeatures:
    """Features of a data set's pictures by position; None stands for the blank picture.

    Args:
        model: Its towers are run.
        dataset: Gives the pictures.
        workers: Threads that decode pictures.
        aspect_ratio: How pictures become square.
        towers: Run them; None runs the model's as they are.
    """

    def __init__(
        self,
        model: MGM,
        dataset: InstructionDataset,
        workers: int,
        aspect_ratio: str,
        towers: Towers | None = None,
    ) -> None:
        self._model = model
        self._towers = towers or model.towers
        self._dataset = dataset
        self._aspect_ratio = aspect_ratio
        self._pictures = ReadAhead(self._load, max(1, workers))
        self._gatherer = ThreadPoolExecutor(1)
        self._expected: dict[tuple[int | None, ...], Future[Tensor]] = {}
        self._cached: TowerFeatures | None = None

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
        parts.append(self._encode([None]).to(device="cpu"))
        self._cached = TowerFeatures.cat(parts)

    def announce(self, pictures: Iterable[int | None]) -> None:
        """Start decoding pictures that will be asked for soon, as many as may wait."""
        if self._cached is None:
            self._pictures.announce(position for position in pictures if position is not None)

    def expect(self, pictures: Sequence[int | None]) -> None:
        """Gather the pictures of the next pass, while the accelerator is at the one before it."""
        if self._cached is None and tuple(pictures) not in self._expected:
            self._expected[tuple(pictures)] = self._gatherer.submit(self._gather, pictures)

    def forget_expected(self) -> None:
        """Let go of pictures that were gathered for passes which will not come."""
        self._expected.clear()

    def of(self, pictures: Sequence[int | None]) -> TowerFeatures:
        """Return the features of a batch's pictures, on the model's device."""
        if self._cached is None:
            return self._encode(pictures)
        blank = len(self._cached) - 1
        rows = [blank if position is None else position for position in pictures]
        return self._cached[rows].to(device=self._model.device)

    def _encode(self, pictures: Sequence[int | None]) -> TowerFeatures:
        self.expect(pictures)
        pixels = self._expected.pop(tuple(pictures)).result()
        config, device = self._model.config, self._model.device
        sent = pixels.to(device, non_blocking=True)
        images = normalised(sent, config.image_mean, config.image_std)
        if None in pictures:
            every = images.new_zeros(len(pictures), *images.shape[1:])  # the blank one is zero
            known = [place for place, position in enumerate(pictures) if position is not None]
            every[known] = images
            images = every
        # Views are made before the precision is lowered, here as in answering.
        views = low_resolution_views(images, config)
        dtype = self._model.tower_dtype
        return self._towers(views.to(dtype), images.to(dtype))

    def _gather(self, pictures: Sequence[int | None]) -> Tensor:
        """Return the pictures that are not blank as bytes (I, 3, S, S), in pinned memory."""
        wanted = [position for position in pictures if position is not None]
        decoded = self._pictures.take_all(wanted)
        size = self._model.config.image_size_aux
        pixels = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
        if self._model.device.type == "cuda":
            pixels = pixels.pin_memory()
        for place, position in enumerate(wanted):
            pixels[place] = decoded[position]
        return pixels

    def _load(self, position: int) -> Tensor:
        config = self._model.config
        ratio: AspectRatio = "pad" if self._aspect_ratio == "pad" else "square"
        return self._dataset.load_pixels(position, config.image_size_aux, ratio, config.image_mean)


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
