"""Parameter names: this package's and the published checkpoints'.

Owns the translation, and nothing that touches a file.
"""

from __future__ import annotations

import re

from torch import nn

from mgm.weights import Slots, parameter_slots

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONVNEXT_PREFIX = "model.vision_tower_aux.vision_"
# Parameter of ours -> published name, applied to the start of a name.
_PART_NAMES = (
    ("vision_tower.clip.", CLIP_PREFIX),
    ("high_resolution_tower.", CONVNEXT_PREFIX),
    ("mining.query.", "model.vlm_uni_query_projector."),
    ("mining.key.", "model.vlm_uni_aux_projector."),
    ("mining.value.", "model.vlm_uni_val_projector."),
    ("projector.", "model.mm_projector."),
    ("language_model.", ""),
)
# ConvNextModel -> timm, on the rest of the name.
_CONVNEXT_NAMES = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"(?<=\d)\.layernorm\.", ".norm."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"\.layer_scale_parameter$", ".gamma"),
)


def timm_name(name: str) -> str:
    """Translate a `ConvNextModel` parameter name to timm's."""
    for pattern, replacement in _CONVNEXT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_name(name: str) -> str:
    """Translate the name of one of `MGM`'s parameters to its published name.

    Raises:
        ValueError: If the parameter belongs to no part of the model.
    """
    for ours, published in _PART_NAMES:
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return published + (timm_name(rest) if published == CONVNEXT_PREFIX else rest)
    raise ValueError(f"no published name for parameter {name!r}")


def published_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters under their published names; tied ones appear once."""
    return {published_name(name): value for name, value in model.named_parameters()}


def vision_module_name(name: str) -> str | None:
    """Return the published name of a projector, mining or CLIP tensor, whatever stands before it.

    Trainers and wrappers put `module.`, `base_model.model.` or nothing before the part's name.
    Returns None for any other tensor.
    """
    part = re.search(r"(mm_projector|vlm_uni_\w+?_projector|vision_tower\.vision_tower)\.", name)
    return None if part is None else "model." + name[part.start() :]


def is_multimodal(published: str) -> bool:
    """Whether a published name belongs to the projector, the mining or a tower."""
    return published.startswith(("model.mm_projector.", "model.vlm_uni_", "model.vision_tower"))


def published_slots(model: nn.Module) -> Slots:
    """Return every parameter's place under its published name; tied ones once."""
    return parameter_slots(model, rename=published_name)
