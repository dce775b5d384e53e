"""Greedy answering of many prompts about pictures, in batches.

Owns the order in which prompts are answered, the encoding of pictures and the decoding loop. A
prompt's answer does not depend on what else is in its batch: rows are padded on the right, every
row keeps its own positions, and padding is masked. It knows nothing of benchmarks or files.

Shape legend: B rows, L positions, E language width, N image tokens of one picture.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from mgm.errors import InputError
from mgm.model import MGM
from mgm.vision import low_resolution_views

END_OF_TURN = "<end_of_turn>"
# Past this number of pictures the towers gain no speed and only need more memory.
PICTURES_AT_ONCE = 8

LoadImage = Callable[[str], Tensor]


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


def stop_ids(tokenizer: Any, *, at_end_of_turn: bool = True) -> frozenset[int]:
    """Return the ids that end an answer.

    The published decoding stops at `<eos>` only. A trained model writes the end of its turn, a
    line break and `<eos>`; skipping special tokens and stripping removes all three, so stopping at
    the end of the turn saves two tokens and gives the same text.

    Raises:
        InputError: the tokenizer has no such token.
    """
    ends = [tokenizer.eos_token_id]
    if at_end_of_turn:
        ends.append(tokenizer.convert_tokens_to_ids(END_OF_TURN))
    if None in ends or tokenizer.unk_token_id in ends:
        raise InputError(
            "Tokenizer without an end",
            f"the tokenizer lacks <eos> or {END_OF_TURN}",
            "Use the tokenizer of a Gemma instruction model.",
        )
    return frozenset(ends)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of an answer without special tokens and surrounding space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Cut the requests into batches of like length, longest first.

    Requests about the same pictures stay together, so that each picture is encoded once. The
    longest come first, so that a batch too large for the memory is met at once.

    Returns:
        Positions in `requests`, each exactly once.
    """
    longest: dict[tuple[str, ...], int] = {}
    first_seen: dict[tuple[str, ...], int] = {}
    for position, request in enumerate(requests):
        longest[request.images] = max(len(request.ids), longest.get(request.images, 0))
        first_seen.setdefault(request.images, position)

    def order(position: int) -> tuple[int, int, int, int]:
        request = requests[position]
        if not request.images:
            return -len(request.ids), position, 0, position
        pictures = request.images
        return -longest[pictures], first_seen[pictures], -len(request.ids), position

    ordered = sorted(range(len(requests)), key=order)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


class Answerer:
    """Answers batches of requests, keeping the rows of pictures that the next batch shares.

    Args:
        model: In evaluation mode and on its device.
        load_image: Returns the normalised picture (3, S, S) of a key.
        decoding: When answers end.
    """

    def __init__(self, model: MGM, load_image: LoadImage, decoding: Decoding) -> None:
        self._model = model
        self._load_image = load_image
        self._decoding = decoding
        self._rows: dict[str, Tensor] = {}
        self._largest_batch: int | None = None
        self.num_encoded = 0
        """Pictures encoded so far."""

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the new ids of each request, the stop id included.

        A batch too large for the accelerator's memory is halved until it fits, and later batches
        start at the size that did.

        Raises:
            InputError: a single request does not fit into the memory.
        """
        answers: list[list[int]] = []
        while len(answers) < len(requests):
            size = min(self._largest_batch or len(requests), len(requests) - len(answers))
            piece = requests[len(answers) : len(answers) + size]
            done = self._try(piece)
            if done is None:
                self._shrink(size)
            else:
                answers.extend(done)
        return answers

    def _try(self, requests: Sequence[Request]) -> list[list[int]] | None:
        try:
            return self._answer_batch(requests)
        except torch.OutOfMemoryError:
            return None

    def _shrink(self, size: int) -> None:
        # Outside the handler, whose traceback would keep the batch's tensors alive.
        if size == 1:
            raise InputError(
                "Out of memory",
                "one question alone does not fit into the accelerator's memory",
                "Use a lower precision (--dtype bfloat16) or a larger accelerator.",
            )
        self._largest_batch = size // 2
        self._rows.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answer_batch(self, requests: Sequence[Request]) -> list[list[int]]:
        self._encode(requests)
        rows = [self._embed(request) for request in requests]  # each (L_i, E)
        return _decode_greedily(self._model, rows, self._decoding)

    def _encode(self, requests: Sequence[Request]) -> None:
        """Make the image rows of a batch available and forget all others."""
        keys = dict.fromkeys(key for request in requests for key in request.images)
        self._rows = {key: rows for key, rows in self._rows.items() if key in keys}
        missing = [key for key in keys if key not in self._rows]
        for start in range(0, len(missing), PICTURES_AT_ONCE):
            piece = missing[start : start + PICTURES_AT_ONCE]
            pixels = torch.stack([self._load_image(key) for key in piece])  # (I, 3, S, S)
            pixels = pixels.to(self._model.device)
            # Views are made before the precision is lowered.
            views = low_resolution_views(pixels, self._model.config)
            dtype = self._model.dtype
            encoded = self._model.encode_images(views.to(dtype), pixels.to(dtype))  # (I, N, E)
            self._rows.update(zip(piece, encoded, strict=True))
            self.num_encoded += len(piece)

    def _embed(self, request: Request) -> Tensor:
        ids = torch.tensor([request.ids], device=self._model.device)  # (1, T)
        rows: Tensor | list[Tensor] = [self._rows[key] for key in request.images]
        if not request.images:
            rows = ids.new_zeros(1, 0, self._model.config.language_width, dtype=self._model.dtype)
        return self._model.splice(ids, None, None, rows).inputs_embeds[0]  # (L, E)


def answer(
    model: MGM,
    requests: Sequence[Request],
    load_image: LoadImage,
    decoding: Decoding,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Answer all requests and yield (position, new ids) batch by batch.

    Args:
        model: In evaluation mode and on its device.
        requests: In any order; `plan_batches` decides which are answered together.
        load_image: Returns the normalised picture (3, S, S) of a key.
        decoding: When answers end.
        batch_size: Rows of a batch.

    Raises:
        InputError: a single request does not fit into the memory.
    """
    answerer = Answerer(model, load_image, decoding)
    for batch in plan_batches(requests, batch_size):
        answers = answerer.answer([requests[position] for position in batch])
        yield from zip(batch, answers, strict=True)


