"""Reading YAML from anybody, and values that stay small, finite and visible.

Only plain values are built. What is refused while it is read is never built at all.
"""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import yaml

from synth_agent.errors import InvalidInput

LONGEST_FILE = 64 * 1024
LONGEST_TEXT = 4000
MOST_NODES = 4000
DEEPEST = 24
LARGEST_NUMBER = 2**63
_LARGEST_DEFAULT = 1.7976931348623157e308
"""The default upper bound of some operators, which a written-out recipe repeats."""
_CORE_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")
)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
"""Unicode categories: controls, formats such as direction marks, private use, separators."""
_JOINERS = "\u200c\u200d"
"""Invisible, and necessary in several scripts and in emoji."""


def read_mapping(text: str, where: str) -> object:
    """Read the YAML of a recipe or proposal from anybody.

    Only plain values are built. A file is refused that is long, deep, repeats a key, grows by
    aliases, names a tag, or holds characters that a person approving it would not see.

    Args:
        text: The file's text.
        where: The file's name, for errors.

    Returns:
        What the YAML holds.

    Raises:
        InvalidInput: naming the file, the line and the fix.
    """
    if len(text) > LONGEST_FILE:
        raise InvalidInput(
            "Recipe is too long",
            f"{where}: more than {LONGEST_FILE} characters",
            f"write at most {LONGEST_FILE}",
        )
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if hidden := _hidden(text):
        line = text.count("\n", 0, text.index(hidden)) + 1
        raise InvalidInput(
            "Hidden character",
            f"{where}, line {line}: {ascii(hidden)}",
            "leave the character out",
        )
    reader = _Reader(text)
    reader.where = where
    try:
        return reader.get_single_data()
    except yaml.YAMLError as error:
        raise InvalidInput(
            "Recipe is not YAML", f"{where}: {error}", "correct the syntax"
        ) from error
    except ValueError as error:
        raise InvalidInput(
            "Recipe is not YAML", f"{where}: {error}", "correct the number or date"
        ) from error
    finally:
        reader.dispose()


class _Reader(yaml.SafeLoader):
    """A YAML reader that refuses while it reads, before anything large is built."""

    where = ""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise InvalidInput("Recipe is nested too deeply", self.where, "nest less")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            self._refuse("Recipe holds itself", node, "write the values out, without aliases")
        if node is None:
            return None
        if node.tag not in _CORE_TAGS:
            self._refuse(f"YAML tag refused: {shown(node.tag)}", node, "write a plain value")
        size = 1 + self._children(node)
        self._sizes[id(node)] = size
        if size > MOST_NODES or len(self._sizes) > MOST_NODES:
            self._refuse("Recipe is too large", node, "write fewer values, without aliases")
        return node

    def _children(self, node: Any) -> int:
        """Return the size of what a node holds, in values and 100 characters of text."""
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) // 100
        if isinstance(node, yaml.SequenceNode):
            return sum(self._sizes[id(child)] for child in node.value)
        keys: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                self._refuse("Key is not a name", key, "write names as keys, in quotes if needed")
            if key.value in keys:
                self._refuse(f"Key is there twice: {shown(key.value)}", key, "keep one of them")
            keys.add(key.value)
        return sum(self._sizes[id(child)] for pair in node.value for child in pair)

    def _refuse(self, title: str, at: Any, hint: str) -> None:
        raise InvalidInput(title, f"{self.where}, line {at.start_mark.line + 1}", hint)


def check_shape(where: str, value: object) -> None:
    """Check that a value is plain, finite, visible and of a size that can be worked with.

    Raises:
        InvalidInput: naming the key under which the offending value is.
    """
    left = MOST_NODES
    stack: list[tuple[str, object, int]] = [(where, value, 0)]
    while stack:
        place, item, depth = stack.pop()
        left -= 1
        if left < 0:
            raise InvalidInput("Recipe is too large", place, "write fewer values")
        if depth > DEEPEST:
            raise InvalidInput("Recipe is nested too deeply", where, "nest less")
        if isinstance(item, Mapping):
            for key, inner in item.items():
                _check_key(place, key)
                stack.append((f"{place}, {key}" if depth < 3 else place, inner, depth + 1))
        elif isinstance(item, list | tuple):
            stack.extend((place, inner, depth + 1) for inner in item[: MOST_NODES + 1])
        else:
            _check_scalar(place, item)


def _check_key(place: str, key: object) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidInput(
            "Bad name", f"{place}: {shown(key)}", "use ASCII letters, digits and _ in names"
        )


def _check_scalar(place: str, value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput("Not a number", f"{place}: {value}", "give a finite number")
        if abs(value) > LARGEST_NUMBER and value != _LARGEST_DEFAULT:
            raise InvalidInput("Number is too large", place, "give a number below 2**63")
        return
    if not isinstance(value, str):
        raise InvalidInput(
            "Wrong type",
            f"{place}: {type(value).__name__}",
            "give text, a number, true, false, null, a list or a mapping",
        )
    if len(value) > LONGEST_TEXT:
        raise InvalidInput(
            "Text is too long", f"{place}: {len(value)} characters", f"give at most {LONGEST_TEXT}"
        )
    if hidden := _hidden(value):
        raise InvalidInput(
            "Hidden character", f"{place}: {ascii(hidden)}", "leave the character out"
        )


def _hidden(text: str) -> str:
    """Return the first character of a text that a person would not see for what it is."""
    for character in text:
        if character in "\n\t":
            continue
        if unicodedata.category(character) in _HIDDEN and character not in _JOINERS:
            return character
    return ""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 3


def shown(value: object) -> str:
    """Return a value as short text that cannot disturb a terminal."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = _REPR.repr(value)
    return text if text.isascii() else ascii(text)[1:-1]


def printable(text: str) -> str:
    """Return a place as text without characters that a person would not see."""
    if len(text) > 400:
        text = f"{text[:400]}..."
    return text if not _hidden(text) and "\n" not in text else ascii(text)[1:-1]
