"""What every program of the stages does at its outermost edge: errors, signals, exit codes, threads.

Exit codes: 0 done; 130 and 143 stopped by an interrupt or a termination signal; those of an error
that a person can fix; 1 anything else. Every error is told to the progress file, and its traceback
is on the standard error.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from synth_agent.errors import EXIT_FAILED, EXIT_INTERRUPTED, SynthAgentError
from synth_agent.stages.progress import StageProgress

EXIT_TERMINATED = 143


def run_program(
    failure: str, progress_file: Path | None, work: Callable[[StageProgress], int]
) -> int:
    """Run a stage's work and return the program's exit code.

    Args:
        failure: Title of an error that nobody foresaw.
        progress_file: Where progress is written, None for nowhere.
        work: Does the work and returns the exit code of its end.
    """
    _STOP.number = None
    numbers = (signal.SIGTERM, signal.SIGINT)
    # Whoever started this in the background may have it ignore interrupts.
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _STOP) for number in heard}
    try:
        with StageProgress(progress_file) as progress:
            return _run(failure, progress, work)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit:
        if _STOP.number is None:
            raise
        return _STOP.exit_code
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None where something other than Python had set it
                signal.signal(number, handler)


def raise_if_stopped() -> None:
    """End the program if a signal asked for that; call it before handling an unknown error.

    Native code that calls Python, as the readers of weights do, can put an error of its own in the
    place of the one that the signal raised.
    """
    _STOP.raise_again()


def use_threads(count: int) -> None:
    """Limit the CPU threads of models; those that wait for each other cost small ones half the time."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # read when torch is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


class _Stop:
    """Ends the program at a signal, and remembers which."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.raise_again()

    @property
    def exit_code(self) -> int:
        return EXIT_TERMINATED if self.number == signal.SIGTERM else EXIT_INTERRUPTED

    def raise_again(self) -> None:
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            raise SystemExit(self.exit_code)


_STOP = _Stop()


def _run(failure: str, progress: StageProgress, work: Callable[[StageProgress], int]) -> int:
    try:
        return work(progress)
    except SynthAgentError as error:
        raise_if_stopped()
        traceback.print_exc()
        progress.error(error)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the process's outermost edge
        raise_if_stopped()
        traceback.print_exc()
        described = f"{type(error).__name__}: {error}"
        if (full := _full_disk(error)) is not None:
            described = f"{full}: {described}"
        progress.error(SynthAgentError(failure, described, "see the stage's log"))
        return EXIT_FAILED


def _full_disk(error: BaseException | None) -> OSError | None:
    """Return the full disk that an error comes from; libraries put errors of their own before it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None
