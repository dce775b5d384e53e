"""Data-Juicer operators that compute many samples and pictures in one model call.

Data-Juicer's own similarity, matching and aesthetics filters call their model once for every sample
or picture, and its captioning mapper draws from the whole vocabulary. The operators here take the
same parameters, write the same statistics and give the same values within 1e-5 in float32.

This file stands alone, so that any recipe can use it with plain `dj-process`:

    custom_operator_paths: [.../synth_agent/stages/operators.py]
    process:
    - batched_image_text_similarity_filter: {hf_clip: models/clip, pairs_per_call: 64, num_proc: 0}
"""
# Annotations stay objects, not strings: Data-Juicer checks a recipe's values against them.

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from data_juicer.ops.base_op import OPERATORS
from data_juicer.ops.filter.image_aesthetics_filter import ImageAestheticsFilter
from data_juicer.ops.filter.image_text_matching_filter import ImageTextMatchingFilter
from data_juicer.ops.filter.image_text_similarity_filter import ImageTextSimilarityFilter
from data_juicer.ops.mapper.image_captioning_mapper import ImageCaptioningMapper
from data_juicer.utils.constant import Fields, StatsKeys
from data_juicer.utils.mm_utils import (
    SpecialTokens,
    load_image,
    load_mm_bytes_from_sample,
    remove_special_tokens,
)
from data_juicer.utils.model_utils import get_model
from PIL import ImageOps

if "." not in __name__:
    # Data-Juicer loaded this file by its path. Its worker processes on a GPU start afresh, with
    # this process's import path only, and have to find the operators' module by its name.
    sys.path.append(str(Path(__file__).resolve().parent))

DTYPES = ("float32", "bfloat16")
_MOST_THREADS = 16
_MOST_THREADS_BESIDE_GPU = 8
"""More of them keep the thread that drives the model waiting."""
_PICTURES_PER_TASK = 16
_JPEG_HEADERS = 65_536
_CALLS_PER_BATCH_ON_GPU = 8

_Group = TypeVar("_Group")
_Result = TypeVar("_Result")
_Sample = dict[str, Any]


@dataclass(frozen=True)
class _Picture:
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


@dataclass(frozen=True)
class _Unit:
    """Pictures that share one score, and the text that they are scored against."""

    row: int
    text: str
    pictures: tuple[_Picture, ...]


class _BatchedStats:
    """The part that the batched filters share; stands before the stock class in their bases."""

    _batched_op = True
    _name: str
    stat: str
    limit: int
    dtype: str | None
    reduce_mode = "avg"

    def _set_up(self: Any, limit_name: str, limit: int, dtype: str) -> None:
        _check_call_options(self._name, limit_name, limit, dtype)
        self.limit, self.dtype = limit, dtype
        # Several calls' worth, so that pictures are decoded while the GPU computes.
        self.batch_size = limit * (_CALLS_PER_BATCH_ON_GPU if self.use_cuda() else 1)

    def compute_stats_batched(
        self: Any, samples: dict[str, Any], rank: int | None = None, context: bool = False
    ) -> dict[str, Any]:
        """Write the scores of samples into their statistics.

        Args:
            samples: Columns of samples; those that have the score already are left as they are.
            rank: Number of the worker process, which chooses its GPU.
            context: Pictures are shared with other operators, which only the stock way does.

        Raises:
            ValueError: a sample names more pictures in its text than it has.
        """
        stats = samples[Fields.stats]
        rows = [row for row in range(len(stats)) if self.stat not in stats[row]]
        units = [
            unit
            for row in rows
            for unit in self._units({k: v[row] for k, v in samples.items()}, row)
        ]
        if not units:
            for row in rows:
                stats[row][self.stat] = []
            return samples
        model, processor = _load(self, rank)
        if context or (self.dtype is None and str(_dtype(model)) != "torch.float32"):
            # Half precision rounds differently in batches of different sizes.
            stock: Any = super()
            in_stock: Callable[..., dict[str, Any]] = stock.compute_stats_batched
            return _in_inference(in_stock, samples, rank=rank, context=context)
        scores: dict[int, list[float]] = {row: [] for row in rows}
        reduce: Any = {"avg": np.mean, "max": np.max, "min": np.min}[self.reduce_mode]
        groups = list(_grouped(units, self.limit))
        prepare, most_threads = functools.partial(_pixels, processor), _MOST_THREADS
        if self.dtype == "bfloat16" and _prepares_on_device(model, processor):
            prepare = functools.partial(_pixels_on_device, processor, model.device)
            most_threads = _MOST_THREADS_BESIDE_GPU
        for group, parts in _prepared(groups, _unit_pictures, prepare, most_threads):
            pixels = _joined(parts, model)
            values = _in_inference(self._score, model, processor, group, pixels)
            ends = np.cumsum([len(unit.pictures) for unit in group])
            for unit, own in zip(group, np.split(values, ends[:-1]), strict=True):
                scores[unit.row].append(float(reduce(own)))
        for row, own_scores in scores.items():
            stats[row][self.stat] = own_scores
        return samples

    def _units(self: Any, sample: _Sample, row: int) -> Iterator[_Unit]:
        """Yield a unit for every chunk of text that has a picture."""
        pictures = [
            _Picture(picture.path, picture.data, self.horizontal_flip, self.vertical_flip)
            for picture in _pictures(self, sample)
        ]
        offset = 0
        for chunk in sample[self.text_key].split(SpecialTokens.eoc) if pictures else ():
            count = chunk.count(SpecialTokens.image)
            if count == 0:
                continue
            own = pictures[offset : offset + count]
            if not own:
                raise _too_few_pictures(self, sample)
            yield _Unit(row, remove_special_tokens(chunk), tuple(own))
            offset += count

    def _score(
        self: Any, model: Any, processor: Any, units: Sequence[_Unit], pixels: Any
    ) -> np.ndarray[Any, Any]:
        """Return the score of every picture of the units, in their order, float32."""
        raise NotImplementedError


