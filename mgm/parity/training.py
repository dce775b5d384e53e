"""Training folders: whole tiny runs of both stages and of LoRA, step by step.

A training folder holds `meta.json` (sizes, orders, logs), the weights before and after, and the
data. Its pictures and its tokenizer lie in it or in a folder beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from mgm.config import ModelConfig
from mgm.data import InstructionDataset, read_records
from mgm.errors import InputError
from mgm.features import PictureFeatures
from mgm.files import read_json
from mgm.lora import attach_lora, merge_lora
from mgm.model import MGM
from mgm.names import is_multimodal, published_name, published_parameters
from mgm.optimization import parameter_groups
from mgm.parity.report import Check, compare_exactly, compare_named_tensors, compare_numbers
from mgm.parity.text import load_tokenizer
from mgm.train import make_trainer, unfreeze
from mgm.train_settings import TrainSettings
from mgm.training_state import TrainingState

LOSS_TOLERANCE = 2e-4
NORM_TOLERANCE = 1e-3
RATE_TOLERANCE = 1e-9
WEIGHT_TOLERANCE = 5e-4
MERGE_TOLERANCE = 1e-6
ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Run:
    """What makes one recorded run: which stage, on which data, from and to which weights."""

    name: str
    stage: str
    method: str
    data: str
    start: str
    finals: tuple[str, ...]


RUNS = (
    Run(
        "stage1",
        "pretrain",
        "projector",
        "stage1_data.json",
        "stage1_init.safetensors",
        ("stage1_final.safetensors",),
    ),
    Run(
        "stage2",
        "finetune",
        "full",
        "stage2_data.json",
        "stage1_final.safetensors",
        ("stage2_final_selected.safetensors",),
    ),
    Run(
        "lora",
        "finetune",
        "lora",
        "stage2_data.json",
        "stage1_final.safetensors",
        ("lora_adapter.safetensors", "lora_non_lora_trainables.safetensors"),
    ),
)


def recognises(folder: Path) -> bool:
    """Whether `folder` holds recorded runs."""
    return all((folder / name).is_file() for name in ("meta.json", "base_weights.safetensors"))


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of every recorded run, and of merging the recorded adapter."""
    meta = read_json(folder / "meta.json")
    for run in RUNS:
        if run.name in meta:
            yield from _check_run(folder, meta, run)
            yield from _check_run(folder, meta, run, "fast")
    if (folder / "lora_merged.safetensors").is_file():
        yield from _check_merge(folder, meta)


def _build(meta: Mapping[str, Any], folder: Path, start: str) -> MGM:
    """Build the run's model with the base weights and those of `start`."""
    sizes = meta["model"]
    towers = {
        "clip_vision": {
            "hidden_size": sizes["clip_hidden"],
            "intermediate_size": sizes["clip_inter"],
            "num_hidden_layers": sizes["clip_layers"],
            "num_attention_heads": sizes["clip_heads"],
            "image_size": meta["image_size"],
            "patch_size": sizes["patch"],
        },
        "convnext_aux": {"depths": sizes["convnext_depths"], "dims": sizes["convnext_dims"]},
    }
    written = next(meta[run.name]["config.json"] for run in RUNS if "config.json" in meta[run.name])
    config = ModelConfig.from_mgm_config(written, towers).replace(drop_path=meta["drop_path"])
    model = MGM(config)
    tensors = load_file(folder / "base_weights.safetensors") | load_file(folder / start)
    tensors.pop("lm_head.weight", None)
    _fill(published_parameters(model), tensors)
    return model


def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def _settings(
    folder: Path, meta: Mapping[str, Any], run: Run, numerics: Literal["reference", "fast"]
) -> TrainSettings:
    recorded = meta[run.name]
    return TrainSettings(
        stage="pretrain" if run.stage == "pretrain" else "finetune",
        # The weights are filled in from the folder, so these are not read.
        language_model=folder,
        vision_tower=folder,
        high_resolution_tower=folder,
        projector=folder,
        output=folder,
        data=folder / run.data,
        images=_picture_folder(folder, run.data),
        method=run.method,  # type: ignore[arg-type]
        learning_rate=recorded["lr"],
        group_by_modality_length=run.stage == "finetune",
        max_steps=len(recorded["log"]),
        micro_batch_size=meta["batch_size"],
        global_batch_size=meta["batch_size"] * meta["grad_accum"],
        model_max_length=meta["model_max_length"],
        image_aspect_ratio=recorded.get("image_aspect_ratio", "pad"),
        lora_rank=recorded.get("r", 1),
        lora_alpha=recorded.get("alpha", 1),
        lora_dropout=recorded.get("adapter_config", {}).get("lora_dropout", 0.0),
        dtype="float32",
        drop_path=meta["drop_path"],
        gradient_checkpointing=False,
        numerics=numerics,
        device="cpu",
        workers=1,
    )


def _picture_folder(folder: Path, data: str) -> Path:
    names = {record["image"] for record in read_records(folder / data) if "image" in record}
    beside = sorted(path for path in folder.parent.iterdir() if path.is_dir())
    for candidate in (folder, *beside):
        if all((candidate / name).is_file() for name in names):
            return candidate
    raise InputError("No pictures", f"{folder}: those of {data} are neither in it nor beside it")


