"""What training data shares with evaluation sets: pictures by bytes and looks, texts by words."""

import base64
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synth_agent.contamination import (
    NEAR_BITS,
    Matcher,
    TrainingSample,
    known_overlaps,
    overlap,
    overlaps,
    training_hashes,
)
from synth_agent.contamination_report import run_overlaps
from synth_agent.digests import Digests
from synth_agent.errors import InvalidInput
from synth_agent.evaluation_sets import EvaluationSet, evaluation_sets
from synth_agent.pictures import hash_bytes, hash_file, near_hashes, unreadable
from synth_agent.workspace import Workspace, open_workspace

QUESTION = "what is the large number printed on the yellow bus in front"


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Return a picture with as much structure as a photograph has."""
    cells = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two benchmarks of one picture each, and three training pictures: equal, near, another."""
    root = tmp_path / "w"
    for folder in ("textvqa/train_images", "mmbench", "seed"):
        (root / "data" / folder).mkdir(parents=True)
    (root / "synth.yaml").write_text(
        "evaluate:\n  textvqa:\n    annotations: data/textvqa/val.json\n    questions: null\n"
        "    images: data/textvqa/train_images\n  mmbench:\n    questions: data/mmbench/dev.tsv\n"
    )
    one = encoded(picture(1), 95)
    (root / "data/textvqa/train_images/aa.jpg").write_bytes(one)
    entries = [
        {"image_id": "aa", "question": QUESTION, "answers": ["12"] * 10},
        {"image_id": "gone", "question": "which brand?", "answers": ["x"] * 10},
    ]
    (root / "data/textvqa/val.json").write_text(json.dumps({"data": entries}))
    image = base64.b64encode(encoded(picture(2), 95)).decode()
    table = "index\tquestion\tA\tB\tanswer\timage\n"
    table += f"0\tIs it red?\tyes\tno\tA\t{image}\n1000000\tIs it red?\tno\tyes\tB\t0\n"
    (root / "data/mmbench/dev.tsv").write_text(table)
    (root / "data/seed/equal.jpg").write_bytes(one)
    (root / "data/seed/near.jpg").write_bytes(encoded(picture(2).resize((200, 150)), 60))
    (root / "data/seed/other.jpg").write_bytes(encoded(picture(3), 90))
    return open_workspace(root)


SAMPLES = (
    TrainingSample("a", "<__dj__image>\na bus <|__dj__eoc|>", ("equal.jpg",)),
    TrainingSample("b", "<__dj__image>\nhere is the large number printed on the", ("near.jpg",)),
    TrainingSample("c", "It says so. Which brand? None.", ("other.jpg", "absent.jpg")),
    TrainingSample("d", "the LARGE number, printed on the Yellow bus!", ()),
)


def sets_of(workspace: Workspace) -> list[EvaluationSet]:
    settings = workspace.settings.evaluate.model_dump(mode="json")
    return evaluation_sets(workspace, settings, Digests(workspace))


def test_pictures_and_texts_are_found(workspace: Workspace) -> None:
    textvqa, mmbench = sets_of(workspace)
    assert (len(textvqa.pictures), textvqa.missing_pictures) == (1, 1)
    assert (len(mmbench.pictures), mmbench.questions) == (1, ("Is it red?",))
    root = workspace.root / "data" / "seed"
    hashes = training_hashes(SAMPLES, root, {})
    first, second = overlap(SAMPLES, hashes, textvqa), overlap(SAMPLES, hashes, mmbench)
    assert (first.pictures, first.unread_pictures) == (3, 1)
    assert (first.equal_pictures, first.near_pictures, first.texts) == (1, 0, 2)
    assert (first.flagged_samples, first.examples) == (3, ("a", "c", "d"))
    assert (second.equal_pictures, second.near_pictures, second.texts) == (0, 1, 0)
    assert second.examples == ("b",)
    assert (
        "1 equal and 0 near of 3 pictures, 2 matching texts of 4, 1 pictures unread; 1 of 2 "
        in (first.line())
    )
    assert "1 of 2 evaluation pictures unread" in first.short()
    assert "evaluation" not in second.line()


