"""Loading and saving take the memory of the model once, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent

# Prints the peak memory in bytes at the start, after loading, and after saving in another dtype.
MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from mgm import checkpoint, weights
from mgm.config import ModelConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
weights._MAPPED_BYTES = 16_000_000
folder = Path(sys.argv[1])
if sys.argv[2] == "write":
    mini = ModelConfig.preset("mgm-mini").language
    sizes = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 2048}
    language = {**mini, **sizes, "num_hidden_layers": 24, "head_dim": 128}
    config = ModelConfig.preset("mgm-mini", language=language)
    model = checkpoint.empty_model(config, torch.bfloat16).to(torch.bfloat16)
    checkpoint.save_full(model, folder)
else:
    found = [peak()]
    model = checkpoint.load_full(folder, torch.bfloat16)
    found.append(peak())
    checkpoint.save_full(model, folder.with_name("again"), dtype=torch.float16)
    found.append(peak())
    print(json.dumps(found))
"""


def _measure(folder: Path, what: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), what],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_no_second_copy_of_the_weights_is_held(tmp_path: Path) -> None:
    _measure(tmp_path / "full", "write")
    size = sum(path.stat().st_size for path in (tmp_path / "full").glob("*.safetensors"))
    assert size > 200_000_000
    start, loaded, saved = json.loads(_measure(tmp_path / "full", "load"))
    assert loaded - start < 1.35 * size
    assert saved - loaded < 0.35 * size
