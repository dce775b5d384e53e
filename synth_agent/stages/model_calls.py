"""Pictures and models of the batched operators: decoding ahead of the model, loading, types.

Shared by the filters of `operators.py` and the captions of `captioning.py`. Imports nothing else of
this program, since plain `dj-process` loads it with them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from data_juicer.utils.mm_utils import SpecialTokens, load_image, load_mm_bytes_from_sample
from data_juicer.utils.model_utils import get_model
from PIL import ImageOps

DTYPES = ("float32", "bfloat16")
MOST_THREADS = 16
MOST_THREADS_BESIDE_GPU = 8
"""More of them keep the thread that drives the model waiting."""
CALLS_PER_BATCH_ON_GPU = 8
_PICTURES_PER_TASK = 16
_JPEG_HEADERS = 65_536

Row = dict[str, Any]
_Group = TypeVar("_Group")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Picture:
    """A picture to decode: its bytes where the sample carries them, its file otherwise."""

    path: str
    data: bytes | None
    mirrored: bool = False
    upside_down: bool = False

    def load(self) -> Any:
        """Return the decoded RGB picture."""
        picture = load_image(self.path if self.data is None else self.data)
        if self.mirrored:
            picture = ImageOps.mirror(picture)
        if self.upside_down:
            picture = ImageOps.flip(picture)
        return picture


def check_call_options(
    operator: str, name: str, limit: int, dtype: str, dtypes: Sequence[str] = DTYPES
) -> None:
    """Raise ValueError for a limit below 1 or an unknown type."""
    if limit < 1:
        raise ValueError(f"{operator}: {name} is {limit}, give 1 or more")
    if dtype not in dtypes:
        raise ValueError(f"{operator}: dtype is {dtype!r}, give one of {', '.join(dtypes)}")


def load_model(operator: Any, rank: int | None) -> tuple[Any, Any]:
    """Return the operator's model, in the type that it asks for, and its processor."""
    import torch

    model, processor = get_model(operator.model_key, rank, operator.use_cuda())
    if operator.dtype is not None and dtype_of(model) != getattr(torch, operator.dtype):
        scale = getattr(model, "logit_scale", None)
        exact = None if scale is None else scale.detach().float()
        model.to(getattr(torch, operator.dtype))
        if scale is not None:
            # Rounding this logarithm to bfloat16 would move every score by up to a percent.
            model.logit_scale.data = exact
    return model, processor


def dtype_of(model: Any) -> Any:
    """Return what a model computes in; single numbers of it may be float32 all the same."""
    return next(weight.dtype for weight in model.parameters() if weight.dim() > 1)


