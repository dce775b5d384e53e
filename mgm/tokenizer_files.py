"""The tokenizer's files beside a model's weights: loaded, and put beside other weights.

They are copied, not written anew: what the current libraries write, the published code's cannot read
(they name another class, and spell merges as pairs). Only what training sets is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, GemmaConfig, PreTrainedTokenizerBase

from mgm.errors import InputError
from mgm.files import read_json, write_atomically, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
"""Either of them holds the vocabulary."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer: where it came from, and how it writes itself."""

    name_or_path: str

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files into a folder."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer.

    Where a folder has no vocabulary, the library makes an empty one of the model's type and says
    nothing: every text would become unknown tokens.

    Raises:
        InputError: If the vocabulary is missing or cannot be read.
    """
    folder = folder.expanduser()
    files = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
    if not files:
        raise InputError(
            "No tokenizer",
            f"{folder} holds neither of {', '.join(VOCABULARY_FILES)}",
            "copy the tokenizer's files beside the weights",
        )
    if files[0].suffix == ".json":
        read_json(files[0])  # the library's own error for a damaged file names nothing
    try:
        # By Gemma's configuration in every folder: a full model's own has a kind that the library does
        # not know, of which it warns, and would choose the class by.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, config=GemmaConfig()
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            "Unusable tokenizer",
            f"{files[0]}: {reason}",
            "copy a tokenizer.json beside the weights",
        ) from error
    return tokenizer


def refuse_unknown_tokens(
    texts: Iterable[Sequence[int]], vocabulary: int, tokenizer: Tokenizer
) -> None:
    """Check that the model has an embedding for every token.

    Args:
        texts: Token ids of each text; negative ones stand for pictures.
        vocabulary: Rows of the embedding.
        tokenizer: That gave them.

    Raises:
        InputError: If one lies beyond the embedding.
    """
    highest = max((max(ids, default=0) for ids in texts), default=0)
    if highest >= vocabulary:
        raise InputError(
            "Tokenizer of another model",
            f"{tokenizer.name_or_path}: it gives token {highest}, and the embedding has {vocabulary} rows",
            "use the tokenizer that belongs to these weights",
        )


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_length: int | None, padding_side: str
) -> None:
    """Put a tokenizer's files into a folder, as they were where it was loaded from.

    A tokenizer that was not loaded from a folder writes itself.

    Args:
        max_length: Longest sequence in tokens, noted as published; None leaves what is noted.
        padding_side: `right` or `left`, likewise.
    """
    source = Path(tokenizer.name_or_path)
    if not (source / TOKENIZER_CONFIG).is_file():
        tokenizer.save_pretrained(str(folder))
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            write_atomically(folder / name, partial(shutil.copyfile, source / name))
    noted = read_json(source / TOKENIZER_CONFIG)
    noted["padding_side"] = padding_side
    if max_length is not None:
        noted["model_max_length"] = max_length
    write_json(folder / TOKENIZER_CONFIG, noted)
