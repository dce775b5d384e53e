"""Digests follow the content and are remembered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from synth_agent.digests import Digests
from synth_agent.workspace import Workspace


def test_folder_digest_follows_content_and_names(git_workspace: Workspace) -> None:
    folder = git_workspace.root / "folder"
    folder.mkdir()
    (folder / "a").write_text("one")
    digests = Digests(git_workspace)
    first = digests.path(folder)
    digests.save()
    assert Digests(git_workspace).path(folder) == first
    (folder / "a").write_text("other")
    second = Digests(git_workspace).path(folder)
    (folder / "a").rename(folder / "b")
    assert len({first, second, Digests(git_workspace).path(folder)}) == 3


def test_linked_folders_count_with_what_is_in_them(git_workspace: Workspace) -> None:
    folder, elsewhere = git_workspace.root / "folder", git_workspace.root / "elsewhere"
    folder.mkdir()
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "0.jpg").write_text("one")
    (folder / "images").symlink_to(elsewhere)
    first = Digests(git_workspace).path(folder)
    (elsewhere / "deep" / "0.jpg").write_text("other")
    assert Digests(git_workspace).path(folder) != first
    (elsewhere / "deep" / "0.jpg").write_text("one")
    assert Digests(git_workspace).path(folder) == first
    (folder / "images").unlink()
    elsewhere.rename(folder / "images")
    assert Digests(git_workspace).path(folder) == first


def test_a_link_to_a_folder_above_it_ends(git_workspace: Workspace) -> None:
    folder = git_workspace.root / "folder"
    folder.mkdir()
    (folder / "a").write_text("one")
    before = Digests(git_workspace).path(folder)
    (folder / "again").symlink_to(folder)
    assert Digests(git_workspace).path(folder) == before


def test_names_that_are_not_utf8_are_names(git_workspace: Workspace) -> None:
    folder = git_workspace.root / "folder"
    folder.mkdir()
    named = folder / os.fsdecode(b"caf\xe9.jpg")
    try:
        named.write_text("one")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    first = Digests(git_workspace).path(folder)
    named.rename(folder / os.fsdecode(b"caf\xe8.jpg"))
    assert Digests(git_workspace).path(folder) != first


@pytest.mark.parametrize("text", ["null", "[]", '{"a": 1}', '{"a": []}', "{"])
def test_a_damaged_memory_costs_time_only(git_workspace: Workspace, text: str) -> None:
    file: Path = git_workspace.root / "file"
    file.write_text("one")
    digests = Digests(git_workspace)
    first = digests.path(file)
    digests.save()
    (git_workspace.artifacts / "cache" / "digests.json").write_text(text)
    assert Digests(git_workspace).path(file) == first
