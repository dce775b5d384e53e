"""DeepSpeed as an engine: optimizer, gradients and, with ZeRO-3, weights spread over processes.

    torchrun --nproc-per-node 2 -m mgm.train --deepspeed zero2 ...

Weights are in the dtype of the arithmetic and DeepSpeed keeps float32 masters. The objective is that
of every other engine. DeepSpeed averages gradients over processes, which is undone by weighing each
loss with their number, and its own division by accumulation steps is left out.

Processes exchange gradients during every pass. So each does as many passes as the others, every
pass reaches every trained weight, and a pass that does not fit ends the training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgm.distributed import Group
from mgm.engine import Engine
from mgm.errors import InputError
from mgm.execution import Execution, PackedExecution, Pass
from mgm.files import read_json
from mgm.optimization import parameter_groups, set_learning_rate
from mgm.train_settings import TrainSettings

_FOLDER = "deepspeed"


class DeepSpeedEngine(Engine):
    """Steps by `deepspeed.initialize`'s engine.

    Args:
        execution: Its model is wrapped; losses are computed inside DeepSpeed's forward pass.
        trained: Parameters by their name in the model.
        settings: `deepspeed` or `deepspeed_config` says what is spread.
        group: Has joined, also when this process is alone.

    Raises:
        InputError: If DeepSpeed is missing, or the settings do not go together.
    """

    exchanges_in_passes = True

    def __init__(
        self,
        execution: Execution,
        trained: Mapping[str, nn.Parameter],
        settings: TrainSettings,
        group: Group,
    ) -> None:
        super().__init__(trained)
        device = execution.model.device
        # DeepSpeed looks at these when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        deepspeed = _deepspeed()
        self._group = group
        self._settings = settings
        config = configuration(settings, execution.model.config.language_width, group.size)
        self._stage = int(config["zero_optimization"].get("stage", 0))
        _refuse_bypassed_hooks(execution, self._stage)
        if isinstance(execution, PackedExecution):
            execution.always_with_pictures = True
        groups = parameter_groups(
            self.trained.items(),
            settings.learning_rate,
            settings.projector_learning_rate,
            settings.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=_LossOfPass(execution),
            optimizer=_optimizer(groups, settings, _is_offloaded(config)),
            config=config,
        )
        # Every name follows the wrapped model's parameter, should DeepSpeed have replaced one.
        found = dict(execution.model.named_parameters())
        self.trained = {name: found[name] for name in self.trained}

    def set_rate(self, factor: float) -> float:
        """Set every rate to its share of its peak and return the first."""
        return set_learning_rate(self._engine.optimizer, factor)

    def zero(self) -> None:
        """Forget the gradients."""
        self._engine.zero_grad()

    def loss(self, execution: Execution, one: Pass) -> Tensor:
        """Return a pass's share of the loss of the step, computed inside DeepSpeed's hooks."""
        loss: Tensor = self._engine(execution, one)
        return loss

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Add a pass's gradient to those of all processes."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._group.size, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """Clip and apply the gradients, and return their norm before they were clipped.

        DeepSpeed finds the norm while it applies the gradients, so both happen here.
        """
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else float(norm))

    def step(self) -> None:
        """Do nothing: `gradient_norm` has applied the gradients."""

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gather weights that ZeRO-3 spread; every process holds all of them meanwhile."""
        if self._stage < 3:
            yield
            return
        deepspeed = _deepspeed()
        parameters = list(self._engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def state(self, folder: Path, step: int) -> dict[str, Any]:
        """Write every process's part into a folder of the step, by DeepSpeed."""
        tag = f"step_{step}"
        self._engine.save_checkpoint(
            str(folder / _FOLDER), tag=tag, save_latest=False, exclude_frozen_parameters=True
        )
        return {"tag": tag, "processes": self._group.size}

    def load_state(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what `state` wrote.

        DeepSpeed reads its files with pickle: they are the training's own, never another's.

        Raises:
            InputError: If another number of processes wrote it.
        """
        if state["processes"] != self._group.size:
            raise InputError(
                "Another number of processes",
                f"{folder} was saved by {state['processes']}, and there are {self._group.size}",
                "with DeepSpeed a training is continued by as many processes as began it",
            )
        self._engine.load_checkpoint(
            str(folder / _FOLDER), tag=state["tag"], load_module_strict=False
        )

    def forget_older(self, folder: Path, step: int) -> None:
        """Remove the folders of earlier steps."""
        for path in (folder / _FOLDER).glob("step_*"):
            if path.name != f"step_{step}":
                shutil.rmtree(path)


class _LossOfPass(nn.Module):
    """The whole way from a pass to its loss as one module, so that DeepSpeed's hooks span it."""

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self.model = execution.model

    def forward(self, execution: Execution, one: Pass) -> Tensor:
        """Return the pass's share of the loss of the step."""
        return execution.loss(one)


def configuration(settings: TrainSettings, width: int, processes: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a training.

    Source: the Better Synth kit's files for ZeRO-2 and ZeRO-3, and for `auto` what the trainer
    that it uses fills in.

    Args:
        settings: Of the training.
        width: Of the language model.
        processes: That train together.

    Raises:
        InputError: If the file of `deepspeed_config` says something else than the settings.
    """
    path = settings.deepspeed_config
    config = _preset(settings.deepspeed) if path is None else read_json(path)
    source = f"deepspeed = {settings.deepspeed}" if path is None else str(path)
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise InputError(
                "Two optimizers",
                f"{source}, field {section}: optimizer and rates are those of the settings",
                f"remove {section}",
            )
    values = _values(settings, width, processes)
    _fill(config, values, source)
    config.setdefault("zero_optimization", {})
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        config.setdefault(name, values[name])
    config.setdefault("gradient_accumulation_steps", values["gradient_accumulation_steps"])
    config.setdefault("gradient_clipping", values["gradient_clipping"])
    config.setdefault("bf16", {"enabled": values["bf16.enabled"]})
    _refuse_conflicts(config, values, source)
    # The optimizer given may be PyTorch's own, which DeepSpeed counts as untested.
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return config


def _preset(name: str) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": 3 if name == "zero3" else 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
    }
    if name == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        }
    if name == "zero2-offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {"zero_optimization": zero, "steps_per_print": 10**9}


def _values(settings: TrainSettings, width: int, processes: int) -> dict[str, Any]:
    """Return what `auto` stands for, by the path of the field."""
    # One process of several may get one pass of fewer micro-batches; DeepSpeed keeps room for
    # accumulated gradients only if it is told of more than one.
    accumulation = max(2, -(-settings.accumulation_steps // processes))
    zero = "zero_optimization."
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": settings.micro_batch_size * accumulation * processes,
        "gradient_clipping": settings.max_grad_norm,
        "bf16.enabled": settings.dtype == "bfloat16",
        "fp16.enabled": False,
        zero + "reduce_bucket_size": width * width,
        zero + "stage3_prefetch_bucket_size": int(0.9 * width * width),
        zero + "stage3_param_persistence_threshold": 10 * width,
    }


def _fill(section: dict[str, Any], values: Mapping[str, Any], source: str, path: str = "") -> None:
    """Replace every `auto` in place."""
    for name, value in section.items():
        if isinstance(value, dict):
            _fill(value, values, source, f"{path}{name}.")
        elif value == "auto":
            if path + name not in values:
                raise InputError(
                    "Unknown automatic value",
                    f"{source}, field {path}{name}: auto",
                    "give a number",
                )
            section[name] = values[path + name]


def _refuse_conflicts(config: dict[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Refuse numbers that differ from the settings', which decide."""
    found = {
        "gradient_clipping": config["gradient_clipping"],
        "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "train_batch_size": config["train_batch_size"],
        "bf16.enabled": config["bf16"].get("enabled", False),
        "fp16.enabled": config.get("fp16", {}).get("enabled", False),
    }
    for name, value in found.items():
        if value != values[name]:
            raise InputError(
                "DeepSpeed's file and the settings differ",
                f"{source}, field {name}: {value!r}, but the settings give {values[name]!r}",
                "write auto",
            )


def _is_offloaded(config: dict[str, Any]) -> bool:
    offload = config["zero_optimization"].get("offload_optimizer", {})
    return bool(offload.get("device", "none") != "none")


def _optimizer(
    groups: list[dict[str, Any]], settings: TrainSettings, is_offloaded: bool
) -> torch.optim.Optimizer:
    betas = (settings.adam_beta1, settings.adam_beta2)
    if is_offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            fast: torch.optim.Optimizer = DeepSpeedCPUAdam(
                groups, betas=betas, eps=settings.adam_eps, adamw_mode=True
            )
            return fast
        except (ImportError, OSError, RuntimeError) as error:
            print(f"DeepSpeed's CPU optimizer cannot be compiled, PyTorch's is slower: {error}")
    return torch.optim.AdamW(groups, betas=betas, eps=settings.adam_eps)


def _refuse_bypassed_hooks(execution: Execution, stage: int) -> None:
    if stage == 3 and isinstance(execution, PackedExecution):
        raise InputError(
            "ZeRO-3 needs the reference numerics",
            "numerics = fast takes weights out of their modules, where ZeRO-3 keeps them in parts",
            "set numerics to reference, or deepspeed to zero2",
        )


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            "DeepSpeed is missing",
            str(error),
            "install it with: pip install 'synth-agent[gpu]', or set deepspeed to none",
        ) from error
    return deepspeed
