"""The evaluation program on a tiny model: files, scores, resuming, and what users get wrong."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from mgm import evaluate, generate, mmbench, textvqa
from mgm.benchmarks import TextVQA
from mgm.checkpoint import load_full, save_full, save_projector
from mgm.errors import InputError
from mgm.lora import attach_lora, merge_lora, save_lora
from mgm.predictions import Predictions

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "model_a"
REPOSITORY = Path(__file__).parent.parent.parent


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mgm-tiny"
    model = load_full(GOLDEN, torch.float32, weights=GOLDEN / "weights.safetensors")
    save_full(model, folder, AutoTokenizer.from_pretrained(GOLDEN))
    return folder


@pytest.fixture(scope="module")
def textvqa_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Nine questions about four pictures."""
    folder = tmp_path_factory.mktemp("textvqa")
    images = folder / "images"
    images.mkdir()
    entries = []
    for number in range(9):
        name = f"p{number % 4}"
        (images / f"{name}.png").write_bytes(picture(number % 4))
        answers = ["stop"] * 6 + [f"word{number}"] * 4
        question = "What " + "does it say " * (number % 3 + 1) + str(number) + "?"
        entries.append({"image_id": name, "question": question, "answers": answers})
    path = folder / "val.json"
    path.write_text(json.dumps({"data": entries}))
    return path, images


@pytest.fixture(scope="module")
def mmbench_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions with two rotations each."""
    path = tmp_path_factory.mktemp("mmbench") / "mmbench_mini.tsv"
    columns = "index question hint A B C D answer category image source l2-category comment split"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns.split(), delimiter="\t")
        writer.writeheader()
        for number in range(3):
            for rotation in range(2):
                options = {"A": "red", "B": "blue"} if rotation == 0 else {"A": "blue", "B": "red"}
                writer.writerow(
                    {
                        "index": number + rotation * mmbench.ROTATION_OFFSET,
                        "question": f"Which color is it {number}?",
                        **options,
                        "answer": "A" if rotation == 0 else "B",
                        "category": ("color", "shape")[number % 2],
                        "l2-category": "coarse_perception",
                        "image": base64.b64encode(picture(number)).decode(),
                        "split": "dev",
                    }
                )
    return path


def run_textvqa(checkpoint: Path, files: tuple[Path, Path], output: Path, *more: str) -> int:
    questions, images = files
    flags = {"questions": questions, "images": images, "checkpoint": checkpoint, "output": output}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    common = ["--max-new-tokens", "6", "--device", "cpu", "--dtype", "float32"]
    return evaluate.main(["--benchmark", "textvqa", *given, *common, *more])


def run_mmbench(checkpoint: Path, questions: Path, output: Path, *more: str) -> int:
    flags = {"questions": questions, "checkpoint": checkpoint, "output": output}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    common = ["--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"]
    return evaluate.main(["--benchmark", "mmbench", *given, *common, *more])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_textvqa_run_writes_predictions_kit_file_and_score(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    progress = tmp_path / "progress.jsonl"
    code = run_textvqa(checkpoint, textvqa_files, tmp_path, "--progress", str(progress))
    assert code == 0
    lines = lines_of(tmp_path / "predictions.jsonl")
    annotations = textvqa.read_annotations(textvqa_files[0])
    assert [line["question_id"] for line in lines] == [a.image_id for a in annotations]
    for line, annotation in zip(lines, annotations, strict=True):
        assert line["prompt"] == textvqa.prompt_text(annotation.question)
        assert line["score"] == textvqa.accuracy(line["prediction"], annotation.answers)
    assert len({line["key"] for line in lines}) == 9
    score = json.loads((tmp_path / "score.json").read_text())
    mean = 100 * sum(line["score"] for line in lines) / 9
    assert score["score_percent"] == pytest.approx(mean)
    assert score["num_questions"] == 9
    assert score["metric"] == "vqa_accuracy"
    assert score["split"] == "val"
    assert score["chance_percent"] == 100
    assert score["predictions_sha256"] == sha256(tmp_path / "predictions.jsonl")
    assert score["scorer"]["sha256"] == sha256(Path(textvqa.__file__))
    kit = lines_of(tmp_path / "bm1.jsonl")
    assert [line["text"] for line in kit] == [line["prediction"] for line in lines]
    assert kit[0]["model_id"] == "mgm-tiny"
    assert not (tmp_path / "predictions.partial.jsonl").exists()
    records = lines_of(progress)
    assert (records[-1]["step"], records[-1]["total"], records[-1]["unit"]) == (9, 9, "questions")
    assert records[-1]["samples_per_second"] > 0


def test_fast_numerics_answer_like_the_reference(
    checkpoint: Path, textvqa_files: tuple[Path, Path], mmbench_file: Path, tmp_path: Path
) -> None:
    for name in ("fast", "reference"):
        more = ("--numerics", name, "--batch-size", "4")
        assert run_textvqa(checkpoint, textvqa_files, tmp_path / name / "t", *more) == 0
        assert run_mmbench(checkpoint, mmbench_file, tmp_path / name / "m", *more) == 0
        score = json.loads((tmp_path / name / "t" / "score.json").read_text())
        assert score["decoding"]["numerics"] == name
    for benchmark in "tm":
        fast, reference = (
            (tmp_path / name / benchmark / "predictions.jsonl").read_bytes()
            for name in ("fast", "reference")
        )
        assert fast == reference


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_mmbench_run_writes_predictions_kit_files_and_score(
    checkpoint: Path, mmbench_file: Path, tmp_path: Path
) -> None:
    assert run_mmbench(checkpoint, mmbench_file, tmp_path) == 0
    lines = lines_of(tmp_path / "predictions.jsonl")
    assert [line["group"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["answer"] for line in lines] == ["A", "B"] * 3
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["metric"] == "circular_exact_match"
    assert score["num_questions"] == 6
    assert score["chance_percent"] == 25
    assert score["metrics"]["vanilla_chance_percent"] == 50
    assert score["categories"]["color"]["num_questions"] == 2
    assert score["metrics"]["vanilla_percent"] == pytest.approx(
        100 * sum(line["score"] for line in lines) / 6
    )
    kit = lines_of(tmp_path / "answers" / "mmbench_mini" / "mgm-tiny.jsonl")
    assert [line["text"] for line in kit] == [line["prediction"] for line in lines]
    assert (tmp_path / "answers_upload" / "mmbench_mini" / "mgm-tiny.xlsx").is_file()


def test_predictions_do_not_depend_on_the_batch_size(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    made = []
    for size in ("1", "4", "32"):
        folder = tmp_path / size
        assert run_textvqa(checkpoint, textvqa_files, folder, "--batch-size", size) == 0
        made.append((folder / "predictions.jsonl").read_bytes())
    assert made[0] == made[1] == made[2]


def test_scores_are_those_of_the_predictions(
    checkpoint: Path,
    mmbench_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of three questions answered right in both rotations, the third in one."""
    texts = iter(["A", "B", "A", "B", "A", "A"])
    table = mmbench.read_questions(mmbench_file)
    benchmark = evaluate.open_benchmark(
        evaluate.EvaluateSettings("mmbench", mmbench_file, tmp_path, checkpoint=checkpoint)
    )
    result = benchmark.score(list(texts))
    assert len(table) == 6
    assert result.score_percent == pytest.approx(200 / 3)
    assert result.metrics["vanilla_percent"] == pytest.approx(500 / 6)
    assert result.categories["color"] == {"score_percent": 50.0, "num_questions": 2}
    assert result.categories["shape"] == {"score_percent": 100.0, "num_questions": 1}


