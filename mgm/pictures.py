"""Pictures of an evaluation: decoded ahead by threads, and turned into rows of the language model.

Pillow decodes, squares and resizes, in all settings alike: it releases the interpreter while it
does, so a few threads are faster than one GPU answers. Pixels travel as bytes and are normalised on
the model's device.

Shape legend: I pictures, N image tokens of one picture, E language width, S side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from mgm.config import ModelConfig
from mgm.data import UNREADABLE, normalised, square_pixels
from mgm.errors import InputError
from mgm.features import Towers
from mgm.model import MGM
from mgm.read_ahead import ReadAhead
from mgm.vision import low_resolution_views

MOST_WORKERS = 16


def default_workers() -> int:
    """Return one thread for each core that this process may use, sixteen at most."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


class DecodedPictures(ReadAhead[str, Tensor]):
    """Pictures (3, S, S) as bytes, decoded ahead by threads.

    Args:
        open_picture: Opens the picture of a key.
        config: Gives size and mean colour.
        workers: Threads; 0 decodes when asked.
    """

    def __init__(
        self, open_picture: Callable[[str], Image.Image], config: ModelConfig, workers: int
    ) -> None:
        super().__init__(self._decode, workers)
        self._open = open_picture
        self._config = config

    def _decode(self, key: str) -> Tensor:
        # In evaluation pictures are always padded, whatever the stage was trained with.
        size, mean = self._config.image_size_aux, self._config.image_mean
        picture = self._open(key)
        try:
            return square_pixels(picture, size, "pad", mean)
        except UNREADABLE as error:
            reason = str(error) or "out of memory"
            raise InputError(
                "Unreadable picture",
                f"{key}, {picture.width} x {picture.height} pixels: {reason}",
                "Fetch the picture again.",
            ) from error


class PictureEncoder:
    """Turns pixels into rows of the language model.

    Args:
        model: In evaluation mode and on its device.
        towers: Run its towers; None runs them as they are.
        at_once: Pictures encoded together; halved where they do not fit into the memory.
    """

    def __init__(self, model: MGM, towers: Towers | None, *, at_once: int) -> None:
        self._model = model
        self._towers = towers or model.towers
        self.at_once = at_once

    def encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows (N, E) of each picture (3, S, S), bytes or normalised.

        Raises:
            InputError: one picture alone does not fit into the memory.
        """
        rows: list[Tensor] = []
        while len(rows) < len(pixels):
            piece = pixels[len(rows) : len(rows) + self.at_once]
            done = self._try(piece)
            if done is None:
                self._halve()
            else:
                rows.extend(done)
        return rows

    def _try(self, pixels: Sequence[Tensor]) -> list[Tensor] | None:
        try:
            return list(self._encode(self._sent(pixels)))
        except torch.OutOfMemoryError:
            return None

    def _halve(self) -> None:
        # Outside the handler, whose traceback would keep the pictures' tensors alive.
        if self.at_once == 1:
            raise InputError(
                "Out of memory",
                "one picture alone does not fit into the accelerator's memory",
                "Use a lower precision (--dtype bfloat16) or a larger accelerator.",
            )
        self.at_once //= 2
        torch.cuda.empty_cache()

    def _sent(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return pictures (I, 3, S, S) on the model's device, normalised, in float32."""
        device = self._model.device
        shape = (len(pixels), *pixels[0].shape)
        # From pinned memory the copy does not wait for what the device is doing.
        staged = torch.empty(shape, dtype=pixels[0].dtype, pin_memory=device.type == "cuda")
        torch.stack(list(pixels), out=staged)
        sent = staged.to(device, non_blocking=True)
        if sent.dtype != torch.uint8:
            return sent
        return normalised(sent, self._model.config.image_mean, self._model.config.image_std)

    def _encode(self, pixels: Tensor) -> Tensor:
        model, dtype = self._model, self._model.dtype
        # Views are made before the precision is lowered.
        views = low_resolution_views(pixels, model.config)
        features = self._towers(views.to(dtype), pixels.to(dtype))
        return model.project(features)  # (I, N, E)
