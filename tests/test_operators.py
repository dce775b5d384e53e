"""The batched operators against Data-Juicer's own, on pictures of the mini world."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from synth_agent.data import ROW_ID_FIELD, Sample
from synth_agent.miniworld.datasets import draw_seed
from synth_agent.stages.datajuicer import guard

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "synth_agent" / "miniworld" / "assets"
OPERATORS = ROOT / "synth_agent" / "stages" / "operators.py"
IMAGE, END = "<__dj__image>", "<|__dj__eoc|>"
STATS = "__dj__stats__"
SIMILARITY = ("image_text_similarity_filter", "image_text_similarity", "hf_clip", "clip")
MATCHING = ("image_text_matching_filter", "image_text_matching_score", "hf_blip", "blip")
GENERATION = {"do_sample": True, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}

Rows = dict[str, list[Any]]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> Make:
    """Return what makes an operator of Data-Juicer, ours among them."""
    guard()
    from data_juicer.ops import load_ops

    from synth_agent.stages import operators

    assert Path(operators.__file__) == OPERATORS
    return lambda name, **parameters: load_ops([{name: parameters}])[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "blip"):
        (folder / name).symlink_to(ASSETS / name)
    shutil.unpack_archive(ASSETS / "blip2.zip", folder / "blip2")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Samples with one picture, and with several in one chunk, in several chunks, twice, and none."""
    folder = tmp_path_factory.mktemp("seed")
    drawn = draw_seed(12, seed=7)
    files = []
    for number, sample in enumerate(drawn):
        files.append(str(folder / f"{number}.jpg"))
        sample.image.save(files[-1])
    captions = [sample.caption for sample in drawn]
    texts = [f"{IMAGE}\n{caption} {END}" for caption in captions]
    pictures = [[file] for file in files]
    texts[2] = f"{IMAGE}{IMAGE}\n{captions[2]} {END}"
    pictures[2] = [files[2], files[5]]
    texts[3] = f"{texts[3]}only words {END}{IMAGE} {captions[4]} {IMAGE}{END}"
    pictures[3] = [files[3], files[4], files[6]]
    texts[5], pictures[5] = f"{captions[5]} {END}", []
    texts[7] = f"{texts[7]}{IMAGE} {captions[8]} {END}"
    pictures[7] = [files[7], files[7]]
    return {"text": texts, "images": pictures}


def _batch(rows: Rows, places: Sequence[int] | None = None) -> Rows:
    """Return a fresh copy of rows with empty statistics."""
    chosen = range(len(rows["text"])) if places is None else places
    batch = {
        key: [json.loads(json.dumps(values[i])) for i in chosen] for key, values in rows.items()
    }
    return batch | {STATS: [{} for _ in chosen]}


def _scores(operator: Any, rows: Rows, key: str) -> list[list[float]]:
    batch = operator.compute_stats_batched(_batch(rows))
    return [[float(score) for score in stats[key]] for stats in batch[STATS]]


def _flat(scores: Sequence[Sequence[float]]) -> list[float]:
    return [score for own in scores for score in own]


