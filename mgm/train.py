"""Train one stage of MGM.

    python -m mgm.train --stage pretrain --language-model DIR --vision-tower DIR \\
        --high-resolution-tower DIR --data stage_1.json --images DIR --output DIR
    python -m mgm.train --config finetune.yaml --progress progress.jsonl

Pretraining trains projector and mining on captions; finetuning continues with them and the language
model, in full or by LoRA. An unfinished output folder with the same settings is continued: after
`kill -9` the final weights are those of an undisturbed run. `train_state.json` is written last.
Exit codes are those of `mgm.program`.

Source of the procedure: the Better Synth kit's training scripts and the trainer behind them; the
loss of a step is the mean over micro-batches of each one's mean over its labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mgm.checkpoint import (
    PROJECTOR_FILE,
    attach_lora,
    build_model,
    load_projector,
    save_full,
    save_lora,
    save_projector,
)
from mgm.config import ModelConfig
from mgm.data import InstructionDataset
from mgm.engine import LocalEngine
from mgm.errors import InputError
from mgm.execution import Execution, PackedExecution, PaddedExecution
from mgm.features import PictureFeatures
from mgm.files import read_json, write_json
from mgm.model import MGM, init_vision_modules
from mgm.packed import PackedLanguage
from mgm.program import EXIT_INTERRUPTED, EXIT_TERMINATED, run_program
from mgm.progress import Progress
from mgm.settings import parse_settings
from mgm.train_settings import TrainSettings, stage_defaults
from mgm.trainer import Order, Trainer
from mgm.training_state import TrainingState, load_state

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
"""Large files: their size and time stand for their content."""
DEFAULT_TOKENS = 4864
"""Positions of a pass where nobody says otherwise: eight captions with their pictures."""
FINISHED_FILE = "train_state.json"
UNLABELLED_SHARE = 0.01
"""More records than this without a label are refused: the template does not fit the data."""


def prepare_model(settings: TrainSettings) -> tuple[MGM, PreTrainedTokenizerBase]:
    """Build the model of a stage, on its device, with what is trained unfrozen and in float32.

    Raises:
        InputError: If a part is missing or does not fit.
    """
    config = ModelConfig.from_parts(
        settings.language_model,
        settings.vision_tower,
        settings.high_resolution_tower,
        name=settings.model,
        tokenizer_model_max_length=settings.model_max_length,
        image_aspect_ratio=settings.image_aspect_ratio,
        drop_path=settings.drop_path,
        reassociated_mining=settings.numerics == "fast",
    )
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model = build_model(
        config,
        settings.language_model,
        settings.vision_tower,
        settings.high_resolution_tower,
        dtype,
    )
    init_vision_modules(model, settings.seed)
    if settings.projector is not None:
        load_projector(model, settings.projector)
    unfreeze(model, settings)
    if settings.gradient_checkpointing and settings.numerics == "reference":
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = AutoTokenizer.from_pretrained(str(settings.language_model), local_files_only=True)
    return model.to(_device(settings)), tokenizer


def unfreeze(model: MGM, settings: TrainSettings) -> None:
    """Let exactly what the method trains require gradients.

    It is in float32, but for a language model that is trained in full with fast numerics: that
    stays in the dtype of the arithmetic, and its masters are the optimizer's.
    """
    model.requires_grad_(False)
    if settings.method == "lora":
        torch.manual_seed(settings.seed)
        attach_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    elif settings.method == "full":
        model.language_model.requires_grad_(True)
    for module in (model.projector, model.mining):
        module.requires_grad_(True)
    has_masters = settings.method == "full" and settings.numerics == "fast"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (has_masters and name.startswith("language_model.")):
            parameter.data = parameter.data.float()


def make_trainer(
    model: MGM,
    dataset: InstructionDataset,
    features: PictureFeatures,
    settings: TrainSettings,
    order: Order | None = None,
) -> Trainer:
    """Put together the execution and the engine that the settings ask for."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    execution: Execution
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if settings.numerics == "fast":
        compiled = settings.compile == "always" or (
            settings.compile == "auto" and model.device.type == "cuda"
        )
        language = PackedLanguage(
            model.language_model,
            compiled=compiled,
            recomputed_layers=max(0, settings.recomputed_layers),
        )
        budget = settings.tokens_per_pass or DEFAULT_TOKENS
        execution = PackedExecution(model, dataset, features, dtype, budget, language)
    else:
        execution = PaddedExecution(model, dataset, features, dtype, settings.micro_batch_size)
    return Trainer(execution, LocalEngine(trained, settings), settings, order)


