"""Pretraining the small ConvNeXt: the cells of its last stage tell what their quadrant holds.

Each word that can describe a quadrant has a code, and a cell names a word by pointing along it. Codes
are the language model's embeddings, whitened: so all words stand equally far apart, and one linear
map leads from the features to the space that the language model reads.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ConvNextConfig,
    ConvNextModel,
    GemmaForCausalLM,
)

from synth_agent.miniworld.pretrain_language import word_id
from synth_agent.miniworld.pretraining import (
    PictureSet,
    normalise,
    optimise,
    reporter,
    save_half,
)
from synth_agent.miniworld.render import SIZE
from synth_agent.miniworld.scene import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    SHAPES,
    WORDS,
    Scene,
    Sign,
)

STAGE_RMS = (0.25, 0.25, 0.35, 1.0)
"""Size of each stage's output. The last stage knows most and should not drown in the mixture."""
VOCABULARY = ("sign", *WORDS, *COLORS, *SHAPES, *COUNTS.values(), *BACKGROUNDS)
SIZE_WEIGHT = 0.2
"""Keeps the features near the codes' own size, which the logits alone would not."""
_INITIAL_TEMPERATURE = (6.0, -5.0)


def word_codes(language_folder: Path) -> Tensor:
    """Return whitened, unit-length codes (words, D) of everything that a cell can hold."""
    model = GemmaForCausalLM.from_pretrained(str(language_folder), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(language_folder))
    ids = [word_id(tokenizer, word) for word in VOCABULARY]
    embeddings = model.get_input_embeddings().weight.detach()[ids]
    centred = embeddings - embeddings.mean(0)
    left, _, right = torch.linalg.svd(centred, full_matrices=False)
    return F.normalize(left @ right, dim=-1)


def _name(decoded: Tensor, codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return logits (B, 4, words) of each quadrant from its best cells.

    Args:
        decoded: (B, 4, 4, D), cells row by row.
        codes: (words, D).
    """
    logits = scale * (decoded @ codes.T) + shift  # (B, 4, 4, words)
    batch, words = logits.shape[0], logits.shape[-1]
    quadrants = logits.view(batch, 2, 2, 2, 2, words).permute(0, 1, 3, 2, 4, 5)
    return quadrants.reshape(batch, 4, 4, words).logsumexp(2)


def describe_quadrants(scene: Scene) -> Tensor:
    """Return (4, words): which words describe each quadrant."""
    held = torch.zeros(4, len(VOCABULARY))
    held[:, VOCABULARY.index(scene.background)] = 1.0
    for item in scene.objects:
        if isinstance(item, Sign):
            words = ["sign", item.word]
        else:
            words = [item.color, item.shape, COUNTS[item.count]]
        for word in words:
            held[item.position, VOCABULARY.index(word)] = 1.0
    return held


def pretrain_convnext(
    folder: Path, language_folder: Path, pictures: PictureSet, device: torch.device, *, steps: int
) -> None:
    """Pretrain the tower and write it."""
    torch.manual_seed(1)
    random.seed(1)
    model = ConvNextModel(_config()).to(device)
    _scale_initialisation(model)
    codes = word_codes(language_folder).to(device)
    width = model.config.hidden_sizes[-1]
    head = nn.init.orthogonal_(torch.empty(codes.shape[1], width)).to(device)  # fixed
    held = torch.stack([describe_quadrants(scene) for scene in pictures.scenes])  # (N, 4, words)
    generator = torch.Generator().manual_seed(1)
    temperature = [
        nn.Parameter(torch.tensor(value, device=device)) for value in _INITIAL_TEMPERATURE
    ]

    def decode(rows: Tensor, augment: bool) -> Tensor:
        images = normalise(pictures.pixels[rows], device, augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = model(images).last_hidden_state  # (B, 192, 4, 4)
        cells: Tensor = features.float().permute(0, 2, 3, 1) @ head.T  # (B, 4, 4, D)
        return cells

    def loss_of(step: int) -> Tensor:
        model.train()
        rows = torch.randint(0, pictures.num_training, (256,), generator=generator)
        decoded, wanted = decode(rows, True), held[rows].to(device)
        named = _name(decoded, codes, *temperature)
        missed = F.binary_cross_entropy_with_logits(
            named, (wanted > 0).float(), reduction="none"
        ).sum((-1, -2))
        size = (decoded.pow(2).sum(-1) - 1.0).clamp(min=0).mean()
        return missed.mean() + SIZE_WEIGHT * size

    @torch.no_grad()
    def measure() -> str:
        model.eval()
        rows = torch.arange(pictures.num_training, len(pictures.scenes))
        decoded = torch.cat([decode(part, False) for part in torch.split(rows, 250)])
        named, wanted = _name(decoded, codes, *temperature), held[rows].to(device)
        words = slice(1, 1 + len(WORDS))
        has_word = wanted[..., words].any(-1)
        is_read = named[..., words].argmax(-1) == wanted[..., words].argmax(-1)
        return f"words read {is_read[has_word].float().mean():.3f}"

    optimise(
        [*model.parameters(), *temperature],
        loss_of,
        steps=steps,
        learning_rate=3e-3,
        report=reporter("convnext", measure),
    )
    model.eval()
    rescale_stages(model, normalise(pictures.pixels[:512], device, False))
    save_half(model, folder)


@torch.no_grad()
def rescale_stages(model: ConvNextModel, images: Tensor) -> None:
    """Give each stage's output the size of STAGE_RMS without changing what any stage computes.

    Every reader of a stage normalises it first, so scaling all that adds up to it is exact.
    """
    outputs = model(images, output_hidden_states=True).hidden_states[1:]
    for stage, output, wanted in zip(model.encoder.stages, outputs, STAGE_RMS, strict=True):
        factor = wanted / output.float().pow(2).mean().sqrt()
        entry = stage.downsampling_layer[-1] if len(stage.downsampling_layer) else None
        if entry is None:
            entry = model.embeddings.layernorm
        entry.weight *= factor
        entry.bias *= factor
        for layer in stage.layers:
            layer.dwconv.bias *= factor
            layer.layer_scale_parameter *= factor


def _config() -> ConvNextConfig:
    return ConvNextConfig(
        num_channels=3,
        patch_size=4,
        hidden_sizes=[24, 48, 96, 192],
        depths=[1, 1, 3, 1],
        image_size=SIZE,
        layer_scale_init_value=0.1,
    )


def _scale_initialisation(model: ConvNextModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
