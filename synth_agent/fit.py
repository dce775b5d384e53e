"""What a plan will take before it runs: samples and wall time, each with where it comes from.

Estimates rest on what was measured: first on finished runs of this workspace, then on the reference
figures of the mini world, and for training at the published sizes on rates of a card that was
measured. Where nothing was measured the answer is "unknown", never a guess. What a plan takes of a
GPU's memory is told by `training_fit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mgm.memory import TEXT_TOKENS
from synth_agent.cards import Card
from synth_agent.data import count_records, read_llava
from synth_agent.data_keys import KEYS_NAME
from synth_agent.effective import Effective, Ladder, Training, capped, effective, is_deduplicator
from synth_agent.errors import InvalidInput
from synth_agent.recipes import Recipe, steps_of
from synth_agent.runs import STAGES, Cost, Run
from synth_agent.training_fit import TRAINING_STAGES, machine_card, memory_words, model_config
from synth_agent.wording import duration
from synth_agent.workspace import Workspace

if TYPE_CHECKING:
    from synth_agent.plan_retention import PlanRetention

MINI_WORLD_SECONDS = {"process": 10.0, "pretrain": 55.0, "finetune": 20.0, "evaluate": 16.0}
"""Seconds of each stage of the demo on two 2.x GHz cores; see `benchmarks/results/`."""
CHARACTERS_OF_TOKEN = 4.0
"""Of English text under Gemma's tokenizer, about."""
LARGEST_INSTRUCTIONS = 1 << 28
"""Bytes of an instruction file that is still read for an estimate."""


@dataclass(frozen=True)
class Rate:
    """How fast a method trained on a card, with `numerics: fast` in bfloat16."""

    samples_per_second: float
    positions: int
    """Of a sample, its picture included."""


MEASURED_RATES: Mapping[str, Mapping[str, Rate]] = {
    "NVIDIA H100 80GB HBM3": {
        "projector": Rate(68.6, 576 + TEXT_TOKENS["projector"]),
        "lora": Rate(42.5, 576 + TEXT_TOKENS["lora"]),
        "full": Rate(35.8, 576 + TEXT_TOKENS["full"]),
    },
}
"""By card and by method. Source: `benchmarks/results/gpu-h100.md`, medians."""


@dataclass(frozen=True)
class StageTime:
    """How long a stage is expected to take."""

    seconds: float | None
    """None while nothing tells it."""
    basis: str


def count_samples(workspace: Workspace) -> int:
    """Return the number of records of the seed set; 0 when the file is missing."""
    path = workspace.path(workspace.settings.data.seed)
    return count_records(path) if path.is_file() else 0


def estimate_cost(
    workspace: Workspace, recipe: Recipe, settings: Mapping[str, Any], history: Sequence[Run]
) -> Cost:
    """Return the expected samples, at most as many as the cap, and the seconds of a run.

    Args:
        workspace: Where the seed set is.
        recipe: What processes it.
        settings: The settings that the stages would use.
        history: Runs of this workspace, for their measured sample counts and stage times.
    """
    seed_samples = count_samples(workspace)
    samples, samples_basis = _expected_samples(workspace, recipe, seed_samples, history)
    if samples is not None:
        samples = min(samples, int(settings["data"]["sample_cap"]))
    seconds, seconds_basis = _expected_seconds(workspace, settings, history, samples)
    basis = f"samples: {samples_basis}; time: {seconds_basis}"
    if memory := memory_words(workspace, settings):
        basis += f"; memory: {memory}"
    return Cost(seed_samples, samples, seconds, basis)


