"""Pretraining the small Gemma: it reads scenes, in words and in soft slots.

A tiny language model has never met embeddings that are no word, and a projector cannot teach it to
read them. So most documents replace the scene's text by 16 slots, each a weighted sum of the
embeddings of the words that describe one cell of the picture, with random gain, offset and noise.
What is left to MGM's first stage is to find the map from vision features to that space. It is the
small counterpart of a large model's tolerance of soft prompts.
"""

from __future__ import annotations

import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from synth_agent.miniworld import language
from synth_agent.miniworld.pretraining import optimise, reporter, save_half
from synth_agent.miniworld.scene import COUNTS, POSITIONS, Scene, Sign, draw_scene
from synth_agent.miniworld.tokenizer import SLOT, build_tokenizer

NUM_SLOTS = 16
_SIDE = 4
_WORDS_PER_SLOT = 6
_ANSWER_WEIGHT = 3.0
_PROMPT_WEIGHT = 0.15
_CHUNK = 500
_LETTERS = "ABCD"
_END = "<end_of_turn>\n"


@dataclass(frozen=True)
class Document:
    """A conversation in pieces, and what its slots hold."""

    pieces: tuple[tuple[str, bool], ...]
    """Text and whether it is an answer."""
    slots: tuple[tuple[tuple[str, float], ...], ...] | None
    """Words and weights of each slot; None when the scene is told in words."""


