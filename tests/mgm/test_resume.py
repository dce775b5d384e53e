"""Trainings that are killed while they write, again and again: the end is always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgm.train import main
from mgm.weights import read_tensors
from tests.mgm.tiny_training import arguments, write_parts

REPOSITORY = Path(__file__).parent.parent.parent
LAST_SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three folders of a tiny model."""
    return write_parts(tmp_path_factory.mktemp("parts"))


def kill(command: list[str], kills: list[str]) -> None:
    """Run a training again and again until it kills itself, as `killed_training` describes."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.mgm.killed_training", ",".join(kills), *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def weights(output: Path, method: str) -> dict[str, torch.Tensor]:
    if method == "projector":
        return read_tensors(output / "mm_projector.bin")
    if method == "full":
        return read_tensors(output)
    adapters = read_tensors(output / "adapter_model.safetensors")
    return adapters | read_tensors(output / "non_lora_trainables.bin")


@pytest.fixture(scope="module")
def projector(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The projector file of an undisturbed pretraining."""
    output = tmp_path_factory.mktemp("pretrained")
    assert main(arguments(parts, output, "projector", output)) == 0
    return output / "mm_projector.bin"


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        (
            "full",
            [
                "state.pt:1:half",
                "state.pt:3:half",
                "state.pt:2:before",
                "state.pt:2:after",
                f"{LAST_SHARD}:1:half",
                "model.safetensors.index.json:1:before",
                "train_state.json:1:half",
            ],
        ),
        (
            "lora",
            [
                "state.pt:4:half",
                "non_lora_trainables.bin:1:half",
                "train_state.json:1:after",
            ],
        ),
        ("projector", ["state.pt:5:after", "mm_projector.bin:1:half"]),
    ],
)
def test_a_training_killed_while_it_writes_ends_with_the_undisturbed_weights(
    parts: dict[str, Path], projector: Path, tmp_path: Path, method: str, kills: list[str]
) -> None:
    output, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = arguments(parts, output, method, projector)
    kill(command, kills)
    assert (output / "train_state.json").exists() == kills[-1].endswith(":after")
    assert main(command) == 0
    assert main(arguments(parts, undisturbed, method, projector)) == 0
    ours, theirs = weights(output, method), weights(undisturbed, method)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    metrics = [folder / "metrics.jsonl" for folder in (output, undisturbed)]
    assert metrics[0].read_text() == metrics[1].read_text()
    assert not list(output.rglob("*.partial"))


@pytest.mark.parametrize("content", [b"", b"x" * 1000, None])
def test_a_damaged_state_is_named(
    parts: dict[str, Path],
    projector: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
) -> None:
    output = tmp_path / "out"
    command = arguments(parts, output, "projector", projector)
    kill(command, ["state.pt:3:after"])
    path = output / "state" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{path} is cut off or damaged" in told
    assert f"remove {path.parent}" in told
