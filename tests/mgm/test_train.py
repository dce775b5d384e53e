"""The training program on a tiny model: recorded runs, interruptions, and what users get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mgm.data import InstructionDataset
from mgm.errors import InputError
from mgm.features import PictureFeatures
from mgm.parity import training
from mgm.progress import Progress
from mgm.settings import parse_settings
from mgm.train import main, make_trainer, prepare_model
from mgm.train_settings import STAGE_DEFAULTS, TrainSettings, stage_defaults
from mgm.trainer import Trainer
from mgm.training_state import TrainingState
from mgm.weights import read_tensors
from tests.mgm.tiny_training import write_parts

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
REPOSITORY = Path(__file__).parent.parent.parent
PICTURES = GOLDEN / "preprocess"
STEPS = 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three folders of a tiny model, as the libraries write them."""
    folder = tmp_path_factory.mktemp("parts")
    return write_parts(folder, seed=5, depths=(1, 1, 1, 1), drop_path_rate=0.0)


def flags(parts: dict[str, Path], output: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "stage": "pretrain",
        **parts,
        "data": GOLDEN / "train_run" / "stage1_data.json",
        "images": PICTURES,
        "output": output,
        "progress": output.parent / f"{output.name}.jsonl",
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "model_max_length": 128,
        "max_steps": STEPS,
        "save_steps": 2,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        **changes,
    }
    given = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given += [f"--{flag}", str(value)]
    return given


def finetune(parts: dict[str, Path], output: Path, projector: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "stage": "finetune",
        "method": "lora",
        "lora_rank": 4,
        "projector": projector,
        "data": GOLDEN / "train_run" / "stage2_data.json",
        **changes,
    }
    return flags(parts, output, **values)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mgm.train", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], progress: Path, step: int) -> None:
    """Return once training reports `step`; states were saved before it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(line.get("unit") == "steps" and line["step"] >= step for line in lines(progress)):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError("training did not start")


def weights(output: Path, method: str) -> dict[str, torch.Tensor]:
    if method == "projector":
        return read_tensors(output / "mm_projector.bin")
    tensors = read_tensors(output / "adapter_model.safetensors")
    return tensors | read_tensors(output / "non_lora_trainables.bin")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def pretrained(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed pretraining."""
    output = tmp_path_factory.mktemp("pretrained") / "output"
    assert main(flags(parts, output)) == 0
    return output


def test_recorded_runs_are_repeated_step_by_step() -> None:
    checks = list(training.check(GOLDEN / "train_run"))
    runs = {"stage1", "stage2", "lora"}
    assert {check.case for check in checks} == {*runs, *(f"{run}, fast" for run in runs), "merge"}
    assert [check for check in checks if not check.is_ok] == []


@pytest.mark.parametrize("method", ["projector", "lora"])
def test_a_killed_training_ends_with_the_undisturbed_weights(
    parts: dict[str, Path], pretrained: Path, tmp_path: Path, method: str
) -> None:
    def arguments(output: Path) -> list[str]:
        if method == "projector":
            return flags(parts, output)
        return finetune(parts, output, pretrained / "mm_projector.bin")

    output = tmp_path / "killed"
    process = start(arguments(output))
    wait_for_step(process, tmp_path / "killed.jsonl", 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (output / "state" / "state.pt").exists()
    assert not (output / "train_state.json").exists()

    assert main(arguments(output)) == 0
    reference = pretrained
    if method == "lora":
        reference = tmp_path / "undisturbed"
        assert main(arguments(reference)) == 0
    assert_equal(weights(output, method), weights(reference, method))
    assert not (output / "state").exists()
    metrics = lines(output / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics == lines(reference / "metrics.jsonl")


def test_a_termination_signal_keeps_the_state(
    parts: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "stopped"
    process = start(flags(parts, output, save_steps=1000))
    wait_for_step(process, tmp_path / "stopped.jsonl", 2)
    process.terminate()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143, errors
    state = torch.load(output / "state" / "state.pt", weights_only=True)
    assert 2 <= state["state"]["step"] < STEPS
    assert main(flags(parts, output, save_steps=1000)) == 0
    assert_equal(weights(output, "projector"), weights(pretrained, "projector"))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 1)])
