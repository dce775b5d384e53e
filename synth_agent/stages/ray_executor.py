"""A linear recipe's chunks on a Ray cluster that is there already.

Owns the connection and the workers: one actor for each processor core of the cluster, or as many as
asked for, each with the recipe's operators loaded once. The chunks, the counts and the repeated samples
belong to `stages/streaming.py`, so the samples that are left are those of a run on one machine.

Every machine of the cluster needs this package in the same version, and the workspace, its pictures
and models under the same absolute paths. Texts travel through Ray.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from synth_agent import __version__
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.recipes import Recipe
from synth_agent.stages.streaming import (
    ChunkDone,
    ChunkRunner,
    ChunkTask,
    OperatorKind,
    why_not_in_chunks,
)

NAMESPACE = "synth-agent"
_REACHABLE_SECONDS = 10.0
_AHEAD = 1
"""Chunks that wait beside those at work, so that no worker waits for the next."""


@dataclass(frozen=True)
class Failed:
    """An error of a worker, for the person who started the run."""

    title: str
    message: str
    hint: str


@dataclass(frozen=True)
class RaySettings:
    """How to reach a cluster and how much of it to use."""

    address: str
    """`HOST:PORT`, `auto` for the one that this machine is a node of, or `ray://HOST:PORT`."""
    workers: int = 0
    """Actors; 0 means one for each core, or for each GPU when `gpus_a_worker` is not 0."""
    cores_a_worker: float = 1.0
    gpus_a_worker: float = 0.0


class Worker:
    """What runs in each actor: a recipe's operators in the workspace's folder.

    Args:
        recipe: A linear recipe.
        root: The workspace's root; paths to models are relative to it.
        version: Of the package that started the run.
        threads: CPU threads of the models.
    """

    def __init__(self, recipe: Recipe, root: str, version: str, threads: int) -> None:
        self._recipe = recipe
        self._root = root
        self._version = version
        # Read when torch is imported.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._runner: ChunkRunner | None = None

    def start(self) -> tuple[OperatorKind, ...] | Failed:
        """Load the operators and return what they are, or why they cannot be loaded."""
        from synth_agent.stages.datajuicer import guard

        if self._version != __version__:
            versions = f"{__version__} here, {self._version} where the run was started"
            return Failed("Versions differ", f"{_host()}: synth-agent {versions}", _SAME_INSTALL)
        try:
            os.chdir(self._root)
        except OSError as error:
            message = f"{_host()}: {self._root}: {error.strerror}"
            return Failed("Workspace not on a machine of the cluster", message, _SAME_PATHS)
        try:
            guard()
            with tempfile.TemporaryDirectory(prefix="synth-agent-") as folder:
                self._runner = ChunkRunner(self._recipe, Path(folder))
        except SynthAgentError as error:
            return Failed(error.title, f"{_host()}: {error.message}", error.hint)
        return self._runner.operators

    def run(self, task: ChunkTask) -> ChunkDone | Failed:
        """Run one chunk; a failure is returned, because Ray would wrap what is raised."""
        if self._runner is None:
            raise RuntimeError("start() has to come first")
        try:
            return self._runner.run(task)
        except SynthAgentError as error:
            return Failed(error.title, error.message, error.hint)


class RayPool:
    """Runs chunks on a cluster; a context manager that connects and lets go.

    Args:
        recipe: A linear recipe.
        root: The workspace's root, on every machine.
        settings: Given by the person who runs it. A recipe cannot choose where it runs.
        threads: CPU threads of the models in each worker.

    Raises, when entered:
        InvalidInput: Ray is not installed, there is no cluster at the address, or the recipe would
            not make the same there.
        SynthAgentError: a worker could not start.
    """

    def __init__(self, recipe: Recipe, root: Path, settings: RaySettings, threads: int = 1) -> None:
        self._recipe = recipe
        self._root = root
        self._settings = settings
        self._threads = threads
        self._ray: Any = None
        self._actors: list[Any] = []
        self.operators: tuple[OperatorKind, ...] = ()

    def __enter__(self) -> RayPool:
        why = why_not_in_chunks(self._recipe)
        if why is not None:
            raise InvalidInput(
                "Not on a cluster", f"{self._recipe.name}: {why}", "run it with executor: default"
            )
        self._ray = _connected(self._settings.address)
        try:
            self._start()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    @property
    def num_workers(self) -> int:
        """How many actors work."""
        return len(self._actors)

    def run(self, tasks: Iterable[ChunkTask]) -> Iterator[ChunkDone]:
        """Yield every task's result as it comes; a few tasks more than workers are read ahead.

        Raises:
            SynthAgentError: an operator failed, or a worker or its machine was lost.
        """
        source = iter(tasks)
        at_work: dict[Any, Any] = {}
        for task, actor in zip(
            itertools.islice(source, len(self._actors) * (1 + _AHEAD)),
            itertools.cycle(self._actors),
            strict=False,
        ):
            at_work[actor.run.remote(task)] = actor
        while at_work:
            [ready], _ = self._ray.wait(list(at_work), num_returns=1)
            actor = at_work.pop(ready)
            result = self._get(ready)
            del ready
            task_after = next(source, None)
            if task_after is not None:
                at_work[actor.run.remote(task_after)] = actor
            yield result

    def _start(self) -> None:
        given = self._settings
        worker = self._ray.remote(num_cpus=given.cores_a_worker, num_gpus=given.gpus_a_worker)(
            Worker
        )
        wanted = given.workers or _fitting(self._ray.cluster_resources(), given)
        if wanted < 1:
            raise InvalidInput(
                "The cluster has no room",
                f"{given.address}: no node has {given.cores_a_worker:g} cores and "
                f"{given.gpus_a_worker:g} GPUs for a worker",
                "ask for less a worker in synth.yaml, or start nodes that have it",
            )
        self._actors = [
            worker.remote(self._recipe, str(self._root), __version__, self._threads)
            for _ in range(wanted)
        ]
        kinds = [self._get(started) for started in [a.start.remote() for a in self._actors]]
        self.operators = kinds[0]

    def _get(self, reference: Any) -> Any:
        """Return what a worker returned.

        Raises:
            SynthAgentError: the worker says so, or is no more.
        """
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            raise SynthAgentError(
                "The cluster failed", f"{type(error).__name__}: {lines[-1]}", _LOOK_AT_CLUSTER
            ) from error
        if isinstance(result, Failed):
            raise SynthAgentError(result.title, result.message, result.hint)
        return result


_SAME_INSTALL = "install the same synth-agent on every machine of the cluster"
_SAME_PATHS = "give every machine the workspace under the same path, by a shared file system"
_LOOK_AT_CLUSTER = "look at `ray status` and the workers' logs, then run it again"


def _connected(address: str) -> Any:
    """Connect to a cluster and return Ray's module.

    Raises:
        InvalidInput: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise InvalidInput(
            "Ray is not installed", str(error), "pip install 'synth-agent[ray]'"
        ) from error
    if address in ("", "local"):
        # Ray would start a cluster of its own, on this machine only.
        raise InvalidInput(
            "No cluster's address",
            f"synth.yaml, field compute.ray_address: {address!r}",
            "give HOST:PORT, ray://HOST:PORT, or auto on a machine of the cluster",
        )
    _check_reachable(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise InvalidInput(
            "No cluster at the address",
            f"synth.yaml, field compute.ray_address: {address!r}: {lines[0]}",
            "start it with `ray start`, or correct the address; ray:// needs ray[client]",
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Try the port; Ray would for several minutes.

    Raises:
        InvalidInput: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        with socket.create_connection((host, int(port)), _REACHABLE_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise InvalidInput(
            "No cluster at the address",
            f"synth.yaml, field compute.ray_address: {address!r}: {error}",
            "start it with `ray start`, or correct the address",
        ) from error


def _fitting(resources: dict[str, float], settings: RaySettings) -> int:
    """Return how many workers the cluster's resources are enough for."""
    rooms = []
    if settings.cores_a_worker:
        rooms.append(resources.get("CPU", 0.0) / settings.cores_a_worker)
    if settings.gpus_a_worker:
        rooms.append(resources.get("GPU", 0.0) / settings.gpus_a_worker)
    return int(min(rooms)) if rooms else 0


def _host() -> str:
    return os.uname().nodename