def expected_effective(
    workspace: Workspace, recipe: Recipe, settings: Mapping[str, Any]
) -> Effective | None:
    """Return what the first training stage would make of a recipe's samples.

    Args:
        workspace: Where the seed set and its statistics are.
        recipe: What would process it, linear or a data plan.
        settings: The settings that the stages would use.

    Returns:
        The effective set; None when the statistics do not tell it, or when no sample is left.
    """
    rows: Sequence[int]
    if (counted := _plan_retention(workspace, recipe)) is not None:
        ladder = _ladder(counted)
        rows = [] if counted.rows is None else counted.rows.tolist()
    elif recipe.data_plan is None and not recipe.operators:
        rows = range(count_samples(workspace))
        ladder = Ladder(len(rows), len(rows), len(rows), len(rows))
    else:
        return None
    if ladder is None or not rows:
        return None
    data = settings["data"]
    left = capped(rows, int(data["sample_cap"]), int(data["sample_cap_seed"]))
    return effective(ladder, left, Training.of(settings["pretrain"]))


def _expected_samples(
    workspace: Workspace, recipe: Recipe, seed_samples: int, history: Sequence[Run]
) -> tuple[int | None, str]:
    """Return the samples before the cap, and where that comes from."""
    steps = steps_of(recipe.mapping())
    for run in reversed(history):
        result = run.stages["process"].result
        if (
            "kept" in result
            and result.get("seed_samples", seed_samples) == seed_samples
            and steps_of(run.plan.proposal.recipe) == steps
        ):
            return int(result.get("before_cap", result["kept"])), f"measured in run {run.id}"
    if recipe.data_plan is None and not recipe.operators:
        return seed_samples, "the recipe has no operator"
    counted = _plan_retention(workspace, recipe)
    if counted is not None and counted.samples is not None:
        return counted.samples, "counted from the seed set's statistics"
    if recipe.keeps is not None:
        return round(recipe.keeps * seed_samples), "the recipe's own note on what it keeps"
    return None, "not known before the recipe has run"


def _plan_retention(workspace: Workspace, recipe: Recipe) -> PlanRetention | None:
    """Return what the recipe makes by the statistics table, None where there is no table."""
    if not (workspace.artifacts / "statistics" / KEYS_NAME).exists():
        return None  # and what reads the table need not be loaded
    from synth_agent import analysis
    from synth_agent.digests import Digests
    from synth_agent.plan_retention import plan_retention

    digests = Digests(workspace)
    table = analysis.open_table(workspace, digests)
    if table is None:
        return None
    return plan_retention(recipe, table, lambda path: digests.path(workspace.path(path)))


def _ladder(counted: PlanRetention) -> Ladder | None:
    """Return the counts before the cap, None while one of them is not known."""
    left = [branch.left for branch in counted.branches if branch.left is not None]
    if counted.samples is None or len(left) < len(counted.branches):
        return None
    dropped = sum(
        (operator.before or 0) - (operator.after or 0)
        for branch in counted.branches
        for operator in branch.retention.operators
        if is_deduplicator(operator.name)
    )
    return Ladder(counted.num_rows, sum(left) + dropped, sum(left), counted.samples)


def _expected_seconds(
    workspace: Workspace, settings: Mapping[str, Any], history: Sequence[Run], samples: int | None
) -> tuple[float | None, str]:
    seconds = measured_seconds(settings, history, samples)
    if len(seconds) == len(STAGES):
        basis = _measured_words(settings, samples)
    elif settings["model"]["name"] == "mgm-mini":
        seconds = {**MINI_WORLD_SECONDS, **seconds}
        basis = "the mini world's reference figures for two cores"
    else:
        card = machine_card(workspace, settings)
        times = training_times(workspace, settings, history, samples, card)
        known = {stage: time for stage, time in times.items() if time.seconds is not None}
        if len(known) < len(times) or len(seconds.keys() | known.keys()) < len(STAGES):
            return None, "; ".join(("no run was timed on this machine yet", *_words(known)))
        others = (_trained(settings, seconds, stage) for stage in STAGES if stage not in known)
        total = sum(others) + sum(time.seconds or 0.0 for time in known.values())
        return total, "; ".join(("median of this workspace's runs", *_words(known)))
    total = sum(_trained(settings, seconds, stage) for stage in STAGES)
    if settings["pretrain"].get("starts", 1) > 1:
        basis += f"; {_starts_words(settings, seconds)}"
    return total, basis


