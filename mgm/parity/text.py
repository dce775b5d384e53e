"""Conversation folders: rendered text, token ids and labels, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mgm.errors import InputError
from mgm.files import read_json
from mgm.parity.report import Check, compare_exactly
from mgm.prompt import Template, encode, encode_prompt, generation_prompt, render

CONVERSATIONS_FILE = "conversations.json"
TOKENIZER_FILE = "tokenizer.json"


def recognises(folder: Path) -> bool:
    """Whether `folder` holds encoded conversations."""
    return (folder / CONVERSATIONS_FILE).is_file()


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of every conversation and every generation prompt."""
    content = read_json(folder / CONVERSATIONS_FILE)
    tokenizer = load_tokenizer(folder)
    templates: tuple[Template, ...] = ("gemma", "plain")
    for template in templates:
        for stored in content.get(template, ()):
            yield from _check_conversation(template, stored, tokenizer)
    for stored in content.get("generation_prompts", ()):
        yield from _check_prompt(stored, tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or of the one beside it that has a tokenizer.

    Raises:
        InputError: If there is none.
    """
    beside = [path for path in folder.parent.iterdir() if path.is_dir()]
    # Where several model folders lie beside it, the format's text belongs to the first model's.
    beside.sort(key=lambda path: (path.name != "model_a", path.name))
    for candidate in (folder, *beside):
        if (candidate / TOKENIZER_FILE).is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(candidate))
    raise InputError("No tokenizer", f"{folder}: no {TOKENIZER_FILE} in it or beside it")


def _check_conversation(
    template: Template, stored: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Check]:
    case = f"{template} {stored['name']}"
    conversation: Sequence[Mapping[str, str]] = stored["conversation"]
    has_image = stored["has_image"]
    try:
        encoded = encode(
            conversation,
            tokenizer,
            template=template,
            has_image=has_image,
            model_max_length=stored["model_max_length"],
        )
    except InputError:
        # The original raises errors of Python's own for what this package calls bad input.
        yield compare_exactly(case, "is refused", True, "error" in stored)
        return
    if "error" in stored:
        yield compare_exactly(case, "is refused", False, True)
        return
    if "prompt" in stored:
        text = render(conversation, template=template, has_image=has_image)
        yield compare_exactly(case, "text", text, stored["prompt"])
    yield compare_exactly(case, "token ids", _as_list(encoded.input_ids), stored["input_ids"])
    yield compare_exactly(case, "labels", _as_list(encoded.labels), stored["labels"])


def _check_prompt(stored: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    case = f"generate {stored['name']}"
    yield compare_exactly(
        case, "token ids", _as_list(encode_prompt(stored["prompt"], tokenizer)), stored["input_ids"]
    )
    message = stored["user_message"]
    marker = "<image>\n"
    if message.startswith(marker) or "<image>" not in message:
        question = message.removeprefix(marker)
        text = generation_prompt(question, has_image=message.startswith(marker))
        yield compare_exactly(case, "text", text, stored["prompt"])


def _as_list(ids: Any) -> list[int]:
    return [int(value) for value in ids]