def _decode_greedily(model: MGM, rows: Sequence[Tensor], decoding: Decoding) -> list[list[int]]:
    """Continue each row (L_i, E) of embeddings with its most likely tokens."""
    batch = _DecodingBatch(model, rows)
    answers: list[list[int]] = [[] for _ in rows]
    ended: set[int] = set()
    tokens = batch.next_tokens()
    for _ in range(decoding.max_new_tokens):
        for owner, token in zip(batch.owners, tokens.tolist(), strict=True):
            if owner not in ended:
                answers[owner].append(token)
                if token in decoding.stop_ids or len(answers[owner]) == decoding.max_new_tokens:
                    ended.add(owner)
        if len(ended) == len(rows):
            break
        active = [place for place, owner in enumerate(batch.owners) if owner not in ended]
        # Shrinking copies the cache, so it waits until it halves the work.
        if 2 * len(active) <= len(batch.owners):
            tokens = batch.keep(active, tokens)
        batch.advance(tokens)
        tokens = batch.next_tokens()
    return answers


class _DecodingBatch:
    """Rows being continued: their cache, mask and positions.

    `owners` says which row of the original batch each remaining row is.
    """

    def __init__(self, model: MGM, rows: Sequence[Tensor]) -> None:
        self._language = model.language_model
        self.owners = list(range(len(rows)))
        lengths = torch.tensor([row.shape[0] for row in rows], device=rows[0].device)  # (B,)
        embeds = pad_sequence(list(rows), batch_first=True)  # (B, L, E)
        places = torch.arange(embeds.shape[1], device=lengths.device)
        self._positions = lengths
        self._mask = (places < lengths[:, None]).long()  # (B, L)
        self._cache = DynamicCache(config=self._language.config)
        output = self._language.model(
            inputs_embeds=embeds,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        batch = torch.arange(len(rows), device=lengths.device)
        self._last = output.last_hidden_state[batch, lengths - 1]  # (B, E)

    def next_tokens(self) -> Tensor:
        """Return the most likely next token of each row (B,)."""
        tokens: Tensor = self._language.lm_head(self._last).argmax(-1)
        return tokens

    def keep(self, places: Sequence[int], tokens: Tensor) -> Tensor:
        """Drop all rows but those at `places`, and return their tokens."""
        kept = torch.tensor(places, device=tokens.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._positions = self._mask[kept], self._positions[kept]
        self.owners = [self.owners[place] for place in places]
        return tokens[kept]

    def advance(self, tokens: Tensor) -> None:
        """Append one token (B,) to each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.owners), 1)], dim=1)
        output = self._language.model(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        self._last = output.last_hidden_state[:, -1]  # (B, E)
