"""Start a training again and again, each time killed while it writes a given file.

    python -m tests.mgm.killed_training FILE:COUNT:MOMENT,... [arguments of mgm.train ...]

At the COUNT-th time that FILE is about to get its name, the process is ended by SIGKILL, as `kill
-9` or a loss of power would: MOMENT `half` leaves half of the unnamed file, `before` all of it,
`after` the file under its name. Exit code 1 says that a training ended without being killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mgm.train import main

REPLACE = Path.replace


def arm(file: str, count: int, moment: str) -> None:
    """Make renaming to `file` deadly at the `count`-th time."""
    met = 0

    def replace(self: Path, target: str | Path) -> Path:
        nonlocal met
        if Path(target).name != file:
            return REPLACE(self, target)
        met += 1
        if met < count:
            return REPLACE(self, target)
        if moment == "half":
            os.truncate(self, self.stat().st_size // 2)
        elif moment == "after":
            REPLACE(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("the process is gone")

    Path.replace = replace  # type: ignore[method-assign,assignment]


def run_killed(kill: str, arguments: list[str]) -> bool:
    """Start a training in a process of its own; return whether it was killed."""
    # Nothing was computed yet, so that there are no threads that a fork would lose.
    child = os.fork()
    if child == 0:
        file, count, moment = kill.split(":")
        arm(file, int(count), moment)
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    kills = sys.argv[1].split(",")
    sys.exit(0 if all(run_killed(kill, sys.argv[2:]) for kill in kills) else 1)
