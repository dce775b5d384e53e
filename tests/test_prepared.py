"""The prepared configuration gives the operators that Data-Juicer's own parser gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import synth_agent
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]
RECIPES = Path(synth_agent.__file__).parent / "miniworld" / "recipes"
_COMPARE = """
import json, os, sys
from pathlib import Path
import yaml
from synth_agent.stages.datajuicer import guard
guard()
from data_juicer.config import init_configs
from data_juicer.ops import load_ops
from synth_agent.recipes import load_recipe
from synth_agent.stages import prepared

def plain(operator):
    kept = (int, float, str, bool, type(None), list, tuple)
    paths = ("work_dir",)
    return {k: repr(v) for k, v in vars(operator).items() if isinstance(v, kept) and k not in paths}

compared, differences, parsed = 0, [], 0
for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    recipe = load_recipe(file)
    for number in range(1, len(recipe.branches) + 1):
        linear = recipe if recipe.data_plan is None else recipe.branch_recipe(number)
        folder = Path(f"{file.stem}-{number}").absolute()
        folder.mkdir()
        (folder / "input.jsonl").write_text('{"text": "a", "images": []}')
        mapping = linear.mapping() | {
            "dataset_path": str(folder / "input.jsonl"),
            "export_path": str(folder / "export" / "output.jsonl"),
            "skip_op_error": False, "use_cache": False, "ds_cache_dir": str(folder / "cache"),
        }
        ours = prepared.configuration(mapping, folder)
        parsed += (folder / "recipe.yaml").exists()
        (folder / "whole.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
        theirs = init_configs(["--config", str(folder / "whole.yaml")])
        for name in ("dataset_path", "export_path", "ds_cache_dir", "np", "text_keys", "use_cache"):
            if ours[name] != theirs[name]:
                differences.append([file.name, name, repr(ours[name]), repr(theirs[name])])
        for mine, stock in zip(load_ops(ours.process), load_ops(theirs.process), strict=True):
            compared += 1
            if plain(mine) != plain(stock):
                both = set(plain(mine).items()) ^ set(plain(stock).items())
                differences.append([file.name, mine._name, sorted(map(str, both))])
print(json.dumps([compared, parsed, differences]), file=sys.stderr)
"""


def test_operators_are_those_of_the_parser(tmp_path: Path) -> None:
    environment = stage_environment(Workspace(tmp_path, Settings())) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE, str(RECIPES)],
        cwd=tmp_path,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compared, parsed, differences = json.loads(done.stderr.splitlines()[-1])
    assert differences == []
    assert compared > 30
    assert parsed == 0
