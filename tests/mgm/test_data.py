"""Pictures and records: exact pixels, and data that would teach the wrong thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from mgm import data
from mgm.data import (
    InstructionDataset,
    check_records,
    preprocess_image,
    read_records,
    square_pixels,
)
from mgm.errors import InputError
from mgm.parity import pictures
from mgm.parity.text import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(GOLDEN / "train_run")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(folder / "red.png")
    return folder


def record(name: str, answer: str = "Red.", **fields: Any) -> dict[str, Any]:
    question = "<image>\nWhat?" if "image" in fields else "What?"
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": messages, **fields}


def dataset(
    images: Path, tokenizer: PreTrainedTokenizerBase, *records: dict[str, Any], **fields: Any
) -> InstructionDataset:
    path = images.parent / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return InstructionDataset(path, images, tokenizer, **fields)


def test_pixels_and_tensors_are_the_originals() -> None:
    checks = list(pictures.check(GOLDEN / "preprocess"))
    assert len(checks) > 24
    assert [check for check in checks if not check.is_ok] == []


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (200, 2)])
def test_a_very_long_picture_is_resized_only_where_it_is_kept(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resized: list[int] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, target: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        resized.append(target[0] * target[1])
        assert resized[-1] < 2**26, "memory would not do"
        return resize(image, target, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", noted)
    square_pixels(Image.new("RGB", size), 768, "square", MEAN)
    assert resized == [768 * 768]


@pytest.mark.parametrize("size", [(90, 7), (7, 90), (1, 50), (400, 100), (640, 64)])
def test_a_very_long_picture_becomes_what_it_was(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    whole = square_pixels(picture, 56, "square", MEAN)
    monkeypatch.setattr(data, "_MOST_RESIZED_PIXELS", 0)
    part = square_pixels(picture, 56, "square", MEAN)
    assert (whole.int() - part.int()).abs().max() <= 4


@pytest.mark.parametrize(("size", "side"), [((20, 10), 64), ((10, 31), 64), ((7, 7), 64)])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_every_shape_becomes_a_square(size: tuple[int, int], side: int, aspect_ratio: Any) -> None:
    tensor = preprocess_image(Image.new("L", size, 128), side, aspect_ratio, MEAN, STD)
    assert tensor.shape == (3, side, side)
    assert tensor.dtype == torch.float32


def test_a_marker_in_the_answer_names_the_record(images: Path) -> None:
    bad = record("r7", "see <image>", image="red.png")
    with pytest.raises(InputError, match="r7") as raised:
        check_records(Path("d.json"), [record("r1", image="red.png"), bad], images)
    assert raised.value.title == "Image marker in the text"
    assert "r1" not in raised.value.message


def test_a_marker_in_the_answer_of_a_text_only_record_is_text(images: Path) -> None:
    check_records(Path("d.json"), [record("t", "the token <image> is text")], images)


def test_a_marker_in_two_messages_names_the_record(images: Path) -> None:
    turns = [*record("r9", image="red.png")["conversations"]] * 2
    bad = {"id": "r9", "image": "red.png", "conversations": turns}
    with pytest.raises(InputError, match="r9") as raised:
        check_records(Path("d.json"), [record("r1", image="red.png"), bad], images)
    assert raised.value.title == "Image marker in several messages"


@pytest.mark.parametrize("image", [None, "", 5, ["red.png", "red.png"]])
def test_an_image_that_is_no_path_names_the_record(images: Path, image: object) -> None:
    with pytest.raises(InputError, match="record r6") as raised:
        check_records(Path("d.json"), [record("r6", image=image)], images)
    assert raised.value.title == "Records whose image is no path"


def test_half_a_character_names_the_record(images: Path) -> None:
    with pytest.raises(InputError, match="record r5.*surrogate"):
        check_records(Path("d.json"), [record("r4"), record("r5", "so nice \ud83d")], images)


def test_a_data_juicer_marker_is_refused(images: Path) -> None:
    with pytest.raises(InputError, match="r8"):
        check_records(Path("d.json"), [record("r8", "<__dj__image> a dog")], images)


def test_missing_pictures_are_named_and_counted(images: Path) -> None:
    records = [record(f"m{n}", image=f"no{n}.png") for n in range(7)]
    with pytest.raises(InputError, match=r"m0 \(no0.png\).* and 2 more") as raised:
        check_records(Path("d.json"), records, images)
    assert str(images) in raised.value.hint


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ocr_vqa/images/1.jpg", "ocr_vqa/images/1.png"),
        ("vg/VG_100K_2/2.jpg", "vg/images/2.jpg"),
        ("vg/VG_100K/3.jpg", "vg/images/3.jpg"),
        ("vg/VG_100K/4.jpg", "vg/VG_100K/4.jpg"),
    ],
)
def test_published_names_lead_to_the_files_that_are_handed_out(
    images: Path, tokenizer: PreTrainedTokenizerBase, name: str, file: str
) -> None:
    (images / file).parent.mkdir(parents=True)
    (images / "red.png").rename(images / file)
    data = dataset(images, tokenizer, record("p", image=name))
    assert data.load_pixels(0, 32, "pad", MEAN).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "broken",
    [
        {"id": "b"},
        {"id": "b", "conversations": []},
        {"id": "b", "conversations": "text"},
        {"id": "b", "conversations": [{"from": "human"}]},
        {"id": "b", "conversations": [{"from": "human", "value": None}]},
    ],
)
def test_malformed_records_are_named(images: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"d\.json: record b"):
        check_records(Path("d.json"), [broken], images)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "[]"])
def test_files_that_are_not_llava_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"data\.json"):
        read_records(path)


def test_a_data_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([record("r", "caf\u00e9")], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match=r"data\.json.*UTF-8"):
        read_records(path)


def test_a_corrupt_picture_names_record_and_file(
    images: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = (GOLDEN / "preprocess" / "landscape_rgb.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("not a picture")
    data = dataset(images, tokenizer, record("c1", image="cut.png"), record("c2", image="text.png"))
    for position, (name, file) in enumerate([("c1", "cut.png"), ("c2", "text.png")]):
        with pytest.raises(InputError, match=name) as raised:
            data.load_pixels(position, 32, "pad", MEAN)
        assert file in raised.value.message


def test_a_decompression_bomb_is_refused(
    images: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(images, tokenizer, record("bomb", image="red.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match="bomb"):
        data.load_pixels(0, 32, "pad", MEAN)


def test_batches_pad_right_and_give_text_rows_a_blank_picture(
    images: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = dataset(
        images,
        tokenizer,
        record("a", "A long red answer, longer than the others.", image="red.png"),
        record("t"),
        record("b", image="red.png"),
    )
    batch = data.collate([0, 1, 2])
    longest = len(data.encoded[0].input_ids)
    assert batch.input_ids.shape == batch.labels.shape == (3, longest)
    assert batch.attention_mask.shape == (3, longest)
    assert batch.pictures == (0, None, 0)
    assert batch.record_ids == ("a", "t", "b")
    for row, encoded in enumerate(data.encoded):
        length = len(encoded.input_ids)
        assert batch.input_ids[row, :length].tolist() == encoded.input_ids
        assert batch.labels[row, :length].tolist() == encoded.labels
        assert (batch.labels[row, length:] == -100).all()
        assert batch.attention_mask[row].sum() == length
    assert data.modality_lengths()[1] < 0 < data.modality_lengths()[0]


def test_batches_are_cut_to_the_longest_sequence(
    images: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = dataset(
        images, tokenizer, record("a", "word " * 200, image="red.png"), model_max_length=40
    )
    assert data.collate([0]).input_ids.shape == (1, 40)
