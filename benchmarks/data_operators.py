"""How fast are the batched operators, and how far are their values from Data-Juicer's own?

A part of `benchmarks/data.py`, which runs it. What is timed is the operators' own work on samples in
memory: reading files, preparing pictures and texts, and the model; not Data-Juicer's tables around it.
`--true-size` takes models of the published sizes with random weights, made in memory, and pictures of
640x480. Where Data-Juicer is not installed, the calls that its operators make are repeated, and the
table says so.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "synth_agent" / "miniworld" / "assets"
IMAGE, END = "<__dj__image>", "<|__dj__eoc|>"
STATS = "__dj__stats__"
STOCK_ROWS = 10
PICTURE_SIZE = (640, 480)
OPT_2_7B = {
    "hidden_size": 2560,
    "ffn_dim": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "word_embed_proj_dim": 2560,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
}
CLIP_L = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

Rows = dict[str, list[Any]]
Loader = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Case:
    """An operator and the model to try it with."""

    operator: str
    model: str
    parameter: str
    folder: Path
    load: Loader | None = None
    """Makes the model and its processor; None where the operator loads them from the folder."""


@dataclass
class Result:
    """What was measured of one case."""

    case: Case
    stock: float
    ours: dict[str, float] = field(default_factory=dict)
    difference: dict[str, str] = field(default_factory=dict)


def print_operators(options: argparse.Namespace) -> None:
    """Measure every operator that there is a model for, and print the table."""
    sys.path.insert(0, str(ROOT))
    repeated = importlib.util.find_spec("data_juicer") is None
    if repeated:
        install_repeated_operators()
    else:
        from synth_agent.stages.datajuicer import guard

        guard()
    with tempfile.TemporaryDirectory() as folder:
        if options.true_size:
            rows = drawn_samples(options, Path(folder))
            cases = true_size_cases(options, Path(folder))
        else:
            rows, cases = workspace_samples(options), workspace_cases(options.workspace)
        chosen = [case for case in cases if options.only is None or options.only in case.operator]
        print(header(len(rows["text"]), options, repeated), flush=True)
        for case in chosen:
            print(line(measure(case, rows, options), options), flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the operators' part can be told."""
    parser.add_argument("--true-size", action="store_true", help="models of the published sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", type=int, default=256, help="for ours")
    parser.add_argument("--stock-samples", type=int, default=64, help="for Data-Juicer's operator")
    parser.add_argument("--float32-samples", type=int, default=1024, help="for ours in float32")
    parser.add_argument("--per-call", type=int, help="pictures that our model call sees")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--new-tokens", type=int, help="length of a caption at the true size")
    parser.add_argument("--only", help="part of an operator's name")


def settle(options: argparse.Namespace) -> None:
    """Fill in what depends on other options."""
    on_gpu = options.device == "cuda"
    options.per_call = options.per_call or (256 if on_gpu else 64)
    options.dtypes = options.dtypes or (["float32", "bfloat16"] if on_gpu else ["float32"])
    # Random weights never end a caption.
    options.new_tokens = options.new_tokens or (20 if options.true_size else 128)
    options.stock_samples = min(options.stock_samples, options.samples)


def measure(case: Case, rows: Rows, options: argparse.Namespace) -> Result:
    """Time Data-Juicer's operator on some samples and ours on all."""
    from data_juicer.utils.model_utils import MODEL_ZOO

    captions = case.operator.endswith("_mapper")
    stock = make_operator(case, case.operator, {}, options)
    if case.load is not None:
        MODEL_ZOO[stock.model_key] = case.load()
    loaded = MODEL_ZOO.get(stock.model_key)
    if captions and loaded is not None:
        shorten_captions(loaded[0], options.new_tokens)
    few = part(rows, options.stock_samples)
    run_stock(stock, part(rows, 2), captions)
    started = time.perf_counter()
    expected = run_stock(stock, few, captions)
    result = Result(case, options.stock_samples / (time.perf_counter() - started))
    for dtype in options.dtypes:
        limit = "pairs_per_call" if "text" in case.operator else "images_per_call"
        own = {limit: options.per_call, "dtype": dtype}
        if captions:
            own["max_new_tokens"] = options.new_tokens
        ours = make_operator(case, f"batched_{case.operator}", own, options)
        if loaded is not None:
            MODEL_ZOO[ours.model_key] = loaded
        is_slow = captions or dtype == "float32"
        # A whole batch, in which the GPU's memory for pictures is taken.
        run_ours(ours, part(rows, options.per_call if is_slow else ours.batch_size), captions)
        timed = part(rows, options.float32_samples) if dtype == "float32" else rows
        started = time.perf_counter()
        made = run_ours(ours, timed, captions)
        result.ours[dtype] = len(timed["text"]) / (time.perf_counter() - started)
        result.difference[dtype] = "drawn" if captions else largest_difference(expected, made)
    MODEL_ZOO.clear()
    return result


