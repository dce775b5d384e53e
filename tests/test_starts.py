"""Several starts as a plan option: settings, keys, commands, cost, and the stage run for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from synth_agent import worker
from synth_agent.demo import prepare_demo
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.fit import MINI_WORLD_SECONDS, estimate_cost
from synth_agent.miniworld import write_world
from synth_agent.planner.builtin import workspace_settings
from synth_agent.recipes import Recipe
from synth_agent.runs import STAGES, Cost, EventLog, Plan, Proposal, Run, digest, fold
from synth_agent.stage_plan import (
    Context,
    Stage,
    build_evaluate,
    build_finetune,
    build_pretrain,
    code_version,
)
from synth_agent.workspace import (
    TrainSettings,
    Workspace,
    load_settings,
    open_workspace,
    setting_origins,
)

MGM = Path(worker.__file__).parent.parent / "mgm"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A demo workspace with little data and few steps."""
    root = tmp_path_factory.mktemp("starts") / "demo"
    data = root.parent / "data"
    small = {"num_seed_samples": 32, "num_instructions": 4, "num_textvqa": 2, "num_mmbench": 2}
    write_world(data, seed=5, **small)
    prepare_demo(root, lambda line: None, data=data)
    path = root / "synth.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["pretrain"] |= {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 8}
    path.write_text(yaml.safe_dump(settings))
    processed = root / "artifacts" / "processed" / "made"
    processed.mkdir(parents=True)
    shutil.copy(root / settings_of(open_workspace(root))["data"]["original"], processed)
    (processed / "stage_1.json").rename(processed / "processed.json")
    (processed / "mm_projector.bin").write_text("projector")
    return open_workspace(root)


def settings_of(workspace: Workspace, **pretrain: Any) -> dict[str, Any]:
    settings = workspace_settings(workspace)
    settings["pretrain"] |= pretrain
    return settings


def context_of(workspace: Workspace, settings: dict[str, Any]) -> Context:
    recipe = {"name": "r", "process": []}
    cost = Cost(1, None, None, "none")
    proposal = Proposal("T", "t", "explore", "why", (), None, recipe, settings, cost, "me")
    made = workspace.artifacts / "processed" / "made"
    plan = Plan("0001-t", proposal, "me", "now", proposal.sha256)
    outputs = dict.fromkeys(("process", "pretrain", "finetune"), made)
    return Context(workspace, plan, Digests(workspace), outputs)


def pretrain(workspace: Workspace, **changes: Any) -> Stage:
    return build_pretrain(context_of(workspace, settings_of(workspace, **changes)))


def test_one_start_is_the_plan_that_it_is_without_the_option(workspace: Workspace) -> None:
    assert {"starts", "start_share"}.isdisjoint(settings_of(workspace)["pretrain"])
    without = pretrain(workspace)
    with_one = pretrain(workspace, starts=1, start_share=0.5)
    assert with_one == without
    assert len(without.commands) == 1 and "mgm.train" in without.commands[0]

    # The key, made as it is for a training that knows nothing of starts.
    context = context_of(workspace, settings_of(workspace))
    code = context.digests.files(MGM, sorted(set(MGM.rglob("*.py")) - {MGM / "starts.py"}))
    settings = context.settings["pretrain"]
    relevant = {k: v for k, v in settings.items() if k not in ("save_steps", "logging_steps")}
    parts = ("language_model", "vision_tower", "high_resolution_tower")
    paths = {name: workspace.path(context.settings["model"][name]) for name in parts}
    paths["data"] = context.outputs["process"] / "processed.json"
    paths["images"] = workspace.path(context.settings["data"]["images"])
    inputs = {name: context.digests.path(path) for name, path in paths.items()}
    name, seed = context.settings["model"]["name"], context.settings["seed"]
    assert without.key == digest(["pretrain", code, relevant, seed, name, inputs])


