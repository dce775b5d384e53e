"""Greedy decoding as published: rows padded on the right, a cache that grows by a column a step.

The plain path beside `mgm.decoding`. It does not depend on what else is in a batch: every row keeps
its own positions, and padding is masked.

Shape legend: B rows, L positions, E language width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from mgm.model import MGM
from mgm.request import Decoding, Request


class PaddedBatch:
    """Rows being continued: their cache, mask and positions.

    `owners` says which row of the original batch each remaining row is.
    """

    def __init__(self, model: MGM, rows: Sequence[Tensor]) -> None:
        self._language = model.language_model
        self.num_rows = len(rows)
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


class PaddedDecoder:
    """Reads and continues batches of prompts.

    Args:
        model: In evaluation mode and on its device.
        decoding: When answers end.
    """

    def __init__(self, model: MGM, decoding: Decoding) -> None:
        self._model = model
        self._decoding = decoding

    def start(self, requests: Sequence[Request], rows: Mapping[str, Tensor]) -> PaddedBatch:
        """Read a batch's prompts; `rows` (N, E) are those of its pictures, not yet scaled."""
        embeds = [self._embed(request, rows) for request in requests]  # each (L_i, E)
        return PaddedBatch(self._model, embeds)

    def finish(self, batch: PaddedBatch) -> list[list[int]]:
        """Return the new ids of each row, the stop id included."""
        limit, stops = self._decoding.max_new_tokens, self._decoding.stop_ids
        answers: list[list[int]] = [[] for _ in range(batch.num_rows)]
        ended: set[int] = set()
        tokens = batch.next_tokens()
        for _ in range(limit):
            for owner, token in zip(batch.owners, tokens.tolist(), strict=True):
                if owner not in ended:
                    answers[owner].append(token)
                    if token in stops or len(answers[owner]) == limit:
                        ended.add(owner)
            if len(ended) == batch.num_rows:
                break
            active = [place for place, owner in enumerate(batch.owners) if owner not in ended]
            # Shrinking copies the cache, so it waits until it halves the work.
            if 2 * len(active) <= len(batch.owners):
                tokens = batch.keep(active, tokens)
            batch.advance(tokens)
            tokens = batch.next_tokens()
        return answers

    def release(self) -> None:
        """Do nothing: no memory is kept from batch to batch."""

    def _embed(self, request: Request, rows: Mapping[str, Tensor]) -> Tensor:
        ids = torch.tensor([request.ids], device=self._model.device)  # (1, T)
        shown: Tensor | list[Tensor] = [rows[key] for key in request.images]
        if not request.images:
            shown = ids.new_zeros(1, 0, self._model.config.language_width, dtype=self._model.dtype)
        return self._model.splice(ids, None, None, shown).inputs_embeds[0]  # (L, E)
