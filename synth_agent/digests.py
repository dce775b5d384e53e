"""Content digests of files and folders, remembered so that unchanged data costs only a stat.

Owns `artifacts/cache/digests.json`: for every file its size, modification time, inode and sha256.
The memory can be deleted at any time; it changes how long a digest takes, never what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from synth_agent.errors import InvalidInput
from synth_agent.workspace import Workspace

_BLOCK_BYTES = 1 << 20
_Known = dict[str, tuple[list[int], str]]


class Digests:
    """Digests of a workspace's inputs. Call `save` to remember what was read."""

    def __init__(self, workspace: Workspace) -> None:
        self._file = workspace.artifacts / "cache" / "digests.json"
        self._known = _load(self._file)
        self._changed = False

    def path(self, path: Path) -> str:
        """Return the sha256 of a file, or of a folder's sorted relative paths and contents.

        Links are followed, to folders too: what is read through them is part of the input.

        Raises:
            InvalidInput: If there is no such file or folder.
        """
        if not path.is_dir():
            return self._of_file(path)
        try:
            found = sorted(_files_in(path, Path(os.path.realpath(path)), frozenset()))
        except OSError as error:
            raise _unreadable(Path(error.filename or path), error) from error
        return self._total((file.relative_to(path), real) for file, real in found)

    def files(self, root: Path, paths: Iterable[Path]) -> str:
        """Return one sha256 of files under `root`, in the order given."""
        return self._total((path.relative_to(root), path) for path in paths)

    def _total(self, files: Iterable[tuple[Path, Path]]) -> str:
        total = hashlib.sha256()
        for name, path in files:
            # The bytes of the name as the disk has them, which need not be UTF-8.
            total.update(os.fsencode(name) + f"\0{self._of_file(path)}\n".encode())
        return total.hexdigest()

    def save(self) -> None:
        """Write the memory, completely or not at all."""
        if not self._changed:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_text(json.dumps(self._known), encoding="utf-8")
        partial.replace(self._file)
        self._changed = False

    def _of_file(self, path: Path) -> str:
        try:
            stat = path.stat()
            # A change can keep size and time of writing, but not the time of the change itself.
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            known = self._known.get(str(path))
            if known is not None and known[0] == stamp:
                return known[1]
            digest = _sha256(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        self._known[str(path)] = (stamp, digest)
        self._changed = True
        return digest


def _unreadable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        "Cannot read input", f"{path}: {error.strerror}", "check the path in synth.yaml"
    )


def _files_in(
    folder: Path, real: Path, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder, and where each really is: one memory for all links to it."""
    status = real.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to a folder that holds the link.
    with os.scandir(real) as entries:
        for entry in entries:
            place = real / entry.name
            if entry.is_dir():
                inner = Path(os.path.realpath(place)) if entry.is_symlink() else place
                yield from _files_in(folder / entry.name, inner, above | {identity})
            elif entry.is_file():
                yield folder / entry.name, place


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _load(path: Path) -> _Known:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {name: (list(entry[0]), str(entry[1])) for name, entry in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return {}
