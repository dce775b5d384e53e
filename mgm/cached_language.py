"""Gemma over rows whose attention somebody else provides: how prompts and single tokens are run.

The layers are those of `mgm.packed`; what differs is that keys and values go to a cache, and that
only the positions which predict something pass the last layer's second half and the final norm.

Shape legend: T positions, E width, H query heads, K key heads, D head width, R wanted positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GemmaForCausalLM

from mgm.packed import PackedLanguage, layer_choices, layer_weights

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Number of the layer, query (T, H, D), key and value (T, K, D) -> (T, H, D)."""


class CachedLanguage(PackedLanguage):
    """Run a Gemma body with an attention of the caller's.

    Args:
        language_model: In evaluation mode, and with its weights final.
        compiled: Compile the element-wise work; worth it on a GPU.
    """

    def __init__(self, language_model: GemmaForCausalLM, *, compiled: bool) -> None:
        super().__init__(language_model, compiled=compiled)
        self._layers = [layer_weights(layer) for layer in language_model.model.layers]
        self._fixed = layer_choices(language_model)
        self.num_layers = len(self._layers)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the scaled embeddings (T, E) of ids (T,)."""
        embeds: Tensor = self._model.get_input_embeddings()(ids)
        return embeds

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """Return the most likely token (R,) after each hidden state (R, E)."""
        tokens: Tensor = self._model.lm_head(hidden).argmax(-1)
        return tokens

    def run(
        self, embeds: Tensor, positions: Tensor, attention: Attention, wanted: Tensor | None
    ) -> Tensor:
        """Return hidden states after the final norm.

        Args:
            embeds: (T, E), scaled as the language model expects them.
            positions: (T,), each in its own sequence.
            attention: Called once a layer, in order.
            wanted: (R,), which positions are returned; None for all. With none at all, only the
                keys and values are made.

        Returns:
            (R, E).
        """
        body: Any = self._model.model
        choices, training = self._fixed, False
        angles = positions.float()[:, None] * body.rotary_emb.inv_freq.float()
        cos, sin = self._marked(angles.cos()[:, None]), self._marked(angles.sin()[:, None])
        hidden = embeds
        for number, weights in enumerate(self._layers):
            query, key, value = self._before(
                self._marked(hidden), weights[:4], cos, sin, choices, training
            )
            mixed = attention(number, query, key, value).flatten(1)  # (T, H * D)
            if wanted is not None and number == self.num_layers - 1:
                hidden, mixed = hidden[wanted], mixed[wanted]
                if not len(hidden):
                    return hidden
            hidden = self._after(
                self._marked(hidden), self._marked(mixed), weights[4:], choices, training
            )
        normed: Tensor = self._norm(self._marked(hidden), body.norm.weight, choices.eps)
        return normed
