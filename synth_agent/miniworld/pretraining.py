"""What pretraining the three parts has in common: pictures, the loop, the half-precision files."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from synth_agent.miniworld.render import render
from synth_agent.miniworld.scene import Scene, draw_scene

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LOW_SIZE = 64
_CHUNK = 500
_HELD_OUT = 1000
_HELD_OUT_SHARE = 5


@dataclass(frozen=True)
class PictureSet:
    """Rendered scenes. The last thousand, at most a fifth of all, are held out."""

    pixels: Tensor
    """(N, 128, 128, 3) uint8."""
    scenes: list[Scene]

    @property
    def num_training(self) -> int:
        return len(self.scenes) - min(_HELD_OUT, len(self.scenes) // _HELD_OUT_SHARE)


def draw_pictures(num_pictures: int, seed: int, processes: int) -> PictureSet:
    """Render scenes in parallel; the result does not depend on the number of processes."""
    jobs = [(seed * 1_000_003 + start, _CHUNK) for start in range(num_pictures // _CHUNK)]
    with ProcessPoolExecutor(processes) as pool:
        chunks = list(pool.map(_draw_chunk, jobs))
    pixels = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks]))
    return PictureSet(pixels, [scene for chunk in chunks for scene in chunk[1]])


def _draw_chunk(job: tuple[int, int]) -> tuple[np.ndarray, list[Scene]]:
    seed, count = job
    draw = random.Random(seed)
    scenes = [draw_scene(draw) for _ in range(count)]
    return np.stack([np.asarray(render(scene)) for scene in scenes]), scenes


def normalise(pixels: Tensor, device: torch.device, augment: bool) -> Tensor:
    """Return (B, 3, 128, 128) normalised pictures, shifted and noisy when `augment`."""
    images = pixels.to(device).permute(0, 3, 1, 2).float() / 255
    if augment:
        dx, dy = random.randint(-4, 4), random.randint(-4, 4)
        padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
        images = torch.roll(padded, (dx, dy), (2, 3))[:, :, 4:-4, 4:-4]
        images = images + 0.03 * torch.randn_like(images)
    mean = torch.tensor(MEAN, device=device)[:, None, None]
    std = torch.tensor(STD, device=device)[:, None, None]
    return (images.clamp(0, 1) - mean) / std


def shrink(images: Tensor, antialias: bool) -> Tensor:
    """Return (B, 3, 64, 64): plain bilinear as MGM does it, or antialiased as CLIP's processor."""
    if not antialias:
        return F.interpolate(images, size=(LOW_SIZE, LOW_SIZE), mode="bilinear")
    return F.interpolate(images, size=(LOW_SIZE, LOW_SIZE), mode="bicubic", antialias=True)


def optimise(
    parameters: list[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    report: Callable[[int, float], None],
) -> None:
    """Run AdamW with warm-up and cosine decay.

    Args:
        parameters: What is trained.
        loss_of: Step number to loss.
        report: Called every 250 steps and at the end with the step and the loss.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    for step in range(steps):
        warm = min(1.0, (step + 1) / 150)
        decay = 0.5 + 0.5 * float(np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * (warm * decay + 1e-3)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            report(step, float(loss.detach()))


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in float16, marked to be computed in float32.

    Half the size is for the repository; half precision would only be slower on a CPU.
    """
    model.eval().half().cpu().save_pretrained(str(folder), safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", "utf-8")


def reporter(name: str, measure: Callable[[], str]) -> Callable[[int, float], None]:
    """Return a `report` for `optimise` that prints the loss and a measurement."""
    started = time.monotonic()

    def report(step: int, loss: float) -> None:
        seconds = time.monotonic() - started
        print(f"{name} step {step} loss {loss:.3f} {measure()} {seconds:.0f} s", flush=True)

    return report
