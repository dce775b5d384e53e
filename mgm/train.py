"""Train one stage of MGM.

    python -m mgm.train --stage pretrain --language-model DIR --vision-tower DIR \\
        --high-resolution-tower DIR --data stage_1.json --images DIR --output DIR
    python -m mgm.train --config finetune.yaml --progress progress.jsonl

Pretraining trains projector and mining on captions; finetuning continues with them and the language
model, in full or by LoRA. An unfinished output folder with the same settings is continued: after
`kill -9` the final weights are those of an undisturbed run. `train_state.json` is written last.
Started by `torchrun` or `deepspeed`, several processes share the work of each step.
Exit codes: 0 done, 2 bad input, 130 and 143 stopped by a signal, 1 anything else.

Source of the procedure: the Better Synth kit's training scripts and the trainer behind them; the
loss of a step is the mean over micro-batches of each one's mean over its labels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import torch
from transformers import PreTrainedTokenizerBase

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
from mgm.distributed import ALONE, Group, LostProcess, joined, place
from mgm.engine import Engine, LocalEngine
from mgm.errors import InputError
from mgm.execution import Execution, PackedExecution, PaddedExecution
from mgm.fast_vision import FastTowers
from mgm.features import PictureFeatures, Towers
from mgm.files import read_json, write_json
from mgm.model import MGM, init_vision_modules
from mgm.original_logs import write_original_logs
from mgm.packed import PackedLanguage
from mgm.pass_size import pass_size
from mgm.program import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, run_program
from mgm.progress import Progress
from mgm.settings import parse_settings
from mgm.tokenizer_files import read_tokenizer, refuse_unknown_tokens
from mgm.train_settings import TrainSettings, stage_defaults
from mgm.trainer import METRICS_FILE, Order, Trainer
from mgm.training_state import TrainingState, load_state

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
"""Large files: their size and time stand for their content."""
FINISHED_FILE = "train_state.json"
_SAME_SIGNAL_SECONDS = 5.0
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
        _device(settings),
    )
    init_vision_modules(model, settings.seed)
    if settings.projector is not None:
        load_projector(model, settings.projector)
    unfreeze(model, settings)
    if settings.gradient_checkpointing and settings.numerics == "reference":
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = read_tokenizer(settings.language_model)
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


def uses_deepspeed(settings: TrainSettings) -> bool:
    """Whether DeepSpeed holds gradients and optimizer."""
    return settings.deepspeed != "none" or settings.deepspeed_config is not None


def fast_towers(model: MGM, settings: TrainSettings) -> Towers | None:
    """Return the fast way to run the towers where the settings allow it, else None."""
    is_fast = settings.numerics == "fast" and model.device.type == "cuda"
    if not is_fast or model.config.has_drop_path:
        return None
    return FastTowers(model, compiled=settings.compile != "never")


def make_trainer(
    model: MGM,
    dataset: InstructionDataset,
    features: PictureFeatures,
    settings: TrainSettings,
    order: Order | None = None,
    group: Group = ALONE,
) -> Trainer:
    """Put together the execution and the engine that the settings ask for."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    execution: Execution
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if settings.numerics == "fast":
        compiled = settings.compile == "always" or (
            settings.compile == "auto" and model.device.type == "cuda"
        )
        tokens, recomputed = _common_pass_size(model, settings, group)
        language = PackedLanguage(
            model.language_model, compiled=compiled, recomputed_layers=recomputed
        )
        execution = PackedExecution(model, dataset, features, dtype, tokens, language)
    else:
        execution = PaddedExecution(model, dataset, features, dtype, settings.micro_batch_size)
    engine: Engine
    if uses_deepspeed(settings):
        from mgm.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(execution, trained, settings, group)
    else:
        engine = LocalEngine(trained, settings, group)
    return Trainer(execution, engine, settings, order, group)


def _common_pass_size(model: MGM, settings: TrainSettings, group: Group) -> tuple[int, int]:
    """Return positions of a pass and recomputed layers that fit every process's memory.

    All processes cut a step into the same passes, or some samples would be left out.
    """
    with group.together():
        own = pass_size(model, settings)
    negated, recomputed = group.largest([-own.tokens, own.recomputed_layers])
    return int(-negated), int(recomputed)


def train(settings: TrainSettings, progress: Progress) -> None:
    """Run a stage to its end, or continue it.

    Raises:
        InputError: If anything that it was given is wrong.
        SystemExit: On a signal, after the state was saved.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with joined(_device(settings), is_needed=uses_deepspeed(settings)) as group:
        stopped = _train(settings, progress, group)
    if stopped is not None:
        raise SystemExit(EXIT_TERMINATED if stopped == signal.SIGTERM else EXIT_INTERRUPTED)


def _train(settings: TrainSettings, progress: Progress, group: Group) -> int | None:
    """Train as one of a group's processes; return the signal that stopped it before its end."""
    with group.together():
        digest = _digest(settings)
        # Before anything is loaded: a folder that cannot be written is told at once.
        settings.output.mkdir(parents=True, exist_ok=True)
        is_finished = group.is_first and _is_finished(settings.output / FINISHED_FILE, digest)
    if group.any(is_finished):
        return None
    progress.update(step=0, total=0, unit="steps", label="loading weights")
    with group.together():
        model, tokenizer, dataset, features = _prepare(settings, progress)
    trainer = make_trainer(model, dataset, features, settings, group=group)
    torch.manual_seed(settings.data_seed + group.rank)
    state = _resume(trainer, group.text_of(0, digest))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopper(trainer))
    if not trainer.run(state, progress):
        return trainer.stop_signal
    with trainer.engine.whole_weights():
        if group.is_first:
            save_weights(model, tokenizer, settings)
            metrics = settings.output / METRICS_FILE
            write_original_logs(settings, metrics, len(dataset), state)
            _write_finished(settings, dataset, state)
    return None


