"""Several initialisations of pretraining, of which the one of the lowest loss is kept.

    python -m mgm.starts --training pretrain.json --seeds 1,2,3 --start 1
    python -m mgm.starts --training pretrain.json --seeds 1,2,3 --start 2
    python -m mgm.starts --training pretrain.json --seeds 1,2,3 --start 3
    python -m mgm.starts --training pretrain.json --seeds 1,2,3

`--training` is a configuration of `python -m mgm.train`. With `--start N` the N-th seed is trained
in `start-<seed>` under its output folder; with `--share 0.5` it stops halfway. Without `--start`
the best start is chosen, trained to its end and moved to the output folder. Each command does
nothing where its work is done already, and continues it where it was cut off.

Owns the choice: the lowest mean loss over the last 10 % of the steps that every start has done.
`starts.json` says what was chosen among what. Exit codes are those of `mgm.program`.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mgm.errors import InputError
from mgm.files import read_json, write_json
from mgm.program import EXIT_TERMINATED, run_program
from mgm.progress import Progress
from mgm.settings import parse_settings
from mgm.train import FINISHED_FILE, train
from mgm.train_settings import TrainSettings, stage_defaults
from mgm.trainer import METRICS_FILE
from mgm.training_state import STATE_FILE, read_state

STARTS_FILE = "starts.json"
WINDOW = 0.1
"""Share of the steps over which the loss is averaged, backwards from the last one."""
_GOAL_FILE = "start.json"
_KEPT_OF_THE_OTHERS = (FINISHED_FILE, METRICS_FILE, _GOAL_FILE)


@dataclass(frozen=True)
class StartsSettings:
    """Everything that `python -m mgm.starts` can be told."""

    training: Path = field(metadata={"help": "configuration of mgm.train, for every start"})
    seeds: str = field(metadata={"help": "seed of each start, separated by commas"})
    start: int = field(
        default=0, metadata={"help": "start to train, from 1; 0 chooses among those trained"}
    )
    share: float = field(
        default=1.0, metadata={"help": "share of the steps after which the choice is made"}
    )
    progress: Path | None = field(
        default=None, metadata={"help": "file to which progress is appended"}
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            InputError: Naming the setting.
        """
        try:
            seeds = self.all_seeds
        except ValueError:
            raise _bad("seeds", self.seeds, "give whole numbers, as in 1,2,3") from None
        if len(seeds) < 2 or len(set(seeds)) < len(seeds):
            raise _bad("seeds", self.seeds, "give two or more, each another one")
        if not 0 <= self.start <= len(seeds):
            raise _bad("start", self.start, f"it must be 0 to {len(seeds)}")
        if not 0 < self.share <= 1:
            raise _bad("share", self.share, "it must be above 0 and at most 1")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        return tuple(int(seed) for seed in self.seeds.split(","))


@dataclass(frozen=True)
class Start:
    """What a start is judged by."""

    seed: int
    steps: int
    """Optimizer steps that it had done when the choice was made."""
    loss: float
    """Mean over the last steps of those that every start had done."""
    seconds: float
    """That it had trained."""


class StartProgress(Progress):
    """Progress of one start: labelled with it, and ending the training at a share of the steps.

    Args:
        path: File to append to, or None.
        label: Says which start of how many.
        folder: Of the start; its goal is written there once the number of steps is known.
        share: Share of the steps, rounded up, after which to stop; 1 never stops.
    """

    def __init__(self, path: Path | None, label: str, folder: Path, share: float) -> None:
        super().__init__(path)
        self._label, self._folder, self._share = label, folder, share
        self._goal: int | None = None
        self.has_stopped = False

    def update(
        self, *, step: int, total: int, unit: str, label: str = "", **numbers: float | None
    ) -> None:
        """Record the progress under the start's label, and stop when its goal is reached."""
        whole = f"{self._label}: {label}" if label else self._label
        super().update(step=step, total=total, unit=unit, label=whole, **numbers)
        if unit != "steps" or not total or not step or self._share == 1:
            return
        if self._goal is None:
            self._goal = math.ceil(self._share * total)
            write_json(self._folder / _GOAL_FILE, {"goal": self._goal, "total": total})
        if self._goal <= step < total:
            # The signal is how a training is asked to save its state after a step and end.
            self.has_stopped = True
            signal.raise_signal(signal.SIGTERM)


def run_starts(settings: StartsSettings, progress: Progress) -> None:
    """Train one start as far as the choice, or choose.

    Args:
        settings: What to do.
        progress: Of the program; a start reports under its label through one of its own.

    Raises:
        InputError: If anything that it was given is wrong, or a start is not trained.
        SystemExit: On a signal, after the state was saved.
    """
    plain = parse_settings(
        TrainSettings,
        ["--config", str(settings.training)],
        program="python -m mgm.train",
        description="",
        defaults=stage_defaults,
    )
    if plain.stage != "pretrain":
        raise InputError(
            "Only pretraining has several starts",
            f"{settings.training}: stage = {plain.stage!r}",
            "a finetuning continues with the one projector that it is given",
        )
    if settings.start:
        _train_start(settings, plain)
    else:
        _keep_best(settings, plain)


def _of(plain: TrainSettings, seed: int) -> TrainSettings:
    """Return the settings of one start. Every step is logged, since the choice reads the losses."""
    return replace(plain, seed=seed, output=plain.output / f"start-{seed}", logging_steps=1)


def _train_start(settings: StartsSettings, plain: TrainSettings) -> None:
    one = _of(plain, settings.all_seeds[settings.start - 1])
    if (plain.output / STARTS_FILE).exists() or _is_trained(one.output, settings.share):
        return
    label = f"start {settings.start}/{len(settings.all_seeds)}"
    progress = StartProgress(settings.progress, label, one.output, settings.share)
    with progress:
        try:
            train(one, progress)
        except SystemExit as stop:
            # Another signal may have ended it before its state was saved.
            is_ours = progress.has_stopped and stop.code == EXIT_TERMINATED
            if not is_ours or not _is_trained(one.output, settings.share):
                raise


