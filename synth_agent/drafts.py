"""Proposals that were shown and wait for a decision.

A draft is named by its sha256, so what is approved later is what was shown. Drafts are a
convenience of the command line, and the place where the proposals are kept that another was
preferred to; the app holds its proposal in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

from synth_agent.errors import Conflict, InvalidInput
from synth_agent.runs import Proposal, proposal_from
from synth_agent.workspace import Workspace

_SHORTEST = 6


def keep(workspace: Workspace, proposal: Proposal) -> Path:
    """Write a proposal where `find` looks for it."""
    folder = workspace.artifacts / "drafts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{proposal.sha256}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(proposal.content(), indent=1), "utf-8")
    partial.replace(path)
    return path


def find(workspace: Workspace, prefix: str) -> Proposal:
    """Return the draft whose sha256 starts with `prefix`.

    Raises:
        InvalidInput: If none or several match.
        Conflict: If the file no longer has the content it is named after.
    """
    drafts = workspace.artifacts / "drafts"
    matches = [path for path in sorted(drafts.glob("*.json")) if path.stem.startswith(prefix)]
    if len(prefix) < _SHORTEST or len(matches) != 1:
        raise InvalidInput(
            "No such proposal",
            f"{len(matches)} shown proposals have a sha256 that starts with {prefix!r}",
            f"give at least {_SHORTEST} characters of the sha256 that `synth-agent propose` printed",
        )
    try:
        proposal = proposal_from(json.loads(matches[0].read_text("utf-8")))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "Proposal cannot be read", f"{matches[0]}: {error}", "propose it again"
        ) from error
    if proposal.sha256 != matches[0].stem:
        raise Conflict(
            "Proposal was changed", f"{matches[0]}", "propose it again: synth-agent propose"
        )
    return proposal
