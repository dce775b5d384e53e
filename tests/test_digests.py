"""Digests follow the content and are remembered."""

from __future__ import annotations

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