def test_what_one_start_makes_does_not_rest_on_the_program_of_several(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(workspace)

    def keys() -> list[str]:
        builders = (build_pretrain, build_finetune, build_evaluate)
        one = [build(context_of(workspace, settings)).key for build in builders]
        return [*one, pretrain(workspace, starts=2).key]

    before = keys()
    approved = code_version(Digests(workspace), "pretrain")
    files = Digests.files

    def changed(self: Digests, root: Path, paths: Iterable[Path]) -> str:
        listed = list(paths)
        is_changed = MGM / "starts.py" in listed
        return files(self, root, listed) + (" changed" if is_changed else "")

    monkeypatch.setattr(Digests, "files", changed)
    after = keys()
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    # Who approves a run approves that program too.
    assert code_version(Digests(workspace), "pretrain") != approved


def test_number_and_share_of_starts_are_part_of_the_key(workspace: Workspace) -> None:
    made = [
        pretrain(workspace, **changes).key
        for changes in ({}, {"starts": 2}, {"starts": 3}, {"starts": 3, "start_share": 0.5})
    ]
    assert len(set(made)) == 4
    assert pretrain(workspace, starts=2, start_share=1.0).key == made[1]


def test_each_start_is_a_command_and_neighbouring_seeds_share_none(workspace: Workspace) -> None:
    stage = pretrain(workspace, starts=3, start_share=0.5)
    [config] = stage.configs.values()
    assert {"starts", "start_share"}.isdisjoint(config)
    assert [command[-2:] for command in stage.commands[:-1]] == [
        ("--start", "1"), ("--start", "2"), ("--start", "3")
    ]  # fmt: skip
    last = stage.commands[-1]
    assert "--start" not in last and last[last.index("--share") + 1] == "0.5"
    assert "starts.json" in stage.required

    def seeds(seed: int) -> set[str]:
        settings = settings_of(workspace, starts=8) | {"seed": seed}
        command = build_pretrain(context_of(workspace, settings)).commands[-1]
        return set(command[command.index("--seeds") + 1].split(","))

    assert "7" in seeds(7) and len(seeds(7)) == 8
    assert seeds(7).isdisjoint(seeds(8))


def test_several_starts_of_finetuning_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    settings = settings_of(workspace)
    settings["finetune"]["starts"] = 2
    for build in (build_pretrain, build_finetune):
        with pytest.raises(InvalidInput, match=r"finetune\.starts = 2"):
            build(context_of(workspace, settings))
    path = tmp_path / "synth.yaml"
    path.write_text("finetune: {starts: 2}\n")
    with pytest.raises(InvalidInput, match=r"finetune\.starts = 2"):
        load_settings(path)
    for text in ("{starts: 9}", "{starts: 0}", "{start_share: 0.05}"):
        path.write_text(f"pretrain: {text}\n")
        with pytest.raises(InvalidInput, match=r"pretrain\.start"):
            load_settings(path)
    path.write_text("pretrain: {starts: 8, start_share: 0.1}\n")
    dumped = load_settings(path).pretrain.model_dump(mode="json")
    assert (dumped["starts"], dumped["start_share"]) == (8, 0.1)
    assert TrainSettings.model_validate(dumped).starts == 8


def test_the_option_is_listed_with_the_settings(workspace: Workspace) -> None:
    rows = {key: (value, origin) for key, value, origin in setting_origins(workspace)}
    assert rows["pretrain.starts"] == (1, "default")


def timed(workspace: Workspace, seconds: float, **pretrain: Any) -> Run:
    plan = context_of(workspace, settings_of(workspace, **pretrain)).plan
    run = Run(plan.run_id, plan)
    for name in STAGES:
        run.stages[name].status = "succeeded"
        run.stages[name].seconds = seconds if name == "pretrain" else 10.0
    return run


def test_cost_of_starts(workspace: Workspace) -> None:
    def cost(history: list[Run], **pretrain: Any) -> Cost:
        recipe = Recipe("r", "r", "", (), {})
        return estimate_cost(workspace, recipe, settings_of(workspace, **pretrain), history)

    once = sum(MINI_WORLD_SECONDS.values())
    assert cost([]).seconds == once
    three = cost([], starts=3)
    assert three.seconds == once + 2 * MINI_WORLD_SECONDS["pretrain"]
    assert "2.21 times one run" in three.basis and "plain seeds" in three.basis
    assert cost([], starts=3, start_share=0.5).seconds == once + MINI_WORLD_SECONDS["pretrain"]

    # A run of another number of starts tells the time of one start too.
    for run in (timed(workspace, 50.0), timed(workspace, 100.0, starts=3, start_share=0.5)):
        assert cost([run]).seconds == 80.0
        assert cost([run], starts=2).seconds == 130.0
        assert "starts" not in cost([run]).basis


def test_stage_with_several_starts_is_run(workspace: Workspace) -> None:
    context = context_of(workspace, settings_of(workspace, starts=2, start_share=0.5))
    stage, run_id = build_pretrain(context), context.plan.run_id
    workspace.run(run_id).root.mkdir(parents=True)
    events = EventLog(workspace.run(run_id).events)
    logged = [events.append("run_started", pid=1, host="", worker_version="", resumed=False)]
    append = events.append

    def keep(kind: str, **fields: Any) -> Any:
        logged.append(append(kind, **fields))
        return logged[-1]

    events.append = keep  # type: ignore[method-assign]
    flag = worker.CancelFlag()
    worker._run_stage(workspace, context.plan, stage, events, flag, context.digests)
    events.close()
    done = fold(context.plan, logged).stages["pretrain"]
    assert done.status == "succeeded"
    starts = done.result["starts"]
    assert starts == json.loads((stage.output / "starts.json").read_text())
    best = min(starts["starts"], key=lambda start: start["loss"])
    assert done.result["seed"] == starts["chosen_seed"] == best["seed"]
    assert starts["compared_at_step"] == 2 and done.result["steps"] == 4
    labels = {event.fields.get("label") for event in logged if event.kind == "progress"}
    assert {"start 1/2", "start 2/2"} <= labels
    assert str(done.progress["label"]).endswith(", the best")
    assert stage.missing(stage.output) == [] and not stage.partial.exists()
