"""The warm worker of a workspace: has Data-Juicer loaded, and runs each process stage in a fork.

Started by `synth_agent.stages.warm`, which says how the two talk. There is one for a workspace, by
its lock. It forks while it has one thread and no model, so a stage finds what a fresh process would
have found after loading the same libraries, and leaves nothing behind. It ends when it was idle for
long, when the workspace vanishes, when a stage crashed, and when a stage asks for other code, another
interpreter or another environment than it has loaded; the next stage starts another.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NoReturn

from synth_agent.stages.warm import (
    ANSWER_SECONDS,
    CRASHES,
    LOCK,
    PROTOCOL,
    SOCKET,
    check_peer,
    interpreter,
    receive,
    receive_with_files,
    send,
)

IDLE_SECONDS = 900.0
_JOBS_SECONDS = 0.2
_LULL_SECONDS = 0.3
_TICK_SECONDS = 2.0
_PACKAGE = Path(__file__).resolve().parents[1]
_DISTRIBUTIONS = ("py-data-juicer", "datasets", "torch", "transformers", "numpy", "pyarrow")
_FIRST = (
    "synth_agent.stages.process",
    "data_juicer.config",
    "data_juicer.core.data.dataset_builder",
    "data_juicer.ops",
    "synth_agent.stages.running",
    "synth_agent.stages.known_scores",
    "synth_agent.stages.forget_measurements",
)
_LATER = (
    "PIL.JpegImagePlugin",
    "data_juicer.utils.datasets_json_compat",
    "docstring_parser",
    "scipy.io",
    "threadpoolctl",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.blip.modeling_blip",
    "transformers.models.blip.processing_blip",
)
# What libraries read from the environment while they are loaded. The rest is read when it is used,
# and a fork has the environment of the stage that it runs.
_READ_EARLY = (
    "ARROW_", "CONDA_", "CUDA_", "DATASETS_", "DATA_JUICER", "DYLD_", "GOMP_", "HF_", "HOME",
    "HUGGINGFACE", "JE_ARROW", "KMP_", "LANG", "LC_", "LD_", "LOGURU", "MKL_", "NUMEXPR", "NVIDIA_", "OMP_",
    "OPENBLAS", "PATH", "PYTHON", "PYTORCH", "RAY_", "TMPDIR", "TOKENIZERS", "TORCH", "TQDM",
    "TRANSFORMERS", "TZ", "VIRTUAL_ENV", "XDG_CACHE", "XDG_CONFIG",
)  # fmt: skip


def main() -> int:
    """Become the worker of the workspace here; returns as soon as one is at work."""
    environment = _read_early(os.environ)
    state = _code_state()
    lock = _take_lock()
    if lock is None:
        return 0
    # The child shares the lock, and whoever started this need not wait for a daemon to end.
    if os.fork():
        os._exit(0)
    worker = _Worker(environment, state, lock)
    worker.load()
    worker.serve()
    return 0


@dataclass
class _Worker:
    """A loaded process that waits for stages."""

    environment: Mapping[str, str]
    """The part that libraries read while they are loaded, as it was then."""
    state: Mapping[str, str]
    """Of each file of code and each library, as it was before it was loaded."""
    lock: IO[bytes]
    jobs: dict[int, socket.socket] = field(default_factory=dict)
    """Process ids of stages at work, and whom they work for."""
    later: list[str] = field(default_factory=lambda: list(_LATER))
    listener: socket.socket | None = None

    def load(self) -> None:
        """Load what every recipe needs."""
        # One thread for everything: a fork has only the thread that forks.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"
        os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        importlib.import_module("synth_agent.stages.datajuicer").guard()
        for name in _FIRST:
            importlib.import_module(name)
        importlib.import_module("synth_agent.stages.prepared").base()

    def serve(self) -> None:
        """Answer until there is a reason to end, then let the stages at work finish."""
        root = Path.cwd().stat()
        self.listener = _listen()
        socket_file = SOCKET.stat()
        last = time.monotonic()
        while self.listener is not None:
            ready, _, _ = select.select([self.listener], [], [], self._patience())
            self._reap()
            if ready:
                self._answer(self.listener.accept()[0])
            if ready or self.jobs:
                last = time.monotonic()
            elif self.later:
                self._load_one_more()
            elif time.monotonic() - last > IDLE_SECONDS or not (
                _is_still(Path.cwd, root) and _is_still(lambda: SOCKET, socket_file)
            ):
                self._close()
        while self.jobs:
            time.sleep(_JOBS_SECONDS)
            self._reap()

    def _patience(self) -> float:
        if self.jobs:
            return _JOBS_SECONDS
        return _LULL_SECONDS if self.later else _TICK_SECONDS

    def _load_one_more(self) -> None:
        name = self.later.pop(0)
        try:
            importlib.import_module(name)
        except ImportError:
            # A recipe that needs it says so; the others do without.
            traceback.print_exc()
        if not self.later:
            gc.collect()
            gc.freeze()
            print(f"loaded, threads: {_num_threads()}", file=sys.stderr)

    def _answer(self, connection: socket.socket) -> None:
        """Run a stage for whoever has connected, or say why not."""
        files: list[int] = []
        try:
            connection.settimeout(ANSWER_SECONDS)
            check_peer(connection)
            message, files = receive_with_files(connection, 3)
            refusal = self._refusal(message, files)
            if refusal:
                send(connection, refusal)
                connection.close()
                return
            send(connection, {"accepted": True})
            receive(connection)
            connection.settimeout(None)
        except (OSError, ValueError, KeyError):
            traceback.print_exc()
            connection.close()
            return
        else:
            self._fork(connection, message, files)
        finally:
            for descriptor in files:
                os.close(descriptor)

    def _refusal(self, message: Mapping[str, Any], files: Sequence[int]) -> dict[str, str]:
        """Return why this process cannot run a stage; empty when it can."""
        if len(files) != 3:
            return {"refused": "it got no files to write to"}
        for what, mine, theirs in (
            ("protocol", PROTOCOL, message["protocol"]),
            ("interpreter", interpreter(), message["python"]),
            ("environment", self.environment, _read_early(message["environment"])),
            ("code", self._loaded(self.state), self._loaded(_code_state())),
        ):
            if mine != theirs:
                self._close()
                return {"outdated": f"it has another {what}"}
        if (threads := _num_threads()) > 1:
            return {"refused": f"it has {threads} threads"}
        return {}

    def _loaded(self, state: Mapping[str, str]) -> dict[str, str]:
        """Return the part of a state that decides what this process and its forks do."""
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        apart = str(_PACKAGE) + os.sep
        stages = str(Path(__file__).parent) + os.sep
        return {
            name: stamp
            for name, stamp in state.items()
            if name in files or not name.startswith(apart) or name.startswith(stages)
        }

    def _fork(
        self, connection: socket.socket, message: Mapping[str, Any], files: Sequence[int]
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        process_id = os.fork()
        if process_id:
            self.jobs[process_id] = connection
            return
        try:
            assert self.listener is not None
            self.listener.close()
            self.lock.close()
            for other in self.jobs.values():
                other.close()
            _run_stage(connection, message, files)
        except BaseException:  # noqa: BLE001  the process's outermost edge
            traceback.print_exc()
        finally:
            # Whatever happened, a fork must not go on as the worker.
            os._exit(1)

    def _reap(self) -> None:
        """Tell how stages ended that could not say it themselves."""
        for process_id, connection in list(self.jobs.items()):
            ended, status = os.waitpid(process_id, os.WNOHANG)
            if not ended:
                continue
            del self.jobs[process_id]
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                send(connection, {"exit": code} if code >= 0 else {"signal": -code})
            connection.close()
            if -code in CRASHES:
                self._close()

    def _close(self) -> None:
        """Take no more stages, and let another worker start."""
        if self.listener is None:
            return
        with contextlib.suppress(FileNotFoundError):
            SOCKET.unlink()
        self.listener.close()
        self.listener = None
        self.lock.close()


def _run_stage(
    connection: socket.socket, message: Mapping[str, Any], files: Sequence[int]
) -> NoReturn:
    """Become the stage: its files, environment, session and signals; end with it."""
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
    os.setsid()
    os.umask(message["umask"])
    os.environ.clear()
    os.environ.update(message["environment"])
    random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    code = _main_of_stage(message["arguments"])
    for stream in (sys.stdout, sys.stderr):
        # A log on a full disk is no reason to hide how the stage ended.
        with contextlib.suppress(OSError):
            stream.flush()
    with contextlib.suppress(OSError):
        send(connection, {"exit": code})
    os._exit(code)


def _main_of_stage(arguments: Sequence[str]) -> int:
    from synth_agent.stages import process

    sys.argv = [str(process.__file__), *arguments]
    try:
        return process.main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _obey(connection: socket.socket) -> None:
    """Pass signals on to the stage; end it, and all that it started, with whom it works for."""
    while True:
        try:
            os.kill(os.getpid(), int(receive(connection)["signal"]))
        except (OSError, ValueError, KeyError):
            os.killpg(os.getpgrp(), signal.SIGKILL)


def _listen() -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        SOCKET.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(SOCKET))
    finally:
        os.umask(umask)
    listener.listen()
    return listener


def _take_lock() -> IO[bytes] | None:
    """Return the workspace's lock, which lives as long as this process; None when it is taken."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = LOCK.open("ab")
    # Who asks whether the lock is held takes it shared for an instant.
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.02)
    lock.close()
    return None


def _code_state() -> dict[str, str]:
    """Return what changes when the package's code, or a library that is loaded, changes."""
    stamps = {}
    for path in _PACKAGE.rglob("*.py"):
        # A file may go while others are looked at.
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            stamps[str(path)] = f"{stat.st_mtime_ns} {stat.st_size}"
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            stamps[name] = metadata.version(name)
    return stamps


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_EARLY)}


def _is_still(path: Any, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(path().stat(), before)
    except OSError:
        return False


def _num_threads() -> int:
    """Return how many threads this process has, those of libraries included where that is known."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


if __name__ == "__main__":
    sys.exit(main())