@OPERATORS.register_module("batched_image_text_similarity_filter", force=True)
class BatchedImageTextSimilarityFilter(_BatchedStats, ImageTextSimilarityFilter):  # type: ignore[misc]
    """Filter to keep samples whose CLIP similarity of text and images lies within a range.

    Computes the same `image_text_similarity` as `image_text_similarity_filter`, many samples in one
    model call. An image file is decoded by a pool of threads while the model computes."""

    stat = StatsKeys.image_text_similarity

    def __init__(
        self, *args: Any, pairs_per_call: int = 64, dtype: str = "float32", **kwargs: Any
    ) -> None:
        """
        Initialization method.

        :param args: parameters of image_text_similarity_filter.
        :param pairs_per_call: the most images that the model sees in one call. A chunk of text is
            never divided from its images.
        :param dtype: what the model computes in, 'float32' or 'bfloat16'.
        :param kwargs: parameters of image_text_similarity_filter.
        """
        super().__init__(*args, **kwargs)
        self._set_up("pairs_per_call", pairs_per_call, dtype)

    def _score(
        self, model: Any, processor: Any, units: Sequence[_Unit], pixels: Any
    ) -> np.ndarray[Any, Any]:
        inputs = _tokens(model, processor, [unit.text for unit in units])
        outputs = model(**inputs, pixel_values=pixels)
        logits = _logits_per_text(model, outputs).cpu().numpy() / np.float32(100)
        text_of_picture = np.repeat(np.arange(len(units)), [len(unit.pictures) for unit in units])
        scores: np.ndarray[Any, Any] = logits[text_of_picture, np.arange(len(text_of_picture))]
        return scores


@OPERATORS.register_module("batched_image_text_matching_filter", force=True)
class BatchedImageTextMatchingFilter(_BatchedStats, ImageTextMatchingFilter):  # type: ignore[misc]
    """Filter to keep samples whose BLIP matching score of text and images lies within a range.

    Computes the same `image_text_matching_score` as `image_text_matching_filter`, many pairs in one
    model call. An image file is decoded by a pool of threads while the model computes."""

    stat = StatsKeys.image_text_matching_score

    def __init__(
        self, *args: Any, pairs_per_call: int = 64, dtype: str = "float32", **kwargs: Any
    ) -> None:
        """
        Initialization method.

        :param args: parameters of image_text_matching_filter.
        :param pairs_per_call: the most pairs that the model sees in one call. A chunk of text is
            never divided from its images.
        :param dtype: what the model computes in, 'float32' or 'bfloat16'.
        :param kwargs: parameters of image_text_matching_filter.
        """
        super().__init__(*args, **kwargs)
        self._set_up("pairs_per_call", pairs_per_call, dtype)

    def _score(
        self, model: Any, processor: Any, units: Sequence[_Unit], pixels: Any
    ) -> np.ndarray[Any, Any]:
        _fuse_attention(model)
        texts = [unit.text for unit in units for _ in unit.pictures]
        inputs = _tokens(model, processor, texts)
        outputs = model(**inputs, pixel_values=pixels)
        scores: np.ndarray[Any, Any] = outputs.itm_score.float().cpu().softmax(-1)[:, 1].numpy()
        return scores


