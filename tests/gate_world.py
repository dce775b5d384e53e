"""A small workspace whose approvals cover real files, for the tests of the gate."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from synth_agent.planner import workspace_settings
from synth_agent.recipes import load_recipe
from synth_agent.runs import Cost, Plan, Proposal
from synth_agent.workspace import Workspace

FILES = {
    "data.seed": "data/seed.jsonl",
    "data.original": "data/original.json",
    "data.instructions": "data/instruct.json",
    "data.images": "data/pictures/1.png",
    "model.language_model": "models/language/model.safetensors",
    "evaluate.mmbench.questions": "data/questions.tsv",
    "recipe: models/clip": "models/clip/model.safetensors",
}
"""One file of everything that the proposals below refer to, by its name in the approval."""
_TICKS = itertools.count(1)


def fill(workspace: Workspace) -> None:
    """Write the files."""
    for path in FILES.values():
        target = workspace.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"content of {path}\n")


def proposal_of(*, seed: int = 1, least: int = 1, **fields: Any) -> Proposal:
    """Return a proposal over the files."""
    recipe = {
        "name": "r",
        "process": [
            {"text_length_filter": {"min_len": least}},
            {"image_text_similarity_filter": {"hf_clip": "models/clip"}},
        ],
    }
    settings = {
        "seed": seed,
        "data": {
            "seed": "data/seed.jsonl",
            "images": "data/pictures",
            "original": "data/original.json",
            "instructions": "data/instruct.json",
            "sample_cap": 100,
        },
        "model": {"name": "mgm-mini", "language_model": "models/language"},
        "evaluate": {"mmbench": {"questions": "data/questions.tsv"}},
    }
    values: dict[str, Any] = {
        "title": "A run",
        "slug": "try",
        "kind": "explore",
        "reason": "why",
        "evidence": (),
        "parent": None,
        "recipe": recipe,
        "settings": settings,
        "cost": Cost(8, 8, None, "none"),
        "proposed_by": "a planner",
    }
    return Proposal(**{**values, **fields})


def write(path: Path, content: bytes) -> None:
    """Write a file with a modification time of its own, as a slower editor would."""
    path.write_bytes(content)
    moment = 1_700_000_000_000_000_000 + next(_TICKS) * 1_000_000
    os.utime(path, ns=(moment, moment))


def flip(path: Path, position: int | None = None) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    write(path, bytes(content))


def paths_of(workspace: Workspace, plan: Plan) -> dict[str, Path]:
    """Return every file that an approval covers, by its name there."""
    paths = workspace.run(plan.run_id)
    named = {name: workspace.root / path for name, path in FILES.items()}
    return named | {"run: recipe.yaml": paths.recipe, "run: proposal.yaml": paths.proposal}


def fill_settings(workspace: Workspace) -> None:
    """Write a file for every path of the settings, and a few recipes of text filters."""
    settings = workspace.settings.model_dump(mode="json")
    evaluate = settings["evaluate"]
    model = {key: value for key, value in settings["model"].items() if key != "name"}
    for section in (settings["data"], evaluate["textvqa"], evaluate["mmbench"], model):
        for value in section.values():
            if not isinstance(value, str):
                continue
            path = workspace.path(value)
            target = path if path.suffix else path / "file"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(value)
    workspace.recipes.mkdir()
    for name, steps in RECIPES.items():
        text = "".join(f"  - {operator}:\n      {value}\n" for operator, value in steps)
        (workspace.recipes / f"{name}.yaml").write_text(f"skip_op_error: false\nprocess:\n{text}")


RECIPES = {
    "short": [("text_length_filter", "min_len: 3")],
    "words": [("words_num_filter", "min_num: 2")],
    "clean": [("text_length_filter", "min_len: 3"), ("whitespace_normalization_mapper", "{}")],
}


def recipe_proposal(
    workspace: Workspace, name: str, *, seed: int = 1024, seconds: float | None = None
) -> Proposal:
    """Return a valid proposal for one of the recipes under the workspace's settings."""
    mapping = load_recipe(workspace.recipes / f"{name}.yaml").mapping()
    settings = {**workspace_settings(workspace), "seed": seed}
    cost = Cost(8, None, seconds, "none")
    return proposal_of(
        title=f"Try {name}",
        slug=name,
        recipe={"name": name, **mapping},
        settings=settings,
        cost=cost,
    )
