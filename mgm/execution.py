"""How the samples of an optimizer step go through the model.

`PaddedExecution` is the published way: one micro-batch at a time, padded to its longest row.
`PackedExecution` lays the samples of a whole step end to end in rows of a fixed budget. Both give
the same objective: the mean over the step's micro-batches of each one's mean over its labels.

Owns also what happens when a pass does not fit into the accelerator's memory: passes are halved,
which changes nothing about the objective.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgm.data import InstructionDataset
from mgm.errors import InputError
from mgm.features import PictureFeatures
from mgm.label_loss import label_loss
from mgm.model import MGM
from mgm.packed import PackedLanguage
from mgm.packing import PackedRow, Sample, make_sample, pack, packed_row


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once."""

    indices: tuple[int, ...]
    """Records, in order."""
    pictures: tuple[int | None, ...]
    num_labels: int
    scale: float = 1.0
    """Of the mean over the labels in the loss of the step; packed passes weigh each label."""
    samples: tuple[Sample, ...] = ()


class Execution(ABC):
    """Cuts steps into passes and computes their losses.

    Args:
        model: On its device.
        dataset: The records.
        features: Of the pictures.
        dtype: Of the arithmetic.
    """

    def __init__(
        self,
        model: MGM,
        dataset: InstructionDataset,
        features: PictureFeatures,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.features = features
        self.dtype = dtype

    def autocast(self) -> torch.autocast:
        """Let float32 weights compute in the execution's dtype."""
        is_low = self.dtype != torch.float32
        return torch.autocast(self.model.device.type, self.dtype if is_low else None, is_low)

    @abstractmethod
    def passes(
        self, micro_batches: Sequence[Sequence[int]], accumulation: int, ranks: int = 1
    ) -> list[Pass]:
        """Return the passes of a step; their losses add up to the loss of the step.

        Args:
            micro_batches: Records of each micro-batch.
            accumulation: Micro-batches over which the step's mean is taken.
            ranks: The number of passes is a multiple of this, where there are samples enough.
        """

    def expect(self, one: Pass) -> None:
        """Prepare a pass on the CPU, while the accelerator is at the one before it."""
        self.features.expect(one.pictures)

    @abstractmethod
    def loss(self, one: Pass) -> Tensor:
        """Return a pass's share of the loss of the step."""

    @abstractmethod
    def halve(self) -> str:
        """Make passes half as large, and return what is different from now on.

        Raises:
            InputError: If one sample alone does not fit.
        """


class PaddedExecution(Execution):
    """Micro-batches as they are, padded on the right.

    Args:
        micro_batch_size: Samples of a pass at most.
    """

    def __init__(
        self,
        model: MGM,
        dataset: InstructionDataset,
        features: PictureFeatures,
        dtype: torch.dtype,
        micro_batch_size: int,
    ) -> None:
        super().__init__(model, dataset, features, dtype)
        self._size = micro_batch_size

    def passes(
        self, micro_batches: Sequence[Sequence[int]], accumulation: int, ranks: int = 1
    ) -> list[Pass]:
        """Return a pass for each micro-batch, or several where it does not fit at once."""
        found = []
        for micro_batch in micro_batches:
            total = sum(self._num_labels([index]) for index in micro_batch)
            for start in range(0, len(micro_batch), self._size):
                part = tuple(micro_batch[start : start + self._size])
                pictures = tuple(self.dataset.picture_of(index) for index in part)
                labels = self._num_labels(part)
                share = labels / total if total else 0.0
                found.append(Pass(part, pictures, labels, share / accumulation))
        return found

    def loss(self, one: Pass) -> Tensor:
        """Return the pass's mean over its labels times its share."""
        batch = self.dataset.collate(one.indices)
        device = self.model.device
        with self.autocast():
            output = self.model(
                batch.input_ids.to(device),
                batch.labels.to(device),
                batch.attention_mask.to(device),
                features=self.features.of(batch.pictures),
            )
        if output.loss is None or output.num_labels == 0:
            return torch.zeros((), device=device)
        loss: Tensor = output.loss * one.scale
        return loss

    def _num_labels(self, indices: Sequence[int]) -> int:
        """Return the labels that the model will count, which cutting may make fewer."""
        return sum(_sample(self.dataset, self.model, index).num_labels for index in indices)

    def halve(self) -> str:
        """Halve the samples of a pass."""
        if self._size == 1:
            raise _too_small("one sample alone")
        self._size //= 2
        return f"{self._size} samples a pass"


class PackedExecution(Execution):
    """Samples of a step laid end to end.

    Args:
        budget: Positions of a pass at most, pictures included.
        language: Runs the language model over packed rows.
    """

    always_with_pictures = False
    """Whether a row of texts alone goes through the vision side too, with a gradient of zero."""

    def __init__(
        self,
        model: MGM,
        dataset: InstructionDataset,
        features: PictureFeatures,
        dtype: torch.dtype,
        budget: int,
        language: PackedLanguage,
    ) -> None:
        super().__init__(model, dataset, features, dtype)
        self.budget = budget
        self._language = language
        self._pool = ThreadPoolExecutor(1)
        self._expected: dict[tuple[int, ...], Future[PackedRow]] = {}

    def expect(self, one: Pass) -> None:
        """Lay out a row and stack its pictures, while the accelerator is at the one before it."""
        super().expect(one)
        if one.indices not in self._expected:
            self._expected[one.indices] = self._pool.submit(self._row, one)

    def _row(self, one: Pass) -> PackedRow:
        row = packed_row(one.samples, self.model.config.num_image_tokens)
        return row.mapped(Tensor.pin_memory) if self.model.device.type == "cuda" else row

    def passes(
        self, micro_batches: Sequence[Sequence[int]], accumulation: int, ranks: int = 1
    ) -> list[Pass]:
        """Return the rows that the step's samples are packed into."""
        samples: list[Sample] = []
        for micro_batch in micro_batches:
            members = [_sample(self.dataset, self.model, index) for index in micro_batch]
            labels = sum(member.num_labels for member in members)
            weight = 1 / (labels * accumulation) if labels else 0.0
            samples += [replace(member, weight=weight) for member in members]
        return [
            Pass(
                tuple(sample.index for sample in row),
                tuple(picture for sample in row for picture in sample.pictures),
                sum(sample.num_labels for sample in row),
                samples=tuple(row),
            )
            for row in pack(samples, self.budget, ranks)
        ]

    def loss(self, one: Pass) -> Tensor:
        """Return the weighted cross-entropy of the row's labels."""
        model = self.model
        self.expect(one)
        device = model.device
        row = self._expected.pop(one.indices).result()
        row = row.mapped(lambda tensor: tensor.to(device, non_blocking=True))
        hidden = self._language(self._embeds(row), row.segments)  # (T, E)
        return label_loss(
            hidden.index_select(0, row.label_places),
            model.language_model.lm_head.weight,
            row.targets,
            row.weights,
        )

    def _embeds(self, row: PackedRow) -> Tensor:
        """Return the row's embeddings (T, E), pictures in their places."""
        model = self.model
        embeds: Tensor = model.language_model.get_input_embeddings()(row.ids)
        embeds = embeds.to(self.dtype)
        pictures: tuple[int | None, ...] = row.pictures
        if not pictures and not self.always_with_pictures:
            return embeds
        with self.autocast():
            features = self.features.of(pictures or (None,))
            rows = model.project(features).flatten(0, 1)  # (pictures * N, E)
        if not pictures:
            rows = rows[:0]
        if row.image_rows is not None:
            rows = rows.index_select(0, row.image_rows)
        scale = math.sqrt(model.config.language_width)
        return embeds.index_copy(0, row.image_places, rows.to(self.dtype) * scale)

    def halve(self) -> str:
        """Halve the positions of a pass; of a short one, recompute every layer first."""
        self._expected.clear()
        self.features.forget_expected()
        layers = len(self.model.language_model.model.layers)
        picture = self.model.config.num_image_tokens
        # Short passes cost less time than recomputing, down to a few samples.
        if self._language.recomputed_layers < layers and self.budget < 4 * picture:
            self._language.recomputed_layers = layers
            return "all layers recomputed in the backward pass"
        if self.budget <= picture:
            raise _too_small("one sample alone, with every layer recomputed,")
        self.budget //= 2
        return f"{self.budget} positions a pass"


def _sample(dataset: InstructionDataset, model: MGM, index: int) -> Sample:
    config = model.config
    return make_sample(
        index,
        dataset.encoded[index],
        dataset.picture_of(index),
        tokens_of_picture=config.num_image_tokens,
        limit=config.tokenizer_model_max_length,
        pad_id=dataset.pad_id,
    )


def _too_small(what: str) -> InputError:
    return InputError(
        "Out of memory",
        f"{what} does not fit into the accelerator's memory",
        "train less of the model (method lora or projector), keep less precise optimizer states "
        "(master split24, moments 8bit), shorten model_max_length, or use a larger card",
    )