@OPERATORS.register_module("batched_image_aesthetics_filter", force=True)
class BatchedImageAestheticsFilter(_BatchedStats, ImageAestheticsFilter):  # type: ignore[misc]
    """Filter to keep samples whose images have aesthetics scores within a range.

    Computes the same `image_aesthetics_scores` as `image_aesthetics_filter`, the images of many
    samples in one model call. An image file is decoded by a pool of threads while the model
    computes."""

    stat = StatsKeys.image_aesthetics_scores

    def __init__(
        self, *args: Any, images_per_call: int = 64, dtype: str = "float32", **kwargs: Any
    ) -> None:
        """
        Initialization method.

        :param args: parameters of image_aesthetics_filter.
        :param images_per_call: the most images that the model sees in one call.
        :param dtype: what the model computes in, 'float32' or 'bfloat16'.
        :param kwargs: parameters of image_aesthetics_filter.
        """
        super().__init__(*args, **kwargs)
        self._set_up("images_per_call", images_per_call, dtype)

    def _units(self, sample: _Sample, row: int) -> Iterator[_Unit]:
        # A file that a sample names twice has one score, as the stock operator gives it.
        for picture in {picture.path: picture for picture in _pictures(self, sample)}.values():
            yield _Unit(row, "", (picture,))

    def _score(
        self, model: Any, processor: Any, units: Sequence[_Unit], pixels: Any
    ) -> np.ndarray[Any, Any]:
        logits = model(pixel_values=pixels).logits.float()
        scores: np.ndarray[Any, Any] = logits.reshape(len(units)).cpu().numpy()
        return scores / np.float32(10) if self.need_normalized_by_ten else scores


