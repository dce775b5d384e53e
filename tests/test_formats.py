"""Converting data sets both ways, Parquet as a seed set, and what `check-data` lists."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synth_agent.cli import main
from synth_agent.data import count_records, read_llava, read_samples
from synth_agent.data_check import check_data, find_layout
from synth_agent.errors import InvalidInput
from synth_agent.formats import Options, convert
from synth_agent.workspace import Workspace

CAPTIONS = [
    {"id": "001", "images": ["images/1.jpg"], "text": "<__dj__image>\na red cat <|__dj__eoc|>"},
    {"id": "002", "images": ["images/2.jpg"], "text": "<__dj__image>\nzwei Hüte <|__dj__eoc|>"},
]
ORIGINAL: list[dict[str, Any]] = [
    {
        "id": identity,
        "image": f"images/{identity[-1]}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is in {identity}?"},
            {"from": "gpt", "value": answer},
        ],
    }
    for identity, answer in (("001", "a red cat"), ("002", "zwei Hüte"))
]
TURNS = [
    {
        "id": 7,
        "image": "a/b.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWho?"},
            {"from": "gpt", "value": "Ada."},
            {"from": "human", "value": "When?"},
            {"from": "gpt", "value": "In 1843."},
        ],
    },
    {
        "id": 8,
        "conversations": [
            {"from": "human", "value": "Two and two?"},
            {"from": "gpt", "value": "Four."},
        ],
    },
]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def array(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_captions_there_and_back(tmp_path: Path, suffix: str) -> None:
    seed = lines(tmp_path / "seed.jsonl", CAPTIONS)
    options = Options(original=array(tmp_path / "stage_1.json", ORIGINAL))
    samples = tmp_path / f"samples.{suffix}"
    convert(seed, samples, options) if suffix == "parquet" else samples.write_bytes(
        seed.read_bytes()
    )
    there = convert(samples, tmp_path / "llava.json", options)
    assert (there.source, there.target) == ("samples", "conversations")
    assert (there.marker, there.changed) == ("<__dj__image>", ())
    assert read_llava(tmp_path / "llava.json") == ORIGINAL
    back = convert(tmp_path / "llava.json", tmp_path / "back.jsonl", Options(captions=True))
    assert back.changed == ()
    assert [sample.as_record() for sample in read_samples(tmp_path / "back.jsonl")] == CAPTIONS


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_dialogs_there_and_back(tmp_path: Path, suffix: str) -> None:
    source = array(tmp_path / "turns.json", TURNS)
    samples = tmp_path / f"turns.{suffix}"
    made = convert(source, samples, Options(keep_ids=True))
    assert made.changed == ()
    first = read_samples(samples)[0]
    assert first.text.startswith("[[human]]: <__dj__image>\nWho?\n[[gpt]]: Ada.\n[[human]]: When?")
    assert convert(samples, tmp_path / "again.json", Options()).changed == ()
    assert read_llava(tmp_path / "again.json") == TURNS


def test_ids_become_text_as_the_converter_makes_them(tmp_path: Path) -> None:
    convert(array(tmp_path / "t.json", TURNS), tmp_path / "t.jsonl", Options(marker="<image>"))
    samples = read_samples(tmp_path / "t.jsonl")
    assert [sample.id for sample in samples] == ["7", "8"]
    assert "<image>" in samples[0].text


def test_what_does_not_come_back_is_named(tmp_path: Path) -> None:
    padded = [{**CAPTIONS[0], "text": "<__dj__image>  a red cat<|__dj__eoc|>"}, CAPTIONS[1]]
    options = Options(original=array(tmp_path / "stage_1.json", ORIGINAL))
    made = convert(lines(tmp_path / "s.jsonl", padded), tmp_path / "l.json", options)
    assert made.changed == ("001",)


@pytest.mark.parametrize(
    ("texts", "title"),
    [
        (("<image>\na cat", "<__dj__image>\na hat"), "Mixed image markers"),
        (("<__dj__image>\na <__dj__image> cat", "a hat"), "Image marker inside a caption"),
    ],
)
def test_marker_mistakes_are_caught(tmp_path: Path, texts: tuple[str, str], title: str) -> None:
    records = [{**c, "text": text} for c, text in zip(CAPTIONS, texts, strict=True)]
    options = Options(original=array(tmp_path / "stage_1.json", ORIGINAL))
    with pytest.raises(InvalidInput) as caught:
        convert(lines(tmp_path / "s.jsonl", records), tmp_path / "l.json", options)
    assert caught.value.title == title
    assert not (tmp_path / "l.json").exists()


def test_samples_keep_their_marker_unless_another_is_asked_for(tmp_path: Path) -> None:
    records = [{"id": "0", "images": ["0.jpg"], "text": "<image>\na"}]
    seed = lines(tmp_path / "s.jsonl", records)
    convert(seed, tmp_path / "same.jsonl", Options())
    assert read_samples(tmp_path / "same.jsonl")[0].text == "<image>\na"
    made = convert(seed, tmp_path / "other.jsonl", Options(marker="<__dj__image>"))
    assert made.marker == "<__dj__image>"
    assert read_samples(tmp_path / "other.jsonl")[0].text == "<__dj__image>\na"


def test_fields_that_are_left_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weighed = {**TURNS[0], "model": "m"}
    weighed["conversations"] = [{**m, "weight": 1} for m in TURNS[0]["conversations"]]
    source = array(tmp_path / "t.json", [TURNS[0], weighed])
    made = convert(source, tmp_path / "t.jsonl", Options())
    assert made.left_out == ("model", "conversations.weight")
    records = [{"id": "0", "images": [], "text": "a", "meta": {"from": "x"}}]
    seed = lines(tmp_path / "s.jsonl", records)
    assert main(["convert", str(seed), str(tmp_path / "s.parquet")]) == 0
    said = capsys.readouterr().out
    assert "left out, as samples have no such fields: meta" in said
    assert "apart from them, every record comes back as it was" in said


def test_captions_need_their_questions(tmp_path: Path) -> None:
    seed = lines(tmp_path / "seed.jsonl", CAPTIONS)
    with pytest.raises(InvalidInput, match="captions"):
        convert(seed, tmp_path / "l.json", Options())
    with pytest.raises(InvalidInput, match="no suffix"):
        convert(seed, tmp_path / "l", Options())
    with pytest.raises(InvalidInput, match="Same file"):
        convert(seed, seed, Options())


def test_absolute_paths_become_relative(tmp_path: Path) -> None:
    exported = [{**c, "images": [str(tmp_path / c["images"][0])]} for c in CAPTIONS]
    source = lines(tmp_path / "exported.jsonl", exported)
    with pytest.raises(InvalidInput, match="outside the image folder"):
        convert(source, tmp_path / "s.jsonl", Options())
    convert(source, tmp_path / "s.jsonl", Options(images=tmp_path))
    assert read_samples(tmp_path / "s.jsonl")[1].images == ("images/2.jpg",)


def test_parquet_is_read_wherever_jsonl_is(tmp_path: Path) -> None:
    seed = lines(tmp_path / "seed.jsonl", CAPTIONS)
    convert(seed, tmp_path / "seed.parquet", Options())
    assert read_samples(tmp_path / "seed.parquet", unique_ids=True) == read_samples(seed)
    assert count_records(tmp_path / "seed.parquet") == count_records(seed) == 2
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(InvalidInput, match="broken.parquet"):
        read_samples(broken)


def test_ids_of_two_kinds_are_no_column(tmp_path: Path) -> None:
    records = [CAPTIONS[0], {**CAPTIONS[1], "id": 2}]
    with pytest.raises(InvalidInput, match="mixed.parquet"):
        convert(lines(tmp_path / "s.jsonl", records), tmp_path / "mixed.parquet", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A seed set of 14 samples: twelve pictures missing, one broken, one whole."""
    root = tmp_path / "pretrain_stage_1"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(root / "images" / "0.jpg")
    (root / "images" / "1.jpg").write_bytes((root / "images" / "0.jpg").read_bytes()[:200])
    records = [
        {"id": f"{i}", "images": [f"images/{i}.jpg"], "text": "<__dj__image>\na"} for i in range(14)
    ]
    lines(root / "any_name.jsonl", records)
    array(root / "stage_1.json", [{**ORIGINAL[0], "id": str(i)} for i in range(14)])
    return root


