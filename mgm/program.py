"""What every program of this package does at its outermost edge: errors, signals, exit codes.

Exit codes: 0 done; 2 bad input, told to the user and to the progress file; 130 and 143 stopped by
an interrupt or a termination signal; 1 anything else, with its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from mgm.errors import InputError
from mgm.progress import Progress

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

Settings = TypeVar("Settings")


def run_program(
    read_settings: Callable[[], Settings],
    progress_file: Callable[[Settings], Path | None],
    work: Callable[[Settings, Progress], None],
) -> int:
    """Run a program and return its exit code.

    Args:
        read_settings: Reads the command line.
        progress_file: Says where the settings want progress written.
        work: Does the work.
    """
    # Passes of many lengths fragment CUDA's memory: without this twice of what is used is taken.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    stop = _Stop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        return _run(read_settings, progress_file, work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (Exception, SystemExit):
        # Native code that calls Python, as the readers of weights do, can put an error of its own
        # in the place of the one that the signal raised.
        if stop.number is None:
            raise
        return EXIT_TERMINATED if stop.number == signal.SIGTERM else EXIT_INTERRUPTED
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None where something other than Python had set it
                signal.signal(number, handler)


class _Stop:
    """Ends the program at a signal, and remembers which."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.number = number
        raise SystemExit(EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED)


def _run(
    read_settings: Callable[[], Settings],
    progress_file: Callable[[Settings], Path | None],
    work: Callable[[Settings, Progress], None],
) -> int:
    try:
        settings = read_settings()
        with Progress(progress_file(settings)) as progress:
            try:
                work(settings, progress)
            except InputError as error:
                progress.error(error)
                raise
    except InputError as error:
        print(f"{error.title}: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"No space left on device: {error.filename or 'output'}", file=sys.stderr)
        return EXIT_FAILED
    return 0
