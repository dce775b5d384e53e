"""Readers, checks and conversions of data sets, against the converters they replace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synth_agent import data
from synth_agent.data import Sample
from synth_agent.errors import InvalidInput

GOLDEN = Path(__file__).parent / "data" / "golden" / "dj_llava"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
ORIGINAL = json.loads((GOLDEN / "stage_1.json").read_text())
LLAVA = json.loads((GOLDEN / "llava_input.json").read_text())


def records(name: str) -> list[dict[str, Any]]:
    return [record for _, record in data.iter_records(GOLDEN / name)]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("kit_restore_questions", data.DJ_IMAGE_MARKER),
        ("restore_questions_with_plain_image_token", data.PLAIN_IMAGE_MARKER),
    ],
)
def test_restored_questions_equal_the_kits(name: str, token: str) -> None:
    made = list(data.restore_questions(records("restore_input.jsonl"), ORIGINAL, token))
    assert made == EXPECTED[name]
    assert json.dumps(made) == json.dumps(EXPECTED[name])


@pytest.mark.parametrize(
    ("name", "token", "only_first"),
    [
        ("dialog_default", data.PLAIN_IMAGE_MARKER, True),
        ("dialog_dj_token", data.DJ_IMAGE_MARKER, True),
        ("dialog_keep_all_images", data.PLAIN_IMAGE_MARKER, False),
    ],
)
def test_dialogs_equal_the_converters(name: str, token: str, only_first: bool) -> None:
    made = data.dialogs_to_llava(
        records("dialog_input.jsonl"), token, keep_only_first_image=only_first
    )
    assert json.dumps(list(made)) == json.dumps(EXPECTED[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {}),
        ("only_caption", {"only_captions": True}),
        ("split_chunk", {"split_chunks": True}),
        ("broadcast_before", {"split_chunks": True, "broadcast_image": "before"}),
        ("broadcast_follow", {"split_chunks": True, "broadcast_image": "follow"}),
        ("no_eoc_raw_id", {"end_with_chunk": False, "text_ids": False}),
    ],
)
def test_llava_to_dj_equals_the_converter(name: str, options: dict[str, Any]) -> None:
    made = list(data.llava_to_dj(LLAVA, **options))
    assert json.dumps(made) == json.dumps(EXPECTED[f"llava_to_dj_{name}"])


@pytest.mark.parametrize("case", EXPECTED["errors"], ids=lambda case: case["name"])
def test_inputs_that_the_converters_refuse_are_refused(
    case: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / Path(case["args"].get("target", "out.json")).name
    with pytest.raises(InvalidInput):
        if case["kind"] == "restore":
            data.write_llava(target, data.restore_questions(case["input"], ORIGINAL))
        elif case["kind"] == "dialog":
            data.write_llava(target, data.dialogs_to_llava(case["input"]))
        else:
            broadcast = "before" if case["args"].get("image_broadcast") else None
            list(data.llava_to_dj(case["input"], broadcast_image=broadcast))
    assert list(tmp_path.iterdir()) == []


def test_broadcast_after_puts_the_marker_behind_the_question() -> None:
    made = list(data.llava_to_dj(LLAVA[:1], split_chunks=True, broadcast_image="after"))
    assert "[[human]]: Where?\n<image>\n[[gpt]]" in made[0]["text"]


def test_samples_are_read_and_written_back(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "seed.jsonl",
        {"id": "1", "images": ["images/a.jpg"], "text": "<image>\nA caf\u00e9\u2028"},
        "",
        {"id": 2, "text": "", "__dj__stats__": {}},
    )
    samples = data.read_samples(path, unique_ids=True)
    assert samples == [
        Sample("1", ("images/a.jpg",), "<image>\nA caf\u00e9\u2028", 1),
        Sample(2, (), "", 3),
    ]
    copy = tmp_path / "deep" / "copy.jsonl"
    assert data.write_samples(copy, samples) == 2
    assert [s.as_record() for s in data.read_samples(copy)] == [s.as_record() for s in samples]


GOOD = {"id": "1", "images": ["a.jpg"], "text": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, column"),
        ("[]", "line 2 is not a JSON object"),
        ({**GOOD, "id": True}, "line 2, field id: True"),
        ({**GOOD, "id": ""}, "line 2, field id: ''"),
        ({**GOOD, "id": 1.5}, "line 2, field id: 1.5"),
        ({"images": [], "text": "x"}, "line 2, field id: None"),
        ({"id": "1", "images": []}, "line 2, field text: None"),
        ({**GOOD, "text": 3}, "line 2, field text: 3"),
        ({**GOOD, "text": "\ud83d"}, "line 2, field text: half of a surrogate pair"),
        ({**GOOD, "id": "a\udc00"}, "line 2, field id: half of a surrogate pair at position 1"),
        ({**GOOD, "images": ["a\ud800.jpg"]}, "line 2, field images: half of a surrogate pair"),
        ('{"id": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
        ('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2"),
        ({**GOOD, "images": "a.jpg"}, "line 2, field images: 'a.jpg' is not a list"),
        ({**GOOD, "images": [3]}, "line 2, field images: 3"),
        ({**GOOD, "images": [""]}, "line 2, field images: ''"),
        ({**GOOD, "images": ["/etc/passwd"]}, "line 2, field images: '/etc/passwd'"),
        ({**GOOD, "images": ["a/../../b"]}, "line 2, field images: 'a/../../b'"),
        ({**GOOD, "images": ["..\\b"]}, "line 2, field images"),
        ({**GOOD, "images": ["C:\\b"]}, "line 2, field images"),
        ({**GOOD, "images": ["http://host/a.jpg"]}, "line 2, field images"),
    ],
)
def test_bad_line_is_named_with_its_field(tmp_path: Path, line: object, message: str) -> None:
    path = write_lines(tmp_path / "seed.jsonl", GOOD, line)
    with pytest.raises(InvalidInput) as caught:
        data.read_samples(path)
    assert caught.value.message.startswith(str(path))
    assert message in caught.value.message
    assert caught.value.hint


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "seed.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(InvalidInput, match="line 2: invalid start byte"):
        data.read_samples(path)


def test_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "seed.jsonl", GOOD, {**GOOD, "id": 1})
    assert len(data.read_samples(path)) == 2
    with pytest.raises(InvalidInput, match="line 2, field id: 1 is also on line 1"):
        data.read_samples(path, unique_ids=True)


def test_empty_and_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidInput, match="No samples"):
        data.read_samples(tmp_path / "empty.jsonl")
    with pytest.raises(InvalidInput, match="Cannot read file"):
        data.read_samples(tmp_path / "absent.jsonl")


def test_unusable_images_are_listed_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(b"x")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    samples = [
        Sample("a", ("good.jpg",), "", 1),
        Sample("b", ("gone.jpg", "empty.jpg"), "", 2),
        Sample("c", ("folder",), "", 3),
        Sample("d", ("gone.jpg",), "", 4),
    ]
    found = data.unusable_images(samples, tmp_path)
    assert [(image.line, image.image, image.reason) for image in found] == [
        (2, "gone.jpg", "missing"),
        (2, "empty.jpg", "empty"),
        (3, "folder", "not a file"),
        (4, "gone.jpg", "missing"),
    ]


def test_mixed_image_markers_are_found_and_repaired() -> None:
    samples = [
        Sample("a", ("a",), "<image>\nx", 1),
        Sample("b", (), "no picture", 2),
        Sample("c", ("c",), "<__dj__image>\nx", 3),
    ]
    assert data.image_marker(samples[:2]) == "<image>"
    assert data.image_marker(samples[1:2]) is None
    with pytest.raises(InvalidInput, match="<image> on line 1, <__dj__image> on line 3"):
        data.image_marker(samples)
    with pytest.raises(InvalidInput, match=r"line 1, field text.*1 lines in all"):
        data.check_image_marker(samples, data.DJ_IMAGE_MARKER)
    repaired = [data.with_image_marker(sample, data.DJ_IMAGE_MARKER) for sample in samples]
    data.check_image_marker(repaired, data.DJ_IMAGE_MARKER)
    assert [sample.text for sample in repaired] == [
        "<__dj__image>\nx",
        "no picture",
        "<__dj__image>\nx",
    ]


def test_exported_paths_become_relative_by_row_id(tmp_path: Path) -> None:
    root = tmp_path / "real"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    seed = [Sample("a", ("images/1.jpg",), "x", 1), Sample("b", ("images/2.jpg",), "y", 2)]
    exported = [
        {"id": "b", "row_id": 1, "text": "y", "images": ["/elsewhere/images/2.jpg"]},
        {"id": "a", "row_id": 0, "text": "x2", "images": [f"{tmp_path}/link/made/3.jpg"]},
        {"id": "a", "row_id": 0, "text": "x3", "images": [f"{root}/made/4.jpg"], "extra": 1},
        {"id": "a", "row_id": 0, "text": "x4", "images": []},
    ]
    made = list(data.relative_samples(exported, seed, tmp_path / "link"))
    assert [sample.as_record() for sample in made] == [
        {"id": "b", "images": ["images/2.jpg"], "text": "y"},
        {"id": "a", "images": ["made/3.jpg"], "text": "x2"},
        {"id": "a", "images": ["made/4.jpg"], "text": "x3"},
        {"id": "a", "images": [], "text": "x4"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "text": "x", "images": []}, "field row_id: None"),
        ({"id": "a", "row_id": 1, "text": "x", "images": []}, "field row_id: 1"),
        ({"id": "a", "row_id": 0, "text": "x", "images": ["/etc/passwd"]}, "not under"),
        ({"id": "a", "row_id": 0, "text": "x", "images": ["../b.jpg"]}, "not under"),
    ],
)
def test_exported_row_that_cannot_be_mapped_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    seed = [Sample("a", ("images/1.jpg",), "x", 1)]
    with pytest.raises(InvalidInput) as caught:
        list(data.relative_samples([row], seed, tmp_path))
    assert message in caught.value.message


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "seed.jsonl"
    path.write_text("old")

    def failing() -> Any:
        yield Sample("a", (), "x", 1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        data.write_samples(path, failing())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[" + "9" * 5000 + "]"])
def test_llava_file_that_json_cannot_build_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=str(path)):
        data.read_llava(path)


def test_llava_file_is_ascii_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    made = list(data.restore_questions(records("restore_input.jsonl"), ORIGINAL))
    assert data.write_llava(path, made) == len(made)
    assert path.read_bytes().isascii()
    assert data.read_llava(path) == made


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "record 0 is not a JSON object"),
        ({"conversations": []}, "record 0, field id"),
        ({"id": 1, "conversations": []}, "record 0, field conversations"),
        ({"id": 1, "conversations": [{"from": "human"}]}, "conversations[0], field value"),
        ({"id": 1, "conversations": ["x"]}, "conversations[0] is not an object"),
        (
            {"id": 1, "image": "../x", "conversations": [{"from": "human", "value": "x"}]},
            "record 0, field image",
        ),
    ],
)
def test_bad_llava_record_is_named(tmp_path: Path, record: object, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(InvalidInput) as caught:
        data.read_llava(path)
    assert message in caught.value.message


def test_reading_data_imports_no_heavy_library() -> None:
    code = (
        "import sys, synth_agent.data; "
        "print([m for m in ('torch', 'data_juicer', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