def test_a_folder_is_a_layout(folder: Path) -> None:
    layout = find_layout(folder)
    assert (layout.samples.name, layout.images) == ("any_name.jsonl", folder)
    assert layout.original == folder / "stage_1.json"
    seen: list[tuple[int, int]] = []
    report = check_data(layout, lambda done, total: seen.append((done, total)))
    assert (report.num_samples, report.num_pictures, report.problems) == (14, 14, ())
    assert [one.reason for one in report.unusable].count("missing") == 12
    assert report.unusable[0].reason.startswith("unreadable")
    assert seen[-1] == (14, 14)
    (folder / "other.parquet").touch()
    with pytest.raises(InvalidInput, match=r"any_name\.jsonl, other\.parquet"):
        find_layout(folder)


def test_records_that_training_cannot_use_are_listed(folder: Path) -> None:
    records = [
        {"id": "0", "images": ["images/0.jpg"], "text": "<image>\na"},
        {"id": "0", "images": ["images/0.jpg"], "text": "<__dj__image>\na"},
        {"id": "99", "images": ["images/0.jpg"], "text": "no marker"},
    ]
    lines(folder / "any_name.jsonl", records)
    report = check_data(find_layout(folder), lambda done, total: None)
    repeated, markers, unmarked, unknown = report.problems
    assert "1 repeated ids: '0' on lines 1 and 2" in repeated
    assert "Mixed image markers" in markers
    assert "line 3" in unmarked
    assert "no question in stage_1.json: line 3" in unknown


