"""The files of the mini world, in the formats of the real one, from seeds alone.

Competition JSONL and LLaVA JSON for the seed set, LLaVA JSON for the instructions, the official
TextVQA annotation JSON, the official MMBench table with its circular copies.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from synth_agent.miniworld import language, render
from synth_agent.miniworld.scene import Scene, draw_scene

MESS = {
    "mismatch": 0.22,
    "dup_exact": 0.06,
    "dup_near": 0.06,
    "truncated": 0.04,
    "degraded": 0.04,
    "boilerplate": 0.03,
    "watermark": 0.03,
    "gibberish": 0.01,
    "otherlang": 0.01,
}
"""Shares of the whole seed set that are spoiled in each way; the rest is clean."""
IMAGE_MARKER = "<__dj__image>"
END_OF_CHUNK = "<|__dj__eoc|>"
LETTERS = "ABCD"
ROTATION_STEP = 1_000_000
_JPEG_QUALITY = 88
_L2_CATEGORIES = {"ocr": "finegrained_perception (instance-level)"}


@dataclass(frozen=True)
class SeedSample:
    """One record of the seed set, with what only the generator knows."""

    kind: str
    scene: Scene
    caption: str
    image: Image.Image


def write_seed(folder: Path, truth: Path, num_samples: int, seed: int) -> None:
    """Write `seed.jsonl`, `stage_1.json` and `images/`, and the kinds to `truth`."""
    (folder / "images").mkdir(parents=True)
    records, original, kinds = [], [], []
    for index, sample in enumerate(draw_seed(num_samples, seed)):
        name, path = f"{index:09d}", f"images/{index:06d}.jpg"
        sample.image.save(folder / path, quality=_JPEG_QUALITY)
        text = f"{IMAGE_MARKER}\n{sample.caption} {END_OF_CHUNK}"
        records.append({"id": name, "images": [path], "text": text})
        question = language.DESCRIBE[index % len(language.DESCRIBE)]
        turns = [_human(f"<image>\n{question}"), _gpt(sample.caption)]
        original.append({"id": name, "image": path, "conversations": turns})
        kinds.append({"id": name, "kind": sample.kind})
    _write_lines(folder / "seed.jsonl", records)
    (folder / "stage_1.json").write_text(json.dumps(original), "utf-8")
    _write_lines(truth, kinds)


def draw_seed(num_samples: int, seed: int) -> list[SeedSample]:
    """Return the records of a seed set, clean and spoiled ones mixed."""
    draw = random.Random(seed)
    kinds = [kind for kind, share in MESS.items() for _ in range(round(share * num_samples))]
    kinds += ["clean"] * (num_samples - len(kinds))
    draw.shuffle(kinds)
    clean: list[SeedSample] = []
    samples = []
    for kind in kinds:
        sample = _spoiled(kind, clean, draw)
        samples.append(sample)
        if sample.kind == "clean":
            clean.append(sample)
    return samples


def _spoiled(kind: str, clean: list[SeedSample], draw: random.Random) -> SeedSample:
    if kind.startswith("dup_") and clean:
        source = draw.choice(clean)
        if kind == "dup_exact":
            return SeedSample(kind, source.scene, source.caption, source.image)
        image = render.shift_brightness(source.image, draw)
        return SeedSample(kind, source.scene, source.caption + " .", image)
    scene = draw_scene(draw)
    image, text = render.render(scene), language.caption(scene, draw)
    if kind.startswith("dup_"):
        kind = "clean"
    if kind == "mismatch":
        text = language.caption(draw_scene(draw), draw)
    elif kind == "boilerplate":
        text = language.advert(draw)
    elif kind == "truncated":
        text = text[: draw.randint(6, 18)].strip()
    elif kind == "gibberish":
        text = language.gibberish(draw)
    elif kind == "otherlang":
        text = draw.choice(language.OTHER_LANGUAGES)
    elif kind == "degraded":
        image = render.degrade(image, draw)
    elif kind == "watermark":
        image = render.watermark(image, draw)
    return SeedSample(kind, scene, text, image)


def write_instructions(
    folder: Path, num_pictures: int, seed: int, letter_share: float = 0.4
) -> None:
    """Write `instruct.json` and `images/`: three questions to a picture."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(num_pictures):
        scene, path = draw_scene(draw), f"images/{index:06d}.jpg"
        render.render(scene).save(folder / path, quality=_JPEG_QUALITY)
        asked = language.questions(scene)
        draw.shuffle(asked)
        turns: list[dict[str, str]] = []
        for question in asked[:3]:
            prompt, answer = _instruction(question, letter_share, draw)
            turns += [_human(prompt if turns else f"<image>\n{prompt}"), _gpt(answer)]
        records.append({"id": f"ins{index:06d}", "image": path, "conversations": turns})
    (folder / "instruct.json").write_text(json.dumps(records), "utf-8")