def test_results_are_kept_until_something_changes(workspace: Workspace) -> None:
    root = workspace.root / "data" / "seed"
    calls = []

    def images() -> dict[str, object]:
        calls.append(1)
        return training_hashes(SAMPLES, root, {})  # type: ignore[return-value]

    sets = sets_of(workspace)
    assert known_overlaps(workspace, "k", sets) is None
    first = overlaps(workspace, SAMPLES, "k", sets, images)  # type: ignore[arg-type]
    assert overlaps(workspace, SAMPLES, "k", sets_of(workspace), images) == first  # type: ignore[arg-type]
    assert known_overlaps(workspace, "k", sets) == first
    assert len(calls) == 1
    (workspace.root / "data/textvqa/train_images/aa.jpg").write_bytes(encoded(picture(3), 95))
    changed = overlaps(workspace, SAMPLES, "k", sets_of(workspace), images)  # type: ignore[arg-type]
    assert len(calls) == 2
    assert (changed[0].equal_pictures, changed[0].near_pictures) == (0, 1)
    assert changed[1] == first[1]


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("The large number printed on the yellow bus.", True),
        ("The large number printed on the blue bus.", False),
        ("[[human]]: is it RED?\n[[gpt]]: yes", True),
        ("I wonder whether it is red?", False),
        ("a tall man in a dark coat near the river", True),
        ("", False),
    ],
)
def test_the_rule_for_texts(text: str, matches: bool) -> None:
    matcher = Matcher(
        [QUESTION, "Is it red?", ""], ["A tall man in a dark coat, near the river bank", "yes"]
    )
    assert matcher(text) is matches


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("<__dj__image>\nWhat is 3.5 + 2? 5.5", True),
        ("[[human]]: is it Dr. Who or a St.? [[gpt]]: no", True),
        ("Is it Dr. Nobody or a St.?", False),
        ("请看。图中有什么动物？一只猫。", True),
        ("图中有什么植物？一只猫。", False),
        ("a word. The word is", True),
    ],
)
def test_a_whole_question_is_found_whatever_marks_are_in_it(text: str, matches: bool) -> None:
    questions = [
        "What is 3.5 + 2?",
        "Is it Dr. Who, or a St.?",
        "图中有什么动物？",
        "The word is ____.",
    ]
    assert Matcher(questions, [])(text) is matches


@pytest.mark.parametrize(
    "prompt",
    [
        "which brand?\nReference OCR token: a, b\nAnswer with one word.",
        "Reference OCR token: a, b\nwhich brand?\nAnswer with one word.",
        "OCR tokens: a, b Question: which brand? Short answer:",
        "which brand?",
    ],
)
def test_prompts_are_cut_to_their_question(workspace: Workspace, prompt: str) -> None:
    line = json.dumps({"question_id": "aa", "image": "aa.jpg", "text": prompt})
    (workspace.root / "data/textvqa/q.jsonl").write_text(line + "\n")
    settings = workspace.settings.evaluate.model_dump(mode="json")
    settings["textvqa"]["questions"] = "data/textvqa/q.jsonl"
    textvqa = evaluation_sets(workspace, settings, Digests(workspace))[0]
    assert textvqa.questions == ("which brand?",)
    assert textvqa.missing_pictures == 0


def test_pictures_that_a_recipe_made_are_compared(workspace: Workspace) -> None:
    made = workspace.root / "artifacts" / "processed" / "k"
    (made / "images" / "synthetic_images").mkdir(parents=True)
    record = {"id": "a", "images": ["synthetic_images/x.jpg"], "text": "<__dj__image>\na"}
    (made / "processed.jsonl").write_text(json.dumps(record) + "\n")
    one = (workspace.root / "data/textvqa/train_images/aa.jpg").read_bytes()
    (made / "images" / "synthetic_images" / "x.jpg").write_bytes(one)
    settings = workspace.settings.model_dump(mode="json")
    run: Any = SimpleNamespace(
        id="0001-made",
        stages={"process": SimpleNamespace(output="artifacts/processed/k")},
        plan=SimpleNamespace(proposal=SimpleNamespace(settings=settings)),
    )
    found = run_overlaps(workspace, run, None, Digests(workspace))[0]
    assert (found.equal_pictures, found.pictures, found.unread_pictures) == (1, 1, 0)


def test_a_missing_file_is_named(workspace: Workspace) -> None:
    (workspace.root / "data/mmbench/dev.tsv").unlink()
    with pytest.raises(InvalidInput, match=r"dev\.tsv"):
        sets_of(workspace)


def test_near_hashes_are_those_of_every_pair() -> None:
    draw = random.Random(4)
    references = [draw.getrandbits(64) for _ in range(300)]
    hashes = [draw.getrandbits(64) for _ in range(200)]
    for reference in references[:200]:
        flipped = reference
        for bit in draw.sample(range(64), draw.randrange(0, 9)):
            flipped ^= 1 << bit
        hashes.append(flipped)
    expected = [any((h ^ r).bit_count() <= NEAR_BITS for r in references) for h in hashes]
    assert 50 < sum(expected) < 200
    assert near_hashes(hashes, references, NEAR_BITS).tolist() == expected
    assert not near_hashes(hashes, [], NEAR_BITS).any()


def test_the_hash_is_of_the_looks(tmp_path: Path) -> None:
    one = hash_bytes(encoded(picture(5), 95))
    other = hash_bytes(encoded(picture(5).resize((320, 240)), 50))
    assert one.digest != other.digest
    assert (one.dhash ^ other.dhash).bit_count() <= NEAR_BITS
    assert (one.dhash ^ hash_bytes(encoded(picture(6), 95)).dhash).bit_count() > 10
    gradient = Image.linear_gradient("L").rotate(90)
    gradient.save(tmp_path / "g.png")
    assert hash_file(tmp_path / "g.png").dhash in (0, 2**64 - 1)
    assert hash_file(tmp_path / "g.png").is_flat


def test_why_a_picture_cannot_be_read(tmp_path: Path) -> None:
    whole = encoded(picture(7), 90)
    contents = {"whole": whole, "cut": whole[:500], "empty": b"", "text": b"no picture"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: tmp_path / name for name in (*contents, "absent")}
    reasons = unreadable(paths)
    assert set(reasons) == {"cut", "empty", "text", "absent"}
    assert (reasons["absent"], reasons["empty"]) == ("missing", "empty")