def _check_run(
    folder: Path,
    meta: Mapping[str, Any],
    run: Run,
    numerics: Literal["reference", "fast"] = "reference",
) -> Iterator[Check]:
    """Repeat a run with its own order of samples and compare every step and the end.

    With fast numerics the same samples go through packed, in float32, where only the order of
    additions differs.
    """
    recorded, settings = meta[run.name], _settings(folder, meta, run, numerics)
    if numerics == "fast":
        run = replace(run, name=f"{run.name}, fast")
    model = _build(meta, folder, run.start)
    unfreeze(model, settings)
    if run.method == "lora":
        start = load_file(folder / "lora_init.safetensors")
        _fill(_adapters(model), {_bare(name): value for name, value in start.items()})
    if "trainable" in recorded:
        parameters = published_parameters(model).items()
        trained = sorted(name for name, value in parameters if value.requires_grad)
        yield compare_exactly(run.name, "trained tensors", trained, sorted(recorded["trainable"]))
    if "param_groups" in recorded:
        ours, reference = _group_sizes(model, settings), recorded["param_groups"]
        expected = sorted((group["initial_lr"], group["n_params"]) for group in reference)
        yield compare_exactly(run.name, "optimizer groups (rate, tensors)", ours, expected)
    dataset = InstructionDataset(
        settings.data,
        settings.images,
        load_tokenizer(folder),
        model_max_length=settings.model_max_length,
    )
    features = PictureFeatures(model, dataset, settings.workers, settings.image_aspect_ratio)
    order = list(recorded["sample_order"])
    own = make_trainer(model, dataset, features, settings).order(0)
    yield compare_exactly(run.name, "order of samples", own, order)
    trainer = make_trainer(model, dataset, features, settings, lambda epoch: order)
    model.train()
    state = TrainingState("")
    steps = [trainer.step(state) for _ in recorded["log"]]
    yield from _check_log(run.name, steps, recorded["log"])
    yield from _check_final_weights(folder, model, run)
    if "mm_projector_bin_keys" in recorded:
        named = published_parameters(model)
        shapes = {n: list(value.shape) for n, value in named.items() if is_multimodal(n)}
        yield compare_exactly(run.name, "projector file", shapes, recorded["mm_projector_bin_keys"])


def _group_sizes(model: MGM, settings: TrainSettings) -> list[tuple[float, int]]:
    """Return the peak rate and number of tensors of the optimizer's groups.

    The recorded runs tell weights from biases and norms although neither is decayed; a decay
    makes this package's groups visible in the same way.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    groups = parameter_groups(
        trained.items(), settings.learning_rate, settings.projector_learning_rate, 0.1
    )
    return sorted((group["peak_lr"], len(group["params"])) for group in groups)


def _check_log(
    case: str, steps: list[tuple[float, float, float]], log: list[Mapping[str, float]]
) -> Iterator[Check]:
    columns = (
        ("loss", 0, LOSS_TOLERANCE, None),
        ("grad_norm", 1, NORM_TOLERANCE, 0.0),
        ("learning_rate", 2, RATE_TOLERANCE, None),
    )
    for name, column, tolerance, ignore_below in columns:
        ours = {f"step {n}": values[column] for n, values in enumerate(steps, start=1)}
        reference = {f"step {n}": entry[name] for n, entry in enumerate(log, start=1)}
        label = name if ignore_below is None else f"{name} (relative)"
        yield compare_numbers(case, label, ours, reference, tolerance, ignore_below=ignore_below)


def _check_final_weights(folder: Path, model: MGM, run: Run) -> Iterator[Check]:
    if run.method == "lora":
        ours: dict[str, Tensor] = {**_adapters(model), **_vision_modules(model)}
    else:
        ours = dict(published_parameters(model))
    for file in run.finals:
        reference = {_bare(name): value for name, value in load_file(folder / file).items()}
        yield compare_named_tensors(run.name, file, ours, reference, WEIGHT_TOLERANCE)


def _check_merge(folder: Path, meta: Mapping[str, Any]) -> Iterator[Check]:
    """Merge the recorded adapter, as trained by the original, into the base."""
    model = _build(meta, folder, "stage1_final.safetensors")
    attach_lora(model, meta["lora"]["r"], meta["lora"]["alpha"])
    adapter = load_file(folder / "lora_adapter.safetensors")
    _fill(_adapters(model), {_bare(name): value for name, value in adapter.items()})
    merge_lora(model)
    file = "lora_merged.safetensors"
    ours = published_parameters(model)
    yield compare_named_tensors("merge", file, ours, load_file(folder / file), MERGE_TOLERANCE)


def _adapters(model: MGM) -> dict[str, Tensor]:
    """Return the adapters under the names of an adapter file, without its prefix."""
    return {
        _bare(name.removeprefix("language_model.")): value
        for name, value in model.named_parameters()
        if ".lora_" in name
    }


def _vision_modules(model: MGM) -> dict[str, Tensor]:
    return {
        published_name(name): value
        for name, value in model.named_parameters()
        if name.startswith(("projector.", "mining."))
    }


def _bare(name: str) -> str:
    return name.removeprefix(ADAPTER_PREFIX).replace(".default.", ".")
