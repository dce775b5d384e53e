"""The workspace: every path, every setting, and the only reader of the environment.

A workspace is a git repository with a `synth.yaml` at its root. Paths in that file are relative to
the root. `Workspace` is passed to whatever needs it; nothing else composes a path or reads
`os.environ`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from synth_agent.errors import InvalidInput, nearest
from synth_agent.secrets import secrets_of_address, secrets_of_key

SETTINGS_NAME = "synth.yaml"
_LARGEST_SEED = 2**62
"""Runs with other seeds count up from the settings' one, and torch takes 64 bits."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        # Such a text is no path, and cannot be printed or saved.
        if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            raise ValueError("the text holds a NUL or half of a character: leave it out")
        return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


class DataSettings(_Section):
    """Where the data of the experiments is."""

    seed: str = "data/seed/seed.jsonl"
    """Seed set in the competition's JSONL format."""
    images: str = "data/seed"
    """Folder that the seed set's image paths are relative to."""
    original: str = "data/seed/stage_1.json"
    """LLaVA file that gives the question of every seed id."""
    instructions: str = "data/instruct/instruct.json"
    """LLaVA file of the second training stage."""
    instruction_images: str = "data/instruct"
    sample_cap: int = Field(200_000, ge=1)
    """Training never sees more samples than this; the surplus is sampled away."""
    sample_cap_seed: int = 1024


class ModelSettings(_Section):
    """The model and the folders of its pretrained parts."""

    name: str = "mgm-2b"
    """`mgm-2b`, `mgm-mini`, or a JSON file with a model configuration."""
    language_model: str = "models/gemma-2b-it"
    vision_tower: str = "models/clip-vit-large-patch14-336"
    high_resolution_tower: str = "models/openclip-convnext-large-d-320"


