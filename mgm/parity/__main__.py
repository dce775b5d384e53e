"""`python -m mgm.parity DIR [--json]`: exit code 0 within tolerance, 1 beyond, 2 bad input."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mgm.errors import InputError
from mgm.parity import forward, pictures, published, sampling, scoring, text, training
from mgm.parity.report import Check, format_table

KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Iterator[Check]]], ...] = (
    (published.recognises, published.check),
    (forward.recognises, forward.check),
    (text.recognises, text.check),
    (pictures.recognises, pictures.check),
    (sampling.recognises, sampling.check),
    (training.recognises, training.check),
    (scoring.recognises_textvqa, scoring.check_textvqa),
    (scoring.recognises_mmbench, scoring.check_mmbench),
)


def find_checks(root: Path) -> Iterator[Check]:
    """Yield the comparisons of every reference folder at or below `root`.

    Raises:
        InputError: If there is no such folder, or nothing in it is a reference.
    """
    if not root.is_dir():
        raise InputError("Folder not found", str(root))
    is_empty = True
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        for recognises, check in KINDS:
            if recognises(folder):
                is_empty = False
                name = str(folder.relative_to(root)) if folder != root else folder.name
                yield from (replace(found, folder=name) for found in _run(check, folder))
    if is_empty:
        raise InputError("Nothing to compare", f"{root} holds no reference folder")


def _run(check: Callable[[Path], Iterator[Check]], folder: Path) -> Iterator[Check]:
    """Yield a folder's comparisons; one that cannot be read through is a failed comparison."""
    try:
        yield from check(folder)
    except InputError as error:
        yield Check("folder", "readable", math.inf, 0, str(error))
    except KeyError as error:
        yield Check("folder", "readable", math.inf, 0, f"{error} is missing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(prog="python -m mgm.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="reference folder, or a parent of several")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        checks = list(find_checks(options.folder))
    except InputError as error:
        if options.json:
            print(json.dumps({"error": error.as_dict()}))
        else:
            print(error, file=sys.stderr)
        return 2
    is_ok = all(check.is_ok for check in checks)
    if options.json:
        print(json.dumps({"is_ok": is_ok, "checks": [check.as_dict() for check in checks]}))
    else:
        print(format_table(checks))
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