def describe_cells(
    scene: Scene, draw: random.Random, with_positions: bool
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return the weighted words of the 16 cells of a scene, row by row."""
    cells = [[(scene.background, draw.uniform(0, 1.0))] for _ in range(NUM_SLOTS)]
    for item in scene.objects:
        row, column = (item.position // 2) * 2, (item.position % 2) * 2
        quadrant = [(row + i) * _SIDE + column + j for i in range(2) for j in range(2)]
        if isinstance(item, Sign):
            words = ["sign", item.word]
        else:
            words = [item.color, item.shape, COUNTS[item.count]]
        for cell in draw.sample(quadrant, draw.randint(1, 4)):
            named = [(word, draw.uniform(0.5, 1.5)) for word in words]
            named.append((scene.background, draw.uniform(0, 0.6)))
            if with_positions:
                named += [(w, draw.uniform(0.2, 1.0)) for w in POSITIONS[item.position].split()]
            cells[cell] = named
    return tuple(tuple(cell[:_WORDS_PER_SLOT]) for cell in cells)


def draw_document(draw: random.Random) -> Document:
    """Return a caption or a few questions about a scene, the scene in slots or in words."""
    scene = draw_scene(draw)
    is_soft = draw.random() < 0.75
    slots = describe_cells(scene, draw, draw.random() < 0.4) if is_soft else None
    shown = SLOT * NUM_SLOTS if is_soft else language.caption(scene, draw)
    if draw.random() < 0.4:
        text = language.advert(draw) if draw.random() < 0.05 else language.caption(scene, draw)
        return Document(_exchange(f"{shown}\n{draw.choice(language.DESCRIBE)}", text), slots)
    asked = language.questions(scene)
    draw.shuffle(asked)
    pieces: tuple[tuple[str, bool], ...] = ()
    for question in asked[:4]:
        if draw.random() < 0.5:
            choices = language.options(question, draw)
            prompt = language.letter_prompt(question.text, choices)
            answer = _LETTERS[choices.index(question.answer)]
        else:
            prompt, answer = language.short_prompt(question.text), question.answer
        pieces += _exchange(prompt if pieces else f"{shown}\n{prompt}", answer)
    return Document(pieces, slots)


def _exchange(prompt: str, answer: str) -> tuple[tuple[str, bool], ...]:
    opening = f"<start_of_turn>user\n{prompt}{_END}<start_of_turn>model\n"
    return ((opening, False), (f"{answer}{_END}<eos>", True))


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, padded."""

    ids: Tensor
    """(N, L) int16."""
    weights: Tensor
    """(N, L) of each token in the loss."""
    slot_ids: Tensor
    """(N, 16, words) int16."""
    slot_weights: Tensor


def draw_corpus(
    tokenizer: PreTrainedTokenizerFast, num_documents: int, seed: int, processes: int
) -> Corpus:
    """Draw and tokenise documents."""
    jobs = [(seed * 1_000_003 + i, _CHUNK) for i in range(num_documents // _CHUNK)]
    with ProcessPoolExecutor(processes) as pool:
        documents = [doc for chunk in pool.map(_draw_chunk, jobs) for doc in chunk]
    rows = [_tokenise(document, tokenizer) for document in documents]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int16)
    weights = torch.zeros(len(rows), length)
    slot_ids = torch.zeros(len(rows), NUM_SLOTS, _WORDS_PER_SLOT, dtype=torch.int16)
    slot_weights = torch.zeros(len(rows), NUM_SLOTS, _WORDS_PER_SLOT)
    for row, ((tokens, loss_weights), document) in enumerate(zip(rows, documents, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
        weights[row, : len(tokens)] = torch.tensor(loss_weights)
        for slot, words in enumerate(document.slots or ()):
            for place, (word, weight) in enumerate(words):
                slot_ids[row, slot, place] = word_id(tokenizer, word)
                slot_weights[row, slot, place] = weight
    return Corpus(ids, weights, slot_ids, slot_weights)


def word_id(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """Return the one id of a word of the world.

    Raises:
        ValueError: If the tokenizer cuts it into several.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} has {len(ids)} tokens")
    return int(ids[0])


def _draw_chunk(job: tuple[int, int]) -> list[Document]:
    seed, count = job
    draw = random.Random(seed)
    return [draw_document(draw) for _ in range(count)]


def _tokenise(
    document: Document, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[float]]:
    ids, weights = [int(tokenizer.bos_token_id)], [0.0]
    for text, is_answer in document.pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        weights += [_ANSWER_WEIGHT if is_answer else _PROMPT_WEIGHT] * len(piece)
    slot = tokenizer.convert_tokens_to_ids(SLOT)
    return ids, [0.0 if token == slot else w for token, w in zip(ids, weights, strict=True)]


def fill_slots(embeds: Tensor, is_slot: Tensor, content: Tensor, training: bool) -> Tensor:
    """Put slot contents, distorted at random, where the slots are.

    Args:
        embeds: (B, L, D) as looked up.
        is_slot: (B, L).
        content: (R, 16, D) for the rows that have slots.
        training: Whether gain, offset, noise and scale are drawn.
    """
    if training:
        rows, device = content.shape[0], content.device

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(rows, 1, 1, device=device) * (high - low) + low

        size = embeds.detach()[~is_slot].pow(2).mean().sqrt()
        is_blind = torch.rand(rows, 1, 1, device=device) < 0.08
        gain = torch.where(is_blind, torch.zeros(rows, 1, 1, device=device), uniform(0.2, 1.5))
        offset = torch.randn(rows, 1, content.shape[-1], device=device) * size * uniform(0, 1.2)
        noise = torch.randn_like(content) * size * uniform(0, 1.0)
        content = (gain * content + offset + noise) * torch.exp(uniform(-0.8, 0.8))
    return embeds.masked_scatter(is_slot[..., None], content.reshape(-1, content.shape[-1]))


def pretrain_language(
    folder: Path, device: torch.device, *, steps: int, num_documents: int, processes: int
) -> None:
    """Pretrain the language model and write it with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("language")
    corpus = draw_corpus(tokenizer, num_documents, 11, processes)
    model = GemmaForCausalLM(_config(len(tokenizer))).to(device)
    slot = tokenizer.convert_tokens_to_ids(SLOT)
    generator = torch.Generator().manual_seed(0)
    num_training = num_documents - min(512, num_documents // 5)

    def losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = corpus.ids[rows].long().to(device)
        length = int((ids != 0).sum(1).max())
        ids, weights = ids[:, :length], corpus.weights[rows].to(device)[:, :length]
        lookup = model.get_input_embeddings()
        embeds, is_slot = lookup(ids), ids == slot
        has_slots = is_slot.any(1)
        words = lookup(corpus.slot_ids[rows].long().to(device)[has_slots])
        content = (words * corpus.slot_weights[rows].to(device)[has_slots][..., None]).sum(2)
        embeds = fill_slots(embeds, is_slot, content, model.training)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs_embeds=embeds, attention_mask=(ids != 0).long()).logits
        logits = logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        weights = weights[:, 1:] * (ids[:, 1:] != 0)
        is_right = logits.argmax(-1) == ids[:, 1:]
        return (loss * weights).sum() / weights.sum(), is_right, weights * has_slots[:, None]

    def loss_of(step: int) -> Tensor:
        model.train()
        return losses(torch.randint(0, num_training, (256,), generator=generator))[0]

    @torch.no_grad()
    def measure() -> str:
        model.eval()
        _, is_right, weights = losses(torch.arange(num_training, num_documents))
        is_answer = weights >= _ANSWER_WEIGHT
        return f"right answer tokens from slots {is_right[is_answer].float().mean():.3f}"

    optimise(
        list(model.parameters()),
        loss_of,
        steps=steps,
        learning_rate=3e-3,
        report=reporter("language", measure),
    )
    save_half(model, folder)
    tokenizer.save_pretrained(str(folder))


def _config(vocabulary: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=512,
        initializer_range=1 / math.sqrt(128),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
