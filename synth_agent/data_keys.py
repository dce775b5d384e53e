"""Which statistics belong to a seed set, without reading its pictures again.

The statistics table is keyed by the contents of texts and pictures. `keys.json` beside it remembers
the key under the digest of the seed file, as of its last analysis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from synth_agent.data import atomic_file

KEYS_NAME = "keys.json"


def sample_digest(text: str, contents: Iterable[str]) -> str:
    """Return what the table knows a sample by.

    Args:
        text: The sample's text.
        contents: Digests of its pictures' contents, in their order.
    """
    total = hashlib.sha256(text.encode())
    for content in contents:
        total.update(f"\0{content}".encode())
    return total.hexdigest()[:32]


def remember_data_key(root: Path, seed_digest: str, data_key: str) -> None:
    """Remember the table's key of a seed file."""
    known = _read(root) | {seed_digest: data_key}
    with atomic_file(root / KEYS_NAME) as file:
        json.dump(known, file, indent=1)
        file.write("\n")


def known_data_key(root: Path, seed_digest: str) -> str | None:
    """Return the table's key of a seed file, None when it was not analysed."""
    return _read(root).get(seed_digest)


def _read(root: Path) -> dict[str, str]:
    try:
        known = json.loads((root / KEYS_NAME).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}
