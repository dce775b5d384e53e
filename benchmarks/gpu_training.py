"""Training cases of `benchmarks/gpu.py` at the true sizes: random weights, made-up records.

Runs the product's own trainer, execution, engine and optimizer; only the records and the pictures
are made up, and pictures come decoded, so that what is timed is the training and not the disk.
Cases of one method share a process and a model. Prints a JSON object a case, as it is done.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgm import execution as execution_module
from mgm.config import ModelConfig
from mgm.data import InstructionDataset
from mgm.distributed import ALONE, Group
from mgm.errors import InputError
from mgm.execution import PackedExecution
from mgm.features import PictureFeatures
from mgm.model import IGNORE_INDEX, IMAGE_TOKEN_ID, MGM
from mgm.prompt import Encoded
from mgm.train import fast_towers, make_trainer, unfreeze
from mgm.train_settings import TrainSettings
from mgm.trainer import Trainer
from mgm.training_state import TrainingState

GIB = 2**30
PICTURES = 64
SAMPLES = {"pretrain": 256, "lora": 128, "full": 128}
"""Of an optimizer step, by stage: the published global batches."""
Stage = Literal["pretrain", "lora", "full"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how much at once."""

    name: str
    stage: Stage
    tokens: int
    """Positions of a pass at most."""
    recomputed_layers: int = 0
    master_weights: Literal["float32", "split24"] = "float32"
    moments: Literal["float32", "8bit"] = "float32"
    gib: float | None = None
    """The allocator is capped at this."""
    steps: int = 1
    """Optimizer steps that are timed, after one to warm up."""

    @property
    def method(self) -> tuple[str, str, str]:
        """What cases must share to share a model."""
        return self.stage, self.master_weights, self.moments


class Records(InstructionDataset):
    """Made-up records in the shape of a data set: one picture each."""

    def __init__(self, encoded: list[Encoded], config: ModelConfig) -> None:
        self.path = Path("made-up")
        self.pad_id = 0
        self.model_max_length = 2048
        self.tokens_of_picture = config.num_image_tokens
        self.encoded = encoded
        self.records = [{"image": str(index % PICTURES)} for index in range(len(encoded))]
        self.pictures = [str(index) for index in range(PICTURES)]
        self._picture_of = {name: position for position, name in enumerate(self.pictures)}
        side, generator = config.image_size_aux, torch.Generator().manual_seed(0)
        self._pixels = torch.randint(
            0, 256, (PICTURES, 3, side, side), dtype=torch.uint8, generator=generator
        )

    def load_pixels(self, position: int, *arguments: Any) -> Tensor:
        """Return a picture that is decoded already."""
        return self._pixels[position]


def text_lengths(case: Case, count: int) -> list[int]:
    """Return text lengths in tokens: stage 1 as captions, stage 2 log-normal with mean 250.

    Source: the distributions of the reference measurements, so that rates compare.
    """
    generator = random.Random(1)
    if case.stage == "pretrain":
        return [generator.randint(20, 40) for _ in range(count)]
    drawn = (generator.lognormvariate(5.25, 0.75) for _ in range(count))
    return [min(1400, max(30, round(length))) for length in drawn]


def records(case: Case, config: ModelConfig, count: int) -> Records:
    """Return records of which the second half of each text is learned; captions wholly."""
    generator = random.Random(2)
    encoded = []
    for length in text_lengths(case, count):
        text = [generator.randrange(3, config.language["vocab_size"]) for _ in range(length)]
        learned = length - 8 if case.stage == "pretrain" else length // 2
        labels = [IGNORE_INDEX] * (length - learned) + text[length - learned :]
        ids = [2, IMAGE_TOKEN_ID, *text]
        encoded.append(Encoded(ids, [IGNORE_INDEX, IGNORE_INDEX, *labels]))
    return Records(encoded, config)


