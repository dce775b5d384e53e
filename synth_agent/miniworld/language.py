"""What is said of scenes: captions, questions with answers, and the noise of the web."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from synth_agent.miniworld.scene import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    POSITIONS,
    SHAPES,
    WORDS,
    Group,
    Scene,
    Sign,
    plural,
)

CATEGORIES = ("background", "color", "counting", "ocr", "position", "shape")
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
DESCRIBE = ("describe the picture .", "what is in the picture ?", "write a caption .")
_SIGN_PHRASES = ("a sign that says {}", "a sign reading {}", "the word {} on a sign")
_GOODS = ("orders", "shoes", "phones", "toys", "bags", "lamps", "watches", "gifts")
_NUMBERS = ("10", "20", "25", "50", "99")
_ADVERTS = (
    "buy now ! free shipping on all {goods} over {number} dollars",
    "click here to see more pictures of {goods} at www . best {goods} . com",
    "best price {number} % off , new arrival hot sale wholesale {goods}",
    "image may be subject to copyright , all rights reserved",
    "subscribe to our newsletter for weekly deals on {goods}",
    "photo of {goods} for free download , vector stock illustration {number}",
    "home page contact us about us privacy policy",
    "img _ 2024 {number} . jpg",
    "{goods} from {number} dollars , best quality , fast delivery , click to buy",
)
OTHER_LANGUAGES = (
    "ein rotes Bild mit vielen Sachen und einem Schild",
    "une image avec des formes et un panneau",
    "一张有形状的图片和一个标志",
    "una imagen con muchas figuras y un letrero",
    "картинка с фигурами и вывеской",
    "いくつかの形がある写真です",
    "uma foto com formas e uma placa",
)


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    category: str
    text: str
    answer: str
    choices: tuple[str, ...]
    """Every answer that questions of this kind can have."""


def caption(scene: Scene, draw: random.Random) -> str:
    """Return a sentence about everything in the scene; most places are named."""
    items = list(scene.objects)
    draw.shuffle(items)
    phrases = [_phrase(item, draw, draw.random() < 0.8) for item in items]
    text = phrases[0]
    if len(phrases) > 1:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    kind = draw.random()
    if kind < 0.25:
        return f"a {scene.background} picture with {text}"
    if kind < 0.4:
        return f"{text} on a {scene.background} background"
    if kind < 0.5:
        is_singular = phrases[0].startswith(("a ", "one ", "the "))
        return f"there {'is' if is_singular else 'are'} {text}"
    return text


def questions(scene: Scene) -> list[Question]:
    """Return every question that the scene can be asked."""
    found: list[Question] = []
    for group in scene.groups:
        found += _group_questions(group)
    signs = scene.signs
    for sign in signs:
        found += _sign_questions(sign, is_only_one=len(signs) == 1)
    if len(signs) == 1:
        where = POSITIONS[signs[0].position]
        found.append(Question("position", "where is the sign ?", where, POSITIONS))
    background = "what color is the background ?"
    found.append(Question("background", background, scene.background, tuple(BACKGROUNDS)))
    return found


def options(question: Question, draw: random.Random) -> list[str]:
    """Return four options in random order, the answer among them."""
    wrong = [choice for choice in question.choices if choice != question.answer]
    drawn = [*draw.sample(wrong, 3), question.answer]
    draw.shuffle(drawn)
    return drawn


def short_prompt(question: str) -> str:
    """Return a question that asks for a word or two."""
    return f"{question}\n{SHORT_ANSWER}"


def letter_prompt(question: str, choices: Sequence[str]) -> str:
    """Return a question with lettered options that asks for a letter."""
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=False)]
    return "\n".join([question, *lines, LETTER_ANSWER])


def advert(draw: random.Random) -> str:
    """Return a line of advertising or page furniture."""
    return draw.choice(_ADVERTS).format(goods=draw.choice(_GOODS), number=draw.choice(_NUMBERS))


def gibberish(draw: random.Random) -> str:
    """Return a few random strings."""
    letters = string.ascii_lowercase + string.digits
    return " ".join(
        "".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(draw.randint(2, 5))
    )


def _phrase(item: Sign | Group, draw: random.Random, with_position: bool) -> str:
    if isinstance(item, Sign):
        text = draw.choice(_SIGN_PHRASES).format(item.word)
    else:
        number = draw.choice(("a", "one")) if item.count == 1 else COUNTS[item.count]
        text = f"{number} {item.color} {item.noun}"
    return f"{text} in the {POSITIONS[item.position]}" if with_position else text


def _group_questions(group: Group) -> list[Question]:
    be, noun, where = ("is" if group.count == 1 else "are"), group.noun, POSITIONS[group.position]
    colors, counts = tuple(COLORS), ("one", "two", "three", "four")
    return [
        Question("color", f"what color {be} the {noun} ?", group.color, colors),
        Question(
            "counting",
            f"how many {plural(group.shape)} are there ?",
            COUNTS[group.count],
            counts,
        ),
        Question("position", f"where {be} the {group.color} {noun} ?", where, POSITIONS),
        Question("shape", f"what shape is {group.color} ?", group.shape, SHAPES),
        Question("shape", f"what shape is in the {where} ?", group.shape, SHAPES),
    ]


def _sign_questions(sign: Sign, is_only_one: bool) -> list[Question]:
    where = POSITIONS[sign.position]
    if is_only_one:
        texts = ("what does the sign say ?", "what word is written on the sign ?")
    else:
        texts = (
            f"what does the sign in the {where} say ?",
            f"what word is written in the {where} ?",
        )
    return [Question("ocr", text, sign.word, WORDS) for text in texts]
