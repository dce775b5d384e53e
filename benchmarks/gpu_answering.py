"""Answering cases of `benchmarks/gpu.py` at the true sizes: random weights, made-up questions.

Runs the product's own answerer with fast numerics, preprocessing included: pictures are JPEGs of the
benchmarks' usual sizes, read from files for TextVQA and from base64 for MMBench, decoded by threads,
and prompts have as many positions as the real ones. Answers end after the benchmark's number of
tokens, never before. All cases share a process, a model and compiled towers. Prints a JSON object a
case, as it is done: questions a second, memory, and the GPU's milliseconds a question by part.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_training import GIB, Sections
from mgm import generate
from mgm.config import ModelConfig
from mgm.fast_vision import FastTowers
from mgm.generate import Answerer
from mgm.model import IMAGE_TOKEN_ID, MGM
from mgm.pictures import DecodedPictures, default_workers
from mgm.request import Decoding, Request

QUESTIONS = 256
"""Of a case, after two batches to warm up."""
PICTURES = 48
"""Different files; questions about further pictures read them again."""
NEVER = frozenset({-1})
"""No id, so that every answer has its full length."""
BEGINNING = (2, 106, 1645, 108)
"""Ids of <bos>, <start_of_turn>, `user` and a line break, before the picture."""


@dataclass(frozen=True)
class Benchmark:
    """What a question costs."""

    name: str
    new_tokens: int
    text_tokens: int
    """Of a prompt beside its picture, on average."""
    size: tuple[int, int]
    """Width and height of a picture."""
    per_picture: float
    """Questions about one picture in the real set."""
    original: str
    """Questions a second of the original code on one H100, as measured."""
    goal: str


TEXTVQA = Benchmark("TextVQA", 8, 80, (1024, 768), 5000 / 3166, "3.8", "75")
MMBENCH = Benchmark("MMBench", 2, 100, (640, 480), 4329 / 1164, "5.6", "95")


@dataclass(frozen=True)
class Case:
    """What is answered, and how much at once."""

    benchmark: Benchmark
    batch_size: int
    per_picture: float = 1.0
    gib: float | None = None
    """The allocator is capped at this."""

    @property
    def name(self) -> str:
        """What tables call it."""
        asked = f", {self.per_picture:.2f} questions a picture" if self.per_picture != 1 else ""
        capped = "" if self.gib is None else f", {self.gib:g} GiB"
        return f"{self.benchmark.name}{asked}, batch {self.batch_size}{capped}"


CASES = (
    *(
        Case(benchmark, batch_size, per_picture)
        for benchmark in (TEXTVQA, MMBENCH)
        for per_picture in (1.0, benchmark.per_picture)
        for batch_size in (32, 64)
    ),
    Case(TEXTVQA, 32, gib=23.0),
)


class Questions:
    """A benchmark's made-up questions and pictures.

    Args:
        benchmark: Says how large they are.
        folder: Takes the picture files.
        vocabulary: Ids are below it.
    """

    def __init__(self, benchmark: Benchmark, folder: Path, vocabulary: int) -> None:
        self._benchmark = benchmark
        self._vocabulary = vocabulary
        with ThreadPoolExecutor(default_workers()) as pool:
            files = list(pool.map(lambda seed: jpeg(benchmark.size, seed), range(PICTURES)))
        self._paths = [folder / f"{benchmark.name}-{number}.jpg" for number in range(PICTURES)]
        for path, content in zip(self._paths, files, strict=True):
            path.write_bytes(content)
        self._encoded = [base64.b64encode(content) for content in files]

    def open(self, key: str) -> Image.Image:
        """Return a picture, read as the benchmark's own program reads it."""
        number = int(key.rsplit("-", 1)[1]) % PICTURES
        if self._benchmark is MMBENCH:
            picture = Image.open(io.BytesIO(base64.b64decode(self._encoded[number])))
        else:
            picture = Image.open(self._paths[number])
        picture.load()
        return picture

    def requests(self, count: int, per_picture: float, tag: str) -> list[Request]:
        """Return questions whose pictures no other tag's questions share."""
        draw = random.Random(tag)
        made = []
        for number in range(count):
            length = self._benchmark.text_tokens - len(BEGINNING) + draw.randint(-8, 8)
            text = [draw.randrange(300, self._vocabulary) for _ in range(length)]
            picture = f"{tag}-{int(number / per_picture)}"
            made.append(Request((*BEGINNING, IMAGE_TOKEN_ID, *text), (picture,)))
        return made


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG of smooth patches under fine noise: a plain area would decode too fast."""
    width, height = size
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(np.int16) + generator.integers(-8, 8, (height, width, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def random_model(config: ModelConfig) -> MGM:
    """Build the model on the GPU in bfloat16, as it is when it answers."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = MGM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def answer(answerer: Answerer, requests: Sequence[Request], batch_size: int) -> int:
    """Answer everything and return how many tokens were written."""
    planned = generate.plan_batches(requests, batch_size)
    batches = [[requests[position] for position in batch] for batch in planned]
    answers = [ids for batch in answerer.answer_batches(batches) for ids in batch]
    torch.cuda.synchronize()
    return sum(len(ids) for ids in answers)


