"""A run on a disk that fills up: it fails with the reason, and goes on once there is room again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from synth_agent import headless, pipeline
from synth_agent.demo import prepare_demo
from synth_agent.miniworld import write_world
from synth_agent.planner import BuiltinPlanner
from synth_agent.workspace import Workspace, open_workspace

SIZE_MEGABYTES = 96
LEFT_BYTES = 100_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory; mounting one needs privileges that not everybody has."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE_MEGABYTES}m", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def workspace(small_disk: Path) -> Workspace:
    root = small_disk / "demo"
    data = small_disk / "data"
    small = {"num_seed_samples": 24, "num_instructions": 6, "num_textvqa": 4, "num_mmbench": 6}
    write_world(data, seed=5, **small)
    prepare_demo(root, lambda line: None, data=data)
    path = root / "synth.yaml"
    settings = yaml.safe_load(path.read_text())
    for stage in ("pretrain", "finetune"):
        settings[stage] |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    path.write_text(yaml.safe_dump(settings))
    return open_workspace(root)


def test_a_full_disk_is_named_and_nothing_is_lost(
    workspace: Workspace, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proposal = BuiltinPlanner().propose(workspace, [], ())
    assert proposal is not None
    plan = pipeline.approve(workspace, proposal, shown_sha256=proposal.sha256, approver="a test")
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(shutil.disk_usage(small_disk).free - LEFT_BYTES))

    pipeline.launch(workspace, plan)
    failed = headless.follow(workspace, plan.run_id)
    assert failed.status == "failed"
    told = capsys.readouterr()
    assert "Disk is full" in told.err + told.out

    filler.unlink()
    pipeline.resume(workspace, plan.run_id)
    resumed = headless.follow(workspace, plan.run_id)
    assert resumed.status == "succeeded"
    assert set(resumed.scores) == {"textvqa", "mmbench"}