def _prepare(
    settings: TrainSettings, progress: Progress
) -> tuple[MGM, PreTrainedTokenizerBase, InstructionDataset, PictureFeatures]:
    model, tokenizer = prepare_model(settings)
    dataset = InstructionDataset(
        settings.data,
        settings.images,
        tokenizer,
        model_max_length=settings.model_max_length,
        tokens_of_picture=model.config.num_image_tokens,
    )
    vocabulary = model.config.language["vocab_size"]
    refuse_unknown_tokens((one.input_ids for one in dataset.encoded), vocabulary, tokenizer)
    _refuse_unlabelled(dataset)
    model.train()
    features = PictureFeatures(
        model,
        dataset,
        settings.workers,
        settings.image_aspect_ratio,
        fast_towers(model, settings),
    )
    if settings.cache_features:
        features.cache(progress)
    return model, tokenizer, dataset, features


def _resume(trainer: Trainer, digest: str) -> TrainingState:
    """Take up the saved state, if there is one, by all processes alike.

    Raises:
        InputError: If the processes would train different things.
    """
    group, engine = trainer.group, trainer.engine
    with nullcontext() if engine.exchanges_in_passes else group.together():
        state = load_state(trainer.settings.output / "state", digest, engine, group)
    if group.size > 1:
        weights = sum(p.detach().double().sum() for p in engine.trained.values())
        seen = {
            "records": len(trainer.dataset),
            "tokens": sum(len(one.input_ids) for one in trainer.dataset.encoded),
            "sum of the trained weights": float(weights),
            "steps done": state.step,
        }
        hint = "every machine needs the same weights, data and pictures, and one output folder"
        group.require_same(seen, hint)
    return state


def save_weights(model: MGM, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> None:
    """Write what the stage made, under the published names."""
    model.eval()
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if settings.method == "projector":
        save_projector(model, settings.output / PROJECTOR_FILE, dtype)
        config = model.config.to_mgm_config(torch_dtype=settings.dtype, is_pretraining=True)
        write_json(settings.output / "config.json", config)
        write_json(settings.output / "towers.json", model.config.to_towers())
    elif settings.method == "lora":
        save_lora(model, settings.output, str(settings.language_model))
    else:
        save_full(model, settings.output, tokenizer, dtype=dtype)


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
        "records_without_labels": len(dataset.without_labels()),
        "unlabelled_micro_batches": state.unlabelled_micro_batches,
        "out_of_memory": state.out_of_memory,
        "seed": settings.seed,
        "data_seed": settings.data_seed,
        "settings": settings.what_decides_the_result(),
    }
    write_json(settings.output / FINISHED_FILE, content)
    shutil.rmtree(settings.output / "state")


def _refuse_unlabelled(dataset: InstructionDataset) -> None:
    unlabelled = dataset.without_labels()
    if len(unlabelled) > UNLABELLED_SHARE * len(dataset):
        hint = "an answer is empty, missing, or holds a token of the chat template"
        if any(dataset.encoded[index].num_labels for index in unlabelled):
            hint += (
                f", or begins beyond model_max_length = {dataset.model_max_length}, of which a "
                f"picture takes {dataset.tokens_of_picture}"
            )
        examples = ", ".join(dataset.record_id(index) for index in unlabelled[:5])
        raise InputError(
            "Records teach nothing",
            f"{dataset.path}: {len(unlabelled)} of {len(dataset)} records have no token to learn, "
            f"for example {examples}",
            hint,
        )
    if unlabelled:
        print(f"{len(unlabelled)} records have no token to learn", file=sys.stderr)


def _digest(settings: TrainSettings) -> str:
    """Return what the result depends on: settings, data and weights; pictures by their names only."""
    digest = hashlib.sha256(json.dumps(settings.what_decides_the_result(), sort_keys=True).encode())
    parts = [settings.data, settings.projector, settings.language_model]
    parts += [settings.vision_tower, settings.high_resolution_tower, settings.deepspeed_config]
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


def _stopper(trainer: Trainer) -> Callable[[int, FrameType | None], None]:
    """Return a handler that lets the step at work finish; a second signal ends at once.

    A launcher passes on a signal that its processes may have got already, so of several processes
    each takes signals that follow soon for the same one.
    """
    since = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if trainer.stop_signal is None:
            trainer.stop_signal, since = number, time.monotonic()
        elif trainer.group.size == 1 or time.monotonic() - since > _SAME_SIGNAL_SECONDS:
            raise SystemExit(128 + number)

    return stop


def _device(settings: TrainSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("No GPU", "device = 'cuda'", "use device = 'cpu' or 'auto'")
    return torch.device(settings.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed's launcher adds this flag to what the environment says already.
    flags = [text for text in given if not text.startswith("--local_rank=")]
    try:
        return run_program(
            lambda: parse_settings(
                TrainSettings,
                flags,
                program="python -m mgm.train",
                description=__doc__ or "",
                defaults=stage_defaults,
            ),
            lambda settings: settings.progress if place().rank == 0 else None,
            train,
        )
    except LostProcess as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