def measured_seconds(
    settings: Mapping[str, Any], history: Sequence[Run], samples: int | None
) -> dict[str, float]:
    """Return the median seconds of each stage that runs under like settings have finished.

    Where epochs decide how long the first training stage is, a run's time counts in proportion to
    the optimizer steps of so many samples; None takes the times as they are.
    """
    measured: dict[str, float] = {}
    for stage in STAGES:
        known = [
            seconds
            / _trainings(run.plan.proposal.settings, stage)
            * _steps_ratio(settings, samples, run, stage)
            for run in history
            if run.stages[stage].status == "succeeded"
            and _same_work(run, settings, stage)
            and (seconds := run.stages[stage].seconds) is not None
        ]
        if known:
            measured[stage] = median(known)
    return measured


def _steps_ratio(settings: Mapping[str, Any], samples: int | None, run: Run, stage: str) -> float:
    """Return the steps of a stage on so many samples as a multiple of those of a run."""
    kept = run.stages["process"].result.get("kept")
    if stage != "pretrain" or not samples or not kept:
        return 1.0
    training = Training.of(settings[stage])
    return training.steps(samples) / training.steps(int(kept))


def _measured_words(settings: Mapping[str, Any], samples: int | None) -> str:
    by_steps = samples and not settings["pretrain"]["max_steps"]
    return f"median of this workspace's runs{', stage 1 by its steps' if by_steps else ''}"


def relative_times(
    settings: Mapping[str, Any],
    history: Sequence[Run],
    usual: int,
    counts: Sequence[int | None],
) -> list[float]:
    """Return how long runs of so many samples take, in multiples of one with the usual number.

    1 where the number or a stage's time is not known, or where settings fix the steps.
    """
    seconds = measured_seconds(settings, history, usual)
    if len(seconds) < len(STAGES) or not usual:
        return [1.0] * len(counts)
    times = {stage: _trained(settings, seconds, stage) for stage in STAGES}
    training, share = Training.of(settings["pretrain"]), times["pretrain"] / sum(times.values())
    steps = [training.steps(count) if count else training.steps(usual) for count in counts]
    return [1 + share * (one / training.steps(usual) - 1) for one in steps]


def training_times(
    workspace: Workspace,
    settings: Mapping[str, Any],
    history: Sequence[Run],
    samples: int | None,
    card: Card | None,
) -> dict[str, StageTime]:
    """Return the expected time of each training stage, of every start of the first.

    Args:
        workspace: Where instructions and the model's parts are.
        settings: The plan's.
        history: Runs of this workspace: what was measured in them comes first.
        samples: Of the first stage, None while their number is not known.
        card: What trains; None where there is none.
    """
    measured = measured_seconds(settings, history, samples)
    times = {}
    for stage in TRAINING_STAGES:
        if stage in measured:
            seconds = _trained(settings, measured, stage)
            basis = _measured_words(settings, samples if stage == "pretrain" else None)
            times[stage] = StageTime(seconds, basis)
        else:
            times[stage] = _by_rate(workspace, settings, stage, samples, card)
    return times


def _by_rate(
    workspace: Workspace,
    settings: Mapping[str, Any],
    stage: str,
    samples: int | None,
    card: Card | None,
) -> StageTime:
    """Return the time of a stage by the measured rate of its card."""
    section = settings[stage]
    found = _measured_card(card)
    if found is None:
        return StageTime(None, "no run was timed on this machine, and no rate is known of its card")
    if section.get("numerics", "reference") != "fast" or section["dtype"] != "bfloat16":
        return StageTime(None, "rates were measured with numerics: fast and dtype: bfloat16")
    if settings.get("compute", {}).get("processes", 1) > 1:
        return StageTime(None, "rates were measured with one process")
    if section["drop_path"]:
        return StageTime(None, "rates were measured with drop_path: false")
    rate = MEASURED_RATES[found][section["method"]]
    try:
        picture = model_config(workspace, settings).num_image_tokens
    except InvalidInput as error:
        return StageTime(None, f"the model's parts cannot be read: {error.message}")
    if stage == "finetune":
        told = _instructions(workspace, settings, picture)
        if told is None:
            return StageTime(None, "the number of instructions is not known")
        samples, positions = told
    elif samples is None:
        return StageTime(None, "the number of samples is not known before the recipe has run")
    else:
        positions = float(picture + TEXT_TOKENS["projector"])
    seen = Training.of(section).seen(samples) * _trainings(settings, stage)
    seconds = seen * positions / (rate.samples_per_second * rate.positions)
    return StageTime(seconds, f"{rate.samples_per_second:g} samples/s were measured on {found}")


