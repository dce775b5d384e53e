"""The tokenizer of the mini world's models: byte pairs in which a common word is one token.

Spaces are dropped and a word's last piece is marked, so that a word has the same id wherever it
stands: a model of a million parameters cannot afford to learn two ids for one word.
"""

from __future__ import annotations

import json
import random
import string
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from synth_agent.miniworld import language
from synth_agent.miniworld.scene import WORDS, draw_scene

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<slot>")
SLOT = "<slot>"
"""Stands for one row of a picture while the language model is pretrained."""
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 50265
"""Where Data-Juicer's captioning operator expects the image token, whatever the tokenizer says."""
_VOCABULARY = 768
_PIECES = Regex(r"\n|\d|[A-Za-z']+|[^\sA-Za-z\d]")
_NUM_TEXTS = 4000


def build_tokenizer(kind: Literal["language", "clip", "captioner"]) -> PreTrainedTokenizerFast:
    """Train the tokenizer; all kinds share the vocabulary.

    Args:
        kind: `language` puts `<bos>` in front, as Gemma's does; `clip` adds `<eos>` at the end;
            `captioner` is `language` with an image token far behind the words.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_PIECES, "removed", invert=True)
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    letters = [letter for letter in string.printable if not letter.isspace()]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(SPECIAL),
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=[*letters, "\n"],
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    end = " <eos>" if kind == "clip" else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A{end}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>")],
    )
    extra = ["<start_of_turn>", "<end_of_turn>", SLOT]
    if kind == "captioner":
        tokenizer = _with_image_token(tokenizer)
        extra.append(IMAGE_TOKEN)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=extra,
        padding_side="right",
        model_max_length=64 if kind == "clip" else 512,
        model_input_names=["input_ids", "attention_mask"],
    )


def _with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with the image token at its id, which adding it would not give."""
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][IMAGE_TOKEN] = IMAGE_TOKEN_ID
    like = content["added_tokens"][0]
    content["added_tokens"].append({**like, "id": IMAGE_TOKEN_ID, "content": IMAGE_TOKEN})
    return Tokenizer.from_str(json.dumps(content))


def _texts() -> list[str]:
    draw = random.Random(0)
    texts: list[str] = []
    for _ in range(_NUM_TEXTS):
        scene = draw_scene(draw)
        texts.append(language.caption(scene, draw))
        for question in language.questions(scene)[:6]:
            texts.append(f"{language.short_prompt(question.text)}\n{question.answer}")
            texts.append(language.letter_prompt(question.text, language.options(question, draw)))
    texts += list(WORDS) * 200 + list(language.DESCRIBE) * 200
    texts += [language.advert(draw) for _ in range(6000)]
    texts += ["user model\n unanswerable"] * 50
    return texts
