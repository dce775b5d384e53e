"""The GPUs of this machine, and cards that a person names to plan for. Owns what is read of them.

`nvidia-smi` is asked, so that nothing has to load torch to know a card. Where it is not installed
there is no card. A named card needs no machine: `parse_card("24GiB")`.
"""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from synth_agent.errors import InvalidInput, SynthAgentError

GIB = 1 << 30
_MIB = 1 << 20
DRIVER_BYTES = round(0.4 * GIB)
"""What the driver keeps of a card of 24 GiB, of which CUDA then reports 23.6."""
TIMEOUT_SECONDS = 20.0
"""A driver without persistence takes seconds to wake."""
_FIELDS = ("uuid", "name", "memory.used", "memory.free", "memory.total", "mig.mode.current")
_SIZE = re.compile(r"(?:(?P<name>.*\S)\s+)?(?P<size>\d+(?:\.\d+)?)\s*(?:GiB|GB|G)", re.IGNORECASE)


class CardUnknown(SynthAgentError):
    """There is a GPU, but what it has cannot be told."""


@dataclass(frozen=True)
class Card:
    """A GPU. Sizes are in bytes."""

    name: str
    """As its vendor calls it; empty for a card that was named by its size alone."""
    total: int
    usable: int
    """What programs may take: the total without what the driver keeps."""
    free: int
    """What no program holds at this moment."""

    def words(self) -> str:
        """Return the card in a few words."""
        return f"{self.name or 'a card'} with {self.usable / GIB:.1f} GiB"


def machine_cards(environment: Mapping[str, str]) -> tuple[Card, ...]:
    """Return the GPUs that a program started in an environment sees; none without `nvidia-smi`.

    Args:
        environment: PATH leads to `nvidia-smi`; CUDA_VISIBLE_DEVICES chooses among the cards.

    Raises:
        CardUnknown: If `nvidia-smi` fails, is silent, or says what cannot be understood.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return ()
    rows = [row for row in csv.reader(_ask(program).splitlines()) if row]
    cards = [_card([cell.strip() for cell in row]) for row in rows]
    return tuple(card for _, card in _visible(cards, environment))


def training_card(environment: Mapping[str, str]) -> Card | None:
    """Return the largest card that a program sees, None when there is none.

    Read once for each `nvidia-smi` and choice of cards; what is free is as it was then.

    Raises:
        CardUnknown: See `machine_cards`.
    """
    names = ("PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    return _largest(tuple((name, environment[name]) for name in names if name in environment))


def parse_card(text: str) -> Card:
    """Return a card that a person names: its memory, with its name before it if that matters.

    A vendor's GB of graphics memory are GiB.

    Raises:
        InvalidInput: If the text is something else.
    """
    found = _SIZE.fullmatch(text.strip())
    size = float(found["size"]) * GIB if found else 0.0
    if found is None or not DRIVER_BYTES < size < math.inf:
        raise InvalidInput("Not a card", repr(text), "write its memory: 24GiB, or 'H100 80GiB'")
    usable = round(size) - DRIVER_BYTES
    return Card(found["name"] or "", round(size), usable, usable)


@lru_cache(maxsize=8)
def _largest(environment: tuple[tuple[str, str], ...]) -> Card | None:
    return max(machine_cards(dict(environment)), key=lambda card: card.usable, default=None)


def _ask(program: str) -> str:
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise _unknown(f"{program} said nothing within {TIMEOUT_SECONDS:g} s") from None
    except OSError as error:
        raise _unknown(f"{program}: {error.strerror}") from error
    if done.returncode:
        told = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it said nothing"]
        raise _unknown(f"{program} ended with exit code {done.returncode}: {told[0]}")
    return done.stdout


def _card(row: Sequence[str]) -> tuple[str, Card]:
    """Return a card with its UUID."""
    if len(row) != len(_FIELDS):
        raise _unknown(f"nvidia-smi answered {', '.join(row)!r} to {', '.join(_FIELDS)}")
    uuid, name, *sizes, mig = row
    if mig == "Enabled":
        raise _unknown(f"{name} is divided by MIG, and how much a program gets is not told")
    if not all(size.isdecimal() for size in sizes):
        raise _unknown(f"nvidia-smi says of the memory of {name}: {', '.join(sizes)}")
    used, free, total = (int(size) * _MIB for size in sizes)
    return uuid, Card(name, total, used + free, free)


def _visible(
    cards: Sequence[tuple[str, Card]], environment: Mapping[str, str]
) -> Sequence[tuple[str, Card]]:
    """Return the cards that CUDA_VISIBLE_DEVICES leaves; like CUDA, stop at the first unknown one.

    CUDA numbers the fastest card 0 unless told to follow the bus, as `nvidia-smi` does: between
    unlike cards a number then says nothing here, and all of them are returned.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return cards
    is_alike = len({card.usable for _, card in cards}) < 2
    is_by_bus = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    found = []
    for word in (part.strip() for part in chosen.split(",")):
        if word.isdecimal():
            if not (is_alike or is_by_bus):
                return cards
            matching = list(cards[int(word) : int(word) + 1])
        else:
            matching = [one for one in cards if word and one[0].startswith(word)]
        if not matching:
            break
        found.append(matching[0])
    return found


def _unknown(message: str) -> CardUnknown:
    return CardUnknown("The GPU cannot be told", message, "name the card: --card 24GiB")
