"""Which samples are seen, and in what order. Pure functions of their seeds.

Source: the Better Synth kit's stage-1 script (the cap) and LLaVA's trainer (`llava_trainer.py`,
grouping by length and modality), as used by Mini-Gemini.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch


def capped_positions(num_samples: int, cap: int, seed: int = 1024) -> list[int]:
    """Return the positions that the kit keeps when there are more samples than it allows.

    Args:
        num_samples: Records in the file.
        cap: Most records that are trained on.
        seed: The kit fixes 1024.

    Returns:
        All positions in order, or `cap` of them in the order they were drawn.
    """
    if num_samples <= cap:
        return list(range(num_samples))
    return random.Random(seed).sample(range(num_samples), cap)


def shuffled_order(num_samples: int, seed: int) -> list[int]:
    """Return a permutation of all positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_samples, generator=generator).tolist()


def grouped_order(
    lengths: Sequence[int], batch_size: int, num_chunks: int, generator: torch.Generator
) -> list[int]:
    """Return an order in which neighbours are of one modality and of like length.

    Args:
        lengths: Words of each sample, negative for text-only ones; none may be zero.
        batch_size: Samples of one micro-batch.
        num_chunks: Micro-batches that make up one optimizer step, over all devices.
        generator: Drawn from as the original draws from the global generator.

    Raises:
        ValueError: If a length is zero.
    """
    if 0 in lengths:
        raise ValueError("a sample without words has no length to be grouped by")
    with_picture = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_picture or not text_only:
        return _grouped_by_length(lengths, batch_size, num_chunks, generator)
    size = batch_size * num_chunks
    groups: list[list[int]] = []
    rest: list[int] = []
    for members in (with_picture, text_only):
        words = [abs(lengths[i]) for i in members]
        order = [members[i] for i in _grouped_by_length(words, batch_size, num_chunks, generator)]
        megabatches = [order[i : i + size] for i in range(0, len(order), size)]
        groups += megabatches[:-1]
        rest += megabatches[-1]
    shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return [i for group in shuffled for i in group] + sorted(rest)


def _grouped_by_length(
    lengths: Sequence[int], batch_size: int, num_chunks: int, generator: torch.Generator
) -> list[int]:
    """Shuffle, cut into megabatches, and even out the lengths inside each."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * num_chunks
    order: list[int] = []
    for start in range(0, len(shuffled), size):
        longest_first = sorted(
            shuffled[start : start + size], key=lambda i: lengths[i], reverse=True
        )
        for chunk in _dealt(longest_first, lengths, num_chunks):
            order += chunk
    return order


def _dealt(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal samples to chunks of equal size, each to the one that is shortest so far."""
    if len(indices) % num_chunks:
        return [indices[start::num_chunks] for start in range(num_chunks)]
    chunk_size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == chunk_size:
            totals[shortest] = math.inf
    return chunks
