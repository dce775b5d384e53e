"""The two frozen vision towers: CLIP for the low resolution, ConvNeXt for the high one.

Both wrap the library's modules and keep only what Mini-Gemini reads from them. Neither owns
weights files (see `mgm.checkpoint`), nor decides whether gradients flow (see `mgm.model`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel

from mgm.config import FUSED_STRIDE, ModelConfig


class VisionTower(nn.Module):
    """CLIP's vision encoder, read before its last layer and without the CLS token.

    The layers behind the one that is read are kept, since checkpoints contain them, but not run.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        clip_config = CLIPVisionConfig(**config.vision)
        clip_config._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
        self.clip = CLIPVisionModel(clip_config)
        num_layers = clip_config.num_hidden_layers
        # hidden_states has one entry more than there are layers: entry 0 precedes the first.
        self.num_layers_run = range(num_layers + 1)[config.vision_select_layer]

    def forward(self, images: Tensor) -> Tensor:
        """Return the patch features of `images`.

        Args:
            images: (B, 3, S, S), normalised.

        Returns:
            (B, N, D) in the dtype of `images`, patches in row-major order.
        """
        dtype = next(self.clip.embeddings.patch_embedding.parameters()).dtype
        hidden: Tensor = self.clip.pre_layrnorm(self.clip.embeddings(images.to(dtype)))
        for layer in self.clip.encoder.layers[: self.num_layers_run]:
            hidden = layer(hidden, None)
        return hidden[:, 1:].to(images.dtype)  # (B, N, D)


class HighResolutionTower(nn.Module):
    """ConvNeXt's stem and four stages; its head and final norm do not exist here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.high_resolution
        model = ConvNextModel(
            ConvNextConfig(
                hidden_sizes=list(sizes["hidden_sizes"]),
                depths=list(sizes["depths"]),
                num_stages=len(sizes["depths"]),
                patch_size=FUSED_STRIDE,
                hidden_act="gelu",
                drop_path_rate=sizes.get("drop_path_rate", 0.1) if config.drop_path else 0.0,
            )
        )
        self.embeddings = model.embeddings
        self.encoder = model.encoder
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = sizes.get("norm_eps", 1e-6)

    def stages(self, images_aux: Tensor) -> list[Tensor]:
        """Return the output of every stage.

        Args:
            images_aux: (B, 3, S, S), normalised.

        Returns:
            Maps (B, C_s, S / 4, S / 4), then at strides 8, 16 and 32, in the dtype of
            `images_aux`.
        """
        dtype = next(self.embeddings.patch_embeddings.parameters()).dtype
        hidden = self.embeddings(images_aux.to(dtype))
        maps = []
        for stage in self.encoder.stages:
            hidden = stage(hidden)
            maps.append(hidden.to(images_aux.dtype))
        return maps

    def forward(self, images_aux: Tensor) -> Tensor:
        """Return the fused map (B, C, S / 4, S / 4), C being the sum of the stages' widths."""
        return fuse_stages(self.stages(images_aux))


def fuse_stages(stages: Sequence[Tensor]) -> Tensor:
    """Bring every stage to the size of the first and join them along the channels.

    The interpolation runs in float32 whatever the dtype, as published.

    Args:
        stages: (B, C_s, H_s, W_s), finest first.

    Returns:
        (B, sum of C_s, H_0, W_0).
    """
    size = stages[0].shape[-2:]
    coarse = [
        F.interpolate(stage.float(), size=size, mode="bilinear", align_corners=False).to(stage)
        for stage in stages[1:]
    ]
    return torch.cat([stages[0], *coarse], dim=1)


def low_resolution_views(images_aux: Tensor, config: ModelConfig) -> Tensor:
    """Derive what the low-resolution tower sees from the high-resolution pictures.

    The picture is interpolated bilinearly without antialiasing after normalisation. It is not
    the usual CLIP preprocessing at the lower size, and the model is sensitive to that.

    Args:
        images_aux: (B, 3, S, S), normalised.
        config: Gives the low resolution R, the grid g and whether a global view is added.

    Returns:
        (B, 3, R, R) for a grid of 1, else (B, V, 3, R, R): tiles row by row, then the whole.
    """
    grid, side = config.image_grid, config.low_resolution
    images = low_resolution(images_aux, side * grid)
    if grid == 1:
        return images
    batch = images.shape[0]
    tiles = images.view(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(batch, grid * grid, 3, side, side)  # (B, g * g, 3, R, R)
    if not config.image_global:
        return tiles
    return torch.cat([tiles, low_resolution(images, side)[:, None]], dim=1)


def low_resolution(images: Tensor, side: int) -> Tensor:
    """Interpolate pictures (B, 3, S, S) bilinearly, without antialiasing, to (B, 3, side, side)."""
    if images.shape[-1] == side:
        return images
    resized = F.interpolate(images.float(), size=(side, side), mode="bilinear", align_corners=False)
    return resized.to(images.dtype)
