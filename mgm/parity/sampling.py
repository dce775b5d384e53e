"""Sampling folders: the records kept under the cap, and the order grouped by length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mgm.files import read_json
from mgm.parity.report import Check, compare_exactly
from mgm.sampling import capped_positions, grouped_order

CAP_FILE = "sampling.json"
ORDER_FILE = "sampler.json"


def recognises(folder: Path) -> bool:
    """Whether `folder` holds sampled positions or orders."""
    return (folder / CAP_FILE).is_file() or (folder / ORDER_FILE).is_file()


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of every cap and every order."""
    if (folder / CAP_FILE).is_file():
        yield from _check_caps(folder / CAP_FILE)
    if (folder / ORDER_FILE).is_file():
        yield from _check_orders(folder / ORDER_FILE)


def _check_caps(path: Path) -> Iterator[Check]:
    content = read_json(path)
    for stored in content["cases"]:
        case = f"{stored['sample_num']} of {stored['n_records']}"
        kept = capped_positions(stored["n_records"], stored["sample_num"], content["seed"])
        # Long selections are stored by their ends and their sum.
        ours = {
            "selected_positions": kept,
            "first20": kept[:20],
            "last20": kept[-20:],
            "sum": sum(kept),
        }
        for name, value in ours.items():
            if name in stored:
                yield compare_exactly(case, name, value, stored[name])


def _check_orders(path: Path) -> Iterator[Check]:
    for number, stored in enumerate(read_json(path).get("modality_grouped", ())):
        order = grouped_order(
            stored["lengths"],
            stored["batch_size"],
            stored["world_size"],
            torch.Generator().manual_seed(stored["torch_seed"]),
        )
        yield compare_exactly(f"order {number}", "indices", order, stored["indices"])
