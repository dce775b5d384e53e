"""The four stages of a run as commands with inputs, outputs and a cache key.

A key is the digest of the stage's name, the code that it runs, the settings that alter its result
and the content of its inputs. Stages are built one after the other, because the key of a stage
rests on what the stage before it wrote, not on how that was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.recipe_policy import is_read_parameter
from synth_agent.recipes import steps_of
from synth_agent.runs import Plan, digest
from synth_agent.workspace import Workspace

KIND_OF_STAGE = {
    "process": "processed",
    "pretrain": "checkpoints",
    "finetune": "checkpoints",
    "evaluate": "predictions",
}
# These change how a stage runs, not what comes out of it.
_ASIDE = frozenset({"save_steps", "logging_steps", "tokens_per_pass", "recomputed_layers"})
# Settings of `mgm.starts`, which `mgm.train` does not take.
_STARTS = ("starts", "start_share")
START_STRIDE = 1000
"""From the seed of one start to the next: replicates, whose seeds are neighbours, share no start."""
_PARTS = ("language_model", "vision_tower", "high_resolution_tower")
_PACKAGE = Path(__file__).resolve().parent
_READING = ("data", "data_keys", "data_plans", "parquet", "pictures", "recipe_yaml", "recipes")
"""Modules outside `stages` by which the data stage reads its inputs; known scores it reads by
`statistics`."""


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run. Commands write into `partial`, which becomes `output`."""

    name: str
    key: str
    commands: tuple[tuple[str, ...], ...]
    output: Path
    required: tuple[str, ...]
    """Files that a complete output holds, relative to it."""
    result: str | None = None
    """Which of them holds the stage's result, for the event log."""
    configs: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files that the commands read, written before they start."""

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    def missing(self, folder: Path) -> list[str]:
        """Return the required files that a folder lacks."""
        return [name for name in self.required if not (folder / name).is_file()]


@dataclass(frozen=True)
class Context:
    """What a stage is built from."""

    workspace: Workspace
    plan: Plan
    digests: Digests
    outputs: Mapping[str, Path]
    """Finished stages of this run and their folders."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.plan.proposal.settings

    def output(self, stage: str, key: str) -> Path:
        return self.workspace.artifacts / KIND_OF_STAGE[stage] / key[:16]

    def log_file(self, name: str) -> Path:
        return self.workspace.logs(self.plan.run_id) / name

    def progress(self, stage: str) -> Path:
        return self.log_file(f"{stage}.progress.jsonl")


StageBuilder = Callable[[Context], Stage]


def code_version(digests: Digests, stage: str) -> str:
    """Return the digest of the code that a stage runs."""
    if stage == "process":
        shared = [_PACKAGE / f"{name}.py" for name in _READING]
        folders = [_PACKAGE / name for name in ("stages", "statistics")]
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))] + shared
        return digest([digests.files(_PACKAGE, files), metadata.version("py-data-juicer")])
    folder = _PACKAGE.parent / "mgm"
    return digests.files(folder, sorted(folder.rglob("*.py")))


def _key_code(digests: Digests, stage: str, starts: int) -> str:
    """Return the digest of the code that decides a training's or an evaluation's result.

    One start never runs `mgm.starts`, so that its results outlive changes of that program.
    """
    if starts > 1:
        return code_version(digests, stage)
    folder = _PACKAGE.parent / "mgm"
    files = [path for path in sorted(folder.rglob("*.py")) if path != folder / "starts.py"]
    return digests.files(folder, files)


def build_process(context: Context) -> Stage:
    """Data-Juicer on the seed set, then the conversion to training data."""
    data, workspace = context.settings["data"], context.workspace
    recipe = {key: value for key, value in context.plan.proposal.recipe.items() if key != "name"}
    inputs = {
        name: context.digests.path(workspace.path(data[name])) for name in ("seed", "original")
    }
    inputs["images"] = context.digests.path(workspace.path(data["images"]))
    for named in sorted(named_paths(steps_of(recipe), workspace)):
        inputs[f"recipe: {named}"] = context.digests.path(workspace.path(named))
    cap = {name: data[name] for name in ("sample_cap", "sample_cap_seed")}
    key = digest(["process", code_version(context.digests, "process"), recipe, cap, inputs])
    output = context.output("process", key)
    options = {
        "recipe": workspace.run(context.plan.run_id).recipe,
        "seed": workspace.path(data["seed"]),
        "images": workspace.path(data["images"]),
        "original": workspace.path(data["original"]),
        "cap": data["sample_cap"],
        "cap-seed": data["sample_cap_seed"],
        # Not part of the key: scores that are known are those that the stage would compute.
        "statistics": workspace.artifacts / "statistics",
        "output": output.with_name(output.name + ".partial"),
        "progress": context.progress("process"),
    }
    compute = context.settings["compute"]
    if compute.get("executor", "default") == "ray":
        # Not part of the key: a cluster makes the samples that one machine makes.
        options |= {"executor": "ray", "ray-address": compute["ray_address"]}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    is_warm = compute.get("warm_worker", True) and "executor" not in options
    module = "synth_agent.stages.warm" if is_warm else "synth_agent.stages.process"
    command = (sys.executable, "-m", module, *flags)
    required = ("processed.jsonl", "processed.json", "result.json")
    return Stage("process", key, (command,), output, required, "result.json")


