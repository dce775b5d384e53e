"""The loop over optimizer steps: which samples, in what passes, and what is written about them.

Knows executions (how samples go through the model) and engines (how gradients become a step) by
their interfaces only. A step that runs out of memory is repeated in smaller passes. Of several
processes each computes some of a step's passes; the step is the same, whatever their number.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from mgm.distributed import ALONE, Group
from mgm.engine import Engine
from mgm.errors import InputError
from mgm.execution import Execution, Pass
from mgm.files import write_atomically
from mgm.optimization import Schedule
from mgm.progress import Progress
from mgm.sampling import grouped_order, shuffled_order
from mgm.train_settings import TrainSettings
from mgm.training_state import TrainingState, save_state

METRICS_FILE = "metrics.jsonl"

Order = Callable[[int], list[int]]
"""Epoch -> positions of its samples."""


class Trainer:
    """Training of one stage.

    Args:
        execution: Has the model, on its device, with only what is trained requiring gradients.
        engine: Of what is trained.
        settings: Of the stage.
        order: Samples of each epoch; None follows the settings.
        group: The processes that train together.
    """

    def __init__(
        self,
        execution: Execution,
        engine: Engine,
        settings: TrainSettings,
        order: Order | None = None,
        group: Group = ALONE,
    ) -> None:
        self.model = execution.model
        self.dataset = execution.dataset
        self.execution = execution
        self.engine = engine
        self.settings = settings
        self.group = group
        self.order = order or self._order
        total = settings.total_steps(len(self.dataset))
        self.schedule = Schedule(total, settings.warmup_ratio)
        self.stop_signal: int | None = None
        self._epoch: tuple[int, list[int]] = (-1, [])

    def run(self, state: TrainingState, progress: Progress) -> bool:
        """Train until the last step or a signal; return whether the last step was reached."""
        settings, total = self.settings, self.schedule.total_steps
        self.model.train()
        metrics = settings.output / METRICS_FILE
        if self.group.is_first:
            _keep_steps(metrics, state.step)
        started, samples_before = time.monotonic(), state.samples_seen
        seconds_before = state.seconds
        while state.step < total and not self._must_stop():
            loss, norm, rate = self.step(state, progress)
            state.seconds = seconds_before + time.monotonic() - started
            if state.step % settings.logging_steps == 0 or state.step == total:
                window = state.losses[-settings.logging_steps :]
                speed = (state.samples_seen - samples_before) / (time.monotonic() - started)
                values = {"loss": sum(window) / len(window), "lr": rate, "grad_norm": norm}
                self._report(metrics, state.step, speed, values, progress)
            if state.step % settings.save_steps == 0 and state.step < total:
                self.save(state)
        self.save(state)
        return state.step == total

    def _must_stop(self) -> bool:
        """Whether any process was told to stop; from then on every one of them was."""
        own = self.stop_signal or (signal.SIGTERM if self.group.is_orphaned else 0)
        told = int(self.group.largest([own])[0])
        if told:  # never forgotten: a signal may have come while the others were asked
            self.stop_signal = told
        return told > 0

    def _report(
        self, metrics: Path, step: int, speed: float, values: dict[str, float], progress: Progress
    ) -> None:
        if not self.group.is_first:
            return
        progress.update(
            step=step,
            total=self.schedule.total_steps,
            unit="steps",
            samples_per_second=speed,
            loss=values["loss"],
            lr=values["lr"],
            grad_norm=values["grad_norm"],
        )
        with metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(
            f"step {step}/{self.schedule.total_steps} {numbers} {speed:.1f} samples/s", flush=True
        )

    def save(self, state: TrainingState) -> None:
        """Write the state to resume from."""
        save_state(self.settings.output / "state", state, self.engine, self.group)

    def step(
        self, state: TrainingState, progress: Progress | None = None
    ) -> tuple[float, float, float]:
        """Do one optimizer step and return its loss, gradient norm and the next step's rate.

        Every process does the step together with the others, and returns the same.

        Raises:
            InputError: If the loss or the gradient is not a number, naming step and records; or
                if one sample alone does not fit into memory.
        """
        self.engine.set_rate(self.schedule.factor(state.step))
        micro_batches = self._micro_batches(state.step)
        while (done := self._accumulate(micro_batches)) is None:
            self._shrink(state, progress)
        self._expect_step(state.step + 1)
        norm = float(self.engine.gradient_norm())
        values: list[float] = torch.stack([loss for _, loss in done]).tolist() if done else []
        with self.group.together():
            self._check(values, norm, [one for one, _ in done], state.step)
        loss = self.group.total(sum(values))
        self.engine.step()
        state.step += 1
        state.samples_seen += sum(len(one) for one in micro_batches)
        state.unlabelled_micro_batches += self._unlabelled(micro_batches)
        state.losses.append(loss)
        rate = self.engine.set_rate(self.schedule.factor(state.step))
        return loss, norm, rate

    def _accumulate(
        self, micro_batches: Sequence[Sequence[int]]
    ) -> list[tuple[Pass, torch.Tensor]] | None:
        """Add up the gradients of this process's passes; return them with their losses.

        Returns None when any process ran out of memory.
        """
        self.engine.zero()
        passes = self._own_passes(micro_batches)
        done = []
        is_out = False
        with self._errors_shared():
            try:
                for number, one in enumerate(passes):
                    self.execution.features.announce(
                        picture for later in passes[number:] for picture in later.pictures
                    )
                    for near in passes[number : number + 2]:
                        self.execution.expect(near)
                    loss = self.engine.loss(self.execution, one)
                    self.engine.backward(loss, is_last=number + 1 == len(passes))
                    done.append((one, loss.detach().float()))
            except torch.OutOfMemoryError as error:
                if self.engine.exchanges_in_passes:
                    raise _out_of_memory() from error
                is_out = True
        return None if self.group.any(is_out) else done

    def _expect_step(self, step: int) -> None:
        """Prepare the first pass of a step, while the accelerator is at the end of the one before."""
        if step < self.schedule.total_steps and not self.engine.exchanges_in_passes:
            passes = self._own_passes(self._micro_batches(step))
            self.execution.features.announce(picture for one in passes for picture in one.pictures)
            for one in passes[:1]:
                self.execution.expect(one)

    def _own_passes(self, micro_batches: Sequence[Sequence[int]]) -> list[Pass]:
        """Return this process's share of a step's passes; the shares make up the whole step."""
        accumulation, size = self.settings.accumulation_steps, self.group.size
        passes = self.execution.passes(micro_batches, accumulation, size)
        if self.engine.exchanges_in_passes:
            passes = [one for one in passes if one.num_labels] or [self._any_pass()]
            passes += [_silent(passes[-1])] * (-len(passes) % size)
        return passes[self.group.rank :: size]

    def _any_pass(self) -> Pass:
        """Return a pass that has a gradient and weighs nothing, for a step without labels."""
        for index in range(len(self.dataset)):
            [one] = self.execution.passes([[index]], 1)
            if one.num_labels:
                return _silent(one)
        raise InputError("Records teach nothing", f"{self.dataset.path}: no record has a label")

    def _errors_shared(self) -> AbstractContextManager[None]:
        # Where passes exchange gradients, the others are waiting inside one and would not listen.
        return nullcontext() if self.engine.exchanges_in_passes else self.group.together()

    def _shrink(self, state: TrainingState, progress: Progress | None) -> None:
        """Make passes smaller after a step that did not fit, and keep a record of it."""
        # Outside the handler, whose traceback would keep the pass's tensors alive.
        self.engine.zero()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        change = self.execution.halve()
        state.out_of_memory.append({"step": state.step + 1, "then": change})
        if not self.group.is_first:
            return
        print(f"out of memory at step {state.step + 1}: going on with {change}", flush=True)
        if progress is not None:
            progress.update(
                step=state.step,
                total=self.schedule.total_steps,
                unit="steps",
                label=f"out of memory, going on with {change}",
            )

    def _check(
        self, losses: Sequence[float], norm: float, passes: Sequence[Pass], step: int
    ) -> None:
        for loss, one in zip(losses, passes, strict=True):
            if not math.isfinite(loss):
                raise _not_a_number("loss", loss, step, self._record_ids([one]))
        if not math.isfinite(norm):
            raise _not_a_number("gradient", norm, step, self._record_ids(passes))

    def _record_ids(self, passes: Sequence[Pass]) -> list[str]:
        return [self.dataset.record_id(index) for one in passes for index in one.indices]

    def _unlabelled(self, micro_batches: Sequence[Sequence[int]]) -> int:
        """Return how many micro-batches had nothing to learn."""
        return sum(
            not any(self.dataset.num_labels(index) for index in one) for one in micro_batches
        )

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of an optimizer step; an epoch's left-over one is dropped."""
        per_epoch = self.settings.steps_per_epoch(len(self.dataset))
        epoch, position = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.order(epoch))
        size = self.settings.micro_batch_size
        start = position * self.settings.global_batch_size
        samples = self._epoch[1][start : start + self.settings.global_batch_size]
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _order(self, epoch: int) -> list[int]:
        seed = self.settings.data_seed + epoch
        if not self.settings.group_by_modality_length:
            return shuffled_order(len(self.dataset), seed)
        generator = torch.Generator().manual_seed(seed)
        # The original's data loader draws a seed for its workers before the sampler starts.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        return grouped_order(
            self.dataset.modality_lengths(),
            self.settings.micro_batch_size,
            self.settings.accumulation_steps,
            generator,
        )


