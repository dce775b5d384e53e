"""Settings of a program: a dataclass from a configuration file and command-line flags.

Owns the precedence (default, then `--config FILE`, then flag) and the conversion of texts to the
types of the dataclass's fields. Every field is a flag: `max_new_tokens` is `--max-new-tokens`.
A field's help is the `help` of its metadata; where other settings decide its default, `default`
there says how.
"""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mgm.errors import InputError

Settings = TypeVar("Settings")


def parse_settings(
    kind: type[Settings],
    arguments: Sequence[str] | None,
    *,
    program: str,
    description: str,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Settings:
    """Return the settings that the command line and its configuration file give.

    Args:
        kind: Dataclass whose fields are str, int, float, bool, Path, Literal, or one of these
            or None.
        arguments: Flags; None takes those of the process.
        program: How the program is started, for the usage text.
        description: What the program does, for the usage text; printed as it stands.
        defaults: What the given settings imply for the others, before the dataclass's defaults.

    Raises:
        InputError: an unknown key, a value of the wrong type, or a setting that is missing.
        SystemExit: an unknown flag, or `--help`.
    """
    hints = get_type_hints(kind)
    parser = _parser(kind, hints, program, description)
    given = vars(parser.parse_args(arguments))
    path: Path | None = given.pop("config", None)
    values = {} if path is None else _read_config(path, hints)
    values.update(
        {
            name: _convert(value, hints[name], f"--{name.replace('_', '-')}")
            for name, value in given.items()
        }
    )
    if defaults is not None:
        values = {**defaults(values), **values}
    for field in _fields(kind):
        if field.name not in values and _is_required(field):
            flag = f"--{field.name.replace('_', '-')}"
            raise InputError(
                "Missing setting",
                f"{flag} is needed",
                f"Give {flag}, or {field.name} in the configuration file.",
            )
    return kind(**values)


def _fields(kind: type[Any]) -> tuple[Field[Any], ...]:
    return fields(kind)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _parser(
    kind: type[Any], hints: Mapping[str, Any], program: str, description: str
) -> argparse.ArgumentParser:
    # Defaults are suppressed, so that a flag that is not given leaves the file's value alone.
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML or JSON file with settings by name")
    for field in _fields(kind):
        flag = f"--{field.name.replace('_', '-')}"
        text = _help(field, hints[field.name]).replace("%", "%%")
        if bool in _alternatives(hints[field.name]):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, help=text, metavar="VALUE")
    return parser


def _help(field: Field[Any], hint: Any) -> str:
    text = str(field.metadata.get("help", ""))
    notes = [_spell(kind) for kind in _alternatives(hint) if get_origin(kind) is Literal]
    if not _is_required(field) and field.default is not None:
        notes.append(f"default: {field.metadata.get('default', field.default)}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _read_config(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("Bad configuration", f"{path}: {error}", "Write YAML or JSON.") from error
    if not isinstance(document, dict):
        raise InputError("Bad configuration", f"{path} has no keys", "Write 'name: value' lines.")
    for name in document:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise InputError(
                "Unknown setting", f"{path}, key {name!r}", f"Did you mean {close[0]!r}?"
            )
    return {
        name: _convert(value, hints[name], f"{path}, key {name!r}")
        for name, value in document.items()
    }


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return the value as the first alternative of the type hint that takes it."""
    alternatives = _alternatives(hint)
    if value is None and type(None) in alternatives:
        return None
    wanted = [kind for kind in alternatives if kind is not type(None)]
    for kind in wanted:
        try:
            return _convert_to(value, kind)
        except (ValueError, TypeError):
            continue
    expected = " or ".join(_spell(kind) for kind in wanted)
    raise InputError("Bad setting", f"{where}: {value!r}", f"Give {expected}.")


def _convert_to(value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError
        return value
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    if kind in (str, Path) and not isinstance(value, str | int | float):
        raise TypeError
    return Path(value).expanduser() if kind is Path else kind(value)


def _spell(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return names.get(kind, "a text")
