"""Pretraining the small matcher: a BLIP whose head tells whether a text fits a picture.

Its vision tower starts as the captioner's. Half of the texts that do not fit are captions of the same
picture with one thing changed, so that it learns to look at every word.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, BlipConfig, BlipForImageTextRetrieval

from synth_agent.miniworld import language
from synth_agent.miniworld.pretrain_blip2 import VISION, write_processor
from synth_agent.miniworld.pretraining import (
    PictureSet,
    normalise,
    optimise,
    reporter,
    save_half,
)
from synth_agent.miniworld.scene import COLORS, SHAPES, WORDS, Group, Scene, Sign
from synth_agent.miniworld.tokenizer import build_tokenizer

_WIDTH = 64
_BATCH = 256
_TEXTS = 4
_ADVERT_SHARE = 0.1


def pretrain_blip(
    folder: Path,
    captioner_folder: Path,
    pictures: PictureSet,
    device: torch.device,
    *,
    steps: int,
) -> None:
    """Pretrain the matcher and write it with tokenizer and processor."""
    torch.manual_seed(3)
    random.seed(3)
    tokenizer = build_tokenizer("clip")
    model = BlipForImageTextRetrieval(_config(len(tokenizer)))
    captioner = Blip2ForConditionalGeneration.from_pretrained(
        str(captioner_folder), dtype=torch.float32
    )
    model.vision_model.load_state_dict(captioner.vision_model.state_dict())
    _scale_initialisation(model.text_encoder)
    model.to(device)
    ids = tokenizer(_texts(pictures.scenes), padding=True, return_tensors="pt").input_ids
    ids = ids.view(len(pictures.scenes), 2, _TEXTS, -1)
    generator = torch.Generator().manual_seed(3)

    def logits_of(rows: Tensor, fits: Tensor, choice: Tensor, augment: bool) -> Tensor:
        text = ids[rows, fits, choice].to(device)
        images = normalise(pictures.pixels[rows], device, augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seen = model.vision_model(pixel_values=images).last_hidden_state
            hidden = model.text_encoder(
                input_ids=text,
                attention_mask=(text != tokenizer.pad_token_id).long(),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], device=device).long(),
            ).last_hidden_state
            judged: Tensor = model.itm_head(hidden[:, 0])
        return judged.float()

    def loss_of(_: int) -> Tensor:
        model.train()
        rows = torch.randint(0, pictures.num_training, (_BATCH,), generator=generator)
        fits = torch.randint(0, 2, (_BATCH,), generator=generator)
        choice = torch.randint(0, _TEXTS, (_BATCH,), generator=generator)
        return F.cross_entropy(logits_of(rows, fits, choice, True), fits.to(device))

    @torch.no_grad()
    def measure() -> str:
        model.eval()
        rows = torch.arange(pictures.num_training, len(pictures.scenes))
        right = []
        for fits in (0, 1):
            wanted = torch.full_like(rows, fits)
            answer = logits_of(rows, wanted, torch.zeros_like(rows), False).argmax(1).cpu()
            right.append((answer == fits).float().mean().item())
        return f"refused {right[0]:.3f} accepted {right[1]:.3f}"

    optimise(
        [*model.parameters()],
        loss_of,
        steps=steps,
        learning_rate=3e-4,
        report=reporter("blip", measure),
    )
    save_half(model, folder)
    tokenizer.save_pretrained(str(folder))
    write_processor(folder, "BlipProcessor")


def alter(scene: Scene, draw: random.Random) -> Scene:
    """Return the scene with one word, colour or shape that it does not hold."""
    changed = draw.choice(scene.objects)
    if isinstance(changed, Sign):
        word = draw.choice([word for word in WORDS if word != changed.word])
        other: Sign | Group = dataclasses.replace(changed, word=word)
    elif draw.random() < 0.5:
        color = draw.choice([color for color in COLORS if color != changed.color])
        other = dataclasses.replace(changed, color=color)
    else:
        shape = draw.choice([shape for shape in SHAPES if shape != changed.shape])
        other = dataclasses.replace(changed, shape=shape)
    objects = tuple(other if item is changed else item for item in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def _texts(scenes: list[Scene]) -> list[str]:
    """Return, scene by scene, the texts that do not fit it and then those that do."""
    draw = random.Random(6)
    texts: list[str] = []
    for scene in scenes:
        for _ in range(_TEXTS):
            kind = draw.random()
            if kind < _ADVERT_SHARE:
                texts.append(language.advert(draw))
            elif kind < 0.5:
                texts.append(language.caption(draw.choice(scenes), draw))
            else:
                texts.append(language.caption(alter(scene, draw), draw))
        texts += [language.caption(scene, draw) for _ in range(_TEXTS)]
    return texts


def _config(vocabulary: int) -> BlipConfig:
    return BlipConfig(
        vision_config=VISION,
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": _WIDTH,
            "encoder_hidden_size": VISION["hidden_size"],
            "intermediate_size": 3 * _WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "sep_token_id": 1,
        },
        projection_dim=32,
        image_text_hidden_size=32,
    )


def _scale_initialisation(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