def measure(case: Case, model: MGM, towers: FastTowers, questions: Questions) -> dict[str, Any]:
    """Answer a case's questions and return rates, memory and where the time goes."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if case.gib is None else case.gib * GIB / total)
    benchmark, size = case.benchmark, case.batch_size
    workers = default_workers()
    pictures = DecodedPictures(questions.open, model.config, workers)
    answerer = Answerer(
        model,
        pictures.take,
        Decoding(benchmark.new_tokens, NEVER),
        prefetch=pictures.announce,
        towers=towers,
    )
    started = time.monotonic()
    answer(answerer, questions.requests(2 * size, case.per_picture, "warm"), size)
    warm = time.monotonic() - started
    sections = watch(answerer)
    torch.cuda.reset_peak_memory_stats()
    requests = questions.requests(QUESTIONS, case.per_picture, "asked")
    started = time.monotonic()
    written = answer(answerer, requests, size)
    seconds = time.monotonic() - started
    pictures.close()
    if written != QUESTIONS * benchmark.new_tokens:
        raise RuntimeError(f"{case.name}: {written} tokens were written, not every answer's all")
    return {
        "name": case.name,
        "original": benchmark.original,
        "goal": benchmark.goal,
        "questions": QUESTIONS,
        "batch_size": size,
        "questions_a_picture": case.per_picture,
        "gib": case.gib,
        "questions_per_second": QUESTIONS / seconds,
        "ms_per_question": {part: ms / QUESTIONS for part, ms in sections.totals().items()},
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "warm_up_seconds": warm,
        "workers": workers,
    }


def watch(answerer: Answerer) -> Sections:
    """Time the parts of answering; the GPU is at one of them at a time."""
    sections = Sections()
    encoder, decoder = answerer.encoder, answerer.decoder
    encoder.encode = sections.around("vision", encoder.encode)  # type: ignore[method-assign]
    decoder.start = sections.around("prefill", decoder.start)  # type: ignore[method-assign]
    decoder.finish = sections.around("decode", decoder.finish)  # type: ignore[method-assign]
    return sections


def main() -> int:
    """Measure every case."""
    # As the programs do, see mgm.program.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = ModelConfig.preset("mgm-2b")
    model = random_model(config)
    towers = FastTowers(model, compiled=True)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = config.language["vocab_size"]
        questions = {
            benchmark.name: Questions(benchmark, Path(folder), vocabulary)
            for benchmark in (TEXTVQA, MMBENCH)
        }
        for case in CASES:
            record = measure(case, model, towers, questions[case.benchmark.name])
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
