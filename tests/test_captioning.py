"""LLaVA's captions: batches against transformers one by one, and a published row through its stage."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synth_agent.demo import prepare_demo
from synth_agent.miniworld import write_world
from synth_agent.miniworld.datasets import draw_seed
from synth_agent.stages.datajuicer import guard
from tests.tiny_models import save_llava

ROOT = Path(__file__).parents[1]
GEMMA = ROOT / "synth_agent" / "miniworld" / "assets" / "gemma"
IMAGE, END = "<__dj__image>", "<|__dj__eoc|>"
QUESTIONS = (
    "What is there?",
    "Describe the picture in one sentence.",
    "Which colours, shapes and words does the picture show, and where are they?",
)
TOKENS = 12

PREDICTOR = """
import torch
from transformers import CLIPVisionModelWithProjection
from transformers.modeling_outputs import ImageClassifierOutput

class AestheticsPredictorV2Linear(CLIPVisionModelWithProjection):
    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.projection_dim, 1)
        self.post_init()

    def forward(self, pixel_values, **options):
        embeds = super().forward(pixel_values, **options).image_embeds
        return ImageClassifierOutput(logits=self.head(embeds / embeds.norm(dim=-1, keepdim=True)))
"""
"""The part of simple-aesthetics-predictor that the operator loads, for a model folder of its layout."""

Rows = dict[str, list[Any]]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    save_llava(folder, GEMMA)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 1_000_000
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Samples with a question of their own each, of three lengths; one has two pictures."""
    folder = tmp_path_factory.mktemp("seed")
    drawn = draw_seed(6, seed=3)
    files = []
    for number, sample in enumerate(drawn):
        files.append(str(folder / f"{number}.png"))
        sample.image.save(files[-1])
    texts = [f"{IMAGE}\n{sample.caption} {END}" for sample in drawn]
    texts[4] = f"{IMAGE}{IMAGE}\n{drawn[4].caption} {END}"
    pictures = [[file] for file in files]
    pictures[4] = [files[4], files[0]]
    return {"text": texts, "images": pictures, "ask": [QUESTIONS[n % 3] for n in range(6)]}


def _captioned(folder: Path, rows: Rows, **options: Any) -> Rows:
    guard()
    from data_juicer.ops import load_ops

    from synth_agent.stages import operators  # noqa: F401  registers them

    options = {"max_new_tokens": TOKENS, "prompt_key": "ask", "dtype": "auto"} | options
    options |= {"hf_img2seq": str(folder), "keep_original_sample": False}
    [mapper] = load_ops([{"batched_image_captioning_mapper": options}])
    made: Rows = mapper.process_batched({key: list(values) for key, values in rows.items()})
    return made


def _words(text: str) -> list[str]:
    return sorted(text.replace(IMAGE, " ").replace(END, " ").split())


def test_a_batch_gives_what_transformers_gives_one_by_one(llava: Path, rows: Rows) -> None:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    expected, lengths = [], set()
    for files, question in zip(rows["images"], rows["ask"], strict=True):
        captions = []
        for file in files:
            inputs = processor(
                images=Image.open(file),
                text=f"USER: <image>\n{question} ASSISTANT:",
                return_tensors="pt",
            )
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            length = inputs["input_ids"].shape[1]
            lengths.add(length)
            captions.append(processor.decode(ids[0, length:], skip_special_tokens=True))
        expected.append(_words(" ".join(captions)))
    assert len(lengths) == 3
    assert len({tuple(words) for words in expected}) > 3
    for per_call in (64, 2):
        made = _captioned(llava, rows, do_sample=False, images_per_call=per_call)
        assert [_words(text) for text in made["text"]] == expected
        assert made["images"] == rows["images"]
        assert not any("ASSISTANT" in text or "USER" in text for text in made["text"])


def test_draws_follow_from_the_seed_in_any_batch(llava: Path, rows: Rows) -> None:
    first = _captioned(llava, rows, seed=1)["text"]
    assert _captioned(llava, rows, seed=1, images_per_call=1)["text"] == first
    backwards = {key: values[::-1] for key, values in rows.items()}
    assert _captioned(llava, backwards, seed=1)["text"] == first[::-1]
    other = _captioned(llava, rows, seed=2)["text"]
    assert sum(mine != theirs for mine, theirs in zip(first, other, strict=True)) > 3