class TrainSettings(_Section):
    """One training stage. Hyperparameters default to the Better Synth kit's; see `mgm.train`."""

    method: Literal["projector", "full", "lora"] = "projector"
    learning_rate: float = Field(1e-3, gt=0)
    projector_learning_rate: float | None = Field(None, ge=0)
    global_batch_size: int = Field(256, ge=1)
    micro_batch_size: int = Field(8, ge=1)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """Optimizer steps; 0 means as many as `epochs` gives."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    lora_rank: int = Field(64, ge=1)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    image_aspect_ratio: Literal["square", "pad"] = "square"
    group_by_modality_length: bool = False
    model_max_length: int = Field(2048, ge=16)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    drop_path: bool = False
    cache_features: bool = False
    gradient_checkpointing: bool = True
    numerics: Literal["reference", "fast"] = "fast"
    """With `reference` and `drop_path` the procedure is the kit's to the letter, at a third of the speed."""
    tokens_per_pass: int = Field(0, ge=0)
    """Positions that go through the model at once, with fast numerics; 0 takes what fits."""
    recomputed_layers: int = Field(-1, ge=-1)
    """Layers whose activations are recomputed, with fast numerics; -1 takes what has to be."""
    master_weights: Literal["float32", "split24"] = "float32"
    moments: Literal["float32", "8bit"] = "float32"
    save_steps: int = Field(100, ge=1)
    logging_steps: int = Field(1, ge=1)
    starts: int = Field(1, ge=1, le=8)
    """Initialisations of pretraining, of which the one of the lowest loss is kept."""
    start_share: float = Field(1.0, ge=0.1, le=1.0)
    """Share of pretraining's steps after which the other starts are stopped."""

    @model_serializer(mode="wrap")
    def _without_later_options(
        self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if (info.context or {}).get("every_setting"):
            return values
        # A plan that leaves these at their defaults is the plan that it is without them: its digest
        # and its replicates stay what they are.
        if self.starts == 1:
            del values["starts"], values["start_share"]
        for name in ("tokens_per_pass", "recomputed_layers", "master_weights", "moments"):
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values


class FinetuneSettings(TrainSettings):
    """The second stage: where the kit's values differ, a key that is left out has this stage's own."""

    method: Literal["projector", "full", "lora"] = "full"
    learning_rate: float = Field(2e-5, gt=0)
    global_batch_size: int = Field(128, ge=1)
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    group_by_modality_length: bool = True


class TextVQASettings(_Section):
    """Files of TextVQA."""

    annotations: str = "data/textvqa/TextVQA_0.5.1_val.json"
    questions: str | None = "data/textvqa/llava_textvqa_val_v051_ocr.jsonl"
    """Question file; null builds the questions from the annotations."""
    images: str = "data/textvqa/train_images"
    max_new_tokens: int = Field(128, ge=1)


class MMBenchSettings(_Section):
    """Files of MMBench."""

    questions: str = "data/mmbench/mmbench_dev_20230712.tsv"
    max_new_tokens: int = Field(1024, ge=1)


class EvaluateSettings(_Section):
    """The benchmarks and how questions are answered."""

    batch_size: int = Field(16, ge=1)
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    textvqa: TextVQASettings = TextVQASettings()
    mmbench: MMBenchSettings = MMBenchSettings()


class ComputeSettings(_Section):
    """The machine that runs the stages."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0)
    """CPU threads of a stage; 0 means as many as there are cores."""
    processes: int = Field(1, ge=1)
    """Processes that train together, one a GPU of this machine."""
    executor: Literal["default", "ray"] = "default"
    """Where Data-Juicer's operators run: on this machine, or on a Ray cluster that is there already."""
    ray_address: str = ""
    """The cluster: HOST:PORT, ray://HOST:PORT, or auto on one of its machines."""
    warm_worker: bool = True
    """Keep Data-Juicer loaded for the next recipe: some 600 MB until idle for a quarter of an hour."""


class PlannerSettings(_Section):
    """Who proposes the next recipe."""

    kind: Literal["builtin", "llm", "replay"] = "builtin"
    """`llm` asks the model at OPENAI_BASE_URL with OPENAI_API_KEY; `replay` repeats a transcript."""
    model: str = ""
    """Name of the model as its server knows it."""
    transcript: str = ""
    """File that `replay` repeats."""
    context_tokens: int = Field(4000, ge=1000, le=200_000)
    """Most tokens of what the model is told of the workspace and its runs."""
    timeout_seconds: float = Field(120.0, gt=0, le=3600)
    first_token_seconds: float = Field(60.0, gt=0, le=3600)
    retries: int = Field(4, ge=0, le=20)
    max_tokens: int = Field(4096, ge=256, le=200_000)
    """Most room of a reply."""
    temperature: float = Field(0.2, ge=0, le=2)
    price_per_million_input: float | None = Field(None, ge=0)
    price_per_million_output: float | None = Field(None, ge=0)
    spend_cap: float | None = Field(None, ge=0)
    """Most money of a day, in the currency of the prices."""
    token_cap: int = Field(500_000, ge=1)
    """Most tokens of a day."""
    structured: Literal["auto", "schema", "tools", "json", "text"] = "auto"
    """How a reply is held to its form; `auto` finds out what the server can."""


class GoalWeights(_Section):
    """How much each benchmark counts where the user wants one figure of all.

    Only their proportion matters. Without weights no figure is ever made of several benchmarks.
    """

    textvqa: float = Field(0.0, ge=0, allow_inf_nan=False)
    mmbench: float = Field(0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _weighs_something(self) -> GoalWeights:
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("the weights add up to 0: give at least one benchmark more")
        return self


class Settings(_Section):
    """Everything `synth.yaml` may say."""

    goal: str = "Which data recipe makes the model better?"
    goal_weights: GoalWeights | None = None
    """The user's weighting of the benchmarks, shown beside them; null makes no figure of both."""
    baseline: str = "baseline"
    """Name of the recipe that the others are compared against."""
    seed: int = Field(1024, ge=-_LARGEST_SEED, le=_LARGEST_SEED)
    """Seed of the initialisation of the trained modules."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    pretrain: TrainSettings = TrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: ComputeSettings = ComputeSettings()
    planner: PlannerSettings = PlannerSettings()
    allow_operators: tuple[str, ...] = ()
    """Operators outside the safe list that a person permits by hand."""

    @property
    def weights(self) -> dict[str, float]:
        """The benchmarks that the user has weighed, with weights that add up to 1; mostly empty."""
        given = {} if self.goal_weights is None else self.goal_weights.model_dump()
        total = sum(given.values())
        return {name: weight / total for name, weight in given.items() if weight > 0}


@dataclass(frozen=True)
class RunPaths:
    """Files of one run; see `docs/experiment-log.md`."""

    root: Path

    @property
    def proposal(self) -> Path:
        return self.root / "proposal.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.yaml"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"

    @property
    def transcript(self) -> Path:
        return self.root / "transcript.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.md"


@dataclass(frozen=True)
class Workspace:
    """A workspace's root and settings. Invariant: `root` is absolute and holds `synth.yaml`."""

    root: Path
    settings: Settings

    @property
    def settings_file(self) -> Path:
        return self.root / SETTINGS_NAME

    @property
    def recipes(self) -> Path:
        return self.root / "recipes"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def lock(self) -> Path:
        """Held by the worker for its life: whoever holds it is the one live run."""
        return self.artifacts / "worker.lock"

    def run(self, run_id: str) -> RunPaths:
        """Return the files of a run, which need not exist."""
        return RunPaths(self.runs / run_id)

    def logs(self, run_id: str) -> Path:
        """Return the folder of a run's stage logs (not committed)."""
        return self.artifacts / "logs" / run_id

    def transcript(self, day: str) -> Path:
        """Return where the exchanges with a model on a day, ISO 8601, are kept (not committed)."""
        return self.artifacts / "planner" / f"{day}.jsonl"

    def path(self, relative: str) -> Path:
        """Resolve a path of `synth.yaml` against the root."""
        return (self.root / relative).resolve()


def find_root(start: Path) -> Path:
    """Return the nearest folder at or above `start` that holds a `synth.yaml`.

    Raises:
        InvalidInput: If there is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / SETTINGS_NAME).is_file():
            return folder
    raise InvalidInput(
        "No workspace here",
        f"no {SETTINGS_NAME} in {start.resolve()} or above it",
        "make one with `synth-agent demo DIR`, or write a synth.yaml there",
    )


def open_workspace(start: Path) -> Workspace:
    """Open the workspace at or above `start`.

    Raises:
        InvalidInput: If there is none, or `synth.yaml` holds something it may not.
    """
    root = find_root(start)
    return Workspace(root, load_settings(root / SETTINGS_NAME))


def load_settings(path: Path) -> Settings:
    """Read `synth.yaml`.

    Raises:
        InvalidInput: Naming the file, the key and the nearest valid key or the allowed values.
    """
    raw = _read_settings(path)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise _readable(path, error) from error
    if settings.finetune.starts > 1:
        raise InvalidInput(
            "Wrong setting",
            f"{path}: finetune.starts = {settings.finetune.starts}",
            "only pretraining has several starts: set pretrain.starts",
        )
    return settings


class _SettingsLoader(yaml.SafeLoader):
    """Refuses a key that is there twice: of two sections of one name, one would not count."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is there twice", key.start_mark
                    )
                keys.add(key.value)
        return node


_MERGE = "tag:yaml.org,2002:merge"


def _read_settings(path: Path) -> dict[str, Any]:
    """Return what `synth.yaml` holds.

    Raises:
        InvalidInput: If it cannot be read, is not YAML in UTF-8, or is not a mapping.
    """
    try:
        raw = _SettingsLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise InvalidInput(
            "Cannot read settings", f"{path}: {error.strerror}", "check the file's permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "Settings are not UTF-8", f"{path}: {error.reason}", "save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise InvalidInput(
            "Settings are not YAML", f"{path}: {error}", "correct the syntax"
        ) from error
    except ValueError as error:
        raise InvalidInput(
            "Settings are not YAML", f"{path}: {error}", "correct the number or date"
        ) from error
    except RecursionError as error:
        raise InvalidInput("Settings are nested too deeply", str(path), "nest less") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InvalidInput("Settings are not a mapping", str(path), "write `key: value` lines")
    return raw


def _readable(path: Path, error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        valid = _keys_at(first["loc"][:-1])
        return InvalidInput(
            "Unknown setting", f"{path}: {key}", nearest(str(first["loc"][-1]), valid)
        )
    return InvalidInput(
        "Wrong setting", f"{path}: {key} = {first.get('input')!r}", str(first["msg"])
    )


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        # An optional section is `Section | None`.
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def endpoint_access() -> tuple[str, str | None]:
    """Return OPENAI_BASE_URL, or the official address, and OPENAI_API_KEY, None when it is not set."""
    address = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return address, os.environ.get("OPENAI_API_KEY") or None


def known_secrets() -> tuple[str, ...]:
    """Return what the environment holds in confidence: the key, and what the address says of one."""
    address, key = endpoint_access()
    return (*secrets_of_address(address), *secrets_of_key(key or ""))


def stage_environment(workspace: Workspace) -> dict[str, str]:
    """Return the environment that a stage runs in: this one, made offline and unable to install.

    Data-Juicer installs missing packages by itself and reads options from the environment; the
    variables below keep it, its caches and its package managers inside the workspace.
    """
    cache = workspace.artifacts / "cache"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("DJ_", "OPENAI_"))
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.update(
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(cache / "datasets"),
        DATA_JUICER_CACHE_HOME=str(cache / "data_juicer"),
        TOKENIZERS_PARALLELISM="false",
        PIP_NO_INDEX="1",
        UV_OFFLINE="1",
        PYTHONHASHSEED="0",
        # Stages start where the user is: a file there named like a module must not be imported.
        PYTHONSAFEPATH="1",
    )
    return environment


def setting_origins(workspace: Workspace) -> list[tuple[str, Any, str]]:
    """Return every setting as (dotted key, value, `file` or `default`)."""
    given = _read_settings(workspace.settings_file)
    rows: list[tuple[str, Any, str]] = []

    def collect(prefix: str, values: dict[str, Any], source: Any) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            present = isinstance(source, dict) and key in source
            if isinstance(value, dict):
                collect(f"{name}.", value, source[key] if present else {})
            else:
                rows.append((name, value, "file" if present else "default"))

    every = workspace.settings.model_dump(mode="json", context={"every_setting": True})
    collect("", every, given)
    return rows
