"""Settings of one training stage, and what they amount to.

Defaults are the Better Synth kit's. Where its two stages differ, `stage_defaults` gives the stage's
own; the dataclass holds those of pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mgm.errors import InputError

STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "method": "projector",
        "learning_rate": 1e-3,
        "global_batch_size": 256,
        "image_aspect_ratio": "square",
        "group_by_modality_length": False,
    },
    "finetune": {
        "method": "full",
        "learning_rate": 2e-5,
        "global_batch_size": 128,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
    },
}
"""The kit's values where its two stages differ."""


def _setting(default: Any, text: str, *, otherwise: str = "") -> Any:
    """Return a field; `otherwise` says where its default is another."""
    shown = {"default": f"{default}{otherwise}"} if otherwise else {}
    return field(default=default, metadata={"help": text, **shown})


def _staged(name: str, text: str) -> Any:
    """Return a field whose default is the kit's value of the stage."""
    values = {stage: defaults[name] for stage, defaults in STAGE_DEFAULTS.items()}
    other = f" in pretraining, {values['finetune']} in finetuning"
    return _setting(values["pretrain"], text, otherwise=other)


def stage_defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the kit's values of the stage that the given settings name."""
    defaults = STAGE_DEFAULTS.get(str(given.get("stage")), {})
    # Frozen towers that say the same each time run several times faster and can be cached.
    return {**defaults, "drop_path": False} if given.get("numerics") == "fast" else defaults


