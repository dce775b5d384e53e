"""What each of several processes does in the tests: train in a group and alone, and compare.

Started with a launcher's environment variables; reads a JSON list of tasks, and the first process
writes their answers beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mgm.distributed import ALONE, Group, joined
from mgm.engine import LocalEngine
from mgm.errors import InputError
from mgm.execution import Execution, Pass
from mgm.features import PictureFeatures
from mgm.parity import training
from mgm.train import make_trainer
from mgm.train_settings import TrainSettings
from mgm.trainer import Trainer
from mgm.training_state import TrainingState, load_state, save_state
from tests.mgm.test_train import prepared, settings


def built(arguments: list[str], group: Group, **changes: Any) -> Trainer:
    chosen = replace(settings(arguments), **changes)
    model, data = prepared(chosen)
    model.train()
    features = PictureFeatures(model, data, 1, chosen.image_aspect_ratio)
    return make_trainer(model, data, features, chosen, group=group)


def numbers_and_weights(trainer: Trainer, steps: int) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    state = TrainingState("")
    numbers = [trainer.step(state) for _ in range(steps)]
    with trainer.engine.whole_weights():
        weights = {n: p.detach().float().clone() for n, p in trainer.engine.trained.items()}
    return numbers, weights


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def compare(task: dict[str, Any], group: Group) -> dict[str, Any]:
    """Train every case together and alone; the latter always without DeepSpeed."""
    answer = {}
    for name, arguments in task["cases"].items():
        together = numbers_and_weights(built(arguments, group), task["steps"])
        plain = {"deepspeed": "none", "deepspeed_config": None}
        alone = numbers_and_weights(built(arguments, ALONE, **plain), task["steps"])
        start = built(arguments, ALONE, **plain).engine.trained
        begun = {n: p.detach().float() for n, p in start.items()}
        answer[name] = {
            "together": together[0],
            "alone": alone[0],
            "difference": group.largest([furthest(together[1], alone[1])])[0],
            "moved": furthest(begun, alone[1]),
        }
    return answer


class FullAt(Execution):
    """An execution that runs out of memory in one process only."""

    def __init__(self, inner: Execution, most: int) -> None:
        super().__init__(inner.model, inner.dataset, inner.features, inner.dtype)
        self.inner, self.most = inner, most

    def passes(self, micro_batches: Any, accumulation: int, ranks: int = 1) -> list[Pass]:
        return self.inner.passes(micro_batches, accumulation, ranks)

    def loss(self, one: Pass) -> torch.Tensor:
        if len(one.indices) > self.most:
            raise torch.OutOfMemoryError("a pass of this size does not fit")
        return self.inner.loss(one)

    def halve(self) -> str:
        return self.inner.halve()


def out_of_memory(task: dict[str, Any], group: Group) -> dict[str, Any]:
    """Run out of memory in the last process alone."""
    trainer = built(task["arguments"], group)
    most = 1 if group.rank == group.size - 1 else 100
    trainer.execution = FullAt(trainer.execution, most)
    state = TrainingState("")
    numbers = [trainer.step(state) for _ in range(task["steps"])]
    passes = len(trainer.execution.passes(trainer._micro_batches(0), 1, group.size))
    alone = numbers_and_weights(built(task["arguments"], ALONE), task["steps"])
    return {
        "together": numbers,
        "alone": alone[0],
        "out_of_memory": state.out_of_memory,
        "passes": group.gathered(torch.tensor(passes))[0].item(),
    }


def golden(task: dict[str, Any], group: Group) -> dict[str, Any]:
    """Repeat the recorded runs in a group."""
    plain = training._settings

    def with_engine(*arguments: Any) -> TrainSettings:
        return replace(plain(*arguments), **task["changes"])

    def in_group(model: Any, data: Any, features: Any, chosen: Any, order: Any = None) -> Trainer:
        if order is None:
            # Only asked for its order; DeepSpeed takes hold of a model once.
            return make_trainer(model, data, features, replace(chosen, deepspeed="none"))
        return make_trainer(model, data, features, chosen, order, group)

    training._settings = with_engine
    training.make_trainer = in_group
    checks = list(training.check(Path(task["folder"])))
    return {
        "cases": sorted({check.case for check in checks}),
        "failed": [str(check) for check in checks if not check.is_ok],
    }


def resume(task: dict[str, Any], group: Group) -> dict[str, Any]:
    """Save after some steps, go on, and go on again from what was saved."""
    folder = Path(task["folder"])
    first, second = (built(task["arguments"], group) for _ in range(2))
    is_local = isinstance(first.engine, LocalEngine)
    torch.manual_seed(group.rank)
    state = TrainingState("digest")
    for _ in range(task["steps"]):
        first.step(state)
    save_state(folder, state, first.engine, group)
    undisturbed = [first.step(state) for _ in range(task["steps"])]
    torch.manual_seed(99)
    if group.size > 1:
        group.largest([0.0])
    taken_up = load_state(folder, "digest", second.engine, group)
    continued = [second.step(taken_up) for _ in range(task["steps"])]
    with first.engine.whole_weights(), second.engine.whole_weights():
        difference = furthest(dict(first.engine.trained), dict(second.engine.trained))
    return {
        "undisturbed": undisturbed,
        "continued": continued,
        "difference": group.largest([difference])[0],
        "is_local": is_local,
        "files": sorted(path.name for path in folder.iterdir()),
    }


def disagree(task: dict[str, Any], group: Group) -> dict[str, Any]:
    """Meet bad input in the last process, and see different things."""
    met = []
    for share in (False, True):
        try:
            if share:
                group.require_same({"same": 1.0, "own": group.rank}, "look")
            with group.together():
                if group.rank == group.size - 1:
                    raise InputError("title of the last", "message", "hint")
        except (InputError, SystemExit) as error:
            met.append(str(error))
    codes = group.gathered(torch.tensor([len(text) for text in met]))
    return {"met": met, "lengths": [code.tolist() for code in codes]}


TASKS = {
    "compare": compare,
    "disagree": disagree,
    "golden": golden,
    "out_of_memory": out_of_memory,
    "resume": resume,
}


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), is_needed=True) as group:
        answers = [TASKS[task["task"]](task, group) for task in json.loads(path.read_text())]
        if group.is_first:
            path.with_suffix(".answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