def _silent(one: Pass) -> Pass:
    """Return a pass with the same gradients in shape, all of them zero."""
    samples = tuple(replace(sample, weight=0.0) for sample in one.samples)
    return replace(one, scale=0.0, samples=samples)


def _keep_steps(path: Path, last: int) -> None:
    """Cut a metrics file back to where the state that is continued was.

    Lines may lie any number of steps apart: how many may have changed since.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        step = _step_of(line)
        if step is None or step > last:
            break
        kept.append(line)
    write_atomically(path, lambda target: target.write_text("".join(kept), "utf-8"))


def _step_of(line: str) -> int | None:
    """Return the step of a line of metrics, None where it was cut off."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _out_of_memory() -> InputError:
    return InputError(
        "Out of memory",
        "a pass does not fit into the accelerator's memory",
        "DeepSpeed cannot repeat it in parts: lower micro_batch_size, or with numerics = fast "
        "tokens_per_pass, or choose zero3 or zero2-offload",
    )


def _not_a_number(what: str, value: float, step: int, record_ids: Sequence[str]) -> InputError:
    records = f", records {', '.join(record_ids)}" if record_ids else ""
    return InputError(
        f"The {what} is not a number",
        f"{what} = {value} at step {step + 1}{records}",
        "lower the learning rate, or look at these records; the last saved state is kept",
    )
