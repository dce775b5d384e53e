"""One comparison with a reference, and the table of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """How far one quantity of one case is from its reference."""

    case: str
    quantity: str
    difference: float
    """Largest absolute or relative difference, or the number of unequal items."""
    tolerance: float
    detail: str = ""
    """What was compared, or the first thing that differs."""
    folder: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return the check for JSON, where an infinite difference is null."""
        content = {**asdict(self), "is_ok": self.is_ok}
        if not math.isfinite(self.difference):
            content["difference"] = None
        return content


def compare_tensors(
    case: str,
    quantity: str,
    ours: Tensor,
    reference: Tensor,
    tolerance: float,
    where: Tensor | None = None,
) -> Check:
    """Compare values by their largest absolute difference.

    Args:
        where: Booleans over the leading dimensions: which positions count. None counts all.
    """
    if ours.shape != reference.shape:
        detail = f"shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
        return Check(case, quantity, math.inf, tolerance, detail)
    ours, reference = ours.detach().double(), reference.double()
    if where is not None:
        ours, reference = ours[where], reference[where]
    # A value that the reference has not computed either is no difference.
    both_nan = ours.isnan() & reference.isnan()
    difference = (ours - reference).abs().masked_fill(both_nan, 0.0)
    largest = difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0
    return Check(case, quantity, largest, tolerance, f"{difference.numel()} values")


def compare_named_tensors(
    case: str,
    quantity: str,
    ours: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    tolerance: float,
) -> Check:
    """Compare every tensor of `reference` and return the comparison that differs most."""
    worst = Check(case, quantity, 0.0, tolerance, f"{len(reference)} tensors")
    for name, expected in reference.items():
        if name not in ours:
            return Check(case, quantity, math.inf, tolerance, f"{name} is missing")
        found = compare_tensors(case, quantity, ours[name], expected, tolerance)
        if found.difference > worst.difference:
            detail = name if math.isfinite(found.difference) else f"{name}: {found.detail}"
            worst = Check(case, quantity, found.difference, tolerance, detail)
    return worst


def compare_numbers(
    case: str,
    quantity: str,
    ours: Mapping[str, float],
    reference: Mapping[str, float],
    tolerance: float,
    *,
    ignore_below: float | None = None,
) -> Check:
    """Compare named numbers by their largest difference.

    Args:
        ignore_below: When given, differences are relative to the reference, and references
            below this are passed over.
    """
    worst, detail, counted = 0.0, "", 0
    for name, expected in reference.items():
        if ignore_below is not None and abs(expected) < ignore_below:
            continue
        counted += 1
        if name not in ours:
            return Check(case, quantity, math.inf, tolerance, f"{name} is missing")
        difference = abs(ours[name] - expected)
        if ignore_below is not None:
            difference /= abs(expected)
        if math.isnan(ours[name]) and math.isnan(expected):
            difference = 0.0
        if not difference <= worst:
            worst, detail = difference if difference == difference else math.inf, name
    return Check(case, quantity, worst, tolerance, detail or f"{counted} numbers")


def compare_exactly(case: str, quantity: str, ours: Any, reference: Any) -> Check:
    """Compare anything by equality; the difference is the number of unequal items."""
    if isinstance(ours, Tensor) and isinstance(reference, Tensor):
        if ours.shape != reference.shape:
            detail = f"shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
            return Check(case, quantity, math.inf, 0, detail)
        unequal = int(torch.count_nonzero(ours != reference))
        return Check(case, quantity, unequal, 0, f"{reference.numel()} values")
    if isinstance(ours, Mapping) and isinstance(reference, Mapping):
        keys = sorted({*ours, *reference}, key=str)
        missing = object()
        pairs = [(k, ours.get(k, missing), reference.get(k, missing)) for k in keys]
    elif _is_list(ours) and _is_list(reference) and len(ours) == len(reference):
        pairs = [(n, a, b) for n, (a, b) in enumerate(zip(ours, reference, strict=True))]
    elif _is_list(ours) and _is_list(reference):
        detail = f"{len(ours)} items, not {len(reference)}"
        return Check(case, quantity, abs(len(ours) - len(reference)), 0, detail)
    else:
        pairs = [("value", ours, reference)]
    different = [(key, a, b) for key, a, b in pairs if a != b]
    if not different:
        return Check(case, quantity, 0, 0, f"{len(pairs)} items")
    key, found, expected = different[0]
    detail = f"{key}: {_shorten(found)}, not {_shorten(expected)}"
    return Check(case, quantity, len(different), 0, detail)


def format_table(checks: Sequence[Check]) -> str:
    """Return the checks as lines, with a summary at the end."""
    rows = [("", "folder", "case", "quantity", "difference", "tolerance", "")]
    rows += [_format_row(check) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[4:6], widths[4:], strict=True)]
        lines.append("  ".join([*cells, row[6]]).rstrip())
    failed = sum(not check.is_ok for check in checks)
    lines.append(f"{len(checks)} comparisons, {failed} beyond tolerance")
    return "\n".join(lines)


def _format_row(check: Check) -> tuple[str, str, str, str, str, str, str]:
    status = "OK" if check.is_ok else "FAIL"
    difference, tolerance = f"{check.difference:.2g}", f"{check.tolerance:.2g}"
    return status, check.folder, check.case, check.quantity, difference, tolerance, check.detail


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shorten(value: Any) -> str:
    text = "nothing" if type(value) is object else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
