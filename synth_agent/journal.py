"""The experiment log in git: commit exactly the given paths, read the commits back.

A commit is made with `git commit --only`, so staged changes, dirty files, stash and branch stay as
they are. The user's hooks do not run on these commits (`core.hooksPath=/dev/null`): a hook may
rewrite files, and the log must hold what was measured. Where git refuses, the commit is noted in
`artifacts/pending-commits.json` and made by the next `commit` or `catch_up`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from git import Git
from git.exc import GitCommandError, GitCommandNotFound

from synth_agent.workspace import Workspace

_UNFINISHED = ("rebase-merge", "rebase-apply", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")


@dataclass(frozen=True)
class CommitResult:
    """What became of a commit."""

    made: bool
    sha: str | None = None
    reason: str = ""
    """Git's own words when it refused and the commit is pending; empty when nothing differed."""


@dataclass(frozen=True)
class Commit:
    """One commit of the log."""

    hash: str
    time: str
    subject: str
    trailers: Mapping[str, str]


def commit(
    workspace: Workspace,
    paths: Sequence[Path],
    message: str,
    trailers: Mapping[str, str] | None = None,
) -> CommitResult:
    """Commit these files or folders and nothing else; earlier pending commits go first.

    Never raises for what git refuses: the refusal is returned and the commit is kept pending.
    """
    names = [path.resolve().relative_to(workspace.root.resolve()).as_posix() for path in paths]
    body = message
    if trailers:
        body += "\n\n" + "\n".join(f"{key}: {value}" for key, value in trailers.items())
    with one_writer(workspace):
        # Noted first: a process that is killed here leaves the commit to the next one.
        waiting = [*_entries(workspace), {"paths": names, "message": body, "begun": True}]
        _write_pending(workspace, waiting)
        results = _make_pending(workspace)
    if len(results) == len(waiting):
        return results[-1]
    return CommitResult(False, reason="an earlier commit of the log is still pending")


def catch_up(workspace: Workspace) -> list[CommitResult]:
    """Make the pending commits, oldest first, up to the first that git refuses again."""
    with one_writer(workspace):
        return _make_pending(workspace)


def is_unrecorded(workspace: Workspace, path: Path) -> bool:
    """Tell whether a file differs from the last commit and no commit of it is on its way."""
    name = path.resolve().relative_to(workspace.root.resolve())
    with one_writer(workspace):
        waiting = [
            PurePosixPath(known) for entry in _entries(workspace) for known in entry["paths"]
        ]
        if any(name.is_relative_to(known) for known in waiting):
            return False
        try:
            return bool(_git(workspace).status("--porcelain", "--", name.as_posix()))
        except (GitCommandError, GitCommandNotFound):
            return False


def _make_pending(workspace: Workspace) -> list[CommitResult]:
    waiting = _entries(workspace)
    results: list[CommitResult] = []
    while waiting:
        result = _commit(workspace, waiting[0]["paths"], waiting[0]["message"])
        results.append(result)
        if result.reason:
            refused = [{k: v for k, v in entry.items() if k != "begun"} for entry in waiting]
            refused[0]["reason"] = result.reason
            _write_pending(workspace, refused)
            break
        waiting = waiting[1:]
        _write_pending(workspace, waiting)
    return results


