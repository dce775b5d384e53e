"""What every program of this package does at its outermost edge: errors, signals, exit codes.

Exit codes: 0 done; 2 bad input, told to the user and to the progress file; 130 and 143 stopped by
an interrupt or a termination signal; 1 a full disk, or anything else with its traceback.
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
        with _opened(progress_file(settings)) as progress:
            try:
                work(settings, progress)
            except InputError as error:
                progress.error(error)
                raise
            except OSError as error:
                if (unusable := _unusable_path(error)) is None:
                    raise
                progress.error(unusable)
                raise unusable from error
    except InputError as error:
        print(f"{error.title}: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return EXIT_INPUT
    except (OSError, RuntimeError) as error:
        if (full := _full_disk(error)) is None:
            raise
        print(f"{full.strerror}: {full.filename or 'output'}", file=sys.stderr)
        return EXIT_FAILED
    return 0


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def _full_disk(error: BaseException | None) -> OSError | None:
    """Return the full disk that an error comes from; torch puts an error of its own before it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _unusable_path(error: OSError) -> InputError | None:
    """Return an error that names the path which cannot be read or written, if it is one."""
    if error.errno not in _UNUSABLE or error.filename is None:
        return None
    return InputError(
        "Cannot use a path",
        f"{error.filename}: {error.strerror}",
        "check the path, and that it may be read or written",
    )


def _opened(path: Path | None) -> Progress:
    try:
        return Progress(path)
    except OSError as error:
        raise _unusable_path(error) or error from error
