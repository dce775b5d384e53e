"""Pretraining the small captioner: a BLIP-2 of a vision tower, a Q-Former and an OPT decoder.

It has the architecture that Data-Juicer's captioning operator loads. The operator fixes the id of the
image token, and with it a table of fifty thousand rows, nearly all unused. The unused rows are one
vector: it is trained once, counted as often as it occurs, and written out at the end.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from synth_agent.miniworld import language
from synth_agent.miniworld.pretrain_convnext import VOCABULARY, describe_quadrants
from synth_agent.miniworld.pretraining import (
    MEAN,
    STD,
    PictureSet,
    normalise,
    optimise,
    reporter,
    save_half,
)
from synth_agent.miniworld.render import SIZE
from synth_agent.miniworld.scene import WORDS, Scene
from synth_agent.miniworld.tokenizer import IMAGE_TOKEN_ID, build_tokenizer

VISION = {
    "hidden_size": 80,
    "intermediate_size": 240,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": SIZE,
    "patch_size": 8,
}
"""Shape of the vision tower, which the matcher shares."""
_WIDTH = 64
_QUERIES = 12
_TABLE = IMAGE_TOKEN_ID + 7  # as many rows as OPT's own table has
_BATCH = 256
_CAPTIONS = 4
_NOT_SAID = -100
_SEEING_SHARE = 0.6
_ASKED = 250


def pretrain_blip2(folder: Path, pictures: PictureSet, device: torch.device, *, steps: int) -> None:
    """Pretrain the captioner and write it with tokenizer, processor and generation settings.

    As in BLIP-2 there are two stages: first the tower and the Q-Former learn to see, here by naming
    what each quadrant holds; then all of it learns to write.
    """
    torch.manual_seed(2)
    random.seed(2)
    lessons = _Lessons(pictures, device)
    model, naming = lessons.model, lessons.naming
    seeing = [*model.vision_model.parameters(), *model.qformer.parameters(), model.query_tokens]
    for loss_of, share, parameters in (
        (lessons.seeing_loss, _SEEING_SHARE, seeing),
        (lessons.writing_loss, 1 - _SEEING_SHARE, [*model.parameters()]),
    ):
        optimise(
            [*parameters, *naming.parameters()],
            loss_of,
            steps=round(share * steps),
            learning_rate=2e-3,
            report=reporter("blip2", _measurement(model, lessons.tokenizer, pictures, device)),
        )
    save_half(_with_full_table(model, lessons.unused), folder)
    _generation(lessons.tokenizer).save_pretrained(str(folder))
    lessons.tokenizer.save_pretrained(str(folder))
    write_processor(folder, "Blip2Processor", {"num_query_tokens": _QUERIES})


class _Lessons:
    """The model with what it learns from: batches of pictures, and the losses of both stages."""

    def __init__(self, pictures: PictureSet, device: torch.device) -> None:
        self.tokenizer = build_tokenizer("captioner")
        self.unused = len(self.tokenizer) - 1  # this row stands for all that are not a word's
        config = _config(self.unused + 1, self.unused)
        self.model = Blip2ForConditionalGeneration(config).to(device)
        _scale_initialisation(self.model)
        self.naming = _Naming().to(device)
        self._pictures = pictures
        self._device = device
        self._ids = _tokenize(self.tokenizer, pictures.scenes)
        self._held = torch.stack([describe_quadrants(scene) for scene in pictures.scenes])
        self._prefix = torch.full((_BATCH, _QUERIES), self.unused, device=device)
        self._generator = torch.Generator().manual_seed(2)

    def seeing_loss(self, _: int) -> Tensor:
        """Return how badly tower and queries name what the quadrants hold."""
        rows, images = self._draw()
        with self._half():
            seen = self.model.vision_model(images).last_hidden_state
            asked = self.model.qformer(
                query_embeds=self.model.query_tokens.expand(_BATCH, -1, -1),
                encoder_hidden_states=seen,
            ).last_hidden_state
        return self._unnamed(seen, asked, rows)

    def writing_loss(self, _: int) -> Tensor:
        """Return the captions' cross-entropy beside the seeing loss."""
        rows, images = self._draw()
        choice = torch.randint(0, _CAPTIONS, (_BATCH,), generator=self._generator)
        text = self._ids[rows, choice].to(self._device)
        ids = torch.cat([self._prefix, text[:, :-1]], 1)
        with self._half():
            output = self.model(pixel_values=images, input_ids=ids)
        is_padding = text[:, 1:] == self.tokenizer.pad_token_id
        following = text[:, 1:].masked_fill(is_padding, _NOT_SAID)
        logits = _count_unused(output.logits[:, _QUERIES:].float(), self.unused)
        told = F.cross_entropy(logits.transpose(1, 2), following, ignore_index=_NOT_SAID)
        seen = output.vision_outputs.last_hidden_state
        return told + self._unnamed(seen, output.qformer_outputs.last_hidden_state, rows)

    def _draw(self) -> tuple[Tensor, Tensor]:
        self.model.train()
        last = self._pictures.num_training
        rows = torch.randint(0, last, (_BATCH,), generator=self._generator)
        return rows, normalise(self._pictures.pixels[rows], self._device, augment=True)

    def _half(self) -> torch.autocast:
        kind = self._device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")

    def _unnamed(self, seen: Tensor, asked: Tensor, rows: Tensor) -> Tensor:
        held = self._held[rows].to(self._device)
        loss: Tensor = self.naming(seen.float(), asked.float(), held)
        return loss


