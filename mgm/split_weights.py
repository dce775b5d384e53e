"""A bfloat16 weight and one more byte: together a float of 24 bits, rounded without bias.

The model computes with the bfloat16 part alone, which is the nearest bfloat16 to the whole (ties away
from zero). The byte is the signed distance from it in units of the 24-bit float's last place, so the
whole is recovered exactly: float32 without the last 8 bits of its mantissa, 16 bits of precision.

A float32 result is written back by stochastic rounding: up with the probability that equals the
share of the last place that would be lost, so that updates below the last place are kept on average.
The random bits are a hash of a key and the element's index: no generator, no state, the same bits
on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

HALF_BFLOAT16 = 0x8000
"""Half the last place of a bfloat16, as bits of a float32."""
LOST_BITS = 0xFF
"""The bits of a float32 that a 24-bit float leaves out."""
MIX_FIRST = 0x7FEB352D
"""First multiplier of the hash."""
MIX_SECOND = 0x846CA68B
"""Second multiplier of the hash."""

Key = tuple[int, int]
"""Two numbers of 31 bits that start the hash."""


def random_key(seed: int, step: int, parameter: int) -> Key:
    """Return the key of one parameter's random bits in one step."""
    digest = hashlib.blake2b(f"{seed} {step} {parameter}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number & 0x7FFFFFFF, number >> 33


def random_bits(start: int, stop: int, key: Key, device: torch.device) -> Tensor:
    """Return 32 random bits for each element of a range of indices.

    Source: lowbias32, https://github.com/skeeto/hash-prospector, applied once to each half of the
    key.

    Returns:
        (stop - start,), int32.
    """
    index = torch.arange(start, stop, device=device).to(torch.int32)
    return _mix(_mix(index.bitwise_xor_(key[0])).bitwise_xor_(key[1]))


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Return the whole of a split weight.

    Args:
        weight: (N,), bfloat16.
        low: (N,), int8.

    Returns:
        (N,), float32 with the last 8 bits zero.
    """
    high = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return high.add_(low.to(torch.int32).bitwise_left_shift_(8)).view(torch.float32)


def split(whole: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a float32 to 24 bits and take it apart.

    Args:
        whole: (N,), float32.
        bits: (N,), int32; the lowest 8 decide the rounding. None rounds toward zero, which is
            exact for what `join` returned.

    Returns:
        The bfloat16 part and the byte, (N,) each.
    """
    pattern = whole.view(torch.int32)
    if bits is not None:
        pattern = pattern + (bits & LOST_BITS)
    pattern = pattern & ~LOST_BITS
    high = (pattern + HALF_BFLOAT16).bitwise_right_shift_(16)
    low = pattern.sub_(high << 16).bitwise_right_shift_(8)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int8)


def _mix(value: Tensor) -> Tensor:
    # Shifts of int32 copy the sign bit; the masks make them those of an unsigned number.
    value = value.bitwise_xor_((value >> 16) & 0xFFFF).mul_(MIX_FIRST)
    value = value.bitwise_xor_((value >> 15) & 0x1FFFF).mul_(MIX_SECOND - (1 << 32))
    return value.bitwise_xor_((value >> 16) & 0xFFFF)
