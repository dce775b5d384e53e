"""What every program of this package does at its outermost edge: errors, signals, exit codes.

Exit codes: 0 done; 2 bad input, told to the user and to the progress file; 130 and 143 stopped by
an interrupt or a termination signal; 1 anything else, with its traceback.
"""

from __future__ import annotations

import errno
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
    signal.signal(signal.SIGTERM, _terminate)
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
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"No space left on device: {error.filename or 'output'}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)
