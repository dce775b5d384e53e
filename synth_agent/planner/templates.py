"""Prompt templates: Markdown files with `{{name}}` where a value goes. A missing value is an error.

A workspace's own `prompts/NAME.md` comes first, then the one that is installed with the program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from synth_agent.errors import InvalidInput
from synth_agent.workspace import Workspace

NAMES = ("system", "propose", "repair", "answer")
_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "shipped" / "prompts", _PACKAGE.parent / "prompts")
"""In an installed package, and in a checkout of the sources."""
_PLACE = re.compile(r"\{\{\s*([a-z_]+)\s*\}\}")
_MOST_BYTES = 32_000


def find_template(workspace: Workspace, name: str) -> Path:
    """Return the file of a template.

    Raises:
        InvalidInput: There is none.
    """
    for folder in (workspace.prompts, *_SHIPPED):
        path = folder / f"{name}.md"
        if path.is_file():
            return path
    raise InvalidInput(
        "Prompt template is missing",
        f"{workspace.prompts / name}.md",
        "install synth-agent again, or write the file",
    )


def fill(workspace: Workspace, name: str, values: Mapping[str, str]) -> str:
    """Return a template with its values; what a value holds is not looked at again.

    Raises:
        InvalidInput: There is no such template, it cannot be read, or it names what is not given.
    """
    path = find_template(workspace, name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("Cannot read prompt", f"{path}: {error}", "save it as UTF-8") from error
    if len(text) > _MOST_BYTES:
        raise InvalidInput(
            "Prompt is too long", f"{path}: {len(text)} characters", f"at most {_MOST_BYTES}"
        )

    def value(place: re.Match[str]) -> str:
        if place[1] not in values:
            raise InvalidInput(
                "Prompt names an unknown value",
                f"{path}: {{{{{place[1]}}}}}",
                f"valid names: {', '.join(sorted(values)) or 'none'}",
            )
        return values[place[1]]

    return _PLACE.sub(value, text)