def make_operator(
    case: Case, name: str, own: Mapping[str, Any], options: argparse.Namespace
) -> Any:
    """Return an operator by its name."""
    from data_juicer.ops.base_op import OPERATORS

    from synth_agent.stages import operators  # noqa: F401  registers ours

    parameters = {case.parameter: str(case.folder), "accelerator": options.device, **own}
    if name.endswith("_mapper"):
        parameters["keep_original_sample"] = False
    return OPERATORS.modules[name](**parameters)


def run_stock(operator: Any, rows: Rows, captions: bool) -> list[Any]:
    """Return captions, or the scores of every sample, made in Data-Juicer's batches."""
    if not captions:
        return scores(operator.compute_stats_batched(rows))
    made = []
    for start in range(0, len(rows["text"]), STOCK_ROWS):
        batch = {key: values[start : start + STOCK_ROWS] for key, values in rows.items()}
        made += operator.process_batched(batch)["text"]
    return made


def run_ours(operator: Any, rows: Rows, captions: bool) -> list[Any]:
    """Return captions, or the scores of every sample, made in the operator's own batches."""
    made: list[Any] = []
    for start in range(0, len(rows["text"]), operator.batch_size):
        batch = part(rows, operator.batch_size, start)
        if captions:
            made += operator.process_batched(batch)["text"]
        else:
            made += scores(operator.compute_stats_batched(batch))
    return made


def scores(rows: Rows) -> list[list[float]]:
    """Return the scores of every sample."""
    return [[float(score) for own in stats.values() for score in own] for stats in rows[STATS]]


def part(rows: Rows, count: int, start: int = 0) -> Rows:
    """Return fresh samples, without statistics."""
    chosen = {key: values[start : start + count] for key, values in rows.items()}
    return chosen | {STATS: [{} for _ in chosen["text"]]}


def largest_difference(expected: Sequence[list[float]], made: Sequence[list[float]]) -> str:
    """Return the largest difference of the samples that both have."""
    pairs = zip(expected, made, strict=False)
    return f"{max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)):.1e}"


def shorten_captions(model: Any, tokens: int) -> None:
    """Let Data-Juicer's mapper, which asks for 128 tokens, get fewer."""
    generate = model.generate
    model.generate = lambda **options: generate(**{**options, "max_new_tokens": tokens})


