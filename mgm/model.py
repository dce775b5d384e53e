"""Mini-Gemini on Gemma: two vision towers, patch info mining, a projector, a language model.

Owns the arithmetic from pixels and token ids to the loss. One implementation serves every size;
`mgm.config.ModelConfig` holds what differs. Reading and writing weights is `mgm.checkpoint`'s.

Source: Mini-Gemini, arXiv:2403.18814, section 3.

Shape legend: B rows, I pictures, V views of one picture, N tokens of one view, D low-resolution
width, C width of the fused high-resolution map, H its side, E language width, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.mining import mine
from mgm.vision import HighResolutionTower, VisionTower, fuse_stages, low_resolution_views

IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100


@dataclass(frozen=True)
class TowerFeatures:
    """What the frozen towers say about a batch of pictures; small enough to be cached.

    The stage maps are kept at their own sizes: upsampled they are several times larger.
    """

    low: Tensor
    """(I, V * N, D): views in the order of the pixels, so a global view comes last."""
    stages: tuple[Tensor, ...]
    """(I, C_s, H_s, W_s) at strides 4, 8, 16 and 32."""

    def __len__(self) -> int:
        return self.low.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> TowerFeatures:
        """Return the pictures selected by a slice, a list or a tensor of positions or booleans."""
        if isinstance(rows, Sequence):
            rows = torch.as_tensor(list(rows), dtype=torch.long, device=self.low.device)
        return TowerFeatures(self.low[rows], tuple(stage[rows] for stage in self.stages))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TowerFeatures:
        """Return a copy on `device` and in `dtype`; None leaves either as it is."""
        stages = tuple(stage.to(device=device, dtype=dtype) for stage in self.stages)
        return TowerFeatures(self.low.to(device=device, dtype=dtype), stages)

    @classmethod
    def cat(cls, parts: Sequence[TowerFeatures]) -> TowerFeatures:
        """Join batches of pictures in order."""
        low = torch.cat([part.low for part in parts])
        stages = zip(*(part.stages for part in parts), strict=True)
        return cls(low, tuple(torch.cat(maps) for maps in stages))


@dataclass(frozen=True)
class Spliced:
    """Rows of embeddings in which image rows have taken the place of the image tokens."""

    inputs_embeds: Tensor
    """(B, L, E), scaled as the language model expects them; padding is zero."""
    labels: Tensor | None
    """(B, L), IGNORE_INDEX at image rows and padding."""
    attention_mask: Tensor
    """(B, L), 1 where a position is real."""


@dataclass(frozen=True)
class ModelOutput:
    """The loss, and the logits where they were asked for."""

    loss: Tensor | None
    """Mean cross-entropy over the labels; NaN when no label is left. None without labels."""
    logits: Tensor | None
    """(B, L, vocabulary) with `full_logits`, else None."""
    num_labels: int
    """Predicted positions over which the loss is averaged."""
    spliced: Spliced


class NormedLinear(nn.Sequential):
    """A linear layer behind a layer norm."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, width_out))

    @property
    def norm(self) -> nn.LayerNorm:
        """The first of the two."""
        return cast(nn.LayerNorm, self[0])

    @property
    def linear(self) -> nn.Linear:
        """The second of the two."""
        return cast(nn.Linear, self[1])


