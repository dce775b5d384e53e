"""Pretraining the small CLIP: pictures and captions of clean scenes, told apart.

It serves twice: as MGM's low-resolution tower, and as the model behind the image-text similarity of
the recipes. It therefore sees pictures shrunk both ways, without antialiasing as MGM shrinks them and
with it as CLIP's own processor does.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from synth_agent.miniworld import language
from synth_agent.miniworld.pretraining import (
    LOW_SIZE,
    MEAN,
    STD,
    PictureSet,
    normalise,
    optimise,
    reporter,
    save_half,
    shrink,
)
from synth_agent.miniworld.tokenizer import build_tokenizer

FEATURE_RMS = 0.5
"""Size of the features that MGM reads, chosen so that mined detail is not drowned by them."""
_WIDTH = 96
_CAPTIONS = 4
_BATCH = 512


def pretrain_clip(folder: Path, pictures: PictureSet, device: torch.device, *, steps: int) -> None:
    """Pretrain both towers and write them with tokenizer and processor."""
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = build_tokenizer("clip")
    draw = random.Random(3)
    texts = [[language.caption(s, draw) for _ in range(_CAPTIONS)] for s in pictures.scenes]
    flat = tokenizer([text for four in texts for text in four], padding=True, return_tensors="pt")
    ids = flat.input_ids.view(len(texts), _CAPTIONS, -1)
    mask = flat.attention_mask.view(len(texts), _CAPTIONS, -1)
    model = CLIPModel(_config(len(tokenizer))).to(device)
    _scale_initialisation(model)
    generator = torch.Generator().manual_seed(0)

    def embed(
        rows: Tensor, choice: Tensor, antialias: bool, augment: bool
    ) -> tuple[Tensor, Tensor]:
        images = shrink(normalise(pictures.pixels[rows], device, augment), antialias)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(
                input_ids=ids[rows, choice].to(device),
                attention_mask=mask[rows, choice].to(device),
                pixel_values=images,
            )
        return output.image_embeds.float(), output.text_embeds.float()

    def loss_of(step: int) -> Tensor:
        model.train()
        rows = torch.randint(0, pictures.num_training, (_BATCH,), generator=generator)
        choice = torch.randint(0, _CAPTIONS, (_BATCH,), generator=generator)
        image, text = embed(rows, choice, step % 2 == 0, True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        own = torch.arange(_BATCH, device=device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    @torch.no_grad()
    def measure() -> str:
        model.eval()
        rows = torch.arange(pictures.num_training, len(pictures.scenes))
        image, text = embed(rows, torch.zeros_like(rows), True, False)
        scores = image @ text.T
        right = (scores.argmax(1).cpu() == torch.arange(len(rows))).float().mean()
        other = scores[:, torch.arange(len(rows)).roll(1)].diagonal()
        return f"found {right:.3f} own {scores.diagonal().mean():.2f} other {other.mean():.2f}"

    optimise(
        list(model.parameters()),
        loss_of,
        steps=steps,
        learning_rate=1.5e-3,
        report=reporter("clip", measure),
    )
    model.eval()
    model.logit_scale.data.fill_(math.log(100))  # Data-Juicer divides the logits by 100
    sample = shrink(normalise(pictures.pixels[:512], device, False), False)
    rescale_features(model, sample)
    save_half(model, folder)
    tokenizer.save_pretrained(str(folder))
    _write_processor(folder)


@torch.no_grad()
def rescale_features(model: CLIPModel, images: Tensor) -> None:
    """Give the penultimate features the size FEATURE_RMS without changing what CLIP computes.

    Everything that reads the residual stream normalises it first, so scaling all that is added to
    it is exact.
    """
    vision = model.vision_model
    hidden = vision(pixel_values=images, output_hidden_states=True).hidden_states[-2]
    factor = FEATURE_RMS / hidden[:, 1:].float().pow(2).mean().sqrt()
    scaled = [vision.pre_layrnorm]
    for layer in vision.encoder.layers:
        scaled += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in scaled:
        module.weight *= factor
        module.bias *= factor


def _config(vocabulary: int) -> CLIPConfig:
    return CLIPConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": _WIDTH,
            "intermediate_size": 3 * _WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "pad_token_id": 0,
            "projection_dim": 64,
        },
        vision_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 4 * _WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": LOW_SIZE,
            "patch_size": LOW_SIZE // 4,
            "projection_dim": 64,
        },
        projection_dim=64,
        logit_scale_init_value=math.log(15),
    )


def _scale_initialisation(model: CLIPModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def _write_processor(folder: Path) -> None:
    content = {
        "crop_size": {"height": LOW_SIZE, "width": LOW_SIZE},
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": LOW_SIZE, "width": LOW_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2), "utf-8")
