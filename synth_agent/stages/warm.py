"""Runs the process stage in a process that has Data-Juicer loaded already.

    python -m synth_agent.stages.warm --recipe FILE --seed FILE.jsonl ...

From the workspace root, with the arguments of `synth_agent.stages.process`. What runs is that stage,
in a fork of the workspace's warm worker (`synth_agent.stages.warm_worker`), with this process's
environment, output files and signals; this process ends as the stage ends, and the stage ends with
this process. Where there is no worker, one is started; where it cannot serve, the stage runs in this
process. Owns how the two talk. It imports nothing but the standard library, and so starts at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synth_agent.workspace import Workspace

PROTOCOL = 1
FOLDER = Path("artifacts", "cache", "warm")
SOCKET = FOLDER / "socket"
LOCK = FOLDER / "lock"
LOG = FOLDER / "log"
"""Relative to the workspace's root, because the path of a socket may not be long."""
START_SECONDS = 15.0
ANSWER_SECONDS = 10.0
FORWARDED: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SETTINGS_NAME = "synth.yaml"
_HEADER = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")
_MOST_BYTES = 8 << 20
# After these the worker itself is in doubt; after any other signal somebody wanted the stage to end.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class Unavailable(Exception):
    """The warm worker did not take the stage on; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _Stage(arguments) as stage:
            return stage.wait()
    except Unavailable as reason:
        print(f"not run by the warm worker: {reason}", file=sys.stderr)
    from synth_agent.stages import process

    return process.main(arguments)


def start_warm(workspace: Workspace) -> None:
    """Start the workspace's warm worker in the background, unless it runs; returns at once.

    It ends by itself when it is idle for long and when the workspace vanishes.
    """
    from synth_agent.workspace import stage_environment

    if not _is_held(workspace.root / LOCK):
        _start(workspace.root, stage_environment(workspace))


class _Stage:
    """The stage at work in a fork of the warm worker, seen from here.

    Raises:
        Unavailable: the worker could not be reached or would not take the stage on.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._signals: list[int] = []
        self._connection: socket.socket | None = None
        self._handlers = {n: h for n in FORWARDED if (h := signal.getsignal(n)) != signal.SIG_IGN}
        for number in self._handlers:
            signal.signal(number, self._forward)
        try:
            self._connection = _ask(arguments)
        except Unavailable:
            self._stop_listening()
            raise
        while self._signals:
            self._forward(self._signals.pop(0), None)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
            self._stop_listening()

    def wait(self) -> int:
        """Return the stage's exit code when it has ended; die by the signal that it died by.

        Raises:
            Unavailable: it crashed, or nobody is left to say how it ended.
        """
        assert self._connection is not None
        try:
            answer = receive(self._connection)
        except (OSError, ValueError) as error:
            raise Unavailable(f"it was lost ({error})") from error
        if "exit" in answer:
            return int(answer["exit"])
        number = int(answer["signal"])
        if number in CRASHES:
            raise Unavailable(f"it crashed with {signal.Signals(number).name}")
        return _die_by(number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._connection is None:
            self._signals.append(number)
            return
        # A stage that has ended needs no signal.
        with contextlib.suppress(OSError):
            send(self._connection, {"signal": number})

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in self._signals:
            os.kill(os.getpid(), number)


def _ask(arguments: Sequence[str]) -> socket.socket:
    """Return a connection to a worker that runs the stage.

    Raises:
        Unavailable: none could be reached, or would take the stage on.
    """
    outdated = ""
    for _ in range(2):
        try:
            connection = _connect()
        except OSError as error:
            raise Unavailable(f"it cannot be reached ({error})") from error
        try:
            answer = _request(connection, arguments)
        except (OSError, ValueError) as error:
            connection.close()
            raise Unavailable(f"it does not answer ({error})") from error
        if "accepted" in answer:
            return connection
        connection.close()
        if "refused" in answer:
            raise Unavailable(str(answer["refused"]))
        # It has ended, so that one with what this stage needs can start.
        outdated = str(answer["outdated"])
    raise Unavailable(outdated)


def _request(connection: socket.socket, arguments: Sequence[str]) -> dict[str, Any]:
    """Ask the worker to run the stage with the output files of this process; return its answer."""
    connection.settimeout(ANSWER_SECONDS)
    umask = os.umask(0o077)
    os.umask(umask)
    message = {
        "protocol": PROTOCOL,
        "python": interpreter(),
        "arguments": list(arguments),
        "environment": dict(os.environ),
        "umask": umask,
    }
    send(connection, message, files=(0, 1, 2))
    answer = receive(connection)
    if "accepted" in answer:
        # Only now may the worker begin: had this process given up, the stage would run twice.
        send(connection, {"go": True})
        connection.settimeout(None)
    return answer


def interpreter() -> list[str]:
    """Return what the two processes must have in common besides the code's state on disk."""
    return [sys.executable, sys.version, str(Path(__file__).resolve())]


def send(connection: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send a message, and open files with it."""
    body = json.dumps(message).encode()
    header = _HEADER.pack(len(body))
    if files:
        socket.send_fds(connection, [header], list(files))
    else:
        body = header + body
    connection.sendall(body)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Return the next message.

    Raises:
        ConnectionError: there is none, because the other side has ended.
        ValueError: what came is no message.
    """
    return _receive_body(connection, _receive_exactly(connection, _HEADER.size))


def receive_with_files(connection: socket.socket, count: int) -> tuple[dict[str, Any], list[int]]:
    """Return the next message and the descriptors of files that came with it; see `receive`."""
    header, files, _, _ = socket.recv_fds(connection, _HEADER.size, count)
    header += _receive_exactly(connection, _HEADER.size - len(header))
    return _receive_body(connection, header), list(files)


def check_peer(connection: socket.socket) -> None:
    """Make sure that the other side belongs to the same user, where the system can tell.

    Raises:
        PermissionError: it does not.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(told)
    if user != os.getuid():
        raise PermissionError(f"the other process belongs to user {user}")


def _receive_body(connection: socket.socket, header: bytes) -> dict[str, Any]:
    (size,) = _HEADER.unpack(header)
    if size > _MOST_BYTES:
        raise ValueError(f"a message of {size} bytes")
    message = json.loads(_receive_exactly(connection, size))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the other process has ended")
        data += more
    return data


def _connect() -> socket.socket:
    """Return a connection to the worker of the workspace here, which is started if need be.

    Raises:
        Unavailable: this is no workspace.
        OSError: the worker cannot be started or reached.
    """
    if not Path(_SETTINGS_NAME).is_file():
        raise Unavailable(f"no {_SETTINGS_NAME} in {Path.cwd()}")
    deadline = time.monotonic() + START_SECONDS
    has_started = False
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(SOCKET))
            check_peer(connection)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        except BaseException:
            connection.close()
            raise
        is_held = _is_held(LOCK)
        if time.monotonic() > deadline or (has_started and not is_held):
            raise Unavailable(f"it did not start, see {LOG}")
        if not is_held:
            _start(Path.cwd(), dict(os.environ))
            has_started = True
        time.sleep(0.02)


def _start(root: Path, environment: Mapping[str, str]) -> None:
    """Start a worker, which is at work when it has the lock; this waits for that only."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (root / LOG).open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "synth_agent.stages.warm_worker"],
            cwd=root,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        )


def _is_held(lock: Path) -> bool:
    """Tell whether a worker lives."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _die_by(number: int) -> int:
    """End as the stage did; return the shell's code for a signal that does not end a process."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


if __name__ == "__main__":
    sys.exit(main())
