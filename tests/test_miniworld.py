"""The mini world: the same seed writes the same bytes, in the formats that the real readers take."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import features

from mgm.benchmarks import MMBench, TextVQA
from mgm.checkpoint import build_model
from mgm.config import ModelConfig
from mgm.data import check_records, read_records
from synth_agent.errors import SynthAgentError
from synth_agent.miniworld import datasets, render, write_world

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


def test_shipped_parts_are_small() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size < 8 * 2**20


def test_a_missing_font_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    render.load_font.cache_clear()
    with pytest.raises(SynthAgentError, match="Font is missing") as error:
        render.load_font(12)
    assert "pillow" in error.value.hint