def pending(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the commits that git refused so far: paths, message and, for the first, the reason."""
    return [entry for entry in _entries(workspace) if not entry.get("begun")]


def refusal(workspace: Workspace) -> str:
    """Say how many commits git refused and why, in one line; empty when it refused none."""
    refused = pending(workspace)
    if not refused:
        return ""
    reason = " ".join(str(refused[0].get("reason", "")).split())
    why = f": {reason}" if reason else ""
    return f"git refused {len(refused)} commit(s) of the log, which are made with the next{why}"


def _entries(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the commits that were not made: refused, or begun by a process that ended."""
    try:
        entries = json.loads(_pending_file(workspace).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return list(entries)


def log(workspace: Workspace, limit: int = 20) -> list[str]:
    """Return the branch's last commits as `hash subject` lines, newest first."""
    try:
        return str(_git(workspace).log(f"--max-count={limit}", "--format=%h %s")).splitlines()
    except (GitCommandError, GitCommandNotFound):
        return []


def history(workspace: Workspace) -> list[Commit]:
    """Return the commits that touch the runs, newest first; none outside a repository."""
    try:
        text = _git(workspace).log(
            "--format=%H%x1f%cI%x1f%s%x1f%(trailers:only,unfold)%x1e", "--", "runs"
        )
    except (GitCommandError, GitCommandNotFound):
        return []
    return [_parse(record) for record in text.split("\x1e") if record.strip()]


def head(workspace: Workspace) -> str | None:
    """Return the hash of HEAD; None where there is none."""
    try:
        return str(_git(workspace).rev_parse("--verify", "HEAD"))
    except (GitCommandError, GitCommandNotFound):
        return None


def _parse(record: str) -> Commit:
    hash_, time, subject, trailers = record.strip("\n").split("\x1f")
    pairs = (line.split(": ", 1) for line in trailers.splitlines() if ": " in line)
    return Commit(hash_, time, subject, dict(pairs))


def _commit(workspace: Workspace, names: Sequence[str], message: str) -> CommitResult:
    git = _git(workspace)
    try:
        _refuse_unfinished(git, workspace)
        present = [name for name in names if (workspace.root / name).exists()]
        _refuse_ignored(git, present)
        new = git.ls_files("--others", "--exclude-standard", "--", *present).splitlines()
        if not present or not (new or _differs(workspace, git, present)):
            return CommitResult(False)
        if new:
            git.add("--intent-to-add", "--", *new)
        try:
            git.commit("--only", "--quiet", "--no-gpg-sign", "-m", message, "--", *present)
        except GitCommandError:
            if new:
                git.rm("--cached", "--quiet", "--", *new)
            raise
        return CommitResult(True, str(git.rev_parse("HEAD")))
    except (GitCommandError, GitCommandNotFound) as error:
        words = str(getattr(error, "stderr", "")).strip() or str(error)
        return CommitResult(False, reason=words)


def _differs(workspace: Workspace, git: Git, present: Sequence[str]) -> bool:
    """Whether there is something to commit; without a first commit there always is."""
    return head(workspace) is None or bool(git.diff("HEAD", "--name-only", "--", *present))


_RECORDS = (".yaml", ".json", ".jsonl", ".md")
"""Endings of the log's files."""


def _refuse_ignored(git: Git, present: Sequence[str]) -> None:
    """Git passes over files that it is told to ignore; the log would lack them without a word."""
    if not present:
        return
    listed = git.ls_files("--others", "--ignored", "--exclude-standard", "--", *present)
    for name in listed.splitlines():
        # Others are an editor's or the system's, and rightly ignored.
        if not Path(name).name.startswith(".") and name.endswith(_RECORDS):
            words = f"{name} is ignored: take it out of .gitignore or .git/info/exclude"
            raise GitCommandError(["git", "commit"], 1, words.encode())


def _refuse_unfinished(git: Git, workspace: Workspace) -> None:
    folder = workspace.root / git.rev_parse("--git-dir")
    for name in _UNFINISHED:
        if (folder / name).exists():
            raise GitCommandError(["git", "commit"], 1, f"{name} is in progress".encode())


@contextmanager
def one_writer(workspace: Workspace) -> Iterator[None]:
    """Let the app, the worker and the command line number runs and commit one after the other."""
    workspace.artifacts.mkdir(parents=True, exist_ok=True)
    with (workspace.artifacts / "journal.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _git(workspace: Workspace) -> Git:
    git = Git(str(workspace.root))
    git.update_environment(GIT_TERMINAL_PROMPT="0", GIT_LITERAL_PATHSPECS="1")
    git.set_persistent_git_options(c=["core.hooksPath=/dev/null", "core.quotePath=false"])
    return git


def _pending_file(workspace: Workspace) -> Path:
    return workspace.artifacts / "pending-commits.json"


def _write_pending(workspace: Workspace, entries: Sequence[Mapping[str, Any]]) -> None:
    path = _pending_file(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(list(entries), indent=1), encoding="utf-8")
    partial.replace(path)