@pytest.fixture(scope="module")
def parts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of the same model in three folders."""
    root = tmp_path_factory.mktemp("parts")
    model = load_full(checkpoint)
    model.language_model.save_pretrained(root / "gemma")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(root / "gemma")
    model.vision_tower.clip.save_pretrained(root / "clip")
    (root / "convnext").mkdir()
    sizes = model.config.high_resolution
    config = {"model_type": "convnext", "patch_size": 4, **sizes}
    (root / "convnext" / "config.json").write_text(json.dumps(config))
    save_file(model.high_resolution_tower.state_dict(), root / "convnext" / "model.safetensors")
    flags = ["--language-model", str(root / "gemma"), "--vision-tower", str(root / "clip")]
    return [*flags, "--high-resolution-tower", str(root / "convnext")]


def run_with(model_flags: list[str], files: tuple[Path, Path], output: Path) -> int:
    flags = ["--benchmark", "textvqa", "--questions", str(files[0]), "--images", str(files[1])]
    flags += ["--output", str(output), "--max-new-tokens", "6", "--dtype", "float32"]
    return evaluate.main([*flags, "--device", "cpu", *model_flags])


def test_parts_and_projector_answer_like_the_whole_checkpoint(
    checkpoint: Path, parts: list[str], textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    save_projector(load_full(checkpoint), tmp_path / "mm_projector.bin")
    flags = [*parts, "--projector", str(tmp_path / "mm_projector.bin")]
    assert run_with(flags, textvqa_files, tmp_path / "parts") == 0
    assert run_textvqa(checkpoint, textvqa_files, tmp_path / "whole") == 0
    made = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("parts", "whole")]
    assert made[0] == made[1]


def test_lora_folder_answers_like_its_merged_checkpoint(
    checkpoint: Path, parts: list[str], textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load_full(checkpoint)
    attach_lora(model, rank=4, alpha=8)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, tmp_path / "lora")
    merge_lora(model)
    save_full(model, tmp_path / "merged", AutoTokenizer.from_pretrained(checkpoint))
    flags = [*parts, "--checkpoint", str(tmp_path / "lora")]
    assert run_with(flags, textvqa_files, tmp_path / "a") == 0
    assert run_textvqa(tmp_path / "merged", textvqa_files, tmp_path / "b") == 0
    assert run_textvqa(checkpoint, textvqa_files, tmp_path / "c") == 0
    made = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in "abc"]
    assert made[0] == made[1] != made[2]


def test_lora_folder_without_its_parts_is_refused(
    textvqa_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    tokenizer = ["--tokenizer", str(GOLDEN)]
    flags = ["--checkpoint", str(tmp_path / "lora"), *tokenizer]
    assert run_with(flags, textvqa_files, tmp_path / "out") == 2
    assert "--language-model" in capsys.readouterr().err


def test_question_file_joins_with_its_annotations(
    textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    annotations, images = textvqa_files
    made = TextVQA(annotations, images)
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": line["question_id"], "image": line["image"], "text": line["prompt"]}
        for line in made.prediction_lines([""] * 9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    joined = TextVQA(path, images, annotations)
    assert joined.items == made.items
    assert joined.score(["stop"] * 9) == made.score(["stop"] * 9)
    with pytest.raises(InputError, match="--annotations"):
        TextVQA(path, images)


def test_ocr_tokens_enter_the_prompt_when_given(
    textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "ocr.json"
    path.write_text(json.dumps({"data": [{"image_id": "p1", "ocr_tokens": ["STOP", "4"]}]}))
    benchmark = TextVQA(*textvqa_files, ocr_tokens=path)
    assert "\nReference OCR token: STOP, 4\n" in benchmark.items[1].text
    assert "\nReference OCR token: \n" in benchmark.items[0].text
    assert all("OCR" not in item.text for item in TextVQA(*textvqa_files).items)


def test_repeated_question_has_a_key_of_its_own(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    document = json.loads(textvqa_files[0].read_text())
    document["data"].append(document["data"][0])
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    benchmark = TextVQA(path, textvqa_files[1])
    keys = [line["key"] for line in benchmark.prediction_lines(["stop"] * 10)]
    assert keys[0] == "p0/what does it say 0?"
    assert keys[9] == "p0/what does it say 0?#2"


def test_settings_may_come_from_a_file_and_flags_win(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tmp_path / "evaluate.yaml"
    settings = {
        "benchmark": "textvqa",
        "questions": str(textvqa_files[0]),
        "images": str(textvqa_files[1]),
        "checkpoint": str(checkpoint),
        "output": str(tmp_path / "out"),
        "max_new_tokens": 6,
        "batch_size": 2,
        "model_id": "from file",
    }
    config.write_text(json.dumps(settings))
    assert evaluate.main(["--config", str(config), "--model-id", "from flag"]) == 0
    score = json.loads((tmp_path / "out" / "score.json").read_text())
    assert score["decoding"]["batch_size"] == 2
    assert lines_of(tmp_path / "out" / "bm1.jsonl")[0]["model_id"] == "from flag"


def test_run_killed_in_the_middle_continues_to_the_same_files(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--batch-size", "1", "--max-new-tokens", "40")
    assert run_textvqa(checkpoint, textvqa_files, whole, *more) == 0
    questions, images = textvqa_files
    command = [sys.executable, "-m", "mgm.evaluate", "--benchmark", "textvqa"]
    command += ["--questions", str(questions), "--images", str(images)]
    command += ["--checkpoint", str(checkpoint), "--output", str(killed)]
    command += ["--device", "cpu", "--dtype", "float32", *more]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = killed / "predictions.partial.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "score.json").exists()
    done = partial.read_bytes().count(b"\n") - 1
    assert 2 <= done < 9
    with partial.open("ab") as file:
        file.write(b'{"answers": [[0, "cut o')
    progress = tmp_path / "progress.jsonl"
    assert run_textvqa(checkpoint, textvqa_files, killed, *more, "--progress", str(progress)) == 0
    assert lines_of(progress)[0]["step"] >= done
    for name in ("predictions.jsonl", "bm1.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_answers_of_another_model_are_not_continued(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    partial = Predictions(tmp_path / "predictions.partial.jsonl", "another run")
    partial.add(dict.fromkeys(range(9), "wrong"))
    partial.close()
    assert run_textvqa(checkpoint, textvqa_files, tmp_path) == 0
    assert "wrong" not in {line["prediction"] for line in lines_of(tmp_path / "predictions.jsonl")}


def test_partial_file_keeps_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    partial = Predictions(path, "x")
    partial.add({3: "a", 1: "b\n"})
    partial.add({0: "c"})
    partial.close()
    path.write_bytes(path.read_bytes()[:-4])
    again = Predictions(path, "x")
    assert again.answers == {3: "a", 1: "b\n"}
    again.add({2: "d"})
    again.close()
    third = Predictions(path, "x")
    third.close()
    assert third.answers == {3: "a", 1: "b\n", 2: "d"}
    for line in (
        '{"other": 1}',
        '{"answers": 5}',
        '{"answers": [[1, 2]]}',
        '{"answers": [["x", "y"]]}',
    ):
        whole = path.read_bytes()
        path.write_text(whole.decode() + line + "\n")
        damaged = Predictions(path, "x")
        damaged.close()
        assert damaged.answers == third.answers
        assert path.read_bytes() == whole


def test_old_score_does_not_outlive_a_failed_run(
    checkpoint: Path,
    textvqa_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_textvqa(checkpoint, textvqa_files, tmp_path) == 0

    def fail(*arguments: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(generate.Answerer, "answer_batches", fail)
    with pytest.raises(RuntimeError):
        run_textvqa(checkpoint, textvqa_files, tmp_path)
    assert not (tmp_path / "score.json").exists()


def broken(name: str, folder: Path, files: tuple[Path, Path]) -> tuple[Path, Path]:
    """Return TextVQA files with one thing wrong."""
    document = json.loads(files[0].read_text())
    if name == "answers":
        document["data"][2]["answers"].pop()
    if name == "picture":
        document["data"][2]["image_id"] = "gone"
    if name == "climbing":
        document["data"][2]["image_id"] = "../images/p0"
    if name == "marker":
        document["data"][2]["question"] = "What does <image> mean?"
    path = folder / "val.json"
    path.write_text(json.dumps(document))
    return path, files[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answers", "data[2], field answers: 9 answers"),
        ("picture", "question 3, field image"),
        ("climbing", "question 3, field image: '../images/p0.png'"),
        ("marker", "question 3: 'What does <image> mean?"),
    ],
)
def test_bad_files_end_in_code_2_and_a_progress_error(
    checkpoint: Path,
    textvqa_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    files = broken(name, tmp_path, textvqa_files)
    progress = tmp_path / "progress.jsonl"
    code = run_textvqa(checkpoint, files, tmp_path / "out", "--progress", str(progress))
    assert code == 2
    error = lines_of(progress)[-1]["error"]
    assert message in error["message"]
    assert error["hint"]
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "score.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "many"], "--batch-size: 'many'"),
        (["--dtype", "float8"], "--dtype: 'float8'"),
        (["--device", "cuda:99x"], "--device is 'cuda:99x'"),
        (["--checkpoint", "/absent"], "/absent"),
    ],
)
def test_bad_settings_end_in_code_2(
    checkpoint: Path,
    textvqa_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run_textvqa(checkpoint, textvqa_files, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_unknown_key_of_a_configuration_file_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text("batchsize: 3\n")
    assert evaluate.main(["--config", str(config)]) == 2
    captured = capsys.readouterr().err
    assert "key 'batchsize'" in captured
    assert "'batch_size'" in captured


def _cut(png: bytes, left: int) -> bytes:
    """Return the beginning of a PNG; within its first chunk, with that chunk made to fit."""
    if left > 33:
        return png[:left]
    header = png[16:left]
    size, checksum = len(header).to_bytes(4), zlib.crc32(b"IHDR" + header).to_bytes(4)
    return png[:8] + size + b"IHDR" + header + checksum


@pytest.mark.parametrize("left", [200, 20])
def test_unreadable_picture_is_named(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path, left: int
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in textvqa_files[1].iterdir():
        (images / path.name).write_bytes(_cut(path.read_bytes(), left))
    progress = tmp_path / "progress.jsonl"
    files = (textvqa_files[0], images)
    assert run_textvqa(checkpoint, files, tmp_path, "--progress", str(progress)) == 2
    assert str(images) in lines_of(progress)[-1]["error"]["message"]


def test_termination_signal_ends_in_143(
    checkpoint: Path, textvqa_files: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mgm.evaluate", "--benchmark", "textvqa"]
    command += ["--questions", str(textvqa_files[0]), "--images", str(textvqa_files[1])]
    command += ["--checkpoint", str(checkpoint), "--output", str(tmp_path)]
    command += ["--max-new-tokens", "5000", "--batch-size", "1", "--stop", "eos"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(tmp_path.iterdir()):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=600) == 143