@pytest.mark.parametrize(
    ("reduce_mode", "any_or_all", "flips", "pairs_per_call"),
    [
        ("avg", "any", (False, False), 64),
        ("max", "all", (True, False), 3),
        ("min", "any", (True, True), 5),
    ],
)
@pytest.mark.parametrize(("name", "key", "parameter", "model"), [SIMILARITY, MATCHING])
def test_scores_and_decisions_equal_the_stock_filters(
    make: Make,
    models: Path,
    rows: Rows,
    name: str,
    key: str,
    parameter: str,
    model: str,
    reduce_mode: str,
    any_or_all: str,
    flips: tuple[bool, bool],
    pairs_per_call: int,
) -> None:
    options = {parameter: str(models / model), "reduce_mode": reduce_mode}
    options |= {"any_or_all": any_or_all, "horizontal_flip": flips[0], "vertical_flip": flips[1]}
    expected = _scores(make(name, **options), rows, key)
    assert [len(own) for own in expected] == [1, 1, 1, 2, 1, 0, 1, 2, 1, 1, 1, 1]
    values = sorted(_flat(expected))
    gaps = [(high - low, (low + high) / 2) for low, high in zip(values, values[1:], strict=False)]
    options["min_score"] = max(gaps[3:-3])[1]
    stock = make(name, **options)
    ours = make(f"batched_{name}", **options, pairs_per_call=pairs_per_call)
    batch = ours.compute_stats_batched(_batch(rows))
    made = [[float(score) for score in stats[key]] for stats in batch[STATS]]
    for mine, theirs in zip(made, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    kept = list(ours.process_batched(batch))
    stored = {STATS: [{key: own} for own in expected]}
    assert kept == list(stock.process_batched(stored))
    assert {True, False} <= {bool(keep) for keep in kept}


def test_aesthetics_equal_the_stock_filter(
    make: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _save_aesthetics_predictor(tmp_path, monkeypatch)
    key = "image_aesthetics_scores"
    expected = _scores(make("image_aesthetics_filter", hf_scorer_model=folder), rows, key)
    # A file that is named twice has one score.
    assert [len(own) for own in expected] == [1, 1, 2, 3, 1, 0, 1, 1, 1, 1, 1, 1]
    assert len(set(_flat(expected))) > 8
    for images_per_call in (2, 64):
        ours = make(
            "batched_image_aesthetics_filter",
            hf_scorer_model=folder,
            images_per_call=images_per_call,
        )
        for mine, theirs in zip(_scores(ours, rows, key), expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def _save_aesthetics_predictor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Save a predictor with random weights, and offer its class as the package that has it."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.modeling_outputs import ImageClassifierOutput

    class AestheticsPredictorV2Linear(CLIPVisionModelWithProjection):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head = torch.nn.Linear(config.projection_dim, 1)
            self.post_init()

        def forward(self, pixel_values: Any, **options: Any) -> Any:
            embeds = super().forward(pixel_values, **options).image_embeds
            normal = embeds / embeds.norm(dim=-1, keepdim=True)
            return ImageClassifierOutput(logits=self.head(normal))

    package = types.ModuleType("aesthetics_predictor")
    package.AestheticsPredictorV2Linear = AestheticsPredictorV2Linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aesthetics_predictor", package)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPVisionConfig(
        **size, num_attention_heads=2, image_size=64, patch_size=16, projection_dim=16
    )
    target = folder / "aesthetics-predictor-v2-linear"
    AestheticsPredictorV2Linear(config).save_pretrained(target)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "clip" / name, target)
    return str(target)


def test_bfloat16_is_close_and_leaves_the_last_product_in_float32(
    make: Make, models: Path, rows: Rows
) -> None:
    clip = str(models / "clip")
    expected = _flat(_scores(make(SIMILARITY[0], hf_clip=clip), rows, SIMILARITY[1]))
    ours = make(f"batched_{SIMILARITY[0]}", hf_clip=clip, dtype="bfloat16")
    made = _flat(_scores(ours, rows, SIMILARITY[1]))
    differences = np.abs(np.array(made) - np.array(expected))
    assert 0 < differences.max() < 0.01
    # A score rounded to bfloat16 would have these bits empty.
    assert any(np.float32(score * 100).view(np.uint32) & 0xFFFF for score in made)


def test_stand_in_leaves_half_precision_models_and_other_operators_alone(
    make: Make, models: Path, rows: Rows, tmp_path: Path
) -> None:
    from transformers import CLIPModel

    from synth_agent.stages.operators import stand_in

    shutil.copytree(ASSETS / "clip", tmp_path / "clip")
    import torch

    CLIPModel.from_pretrained(tmp_path / "clip").to(torch.bfloat16).save_pretrained(
        tmp_path / "clip"
    )
    stock = make(SIMILARITY[0], hf_clip=str(tmp_path / "clip"))
    expected = _scores(stock, rows, SIMILARITY[1])
    replaced = stand_in(stock)
    assert (replaced._name, replaced.is_batched_op()) == (SIMILARITY[0], True)
    assert _scores(replaced, rows, SIMILARITY[1]) == expected
    ours = make(f"batched_{SIMILARITY[0]}", hf_clip=str(tmp_path / "clip"))
    assert _scores(ours, rows, SIMILARITY[1]) != expected
    other = make("image_captioning_mapper", hf_img2seq=str(models / "blip2"))
    assert stand_in(other) is other


@pytest.mark.parametrize(("name", "key", "parameter", "model"), [SIMILARITY, MATCHING])
def test_process_stage_batches_the_stock_filters(
    make: Make, models: Path, rows: Rows, name: str, key: str, parameter: str, model: str
) -> None:
    from data_juicer.core.data import NestedDataset

    from synth_agent.stages.running import run_operator

    numbered = rows | {ROW_ID_FIELD: list(range(len(rows["text"])))}
    seed = [Sample(str(i), (), text) for i, text in enumerate(rows["text"])]
    low = {"image_text_similarity_filter": 0.2, "image_text_matching_filter": 0.5}[name]
    options = {parameter: str(models / model), "min_score": low, "auto_op_parallelism": False}
    plain = make(name, **options).run(NestedDataset.from_dict(numbered))
    reports: list[tuple[int, int]] = []
    kept = run_operator(
        make(name, **options),
        NestedDataset.from_dict(numbered),
        seed,
        lambda done, total: reports.append((done, total)),
    )
    assert kept[ROW_ID_FIELD] == plain[ROW_ID_FIELD]
    assert 1 < len(kept) < 12
    assert reports == [(0, 12), (12, 12), (12, 12)]
    for mine, theirs in zip(kept[STATS], plain[STATS], strict=True):
        assert list(mine[key]) == pytest.approx(list(theirs[key]), abs=1e-5)


def test_known_scores_stay_and_need_no_model(make: Make, rows: Rows) -> None:
    ours = make(f"batched_{SIMILARITY[0]}", hf_clip="no/such/folder")
    batch = _batch(rows, [0, 5])
    batch[STATS][0][SIMILARITY[1]] = [0.25]
    assert ours.compute_stats_batched(batch)[STATS] == [
        {SIMILARITY[1]: [0.25]},
        {SIMILARITY[1]: []},
    ]


def test_too_few_pictures_and_bad_options_are_named(make: Make, models: Path, rows: Rows) -> None:
    batch = _batch(rows, [0])
    batch["text"][0] += f"{IMAGE} another {END}"
    for name, parameter, model in (
        (SIMILARITY[0], "hf_clip", "clip"),
        (MATCHING[0], "hf_blip", "blip"),
    ):
        ours = make(f"batched_{name}", **{parameter: str(models / model)})
        with pytest.raises(ValueError, match=f"batched_{name}: the text names 2 images"):
            ours.compute_stats_batched(batch)
    mapper = make("batched_image_captioning_mapper", hf_img2seq=str(models / "blip2"))
    with pytest.raises(ValueError, match="'images' has 1"):
        mapper.process_batched(batch)
    wrong = make("batched_image_captioning_mapper", hf_img2seq=str(models / "clip"))
    with pytest.raises(ValueError, match="hf_img2seq is a clip model"):
        wrong.process_batched(_batch(rows, [0]))
    for name, options in (
        (f"batched_{SIMILARITY[0]}", {"pairs_per_call": 0}),
        ("batched_image_aesthetics_filter", {"dtype": "float16"}),
        ("batched_image_captioning_mapper", {"images_per_call": -1}),
        ("batched_image_captioning_mapper", {"max_new_tokens": 0}),
    ):
        with pytest.raises(ValueError, match=f"{name}: {next(iter(options))} is"):
            make(name, **options)


def _captioned(make: Make, models: Path, rows: Rows, **options: Any) -> Rows:
    options = {"keep_original_sample": False, "max_new_tokens": 24} | options
    mapper = make("batched_image_captioning_mapper", hf_img2seq=str(models / "blip2"), **options)
    made: Rows = mapper.process_batched(_batch(rows))
    return made


def test_greedy_captions_equal_the_models_own_one_by_one(
    make: Make, models: Path, rows: Rows
) -> None:
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(models / "blip2").eval()
    processor = AutoProcessor.from_pretrained(models / "blip2")
    rows = {key: values[1:7] for key, values in rows.items()}
    prompts = ["a red", "one", "a sign that says", "there is a green ring and", "one", "a red"]
    asked = rows | {"ask": prompts}
    for prompt_key, per_call in ((None, 64), ("ask", 2)):
        made = _captioned(
            make, models, asked, do_sample=False, prompt_key=prompt_key, images_per_call=per_call
        )
        expected = []
        for files, prompt in zip(rows["images"], prompts, strict=True):
            captions = []
            for file in files:
                text = prompt if prompt_key else None
                inputs = processor(images=[Image.open(file)], text=text, return_tensors="pt")
                with torch.inference_mode():
                    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
                captions += processor.batch_decode(ids, skip_special_tokens=True)
            if files:
                expected.append(sorted(" ".join(captions).split()))
        texts = [text.replace(IMAGE, " ").replace(END, " ") for text in made["text"]]
        assert [sorted(text.split()) for text in texts] == expected
        assert made["images"] == [files for files in rows["images"] if files]


def test_samples_that_come_out_are_those_of_the_stock_mapper(
    make: Make, models: Path, rows: Rows
) -> None:
    chosen = {key: values[3:6] for key, values in rows.items()}
    for options in (
        {"keep_original_sample": True, "caption_num": 2, "keep_candidate_mode": "all"},
        {"keep_original_sample": False, "keep_candidate_mode": "random_any"},
    ):
        stock = make("image_captioning_mapper", hf_img2seq=str(models / "blip2"), **options)
        expected = stock.process_batched(_batch(chosen))
        made = _captioned(make, models, chosen, **options)
        assert made["images"] == expected["images"]
        assert [_marks(text) for text in made["text"]] == [
            _marks(text) for text in expected["text"]
        ]
    nothing = {key: values[5:6] for key, values in rows.items()}
    assert _captioned(make, models, nothing) == {"text": [], "images": [], STATS: []}


def _marks(text: str) -> str:
    return "".join(
        part
        for part in text.replace(IMAGE, "\nI\n").replace(END, "\nE\n").split("\n")
        if part in ("I", "E")
    )


def test_a_seed_gives_the_same_captions_in_any_batch(make: Make, models: Path, rows: Rows) -> None:
    rows = {key: values[2:8] for key, values in rows.items()}
    first = _captioned(make, models, rows, seed=1)
    assert _captioned(make, models, rows, seed=1) == first
    other = _captioned(make, models, rows, seed=2)["text"]
    assert sum(mine != theirs for mine, theirs in zip(first["text"], other, strict=True)) > 2
    turned = {key: values[::-1] for key, values in rows.items()}
    again = _captioned(make, models, turned, seed=1, images_per_call=4)
    assert again["text"] == first["text"][::-1]
    alone = {key: values[:1] for key, values in rows.items()}
    several = _captioned(make, models, alone, seed=1, caption_num=4, keep_candidate_mode="all")
    assert len(several["text"]) == 4
    assert len(set(several["text"])) > 1


def test_generation_settings_of_the_model_folder_are_honoured(
    make: Make, models: Path, rows: Rows, tmp_path: Path
) -> None:
    shutil.copytree(models / "blip2", tmp_path / "blip2")
    rows = {key: values[:4] for key, values in rows.items()}
    greedy = _captioned(make, models, rows, do_sample=False)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        (tmp_path / "blip2" / "generation_config.json").write_text(
            json.dumps(GENERATION | settings), "utf-8"
        )
        assert _captioned(make, tmp_path, rows, seed=3) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, 10, 1.0), (1.0, 0, 0.8), (0.7, 20, 0.6), (None, None, None)],
)
def test_draws_follow_the_distribution_of_transformers(
    temperature: float | None, top_k: int | None, top_p: float | None
) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    guard()
    from synth_agent.stages.captioning import Draw

    torch.manual_seed(0)
    count, size = 4000, 64
    scores = torch.randn(1, size) * 2
    wanted = TemperatureLogitsWarper(temperature or 1.0)(None, scores)
    if top_k != 0:
        wanted = TopKLogitsWarper(top_k or 50)(None, wanted)
    wanted = TopPLogitsWarper(top_p or 1.0)(None, wanted).softmax(-1)[0].numpy()
    uniforms = torch.stack([(torch.arange(count) + 0.5) / count, torch.rand(count)], dim=1)
    draw = Draw(uniforms, temperature, top_k, top_p)
    for tolerance in (1.5 / count, 0.04):
        left = draw(None, scores.repeat(count, 1))
        assert torch.isfinite(left).sum(-1).eq(1).all()
        shares = np.bincount(left.argmax(-1).numpy(), minlength=size) / count
        assert np.abs(shares - wanted).max() < tolerance
        assert not shares[wanted == 0].any()