@pytest.mark.parametrize("prompt", [None, "USER: <image>\nWhat is there? ASSISTANT:"])
def test_a_prompt_that_is_no_question_is_named(llava: Path, rows: Rows, prompt: str | None) -> None:
    with pytest.raises(ValueError, match="batched_image_captioning_mapper: .*question alone"):
        _captioned(llava, rows, prompt=prompt, prompt_key=None)


def test_a_tokenizer_without_the_marker_is_named(rows: Rows, tmp_path: Path) -> None:
    save_llava(tmp_path / "llava", GEMMA)
    config = tmp_path / "llava" / "config.json"
    stored = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(stored | {"image_token_index": 7}), "utf-8")
    with pytest.raises(ValueError, match="into token 7, which config.json names"):
        _captioned(tmp_path / "llava", rows)


def test_another_type_of_model_is_refused_by_name(rows: Rows) -> None:
    folder = GEMMA.with_name("clip")
    with pytest.raises(ValueError, match="is a clip model; .* supports, blip-2 or llava, or use"):
        _captioned(folder, rows)


@pytest.fixture
def workspace(tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo whose models lie where the published rows look for them."""
    sizes = {"num_instructions": 3, "num_textvqa": 3, "num_mmbench": 6}
    write_world(tmp_path / "world", seed=5, num_seed_samples=16, **sizes)
    prepare_demo(tmp_path / "workspace", lambda line: None, tmp_path / "world")
    models = tmp_path / "workspace" / "models"
    (models / "llava-1.5-7b-hf").symlink_to(llava)
    (models / "clip-vit-base-patch32").symlink_to(GEMMA.with_name("clip"))
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "aesthetics_predictor.py").write_text(PREDICTOR, "utf-8")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.delitem(sys.modules, "aesthetics_predictor", raising=False)
    _save_predictor(models / "aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE")
    del sys.modules["aesthetics_predictor"]  # monkeypatch would put it back for the tests behind
    return tmp_path / "workspace"


def _save_predictor(folder: Path) -> None:
    """Save a predictor whose scores are spread around 7 of 10 points, inside the rows' bounds."""
    import torch
    from transformers import CLIPProcessor, CLIPVisionConfig

    package = importlib.import_module("aesthetics_predictor")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPVisionConfig(
        **size, num_attention_heads=2, image_size=64, patch_size=16, initializer_range=0.5
    )
    predictor = package.AestheticsPredictorV2Linear(config)
    torch.nn.init.constant_(predictor.head.bias, 7.0)
    predictor.save_pretrained(folder)
    CLIPProcessor.from_pretrained(GEMMA.with_name("clip")).save_pretrained(folder)


@pytest.mark.parametrize(("name", "copies"), [("", 1), ("-x2", 2)])
def test_published_row_runs_through_the_process_stage(
    workspace: Path, name: str, copies: int
) -> None:
    recipe = ROOT / "recipes" / f"similarity-aesthetics-strict-llava{name}.yaml"
    arguments = {
        "recipe": str(recipe),
        "seed": "data/seed/seed.jsonl",
        "images": "data/seed",
        "original": "data/seed/stage_1.json",
        "output": str(workspace / "artifacts" / "row"),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process"]
        + [f"--{key}={value}" for key, value in arguments.items()],
        cwd=workspace,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    output = workspace / "artifacts" / "row"
    records = json.loads((output / "processed.json").read_text("utf-8"))
    assert len(records) > copies
    seed = (workspace / "data/seed/seed.jsonl").read_text("utf-8").splitlines()
    old = {json.loads(line)["id"]: json.loads(line)["text"] for line in seed}
    captions = {record["id"]: record["conversations"][1]["value"] for record in records}
    assert len(records) == copies * len(captions)
    assert all(captions.values())
    assert len(set(captions.values())) > 1
    for identity, caption in captions.items():
        assert caption not in old[identity]
        assert not {"USER", "ASSISTANT", "<image>"} & set(caption.replace(":", " ").split())
