"""DeepSpeed trains what the plain engine trains: on one and two processes, on the CPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from mgm.deepspeed_engine import configuration
from mgm.errors import InputError
from mgm.train import main, prepare_model
from mgm.train_settings import TrainSettings
from tests.mgm.test_distributed import Processes, answers, cases, ends, projector, start
from tests.mgm.test_train import (
    GOLDEN,
    assert_equal,
    finetune,
    flags,
    lines,
    parts,
    settings,
    wait_for_step,
    weights,
)

__all__ = ["parts", "projector"]
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
KITS_FILE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
    },
}


def ends_in_time(processes: Processes, seconds: float = 110) -> list[tuple[int, str]]:
    """Return what `ends` does; processes that wait for each other for ever are killed."""
    timer = Timer(seconds, lambda: [process.kill() for process in processes])
    timer.start()
    try:
        return ends(processes)
    finally:
        timer.cancel()


@pytest.fixture(scope="module", params=[1, 2])
def found(
    request: pytest.FixtureRequest,
    parts: dict[str, Path],
    projector: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What one or two processes have to say; they are started once."""
    folder = tmp_path_factory.mktemp("deepspeed")
    kits = folder / "zero2.json"
    kits.write_text(json.dumps(KITS_FILE))
    every = cases(parts, projector, folder)
    with_deepspeed = {
        **{name: [*given, "--deepspeed=zero2"] for name, given in every.items()},
        "full, kit's file": [*every["full, reference"], f"--deepspeed-config={kits}"],
        "full, offload": [*every["full, reference"], "--deepspeed=zero2-offload"],
        "lora, offload, fast": [*every["lora, fast"], "--deepspeed=zero2-offload"],
    }
    if request.param == 1:
        with_deepspeed = {name: with_deepspeed[name] for name in ("full, reference", "full, fast")}
    resume = {"task": "resume", "folder": str(folder / "state"), "steps": 2}
    resume |= {"arguments": with_deepspeed["full, reference"]}
    golden = {"task": "golden", "folder": str(GOLDEN / "train_run")}
    tasks = {
        "compare": {"task": "compare", "steps": 3, "cases": with_deepspeed},
        "resume": resume,
        "golden": {**golden, "changes": {"deepspeed": "zero2"}},
    }
    return dict(zip(tasks, answers(folder, list(tasks.values()), request.param), strict=True))


def assert_alike(compared: dict[str, Any]) -> None:
    assert compared
    for name, values in compared.items():
        assert values["difference"] < 1e-5, name
        assert values["moved"] > 1e-5, name
        for together, alone in zip(values["together"], values["alone"], strict=True):
            assert together == pytest.approx(alone, rel=1e-4), name


@needs_deepspeed
def test_deepspeed_trains_what_the_plain_engine_trains(found: dict[str, Any]) -> None:
    assert_alike(found["compare"])


@needs_deepspeed
@pytest.mark.parametrize("size", [1, 2])
def test_weights_in_parts_train_what_whole_ones_train(
    parts: dict[str, Path], projector: Path, tmp_path: Path, size: int
) -> None:
    every = cases(parts, projector, tmp_path)
    chosen = {
        name: [*given, "--deepspeed=zero3"]
        for name, given in every.items()
        if name.endswith("reference")
    }
    chosen["lora, recomputed"] = [*chosen["lora, reference"], "--gradient-checkpointing"]
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([{"task": "compare", "steps": 3, "cases": chosen}]))
    command = ["-m", "tests.mgm.several_processes", str(path)]
    for code, told in ends_in_time(start(command, size)):
        assert code == 0, told
    assert_alike(json.loads(path.with_suffix(".answers").read_text())[0])


@needs_deepspeed
def test_deepspeed_continues_from_its_own_state(found: dict[str, Any]) -> None:
    told = found["resume"]
    assert not told["is_local"]
    assert told["continued"] == told["undisturbed"]
    assert told["difference"] == 0.0
    assert told["files"] == ["deepspeed", "state.pt"]