def test_metrics_stay_whole_when_reports_come_at_another_interval(
    parts: dict[str, Path], tmp_path: Path, before: int, after: int
) -> None:
    output, state_of_step_6 = tmp_path / "out", tmp_path / "state.pt"

    class Saved(Exception):
        """Ends the training as a kill would."""

    def keep(step: int) -> None:
        if step == 6:
            shutil.copyfile(output / "state" / "state.pt", state_of_step_6)
        if step == 9:
            raise Saved

    with pytest.MonkeyPatch.context() as patch:
        save = Trainer.save

        def noted(trainer: Trainer, state: TrainingState) -> None:
            save(trainer, state)
            keep(state.step)

        patch.setattr(Trainer, "save", noted)
        with pytest.raises(Saved):
            main(flags(parts, output, max_steps=10, save_steps=3, logging_steps=before))
    shutil.copyfile(state_of_step_6, output / "state" / "state.pt")
    assert main(flags(parts, output, max_steps=10, save_steps=3, logging_steps=after)) == 0
    steps = [line["step"] for line in lines(output / "metrics.jsonl")]
    first = list(range(before, 7, before))
    second = [step for step in range(7, 11) if step % after == 0 or step == 10]
    assert steps == first + second
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history[:-1]] == steps


def test_a_loss_that_is_not_a_number_names_step_and_records(
    parts: dict[str, Path],
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = read_tensors(pretrained / "mm_projector.bin")
    name = next(name for name in tensors if name.endswith("mm_projector.2.bias"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    broken = tmp_path / "mm_projector.bin"
    torch.save(tensors, broken)
    output = tmp_path / "output"
    assert main(finetune(parts, output, broken)) == 2
    told = capsys.readouterr().err
    assert "not a number" in told
    assert re.search(r"at step \d+, records i\d+", told)
    assert "records i" in lines(tmp_path / "output.jsonl")[-1]["error"]["message"]
    assert not (output / "train_state.json").exists()


def test_a_folder_of_another_training_is_refused(
    parts: dict[str, Path],
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = (pretrained / "mm_projector.bin").read_bytes()
    assert main(flags(parts, pretrained)) == 0
    assert main(flags(parts, pretrained, learning_rate=0.5)) == 2
    assert "Another training was finished here" in capsys.readouterr().err
    assert (pretrained / "mm_projector.bin").read_bytes() == written

    output = tmp_path / "unfinished"
    process = start(flags(parts, output, max_steps=1000))
    wait_for_step(process, tmp_path / "unfinished.jsonl", 3)
    process.kill()
    process.communicate()
    assert main(flags(parts, output, learning_rate=0.5)) == 2
    assert "Another training was here" in capsys.readouterr().err


def test_unknown_keys_are_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "finetune.yaml"
    config.write_text("stage: finetune\nlerning_rate: 0.1\n")
    assert main(["--config", str(config)]) == 2
    told = capsys.readouterr().err
    for part in (str(config), "lerning_rate", "learning_rate"):
        assert part in told


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert "\n    python -m mgm.train --stage pretrain" in shown


def test_help_tells_the_defaults_of_both_stages_and_the_valid_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, first in STAGE_DEFAULTS["pretrain"].items():
        second = STAGE_DEFAULTS["finetune"][name]
        assert f"default: {first} in pretraining, {second} in finetuning)" in shown, name
    assert "default: True, False with numerics = fast)" in shown
    assert "one of projector, full, lora" in shown


def settings(arguments: list[str]) -> TrainSettings:
    return parse_settings(
        TrainSettings, arguments, program="train", description="", defaults=stage_defaults
    )


def test_defaults_are_the_kits() -> None:
    paths = "language-model vision-tower high-resolution-tower data images output projector"
    given = [text for name in paths.split() for text in (f"--{name}", "x")]
    first, second = (
        settings([*given, "--stage", "pretrain"]),
        settings([*given, "--stage=finetune"]),
    )
    assert (first.learning_rate, first.global_batch_size) == (1e-3, 256)
    assert (first.method, first.image_aspect_ratio) == ("projector", "square")
    assert not first.group_by_modality_length
    assert (second.learning_rate, second.global_batch_size) == (2e-5, 128)
    assert (second.method, second.image_aspect_ratio) == ("full", "pad")
    assert second.group_by_modality_length
    for stage in (first, second):
        assert (stage.warmup_ratio, stage.weight_decay, stage.epochs) == (0.03, 0.0, 1.0)
        assert (stage.model_max_length, stage.max_grad_norm, stage.drop_path) == (2048, 1.0, True)


def test_pretraining_uses_square_pictures_and_the_gemma_template(
    parts: dict[str, Path], pretrained: Path
) -> None:
    config = json.loads((pretrained / "config.json").read_text())
    assert config["image_aspect_ratio"] == "square"
    _, data = prepared(settings(flags(parts, pretrained)))
    tokenizer = AutoTokenizer.from_pretrained(str(parts["language_model"]))
    text = tokenizer.decode([token for token in data.encoded[0].input_ids if token >= 0])
    assert "<start_of_turn>user" in text


def test_cached_features_give_the_same_weights(parts: dict[str, Path], tmp_path: Path) -> None:
    for name, cached in (("cached", True), ("fresh", False)):
        arguments = flags(
            parts, tmp_path / name, drop_path=False, cache_features=cached, max_steps=6
        )
        assert main(arguments) == 0
    cached_weights = weights(tmp_path / "cached", "projector")
    fresh_weights = weights(tmp_path / "fresh", "projector")
    assert cached_weights.keys() == fresh_weights.keys()
    for name, value in cached_weights.items():
        torch.testing.assert_close(value, fresh_weights[name], atol=1e-5, rtol=1e-4)


def test_caching_with_drop_path_is_refused(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "convnext"
    shutil.copytree(parts["high_resolution_tower"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "drop_path_rate": 0.1}))
    arguments = flags(parts, tmp_path / "output", high_resolution_tower=folder, cache_features=True)
    assert main(arguments) == 2
    assert "drop_path" in capsys.readouterr().err


def test_records_that_teach_nothing_are_refused(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((GOLDEN / "train_run" / "stage1_data.json").read_text())
    records[3]["conversations"][1]["value"] = ""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    assert main(flags(parts, tmp_path / "output", data=data)) == 2
    told = capsys.readouterr().err
    assert "1 of 32 records" in told
    assert records[3]["id"] in told


@pytest.mark.parametrize("numerics", ["reference", "fast"])
def test_answers_that_are_cut_off_teach_nothing(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], numerics: str
) -> None:
    given = flags(parts, tmp_path / "output", numerics=numerics, model_max_length=8)
    assert main(given) == 2
    told = capsys.readouterr().err
    assert "32 of 32 records" in told
    assert "model_max_length = 8, of which a picture takes 4" in told


def prepared(chosen: TrainSettings) -> tuple[Any, InstructionDataset]:
    model, tokenizer = prepare_model(chosen)
    data = InstructionDataset(
        chosen.data, chosen.images, tokenizer, model_max_length=chosen.model_max_length
    )
    return model, data


def test_a_step_without_pictures_still_moves_the_projector(
    parts: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    projector = pretrained / "mm_projector.bin"
    chosen = settings(finetune(parts, tmp_path / "o", projector, warmup_ratio=0.0, max_steps=10))
    model, data = prepared(chosen)
    text = [i for i, record in enumerate(data.records) if "image" not in record][:4]
    pictured = [i for i, record in enumerate(data.records) if "image" in record][:4]
    assert len(text) == len(pictured) == 4
    features = PictureFeatures(model, data, 1, "pad")
    trainer = make_trainer(model, data, features, chosen, lambda epoch: pictured + text)
    model.train()
    state = TrainingState("")
    trainer.step(state)
    before = {n: p.detach().clone() for n, p in model.projector.named_parameters()}
    trainer.step(state)
    for module in (model.projector, model.mining):
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    for name, parameter in model.projector.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_missing_language_model_is_told_to_the_progress_file(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    arguments = flags(parts, tmp_path / "output", language_model=tmp_path / "nowhere")
    assert main(arguments) == 2
    assert "nowhere" in lines(tmp_path / "output.jsonl")[-1]["error"]["message"]


def test_features_without_pictures_are_blank(parts: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings(flags(parts, tmp_path / "o", drop_path=False))
    model, data = prepared(chosen)
    features = PictureFeatures(model.eval(), data, 1, "square")
    fresh = features.of([None, 0, None])
    features.cache(Progress(None))
    cached = features.of([None, 0, None])
    torch.testing.assert_close(fresh.low, cached.low)
    assert torch.equal(cached.low[0], cached.low[2])
    assert not torch.equal(cached.low[0], cached.low[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "inf"),
        ("epochs", "inf"),
        ("weight_decay", "nan"),
        ("lora_dropout", "nan"),
        ("projector_learning_rate", "-1"),
        ("adam_beta1", "-0.5"),
        ("adam_eps", "-0.5"),
        ("workers", "-3"),
        ("seed", str(2**70)),
    ],
)
def test_a_number_out_of_its_range_is_named(
    parts: dict[str, Path], tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(InputError, match=f"{name} = "):
        settings(flags(parts, tmp_path / "o", **{name: value}))


def test_moments_that_cannot_be_kept_in_a_byte_are_refused(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    whole = {"method": "full", "numerics": "fast", "adam_beta2": 0.8}
    with pytest.raises(InputError, match="adam_beta2 = 0.8"):
        settings(finetune(parts, tmp_path / "o", tmp_path, **whole, moments="8bit"))
    settings(finetune(parts, tmp_path / "o", tmp_path, **whole))


def test_a_setting_that_cannot_work_is_named(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="micro_batch_size"):
        settings(flags(parts, tmp_path / "o", micro_batch_size=3))
    with pytest.raises(InputError, match="projector"):
        settings(flags(parts, tmp_path / "o", stage="finetune"))