class _Naming(nn.Module):
    """How badly the words of each quadrant are told: from its patches, and from its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.of_patches = nn.Linear(VISION["hidden_size"], len(VOCABULARY))
        self.of_queries = nn.Linear(_WIDTH, len(VOCABULARY))

    def forward(self, seen: Tensor, asked: Tensor, held: Tensor) -> Tensor:
        """Return the sum of both losses.

        Args:
            seen: (B, 1 + patches, D) of the tower.
            asked: (B, queries, D) of the Q-Former; query i belongs to quadrant i modulo 4.
            held: (B, 4, words), one where a word describes a quadrant.
        """
        side = VISION["image_size"] // VISION["patch_size"] // 2
        batch, _, width = seen.shape
        cells = seen[:, 1:].reshape(batch, 2, side, 2, side, width).mean((2, 4)).flatten(1, 2)
        queries = asked.reshape(batch, -1, 4, asked.shape[-1]).mean(1)
        losses = [
            F.binary_cross_entropy_with_logits(named, held, reduction="sum") / held.sum()
            for named in (self.of_patches(cells), self.of_queries(queries))
        ]
        return losses[0] + losses[1]


def _count_unused(logits: Tensor, unused: int) -> Tensor:
    """Return the logits with the last one counted as often as its row will occur."""
    return torch.cat([logits[..., :unused], logits[..., unused:] + math.log(_TABLE - unused)], -1)


def write_processor(folder: Path, name: str, fields: dict[str, int] | None = None) -> None:
    """Write the configuration of a BLIP processor that shrinks pictures to the tower's size."""
    picture = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "BlipImageProcessor",
        "image_std": list(STD),
        "processor_class": name,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIZE, "width": SIZE},
    }
    processor = {"processor_class": name, **(fields or {})}
    for file, content in (
        ("preprocessor_config.json", picture),
        ("processor_config.json", processor),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _config(num_rows: int, image_token: int) -> Blip2Config:
    return Blip2Config(
        vision_config={**VISION, "qkv_bias": True},
        qformer_config={
            "vocab_size": 1,
            "hidden_size": _WIDTH,
            "intermediate_size": 3 * _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": VISION["hidden_size"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": num_rows,
            "hidden_size": _WIDTH,
            "word_embed_proj_dim": _WIDTH,  # BLIP-2 places picture rows before any projection
            "ffn_dim": 3 * _WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 192,
            "dropout": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        num_query_tokens=_QUERIES,
        image_token_index=image_token,
    )


def _scale_initialisation(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan = VISION["hidden_size"] if "position" in name else parameter[0].numel()
            nn.init.normal_(parameter, std=1.0 if name == "query_tokens" else fan**-0.5)


def _tokenize(tokenizer: PreTrainedTokenizerFast, scenes: list[Scene]) -> Tensor:
    """Return (N, captions, T): `<bos>`, a caption, `<eos>`, padding."""
    draw = random.Random(5)
    texts = [language.caption(scene, draw) for scene in scenes for _ in range(_CAPTIONS)]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts).input_ids]
    length = max(map(len, ids))
    padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids]
    return torch.tensor(padded).view(len(scenes), _CAPTIONS, length)


def _measurement(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: PictureSet,
    device: torch.device,
) -> Callable[[], str]:
    @torch.no_grad()
    def measure() -> str:
        model.eval()
        rows = range(pictures.num_training, len(pictures.scenes))[:_ASKED]
        images = normalise(pictures.pixels[rows.start : rows.stop], device, augment=False)
        ids = model.generate(pixel_values=images, max_new_tokens=48, do_sample=False)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        pairs = list(zip(texts, pictures.scenes[rows.start : rows.stop], strict=True))
        read = sum(_tells_words(text, scene) for text, scene in pairs) / len(pairs)
        told = sum(_tells_groups(text, scene) for text, scene in pairs) / len(pairs)
        return f"words {read:.3f} groups {told:.3f} e.g. {texts[0]!r}"

    return measure


def _tells_words(text: str, scene: Scene) -> bool:
    return {word for word in text.split() if word in WORDS} == {s.word for s in scene.signs}


def _tells_groups(text: str, scene: Scene) -> bool:
    return all(f"{group.color} {group.noun}" in text for group in scene.groups)


def _generation(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Data-Juicer samples; these keep a small model's samples close to its best guess."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.5,
        top_k=10,
    )


def _with_full_table(
    model: Blip2ForConditionalGeneration, unused: int
) -> Blip2ForConditionalGeneration:
    """Return the same model with a row for every id up to the image token's and beyond."""
    full = Blip2ForConditionalGeneration(_config(_TABLE, IMAGE_TOKEN_ID))
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = value[unused:].expand(_TABLE - unused, -1)
            state[name] = torch.cat([value[:unused], rows])
    full.load_state_dict(state)
    return full
