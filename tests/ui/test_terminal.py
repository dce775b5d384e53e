"""The app on a real terminal: what it leaves behind when it is told to end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from time import monotonic

from synth_agent.workspace import Workspace

LIMIT_SECONDS = 120
"""Only a guard against hanging."""


def read_until(terminal: int, words: bytes) -> bytes:
    """Read what is written to a terminal until something is there, or its programs have ended."""
    found, end = b"", monotonic() + LIMIT_SECONDS
    while words not in found and monotonic() < end:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                found += os.read(terminal, 65536)
            except OSError:  # nobody has the other side open
                break
    return found


def test_an_app_that_is_told_to_end_gives_the_terminal_back(workspace: Workspace) -> None:
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    app = subprocess.Popen(
        [sys.executable, "-m", "synth_agent", "-w", str(workspace.root)],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(inner)
    try:
        assert b"Recent runs" in read_until(terminal, b"Recent runs")
        app.send_signal(signal.SIGTERM)
        left = read_until(terminal, b"\x1b[?1049l")
        assert b"\x1b[?1049l" in left
        assert b"\x1b[?1000l" in left
        assert app.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
    finally:
        app.kill()
        app.wait()
        os.close(terminal)
