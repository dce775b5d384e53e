"""Both frozen towers executed fast; the weights stay in the modules of `mgm.vision`.

Owns a second way to compute what `MGM.towers` gives outside of training mode, for inference only; a
test keeps the two equal. What it saves: ConvNeXt stays with channels last from end to end, its
depthwise convolutions have a kernel of their own, the element-wise work between matrix products is
compiled into few kernels, CLIP's three input projections are one product, and small batches can be
replayed as a graph, which spares the launches.

One compiled function serves all blocks of a stage, and one all layers of CLIP, for any number of
pictures.

Shape legend: I pictures, V views of one, B = I * V, L tokens of a view with CLS, D CLIP's width, H
heads, C channels of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm.depthwise import depthwise, pack_depthwise
from mgm.model import MGM, TowerFeatures
from mgm.vision import HighResolutionTower, VisionTower, low_resolution_views

_Norm = tuple[Tensor, Tensor]
"""Weight and bias of a layer norm."""
_Linear = tuple[Tensor, Tensor]
"""Weight and bias of a linear layer."""


class _Layer(NamedTuple):
    """The tensors of one CLIP layer."""

    attention_norm: _Norm
    query_key_value: _Linear
    """(3 D, D) and (3 D,)."""
    out: _Linear
    mlp_norm: _Norm
    up: _Linear
    down: _Linear


class _Block(NamedTuple):
    """The tensors of one ConvNeXt block behind its depthwise convolution."""

    norm: _Norm
    up: _Linear
    down: _Linear
    scale: Tensor | None
    """(C,), on the branch; None where the block has none."""


class FastTowers:
    """What `MGM.towers` says about pictures, without drop path, by fewer and larger kernels.

    Holds no second copy of the weights but the depthwise ones, 2.7 MB for the published model in 16
    bits. CLIP's query, key and value weights become views of one tensor,
    so they too exist once. Weights that are loaded or moved later are noticed at the next call.

    Args:
        model: Its towers are run.
        compiled: Compile the element-wise work; worth it on a GPU.
        graphed_pictures: Batches of at most this many pictures are captured as a CUDA graph when
            their size first occurs, and replayed from then on. Each size holds the memory of its
            intermediate maps for good. Ignored without a GPU.
    """

    def __init__(self, model: MGM, *, compiled: bool = True, graphed_pictures: int = 0) -> None:
        self._model = model
        self._graphed_pictures = graphed_pictures
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._clip = _FastClip(model.vision_tower, compiled)
        self._convnext = _FastConvNext(model.high_resolution_tower, compiled)
        self._state: list[tuple[int, int]] = []

    @torch.no_grad()
    def __call__(self, images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        """Run both towers, in the dtype of their weights.

        Args:
            images: (I, 3, R, R), or (I, V, 3, R, R) with a grid. None derives them.
            images_aux: (I, 3, S, S), normalised.

        Returns:
            Features in the dtype of `images_aux`; the stage maps have channels last in memory.
        """
        self._follow_weights()
        with torch.cuda.device_of(images_aux):  # type: ignore[no-untyped-call]
            if not images_aux.is_cuda or len(images_aux) > self._graphed_pictures:
                return self._run(images, images_aux)
            shape = None if images is None else images.shape
            key = (shape, images_aux.shape, images_aux.dtype)
            if key not in self._graphs:
                self._graphs[key] = _Graph.capture(self._run, images, images_aux)
            return self._graphs[key].replay(images, images_aux)

    def _follow_weights(self) -> None:
        """Pack the weights again, and drop the graphs, where they were written or moved."""
        parts = (self._clip, self._convnext)
        if self._state != [state for part in parts for state in part.state()]:
            self._graphs.clear()
            for part in parts:
                part.pack()
            self._state = [state for part in parts for state in part.state()]

    def _run(self, images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        if images is None:
            images = low_resolution_views(images_aux, self._model.config)
        with torch.autocast(images_aux.device.type, enabled=False):
            low = self._clip(images.flatten(0, -4))  # (B, L - 1, D)
            stages = tuple(self._convnext(images_aux))
        low = low.reshape(images_aux.shape[0], -1, low.shape[-1])  # (I, V * (L - 1), D)
        return TowerFeatures(low, stages)


class _FastClip:
    """CLIP up to the layer that is read."""

    def __init__(self, tower: VisionTower, compiled: bool) -> None:
        self._tower = tower
        clip = tower.clip
        layer = partial(
            _clip_layer,
            heads=clip.config.num_attention_heads,
            eps=clip.config.layer_norm_eps,
            activation=clip.encoder.layers[0].mlp.activation_fn,
        )
        self._layer = _compiled(layer) if compiled else layer
        self._layers: list[_Layer] = []

    def _modules(self) -> list[Any]:
        return list(self._tower.clip.encoder.layers[: self._tower.num_layers_run])

    def state(self) -> Iterator[tuple[int, int]]:
        """Yield what changes when one of the weights is written or moved."""
        for module in self._modules():
            yield from _state(module.self_attn)

    def pack(self) -> None:
        """Collect the weights, and make one tensor of every layer's input projections."""
        self._layers = [
            _Layer(
                _pair(module.layer_norm1),
                _joined(module.self_attn),
                _pair(module.self_attn.out_proj),
                _pair(module.layer_norm2),
                _pair(module.mlp.fc1),
                _pair(module.mlp.fc2),
            )
            for module in self._modules()
        ]

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, L - 1, D) for images (B, 3, R, R), in their dtype."""
        embeddings = self._tower.clip.embeddings
        convolution = embeddings.patch_embedding
        patches = _patches(images.to(convolution.weight.dtype), convolution).flatten(1, 2)
        first = embeddings.class_embedding.expand(len(images), 1, -1)
        hidden: Tensor = torch.cat([first, patches], dim=1) + embeddings.position_embedding.weight
        hidden = self._tower.clip.pre_layrnorm(hidden)  # (B, L, D)
        for layer in self._layers:
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            hidden = self._layer(hidden, layer)
        return hidden[:, 1:].to(images.dtype)


class _FastConvNext:
    """ConvNeXt's stem and stages with channels last."""

    def __init__(self, tower: HighResolutionTower, compiled: bool) -> None:
        self._tower = tower
        self._block = _compiled(_convnext_block) if compiled else _convnext_block
        self._stages: list[list[tuple[Tensor, Tensor, _Block]]] = []

    def state(self) -> Iterator[tuple[int, int]]:
        """Yield what changes when one of the weights is written or moved."""
        for stage in self._tower.encoder.stages:
            for block in stage.layers:
                yield from _state(block.dwconv)

    def pack(self) -> None:
        """Collect the weights, and reorder the depthwise ones."""
        self._stages = [
            [
                (
                    pack_depthwise(block.dwconv.weight),
                    block.dwconv.bias.detach(),
                    _Block(
                        _pair(block.layernorm),
                        _pair(block.pwconv1),
                        _pair(block.pwconv2),
                        _detached(block.layer_scale_parameter),
                    ),
                )
                for block in stage.layers
            ]
            for stage in self._tower.encoder.stages
        ]

    def __call__(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the stages' maps (I, C, h, h) of images (I, 3, S, S), in their dtype."""
        stem = self._tower.embeddings
        cells = _patches(images.to(stem.patch_embeddings.weight.dtype), stem.patch_embeddings)
        cells = _norm(cells, stem.layernorm)  # (I, h, h, C)
        for stage, blocks in zip(self._tower.encoder.stages, self._stages, strict=True):
            if len(stage.downsampling_layer):
                norm, convolution = stage.downsampling_layer
                first = _norm(cells, norm).permute(0, 3, 1, 2)
                cells = convolution(first).permute(0, 2, 3, 1).contiguous()
            for packed, bias, block in blocks:
                cells = self._mixed(cells, depthwise(cells, packed, bias), block, norm_eps(stage))
            yield cells.permute(0, 3, 1, 2).to(images.dtype)

    def _mixed(self, cells: Tensor, local: Tensor, block: _Block, eps: float) -> Tensor:
        rows, local_rows = cells.flatten(0, 2), local.flatten(0, 2)  # (I * h * h, C)
        torch._dynamo.maybe_mark_dynamic(rows, 0)
        torch._dynamo.maybe_mark_dynamic(local_rows, 0)
        mixed: Tensor = self._block(rows, local_rows, block, eps)
        return mixed.view(cells.shape)


def norm_eps(stage: Any) -> float:
    """Return the epsilon of a ConvNeXt stage's layer norms."""
    return float(stage.layers[0].layernorm.eps)


def _clip_layer(
    hidden: Tensor,
    layer: _Layer,
    heads: int,
    eps: float,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run one layer on (B, L, D)."""
    batch, length, width = hidden.shape
    normed = F.layer_norm(hidden, (width,), *layer.attention_norm, eps)
    joined = F.linear(normed, *layer.query_key_value)  # (B, L, 3 D)
    parts = joined.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind()  # (B, H, L, D / H)
    mixed = F.scaled_dot_product_attention(query, key, value)
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + F.linear(mixed, *layer.out)
    normed = F.layer_norm(hidden, (width,), *layer.mlp_norm, eps)
    return hidden + F.linear(activation(F.linear(normed, *layer.up)), *layer.down)


def _convnext_block(cells: Tensor, local: Tensor, block: _Block, eps: float) -> Tensor:
    """Run what follows the depthwise convolution, `local`, on rows (R, C) of cells."""
    normed = F.layer_norm(local, local.shape[-1:], *block.norm, eps)
    branch = F.linear(F.gelu(F.linear(normed, *block.up)), *block.down)
    return cells + (branch if block.scale is None else branch * block.scale)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile for the sizes of the weights and any number of rows, which callers mark."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _patches(images: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Embed square patches that do not overlap: (B, 3, S, S) to (B, S / P, S / P, width)."""
    batch, colours, height, width = images.shape
    size = convolution.kernel_size[0]
    cut = images.view(batch, colours, height // size, size, width // size, size)
    rows = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, S / P, S / P, 3 * P * P)
    return F.linear(rows, convolution.weight.flatten(1), convolution.bias)


def _norm(cells: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(cells, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _pair(module: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _joined(attention: Any) -> _Linear:
    """Return the input projections as one, of which the module's own weights become views."""
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([module.weight.detach() for module in modules])  # (3 D, D)
    bias = torch.cat([module.bias.detach() for module in modules])  # (3 D,)
    for module, rows, part in zip(modules, weight.chunk(3), bias.chunk(3), strict=True):
        module.weight.data, module.bias.data = rows, part
    return weight, bias


def _state(module: nn.Module) -> Iterator[tuple[int, int]]:
    for parameter in module.parameters():
        yield parameter.data_ptr(), parameter._version


@dataclass(frozen=True)
class _Graph:
    """The towers' work on one batch size, recorded."""

    graph: torch.cuda.CUDAGraph
    images: Tensor | None
    images_aux: Tensor
    features: TowerFeatures

    @classmethod
    def capture(
        cls,
        run: Callable[[Tensor | None, Tensor], TowerFeatures],
        images: Tensor | None,
        images_aux: Tensor,
    ) -> _Graph:
        """Record `run` on tensors like the given ones."""
        images = None if images is None else images.clone()
        images_aux = images_aux.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # What a first run allocates for good, compiles or tunes must not be recorded.
            run(images, images_aux)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            features = run(images, images_aux)
        return cls(graph, images, images_aux, features)

    def replay(self, images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        """Return the features of other pictures, which the next replay leaves alone."""
        self.images_aux.copy_(images_aux)
        if self.images is not None and images is not None:
            self.images.copy_(images)
        self.graph.replay()
        return TowerFeatures(
            self.features.low.clone(), tuple(stage.clone() for stage in self.features.stages)
        )