def _is_trained(folder: Path, share: float) -> bool:
    """Tell whether a start has come as far as the choice needs it."""
    if (folder / FINISHED_FILE).exists():
        return True
    if share == 1 or not (folder / _GOAL_FILE).exists():
        return False
    return _standing(folder)[0] >= int(read_json(folder / _GOAL_FILE)["goal"])


def _standing(folder: Path) -> tuple[int, float]:
    """Return the steps that a start has done and saved, and its seconds."""
    if (folder / FINISHED_FILE).exists():
        finished = read_json(folder / FINISHED_FILE)
        return int(finished["steps"]), float(finished["seconds"])
    path = folder / "state" / STATE_FILE
    if not path.exists():
        return 0, 0.0
    state = read_state(path)["state"]
    return int(state["step"]), float(state["seconds"])


def _keep_best(settings: StartsSettings, plain: TrainSettings) -> None:
    record = plain.output / STARTS_FILE
    if not record.exists():
        # Written before anything is moved: what is cut off later goes on with the same choice.
        write_json(record, _choice(settings, plain))
    chosen = int(read_json(record)["chosen_seed"])
    if chosen not in settings.all_seeds:
        raise InputError(
            "Another choice was made here",
            f"{record}: chosen_seed = {chosen} is not among {settings.seeds}",
            "give the same seeds, or choose another output folder",
        )
    number = settings.all_seeds.index(chosen) + 1
    one = _of(plain, chosen)
    if not (plain.output / FINISHED_FILE).exists():
        label = f"start {number}/{len(settings.all_seeds)}, the best"
        with StartProgress(settings.progress, label, one.output, 1.0) as progress:
            train(one, progress)
            _report_last(one.output, progress)
        _move(one.output, plain.output)
    shutil.rmtree(one.output, ignore_errors=True)
    for seed in settings.all_seeds:
        _drop_weights(_of(plain, seed).output)


def _choice(settings: StartsSettings, plain: TrainSettings) -> dict[str, object]:
    """Compare the starts.

    Raises:
        InputError: If one is not trained so far, or its loss is not a number.
    """
    folders = {seed: _of(plain, seed).output for seed in settings.all_seeds}
    for number, (seed, folder) in enumerate(folders.items(), 1):
        if not _is_trained(folder, settings.share):
            raise InputError(
                "Start is not trained",
                f"{folder}: seed {seed} has not done its steps",
                f"run python -m mgm.starts with --start {number} first",
            )
    standings = {seed: _standing(folder) for seed, folder in folders.items()}
    steps = min(done for done, _ in standings.values())
    starts = [
        Start(seed, standings[seed][0], mean_loss(folder / METRICS_FILE, steps), seconds)
        for (seed, folder), (_, seconds) in zip(folders.items(), standings.values(), strict=True)
    ]
    best = min(starts, key=lambda start: start.loss)
    return {
        "chosen_seed": best.seed,
        "starts": [asdict(start) for start in starts],
        "share": settings.share,
        "compared_at_step": steps,
        "averaged_steps": _window(steps),
    }


def mean_loss(metrics: Path, steps: int) -> float:
    """Return a start's mean loss over the last tenth of its first `steps` steps.

    Args:
        metrics: The start's `metrics.jsonl`, one line for each step.
        steps: Optimizer steps, 1 or more.

    Raises:
        InputError: If the file is missing, a step is missing, or a loss is not a finite number.
    """
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        losses = {int(line["step"]): float(line["loss"]) for line in lines}
    except (OSError, ValueError, KeyError) as error:
        raise InputError("Cannot read losses", f"{metrics}: {error}") from error
    window = range(steps - _window(steps) + 1, steps + 1)
    missing = [step for step in window if step not in losses]
    if missing:
        raise InputError("Losses are incomplete", f"{metrics} lacks step {missing[0]}")
    for step in window:
        if not math.isfinite(losses[step]):
            raise InputError(
                "The loss is not a number",
                f"{metrics}: loss = {losses[step]} at step {step}",
                "lower the learning rate",
            )
    return sum(losses[step] for step in window) / len(window)


def _window(steps: int) -> int:
    return max(1, math.ceil(WINDOW * steps))


def _report_last(folder: Path, progress: Progress) -> None:
    """Report the chosen start's last step, after which no other start's figures stand last."""
    last = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    step = last.pop("step")
    progress.update(step=step, total=step, unit="steps", **last)


def _move(source: Path, target: Path) -> None:
    """Move a finished start's files; the mark of completeness comes last."""
    files = [path for path in source.iterdir() if path.is_file() and path.name != _GOAL_FILE]
    for path in sorted(files, key=lambda path: (path.name == FINISHED_FILE, path.name)):
        if path.name == FINISHED_FILE:
            choice = read_json(target / STARTS_FILE)
            write_json(path, {**read_json(path), "starts": choice})
        path.replace(target / path.name)


def _drop_weights(folder: Path) -> None:
    """Leave of a start that was not chosen what it was judged by."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in _KEPT_OF_THE_OTHERS:
            path.unlink()


def _bad(name: str, value: object, reason: str) -> InputError:
    return InputError("Wrong setting", f"{name} = {value!r}", reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_program(
        lambda: parse_settings(
            StartsSettings,
            arguments,
            program="python -m mgm.starts",
            description=__doc__ or "",
        ),
        lambda settings: settings.progress,
        run_starts,
    )


if __name__ == "__main__":
    sys.exit(main())