def _instruction(
    question: language.Question, letter_share: float, draw: random.Random
) -> tuple[str, str]:
    if draw.random() >= letter_share:
        return language.short_prompt(question.text), question.answer
    choices = language.options(question, draw)
    return language.letter_prompt(question.text, choices), LETTERS[choices.index(question.answer)]


def write_textvqa(folder: Path, num_questions: int, seed: int) -> None:
    """Write `TextVQA_mini_val.json` and `train_images/`: read the sign."""
    draw = random.Random(seed)
    (folder / "train_images").mkdir(parents=True)
    data = []
    for index in range(num_questions):
        scene = draw_scene(draw, num_signs=draw.choice((1, 1, 2)))
        image_id = f"{seed:04x}{index:08x}"
        image_path = folder / "train_images" / f"{image_id}.jpg"
        render.render(scene).save(image_path, quality=_JPEG_QUALITY)
        question = draw.choice([q for q in language.questions(scene) if q.category == "ocr"])
        data.append(
            {
                "question": question.text,
                "image_id": image_id,
                "question_id": 34602 + index,
                "set_name": "val",
                "answers": _human_answers(question.answer, draw),
                "image_width": render.SIZE,
                "image_height": render.SIZE,
                "ocr_tokens": [sign.word.upper() for sign in scene.signs],
            }
        )
    content = {"dataset_type": "val", "dataset_name": "mini_textvqa", "data": data}
    (folder / "TextVQA_mini_val.json").write_text(json.dumps(content), "utf-8")


def _human_answers(answer: str, draw: random.Random) -> list[str]:
    """Return ten answers; a few people add an article, give up or mistype."""
    odd = ("unanswerable", "answering does not require reading text in the image", answer[:-1])
    answers = []
    for _ in range(10):
        chance = draw.random()
        if chance < 0.04:
            answers.append(f"the {answer}")
        elif chance < 0.08:
            answers.append(draw.choice(odd))
        else:
            answers.append(answer)
    return answers


def write_mmbench(path: Path, num_questions: int, seed: int) -> None:
    """Write the table: every question four times, its options rotated by one each time."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(num_questions):
        category = language.CATEGORIES[index % len(language.CATEGORIES)]
        scene, question = _scene_with(category, draw)
        choices = language.options(question, draw)
        picture = io.BytesIO()
        render.render(scene).save(picture, "JPEG", quality=_JPEG_QUALITY)
        encoded = base64.b64encode(picture.getvalue()).decode()
        for rotation in range(len(choices)):
            rotated = choices[rotation:] + choices[:rotation]
            rows.append(
                {
                    "index": index + rotation * ROTATION_STEP,
                    "question": question.text,
                    "hint": "",
                    **dict(zip(LETTERS, rotated, strict=True)),
                    "answer": LETTERS[rotated.index(question.answer)],
                    "category": category,
                    "image": encoded,
                    "source": "mini world",
                    "l2-category": _L2_CATEGORIES.get(category, "coarse_perception"),
                    "comment": "",
                    "split": "dev",
                }
            )
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _scene_with(category: str, draw: random.Random) -> tuple[Scene, language.Question]:
    while True:
        scene = draw_scene(draw)
        fitting = [q for q in language.questions(scene) if q.category == category]
        if fitting:
            return scene, draw.choice(fitting)


def _human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def _gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
