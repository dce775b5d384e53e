"""Gemma over packed rows: sequences laid end to end, without padding and without a mask.

Owns how the language model is executed fast; the weights stay in transformers' modules, LoRA layers
included, so nothing about checkpoints or training changes. The plain path beside it is
`GemmaForCausalLM.model` on padded rows; a test keeps the two equal.

What it saves: no arithmetic on padding, and the element-wise work between matrix products compiled
into few kernels. One compiled function serves all layers and all lengths.

Shape legend: T positions of all sequences together, S sequences, E width, H query heads, K key
heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaForCausalLM

from mgm.packed_attention import attend

LENGTH_MULTIPLE = 128
"""Packed rows are lengthened to a multiple of this: matrix products like even sizes."""
_ADAPTER = "default"


@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed row lies."""

    bounds: Tensor
    """(S + 1,), int32: sequence i covers positions bounds[i] to bounds[i + 1]."""
    positions: Tensor
    """(T,): place of each position in its own sequence."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Return the segments of sequences of these lengths, in order.

        Raises:
            ValueError: If there is no sequence, or an empty one.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"packed sequences need a position each, got lengths {list(lengths)}")
        sizes = torch.tensor(list(lengths))
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = sizes.cumsum(0)
        positions = torch.cat([torch.arange(size) for size in lengths])
        return cls(
            bounds.to(device, non_blocking=True),
            positions.to(device, non_blocking=True),
            max(lengths),
        )


def padded_length(length: int, multiple: int = LENGTH_MULTIPLE) -> int:
    """Return the next multiple: the tail becomes a sequence of its own that teaches nothing."""
    return -(-length // multiple) * multiple


class _Linear(NamedTuple):
    """A linear layer without bias as tensors, so that one compiled function serves every layer."""

    weight: Tensor
    down: Tensor | None
    """LoRA's A (rank, in); None without an adapter."""
    up: Tensor | None
    """LoRA's B (out, rank)."""


class _Weights(NamedTuple):
    """The tensors of one decoder layer."""

    attention_norm: Tensor
    query: _Linear
    key: _Linear
    value: _Linear
    output: _Linear
    mlp_norm: Tensor
    gate: _Linear
    up: _Linear
    down: _Linear


class _Choices(NamedTuple):
    """What is the same in every layer and fixed for a run."""

    head_width: int
    eps: float
    gelu: str
    """PyTorch's name of the GELU: `none` for erf, `tanh`."""
    lora_scale: float
    lora_dropout: float


