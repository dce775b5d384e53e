"""Conversations as text, ids and labels, against the original's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mgm.errors import InputError
from mgm.model import IGNORE_INDEX, IMAGE_TOKEN_ID
from mgm.parity.text import load_tokenizer
from mgm.prompt import encode, encode_prompt, generation_prompt, normalise_image_marker, render

FOLDER = Path(__file__).parent.parent / "data" / "golden" / "conversations"
STORED = json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))
CONVERSATIONS = [*STORED["gemma"], *STORED["plain"]]


def _name(case: dict[str, Any]) -> str:
    return f"{case.get('template', 'prompt')}-{case['name']}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(FOLDER)


@pytest.mark.parametrize("case", [c for c in CONVERSATIONS if "error" not in c], ids=_name)
def test_text_ids_and_labels_are_the_originals(
    case: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    arguments = (case["conversation"], case["template"], case["has_image"])
    if "prompt" in case:
        assert render(*arguments) == case["prompt"]
    encoded = encode(
        case["conversation"],
        tokenizer,
        case["template"],
        case["has_image"],
        case["model_max_length"],
    )
    assert encoded.input_ids == case["input_ids"]
    assert encoded.labels == case["labels"]
    assert encoded.num_labels == sum(label != IGNORE_INDEX for label in case["labels"])


@pytest.mark.parametrize("case", [c for c in CONVERSATIONS if "error" in c], ids=_name)
def test_what_the_original_cannot_take_is_refused(
    case: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError):
        encode(
            case["conversation"],
            tokenizer,
            case["template"],
            case["has_image"],
            case["model_max_length"],
        )


@pytest.mark.parametrize("case", STORED["generation_prompts"], ids=_name)
def test_generation_prompts(case: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_prompt(case["prompt"], tokenizer) == case["input_ids"]
    message, marker = case["user_message"], "<image>\n"
    if message.startswith(marker) or "<image>" not in message:
        has_image = message.startswith(marker)
        assert generation_prompt(message.removeprefix(marker), has_image) == case["prompt"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("What?", "What?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("A <image> B", "<image>\nA  B"),
        ("<image>", "<image>"),
        ("<image><image>two", "<image>\ntwo"),
    ],
)
def test_the_image_marker_moves_to_the_front_once(message: str, expected: str) -> None:
    assert normalise_image_marker(message) == expected


def test_without_a_picture_the_marker_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = [{"from": "human", "value": "A <image> B"}, {"from": "gpt", "value": "C"}]
    assert "A <image> B" in render(conversation, has_image=False)
    assert IMAGE_TOKEN_ID not in encode(conversation, tokenizer, has_image=False).input_ids


def test_roles_that_do_not_alternate_are_named() -> None:
    messages = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    with pytest.raises(InputError, match="message 2 is from 'human', expected 'gpt'"):
        render(messages)
