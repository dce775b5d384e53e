"""Errors that a person can act on, and the exit codes they end in.

Every error shown to a user carries a title, the facts (file, field, value) and what to do.
Anything else that is raised is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_RETRY = 3
EXIT_INTERRUPTED = 130


class SynthAgentError(Exception):
    """Something a person can fix.

    Args:
        title: What went wrong, in a few words.
        message: The file, the field and the offending value.
        hint: What to do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, title: str, message: str, hint: str = "") -> None:
        super().__init__(f"{title}: {message}" + (f" ({hint})" if hint else ""))
        self.title = title
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """Return the three texts under their names."""
        return {"title": self.title, "message": self.message, "hint": self.hint}


class InvalidInput(SynthAgentError):
    """A file, a field or an argument is wrong."""

    exit_code = EXIT_INVALID


class Busy(SynthAgentError):
    """Another process holds what is needed; the same call may succeed later."""

    exit_code = EXIT_RETRY


class Conflict(SynthAgentError):
    """What was approved is not what is there, or the state forbids the action."""

    exit_code = EXIT_INVALID


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def system_error(error: OSError) -> SynthAgentError:
    """Return what the system refused as an error that names the file and the fix."""
    names = (error.filename, error.filename2)
    where = " to ".join(str(name) for name in names if name is not None)
    message = f"{where}: {error.strerror}" if where and error.strerror else str(error)
    if error.errno in _NO_SPACE:
        return SynthAgentError("Disk is full", message, "free space, or raise the file size limit")
    if error.errno in _NO_PERMISSION:
        return SynthAgentError("No permission", message, "check who may write there")
    return SynthAgentError("The system refused", message, "check the path")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint naming the closest valid name, or listing them all when none is close."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names: " + ", ".join(choices)
