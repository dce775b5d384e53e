"""Stages that several processes train: how they are started, and what stays the same."""

from __future__ import annotations

import sys

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.pipeline import check_settings
from synth_agent.workspace import Workspace
from tests.test_pipeline import changed, filled, plan_of, settings_of, stages_of

__all__ = ["filled"]


def test_torchrun_starts_several_processes_of_the_same_training(filled: Workspace) -> None:
    settings = settings_of(filled)
    one = stages_of(filled, plan_of(filled, settings, []))
    two = stages_of(filled, plan_of(filled, changed(settings, "compute", processes=2), []))
    for name, stage in two.items():
        assert stage.key == one[name].key
        assert stage.configs == one[name].configs
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name in ("pretrain", "finetune"):
        [command] = two[name].commands
        [alone] = one[name].commands
        assert command == (*launcher, *alone[1:])
        assert command[5:7] == ("-m", "mgm.train")
    assert two["evaluate"].commands == one["evaluate"].commands


def test_settings_from_before_the_option_train_in_one_process(filled: Workspace) -> None:
    settings = settings_of(filled)
    compute = {name: value for name, value in settings["compute"].items() if name != "processes"}
    stages = stages_of(filled, plan_of(filled, {**settings, "compute": compute}, []))
    assert stages["pretrain"].commands[0][:3] == (sys.executable, "-m", "mgm.train")


def test_several_starts_are_refused(filled: Workspace) -> None:
    settings = changed(settings_of(filled), "compute", processes=2)
    settings = changed(settings, "pretrain", starts=2, start_share=1.0)
    with pytest.raises(InvalidInput, match=r"compute\.processes = 2"):
        stages_of(filled, plan_of(filled, settings, []))
    with pytest.raises(InvalidInput, match=r"pretrain\.starts = 2"):
        check_settings(filled, settings)
