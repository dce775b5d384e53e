"""Pictures that operators made: into the processed data set, beside links to the seed's.

Operators write their pictures anywhere under `artifacts/`. A data set has one image folder, so that one
with made pictures gets a folder of its own: `images/synthetic_images/` holds them under the digests
of their contents, and links lead to the seed's pictures, whose relative paths stay as they are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from synth_agent.data import ROW_ID_FIELD, Sample
from synth_agent.errors import InvalidInput

SYNTHETIC = "synthetic_images"
"""The competition's name for the folder of made pictures."""


def adopt_pictures(
    rows: Sequence[Mapping[str, Any]], seed: Sequence[Sample], image_root: Path, output: Path
) -> tuple[list[dict[str, Any]], Path]:
    """Copy the pictures that are not the seed's own into a processed data set.

    Args:
        rows: Samples with the row id and absolute paths, or paths relative to the working directory.
        seed: The seed samples; a row id is a position in this list.
        image_root: The seed's image folder.
        output: Folder of the processed data set.

    Returns:
        The rows with the copies' paths, and the image folder of the data set: `output/images`, or
        the seed's where no picture was made.

    Raises:
        InvalidInput: a made picture is missing, or the seed has a folder of the same name.
    """
    root = os.path.abspath(image_root)  # noqa: PTH100  links are kept: the image folder often is one
    copies: dict[str, str] = {}
    adopted = []
    for row in rows:
        own = {os.path.join(root, image) for image in seed[row[ROW_ID_FIELD]].images}  # noqa: PTH118
        images = []
        for path in row["images"]:
            if path not in own and path not in copies:
                copies[path] = str(_copied(Path(path), output / "images" / SYNTHETIC))
            images.append(path if path in own else copies[path])
        adopted.append({**row, "images": images})
    if not copies:
        return adopted, image_root
    for name in sorted({PurePosixPath(image).parts[0] for one in seed for image in one.images}):
        if name == SYNTHETIC:
            raise InvalidInput(
                "Folder name is taken", f"{image_root / name}", "name the seed's folder otherwise"
            )
        (output / "images" / name).symlink_to(os.path.join(root, name))  # noqa: PTH118
    return adopted, output / "images"


def _copied(picture: Path, folder: Path) -> Path:
    """Copy a picture under its content's digest and return the copy's absolute path."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with picture.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
        copy = folder.absolute() / f"{digest}{picture.suffix.lower()}"
        if not copy.exists():
            shutil.copyfile(picture, copy)
    except OSError as error:
        raise InvalidInput(
            "Picture is missing", f"{picture}: {error.strerror}", "let the recipe make it again"
        ) from error
    return copy
