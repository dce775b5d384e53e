"""What is asked of the model, and when an answer ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, an image token for each picture, and the pictures' keys in order."""

    ids: tuple[int, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """When an answer ends: at any of the stop ids, or after `max_new_tokens`."""

    max_new_tokens: int
    stop_ids: frozenset[int]