def build(case: Case, preset: str = "mgm-2b", group: Group = ALONE, **changes: Any) -> Trainer:
    """Return a trainer of the case over a model of random weights.

    Args:
        case: What is trained.
        preset: The model's sizes.
        group: Of the processes that train together.
        changes: Settings beside those of the case.
    """
    config = ModelConfig.preset(preset).replace(drop_path=False, tokenizer_model_max_length=2048)
    nowhere = Path("made-up")
    settings = TrainSettings(
        stage="pretrain" if case.stage == "pretrain" else "finetune",
        language_model=nowhere,
        vision_tower=nowhere,
        high_resolution_tower=nowhere,
        data=nowhere,
        images=nowhere,
        output=nowhere,
        projector=nowhere,
        method="projector" if case.stage == "pretrain" else case.stage,  # type: ignore[arg-type]
        numerics="fast",
        drop_path=False,
        learning_rate=1e-5,
        micro_batch_size=8,
        global_batch_size=SAMPLES[case.stage],
        max_steps=1000,
        tokens_per_pass=case.tokens,
        recomputed_layers=case.recomputed_layers,
        master_weights=case.master_weights,
        moments=case.moments,
        **changes,
    )
    model = random_model(config, settings)
    dataset = records(case, config, SAMPLES[case.stage] * 4)
    features = PictureFeatures(model, dataset, 8, "square", fast_towers(model, settings))
    order = list(range(len(dataset)))
    model.train()
    return make_trainer(model, dataset, features, settings, lambda epoch: order, group)


def random_model(config: ModelConfig, settings: TrainSettings) -> MGM:
    """Build the model in bfloat16, with what is trained as the program would have it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = MGM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    model = model.to(device)
    unfreeze(model, settings)
    return model.to(device)


class Sections:
    """Milliseconds of the GPU in named sections, by events."""

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events[name].append((start, end))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.section(name):
                return function(*arguments, **named)

        return timed

    def totals(self) -> dict[str, float]:
        """Return milliseconds by section."""
        torch.cuda.synchronize()
        return {
            name: sum(start.elapsed_time(end) for start, end in pairs)
            for name, pairs in self._events.items()
        }


def watch(trainer: Trainer, sections: Sections) -> None:
    """Time the parts of a step."""
    execution = trainer.execution
    assert isinstance(execution, PackedExecution)
    features, model, engine = execution.features, execution.model, trainer.engine
    features._towers = sections.around("towers", features._towers)
    model.project = sections.around("mining and projector", model.project)
    execution._language = sections.around("language model forward", execution._language)  # type: ignore[assignment]
    execution_module.label_loss = sections.around("head and loss", execution_module.label_loss)
    engine.backward = sections.around("backward", engine.backward)  # type: ignore[method-assign]
    engine.step = sections.around("optimizer", engine.step)  # type: ignore[method-assign]


def measure(case: Case, trainer: Trainer, state: TrainingState) -> dict[str, Any]:
    """Train some steps and return rates, memory and where the time goes."""
    execution = trainer.execution
    assert isinstance(execution, PackedExecution)
    execution.budget, execution._language.recomputed_layers = case.tokens, case.recomputed_layers
    trainer.engine.zero()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if case.gib is None else case.gib * GIB / total)
    state.out_of_memory.clear()
    warm = timed_step(trainer, state)
    torch.cuda.reset_peak_memory_stats()
    seconds = sorted(timed_step(trainer, state) for _ in range(case.steps))
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    passes = execution.passes(trainer._micro_batches(0), 1)
    positions = sum(sample.length for one in passes for sample in one.samples)
    median = seconds[len(seconds) // 2]
    return {
        **asdict(case),
        "samples": SAMPLES[case.stage],
        "samples_per_second": SAMPLES[case.stage] / median,
        "seconds": seconds,
        "first_step_seconds": warm,
        "passes_per_step": len(passes),
        "positions_per_second": positions / median,
        "allocated_gib": allocated / GIB,
        "reserved_gib": reserved / GIB,
        "out_of_memory": list(state.out_of_memory),
        "losses": state.losses,
    }


def timed_step(trainer: Trainer, state: TrainingState) -> float:
    """Do one optimizer step and return its seconds."""
    started = time.monotonic()
    trainer.step(state)
    torch.cuda.synchronize()
    return time.monotonic() - started


def sections(trainer: Trainer, state: TrainingState) -> dict[str, float]:
    """Return the GPU's milliseconds in the parts of a step; trainer cannot be timed after it."""
    watched = Sections()
    watch(trainer, watched)
    seconds = timed_step(trainer, state)
    return {**watched.totals(), "whole step": 1000 * seconds}


def main() -> int:
    """Measure the cases given as JSON, which share their method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", help="a JSON list of objects of the fields of Case")
    options = parser.parse_args()
    # As the programs do, see mgm.program.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cases = [Case(**fields) for fields in json.loads(options.cases)]
    trainer, state = build(cases[0]), TrainingState("")
    for case in cases:
        try:
            print(json.dumps(measure(case, trainer, state)), flush=True)
        except InputError as error:
            print(json.dumps({**asdict(case), "error": str(error)}), flush=True)
    measure(cases[0], trainer, state)
    print(json.dumps({"name": cases[0].name, "sections_ms": sections(trainer, state)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