class PatchInfoMining(nn.Module):
    """Let each low-resolution token read the high-resolution window it covers.

    Token i attends to the M cells of its own window only, with one head and no output projection.
    Source: Mini-Gemini, arXiv:2403.18814, section 3.2.

    Args:
        width: D, width of the low-resolution tokens, of the queries and of the values.
        high_width: C, width of the fused high-resolution map.
        reassociated: Multiply in the order that leaves the map unprojected: equal to rounding,
            and about sixty times less arithmetic at the published sizes.
    """

    def __init__(self, width: int, high_width: int, *, reassociated: bool = True) -> None:
        super().__init__()
        self.query = NormedLinear(width, width)
        self.key = NormedLinear(high_width, width)
        self.value = NormedLinear(high_width, width)
        self.reassociated = reassociated

    def forward(self, low: Tensor, maps: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the detail mined for each token, without the residual.

        Args:
            low: (B, N, D), tokens in row-major order.
            maps: The fused map (B, C, H, H), H a multiple of sqrt(N), or the stages that it is
                made of. Reassociated, stages are read at their own sizes, and get no gradient.

        Returns:
            (B, N, D).

        Raises:
            ValueError: If H is not a multiple of sqrt(N) or N is not a square.
        """
        if not isinstance(maps, Tensor) and self.reassociated:
            return mine(self, low, maps)
        fused = maps if isinstance(maps, Tensor) else fuse_stages(maps)
        windows = cut_windows(fused, low.shape[1])  # (B, N, M, C)
        query: Tensor = self.query(low)
        if self.reassociated:
            return self._mine_reassociated(query, windows)
        return self._mine_published(query, windows)

    def _mine_published(self, query: Tensor, windows: Tensor) -> Tensor:
        key, value = self.key(windows), self.value(windows)  # (B, N, M, D), very big tensors
        logits = query[:, :, None] @ (key.transpose(-1, -2) / math.sqrt(key.shape[-1]))
        mined: Tensor = (logits.softmax(-1) @ value).squeeze(2)
        return mined

    def _mine_reassociated(self, query: Tensor, windows: Tensor) -> Tensor:
        """Mine with q . (W x + b) = (W^T q) . x + q . b and a V = W (a x) + b.

        There is one query to a window, so projecting the query and the weighted mean costs a
        window's M-th part of projecting every cell. The weights and bias of the layer norm are
        folded in the same way, which leaves the normalised map free of parameters.
        """
        key_norm, key_linear = self.key.norm, self.key.linear
        value_norm, value_linear = self.value.norm, self.value.linear
        cells = F.layer_norm(windows, windows.shape[-1:], eps=key_norm.eps)  # (B, N, M, C)
        folded = (query @ key_linear.weight) * key_norm.weight  # (B, N, C)
        shift = query @ (key_linear.bias + key_linear.weight @ key_norm.bias)  # (B, N)
        logits = (cells @ folded[..., None]).squeeze(-1) + shift[..., None]  # (B, N, M)
        attention = (logits / math.sqrt(query.shape[-1])).softmax(-1)
        mean = (attention[:, :, None] @ cells).squeeze(2)  # (B, N, C)
        mined: Tensor = value_linear(mean * value_norm.weight + value_norm.bias)
        return mined


def cut_windows(fused: Tensor, num_tokens: int) -> Tensor:
    """Cut a map into one window for each low-resolution token.

    Args:
        fused: (B, C, H, H).
        num_tokens: N, a square number whose root divides H.

    Returns:
        (B, N, M, C): windows and the cells inside them both in row-major order.

    Raises:
        ValueError: If the map cannot be cut evenly.
    """
    batch, channels, height, width = fused.shape
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or height % side or width % side:
        raise ValueError(f"a {height} x {width} map has no {num_tokens} equal square windows")
    rows, columns = height // side, width // side
    cut = fused.reshape(batch, channels, side, rows, side, columns).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, num_tokens, rows * columns, channels)


def build_projector(kind: str, width: int, language_width: int) -> nn.Module:
    """Build the map from vision width to language width.

    Args:
        kind: `linear`, `identity`, or `mlpKx_gelu` for K linear layers with erf GELU between.

    Raises:
        ValueError: If `kind` is none of these.
    """
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, language_width)
    if not (kind.startswith("mlp") and kind.endswith("x_gelu")):
        raise ValueError(f"unknown projector type {kind!r}")
    depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))
    layers: list[nn.Module] = [nn.Linear(width, language_width)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(language_width, language_width)]
    return nn.Sequential(*layers)


def build_language_model(config: ModelConfig) -> GemmaForCausalLM:
    """Build Gemma with the activation that the configuration names.

    `GemmaConfig` rewrites `gelu` to the tanh approximation while it is created; published
    checkpoints were trained with the erf GELU, so the name is set afterwards.

    Raises:
        InputError: If the activation that the configuration names is unknown, or its attention kernel
            is not installed.
    """
    arguments = dict(config.language)
    activation = arguments.pop("hidden_act", "gelu_pytorch_tanh")
    theta = arguments.pop("rope_theta", 10000.0)
    arguments["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    gemma_config = GemmaConfig(**arguments)
    gemma_config.hidden_act = activation
    gemma_config._attn_implementation = config.attention
    try:
        return GemmaForCausalLM(gemma_config)
    except KeyError as error:
        raise InputError(
            "Unknown activation",
            f"config.json of the language model: hidden_act = {activation!r}",
            "Gemma's are gelu and gelu_pytorch_tanh",
        ) from error
    except ImportError as error:
        raise InputError(
            "Attention kernel missing",
            f"attention = {config.attention!r}: {error}",
            "install its package, or set attention to sdpa",
        ) from error


class MGM(nn.Module):
    """The whole model. Both towers are frozen; everything else starts trainable.

    Args:
        config: Sizes and choices. Weights are at their random initialisation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = build_language_model(config)
        self.vision_tower = VisionTower(config).requires_grad_(False)
        self.high_resolution_tower = HighResolutionTower(config).requires_grad_(False)
        self.projector = build_projector(
            config.projector_type, config.vision_width, config.language_width
        )
        self.mining = PatchInfoMining(
            config.vision_width,
            config.high_resolution_width,
            reassociated=config.reassociated_mining,
        )

    @property
    def device(self) -> torch.device:
        """Where the language model lives."""
        # Weights are looked at through `parameters`: ZeRO-3 gathers one that is read by its name,
        # and threads that read pictures ask for the device too.
        return cast(torch.device, next(self.language_model.lm_head.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model."""
        return cast(torch.dtype, next(self.language_model.lm_head.parameters()).dtype)

    @property
    def tower_dtype(self) -> torch.dtype:
        """The dtype of the frozen towers."""
        first = next(self.vision_tower.clip.embeddings.patch_embedding.parameters())
        return cast(torch.dtype, first.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, keeping the rotary frequencies and the embedding's factor in float32.

        They are buffers, so a cast of the module would round them: in bfloat16 positions a few
        hundred apart would become indistinct.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        body, device = self.language_model.model, self.device
        frequencies, _ = body.rotary_emb.compute_default_rope_parameters(body.config)
        body.rotary_emb.inv_freq = frequencies.to(device)
        body.rotary_emb.original_inv_freq = frequencies.to(device)
        factor = torch.tensor(body.embed_tokens.scalar_embed_scale, dtype=torch.float32)
        body.embed_tokens.embed_scale = factor.to(device)
        return self

    @classmethod
    def preset(cls, name: str) -> Self:
        """Build the preset `name` with random weights."""
        return cls(ModelConfig.preset(name))

    @torch.no_grad()
    def towers(self, images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        """Run both frozen towers, in the dtype of their weights.

        Args:
            images: (I, 3, R, R), or (I, V, 3, R, R) with a grid. None derives them.
            images_aux: (I, 3, S, S), normalised.
        """
        if images is None:
            images = low_resolution_views(images_aux, self.config)
        # Kept out of autocast, so that features are the same whether or not they were cached.
        with torch.autocast(images_aux.device.type, enabled=False):
            low = self.vision_tower(images.flatten(0, -4))  # (I * V, N, D)
            stages = tuple(self.high_resolution_tower.stages(images_aux))
        low = low.reshape(images_aux.shape[0], -1, low.shape[-1])  # (I, V * N, D)
        return TowerFeatures(low, stages)

    def project(self, features: TowerFeatures) -> Tensor:
        """Mine the high-resolution map and project: the trainable part of the vision side.

        Returns:
            (I, V * N, E), not yet scaled for the language model. With a global view its tokens
            come first, though its pixels come last.
        """
        kind = features.low.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        weights = next(self.mining.query.linear.parameters()).dtype
        # The map is by far the largest tensor here, so autocast's precision applies from the start.
        features = features.to(dtype=torch.get_autocast_dtype(kind) if is_autocast else weights)
        if self.config.image_grid > 1:
            tokens = self._mine_views(features.low, fuse_stages(features.stages))
        else:
            tokens = features.low + self.mining(features.low, features.stages)
        rows: Tensor = self.projector(tokens)
        return rows

    def _mine_views(self, low: Tensor, fused: Tensor) -> Tensor:
        """Mine every tile from its part of the map and the global view from all of it.

        Args:
            low: (I, V * N, D), tiles row by row, then the global view if there is one.
            fused: (I, C, H, H).

        Returns:
            (I, V * N, D) with the residual; the global view first.
        """
        grid, num_views = self.config.image_grid, self.config.num_views
        pictures, _, width = low.shape
        views = low.view(pictures, num_views, -1, width)  # (I, V, N, D)
        tiles = views[:, : grid * grid].flatten(0, 1)  # (I * g * g, N, D)
        channels, side = fused.shape[1], fused.shape[-1] // grid
        maps = fused.reshape(pictures, channels, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        maps = maps.reshape(pictures * grid * grid, channels, side, side)
        mined: Tensor = (tiles + self.mining(tiles, maps)).view(pictures, -1, width)
        if not self.config.image_global:
            return mined
        whole = views[:, -1]  # (I, N, D)
        coarse = F.interpolate(
            fused.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False
        ).to(fused.dtype)
        return torch.cat([whole + self.mining(whole, coarse), mined], dim=1)

    def encode_images(self, images: Tensor | None, images_aux: Tensor) -> Tensor:
        """Return the projected rows (I, V * N, E) of pictures, before the factor sqrt(E)."""
        return self.project(self.towers(images, images_aux))

    def splice(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        image_rows: Tensor | Sequence[Tensor],
    ) -> Spliced:
        """Put image rows where the image tokens are.

        Pictures are consumed in order over the whole batch. A row without an image token still
        consumes one, of which it takes no rows: so the vision side has a gradient of zero, not
        none, when a batch is all text, and an optimiser's momentum goes on as published.

        Args:
            input_ids: (B, T), IMAGE_TOKEN_ID for each picture.
            labels: (B, T) or None.
            attention_mask: (B, T) or None when nothing is padding.
            image_rows: One (V * N, E) for each picture, not yet scaled.

        Raises:
            InputError: If the batch holds more or fewer pictures than its rows consume.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = self.language_model.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, E)
        # The language model scales the embeddings it looks up; rows given to it are taken as
        # they are, so image rows need the same factor here.
        scale = math.sqrt(self.config.language_width)
        rows, row_labels, taken = [], [], 0
        for position in range(input_ids.shape[0]):
            keep = mask[position].bool()
            ids = input_ids[position][keep]
            cuts = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
            images = list(image_rows[taken : taken + max(len(cuts), 1)])
            if len(images) < max(len(cuts), 1):
                raise _picture_mismatch(f"more than the {len(image_rows)} given")
            taken += len(images)
            images = [image.to(embeds.dtype) * scale for image in images]
            known = None if labels is None else labels[position][keep]
            row, row_label = _splice_row(embeds[position][keep], known, cuts, images)
            rows.append(row)
            row_labels.append(row_label)
        if taken != len(image_rows):
            raise _picture_mismatch(f"{taken} of the {len(image_rows)} given")
        return self._pad(rows, None if labels is None else row_labels)

    def _pad(self, rows: list[Tensor], row_labels: list[Tensor | None] | None) -> Spliced:
        """Cut rows to the longest length allowed and pad them to the batch's longest."""
        limit = self.config.tokenizer_model_max_length
        rows = [row[:limit] for row in rows]
        length = max(row.shape[0] for row in rows)
        is_left = self.config.tokenizer_padding_side == "left"

        def pad(row: Tensor, value: int) -> Tensor:
            missing = length - row.shape[0]
            before_after = (missing, 0) if is_left else (0, missing)
            return F.pad(row, (*([0, 0] * (row.dim() - 1)), *before_after), value=value)

        embeds = torch.stack([pad(row, 0) for row in rows])  # (B, L, E)
        ones = [row.new_ones(row.shape[0], dtype=torch.long) for row in rows]
        mask = torch.stack([pad(one, 0) for one in ones])  # (B, L)
        if row_labels is None:
            return Spliced(embeds, None, mask)
        cut = [row[:limit] for row in row_labels if row is not None]
        return Spliced(embeds, torch.stack([pad(row, IGNORE_INDEX) for row in cut]), mask)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        images_aux: Tensor | None = None,
        features: TowerFeatures | None = None,
        *,
        full_logits: bool = False,
    ) -> ModelOutput:
        """Predict the labels of a batch.

        Args:
            input_ids: (B, T), IMAGE_TOKEN_ID for each picture.
            labels: (B, T), IGNORE_INDEX where nothing is to be predicted.
            attention_mask: (B, T), 0 at padding.
            images: Low-resolution views; None derives them from `images_aux`.
            images_aux: (I, 3, S, S). Text-only rows need a picture of zeros.
            features: The towers' output for these pictures, instead of running them.
            full_logits: Return logits for every position. Otherwise they exist only where there
                is a label, which for the published vocabulary saves most of the memory.

        Raises:
            InputError: If neither pictures nor features are given, or their number is wrong.
        """
        if features is None:
            if images_aux is None:
                raise InputError("No pictures", "neither images_aux nor features were given")
            features = self.towers(images, images_aux)
        spliced = self.splice(input_ids, labels, attention_mask, self.project(features))
        hidden = self.language_model.model(
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask
        ).last_hidden_state  # (B, L, E)
        logits = self.language_model.lm_head(hidden) if full_logits else None
        if spliced.labels is None:
            return ModelOutput(None, logits, 0, spliced)
        targets = spliced.labels[:, 1:]
        counted = targets != IGNORE_INDEX  # (B, L - 1)
        if logits is None:
            predicted = self.language_model.lm_head(hidden[:, :-1][counted])  # (labels, vocabulary)
        else:
            predicted = logits[:, :-1][counted]
        loss = F.cross_entropy(predicted.float(), targets[counted])
        return ModelOutput(loss, logits, int(predicted.shape[0]), spliced)


def _splice_row(
    embeds: Tensor, labels: Tensor | None, cuts: list[int], images: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Replace position `cuts[k]` of one row by `images[k]`.

    Args:
        embeds: (T, E).
        labels: (T,) or None.
        cuts: Positions of the image tokens, ascending; with none, `images` holds one picture.
        images: (V * N, E) each.
    """
    if not cuts:
        return torch.cat([embeds, images[0][:0]]), labels
    pieces, label_pieces, start = [], [], 0
    for cut, image in zip(cuts, images, strict=True):
        pieces += [embeds[start:cut], image]
        if labels is not None:
            ignored = labels.new_full((image.shape[0],), IGNORE_INDEX)
            label_pieces += [labels[start:cut], ignored]
        start = cut + 1
    pieces.append(embeds[start:])
    if labels is None:
        return torch.cat(pieces), None
    return torch.cat(pieces), torch.cat([*label_pieces, labels[start:]])


def _picture_mismatch(found: str) -> InputError:
    return InputError(
        "Pictures and image tokens do not match",
        f"the rows of this batch consume {found} pictures",
        "an answer may contain a literal image marker, or a text-only row lacks its blank picture",
    )


def init_vision_modules(model: MGM, seed: int = 1024) -> None:
    """Reset projector and mining to PyTorch's default initialisation, reproducibly.

    Weights are drawn in float32 on the CPU, so that dtype and device do not change the start.

    Args:
        model: Changed in place.
        seed: Of the draw; the state of the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in (model.projector, *model.mining.children()):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    fresh: nn.Module = nn.Linear(layer.in_features, layer.out_features)
                elif isinstance(layer, nn.LayerNorm):
                    fresh = nn.LayerNorm(layer.normalized_shape)
                else:
                    continue
                layer.load_state_dict(fresh.state_dict())