def _measured_card(card: Card | None) -> str | None:
    """Return the measured card that a card is; a name given by hand may be a part of its name.

    The part has to say which card it is: its maker alone, or a letter, does not.
    """
    words = set(card.name.casefold().split()) if card is not None else set()
    if not any(any(letter.isdigit() for letter in word) for word in words):
        return None
    return next((full for full in MEASURED_RATES if words <= set(full.casefold().split())), None)


def _instructions(
    workspace: Workspace, settings: Mapping[str, Any], picture: int
) -> tuple[int, float] | None:
    """Return the number of instructions and their mean positions, None where it is not known."""
    path = workspace.path(settings["data"]["instructions"])
    if not path.is_file() or path.stat().st_size > LARGEST_INSTRUCTIONS:
        return None
    stat, most = path.stat(), settings["finetune"]["model_max_length"]
    try:
        return _read_instructions(path, (stat.st_mtime_ns, stat.st_size), picture, most)
    except InvalidInput:
        return None


@lru_cache(maxsize=4)
def _read_instructions(
    path: Path, version: tuple[int, int], picture: int, most: int
) -> tuple[int, float] | None:
    """Read the file once for each of its versions."""
    lengths = []
    for record in read_llava(path):
        characters = sum(len(turn["value"]) for turn in record["conversations"])
        positions = characters / CHARACTERS_OF_TOKEN + (picture if record.get("image") else 0)
        lengths.append(min(float(most), positions))
    return (len(lengths), sum(lengths) / len(lengths)) if lengths else None


def _words(times: Mapping[str, StageTime]) -> list[str]:
    return [
        f"{stage} about {duration(time.seconds)} ({time.basis})" for stage, time in times.items()
    ]


def _trained(settings: Mapping[str, Any], seconds: Mapping[str, float], stage: str) -> float:
    """Return the seconds of all trainings of a stage."""
    return seconds[stage] * _trainings(settings, stage)


def _trainings(settings: Mapping[str, Any], stage: str) -> float:
    """Return how many whole trainings a stage does, those that are stopped early by their share."""
    section = settings.get(stage, {})
    others: int = section.get("starts", 1) - 1 if stage == "pretrain" else 0
    return 1 + others * float(section.get("start_share", 1.0))


def _starts_words(settings: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """Return what several starts cost, in multiples of a run's training and evaluation."""
    from synth_agent.early import Starts  # numpy, which no other estimate needs

    section = settings["pretrain"]
    starts = Starts(section["starts"], share=section.get("start_share", 1.0))
    return starts.cost_words(seconds["pretrain"], seconds["finetune"] + seconds["evaluate"])


def _same_work(run: Run, settings: Mapping[str, Any], stage: str) -> bool:
    if stage == "process":
        return True
    before = run.plan.proposal.settings
    return bool(
        before["model"]["name"] == settings["model"]["name"]
        and _processes(before, stage) == _processes(settings, stage)
        and _of_one_start(before.get(stage, {})) == _of_one_start(settings.get(stage, {}))
    )


def _processes(settings: Mapping[str, Any], stage: str) -> int:
    """Return how many processes work on a stage together."""
    count = settings.get("compute", {}).get("processes", 1)
    return int(count) if stage in TRAINING_STAGES else 1


def _of_one_start(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in ("starts", "start_share")}