@pytest.mark.parametrize(
    ("images", "text", "told"),
    [
        (1, "<__dj__image>\na <__dj__image>", "more or fewer image markers than pictures"),
        (1, "<__dj__image>\na <__dj__image> b", "inside the caption"),
        (1, "<__dj__image>\na <|__dj__eoc|> b <|__dj__eoc|>", "inside the caption"),
        (2, "<__dj__image>\n<__dj__image>\na", "several distinct pictures"),
        (1, "<__dj__image>\na <|__dj__eoc|>", ""),
        (1, "<image>\na", "texts say <image>, and recipes look for <__dj__image>"),
        (1, "[[human]]: <__dj__image>\nq\n[[gpt]]: a <|__dj__eoc|>", ""),
    ],
)
def test_texts_that_training_would_misread_are_listed(
    folder: Path, images: int, text: str, told: str
) -> None:
    named = [f"images/{number}.jpg" for number in range(images)]
    lines(folder / "any_name.jsonl", [{"id": "0", "images": named, "text": text}])
    problems = check_data(find_layout(folder), lambda done, total: None).problems
    assert [told in problem for problem in problems if told in problem] == ([True] if told else [])
    assert bool(problems) == bool(told)


def test_the_seed_sets_pictures_and_questions_may_be_elsewhere(
    git_workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(git_workspace.root)
    seed = git_workspace.path(git_workspace.settings.data.seed)
    seed.parent.mkdir(parents=True)
    lines(seed, [{"id": "0", "images": ["0.png"], "text": "<__dj__image>\na"}])
    array(git_workspace.path(git_workspace.settings.data.original), [{**ORIGINAL[0], "id": "0"}])
    Image.new("RGB", (4, 4)).save(seed.parent / "0.png")
    assert main(["check-data"]) == 0
    assert main(["check-data", "--images", str(tmp_path)]) == 1
    assert "1 pictures missing" in capsys.readouterr().out
    other = array(tmp_path / "other.json", [{**ORIGINAL[0], "id": "7"}])
    assert main(["check-data", "--original", str(other)]) == 1
    assert "no question in other.json" in capsys.readouterr().out


def test_names_reach_the_terminal_as_text(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    record = {"id": "a\x1b]0;b\x07\n", "images": ["\x1b[2J\u202e.png"], "text": "<__dj__image>\nc"}
    lines(folder / "any_name.jsonl", [record])
    assert main(["check-data", str(folder)]) == 1
    told = capsys.readouterr()
    assert r"id a\u001b]0;b\u0007\n: \u001b[2J\u202e.png: missing" in told.out
    assert len((tmp_path / "unusable-pictures.tsv").read_text().splitlines()) == 2


def test_the_command_names_ten_and_lists_the_rest(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check-data", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "12 pictures missing, 1 unreadable" in out
    assert out.count("  line ") == 10
    assert len((tmp_path / "unusable-pictures.tsv").read_text().splitlines()) == 14
    assert main(["check-data", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == 12


def test_the_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = array(tmp_path / "turns.json", TURNS)
    where = ["-w", str(tmp_path)]
    assert main([*where, "convert", str(source), str(tmp_path / "t.parquet")]) == 0
    assert "every record comes back" in capsys.readouterr().out
    assert main([*where, "convert", str(source), str(tmp_path / "t.txt")]) == 2
