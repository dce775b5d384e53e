"""JSON files, and writing any file without leaving half of it behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgm.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `~` at the start of the path is the home folder.

    Raises:
        InputError: If the file is missing or unreadable, or holds anything else.
    """
    path = path.expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("File not found", str(path), "check the path") from None
    except OSError as error:
        raise InputError("Cannot read file", f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("Not a JSON file", f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError("Not a JSON object", str(path))
    return content


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path` and rename, so that a reader never meets half a file."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))
