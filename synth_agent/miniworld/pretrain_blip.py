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
    model = _model(len(tokenizer), captioner_folder).to(device)
    ids = tokenizer(_texts(pictures.scenes), padding=True, return_tensors="pt").input_ids
    ids = ids.view(len(pictures.scenes), 2, _TEXTS, -1)
    task = _Matching(model, pictures, ids, int(tokenizer.pad_token_id), device)
    optimise(
        [*model.parameters()],
        task.loss,
        steps=steps,
        learning_rate=3e-4,
        report=reporter("blip", task.measure),
    )
    save_half(model, folder)
    tokenizer.save_pretrained(str(folder))
    write_processor(folder, "BlipProcessor")


class _Matching:
    """The task: tell whether a text fits a picture.

    Args:
        model: What learns it, on `device`.
        pictures: N of them, the last ones held out.
        ids: Token ids (N, 2, 4, T); of the second dimension, the first half does not fit.
        pad_id: Token id of the padding.
        device: Where batches are computed.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        pictures: PictureSet,
        ids: Tensor,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._pictures = pictures
        self._ids = ids
        self._pad_id = pad_id
        self._device = device
        self._generator = torch.Generator().manual_seed(3)

    def loss(self, _: int) -> Tensor:
        """Return the cross-entropy of a drawn batch, half of whose texts fit."""
        self._model.train()
        rows = self._draw(self._pictures.num_training)
        fits = self._draw(2)
        choice = self._draw(_TEXTS)
        logits = self._logits(rows, fits, choice, augment=True)
        return F.cross_entropy(logits, fits.to(self._device))

    @torch.no_grad()
    def measure(self) -> str:
        """Return the shares of the held-out pictures whose two first texts are judged right."""
        self._model.eval()
        rows = torch.arange(self._pictures.num_training, len(self._pictures.scenes))
        first = torch.zeros_like(rows)
        right = []
        for fits in (0, 1):
            logits = self._logits(rows, torch.full_like(rows, fits), first, augment=False)
            right.append((logits.argmax(1).cpu() == fits).float().mean().item())
        return f"refused {right[0]:.3f} accepted {right[1]:.3f}"

    def _draw(self, below: int) -> Tensor:
        return torch.randint(0, below, (_BATCH,), generator=self._generator)  # (B,)

    def _logits(self, rows: Tensor, fits: Tensor, choice: Tensor, *, augment: bool) -> Tensor:
        """Return (B, 2) logits of not fitting and fitting, for B pictures with a text each."""
        text = self._ids[rows, fits, choice].to(self._device)  # (B, T)
        images = normalise(self._pictures.pixels[rows], self._device, augment)  # (B, 3, 128, 128)
        kind = self._device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            seen = self._model.vision_model(pixel_values=images).last_hidden_state  # (B, P, W)
            hidden = self._model.text_encoder(
                input_ids=text,
                attention_mask=(text != self._pad_id).long(),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], device=self._device).long(),
            ).last_hidden_state  # (B, T, D)
            judged: Tensor = self._model.itm_head(hidden[:, 0])
        return judged.float()


def _model(vocabulary: int, captioner_folder: Path) -> BlipForImageTextRetrieval:
    """Return the matcher before training, with the captioner's vision tower."""
    model = BlipForImageTextRetrieval(_config(vocabulary))
    captioner = Blip2ForConditionalGeneration.from_pretrained(
        str(captioner_folder), dtype=torch.float32
    )
    model.vision_model.load_state_dict(captioner.vision_model.state_dict())
    _scale_initialisation(model.text_encoder)
    return model


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
