"""Answer a benchmark's questions with a model and score the answers.

    python -m mgm.evaluate --benchmark textvqa --questions VAL.json --images DIR \
        --checkpoint DIR --output DIR

Writes `predictions.jsonl`, the competition kit's answer files, and last `score.json`, which
exists only beside a full set of predictions. A run that was killed continues from
`predictions.partial.jsonl`. Exit codes are those of `mgm.program`. Questions and scoring belong to
`mgm.benchmarks`, decoding to `mgm.generate`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mgm import generate
from mgm.benchmarks import Benchmark, MMBench, TextVQA, scorer_fingerprint, write_lines
from mgm.checkpoint import build_model, load_full, load_projector, read_config
from mgm.config import ModelConfig
from mgm.errors import InputError
from mgm.fast_vision import FastTowers
from mgm.files import write_json
from mgm.generate import Answerer
from mgm.lora import load_lora, merge_lora
from mgm.model import MGM
from mgm.pictures import DecodedPictures, default_workers
from mgm.predictions import Predictions
from mgm.program import run_program
from mgm.progress import Progress
from mgm.prompt import IMAGE_MARKER, encode_prompt, generation_prompt
from mgm.request import Decoding, Request
from mgm.settings import parse_settings
from mgm.tokenizer_files import TOKENIZER_CONFIG, read_tokenizer, refuse_unknown_tokens

PREDICTIONS_FILE = "predictions.jsonl"
PARTIAL_FILE = "predictions.partial.jsonl"
SCORE_FILE = "score.json"
# What the competition kit allows; answers are far shorter.
MAX_NEW_TOKENS = {"textvqa": 128, "mmbench": 1024}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EvaluateSettings:
    """Everything that `python -m mgm.evaluate` can be told."""

    benchmark: Literal["textvqa", "mmbench"] = field(metadata={"help": "which benchmark"})
    questions: Path = field(
        metadata={"help": "TextVQA question file or annotation JSON; MMBench TSV"}
    )
    output: Path = field(metadata={"help": "folder for predictions and score"})
    images: Path | None = _setting(None, "folder of TextVQA's pictures")
    annotations: Path | None = _setting(None, "TextVQA annotation JSON, with a question file")
    ocr_tokens: Path | None = _setting(None, "JSON with OCR tokens, with an annotation JSON")
    language: Literal["en", "cn"] = _setting("en", "language of MMBench's request for a letter")
    checkpoint: Path | None = _setting(None, "full model folder, or LoRA folder with the parts")
    language_model: Path | None = _setting(None, "Gemma folder")
    vision_tower: Path | None = _setting(None, "CLIP folder")
    high_resolution_tower: Path | None = _setting(None, "ConvNeXt folder")
    projector: Path | None = _setting(None, "mm_projector.bin of the first stage")
    tokenizer: Path | None = _setting(None, "tokenizer folder, where the model's has none")
    model_id: str | None = _setting(None, "name in the kit's files; else that of the folder")
    batch_size: int = _setting(32, "questions answered together")
    max_new_tokens: int | None = _setting(None, "longest answer; else 128 TextVQA, 1024 MMBench")
    stop: Literal["turn", "eos"] = _setting("turn", "stop at the end of the turn, or at <eos> only")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "auto is float32 on a CPU, float16 on an accelerator"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = _setting("sdpa", "attention kernel")
    threads: int | None = _setting(None, "CPU threads of the model")
    numerics: Literal["fast", "reference"] = _setting(
        "fast",
        "reference: the published order of operations; fast: the same to rounding, prompts packed, "
        "what they share read once, a static cache",
    )
    compile: Literal["auto", "always", "never"] = _setting(
        "auto", "compile layers, and replay steps on a GPU, with numerics = fast; auto on a GPU"
    )
    workers: int | None = _setting(
        None, "threads that decode pictures ahead, else one a core, 16 at most; 0 decodes in line"
    )
    progress: Path | None = _setting(None, "file to which progress is appended")

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            InputError: naming the setting.
        """
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _bad_setting(name, value, f"Give {least} or more.")
        if self.workers is not None and self.workers < 0:
            raise _bad_setting("workers", self.workers, "Give 0 or more.")
        if self.benchmark == "textvqa" and self.images is None:
            raise _bad_setting("images", None, "TextVQA needs the folder of its pictures.")
        if self.checkpoint is None:
            for name in ("language_model", "vision_tower", "high_resolution_tower", "projector"):
                if getattr(self, name) is None:
                    raise _bad_setting(name, None, "Give --checkpoint, or all four parts.")

    @property
    def answer_limit(self) -> int:
        """Longest answer in tokens."""
        return self.max_new_tokens or MAX_NEW_TOKENS[self.benchmark]

    @property
    def torch_device(self) -> torch.device:
        """Where the model runs."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise _bad_setting("device", self.device, "Use cpu, cuda or cuda:N.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise _bad_setting("device", self.device, "No CUDA device is available; use cpu.")
        return device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the whole model; the published evaluation runs in float16."""
        if self.dtype == "auto":
            return torch.float32 if self.torch_device.type == "cpu" else torch.float16
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def is_compiled(self) -> bool:
        """Whether layers are compiled."""
        on_gpu = self.torch_device.type == "cuda"
        return self.compile == "always" or (self.compile == "auto" and on_gpu)

    @property
    def answering_model(self) -> str:
        """Name of the model in the kit's files."""
        folder = self.checkpoint or self.projector
        return self.model_id or (folder.resolve().name if folder else "model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""

    def read() -> EvaluateSettings:
        return parse_settings(
            EvaluateSettings,
            arguments,
            program="python -m mgm.evaluate",
            description="Answer a benchmark's questions with a model and score the answers.",
        )

    return run_program(read, lambda settings: settings.progress, evaluate)


def evaluate(settings: EvaluateSettings, progress: Progress) -> None:
    """Answer, score and write everything.

    Raises:
        InputError: a file or a setting is wrong.
    """
    # A score of an earlier run must not stand beside the predictions of this one.
    (settings.output / SCORE_FILE).unlink(missing_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    benchmark = open_benchmark(settings)
    partial = Predictions(settings.output / PARTIAL_FILE, _fingerprint(settings))
    try:
        started, num_known = time.monotonic(), len(partial.answers)
        if num_known < len(benchmark.items):
            tokenizer, model = load_tokenizer(settings), load_model(settings)
            started = time.monotonic()
            answer_all(benchmark, model, tokenizer, settings, partial, progress)
        seconds = time.monotonic() - started
    finally:
        partial.close()
    answers = [partial.answers[position] for position in range(len(benchmark.items))]
    speed = {"seconds": seconds, "num_answered": len(answers) - num_known}
    write_results(benchmark, answers, settings, speed)
    (settings.output / PARTIAL_FILE).unlink()


def open_benchmark(settings: EvaluateSettings) -> Benchmark:
    """Read the questions.

    Raises:
        InputError: a bad file.
    """
    benchmark: Benchmark
    if settings.benchmark == "mmbench":
        benchmark = MMBench(settings.questions, settings.language)
    else:
        assert settings.images is not None, "checked by the settings"
        benchmark = TextVQA(
            settings.questions, settings.images, settings.annotations, settings.ocr_tokens
        )
    for number, item in enumerate(benchmark.items, start=1):
        if IMAGE_MARKER in item.text:
            raise InputError(
                "Image marker in a question",
                f"{settings.questions}, question {number}: {item.text!r}",
                f"A question has one picture: write something else for {IMAGE_MARKER}.",
            )
    return benchmark


def load_model(settings: EvaluateSettings) -> MGM:
    """Load the model in evaluation mode on its device.

    Raises:
        InputError: a folder is missing or does not fit.
    """
    dtype, folder = settings.torch_dtype, settings.checkpoint
    if folder is None or (folder / "adapter_config.json").is_file():
        model = _load_parts(settings)
    else:
        model = load_full(
            folder,
            dtype,
            vision_tower_dir=settings.vision_tower,
            high_resolution_tower_dir=settings.high_resolution_tower,
            **_overrides(settings),
        )
    return model.to(settings.torch_device).eval()


def load_tokenizer(settings: EvaluateSettings) -> Any:
    """Load the tokenizer of the checkpoint, or else that of the language model.

    Raises:
        InputError: no folder has one, or it cannot be read.
    """
    folders = (settings.tokenizer, settings.checkpoint, settings.language_model)
    for folder in folders:
        if folder is not None and (folder / TOKENIZER_CONFIG).is_file():
            return read_tokenizer(folder)
    raise InputError(
        "No tokenizer",
        f"{TOKENIZER_CONFIG} is in none of {', '.join(str(f) for f in folders if f)}",
        "Give a folder that has it with --tokenizer.",
    )


def answer_all(
    benchmark: Benchmark,
    model: MGM,
    tokenizer: Any,
    settings: EvaluateSettings,
    partial: Predictions,
    progress: Progress,
) -> None:
    """Answer every question that has no answer yet.

    Batches are planned over all questions, so that a continued run forms the same batches.

    Raises:
        InputError: a picture cannot be read, a question does not fit into the memory, or the
            tokenizer is that of another model.
    """
    requests = [
        Request(tuple(encode_prompt(generation_prompt(item.text, True), tokenizer)), (item.image,))
        for item in benchmark.items
    ]
    vocabulary = model.config.language["vocab_size"]
    refuse_unknown_tokens((request.ids for request in requests), vocabulary, tokenizer)
    batches = generate.plan_batches(requests, settings.batch_size)
    batches = [batch for batch in batches if not partial.answers.keys() >= set(batch)]
    with _decoded_ahead(benchmark, model, settings) as pictures:
        answerer = make_answerer(model, tokenizer, pictures, settings)
        started, before = time.monotonic(), len(partial.answers)
        total = len(benchmark.items)
        progress.update(step=before, total=total, unit="questions", label=benchmark.name)
        answered = answerer.answer_batches([[requests[p] for p in batch] for batch in batches])
        for batch, answers in zip(batches, answered, strict=True):
            texts = [generate.decode(tokenizer, ids) for ids in answers]
            partial.add(dict(zip(batch, texts, strict=True)))
            done = len(partial.answers)
            progress.update(
                step=done,
                total=total,
                unit="questions",
                label=benchmark.name,
                samples_per_second=(done - before) / (time.monotonic() - started),
            )


def make_answerer(
    model: MGM, tokenizer: Any, pictures: DecodedPictures, settings: EvaluateSettings
) -> Answerer:
    """Put together what answers as the settings ask."""
    stops = generate.stop_ids(tokenizer, at_end_of_turn=settings.stop == "turn")
    is_fast_on_gpu = settings.numerics == "fast" and model.device.type == "cuda"
    return Answerer(
        model,
        pictures.take,
        Decoding(settings.answer_limit, stops),
        prefetch=pictures.announce,
        numerics=settings.numerics,
        towers=FastTowers(model, compiled=settings.is_compiled) if is_fast_on_gpu else None,
        compiled=settings.is_compiled,
    )


def write_results(
    benchmark: Benchmark,
    answers: Sequence[str],
    settings: EvaluateSettings,
    speed: Mapping[str, float],
) -> None:
    """Write predictions, the kit's files, and last the score.

    Args:
        benchmark: The questions.
        answers: One to every question, in their order.
        settings: Where to write, and the model's name.
        speed: `seconds` spent answering and `num_answered` in them.
    """
    predictions = settings.output / PREDICTIONS_FILE
    write_lines(predictions, benchmark.prediction_lines(answers))
    benchmark.write_kit_files(settings.output, answers, settings.answering_model)
    result = benchmark.score(answers)
    rate = speed["num_answered"] / speed["seconds"] if speed["num_answered"] else None
    write_json(
        settings.output / SCORE_FILE,
        {
            "benchmark": benchmark.name,
            "split": benchmark.split,
            "num_questions": len(answers),
            **asdict(result),
            "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
            "questions_sha256": hashlib.sha256(settings.questions.read_bytes()).hexdigest(),
            "scorer": scorer_fingerprint(benchmark.scorer),
            "decoding": {
                "max_new_tokens": settings.answer_limit,
                "stop": settings.stop,
                "batch_size": settings.batch_size,
                "dtype": str(settings.torch_dtype).removeprefix("torch."),
                "device": settings.torch_device.type,
                "numerics": settings.numerics,
            },
            "seconds": speed["seconds"],
            "samples_per_second": rate,
        },
    )


def _overrides(settings: EvaluateSettings) -> dict[str, Any]:
    """Return what the settings change in a model's configuration."""
    return {
        "attention": settings.attention,
        "reassociated_mining": settings.numerics == "fast",
    }


def _load_parts(settings: EvaluateSettings) -> MGM:
    """Build a model from its parts, with the projector file or a LoRA folder's tensors."""
    parts = (settings.language_model, settings.vision_tower, settings.high_resolution_tower)
    language, vision, high_resolution = parts
    if language is None or vision is None or high_resolution is None:
        raise InputError(
            "Parts are missing",
            f"{settings.checkpoint} holds LoRA adapters, which need the model they were made for",
            "Give --language-model, --vision-tower and --high-resolution-tower.",
        )
    overrides = _overrides(settings)
    if settings.checkpoint is not None:
        config = read_config(settings.checkpoint, **overrides)
    else:
        config = ModelConfig.from_parts(language, vision, high_resolution, **overrides)
    model = build_model(config, language, vision, high_resolution, settings.torch_dtype)
    if settings.checkpoint is not None:
        load_lora(model, settings.checkpoint)
        merge_lora(model)
    else:
        assert settings.projector is not None, "checked by the settings"
        load_projector(model, settings.projector)
    return model


def _fingerprint(settings: EvaluateSettings) -> str:
    """Return a digest of what the answers depend on: questions, model files, decoding."""
    inputs = (settings.annotations, settings.ocr_tokens, settings.questions)
    parts = (
        settings.checkpoint,
        settings.language_model,
        settings.vision_tower,
        settings.high_resolution_tower,
        settings.projector,
        settings.tokenizer,
    )
    content = {
        "benchmark": settings.benchmark,
        "language": settings.language,
        "images": str(settings.images),
        "decoding": [settings.answer_limit, settings.stop, settings.batch_size],
        "numerics": [
            settings.numerics,
            str(settings.torch_dtype),
            settings.torch_device.type,
            settings.attention,
            settings.is_compiled,
        ],
        "inputs": [_file_digest(path) for path in inputs],
        "model": [_file_states(path) for path in parts],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_digest(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            "Cannot read file", f"{path}: {error.strerror}", "Check the path."
        ) from error


def _file_states(path: Path | None) -> list[tuple[str, int, int]]:
    """Return name, size and time of every file: reading gigabytes to compare them is too slow."""
    if path is None:
        return []
    if not path.exists():
        raise InputError("Missing model part", f"{path} does not exist", "Check the path.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _bad_setting(name: str, value: object, hint: str) -> InputError:
    flag = f"--{name.replace('_', '-')}"
    found = f"{flag} is missing" if value is None else f"{flag} is {value!r}"
    return InputError("Bad setting", found, hint)


@contextmanager
def _decoded_ahead(
    benchmark: Benchmark, model: MGM, settings: EvaluateSettings
) -> Iterator[DecodedPictures]:
    workers = default_workers() if settings.workers is None else settings.workers
    pictures = DecodedPictures(benchmark.picture, model.config, workers)
    try:
        yield pictures
    finally:
        pictures.close()


if __name__ == "__main__":
    sys.exit(main())