def workspace_samples(options: argparse.Namespace) -> Rows:
    """Return the first samples of a workspace's seed set, with full picture paths."""
    folder = options.workspace / "data" / "seed"
    with (folder / "seed.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(options.samples), lines, strict=False)]
    return {
        "text": [record["text"] for record in records],
        "images": [[str(folder / image) for image in record["images"]] for record in records],
    }


def workspace_cases(workspace: Path) -> list[Case]:
    """Return the operators that a demo workspace has models for."""
    models = workspace / "models"
    cases = [
        Case("image_text_similarity_filter", "mini CLIP", "hf_clip", models / "clip"),
        Case("image_text_matching_filter", "mini BLIP", "hf_blip", models / "blip"),
        Case("image_captioning_mapper", "mini BLIP-2", "hf_img2seq", models / "blip2"),
    ]
    return [case for case in cases if case.folder.is_dir()]


def drawn_samples(options: argparse.Namespace, folder: Path) -> Rows:
    """Return samples with JPEGs of 640x480, drawn by the mini world and enlarged."""
    from synth_agent.miniworld.datasets import draw_seed

    rows: Rows = {"text": [], "images": []}
    for number, sample in enumerate(draw_seed(options.samples, seed=0)):
        path = folder / f"{number}.jpg"
        sample.image.resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(path, quality=88)
        rows["text"].append(f"{IMAGE}\n{sample.caption} {END}")
        rows["images"].append([str(path)])
    return rows


def true_size_cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    """Write configurations of the published sizes, each with the mini world's tokenizer."""
    import transformers as hf

    small = hf.CLIPConfig(text_config=SPECIAL)
    large = hf.CLIPConfig(
        text_config={**CLIP_L["text_config"], **SPECIAL},
        vision_config=CLIP_L["vision_config"],
        projection_dim=768,
    )
    matcher = hf.BlipConfig(
        text_config={**SPECIAL, "sep_token_id": 1}, vision_config={"image_size": 384}
    )
    captioner = hf.Blip2Config(
        text_config={"model_type": "opt", **OPT_2_7B, **SPECIAL},
        num_query_tokens=32,
        image_token_index=50265,
    )
    similarity = ("image_text_similarity_filter", "hf_clip", "clip", hf.CLIPModel)
    matching = ("image_text_matching_filter", "hf_blip", "blip", hf.BlipForImageTextRetrieval)
    captioning = (
        "image_captioning_mapper",
        "hf_img2seq",
        "blip2",
        hf.Blip2ForConditionalGeneration,
    )
    wanted = [
        (*similarity, "CLIP B/32", small, 224),
        (*similarity, "CLIP L/14-336", large, 336),
        (*matching, "BLIP ITM base", matcher, 384),
        (*captioning, "BLIP-2 OPT-2.7B", captioner, 224),
    ]
    cases = []
    for operator, parameter, part_name, architecture, name, config, pixels in wanted:
        target = folder / name.replace("/", "-")
        write_model_folder(target, part_name, config, pixels)
        load = functools.partial(random_model, target, architecture, options.device)
        cases.append(Case(operator, name, parameter, target, load))
    return cases


def write_model_folder(folder: Path, part_name: str, config: Any, pixels: int) -> None:
    """Write a model folder without weights: the mini world's tokenizer, the sizes of the real one."""
    packed = ASSETS / f"{part_name}.zip"
    if packed.is_file():
        shutil.unpack_archive(packed, folder)
    else:
        shutil.copytree(ASSETS / part_name, folder)
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    described = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    side = {"height": pixels, "width": pixels}
    described["size"] = side
    if part_name == "clip":
        described |= {"size": {"shortest_edge": pixels}, "crop_size": side, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(described), "utf-8")


def random_model(folder: Path, architecture: Any, device: str) -> tuple[Any, Any]:
    """Return a model with random weights, made on the device, and its processor."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    with torch.device(device):
        model = architecture(hf.AutoConfig.from_pretrained(folder)).eval()
    return model, hf.AutoProcessor.from_pretrained(folder)


def header(samples: int, options: argparse.Namespace, repeated: bool) -> str:
    """Return what was measured where, and the table's head, as Markdown."""
    import torch
    import transformers

    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    stock = (
        "Data-Juicer is not installed: its operators' calls were repeated (one sample a call, "
        "float32, gradients' bookkeeping kept, captions 8 a call)"
        if repeated
        else "Data-Juicer's operators as installed"
    )
    lines = [
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {samples} samples ({options.stock_samples} for stock, "
        f"{min(options.float32_samples, samples)} in float32), {options.per_call} pictures a call, captions of at most {options.new_tokens} new tokens",
        f"stock: {stock}",
        "",
        "| operator | model | stock, samples/s | "
        + " | ".join(f"ours {dtype} | times | difference" for dtype in options.dtypes)
        + " |",
        "|---|---|---|" + "---|---|---|" * len(options.dtypes),
    ]
    return "\n".join(lines)


def line(result: Result, options: argparse.Namespace) -> str:
    """Return a row of the table."""
    cells = [result.case.operator, result.case.model, f"{result.stock:.3g}"]
    for dtype in options.dtypes:
        rate = result.ours[dtype]
        cells += [f"{rate:.4g}", f"{rate / result.stock:.1f}", result.difference[dtype]]
    return "| " + " | ".join(cells) + " |"


def install_repeated_operators() -> None:
    """Offer the parts of Data-Juicer that our operators build on, its calls repeated."""
    zoo: dict[Any, tuple[Any, Any]] = {}

    def get_model(key: Any, rank: int | None = None, use_cuda: bool = False) -> tuple[Any, Any]:
        if key not in zoo:
            zoo[key] = key("cuda" if use_cuda else "cpu")
        return zoo[key]

    Repeated.get_model = staticmethod(get_model)
    keys = ("image_text_similarity", "image_text_matching_score", "image_aesthetics_scores")
    ops, utils = "data_juicer.ops", "data_juicer.utils"
    contents: dict[str, dict[str, Any]] = {
        "data_juicer": {},
        ops: {},
        f"{ops}.filter": {},
        f"{ops}.mapper": {},
        utils: {},
        f"{ops}.base_op": {"OPERATORS": Registry()},
        f"{ops}.filter.image_text_similarity_filter": {
            "ImageTextSimilarityFilter": RepeatedSimilarity
        },
        f"{ops}.filter.image_text_matching_filter": {"ImageTextMatchingFilter": RepeatedMatching},
        f"{ops}.filter.image_aesthetics_filter": {"ImageAestheticsFilter": Repeated},
        f"{ops}.mapper.image_captioning_mapper": {"ImageCaptioningMapper": RepeatedCaptioning},
        f"{utils}.constant": {
            "Fields": types.SimpleNamespace(stats=STATS),
            "StatsKeys": types.SimpleNamespace(**{key: key for key in keys}),
        },
        f"{utils}.mm_utils": {
            "SpecialTokens": types.SimpleNamespace(image=IMAGE, eoc=END),
            "load_image": load_image,
            "load_mm_bytes_from_sample": lambda *_: None,
            "remove_special_tokens": plain_text,
        },
        f"{utils}.model_utils": {"get_model": get_model, "MODEL_ZOO": zoo},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    registry = contents[f"{ops}.base_op"]["OPERATORS"]
    for name, operator in (
        ("image_text_similarity_filter", RepeatedSimilarity),
        ("image_text_matching_filter", RepeatedMatching),
        ("image_captioning_mapper", RepeatedCaptioning),
    ):
        registry.register_module(name)(operator)


def load_image(path: str) -> Image.Image:
    """Return a picture as Data-Juicer reads it."""
    return Image.open(path).convert("RGB")


def plain_text(text: str) -> str:
    """Return a text without special tokens, as Data-Juicer strips them."""
    return text.replace(IMAGE, "").strip().replace(END, "").strip()


def load_model(folder: str, device: str) -> tuple[Any, Any]:
    """Return the model and the processor of a folder."""
    import transformers as hf

    architecture = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    model = architecture.from_pretrained(folder).to(device).eval()
    return model, hf.AutoProcessor.from_pretrained(folder)


class Registry:
    """Data-Juicer's table of operators."""

    def __init__(self) -> None:
        """Start empty."""
        self.modules: dict[str, Any] = {}

    def register_module(self, name: str, force: bool = False) -> Callable[[Any], Any]:
        """Return the decorator that enters a class under a name."""

        def register(operator: Any) -> Any:
            operator._name = name
            self.modules[name] = operator
            return operator

        return register


class Repeated:
    """What Data-Juicer's operators have in common."""

    _name = ""
    get_model: Any = None
    model_parameter = ""

    def __init__(self, accelerator: str = "cuda", **options: Any) -> None:
        """Take the parameters that the benchmark gives."""
        self.accelerator = accelerator
        self.text_key, self.image_key, self.image_bytes_key = "text", "images", "image_bytes"
        self.horizontal_flip = self.vertical_flip = False
        self.reduce_mode, self.need_normalized_by_ten = "avg", False
        folder = options.get(self.model_parameter, "")
        self.model_key = functools.partial(load_model, folder)

    def use_cuda(self) -> bool:
        """Tell whether the model goes to the GPU."""
        return self.accelerator == "cuda"

    def compute_stats_batched(self, rows: Rows, **_: Any) -> Rows:
        """Score samples one by one."""
        model, processor = self.get_model(self.model_key, None, self.use_cuda())
        for row, stats in enumerate(rows[STATS]):
            pictures = [load_image(path) for path in rows["images"][row]]
            inputs = processor(
                text=plain_text(rows["text"][row]),
                images=pictures,
                return_tensors="pt",
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                padding=True,
            ).to(model.device)
            stats["score"] = [self.score(model(**inputs))]
        return rows

    def score(self, outputs: Any) -> float:
        """Return a sample's score."""
        raise NotImplementedError


class RepeatedSimilarity(Repeated):
    """The calls of `image_text_similarity_filter`, for samples of one chunk."""

    model_parameter = "hf_clip"

    def score(self, outputs: Any) -> float:
        """Return the mean similarity."""
        return float((outputs.logits_per_text / 100.0).mean())


class RepeatedMatching(Repeated):
    """The calls of `image_text_matching_filter`, for samples of one picture."""

    model_parameter = "hf_blip"

    def score(self, outputs: Any) -> float:
        """Return the matching probability."""
        return float(outputs.itm_score.detach().cpu().softmax(dim=-1)[:, 1])


class RepeatedCaptioning(Repeated):
    """The calls of `image_captioning_mapper` that keeps no original sample."""

    model_parameter = "hf_img2seq"
    gpu_batch_size = 8

    def __init__(self, **options: Any) -> None:
        """Take the parameters that the benchmark gives."""
        super().__init__(**options)
        self.keep_candidate_mode, self.caption_num = "random_any", 1
        self.prompt = self.prompt_key = None

    def process_batched(self, rows: Rows) -> Rows:
        """Caption the pictures of a batch, eight at a time."""
        model, processor = self.get_model(self.model_key, None, self.use_cuda())
        pictures = [load_image(path) for paths in rows["images"] for path in paths]
        captions: list[str] = []
        for start in range(0, len(pictures), self.gpu_batch_size):
            own = pictures[start : start + self.gpu_batch_size]
            inputs = processor(images=own, text=None, return_tensors="pt").to(model.device)
            ids = model.generate(**inputs, max_new_tokens=128, do_sample=True)
            captions += processor.batch_decode(ids, skip_special_tokens=True)
        return {"text": captions}

    def _distribute_captions(
        self, captions: list[list[str]], places: list[tuple[int, int, int]], rows: list[Any]
    ) -> list[dict[str, Any]]:
        made = copy.deepcopy(rows)
        for (row, _, _), candidates in zip(places, captions, strict=True):
            made[row]["text"] = candidates[0]
        return made
