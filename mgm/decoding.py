"""Greedy decoding over a static cache: prompts read packed, then one token a row and step.

Shapes stay the same from step to step, so on a GPU a step is captured once as a CUDA graph and
replayed: launching its few hundred kernels one by one takes ten times what they take to run. The
plain path beside it is `mgm.padded_decoding`; a test keeps the two equal.

Rows that have ended run on until half of them have, then the others move together. Whether rows
have ended is asked for less and less often on a GPU, because asking waits for it.

Shape legend: B rows, C positions of the cache, S positions attended to, E width, H query heads,
K key heads, D head width, T positions of a pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgm.cached_language import Attention, CachedLanguage
from mgm.model import MGM
from mgm.packed import Segments
from mgm.packed_attention import attend, attend_behind
from mgm.prefill import PrefillPass, plan_prefill
from mgm.request import Decoding, Request

PREFILL_POSITIONS = 16_384
"""Read at once: more gains no speed and needs memory, 100 KB a position at the published size."""
SPAN_MULTIPLE = 128
"""Attended positions are rounded up to this on a GPU, so that one graph serves many lengths."""


@dataclass
class DecodingTimes:
    """Seconds spent on making steps fast, so far."""

    capture: float = 0.0
    num_graphs: int = 0


@dataclass(frozen=True)
class Started:
    """A batch whose prompts have been read."""

    num_rows: int
    longest: int
    """Positions of its longest prompt."""


class _State:
    """The tensors of a batch under way; a graph reads and writes them in place.

    Args:
        language: Gives the number of layers.
        heads: K and D.
        rows: B.
        capacity: C.
        max_new_tokens: Of an answer.
        like: Gives dtype and device.
    """

    def __init__(
        self,
        num_layers: int,
        heads: tuple[int, int],
        rows: int,
        capacity: int,
        max_new_tokens: int,
        like: Tensor,
    ) -> None:
        # Zeros, since a masked value still counts as nothing only while it is finite.
        self.keys = [like.new_zeros(rows, capacity, *heads) for _ in range(num_layers)]
        self.values = [like.new_zeros(rows, capacity, *heads) for _ in range(num_layers)]
        self.rows, self.capacity = rows, capacity
        device = like.device
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        # Rows that only fill a graph's size write to one more row than there are.
        self.owners = torch.full((rows,), rows, device=device)
        self.written = torch.zeros(rows + 1, max_new_tokens, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, lengths: Tensor) -> None:
        """Forget the last batch; `lengths` (n,) are those of the prompts."""
        count = len(lengths)
        self.positions.zero_()
        self.positions[:count] = lengths
        self.owners.fill_(self.rows)
        self.owners[:count] = torch.arange(count, device=lengths.device)
        self.ended.zero_()
        self.ended[count:] = True
        self.step.zero_()

    def keep(self, places: Sequence[int], size: int) -> None:
        """Move the rows at `places` to the front; up to `size` rows are filled with copies."""
        fill = [places[0]] * (size - len(places))
        kept = torch.tensor([*places, *fill], device=self.tokens.device)
        for part in (*self.keys, *self.values, self.tokens, self.positions, self.owners):
            part[:size] = part[kept]
        self.owners[len(places) : size] = self.rows


class PackedDecoder:
    """Reads and continues batches of prompts.

    Args:
        model: In evaluation mode, on its device, and with its weights final.
        decoding: When answers end.
        compiled: Compile the element-wise work of the layers and, on a GPU, replay steps as CUDA
            graphs.
    """

    def __init__(self, model: MGM, decoding: Decoding, *, compiled: bool) -> None:
        self._model = model
        self._language = CachedLanguage(model.language_model, compiled=compiled)
        self._decoding = decoding
        self._is_cuda = model.device.type == "cuda"
        self._is_captured = compiled and self._is_cuda
        self._stops = torch.tensor(sorted(decoding.stop_ids), device=model.device)
        self._state: _State | None = None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.times = DecodingTimes()

    def start(self, requests: Sequence[Request], rows: Mapping[str, Tensor]) -> Started:
        """Read a batch's prompts; no later batch may be started before this one is finished.

        Args:
            requests: The batch.
            rows: The rows (N, E) of its pictures, not yet scaled.
        """
        shown = dict.fromkeys(key for request in requests for key in request.images)
        passes = plan_prefill(
            requests,
            {key: len(rows[key]) for key in shown},
            self._model.config.tokenizer_model_max_length,
            PREFILL_POSITIONS,
        )
        lengths = [0] * len(requests)
        for one in passes:
            for member, length in zip(one.members, one.lengths, strict=True):
                lengths[member] = length
        state = self._prepare_state(len(requests), max(lengths))
        state.begin(self._sent(torch.tensor(lengths)))
        pictures = torch.cat([rows[key] for key in shown]) if shown else None  # (P, E)
        hidden = torch.cat([self._read(one, pictures, state) for one in passes])  # (B, E)
        order = torch.tensor([member for one in passes for member in one.members])
        state.tokens[self._sent(order)] = self._language.next_tokens(hidden)
        return Started(len(requests), max(lengths))

    def finish(self, started: Started) -> list[list[int]]:
        """Return the new ids of each row, the stop id included."""
        assert self._state is not None, "start comes first"
        state, size = self._state, self._size_for(started.num_rows)
        self._note(state, size)
        places = list(range(started.num_rows))
        last, limit = started.longest, self._decoding.max_new_tokens
        for step in range(1, limit):
            if not self._is_cuda or step % (1 + step // 4) == 0:
                ended = state.ended[state.owners[:size]].tolist()
                active = [place for place in places if not ended[place]]
                if not active:
                    break
                # Moving copies the cache, so it waits until it halves the work.
                if 2 * len(active) <= size and self._size_for(len(active)) < size:
                    size = self._size_for(len(active))
                    state.keep(active, size)
                    places = list(range(len(active)))
            self._advance(size, self._span(last + step))
        return self._answers(state, started.num_rows)

    def release(self) -> None:
        """Give back the cache and the graphs over it."""
        self._graphs.clear()
        self._state = None

    def _answers(self, state: _State, count: int) -> list[list[int]]:
        steps = int(state.step)
        answers = []
        for ids in state.written[:count, :steps].tolist():
            ends = [place for place, token in enumerate(ids) if token in self._decoding.stop_ids]
            answers.append(ids[: ends[0] + 1] if ends else ids)
        return answers

    def _prepare_state(self, rows: int, longest: int) -> _State:
        """Return a state that the batch fits into, the last one where it does."""
        needed = self._span(longest + self._decoding.max_new_tokens)
        state = self._state
        if state is None or state.rows < rows or state.capacity < needed:
            self._graphs.clear()
            self._state = None  # frees the memory first
            config = self._model.language_model.config
            heads = (int(config.num_key_value_heads), int(config.head_dim))
            if state is not None:
                rows, needed = max(rows, state.rows), max(needed, state.capacity)
            like = self._model.language_model.lm_head.weight
            new_tokens = self._decoding.max_new_tokens
            del state
            self._state = state = _State(
                self._language.num_layers, heads, rows, needed, new_tokens, like
            )
        return state

    def _span(self, positions: int) -> int:
        multiple = SPAN_MULTIPLE if self._is_cuda else 1
        return -(-positions // multiple) * multiple

    def _size_for(self, rows: int) -> int:
        """Return the number of rows that a step runs for `rows`: halves of the most, on a GPU."""
        if not self._is_cuda:
            return rows
        assert self._state is not None, "start comes first"
        size = self._state.rows
        while size > 1 and -(-size // 2) >= rows:
            size = -(-size // 2)
        return size

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a small tensor on the model's device, without waiting for it."""
        if not self._is_cuda:
            return tensor
        return tensor.pin_memory().to(self._model.device, non_blocking=True)

    def _read(self, one: PrefillPass, pictures: Tensor | None, state: _State) -> Tensor:
        """Fill the cache with a pass's prompts and return their last hidden states (n, E)."""
        shared = self._read_shared(one, pictures)
        own_lengths, lengths = one.own_lengths(), one.lengths
        own = Segments.of(own_lengths, "cpu")
        whole = Segments.of(lengths, "cpu")
        rows = torch.tensor(one.members).repeat_interleave(torch.tensor(lengths))
        places = self._sent(rows * state.capacity + whole.positions)  # (sum of lengths,)
        assembly = self._sent(one.assembly()) if shared else None
        query_bounds, key_bounds = self._sent(own.bounds), self._sent(whole.bounds)

        def attention(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if assembly is not None:
                before = shared[number]
                key = torch.cat([before[0], key]).index_select(0, assembly)
                value = torch.cat([before[1], value]).index_select(0, assembly)
            for cached, fresh in ((state.keys, key), (state.values, value)):
                cached[number].flatten(0, 1).index_copy_(0, places, fresh)
            if assembly is None:
                return attend(query, key, value, query_bounds, own.longest)
            return attend_behind(
                query, key, value, query_bounds, key_bounds, own.longest, whole.longest
            )

        sources = torch.cat([source for group in one.groups for source in group.own])
        beyond = torch.tensor(lengths) - torch.tensor(own_lengths)
        positions = own.positions + beyond.repeat_interleave(torch.tensor(own_lengths))
        last = self._sent(own.bounds[1:].long() - 1)
        return self._run(sources, pictures, positions, attention, last)

    def _read_shared(
        self, one: PrefillPass, pictures: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's keys and values (T, K, D) of the shared beginnings."""
        lengths = one.shared_lengths()
        cache: list[tuple[Tensor, Tensor]] = []
        if not lengths:
            return cache
        segments = Segments.of(lengths, "cpu")
        bounds = self._sent(segments.bounds)

        def attention(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.append((key, value))
            return attend(query, key, value, bounds, segments.longest)

        sources = torch.cat([group.shared for group in one.groups])
        nothing = torch.zeros(0, dtype=torch.long, device=self._model.device)
        self._run(sources, pictures, segments.positions, attention, nothing)
        return cache

    def _run(
        self,
        sources: Tensor,
        pictures: Tensor | None,
        positions: Tensor,
        attention: Attention,
        wanted: Tensor,
    ) -> Tensor:
        """Embed positions and run them through the language model.

        Args:
            sources: (T,), as `mgm.prefill` writes them.
            pictures: (P, E), rows of all pictures, not yet scaled.
            positions: (T,).
            attention: Called once a layer.
            wanted: (R,), which hidden states are returned.
        """
        embeds = self._language.embed(self._sent(sources.clamp(min=0)))  # (T, E)
        shown = (sources < 0).nonzero().flatten()
        if pictures is not None and len(shown):
            rows = pictures.index_select(0, self._sent(-1 - sources[shown]))
            scale = math.sqrt(self._model.config.language_width)
            embeds = embeds.index_copy(0, self._sent(shown), rows.to(embeds.dtype) * scale)
        return self._language.run(embeds, self._sent(positions), attention, wanted)

    def _advance(self, size: int, span: int) -> None:
        """Take the next step of `size` rows, none longer than `span` afterwards."""
        assert self._state is not None, "start comes first"
        if not self._is_captured:
            self._step(self._state, size, span)
            return
        if (size, span) not in self._graphs:
            self._graphs[size, span] = self._capture(self._state, size, span)
        self._graphs[size, span].replay()

    def _capture(self, state: _State, size: int, span: int) -> torch.cuda.CUDAGraph:
        started = time.monotonic()
        changed = (state.tokens, state.positions, state.ended, state.written, state.step)
        before = [part.clone() for part in changed]
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(state, size, span)
            # What the warm-up wrote to the cache is written again; all else is put back.
            for part, old in zip(changed, before, strict=True):
                part.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._step(state, size, span)
        self.times.capture += time.monotonic() - started
        self.times.num_graphs += 1
        return graph

    def _step(self, state: _State, size: int, span: int) -> None:
        """Append the rows' tokens to the cache and choose the next ones."""
        positions = state.positions[:size]
        rows = torch.arange(size, device=positions.device)
        embeds = self._language.embed(state.tokens[:size])  # (B, E)
        attention = _cache_attention(state, size, span, rows, positions, embeds.dtype)
        hidden = self._language.run(embeds, positions, attention, None)
        state.tokens[:size] = self._language.next_tokens(hidden)
        positions += 1
        self._note(state, size)

    def _note(self, state: _State, size: int) -> None:
        """Keep the rows' tokens, and which rows end with them."""
        owners, tokens = state.owners[:size], state.tokens[:size]
        state.written[owners, state.step] = tokens
        state.ended[owners] |= (tokens[:, None] == self._stops).any(-1)
        state.step += 1


def _cache_attention(
    state: _State, size: int, span: int, rows: Tensor, positions: Tensor, dtype: torch.dtype
) -> Attention:
    """Return the attention of one position a row to the cache, which it is added to first."""
    heads = state.keys[0].shape[2]
    unseen = torch.arange(span, device=rows.device) > positions[:, None]  # (B, S)
    mask = torch.zeros(size, 1, 1, span, dtype=dtype, device=rows.device)
    mask = mask.masked_fill(unseen[:, None, None], -torch.inf)

    def attention(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = state.keys[number], state.values[number]
        keys[rows, positions] = key
        values[rows, positions] = value
        # The query heads of a key head stand where a sequence's queries would.
        queries = query.view(size, heads, -1, query.shape[-1])  # (B, K, H / K, D)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys[:size, :span].transpose(1, 2),
            values[:size, :span].transpose(1, 2),
            attn_mask=mask.expand(-1, heads, queries.shape[2], -1),
        )
        return mixed.reshape(query.shape)

    return attention
