"""Data-Juicer operators that compute many samples and pictures in one model call.

Data-Juicer's own similarity, matching and aesthetics filters call their model once for every sample
or picture. The filters here take the same parameters, write the same statistics and give the same
values within 1e-5 in float32. Importing this module also registers the captions of `captioning.py`.

Any recipe can use them with plain `dj-process`, by the path of this file:

    custom_operator_paths: [.../synth_agent/stages/operators.py]
    process:
    - batched_image_text_similarity_filter: {hf_clip: models/clip, pairs_per_call: 64, num_proc: 0}
"""
# Annotations stay objects, not strings: Data-Juicer checks a recipe's values against them.

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data_juicer.ops.base_op import OPERATORS
from data_juicer.ops.filter.image_aesthetics_filter import ImageAestheticsFilter
from data_juicer.ops.filter.image_text_matching_filter import ImageTextMatchingFilter
from data_juicer.ops.filter.image_text_similarity_filter import ImageTextSimilarityFilter
from data_juicer.utils.constant import Fields, StatsKeys
from data_juicer.utils.mm_utils import SpecialTokens, remove_special_tokens

if "." not in __name__:
    # Data-Juicer loaded this file by its path. Its worker processes on a GPU start afresh, with
    # this process's import path only, and have to find this module by its name, and the others.
    sys.path.append(str(Path(__file__).resolve().parent))
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from synth_agent.stages import captioning  # noqa: F401  registers its operator
from synth_agent.stages.model_calls import (
    CALLS_PER_BATCH_ON_GPU,
    MOST_THREADS,
    MOST_THREADS_BESIDE_GPU,
    Picture,
    Row,
    check_call_options,
    dtype_of,
    in_inference,
    joined,
    load_model,
    pictures_of,
    pixels_of,
    pixels_on_device,
    prepared,
    prepares_on_device,
    too_few_pictures,
)


@dataclass(frozen=True)
class _Unit:
    """Pictures that share one score, and the text that they are scored against."""

    row: int
    text: str
    pictures: tuple[Picture, ...]


class _BatchedStats:
    """The part that the batched filters share; stands before the stock class in their bases."""

    _batched_op = True
    _name: str
    stat: str
    limit: int
    dtype: str | None
    reduce_mode = "avg"

    def _set_up(self: Any, limit_name: str, limit: int, dtype: str) -> None:
        check_call_options(self._name, limit_name, limit, dtype)
        self.limit, self.dtype = limit, dtype
        # Several calls' worth, so that pictures are decoded while the GPU computes.
        self.batch_size = limit * (CALLS_PER_BATCH_ON_GPU if self.use_cuda() else 1)

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
        model, processor = load_model(self, rank)
        if context or (self.dtype is None and str(dtype_of(model)) != "torch.float32"):
            # Half precision rounds differently in batches of different sizes.
            stock: Any = super()
            in_stock: Callable[..., dict[str, Any]] = stock.compute_stats_batched
            return in_inference(in_stock, samples, rank=rank, context=context)
        scores: dict[int, list[float]] = {row: [] for row in rows}
        reduce: Any = {"avg": np.mean, "max": np.max, "min": np.min}[self.reduce_mode]
        groups = list(_grouped(units, self.limit))
        prepare, most_threads = functools.partial(pixels_of, processor), MOST_THREADS
        if self.dtype == "bfloat16" and prepares_on_device(model, processor):
            prepare = functools.partial(pixels_on_device, processor, model.device)
            most_threads = MOST_THREADS_BESIDE_GPU
        for group, parts in prepared(groups, _unit_pictures, prepare, most_threads):
            pixels = joined(parts, model)
            values = in_inference(self._score, model, processor, group, pixels)
            ends = np.cumsum([len(unit.pictures) for unit in group])
            for unit, own in zip(group, np.split(values, ends[:-1]), strict=True):
                scores[unit.row].append(float(reduce(own)))
        for row, own_scores in scores.items():
            stats[row][self.stat] = own_scores
        return samples

    def _units(self: Any, sample: Row, row: int) -> Iterator[_Unit]:
        """Yield a unit for every chunk of text that has a picture."""
        pictures = [
            Picture(picture.path, picture.data, self.horizontal_flip, self.vertical_flip)
            for picture in pictures_of(self, sample, self.image_bytes_key)
        ]
        offset = 0
        for chunk in sample[self.text_key].split(SpecialTokens.eoc) if pictures else ():
            count = chunk.count(SpecialTokens.image)
            if count == 0:
                continue
            own = pictures[offset : offset + count]
            if not own:
                raise too_few_pictures(self, sample)
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

    def _units(self, sample: Row, row: int) -> Iterator[_Unit]:
        # A file that a sample names twice has one score, as the stock operator gives it.
        for picture in {
            picture.path: picture for picture in pictures_of(self, sample, self.image_bytes_key)
        }.values():
            yield _Unit(row, "", (picture,))

    def _score(
        self, model: Any, processor: Any, units: Sequence[_Unit], pixels: Any
    ) -> np.ndarray[Any, Any]:
        logits = model(pixel_values=pixels).logits.float()
        scores: np.ndarray[Any, Any] = logits.reshape(len(units)).cpu().numpy()
        return scores / np.float32(10) if self.need_normalized_by_ten else scores


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


def _unit_pictures(units: Sequence[_Unit]) -> list[Picture]:
    return [picture for unit in units for picture in unit.pictures]


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