@OPERATORS.register_module("batched_image_captioning_mapper", force=True)
class BatchedImageCaptioningMapper(ImageCaptioningMapper):  # type: ignore[misc]
    """Generates image captions with a BLIP-2 model, many images at a time.

    Works like `image_captioning_mapper`, with a seed: the draws for a caption follow from the seed,
    the image, the sample's text and the image's place in it, so that the same seed and input give
    the same caption. The temperature, top_k and top_p of the model folder's generation_config.json
    are honoured, and only the tokens that top_k leaves are drawn from."""

    def __init__(
        self,
        *args: Any,
        images_per_call: int = 64,
        dtype: str = "float32",
        do_sample: bool = True,
        seed: int = 0,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        """
        Initialization method.

        :param args: parameters of image_captioning_mapper.
        :param images_per_call: the most images that the model captions in one call. It takes the
            place of gpu_batch_size.
        :param dtype: what the model computes in, 'float32' or 'bfloat16'.
        :param do_sample: draw the tokens, or take the most probable one each time.
        :param seed: seed of the draws.
        :param max_new_tokens: the most tokens of a caption.
        :param kwargs: parameters of image_captioning_mapper.
        """
        super().__init__(*args, **kwargs)
        _check_call_options(self._name, "images_per_call", images_per_call, dtype)
        if max_new_tokens < 1:
            raise ValueError(f"{self._name}: max_new_tokens is {max_new_tokens}, give 1 or more")
        self.images_per_call = self.gpu_batch_size = images_per_call
        self.dtype = dtype
        self.do_sample, self.seed, self.max_new_tokens = do_sample, seed, max_new_tokens
        # Candidates are alike in distribution, so a random one of them is as good as the only one.
        self.candidates = 1 if self.keep_candidate_mode == "random_any" else self.caption_num
        self.batch_size = images_per_call * (_CALLS_PER_BATCH_ON_GPU if self.use_cuda() else 1)

    def process_batched(self, samples: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Caption the images of samples.

        Args:
            samples: Columns of samples.
            rank: Number of the worker process, which chooses its GPU.

        Returns:
            Columns of the captioned samples, with the originals where they are kept.

        Raises:
            ValueError: a sample names more images in its text than it has, or the model is not a
                BLIP-2 model.
        """
        keys = list(samples)
        rows = [
            dict(zip(keys, values, strict=True)) for values in zip(*samples.values(), strict=True)
        ]
        jobs = [job for number, row in enumerate(rows) for job in self._jobs(row, number)]
        captions = self._caption(jobs, rank) if jobs else []
        made = self._distribute_captions(captions, [job.place for job in jobs], rows)
        return {key: [sample[key] for sample in made] for key in keys}

    def _jobs(self, sample: _Sample, row: int) -> Iterator["_Job"]:
        """Yield the images of a sample that its text names."""
        pictures, offset = _pictures(self, sample), 0
        prompt = sample.get(self.prompt_key) if self.prompt_key else None
        prompt = prompt if isinstance(prompt, str) else self.prompt or None
        text = sample[self.text_key]
        for chunk_number, chunk in enumerate(text.split(SpecialTokens.eoc) if pictures else ()):
            for number in range(chunk.count(SpecialTokens.image)):
                if offset == len(pictures):
                    raise _too_few_pictures(self, sample)
                identity = f"{self.seed}\n{offset}\n{prompt}\n{text}".encode()
                yield _Job((row, chunk_number, number), pictures[offset], prompt, identity)
                offset += 1

    def _caption(self, jobs: Sequence["_Job"], rank: int | None) -> list[list[str]]:
        """Return the candidate captions of every job."""
        model, processor = _load(self, rank)
        if model.config.model_type != "blip-2":
            raise ValueError(
                f"{self._name}: hf_img2seq is a {model.config.model_type} model; give the folder "
                "of a BLIP-2 model, or use image_captioning_mapper"
            )
        if model.config.image_token_index is None:
            name = str(processor.image_token)
            model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids(name)
        prompts = {job.prompt: _prompt_ids(model, processor, job.prompt) for job in jobs}
        lengths = [len(prompts[job.prompt]) for job in jobs]
        groups = list(_equal_lengths(lengths, self.images_per_call))
        captions: list[list[str]] = [[] for _ in jobs]

        def prepare(pictures: Sequence[_Picture]) -> tuple[Any, list[bytes]]:
            pixels = _pixels(processor, pictures)
            return pixels, [_content(picture) for picture in pixels]

        def group_pictures(group: list[int]) -> list[_Picture]:
            return [jobs[index].picture for index in group]

        for group, parts in _prepared(groups, group_pictures, prepare):
            pixels = _joined([part for part, _ in parts], model)
            contents = [content for _, own in parts for content in own]
            own = [jobs[index] for index in group]
            ids = [prompts[job.prompt] for job in own]
            keys = [content + job.identity for content, job in zip(contents, own, strict=True)]
            texts = _in_inference(self._generate, model, processor, ids, pixels, keys)
            for index, candidates in zip(group, texts, strict=True):
                captions[index] = candidates
        return captions

    def _generate(
        self,
        model: Any,
        processor: Any,
        ids: Sequence[Sequence[int]],
        pixels: Any,
        keys: Sequence[bytes],
    ) -> list[list[str]]:
        """Return the candidates for pictures with prompts of one length; draws follow the keys."""
        import torch

        repeats = self.candidates if self.do_sample else 1
        draw = []
        if self.do_sample:
            config = model.generation_config
            uniforms = _uniforms(keys, repeats, self.max_new_tokens)
            draw = [_Draw(uniforms, config.temperature, config.top_k, config.top_p)]
        tokens = torch.tensor(ids, device=model.device).repeat_interleave(repeats, dim=0)
        made = model.generate(
            pixel_values=pixels.repeat_interleave(repeats, dim=0),
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.max_new_tokens,
            # The draw leaves one token, which is then also the most probable.
            do_sample=False,
            logits_processor=draw,
        )
        texts = processor.batch_decode(made, skip_special_tokens=True)
        per_job = [texts[start : start + repeats] for start in range(0, len(texts), repeats)]
        return [own * (self.candidates // repeats) for own in per_job]


@dataclass(frozen=True)
class _Job:
    """An image to caption."""

    place: tuple[int, int, int]
    """Row, chunk of its text, and place in the chunk."""
    picture: _Picture
    prompt: str | None
    identity: bytes
    """What the draws follow from, the image's content apart."""


class _Draw:
    """A logits processor that draws each row's next token and leaves no other.

    `torch.multinomial` draws a random number for every token of the vocabulary; here one number a
    row chooses among the tokens that top_k leaves.
    """

    def __init__(
        self,
        uniforms: Any,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
    ) -> None:
        """Take numbers in [0, 1), (rows, steps), and the settings; None means transformers' own."""
        self._uniforms = uniforms
        self._step = 0
        self._temperature = 1.0 if temperature is None else temperature
        self._top_k = 50 if top_k is None else top_k
        self._top_p = 1.0 if top_p is None else top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores (rows, vocabulary) that are finite for the drawn tokens only."""
        import torch

        if self._step == 0:
            self._uniforms = self._uniforms.to(scores.device)
        size = scores.shape[-1]
        kept, tokens = scores.float().topk(min(self._top_k or size, size), dim=-1)
        share = (kept / self._temperature).softmax(dim=-1)
        below = share.cumsum(dim=-1) - share
        share = share.masked_fill(below >= self._top_p, 0.0) if self._top_p < 1.0 else share
        reached = share.cumsum(dim=-1)
        goal = self._uniforms[:, self._step, None] * reached[:, -1:]
        last = (share > 0).sum(dim=-1, keepdim=True) - 1
        choice = torch.minimum((reached <= goal).sum(dim=-1, keepdim=True), last)
        self._step += 1
        drawn = torch.full_like(scores, float("-inf"))
        return drawn.scatter_(1, tokens.gather(1, choice), 0.0)


def stand_in(operator: Any) -> Any:
    """Return the batched form of a stock filter, and any other operator as it is.

    The batched form keeps the stock name, parameters and values. A model that is not stored in
    float32 is called the stock way, one sample at a time, without the gradients' bookkeeping.
    """
    batched = {
        "image_text_similarity_filter": BatchedImageTextSimilarityFilter,
        "image_text_matching_filter": BatchedImageTextMatchingFilter,
        "image_aesthetics_filter": BatchedImageAestheticsFilter,
    }.get(operator._name)
    if batched is None:
        return operator
    made = batched(*operator._init_args, **operator._init_kwargs)
    made._name = operator._name
    made.dtype = None
    return made


def _check_call_options(operator: str, name: str, limit: int, dtype: str) -> None:
    if limit < 1:
        raise ValueError(f"{operator}: {name} is {limit}, give 1 or more")
    if dtype not in DTYPES:
        raise ValueError(f"{operator}: dtype is {dtype!r}, give one of {', '.join(DTYPES)}")


def _load(operator: Any, rank: int | None) -> tuple[Any, Any]:
    """Return the operator's model, in the type that it asks for, and its processor."""
    import torch

    model, processor = get_model(operator.model_key, rank, operator.use_cuda())
    if operator.dtype is not None and _dtype(model) != getattr(torch, operator.dtype):
        scale = getattr(model, "logit_scale", None)
        exact = None if scale is None else scale.detach().float()
        model.to(getattr(torch, operator.dtype))
        if scale is not None:
            # Rounding this logarithm to bfloat16 would move every score by up to a percent.
            model.logit_scale.data = exact
    return model, processor


def _dtype(model: Any) -> Any:
    """Return what a model computes in; single numbers of it may be float32 all the same."""
    return next(weight.dtype for weight in model.parameters() if weight.dim() > 1)


def _in_inference(work: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    import torch

    with torch.inference_mode():
        return work(*arguments, **options)


def _pictures(operator: Any, sample: Mapping[str, Any]) -> list[_Picture]:
    paths = sample.get(operator.image_key) or ()
    # The captioning mapper reads files only.
    key = None if isinstance(operator, ImageCaptioningMapper) else operator.image_bytes_key
    return [
        _Picture(path, load_mm_bytes_from_sample(sample, index, key))
        for index, path in enumerate(paths)
    ]


def _too_few_pictures(operator: Any, sample: Mapping[str, Any]) -> ValueError:
    text = str(sample[operator.text_key])
    return ValueError(
        f"{operator._name}: the text names {text.count(SpecialTokens.image)} images and "
        f"{operator.image_key!r} has {len(sample[operator.image_key])}: {text[:80]!r}"
    )


def _grouped(units: Sequence[_Unit], limit: int) -> Iterator[list[_Unit]]:
    """Yield units in groups of at most `limit` pictures, a larger unit by itself."""
    group: list[_Unit] = []
    size = 0
    for unit in units:
        if group and size + len(unit.pictures) > limit:
            yield group
            group, size = [], 0
        group.append(unit)
        size += len(unit.pictures)
    yield group


def _equal_lengths(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield places of equal lengths, at most `limit` together.

    Prompts of different lengths would need padding, which moves the positions of tokens.
    """
    for length in sorted(set(lengths)):
        places = [place for place, own in enumerate(lengths) if own == length]
        for start in range(0, len(places), limit):
            yield places[start : start + limit]


def _unit_pictures(units: Sequence[_Unit]) -> list[_Picture]:
    return [picture for unit in units for picture in unit.pictures]


def _pixels(processor: Any, pictures: Sequence[_Picture]) -> Any:
    """Return the model's input of pictures, (pictures, 3, height, width)."""
    loaded = [picture.load() for picture in pictures]
    process = processor.image_processor
    if getattr(process, "backend", None) == "torchvision":
        loaded = [_planes(picture) for picture in loaded]
        process = functools.partial(process, input_data_format="channels_first")
    return process(loaded, return_tensors="pt")["pixel_values"]


def _prepares_on_device(model: Any, processor: Any) -> bool:
    backend = getattr(processor.image_processor, "backend", None)
    return bool(model.device.type == "cuda" and backend == "torchvision")


def _pixels_on_device(processor: Any, device: Any, pictures: Sequence[_Picture]) -> Any:
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


def _decoded(picture: _Picture) -> Any:
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
    return torch.from_numpy(_planes(picture.load()))


def _planes(picture: Any) -> np.ndarray[Any, Any]:
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


def _content(picture: Any) -> bytes:
    """Return a digest of a picture's (3, height, width) input."""
    return hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()


def _joined(parts: Sequence[Any], model: Any) -> Any:
    """Return tensors as one, where and in the type that the model computes in."""
    import torch

    moved = [part.to(model.device) for part in parts]
    for part in moved:
        if part.is_cuda:
            # Parts made on another stream may not be overwritten before this one has read them.
            part.record_stream(torch.cuda.current_stream(part.device))
    return torch.cat(moved).to(_dtype(model))


def _prepared(
    groups: Sequence[_Group],
    pictures: Callable[[_Group], Sequence[_Picture]],
    prepare: Callable[[Sequence[_Picture]], _Result],
    most_threads: int = _MOST_THREADS,
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


def _tokens(model: Any, processor: Any, texts: list[str]) -> dict[str, Any]:
    """Return the tokens of texts as the stock filters cut them, padded to the longest."""
    inputs = processor(
        text=texts,
        return_tensors="pt",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        padding=True,
    )
    return dict(inputs.to(model.device))


def _logits_per_text(model: Any, outputs: Any) -> Any:
    """Return similarities times the model's scale, (texts, images), float32."""
    import torch

    if outputs.logits_per_text.dtype == torch.float32 or hasattr(model, "logit_bias"):
        return outputs.logits_per_text.float()
    # The last product in bfloat16 would round a score to thousandths.
    scale = model.logit_scale.float().exp()
    return outputs.text_embeds.float() @ outputs.image_embeds.float().T * scale


def _fuse_attention(model: Any) -> None:
    """Let BLIP's image encoder attend without holding its (heads, patches, patches) matrices.

    Those of a batch leave the CPU's caches, and transformers offers no other form for this model.
    """
    for module in model.vision_model.modules():
        if type(module).__name__ == "BlipAttention" and "forward" not in vars(module):
            module.forward = functools.partial(_fused_attention, module)


def _fused_attention(module: Any, hidden_states: Any, **_: Any) -> tuple[Any, None]:
    """Compute what `BlipAttention.forward` computes of (batch, patches, width)."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, patches, width = hidden_states.shape
    mixed = module.qkv(hidden_states).reshape(batch, patches, 3, module.num_heads, -1)
    query, key, value = mixed.permute(2, 0, 3, 1, 4)
    attended = scaled_dot_product_attention(query, key, value, scale=module.scale)
    return module.projection(attended.transpose(1, 2).reshape(batch, patches, width)), None


def _prompt_ids(model: Any, processor: Any, prompt: str | None) -> list[int]:
    """Return the image's tokens and the prompt's: what the processor makes of both."""
    image = [model.config.image_token_index] * model.config.num_query_tokens
    if prompt is None:
        return [*image, model.config.text_config.bos_token_id]
    return image + list(processor.tokenizer(prompt)["input_ids"])


def _uniforms(keys: Sequence[bytes], repeats: int, steps: int) -> Any:
    """Return the numbers that choose tokens, (keys * repeats, steps).

    Each key has a stream of its own, so that a caption's draws do not depend on its batch.
    """
    import torch

    streams = []
    for key in keys:
        number = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())
        streams.append(np.random.Generator(np.random.Philox(key=number)).random((repeats, steps)))
    return torch.from_numpy(np.concatenate(streams)).float()
