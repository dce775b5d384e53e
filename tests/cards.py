"""A `nvidia-smi` of one's own: a small program that answers what the cards of a machine would."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

RTX_4090 = "GPU-4090, NVIDIA GeForce RTX 4090, 12, 24198, 24564, [N/A]"
BUSY_4090 = "GPU-4091, NVIDIA GeForce RTX 4090, 18012, 6198, 24564, [N/A]"
H100 = "GPU-h100, NVIDIA H100 80GB HBM3, 0, 81079, 81559, Disabled"
SMALL = "GPU-1650, NVIDIA GeForce GTX 1650, 0, 3900, 4096, [N/A]"

PROGRAM = """\
#!/bin/sh
asked=--query-gpu=uuid,name,memory.used,memory.free,memory.total,mig.mode.current
if [ "$1" != "$asked" ] || [ "$2" != --format=csv,noheader,nounits ]; then
    echo "not asked as expected: $*"
    exit 2
fi
"""


def put_cards(folder: Path, lines: Sequence[str], *, exit_code: int = 0) -> dict[str, str]:
    """Write the program into a new folder and return an environment that finds it first."""
    folder.mkdir(parents=True)
    program = folder / "nvidia-smi"
    told = "".join(f"echo '{line}'\n" for line in lines)
    program.write_text(f"{PROGRAM}{told}exit {exit_code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    return kept | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def use_cards(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> None:
    """Let this process see these cards alone; none hides those that the machine has."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    if lines:
        monkeypatch.setenv("PATH", put_cards(folder, lines)["PATH"])
    else:
        folder.mkdir(parents=True)
        monkeypatch.setenv("PATH", str(folder))
