"""Scenes: what a picture of the mini world shows, drawn at random from a seed.

A picture has four quadrants. One to three hold groups of equal shapes in one colour, up to two hold
signs with one word each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLORS = {
    "red": (214, 40, 40),
    "blue": (40, 70, 210),
    "green": (30, 150, 60),
    "yellow": (240, 205, 30),
    "purple": (130, 50, 170),
    "orange": (245, 130, 20),
    "black": (25, 25, 25),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (190, 190, 190),
    "beige": (235, 220, 190),
    "sky": (185, 220, 245),
}
COUNTS = {1: "one", 2: "two", 3: "three"}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
WORDS = tuple(
    "stop exit open bank taxi milk cafe hotel north south park shop sale fire gold moon "
    "river bread music apple tiger eagle storm cloud beach pizza sugar lemon honey house "
    "bus map key zoo gym bar spa inn tea ice jam van oak fox owl bee ant cow pig hen "
    "lake hill road farm mill port dock gate wall roof lamp desk king rock".split()
)


@dataclass(frozen=True)
class Sign:
    """A plate with a word."""

    position: int
    """Quadrant, row by row from the top left."""
    word: str


@dataclass(frozen=True)
class Group:
    """One to three equal shapes."""

    position: int
    shape: str
    color: str
    count: int

    @property
    def noun(self) -> str:
        """The shape, in the plural where there are several."""
        return self.shape if self.count == 1 else plural(self.shape)


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; the same scene is always drawn the same way."""

    background: str
    objects: tuple[Sign | Group, ...]
    """By quadrant, ascending."""
    seed: int
    """Of what no caption speaks of: jitter, shades, noise."""

    @property
    def signs(self) -> tuple[Sign, ...]:
        return tuple(item for item in self.objects if isinstance(item, Sign))

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(item for item in self.objects if isinstance(item, Group))


def plural(shape: str) -> str:
    """Return a shape's plural."""
    return shape + ("es" if shape.endswith("s") else "s")


def draw_scene(random_source: random.Random, num_signs: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        random_source: Everything is drawn from it.
        num_signs: Signs in the picture; None draws 0, 1 or 2.
    """
    draw = random_source
    quadrants = list(range(4))
    draw.shuffle(quadrants)
    signs = draw.choices((0, 1, 2), (0.15, 0.6, 0.25))[0] if num_signs is None else num_signs
    groups = draw.choices((2, 3) if signs == 0 else (1, 2), (0.4, 0.6))[0]
    words = draw.sample(WORDS, signs)
    shapes, colors = draw.sample(SHAPES, groups), draw.sample(list(COLORS), groups)
    objects: list[Sign | Group] = [Sign(quadrants.pop(), word) for word in words]
    for shape, color in zip(shapes, colors, strict=True):
        count = draw.choices((1, 2, 3), (0.5, 0.25, 0.25))[0]
        objects.append(Group(quadrants.pop(), shape, color, count))
    objects.sort(key=lambda item: item.position)
    return Scene(draw.choice(list(BACKGROUNDS)), tuple(objects), draw.getrandbits(30))
