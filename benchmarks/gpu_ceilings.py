"""What the card can do at most: a large matrix product and a copy on the device. Prints JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

SIDE = 8192
COPIED_BYTES = 4 * 2**30


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the mean seconds of one repetition after three to warm up."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.monotonic() - started) / repeats


def main() -> int:
    """Measure and print."""
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = seconds(lambda: left @ right)
    copy = seconds(lambda: target.copy_(source))
    print(
        json.dumps(
            {
                "name": "ceilings",
                "device": torch.cuda.get_device_name(0),
                "torch": torch.__version__,
                "bf16_tflops": 2 * SIDE**3 / product / 1e12,
                "copy_terabytes_per_second": 2 * COPIED_BYTES / copy / 1e12,
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
