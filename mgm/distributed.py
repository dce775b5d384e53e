"""Several processes that train one model: who they are, and what they must agree on.

    torchrun --nproc-per-node 2 -m mgm.train --config finetune.yaml

Each process holds the whole model on a device of its own and computes some passes of a step. Owns
the group of processes: joining it from the launcher's environment variables, adding gradients up,
and decisions that all must take alike. Rank 0 is the only one that writes. A group of one does
nothing, at no cost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mgm.errors import InputError
from mgm.program import EXIT_INPUT

BUCKET_BYTES = 64 * 2**20
"""Gradients smaller than this are sent together, larger ones by themselves and without a copy."""
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: for the slowest to read its data, or the first to save."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostProcess(Exception):
    """Another process of the group ended or does not answer."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the place that a launcher gave this process, or that of a process alone.

    Raises:
        InputError: If the launcher's variables are incomplete or make no sense.
    """
    if int(environment.get("WORLD_SIZE", "1")) <= 1:
        return Place()
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        raise InputError(
            "Incomplete launch",
            f"WORLD_SIZE = {environment['WORLD_SIZE']}, but {', '.join(missing)} are not set",
            "start several processes with torchrun or deepspeed, or unset WORLD_SIZE",
        )
    rank, size, local = (int(environment[name]) for name in _VARIABLES[:3])
    if not 0 <= rank < size:
        raise InputError("Incomplete launch", f"RANK = {rank} with WORLD_SIZE = {size}")
    return Place(rank, size, local)


class Group:
    """The processes of a training, seen from one of them. Every method is called by all.

    Args:
        place: Of this process.
        device: Of this process; small tensors travel from there.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self.rank, self.size = place.rank, place.size
        self._device = device
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def is_orphaned(self) -> bool:
        """Whether torchrun was killed; it starts its processes in sessions that outlive it."""
        return self._launcher is not None and os.getppid() != self._launcher

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        with _lost_processes_told():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            found: list[float] = tensor.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return self.largest([float(flag)])[0] > 0

    def total(self, value: float) -> float:
        """Return the sum of a value over all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        with _lost_processes_told():
            dist.all_reduce(tensor)
            return float(tensor)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return a tensor of every process, in order of rank; they have one shape and dtype."""
        if self.size == 1:
            return [tensor]
        own = tensor.to(self._device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with _lost_processes_told():
            dist.all_gather(parts, own)
        return [part.to(tensor.device) for part in parts]

    def text_of(self, rank: int, own: str) -> str:
        """Return the text that the process of a rank has."""
        if self.size == 1:
            return own
        encoded = own.encode()
        length = int(self.largest([len(encoded)])[0])
        padded = torch.frombuffer(bytearray(encoded.ljust(length, b"\0")), dtype=torch.uint8)
        return bytes(self.gathered(padded)[rank].tolist()).rstrip(b"\0").decode()

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in its own dtype.

        Args:
            tensors: Of the same shapes in the same order everywhere, contiguous.
        """
        if self.size == 1:
            return
        with _lost_processes_told():
            for bucket in buckets(tensors, BUCKET_BYTES):
                if len(bucket) == 1:
                    dist.all_reduce(bucket[0])
                    continue
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.all_reduce(flat)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let bad input that one process meets inside stop all of them.

        Raises:
            InputError: In the first process, whichever met it; that one tells it.
            SystemExit: In the others.
        """
        if self.size == 1:
            yield
            return
        met: InputError | None = None
        try:
            yield
        except InputError as error:
            met = error
        first = self.size - int(self.largest([0.0 if met is None else self.size - self.rank])[0])
        if first == self.size:
            return
        told = self._told_by(first, met)
        if self.is_first:
            raise told from met
        raise SystemExit(EXIT_INPUT)

    def _told_by(self, rank: int, error: InputError | None) -> InputError:
        """Return the error that the process of a rank met."""
        own = json.dumps(error.as_dict() if error else {})
        texts: dict[str, str] = json.loads(self.text_of(rank, own))
        return InputError(texts["title"], texts["message"], texts["hint"])

    def require_same(self, values: Mapping[str, float], hint: str) -> None:
        """Refuse processes that see different things.

        Raises:
            InputError: In the first process, naming what differs.
            SystemExit: In the others.
        """
        numbers = list(values.values())
        bounds = self.largest([*numbers, *(-number for number in numbers)])
        largest = bounds[: len(numbers)]
        smallest = [0.0 - bound for bound in bounds[len(numbers) :]]
        with self.together():
            for name, low, high in zip(values, smallest, largest, strict=True):
                if low < high:
                    seen = f"{name}: {low:.17g} in one, {high:.17g} in another"
                    raise InputError("Processes differ", seen, hint)


ALONE = Group(Place(), torch.device("cpu"))


def buckets(tensors: Iterable[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype, as many as fit into `most_bytes`; larger ones alone."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (filled + size > most_bytes or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += size
    if bucket:
        yield bucket


def own_device(wanted: torch.device, local_rank: int) -> torch.device:
    """Return the device of the process of a local rank, and make it the current one.

    Raises:
        InputError: If the machine has fewer GPUs than processes.
    """
    if wanted.type != "cuda":
        return wanted
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            "More processes than GPUs",
            f"local rank {local_rank}, and {count} GPUs are visible",
            "start at most one process a GPU: --nproc-per-node, CUDA_VISIBLE_DEVICES",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def joined(wanted: torch.device, *, is_needed: bool = False) -> Iterator[Group]:
    """Join the launcher's group and leave it at the end; NCCL between GPUs, else Gloo.

    Args:
        wanted: Kind of device to train on.
        is_needed: A process alone forms a group too, for libraries that insist on one.

    Raises:
        InputError: If the launch is incomplete, or the machine has too few GPUs.
        LostProcess: If the others do not come.
    """
    own = place()
    device = own_device(wanted, own.local_rank) if own.size > 1 else wanted
    group = Group(own, device)
    if own.size == 1 and not is_needed:
        yield group
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _lost_processes_told():
        if own.size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield group
    except InputError:
        dist.destroy_process_group()
        raise
    # Not after any other error: the others may be waiting inside an exchange.
    dist.destroy_process_group()


@contextmanager
def _lost_processes_told() -> Iterator[None]:
    """Say what a failed exchange means."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcess(
            "Another process of this training ended or does not answer; its own message says why. "
            f"Start the same command again to continue from the last saved state. ({error})"
        ) from error
