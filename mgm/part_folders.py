"""Where the parts of a model are that its checkpoint does not hold itself.

A published config.json notes the absolute paths of the machine that trained it. Owns the order in
which a part's folder is looked for: the one that was given, the noted path, and a folder of the
noted name in the checkpoint's folder or near it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mgm.errors import InputError

CLIP_FIELD = "mm_vision_tower"
CONVNEXT_FIELD = "mm_vision_tower_aux"
LANGUAGE_FIELD = "base_model_name_or_path"
_SOURCES = {
    CLIP_FIELD: ("config.json", "--vision-tower"),
    CONVNEXT_FIELD: ("config.json", "--high-resolution-tower"),
    LANGUAGE_FIELD: ("adapter_config.json", "--language-model"),
}
"""Field -> file that notes it, and flag by which a program is given the folder instead."""
_ANCESTORS = 3
_NOTED_PARTS = 3


def find_part(field: str, noted: str, given: Path | None, checkpoint: Path) -> Path:
    """Return the folder of a tower or of the language model.

    Args:
        field: That notes the folder.
        noted: Its value; may be empty or of another machine.
        given: Folder that the user named; nothing else is then looked at.
        checkpoint: Folder of the checkpoint.

    Raises:
        InputError: Naming the field and the flag, if there is no such folder.
    """
    file, flag = _SOURCES[field]
    if given is not None:
        folder = given.expanduser()
        if folder.is_dir():
            return folder
        raise InputError("Folder not found", f"{flag} {folder}", "check the path")
    for folder in _candidates(noted, checkpoint.expanduser()):
        if folder.is_dir():
            return folder
    raise InputError(
        "A part of the model is missing",
        f"{checkpoint / file}: {field} = {noted!r} is no folder here, none of that name lies near "
        "the checkpoint, and the checkpoint does not hold the part itself",
        f"give the folder with {flag}, or put it beside the checkpoint",
    )


def _candidates(noted: str, checkpoint: Path) -> Iterator[Path]:
    """Yield where a part may be: as noted, then near the checkpoint under the noted name."""
    parts = [part for part in Path(noted).parts if part not in ("/", "..", "~")]
    if not parts:
        return
    yield Path(noted).expanduser()
    checkpoint = checkpoint.absolute()
    for ancestor in [checkpoint, *checkpoint.parents][:_ANCESTORS]:
        for count in range(min(_NOTED_PARTS, len(parts)), 0, -1):
            yield ancestor.joinpath(*parts[-count:])