def build_pretrain(context: Context) -> Stage:
    """Train the projector and the mining on the processed data, from one start or several.

    Raises:
        InvalidInput: If the settings ask for starts that there cannot be.
    """
    refuse_impossible_starts(context.settings)
    processed = context.outputs["process"]
    seed_images = context.workspace.path(context.settings["data"]["images"])
    own_images = processed / "images"
    # Beside pictures that the recipe made, its links lead to the seed's.
    images = own_images if own_images.is_dir() else seed_images
    extra = {"data": processed / "processed.json", "images": images}
    required = ("mm_projector.bin", "train_state.json")
    stage = _training(context, "pretrain", extra, required)
    return _with_starts(context, stage) if _starts(context, "pretrain") > 1 else stage


def build_finetune(context: Context) -> Stage:
    """Train on the instructions, from the projector of pretraining.

    Raises:
        InvalidInput: If the settings ask for starts that there cannot be.
    """
    refuse_impossible_starts(context.settings)
    data = context.settings["data"]
    extra = {
        "data": context.workspace.path(data["instructions"]),
        "images": context.workspace.path(data["instruction_images"]),
        "projector": context.outputs["pretrain"] / "mm_projector.bin",
    }
    return _training(context, "finetune", extra, ("train_state.json",))


def build_evaluate(context: Context) -> Stage:
    """Answer and score both benchmarks."""
    settings, workspace = context.settings["evaluate"], context.workspace
    model = {**_model(context), "checkpoint": context.outputs["finetune"]}
    projector = context.outputs["pretrain"] / "mm_projector.bin"
    files = {
        benchmark: {
            name: None if value is None else workspace.path(value)
            for name, value in settings[benchmark].items()
            if name != "max_new_tokens"
        }
        for benchmark in ("textvqa", "mmbench")
    }
    inputs = [_content(context, model), _content(context, {"projector": projector})]
    inputs += [_content(context, paths) for paths in files.values()]
    kept = {name: value for name, value in settings.items() if name != "batch_size"}
    relevant = {**kept, "textvqa": settings["textvqa"]["max_new_tokens"]}
    relevant["mmbench"] = settings["mmbench"]["max_new_tokens"]
    code = _key_code(context.digests, "evaluate", starts=1)
    key = digest(["evaluate", code, relevant, inputs])
    output = context.output("evaluate", key)
    configs: dict[Path, dict[str, Any]] = {}
    for benchmark, paths in files.items():
        if benchmark == "textvqa" and paths["questions"] is None:
            paths = {"questions": paths["annotations"], "images": paths["images"]}
        threads = context.settings["compute"]["threads"] or None
        config = {
            **model,
            **paths,
            "projector": projector,
            "benchmark": benchmark,
            "batch_size": settings["batch_size"],
            "dtype": settings["dtype"],
            "max_new_tokens": settings[benchmark]["max_new_tokens"],
            "device": context.settings["compute"]["device"],
            "threads": threads,
            "output": output.with_name(output.name + ".partial") / benchmark,
        }
        configs[context.log_file(f"evaluate-{benchmark}.json")] = _texts(config)
    commands = tuple(_program("mgm.evaluate", path, context, "evaluate") for path in configs)
    required = tuple(
        f"{name}/{file}" for name in files for file in ("predictions.jsonl", "score.json")
    )
    return Stage("evaluate", key, commands, output, required, None, configs)


BUILDERS: Mapping[str, StageBuilder] = {
    "process": build_process,
    "pretrain": build_pretrain,
    "finetune": build_finetune,
    "evaluate": build_evaluate,
}