def train(settings: TrainSettings, progress: Progress) -> None:
    """Run a stage to its end, or continue it.

    Raises:
        InputError: If anything that it was given is wrong.
        SystemExit: On a signal, after the state was saved.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    _refuse_several_processes()
    digest = _digest(settings)
    if _is_finished(settings.output / FINISHED_FILE, digest):
        return
    progress.update(step=0, total=0, unit="steps", label="loading weights")
    model, tokenizer = prepare_model(settings)
    dataset = InstructionDataset(
        settings.data, settings.images, tokenizer, model_max_length=settings.model_max_length
    )
    _refuse_unlabelled(dataset)
    model.train()
    features = PictureFeatures(model, dataset, settings.workers, settings.image_aspect_ratio)
    if settings.cache_features:
        features.cache(progress)
    trainer = make_trainer(model, dataset, features, settings)
    torch.manual_seed(settings.data_seed)
    state = load_state(settings.output / "state", digest, trainer.engine)
    settings.output.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopper(trainer))
    if not trainer.run(state, progress):
        raise SystemExit(
            EXIT_TERMINATED if trainer.stop_signal == signal.SIGTERM else EXIT_INTERRUPTED
        )
    save_weights(model, tokenizer, settings)
    _write_finished(settings, dataset, state)


def save_weights(model: MGM, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> None:
    """Write what the stage made, under the published names."""
    model.eval()
    if settings.method == "projector":
        save_projector(model, settings.output / PROJECTOR_FILE)
        config = {**model.config.to_mgm_config(), "tune_mm_mlp_adapter": True}
        write_json(settings.output / "config.json", config)
        write_json(settings.output / "towers.json", model.config.to_towers())
    elif settings.method == "lora":
        save_lora(model, settings.output, str(settings.language_model))
    else:
        save_full(model, settings.output, tokenizer)


def _write_finished(
    settings: TrainSettings, dataset: InstructionDataset, state: TrainingState
) -> None:
    """Write the mark of completeness, then remove the state that is no longer needed."""
    last = state.losses[-10:]
    content = {
        "finished": True,
        "digest": state.digest,
        "steps": state.step,
        "samples": len(dataset),
        "samples_seen": state.samples_seen,
        "final_loss": sum(last) / len(last),
        "seconds": state.seconds,
        "records_without_labels": dataset.num_without_labels,
        "unlabelled_micro_batches": state.unlabelled_micro_batches,
        "out_of_memory": state.out_of_memory,
        "seed": settings.seed,
        "data_seed": settings.data_seed,
        "settings": settings.what_decides_the_result(),
    }
    write_json(settings.output / FINISHED_FILE, content)
    for path in (settings.output / "state").glob("*"):
        path.unlink()
    (settings.output / "state").rmdir()


def _refuse_unlabelled(dataset: InstructionDataset) -> None:
    unlabelled = [
        dataset.record_id(index)
        for index, encoded in enumerate(dataset.encoded)
        if encoded.num_labels == 0
    ]
    if len(unlabelled) > UNLABELLED_SHARE * len(dataset):
        raise InputError(
            "Records teach nothing",
            f"{dataset.path}: {len(unlabelled)} of {len(dataset)} records have no token to learn, "
            f"for example {', '.join(unlabelled[:5])}",
            "an answer is empty, missing, or holds a token of the chat template",
        )
    if unlabelled:
        print(f"{len(unlabelled)} records have no token to learn", file=sys.stderr)


def _digest(settings: TrainSettings) -> str:
    """Return what the result depends on: settings, data and weights; pictures by their names only."""
    digest = hashlib.sha256(json.dumps(settings.what_decides_the_result(), sort_keys=True).encode())
    parts = [settings.data, settings.projector, settings.language_model]
    parts += [settings.vision_tower, settings.high_resolution_tower]
    for part in parts:
        if part is None or not part.exists():
            continue
        files = sorted(part.iterdir()) if part.is_dir() else [part]
        for file in files:
            if file.suffix in _WEIGHT_SUFFIXES:
                stat = file.stat()
                digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            elif file.is_file():
                digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _is_finished(path: Path, digest: str) -> bool:
    """Tell whether the folder already holds this training's result.

    Raises:
        InputError: If it holds another one's.
    """
    if not path.exists():
        return False
    if read_json(path).get("digest") != digest:
        raise InputError(
            "Another training was finished here",
            f"{path} belongs to other settings, data or weights",
            "choose another output folder, or remove this one",
        )
    return True


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "Several processes",
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}",
            "this program trains in one process; start it without a launcher",
        )


def _stopper(trainer: Trainer) -> Callable[[int, FrameType | None], None]:
    """Return a handler that lets the step at work finish; a second signal ends at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if trainer.stop_signal is not None:
            raise SystemExit(128 + number)
        trainer.stop_signal = number

    return stop


def _device(settings: TrainSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("No GPU", "device = 'cuda'", "use device = 'cpu' or 'auto'")
    return torch.device(settings.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_program(
        lambda: parse_settings(
            TrainSettings,
            arguments,
            program="python -m mgm.train",
            description=__doc__ or "",
            defaults=stage_defaults,
        ),
        lambda settings: settings.progress,
        train,
    )


if __name__ == "__main__":
    sys.exit(main())
