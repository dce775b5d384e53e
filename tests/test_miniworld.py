"""The mini world: the same seed writes the same bytes, in the formats that the real readers take."""

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import features
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPModel,
)

from mgm.benchmarks import MMBench, TextVQA
from mgm.checkpoint import build_model
from mgm.config import ModelConfig
from mgm.data import check_records, read_records
from synth_agent.data import read_samples
from synth_agent.errors import SynthAgentError
from synth_agent.miniworld import build, datasets, language, render, write_world
from synth_agent.miniworld.scene import Scene, draw_scene
from synth_agent.miniworld.tokenizer import IMAGE_TOKEN, IMAGE_TOKEN_ID

ASSETS = Path(datasets.__file__).parent / "assets"
SIZES = {"num_seed_samples": 40, "num_instructions": 6, "num_textvqa": 5, "num_mmbench": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=3, **SIZES)
    return root


def digest(root: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return content.hexdigest()


def test_a_seed_decides_every_byte(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", seed=3, **SIZES)
    write_world(tmp_path / "other", seed=4, **SIZES)
    assert digest(tmp_path / "again") == digest(world) != digest(tmp_path / "other")


def test_the_mess_has_the_stated_shares() -> None:
    kinds = Counter(sample.kind for sample in datasets.draw_seed(400, 1))
    for kind, share in datasets.MESS.items():
        assert kinds[kind] == pytest.approx(400 * share, abs=2), kind
    assert kinds["clean"] == pytest.approx(200, abs=4)


def test_captions_of_clean_samples_belong_to_their_pictures() -> None:
    for sample in datasets.draw_seed(60, 2):
        if sample.kind == "clean":
            assert all(sign.word in sample.caption for sign in sample.scene.signs)


def test_training_data_passes_the_checks_before_training(world: Path) -> None:
    for name, folder in (("stage_1.json", "seed"), ("instruct.json", "instruct")):
        path = world / folder / name
        check_records(path, read_records(path), world / folder)


def test_benchmarks_are_read_by_the_real_readers(world: Path) -> None:
    textvqa = TextVQA(world / "textvqa/TextVQA_mini_val.json", world / "textvqa/train_images")
    mmbench = MMBench(world / "mmbench" / "mmbench_mini.tsv")
    assert len(textvqa.items) == 5
    assert len(mmbench.items) == 6 * 4


def test_the_annotations_have_ten_answers(world: Path) -> None:
    data = json.loads((world / "textvqa" / "TextVQA_mini_val.json").read_text())["data"]
    assert all(len(question["answers"]) == 10 for question in data)


def test_shipped_parts_fit_the_model_exactly() -> None:
    folders = [ASSETS / part for part in ("gemma", "clip", "convnext")]
    model = build_model(ModelConfig.from_parts(*folders), *folders)
    assert model.config.num_image_tokens == 16
    assert all(torch.isfinite(value).all() for value in model.parameters())


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "blip2"
    shutil.unpack_archive(ASSETS / "blip2.zip", folder)
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    draw = random.Random(31)
    return [draw_scene(draw, num_signs=1) for _ in range(24)]


def test_the_seed_set_is_read_by_the_real_reader(world: Path) -> None:
    samples = read_samples(world / "seed" / "seed.jsonl", unique_ids=True)
    assert len(samples) == 40
    assert all((world / "seed" / image).is_file() for s in samples for image in s.images)


def test_the_captioner_reads_signs(captioner: Path, scenes: list[Scene]) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(str(captioner)).eval()
    processor = AutoProcessor.from_pretrained(str(captioner))
    inputs = processor(images=[render.render(scene) for scene in scenes], return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    told = [scene.signs[0].word in text.split() for scene, text in zip(scenes, texts, strict=True)]
    assert sum(told) >= 22
    assert (ids == model.config.text_config.eos_token_id).any(1).all()


def test_the_captioner_keeps_the_image_token_where_data_juicer_wants_it(captioner: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(str(captioner))
    tokenizer = AutoProcessor.from_pretrained(str(captioner)).tokenizer
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == IMAGE_TOKEN_ID == 50265
    table = model.get_input_embeddings().weight
    unused = table[len(tokenizer) - 1 :]
    assert len(table) > IMAGE_TOKEN_ID
    assert torch.equal(unused, unused[:1].expand_as(unused))


def test_the_matcher_tells_own_captions_from_others(scenes: list[Scene]) -> None:
    model = BlipForImageTextRetrieval.from_pretrained(str(ASSETS / "blip")).eval()
    processor = AutoProcessor.from_pretrained(str(ASSETS / "blip"))
    draw = random.Random(1)
    texts = [language.caption(scene, draw) for scene in scenes]
    pictures = [render.render(scene) for scene in scenes]

    def accepted(captions: list[str]) -> float:
        inputs = processor(text=captions, images=pictures, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return float(model(**inputs).itm_score.argmax(1).float().mean())

    assert accepted(texts) >= 0.85
    assert accepted(texts[1:] + texts[:1]) <= 0.1


def test_the_builder_writes_parts_that_load(tmp_path: Path) -> None:
    arguments = ["--steps-scale", "0.0001", "--device", "cpu", "--processes", "1"]
    assert build.main([*arguments, "--out", str(tmp_path)]) == 0
    folders = [tmp_path / part for part in ("gemma", "clip", "convnext")]
    build_model(ModelConfig.from_parts(*folders), *folders)
    CLIPModel.from_pretrained(str(tmp_path / "clip"))
    BlipForImageTextRetrieval.from_pretrained(str(tmp_path / "blip"))
    shutil.unpack_archive(tmp_path / "blip2.zip", tmp_path / "unpacked")
    Blip2ForConditionalGeneration.from_pretrained(str(tmp_path / "unpacked"))
    for part in ("clip", "blip", "blip2"):
        AutoProcessor.from_pretrained(str(tmp_path / part))


def test_shipped_parts_are_small() -> None:
    parts = [path for path in ASSETS.rglob("*") if path.is_file()]
    shipped = [path for path in parts if "blip2" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < 8 * 2**20


def test_a_missing_font_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    render.load_font.cache_clear()
    with pytest.raises(SynthAgentError, match="Font is missing") as error:
        render.load_font(12)
    assert "pillow" in error.value.hint