def _training(
    context: Context,
    stage: str,
    extra: Mapping[str, Path],
    required: tuple[str, ...],
) -> Stage:
    given = context.settings[stage]
    settings = {name: value for name, value in given.items() if name not in _STARTS}
    starts = _starts(context, stage)
    model, seed = _model(context), context.settings["seed"]
    relevant = {name: value for name, value in settings.items() if name not in _ASIDE}
    if starts > 1:
        relevant |= {"starts": starts, "start_share": given.get("start_share", 1.0)}
    inputs = _content(context, {**model, **extra})
    name = context.settings["model"]["name"]
    code = _key_code(context.digests, stage, starts)
    key = digest([stage, code, relevant, seed, name, inputs])
    output = context.output(stage, key)
    config = {
        **settings,
        **model,
        **extra,
        "stage": stage,
        "model": name,
        "seed": seed,
        "device": context.settings["compute"]["device"],
        "threads": context.settings["compute"]["threads"],
        "output": output.with_name(output.name + ".partial"),
    }
    path = context.log_file(f"{stage}.json")
    command = _launched(_program("mgm.train", path, context, stage), context)
    return Stage(
        stage, key, (command,), output, required, "train_state.json", {path: _texts(config)}
    )


def _launched(command: tuple[str, ...], context: Context) -> tuple[str, ...]:
    """Return a training's command, started by torchrun where several processes are asked for."""
    processes = int(context.settings["compute"].get("processes", 1))
    if processes == 1:
        return command
    python, *arguments = command
    # Not part of the key: a step is the same, whatever the number of processes.
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (python, *launcher, *arguments)


def _starts(context: Context, stage: str) -> int:
    return int(context.settings[stage].get("starts", 1))


def refuse_impossible_starts(settings: Mapping[str, Any]) -> None:
    """Check that only stage 1 is asked for several starts, and then for one process.

    Raises:
        InvalidInput: naming the setting.
    """
    processes = int(settings.get("compute", {}).get("processes", 1))
    if processes > 1 and (starts := int(settings["pretrain"].get("starts", 1))) > 1:
        raise InvalidInput(
            "Several starts train in one process each",
            f"compute.processes = {processes}, pretrain.starts = {starts}",
            "set one of them to 1",
        )
    if (starts := int(settings["finetune"].get("starts", 1))) > 1:
        raise InvalidInput(
            "Only pretraining has several starts",
            f"finetune.starts = {starts}",
            "set pretrain.starts, and leave finetune.starts out",
        )


def _with_starts(context: Context, stage: Stage) -> Stage:
    """Return a training stage that trains each start by itself and then keeps the best."""
    settings = context.settings[stage.name]
    first, starts = int(context.settings["seed"]), int(settings["starts"])
    [config] = stage.configs
    flags = {
        "training": config,
        "seeds": ",".join(str(first + START_STRIDE * number) for number in range(starts)),
        "share": settings.get("start_share", 1.0),
        "progress": context.progress(stage.name),
    }
    whole = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = (sys.executable, "-m", "mgm.starts", *whole)
    trainings = [(*command, "--start", str(number)) for number in range(1, starts + 1)]
    required = (*stage.required, "starts.json")
    return replace(stage, commands=(*trainings, command), required=required)


def _program(module: str, config: Path, context: Context, stage: str) -> tuple[str, ...]:
    progress = str(context.progress(stage))
    return (sys.executable, "-m", module, "--config", str(config), "--progress", progress)


def named_paths(value: object, workspace: Workspace, parameter: str = "") -> set[str]:
    """Return the texts of a recipe that name an existing file or folder, such as a model.

    Args:
        value: The recipe's steps, or a part of them.
        workspace: Where paths start.
        parameter: The name under which the value stands.
    """
    if isinstance(value, str):
        # What operators write under artifacts/ comes out of a run and does not go into it.
        is_input = "/" in value and not PurePosixPath(value).is_relative_to("artifacts")
        is_read = bool(value) and is_read_parameter(parameter)
        return {value} if (is_input or is_read) and workspace.path(value).exists() else set()
    if isinstance(value, Mapping):
        parts = [named_paths(item, workspace, str(name)) for name, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [named_paths(item, workspace, parameter) for item in value]
    else:
        parts = []
    return set().union(*parts)


def _model(context: Context) -> dict[str, Path]:
    return {part: context.workspace.path(context.settings["model"][part]) for part in _PARTS}


def _content(context: Context, paths: Mapping[str, Path | None]) -> dict[str, str]:
    return {name: context.digests.path(path) for name, path in paths.items() if path is not None}


def _texts(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: str(v) if isinstance(v, Path) else v for key, v in config.items()}
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result
