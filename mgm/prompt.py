"""Text of conversations, their token ids, and which of them are learned.

Owns the templates `gemma` (both training stages and all answering) and `plain`, the place of the
image marker, and the label mask. Tokenisation is piecewise around the image marker, so that no token
spans it.

Source: Mini-Gemini's training code, `mgm/train/train.py` and `mgm/conversation.py`, as run by the
Better Synth kit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from mgm.errors import InputError
from mgm.model import IGNORE_INDEX, IMAGE_TOKEN_ID

Template = Literal["gemma", "plain"]
Conversation = Sequence[Mapping[str, str]]

IMAGE_MARKER = "<image>"
EOS = "<eos>"
_OPEN = "<start_of_turn>"
_CLOSE = "<end_of_turn>\n"
_MODEL_HEADER = f"{_OPEN}model\n"
_ROLES = {"human": "user", "gpt": "model"}


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and what of them is learned."""

    input_ids: list[int]
    """IMAGE_TOKEN_ID stands where the rows of a picture go."""
    labels: list[int]
    """The ids that count in the loss, IGNORE_INDEX elsewhere."""

    @property
    def num_labels(self) -> int:
        """Tokens that count in the loss; zero when the mask could not be placed."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    def num_labels_within(self, limit: int, tokens_of_picture: int) -> int:
        """Return the tokens that count once pictures are in place and the rest is cut off.

        Args:
            limit: Longest sequence in positions.
            tokens_of_picture: Positions that a picture takes.
        """
        pictures = self.input_ids.count(IMAGE_TOKEN_ID)
        if len(self.input_ids) + pictures * (tokens_of_picture - 1) <= limit:
            return self.num_labels
        count, place = 0, 0
        for token, label in zip(self.input_ids, self.labels, strict=True):
            count += label != IGNORE_INDEX and place < limit
            place += tokens_of_picture if token == IMAGE_TOKEN_ID else 1
        return count


def normalise_image_marker(text: str) -> str:
    """Move the image marker of a message to its front, once, on a line of its own."""
    if IMAGE_MARKER not in text:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


def render(conversation: Conversation, template: Template = "gemma", has_image: bool = True) -> str:
    """Return the text of a conversation.

    Args:
        conversation: Messages with `from` (`human` or `gpt`) and `value`.
        template: `gemma`, or `plain` for bare captions.
        has_image: Whether the sample has a picture; without one an image marker is plain text.

    Raises:
        InputError: If the roles are unknown or do not alternate.
    """
    if template == "plain":
        return _render_plain(conversation)
    text = ""
    for role, message in _turns(conversation):
        value = normalise_image_marker(message) if has_image else message
        if not value:
            text += f"{_OPEN}{role}\n"
            continue
        text += f"{_OPEN}{role}\n{value}{_CLOSE}" + (EOS if role == "model" else "")
    return text


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "gemma",
    has_image: bool = True,
    model_max_length: int = 2048,
) -> Encoded:
    """Return the ids and labels of a conversation.

    Samples with a picture are not cut here: the collator and the model cut them after the picture's
    rows have taken their place.

    Raises:
        InputError: As `render`; or for `plain`, if there are not two messages with a picture.
    """
    if template == "plain":
        return _encode_plain(conversation, tokenizer)
    text = render(conversation, template, has_image)
    if has_image:
        ids = encode_prompt(text, tokenizer)
    else:
        ids = list(tokenizer(text, truncation=True, max_length=model_max_length).input_ids)
    return Encoded(ids, _labels(text, ids, tokenizer, has_image, model_max_length))


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text, with IMAGE_TOKEN_ID at every image marker."""
    chunks = [list(tokenizer(chunk).input_ids) for chunk in text.split(IMAGE_MARKER)]
    offset = int(bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id)
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, IMAGE_TOKEN_ID, *chunk[offset:]]
    return ids


def generation_prompt(question: str, has_image: bool = True) -> str:
    """Return the text that asks the model for an answer."""
    value = f"{IMAGE_MARKER}\n{question}" if has_image else question
    return f"{_OPEN}user\n{value}{_CLOSE}{_MODEL_HEADER}"


def _turns(conversation: Conversation) -> list[tuple[str, str]]:
    """Return (role, message) pairs; a leading message that is not the human's is dropped."""
    messages = list(conversation)
    if messages and messages[0].get("from") != "human":
        messages = messages[1:]
    turns = []
    for position, message in enumerate(messages):
        sender = message.get("from", "")
        expected = ("human", "gpt")[position % 2]
        if sender != expected:
            raise InputError(
                "Conversation is out of order",
                f"message {position + 1} is from {sender!r}, expected {expected!r}",
                "messages alternate: human, gpt, human, gpt, ...",
            )
        turns.append((_ROLES[sender], message.get("value") or ""))
    return turns


def _labels(
    text: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    has_image: bool,
    model_max_length: int,
) -> list[int]:
    """Mask everything but the answers, or everything when the rounds do not add up.

    A round's own count includes the beginning-of-sequence token and leaves out `<eos>`; the two
    cancel.
    """

    def count(piece: str) -> int:
        return len(encode_prompt(piece, tokenizer) if has_image else tokenizer(piece).input_ids)

    labels = list(ids)
    labels[0] = IGNORE_INDEX
    position = 1
    for exchange in text.split(EOS):
        parts = exchange.split(_MODEL_HEADER)
        if len(parts) != 2:
            break
        instruction = count(parts[0] + _MODEL_HEADER) - 1
        end = min(position + instruction, len(labels))
        labels[position:end] = [IGNORE_INDEX] * (end - position)
        position += count(exchange)
    labels[position:] = [IGNORE_INDEX] * max(len(labels) - position, 0)
    real = sum(token != tokenizer.pad_token_id for token in ids)
    if position != real and position < model_max_length:
        return [IGNORE_INDEX] * len(ids)
    return labels


def _render_plain(conversation: Conversation) -> str:
    if len(conversation) != 2 or IMAGE_MARKER not in conversation[0].get("value", ""):
        raise InputError(
            "Not a captioned picture",
            f"the plain template needs two messages, the first with {IMAGE_MARKER}",
            "use the gemma template",
        )
    return f"{IMAGE_MARKER}{conversation[1]['value']}\n"


def _encode_plain(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids = encode_prompt(_render_plain(conversation), tokenizer)
    start = len(encode_prompt(IMAGE_MARKER, tokenizer))
    return Encoded(ids, [IGNORE_INDEX] * start + ids[start:])
