"""Checks and choices for seed sets that memory does not hold equal those for the others."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synth_agent.changes import CHANGES_NAME
from synth_agent.data import Sample, read_llava, restore_questions
from synth_agent.errors import InvalidInput
from synth_agent.recipes import Operator, Recipe, dump_recipe
from synth_agent.stages import large
from synth_agent.stages.large import Originals, check_seed, chosen_samples
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything many times."""
    monkeypatch.setattr(large, "_PART_SAMPLES", 3)
    monkeypatch.setattr(large, "_BLOCK_CHARACTERS", 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples with their pictures and questions."""
    originals, seed = [], []
    for number in range(10):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{number}.png")
        identity = number if number % 2 else f"sample {number}"
        question = {"from": "human", "value": f"<image>\nWhat is ] in “{number}”, {{?"}
        answer = {"from": "gpt", "value": f'Box \\ " {number}'}
        originals.append({"id": identity, "conversations": [question, answer]})
        seed.append({"id": identity, "images": [f"{number}.png"], "text": f"box {number}"})
    (tmp_path / "stage_1.json").write_text(json.dumps(originals, indent=1), "utf-8")
    _write(tmp_path, seed)
    return tmp_path


def _write(folder: Path, seed: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in seed)
    (folder / "seed.jsonl").write_text(lines, "utf-8")


def _seed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "seed.jsonl").read_text().splitlines()]


def _check(folder: Path) -> int:
    originals = Originals(folder / "stage_1.json", folder)
    return check_seed(folder / "seed.jsonl", folder, originals, lambda done: None)


def test_records_are_found_by_id(folder: Path) -> None:
    everything = read_llava(folder / "stage_1.json")
    originals = Originals(folder / "stage_1.json", folder)
    samples = [Sample(record["id"], (), "") for record in everything]
    assert originals.of(samples) == everything
    assert originals.of(samples[7:4:-1]) == everything[5:8]
    assert originals.of([samples[2], Sample("unknown", (), "")]) == [everything[2]]
    assert originals.of([]) == []


def test_the_last_record_of_an_id_counts(folder: Path) -> None:
    everything = read_llava(folder / "stage_1.json")
    last = {**everything[4], "conversations": everything[5]["conversations"]}
    (folder / "stage_1.json").write_text(json.dumps([*everything, last]), "utf-8")
    sample = Sample(everything[4]["id"], (), "a text")
    found = Originals(folder / "stage_1.json", folder).of([sample])
    made = [list(restore_questions([sample.as_record()], r)) for r in (found, [*everything, last])]
    assert made[0] == made[1]


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_an_empty_array_has_no_record(folder: Path, text: str) -> None:
    (folder / "stage_1.json").write_text(text)
    assert Originals(folder / "stage_1.json", folder).of([Sample("sample 0", (), "")]) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[{}", "[1]", '[{"id": 1}]', "[] 1", "[{} {}]", '[{"id": "1", ]', "[,]"]
)
def test_a_bad_array_is_refused_as_ever(folder: Path, text: str) -> None:
    (folder / "stage_1.json").write_text(text)
    with pytest.raises(InvalidInput):
        read_llava(folder / "stage_1.json")
    with pytest.raises(InvalidInput, match=r"stage_1\.json"):
        Originals(folder / "stage_1.json", folder)


def test_a_good_seed_set_is_counted(folder: Path) -> None:
    assert _check(folder) == 10


def test_a_repeated_id_is_named_with_both_lines(folder: Path) -> None:
    seed = _seed(folder)
    _write(folder, [*seed, seed[1]])
    with pytest.raises(InvalidInput, match=r"line 11, field id.*line 2"):
        _check(folder)


def test_an_id_without_a_question_and_a_lost_picture_are_named(folder: Path) -> None:
    seed = _seed(folder)
    _write(folder, [*seed[:9], {**seed[9], "id": "stranger"}])
    with pytest.raises(InvalidInput, match="stranger"):
        _check(folder)
    _write(folder, seed)
    (folder / "8.png").unlink()
    with pytest.raises(InvalidInput, match=r"8\.png: missing"):
        _check(folder)


def test_an_empty_seed_set_is_refused(folder: Path) -> None:
    _write(folder, [])
    with pytest.raises(InvalidInput, match="no record"):
        _check(folder)


@pytest.mark.parametrize("cap", [4, 100])
def test_files_equal_those_of_the_stage(folder: Path, cap: int) -> None:
    """Both ways run in processes of their own: Data-Juicer changes the one that it runs in."""
    seed = _seed(folder)
    for number in (3, 7):
        seed[number]["text"] = seed[2]["text"]
    _write(folder, seed)
    (folder / "synth.yaml").touch()
    options = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
    steps = (
        Operator("text_length_filter", {"min_len": 5, "num_proc": 0}),
        Operator("document_deduplicator", {"num_proc": 0}),
    )
    (folder / "mine.yaml").write_text(dump_recipe(Recipe("mine", "Mine", "", steps, options)))
    common = ["--recipe", "mine.yaml", "--seed", "seed.jsonl", "--images", "."]
    common += ["--original", "stage_1.json", "--cap", str(cap), "--progress", "progress.jsonl"]
    environment = stage_environment(Workspace(folder, Settings())) | {"PYTHONPATH": str(ROOT)}
    for way in (["-m", "synth_agent.stages.process"], ["-c", _LARGE]):
        output = ["--output", "whole" if way[0] == "-m" else "large"]
        command = [sys.executable, *way, *common, *output]
        done = subprocess.run(
            command, cwd=folder, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for name in ("processed.jsonl", "processed.json", "rows.json"):
        assert (folder / "large" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert _result(folder / "large") == _result(folder / "whole")
    # Examples of single samples are for data sets that a person looks through.
    names = {path.name for path in (folder / "whole").iterdir()} - {CHANGES_NAME}
    assert {path.name for path in (folder / "large").iterdir()} == names


_LARGE = """
import sys
from synth_agent.recipes import load_recipe
from synth_agent.stages import process, streaming
from synth_agent.stages.large import process_large
from synth_agent.stages.progress import StageProgress
streaming.stream_branch.__defaults__ = (3,)
arguments = process._parser().parse_args()
vars(arguments).update(executor="default", ray_address=None)
with StageProgress(arguments.progress) as progress:
    process_large(load_recipe(arguments.recipe), arguments, progress)
"""


def _result(output: Path) -> dict[str, Any]:
    """Return the result without how long the operators took."""
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    for operator in result["operators"]:
        del operator["seconds"]
    return result


class _Left:
    """What a recipe left: samples in seed order."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.num_rows = len(samples)

    def samples(self, images: Path) -> Any:
        return iter(self._samples)


def test_the_cap_draws_what_stage_1_draws() -> None:
    samples = [Sample(number, (), "") for number in range(50)]
    left: Any = _Left(samples)
    drawn = random.Random(1024).sample(range(50), 20)
    assert chosen_samples(left, Path(), 20, 1024) == [samples[place] for place in drawn]
    assert chosen_samples(left, Path(), 50, 1024) == samples
