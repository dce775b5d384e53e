"""What is read of a machine's GPUs, through a program that answers as `nvidia-smi` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from synth_agent import cards
from synth_agent.cards import (
    DRIVER_BYTES,
    GIB,
    Card,
    CardUnknown,
    machine_cards,
    parse_card,
    training_card,
)
from synth_agent.errors import InvalidInput
from tests.cards import BUSY_4090, H100, RTX_4090, SMALL, put_cards

MIB = 1 << 20


def names(environment: dict[str, str]) -> list[str]:
    return [card.name for card in machine_cards(environment)]


def test_cards_are_read_with_their_memory(tmp_path: Path) -> None:
    environment = put_cards(tmp_path / "bin", [RTX_4090, BUSY_4090])
    free, busy = machine_cards(environment)
    assert free == Card("NVIDIA GeForce RTX 4090", 24564 * MIB, 24210 * MIB, 24198 * MIB)
    assert (busy.usable, busy.free) == (free.usable, 6198 * MIB)
    assert free.words() == "NVIDIA GeForce RTX 4090 with 23.6 GiB"


def test_without_the_program_or_without_cards_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert machine_cards({"PATH": str(tmp_path / "empty")}) == ()
    nothing = put_cards(tmp_path / "bin", [])
    assert machine_cards(nothing) == ()
    assert training_card(nothing) is None


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("0", ["NVIDIA GeForce GTX 1650"]),
        ("1,0", ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce GTX 1650"]),
        ("GPU-h1", ["NVIDIA H100 80GB HBM3"]),
        ("1,7,0", ["NVIDIA H100 80GB HBM3"]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_environment_chooses_among_the_cards(
    tmp_path: Path, chosen: str, expected: list[str]
) -> None:
    environment = put_cards(tmp_path / "bin", [SMALL, H100])
    environment |= {"CUDA_VISIBLE_DEVICES": chosen, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert names(environment) == expected


def test_a_number_says_nothing_of_unlike_cards_in_an_unknown_order(tmp_path: Path) -> None:
    environment = put_cards(tmp_path / "bin", [SMALL, H100]) | {"CUDA_VISIBLE_DEVICES": "0"}
    assert len(names(environment)) == 2
    alike = put_cards(tmp_path / "alike", [RTX_4090, BUSY_4090]) | {"CUDA_VISIBLE_DEVICES": "1"}
    [card] = machine_cards(alike)
    assert card.free == 6198 * MIB


def test_training_uses_the_largest(tmp_path: Path) -> None:
    card = training_card(put_cards(tmp_path / "bin", [SMALL, H100, RTX_4090]))
    assert card is not None
    assert card.name == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("lines", "exit_code", "told"),
    [
        (["NVIDIA-SMI has failed: no driver"], 9, "exit code 9: NVIDIA-SMI has failed: no driver"),
        ([], 3, "exit code 3: it said nothing"),
        (["GPU-1, Jetson, [N/A], [N/A], [N/A], [N/A]"], 0, "memory of Jetson"),
        (["GPU-1, NVIDIA H100, 0, 81079, 81559, Enabled"], 0, "divided by MIG"),
        (["No devices were found"], 0, "No devices were found"),
    ],
)
def test_what_cannot_be_told_is_named(
    tmp_path: Path, lines: list[str], exit_code: int, told: str
) -> None:
    environment = put_cards(tmp_path / "bin", lines, exit_code=exit_code)
    with pytest.raises(CardUnknown, match="GPU cannot be told") as raised:
        machine_cards(environment)
    assert told in raised.value.message
    assert "--card" in raised.value.hint


def test_a_silent_program_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = put_cards(tmp_path / "bin", [])
    with (tmp_path / "bin" / "nvidia-smi").open("w") as program:
        program.write("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(cards, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(CardUnknown, match=r"said nothing within 0\.2 s"):
        machine_cards(environment)


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [("24GiB", "", 24), (" 24 GB ", "", 24), ("22.5g", "", 22.5), ("H100 80GiB", "H100", 80)],
)
def test_a_card_is_named_by_its_memory(text: str, name: str, gib: float) -> None:
    card = parse_card(text)
    assert (card.name, card.total) == (name, gib * GIB)
    assert card.usable == card.free == card.total - DRIVER_BYTES


@pytest.mark.parametrize(
    "text", ["24", "", "GiB", "0GiB", "24TiB", "-3GiB", "nan GiB", "9" * 400 + "GiB"]
)
def test_anything_else_is_not_a_card(text: str) -> None:
    with pytest.raises(InvalidInput, match="Not a card"):
        parse_card(text)