def in_inference(work: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """Return what work returns, done without the gradients' bookkeeping."""
    import torch

    with torch.inference_mode():
        return work(*arguments, **options)


def pictures_of(operator: Any, sample: Row, bytes_key: str | None = None) -> list[Picture]:
    """Return a sample's pictures, from their files where no field of bytes is named."""
    paths = sample.get(operator.image_key) or ()
    return [
        Picture(path, load_mm_bytes_from_sample(sample, index, bytes_key))
        for index, path in enumerate(paths)
    ]


def too_few_pictures(operator: Any, sample: Row) -> ValueError:
    """Return the error for a text that names more pictures than its sample has."""
    text = str(sample[operator.text_key])
    return ValueError(
        f"{operator._name}: the text names {text.count(SpecialTokens.image)} images and "
        f"{operator.image_key!r} has {len(sample[operator.image_key])}: {text[:80]!r}"
    )


def pixels_of(processor: Any, pictures: Sequence[Picture]) -> Any:
    """Return the model's input of pictures, (pictures, 3, height, width)."""
    loaded = [picture.load() for picture in pictures]
    process = processor.image_processor
    if getattr(process, "backend", None) == "torchvision":
        loaded = [planes(picture) for picture in loaded]
        process = functools.partial(process, input_data_format="channels_first")
    return process(loaded, return_tensors="pt")["pixel_values"]


def prepares_on_device(model: Any, processor: Any) -> bool:
    """Tell whether pictures can be resized on the GPU that the model is on."""
    backend = getattr(processor.image_processor, "backend", None)
    return bool(model.device.type == "cuda" and backend == "torchvision")


def pixels_on_device(processor: Any, device: Any, pictures: Sequence[Picture]) -> Any:
    """Return the model's input of pictures, (pictures, 3, height, width), resized on the GPU.

    A value differs from the CPU's by a 255th at most, which bfloat16 does not tell apart from its
    own rounding.
    """
    import torch

    # A stream of its own, so that preparation does not wait for the model's work.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream), torch.inference_mode():
        loaded = [_decoded(picture).to(device, non_blocking=True) for picture in pictures]
        made = processor.image_processor(
            loaded, return_tensors="pt", input_data_format="channels_first", device=device
        )
    stream.synchronize()
    return made["pixel_values"]


def _decoded(picture: Picture) -> Any:
    """Return a picture's values, (3, height, width), uint8.

    Plain JPEGs are decoded without the interpreter's lock, for which Pillow's threads wait.
    """
    import torch
    from torchvision.io import decode_jpeg  # type: ignore[import-not-found]

    if picture.data is None:
        data = np.fromfile(picture.path, np.uint8)
    else:
        data = np.frombuffer(picture.data, np.uint8).copy()
    # Which way is up is for Pillow to read, and so are grey pictures and print colours.
    if data[:2].tobytes() == b"\xff\xd8" and b"Exif\0" not in data[:_JPEG_HEADERS].tobytes():
        values = decode_jpeg(torch.from_numpy(data))
        if values.shape[0] == 3:
            turned = [
                axis
                for axis, is_turned in ((2, picture.mirrored), (1, picture.upside_down))
                if is_turned
            ]
            return values.flip(turned) if turned else values
    return torch.from_numpy(planes(picture.load()))


def planes(picture: Any) -> np.ndarray[Any, Any]:
    """Return an RGB picture's values, (3, height, width), uint8.

    `np.asarray(picture)` copies under the interpreter's lock, and threads wait for each other.
    """
    try:
        shared = pyarrow.array(picture).values.to_numpy()
    except (ValueError, TypeError):  # large pictures lie in several blocks; older Pillows
        values = np.asarray(picture)
    else:
        values = shared.reshape(picture.height, picture.width, 4)[..., :3]
    return np.array(values.transpose(2, 0, 1), order="C")


def joined(parts: Sequence[Any], model: Any) -> Any:
    """Return tensors as one, where and in the type that the model computes in."""
    import torch

    moved = [part.to(model.device) for part in parts]
    for part in moved:
        if part.is_cuda:
            # Parts made on another stream may not be overwritten before this one has read them.
            part.record_stream(torch.cuda.current_stream(part.device))
    return torch.cat(moved).to(dtype_of(model))


def prepared(
    groups: Sequence[_Group],
    pictures: Callable[[_Group], Sequence[Picture]],
    prepare: Callable[[Sequence[Picture]], _Result],
    most_threads: int = MOST_THREADS,
) -> Iterator[tuple[_Group, list[_Result]]]:
    """Yield groups with what was made of their pictures, the next group's being made meanwhile."""
    import torch

    threads = min(most_threads, len(os.sched_getaffinity(0)))
    # Each of these threads would otherwise start as many of torch's own.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def start(group: _Group) -> list[Future[_Result]]:
        wanted = pictures(group)
        # A processor's call costs Python a millisecond, whatever it is given.
        size = min(_PICTURES_PER_TASK, -(-len(wanted) // threads))
        parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        return [pool.submit(prepare, part) for part in parts]

    try:
        coming = start(groups[0])
        for number, group in enumerate(groups, 1):
            ready = coming
            coming = start(groups[number]) if number < len(groups) else []
            yield group, [future.result() for future in ready]
    finally:
        pool.shutdown(cancel_futures=True)
        # The setting is also what threads made later start with; this one's own never changed.
        torch.set_num_threads(torch.get_num_threads())