class PackedLanguage:
    """Run a Gemma body over packed rows.

    Args:
        language_model: Its modules are read at every call, so adapters may come later.
        compiled: Compile the element-wise work; worth it on a GPU.
        recomputed_layers: How many layers, from the first, keep only their input for the
            backward pass. Costs a second forward pass of each and saves most of its memory.
    """

    def __init__(
        self, language_model: GemmaForCausalLM, *, compiled: bool, recomputed_layers: int = 0
    ) -> None:
        self._model = language_model
        self.recomputed_layers = recomputed_layers
        self._before: Callable[..., Any] = _before_attention
        self._after: Callable[..., Any] = _after_attention
        self._norm: Callable[..., Any] = _rms_norm
        self._compiled = compiled
        if compiled:
            self._before = torch.compile(_before_attention)
            self._after = torch.compile(_after_attention)
            self._norm = torch.compile(_rms_norm)

    def __call__(
        self,
        embeds: Tensor,
        segments: Segments,
        cache: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            embeds: (T, E), scaled as the language model expects them.
            segments: Of the T positions.
            cache: Receives the keys and values (T, K, D) of every layer.

        Returns:
            (T, E) in the dtype of `embeds`.
        """
        body = self._model.model
        angles = segments.positions.float()[:, None] * body.rotary_emb.inv_freq.float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, D / 2)
        choices = layer_choices(self._model)
        hidden = embeds
        for number, layer in enumerate(body.layers):
            weights = layer_weights(layer)
            if number < self.recomputed_layers and torch.is_grad_enabled():
                hidden, key, value = checkpoint(
                    self._layer, hidden, weights, cos, sin, segments, choices, use_reentrant=False
                )
            else:
                hidden, key, value = self._layer(hidden, weights, cos, sin, segments, choices)
            if cache is not None:
                cache.append((key, value))
        normed: Tensor = self._norm(self._marked(hidden), body.norm.weight, choices.eps)
        return normed

    def _layer(
        self,
        hidden: Tensor,
        weights: _Weights,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        choices: _Choices,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._before(
            self._marked(hidden),
            weights[:4],
            self._marked(cos),
            self._marked(sin),
            choices,
            self._model.training,
        )
        mixed = attend(query, key, value, segments.bounds, segments.longest)  # (T, H, D)
        after = self._after(
            self._marked(hidden),
            self._marked(mixed.flatten(1)),
            weights[4:],
            choices,
            self._model.training,
        )
        return after, key, value

    def _marked(self, tensor: Tensor) -> Tensor:
        """Tell the compiler that the number of positions changes from call to call."""
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensor


def _before_attention(
    hidden: Tensor,
    weights: tuple[Tensor, _Linear, _Linear, _Linear],
    cos: Tensor,
    sin: Tensor,
    choices: _Choices,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query (T, H, D), key and value (T, K, D), rotated."""
    norm, *parts = weights
    normed = _rms_norm(hidden, norm, choices.eps)
    query, key, value = (
        part.view(len(hidden), -1, choices.head_width)
        for part in _linears(normed, parts, choices, training)
    )
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _after_attention(
    hidden: Tensor,
    mixed: Tensor,
    weights: tuple[_Linear, Tensor, _Linear, _Linear, _Linear],
    choices: _Choices,
    training: bool,
) -> Tensor:
    """Return the layer's output (T, E) from its input and the heads' output (T, H * D)."""
    output, norm, gate, up, down = weights
    (attended,) = _linears(mixed, [output], choices, training)
    hidden = hidden + attended
    normed = _rms_norm(hidden, norm, choices.eps)
    gated, raised = _linears(normed, [gate, up], choices, training)
    product = F.gelu(gated, approximate=choices.gelu) * raised  # (T, MLP width)
    (lowered,) = _linears(product, [down], choices, training)
    return hidden + lowered


def _linears(
    inputs: Tensor, parts: Sequence[_Linear], choices: _Choices, training: bool
) -> list[Tensor]:
    """Return the outputs of layers that share their input.

    Their adapters share one dropout mask and one product with all their A: PEFT draws a mask for
    each layer, which has the same distribution for each.
    """
    results = [F.linear(inputs, part.weight.to(inputs.dtype)) for part in parts]
    downs = [part.down for part in parts if part.down is not None]
    if not downs:
        return results
    dropped = F.dropout(inputs, choices.lora_dropout, training)
    low = F.linear(dropped, torch.cat(downs).to(inputs.dtype)) * choices.lora_scale
    lows = torch.split(low, [len(down) for down in downs], -1)  # each (T, rank)
    ups = (part.up for part in parts if part.up is not None)
    # Added in float32, which keeps the compiler from copying the wide result for a product in place.
    return [
        (result.float() + F.linear(one, up.to(inputs.dtype)).float()).to(inputs.dtype)
        for result, one, up in zip(results, lows, ups, strict=True)
    ]


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's norm: in float32, with a weight that is kept as its distance from one."""
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).type_as(hidden)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, H, D) by its positions; in float32, then rounded once."""
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.type_as(heads)


def layer_weights(layer: nn.Module) -> _Weights:
    """Return the tensors of a decoder layer."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    norms: Any = layer
    return _Weights(
        norms.input_layernorm.weight,
        _tensors(attention.q_proj),
        _tensors(attention.k_proj),
        _tensors(attention.v_proj),
        _tensors(attention.o_proj),
        norms.post_attention_layernorm.weight,
        _tensors(mlp.gate_proj),
        _tensors(mlp.up_proj),
        _tensors(mlp.down_proj),
    )


def _tensors(module: Any) -> _Linear:
    if not isinstance(module, LoraLayer):
        return _Linear(module.weight, None, None)
    return _Linear(
        module.get_base_layer().weight,
        module.lora_A[_ADAPTER].weight,
        module.lora_B[_ADAPTER].weight,
    )


def layer_choices(model: GemmaForCausalLM) -> _Choices:
    """Return what all layers of a model share."""
    config = model.config
    query: Any = model.model.layers[0].self_attn.q_proj
    scale, dropout = 0.0, 0.0
    if isinstance(query, LoraLayer):
        scale = float(query.scaling[_ADAPTER])
        dropout = float(getattr(query.lora_dropout[_ADAPTER], "p", 0.0))
    return _Choices(
        int(config.head_dim),
        float(config.rms_norm_eps),
        "none" if config.hidden_act == "gelu" else "tanh",
        scale,
        dropout,
    )