@needs_deepspeed
def test_recorded_runs_are_repeated_by_deepspeed(found: dict[str, Any]) -> None:
    assert found["golden"]["failed"] == []
    assert {"stage1", "stage2", "lora", "stage2, fast"} <= set(found["golden"]["cases"])


def chosen(**changes: Any) -> TrainSettings:
    nowhere = Path("nowhere")
    values: dict[str, Any] = {
        "stage": "pretrain",
        "language_model": nowhere,
        "vision_tower": nowhere,
        "high_resolution_tower": nowhere,
        "data": nowhere,
        "images": nowhere,
        "output": nowhere,
    }
    return TrainSettings(**{**values, **changes})


def test_automatic_values_follow_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(KITS_FILE))
    config = configuration(chosen(deepspeed_config=path, max_grad_norm=0.5), 2048, 4)
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_batch_size"] == 256
    assert config["bf16"] == {"enabled": True}
    assert config["fp16"]["enabled"] is False
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["reduce_bucket_size"] == 2048 * 2048


def test_presets_are_the_kits_stages() -> None:
    offload = configuration(chosen(deepspeed="zero2-offload"), 2048, 2)["zero_optimization"]
    assert (offload["stage"], offload["offload_optimizer"]["device"]) == (2, "cpu")
    third = configuration(chosen(deepspeed="zero3"), 2048, 2)["zero_optimization"]
    assert third["stage"] == 3
    assert third["stage3_param_persistence_threshold"] == 20480


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, "allgather"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, content: dict[str, Any], field: str
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=field) as raised:
        configuration(chosen(deepspeed_config=path), 2048, 2)
    assert str(path) in raised.value.message


def test_two_ways_to_configure_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="deepspeed_config"):
        chosen(deepspeed="zero2", deepspeed_config=tmp_path / "own.json")


def test_what_threads_ask_of_a_model_reads_no_weight_by_its_name(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    model, _ = prepare_model(settings(flags(parts, tmp_path / "o")))
    read: list[str] = []

    class Noted(dict[str, Any]):
        # ZeRO-3 gathers a weight here, by an exchange between all processes.
        def __getitem__(self, name: str) -> Any:
            read.append(name)
            return super().__getitem__(name)

    for module in model.modules():
        module._parameters = Noted(module._parameters)
    assert model.language_model.lm_head.weight.dtype == model.dtype
    assert read == ["weight"]
    assert (model.device.type, model.dtype) == ("cpu", model.tower_dtype)
    assert read == ["weight"]


@needs_deepspeed
def test_weights_in_parts_need_the_reference_numerics(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*flags(parts, tmp_path / "o", numerics="fast"), "--deepspeed=zero3"]
    assert main(arguments) == 2
    assert "numerics" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_missing_deepspeed_is_told(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(parts, tmp_path / "o"), "--deepspeed=zero2"]) == 2
    assert "DeepSpeed is missing" in capsys.readouterr().err


@needs_deepspeed
def test_a_killed_training_in_bfloat16_ends_with_the_undisturbed_weights(
    parts: dict[str, Path], projector: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        changes = {"dtype": "bfloat16", "deepspeed": "zero3", "save_steps": 4, "max_steps": 60}
        return ["-m", "mgm.train", *finetune(parts, tmp_path / name, projector, **changes)]

    for code, told in ends_in_time(start(command("undisturbed"), 2)):
        assert code == 0, told
    killed = start(command("killed"), 2)
    wait_for_step(killed[0], tmp_path / "killed.jsonl", 7)
    for process in killed:
        process.kill()
    ends(killed)
    saved = {path.name for path in (tmp_path / "killed" / "state" / "deepspeed").glob("step_*")}
    assert saved
    for code, told in ends_in_time(start(command("killed"), 2)):
        assert code == 0, told
    first, second = (weights(tmp_path / name, "lora") for name in ("killed", "undisturbed"))
    assert_equal(first, second)
    assert all(value.numel() for value in first.values())
    metrics = lines(tmp_path / "killed" / "metrics.jsonl")
    assert metrics == lines(tmp_path / "undisturbed" / "metrics.jsonl")
    assert not (tmp_path / "killed" / "state").exists()