def test_plain_dj_process_runs_the_operators_from_their_file(
    make: Make, models: Path, rows: Rows, tmp_path: Path
) -> None:
    chosen = {key: values[1:7] for key, values in rows.items()}
    records = [
        {"text": text, "images": images}
        for text, images in zip(chosen["text"], chosen["images"], strict=True)
    ]
    (tmp_path / "seed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    shared = {"num_proc": 0, "auto_op_parallelism": False}
    options: dict[str, Any] = {"hf_clip": str(models / "clip"), "pairs_per_call": 4}
    scores = _scores(make(f"batched_{SIMILARITY[0]}", **options), chosen, SIMILARITY[1])
    best = sorted(max(own) for own in scores if own)
    options["min_score"] = (best[2] + best[3]) / 2
    caption = {"hf_img2seq": str(models / "blip2"), "seed": 5, "max_new_tokens": 24}
    caption["keep_original_sample"] = False
    matching = {"hf_blip": str(models / "blip"), "dtype": "bfloat16", "min_score": 0.0}
    recipe = {
        "dataset_path": "seed.jsonl",
        "export_path": "out.jsonl",
        "custom_operator_paths": [str(OPERATORS)],
        "auto_op_parallelism": False,
        "skip_op_error": False,
        "use_cache": False,
        "process": [
            {f"batched_{SIMILARITY[0]}": options | shared},
            {f"batched_{MATCHING[0]}": matching | shared},
            {"batched_image_captioning_mapper": caption | shared},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "dj-process"), "--config", "recipe.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ours = make(f"batched_{SIMILARITY[0]}", **options)
    batch = ours.compute_stats_batched(_batch(chosen))
    kept = [place for place, keep in enumerate(ours.process_batched(batch)) if keep]
    assert 0 < len(kept) < 6
    expected = _captioned(
        make, models, {key: [values[i] for i in kept] for key, values in chosen.items()}, seed=5
    )
    assert [row["text"] for row in written] == expected["text"]
    assert [row["images"] for row in written] == expected["images"]


@pytest.mark.parametrize("size", [(640, 480), (3, 5), (1, 1), (3000, 2400)])
def test_planes_are_the_pictures_values(size: tuple[int, int]) -> None:
    guard()
    from synth_agent.stages.model_calls import planes

    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = planes(Image.fromarray(values))
    assert np.array_equal(made, values.transpose(2, 0, 1))
    assert made.flags.writeable


def test_the_files_are_found_by_the_path_of_one_of_them(tmp_path: Path) -> None:
    """The program is not installed where Data-Juicer runs them: its folder is taken away."""
    stages = tmp_path / "synth_agent" / "stages"
    stages.mkdir(parents=True)
    for file in (stages.parent / "__init__.py", stages / "__init__.py"):
        file.touch()
    for name in ("operators.py", "captioning.py", "model_calls.py"):
        shutil.copy(OPERATORS.with_name(name), stages)
    program = f"""
import sys
sys.path = [path for path in sys.path if path and path != {str(ROOT)!r}]
from data_juicer.config.config import load_custom_operators
from data_juicer.ops.base_op import OPERATORS
load_custom_operators([{str(stages / "operators.py")!r}])
names = [name for name in OPERATORS.modules if name.startswith("batched_")]
files = {{sys.modules[OPERATORS.modules[name].__module__].__file__ for name in names}}
print(*sorted(names), *sorted(files))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [
        "batched_image_aesthetics_filter",
        "batched_image_captioning_mapper",
        "batched_image_text_matching_filter",
        "batched_image_text_similarity_filter",
        *(str(stages / name) for name in ("captioning.py", "operators.py")),
    ]
