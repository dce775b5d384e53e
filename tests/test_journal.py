"""Commits of the log in a real repository: exact, and nobody else's business."""

from __future__ import annotations

import subprocess

import pytest

from synth_agent import journal
from synth_agent.workspace import Workspace


def git(workspace: Workspace, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=workspace.root, check=True, capture_output=True, text=True
    ).stdout


def write_record(workspace: Workspace, name: str) -> None:
    workspace.run(name).root.mkdir(parents=True)
    workspace.run(name).summary.write_text(f"# {name}\n")


def commit(workspace: Workspace, name: str) -> journal.CommitResult:
    return journal.commit(workspace, [workspace.run(name).root], f"run: {name}", {"Run": name})


def test_commit_has_exactly_the_paths_and_the_trailers(git_workspace: Workspace) -> None:
    write_record(git_workspace, "0001-a")
    (git_workspace.root / "other").write_text("untracked")
    result = commit(git_workspace, "0001-a")
    assert result.made and result.sha == git(git_workspace, "rev-parse", "HEAD").strip()
    shown = git(git_workspace, "show", "--name-only", "--format=")
    assert shown.split() == ["runs/0001-a/summary.md"]
    assert journal.history(git_workspace)[0].trailers == {"Run": "0001-a"}
    assert journal.log(git_workspace, limit=1)[0].endswith("run: 0001-a")


def test_staged_hunk_stash_and_dirty_file_stay(git_workspace: Workspace) -> None:
    settings = git_workspace.settings_file
    settings.write_text("goal: stashed\n")
    git(git_workspace, "stash")
    settings.write_text("goal: staged\n")
    git(git_workspace, "add", "synth.yaml")
    settings.write_text("goal: dirty\n")
    (git_workspace.root / "loose").write_text("untracked")
    states = (("status", "--porcelain"), ("diff", "--cached"), ("diff",), ("stash", "list"))
    write_record(git_workspace, "0001-a")
    before = [git(git_workspace, *state) for state in states[1:]]
    assert commit(git_workspace, "0001-a").made
    assert [git(git_workspace, *state) for state in states[1:]] == before
    assert git(git_workspace, *states[0]) == "MM synth.yaml\n?? loose\n"


def test_hooks_do_not_run(git_workspace: Workspace) -> None:
    hook = git_workspace.root / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    write_record(git_workspace, "0001-a")
    assert commit(git_workspace, "0001-a").made


def test_refused_commit_is_made_before_the_next(git_workspace: Workspace) -> None:
    unfinished = git_workspace.root / ".git" / "rebase-merge"
    unfinished.mkdir()
    for name in ("0001-a", "0002-b"):
        write_record(git_workspace, name)
        result = commit(git_workspace, name)
        assert not result.made and result.reason
    assert len(journal.pending(git_workspace)) == 2
    assert "runs" in git(git_workspace, "status", "--porcelain")
    unfinished.rmdir()
    write_record(git_workspace, "0003-c")
    assert commit(git_workspace, "0003-c").made
    assert [entry.subject for entry in journal.history(git_workspace)] == [
        "run: 0003-c",
        "run: 0002-b",
        "run: 0001-a",
    ]
    assert journal.pending(git_workspace) == []


def test_nothing_changed_makes_no_commit(git_workspace: Workspace) -> None:
    write_record(git_workspace, "0001-a")
    commit(git_workspace, "0001-a")
    assert commit(git_workspace, "0001-a") == journal.CommitResult(False)


def test_first_commit_of_a_repository(git_workspace: Workspace) -> None:
    git(git_workspace, "checkout", "-q", "--orphan", "fresh")
    git(git_workspace, "rm", "-rq", "--cached", ".")
    write_record(git_workspace, "0001-a")
    assert commit(git_workspace, "0001-a").made


def test_a_killed_commit_is_made_with_the_next(
    git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit(137)

    write_record(git_workspace, "0001-a")
    with monkeypatch.context() as patched:
        patched.setattr(journal, "_commit", killed)
        with pytest.raises(SystemExit):
            commit(git_workspace, "0001-a")
    git(git_workspace, "add", "--intent-to-add", "runs/0001-a")
    assert journal.pending(git_workspace) == []  # git has refused nothing
    write_record(git_workspace, "0002-b")
    assert commit(git_workspace, "0002-b").made
    assert [entry.subject for entry in journal.history(git_workspace)] == [
        "run: 0002-b",
        "run: 0001-a",
    ]
    assert git(git_workspace, "status", "--porcelain") == ""


def test_a_refusal_is_told_with_gits_reason(git_workspace: Workspace) -> None:
    lock = git_workspace.root / ".git" / "index.lock"
    lock.touch()
    write_record(git_workspace, "0001-a")
    assert not commit(git_workspace, "0001-a").made
    told = journal.refusal(git_workspace)
    assert "refused 1 commit(s)" in told
    assert "index.lock" in told
    lock.unlink()
    assert journal.catch_up(git_workspace)[0].made
    assert journal.refusal(git_workspace) == ""


def test_records_that_git_ignores_are_told(git_workspace: Workspace) -> None:
    write_record(git_workspace, "0001-a")
    (git_workspace.root / ".git" / "info" / "exclude").write_text("*.swp\n*.log\n")
    (git_workspace.run("0001-a").root / ".summary.md.swp").write_text("an editor's")
    assert commit(git_workspace, "0001-a").made
    (git_workspace.root / ".gitignore").write_text("runs/\n")
    write_record(git_workspace, "0002-b")
    refused = commit(git_workspace, "0002-b")
    assert not refused.made
    assert "runs/0002-b/summary.md is ignored: take it out" in refused.reason
    (git_workspace.root / ".gitignore").unlink()
    write_record(git_workspace, "0003-c")
    assert commit(git_workspace, "0003-c").made
    assert [one.trailers["Run"] for one in journal.history(git_workspace)[:2]] == [
        "0003-c",
        "0002-b",
    ]