@dataclass(frozen=True)
class TrainSettings:
    """Everything that `python -m mgm.train` can be told."""

    stage: Literal["pretrain", "finetune"] = field(metadata={"help": "which stage"})
    language_model: Path = field(metadata={"help": "Gemma folder"})
    vision_tower: Path = field(metadata={"help": "CLIP folder"})
    high_resolution_tower: Path = field(metadata={"help": "ConvNeXt folder"})
    data: Path = field(metadata={"help": "LLaVA JSON file"})
    images: Path = field(metadata={"help": "folder that image paths are relative to"})
    output: Path = field(metadata={"help": "folder for the weights; an unfinished one is resumed"})
    projector: Path | None = _setting(None, "mm_projector.bin of pretraining; finetune needs it")
    model: str = _setting("mgm-2b", "name noted in the output's config")
    method: Literal["projector", "full", "lora"] = _staged("method", "what is trained")
    learning_rate: float = _staged("learning_rate", "peak rate")
    projector_learning_rate: float | None = _setting(None, "peak rate of the projector alone")
    weight_decay: float = _setting(0.0, "AdamW's decay of weights")
    adam_beta1: float = _setting(0.9, "AdamW's first decay rate")
    adam_beta2: float = _setting(0.999, "AdamW's second decay rate")
    adam_eps: float = _setting(1e-8, "AdamW's epsilon")
    warmup_ratio: float = _setting(0.03, "share of the steps in which the rate rises")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm, all together")
    epochs: float = _setting(1.0, "passes over the data, when max_steps is 0")
    max_steps: int = _setting(0, "optimizer steps; 0 means as many as the epochs give")
    global_batch_size: int = _staged("global_batch_size", "samples of one optimizer step")
    micro_batch_size: int = _setting(8, "samples that go through the model together")
    seed: int = _setting(1024, "seed of the trained modules' initialisation")
    data_seed: int = _setting(42, "seed of the order of samples and of dropout")
    model_max_length: int = _setting(2048, "longest sequence in tokens, pictures included")
    image_aspect_ratio: Literal["square", "pad"] = _staged(
        "image_aspect_ratio", "crop, or pad to a square"
    )
    group_by_modality_length: bool = _staged(
        "group_by_modality_length", "neighbours of like length and modality"
    )
    lora_rank: int = _setting(64, "rank of the adapters")
    lora_alpha: float = _setting(16.0, "scale of the adapters, divided by the rank")
    lora_dropout: float = _setting(0.05, "dropout before the adapters")
    dtype: Literal["float32", "bfloat16"] = _setting(
        "bfloat16",
        "of frozen weights and arithmetic; trained weights are float32, see master_weights",
    )
    drop_path: bool = _setting(
        True,
        "keep the frozen ConvNeXt's stochastic depth, as published",
        otherwise=", False with numerics = fast",
    )
    cache_features: bool = _setting(False, "encode every picture once and keep the result")
    gradient_checkpointing: bool = _setting(
        True, "recompute activations to save memory, with numerics = reference"
    )
    numerics: Literal["reference", "fast"] = _setting(
        "reference",
        "reference: the published order of operations; fast: the same objective, packed rows, "
        "mining reassociated, and in bfloat16 weights with masters in the optimizer",
    )
    tokens_per_pass: int = _setting(
        0, "positions that go through the model at once, pictures included; 0: by the memory"
    )
    recomputed_layers: int = _setting(
        -1, "layers whose activations are recomputed in the backward pass; -1: by the memory"
    )
    compile: Literal["auto", "always", "never"] = _setting(
        "auto", "compile element-wise work; auto: on a GPU"
    )
    master_weights: Literal["float32", "split24"] = _setting(
        "float32", "what the optimizer keeps of bfloat16 weights: float32, or 24 bits in all"
    )
    moments: Literal["float32", "8bit"] = _setting(
        "float32", "the optimizer's moments of bfloat16 weights"
    )
    deepspeed: Literal["none", "zero2", "zero2-offload", "zero3"] = _setting(
        "none", "let DeepSpeed spread optimizer and gradients over the processes"
    )
    deepspeed_config: Path | None = _setting(
        None, "DeepSpeed's own JSON instead; 'auto' follows these settings"
    )
    save_steps: int = _setting(100, "optimizer steps between two states to resume from")
    logging_steps: int = _setting(1, "optimizer steps between two reports")
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "auto takes a GPU if there is one")
    threads: int = _setting(0, "CPU threads; 0 leaves the default")
    workers: int = _setting(4, "threads that decode pictures")
    progress: Path | None = _setting(None, "file to which progress is appended")

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            InputError: Naming the setting.
        """
        self._refuse_numbers()
        if self.global_batch_size % self.micro_batch_size:
            raise _bad(
                "micro_batch_size",
                self.micro_batch_size,
                f"it must divide global_batch_size = {self.global_batch_size}",
            )
        if self.stage == "pretrain" and self.method != "projector":
            raise _bad("method", self.method, "pretraining trains the projector and the mining")
        if self.deepspeed != "none" and self.deepspeed_config is not None:
            raise _bad("deepspeed", self.deepspeed, "the file of deepspeed_config says which")
        if self.stage == "finetune" and self.projector is None:
            raise _bad("projector", None, "give the mm_projector.bin of the pretraining")

    def _refuse_numbers(self) -> None:
        """Refuse numbers outside their range; what is not a number is outside every range."""
        above = {"learning_rate": 0.0, "max_grad_norm": 0.0, "epochs": 0.0}
        for name, bound in above.items():
            if not getattr(self, name) > bound:
                raise _bad(name, getattr(self, name), f"it must be above {bound:g}")
        counts = ("global_batch_size", "micro_batch_size", "save_steps", "logging_steps")
        for name in (*counts, "lora_rank", "model_max_length"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "it must be 1 or more")
        shares = ("warmup_ratio", "lora_dropout", "adam_beta1", "adam_beta2")
        whole = ("max_steps", "tokens_per_pass", "threads", "workers")
        rate = () if self.projector_learning_rate is None else ("projector_learning_rate",)
        for name in (*shares, *whole, *rate, "weight_decay", "adam_eps"):
            if not getattr(self, name) >= 0:
                raise _bad(name, getattr(self, name), "it must not be negative")
        for name in shares:
            if getattr(self, name) >= 1:
                raise _bad(name, getattr(self, name), "it must be below 1")
        for name in ("learning_rate", "epochs", "weight_decay", "adam_eps"):
            if math.isinf(getattr(self, name)):
                raise _bad(name, getattr(self, name), "it must be finite")
        has_masters = self.method == "full" and self.numerics == "fast"
        if has_masters and self.moments == "8bit" and not self.adam_beta1**2 < self.adam_beta2:
            hint = f"with moments = '8bit' it must be above adam_beta1² = {self.adam_beta1**2:g}"
            raise _bad("adam_beta2", self.adam_beta2, hint)
        for name in ("seed", "data_seed"):
            if abs(getattr(self, name)) >= 2**62:
                raise _bad(name, getattr(self, name), "it must be a number of 62 bits")

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.global_batch_size // self.micro_batch_size

    def steps_per_epoch(self, num_samples: int) -> int:
        """Return the optimizer steps of one pass; what is left over is not applied."""
        return max(1, math.ceil(num_samples / self.micro_batch_size) // self.accumulation_steps)

    def total_steps(self, num_samples: int) -> int:
        """Return the optimizer steps of the whole stage."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(num_samples))

    def what_decides_the_result(self) -> dict[str, Any]:
        """Return the settings that the weights depend on, as plain data."""
        aside = {"output", "progress", "threads", "workers", "save_steps", "logging_steps"}
        aside |= {"tokens_per_pass", "recomputed_layers", "compile"}  # but for rounding
        values = {name: value for name, value in asdict(self).items() if name not in aside}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _bad(name: str, value: object, reason: str) -> InputError:
    return InputError("Wrong setting", f"{name} = {value!r}", reason)
