"""The tokenizer's files beside a model's weights.

Copied, not written anew: what the current libraries write, the published code's cannot read (they
name another class, and spell merges as pairs). Only what training sets is changed.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Protocol

from mgm.files import read_json, write_atomically, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENIZER_CONFIG = "tokenizer_config.json"


class Tokenizer(Protocol):
    """What is needed of a tokenizer: where it came from, and how it writes itself."""

    name_or_path: str

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files into a folder."""


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
