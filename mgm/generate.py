"""Greedy answering of many prompts about pictures, in batches.

Owns the order in which prompts are answered and pictures are encoded, and what happens when a batch
does not fit into the accelerator's memory. The work itself is `mgm.pictures`' and that of a decoder:
`mgm.decoding`, or `mgm.padded_decoding` as published. A prompt's answer does not depend on what
else is in its batch, but for the rounding of the arithmetic. It knows nothing of benchmarks or
files.

Shape legend: N image tokens of one picture, E language width, S side of a picture in pixels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mgm.decoding import PackedDecoder
from mgm.errors import InputError
from mgm.features import Towers
from mgm.model import MGM
from mgm.padded_decoding import PaddedDecoder
from mgm.pictures import PictureEncoder
from mgm.request import Decoding, Request

END_OF_TURN = "<end_of_turn>"
# Past these numbers of pictures the towers gain no speed and only need more memory. The plain way
# makes the fused map of every picture, 200 MB each at the published size.
PICTURES_AT_ONCE = {"fast": 16, "reference": 8}

LoadImage = Callable[[str], Tensor]
Prefetch = Callable[[Sequence[str]], None]
Numerics = Literal["fast", "reference"]


class Decoder(Protocol):
    """Continues batches of prompts; one batch at a time is between start and finish."""

    def start(self, requests: Sequence[Request], rows: Mapping[str, Tensor]) -> Any:
        """Read a batch's prompts, given the rows (N, E) of its pictures."""

    def finish(self, batch: Any) -> list[list[int]]:
        """Return the new ids of each row of a started batch, the stop id included."""

    def release(self) -> None:
        """Give back memory that is kept from batch to batch."""


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
    """Answers batches of requests.

    Args:
        model: In evaluation mode, on its device, and with its weights final.
        load_image: Returns the picture (3, S, S) of a key, as bytes or normalised.
        decoding: When answers end.
        prefetch: Told which keys are loaded soon.
        numerics: `reference` is the published order of operations; `fast` reads prompts packed,
            what they share once, and decodes over a static cache.
        towers: Run the model's towers; None runs them as they are.
        compiled: With fast numerics, compile layers and replay decoding steps; None does on a GPU.
    """

    def __init__(
        self,
        model: MGM,
        load_image: LoadImage,
        decoding: Decoding,
        *,
        prefetch: Prefetch | None = None,
        numerics: Numerics = "fast",
        towers: Towers | None = None,
        compiled: bool | None = None,
    ) -> None:
        self._load_image = load_image
        self._prefetch = prefetch
        is_fast = numerics == "fast"
        self.encoder = PictureEncoder(model, towers, at_once=PICTURES_AT_ONCE[numerics])
        self.decoder: Decoder = PaddedDecoder(model, decoding)
        if is_fast:
            is_cuda = model.device.type == "cuda"
            self.decoder = PackedDecoder(
                model, decoding, compiled=is_cuda if compiled is None else compiled
            )
        self._rows: dict[str, Tensor] = {}
        self._coming: list[str] = []
        self._later: set[str] = set()
        self._largest_batch: int | None = None
        self.num_encoded = 0
        """Pictures encoded so far."""

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the new ids of each request, the stop id included.

        The rows of its pictures are kept for the next batch. A batch too large for the
        accelerator's memory is halved until it fits, and later batches start at the size that did.

        Raises:
            InputError: a single request does not fit into the memory.
        """
        answers: list[list[int]] = []
        while len(answers) < len(requests):
            size = min(self._largest_batch or len(requests), len(requests) - len(answers))
            piece = requests[len(answers) : len(answers) + size]
            started = self._attempt(size, self._start, piece)
            if started is not None:
                answers.extend(self._attempt(size, self.decoder.finish, started) or [])
        return answers

    @torch.no_grad()
    def answer_batches(self, batches: Sequence[Sequence[Request]]) -> Iterator[list[list[int]]]:
        """Yield the new ids of each batch's requests, one list for each batch.

        While the caller handles a batch's answers, the accelerator reads the next batch's prompts;
        the pictures of the batch after are encoded before those prompts are continued.

        Raises:
            InputError: a single request does not fit into the memory.
        """
        last_use = {key: n for n, batch in enumerate(batches) for key in _pictures_of(batch)}
        self._coming = list(dict.fromkeys(key for batch in batches for key in _pictures_of(batch)))
        previous: tuple[Sequence[Request], Any] | None = None
        for number, batch in enumerate(batches):
            self._later = {key for key, last in last_use.items() if last > number}
            if self._fits(batch):
                self._encode(batch)
            answers = None if previous is None else self._land(*previous)
            started = None
            if self._fits(batch):
                started = self._attempt(len(batch), self._start, batch)
            previous = batch, started
            if answers is not None:
                yield answers
        if previous is not None:
            yield self._land(*previous)

    def _fits(self, batch: Sequence[Request]) -> bool:
        return self._largest_batch is None or len(batch) <= self._largest_batch

    def _land(self, batch: Sequence[Request], started: Any) -> list[list[int]]:
        """Return the answers of a batch that was started, or else did not fit into the memory."""
        answers = None
        if started is not None:
            answers = self._attempt(len(batch), self.decoder.finish, started)
        return self.answer(batch) if answers is None else answers

    def _start(self, requests: Sequence[Request]) -> Any:
        self._encode(requests)
        return self.decoder.start(requests, self._rows)

    def _attempt(self, size: int, work: Callable[[Any], Any], argument: Any) -> Any:
        """Return what the work on `size` requests gives; None, and halve, where it does not fit."""
        try:
            return work(argument)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler, whose traceback would keep the batch's tensors alive.
        if size == 1:
            raise InputError(
                "Out of memory",
                "one question alone does not fit into the accelerator's memory",
                "Use a lower precision (--dtype bfloat16) or a larger accelerator.",
            )
        self._largest_batch = size // 2
        self._rows.clear()
        self.decoder.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _encode(self, requests: Sequence[Request]) -> None:
        """Make the image rows of a batch available, and forget those that nobody needs."""
        shown = _pictures_of(requests)
        needed = self._later.union(shown)
        self._rows = {key: rows for key, rows in self._rows.items() if key in needed}
        missing = [key for key in shown if key not in self._rows]
        if not missing:
            return
        absent = set(missing)
        waiting = [key for key in self._coming if key not in absent and key not in self._rows]
        # Later pictures fill the last group up, since towers like a constant size.
        num_filling = -len(missing) % self.encoder.at_once
        group = missing + waiting[:num_filling]
        if self._prefetch is not None:
            self._prefetch(group)
        rows = self.encoder.encode([self._load_image(key) for key in group])
        self._rows.update(zip(group, rows, strict=True))
        self.num_encoded += len(group)
        self._coming = waiting[num_filling:]
        if self._prefetch is not None:
            self._prefetch(self._coming)


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
        load_image: Returns the picture (3, S, S) of a key, as bytes or normalised.
        decoding: When answers end.
        batch_size: Rows of a batch.

    Raises:
        InputError: a single request does not fit into the memory.
    """
    answerer = Answerer(model, load_image, decoding)
    batches = plan_batches(requests, batch_size)
    answered = answerer.answer_batches([[requests[p] for p in batch] for batch in batches])
    for batch, answers in zip(batches, answered, strict=True):
        yield from zip(batch, answers, strict=True)


def _pictures_of(requests: Sequence[Request]) -> list[str]:
    return list(dict.fromkeys(key for request in requests for key in request.images))
