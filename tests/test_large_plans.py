"""Branches of a data plan that run in chunks make the files that they make in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synth_agent.changes import CHANGES_NAME
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]
NUM_SAMPLES = 20
PLAN = """
# title: Short and long
# reason: Short captions twice, the others without repetitions, a drawn part of them, and cleaned.
np: 1
auto_op_parallelism: false
skip_op_error: false
branches:
- name: short
  process:
  - text_length_filter: {max_len: 30, num_proc: 0}
  repeat: 2
- name: distinct
  process:
  - document_deduplicator: {num_proc: 0}
  - text_length_filter: {min_len: 25, num_proc: 0}
  sample: {count: 6, seed: 3}
- name: cleaned
  process:
  - whitespace_normalization_mapper: {num_proc: 0}
  - image_shape_filter: {min_width: 10, num_proc: 0}
merge: concatenate
deduplicate: false
order: {by: shuffled, seed: 5}
"""
_IN_CHUNKS_OF_THREE = """
import sys
from synth_agent.stages import process, streaming
streaming.stream_branch.__defaults__ = (3,)
streamed, branch = [], process.stream_branch
process.stream_branch = lambda *given: streamed.append(1) or branch(*given)
code = process.main()
print(len(streamed))
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A seed set with repeated captions and pictures of two widths."""
    originals, lines = [], []
    for number in range(NUM_SAMPLES):
        size = (8 if number % 3 else 16, 8)
        Image.new("RGB", size, (number * 10, 0, 0)).save(tmp_path / f"{number}.png")
        text = f"<__dj__image>\nbox  {'very ' * (number % 5)}{number // 2}"
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        conversations = [asked, {"from": "gpt", "value": text}]
        originals.append({"id": number, "image": f"{number}.png", "conversations": conversations})
        lines.append(json.dumps({"id": number, "images": [f"{number}.png"], "text": text}) + "\n")
    (tmp_path / "stage_1.json").write_text(json.dumps(originals), "utf-8")
    (tmp_path / "seed.jsonl").write_text("".join(lines), "utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN.lstrip(), "utf-8")
    (tmp_path / "synth.yaml").touch()
    return tmp_path


def _run(folder: Path, way: list[str], output: str, *more: str) -> str:
    command = [sys.executable, *way, "--recipe", "plan.yaml", "--seed", "seed.jsonl"]
    command += ["--images", ".", "--original", "stage_1.json", "--output", output, *more]
    environment = stage_environment(Workspace(folder, Settings())) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


def _result(output: Path) -> dict[str, Any]:
    """Return the result without how long the operators took."""
    result: dict[str, Any] = json.loads((output / "result.json").read_text("utf-8"))
    for operator in result["operators"]:
        del operator["seconds"]
    return result


@pytest.mark.parametrize("cap", ["1000", "15"])
def test_files_equal_those_made_in_memory(folder: Path, cap: str) -> None:
    _run(folder, ["-m", "synth_agent.stages.process"], "whole", "--cap", cap)
    chunked = ["-c", _IN_CHUNKS_OF_THREE]
    assert _run(folder, chunked, "large", "--cap", cap, "--large", "10") == "3"
    whole, large = folder / "whole", folder / "large"
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in large.iterdir()} == names
    for name in names - {"result.json", CHANGES_NAME}:
        assert (large / name).read_bytes() == (whole / name).read_bytes(), name
    assert _result(large) == _result(whole)
    assert all(share["samples"] > 0 for share in _result(whole)["branches"])


def test_a_branch_that_chunks_could_change_runs_in_memory(folder: Path) -> None:
    plan = (folder / "plan.yaml").read_text("utf-8")
    selector = "  - random_selector: {select_num: 9, num_proc: 0}\n  repeat: 2\n"
    (folder / "plan.yaml").write_text(plan.replace("  repeat: 2\n", selector), "utf-8")
    _run(folder, ["-m", "synth_agent.stages.process"], "whole")
    assert _run(folder, ["-c", _IN_CHUNKS_OF_THREE], "large", "--large", "10") == "2"
    assert _result(folder / "large") == _result(folder / "whole")
