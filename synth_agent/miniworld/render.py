"""Drawing scenes with Pillow, and spoiling pictures the way real ones are spoiled.

Pictures are 128 x 128, drawn at twice the size and reduced. A sign's word can be read at 128 pixels
and not at 64, so only a model with a high-resolution branch can read. The font is the one inside
Pillow; no file is needed.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, features

from synth_agent.errors import SynthAgentError
from synth_agent.miniworld.scene import BACKGROUNDS, COLORS, Group, Scene, Sign

SIZE = 128
_SCALE = 2
_QUADRANT = SIZE // 2
_STAR = tuple(
    (
        math.sin(i * math.pi / 5) * (1.0 if i % 2 == 0 else 0.42),
        -math.cos(i * math.pi / 5) * (1.0 if i % 2 == 0 else 0.42),
    )
    for i in range(10)
)
_POLYGONS = {
    "triangle": ((0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)),
    "diamond": ((0.0, -1.1), (0.7, 0.0), (0.0, 1.1), (-0.7, 0.0)),
    "star": tuple((1.1 * x, 1.1 * y) for x, y in _STAR),
}
_PLATES = (
    ((255, 255, 240), (15, 15, 15)),
    ((20, 60, 110), (250, 250, 250)),
    ((245, 225, 120), (20, 20, 20)),
)
_RADII = {1: (13.0, 19.0), 2: (9.5, 12.0), 3: (8.5, 10.5)}
_JITTER = {1: 9.0, 2: 4.0, 3: 3.0}
_CENTRES = {
    1: (((32, 32),),),
    2: (((18, 32), (46, 32)), ((32, 17), (32, 47))),
    3: (((32, 16), (17, 46), (47, 46)), ((32, 48), (17, 18), (47, 18))),
}
_NUM_NOISES = 8


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's embedded font.

    Raises:
        SynthAgentError: If this Pillow was built without FreeType, which the font needs.
    """
    if not features.check("freetype2"):
        raise SynthAgentError(
            "Font is missing",
            "Pillow was built without FreeType, so its embedded font cannot be used",
            "install Pillow's binary wheel: pip install --force-reinstall --only-binary :all: pillow",
        )
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def render(scene: Scene) -> Image.Image:
    """Return the picture of a scene, (128, 128) RGB."""
    draw = random.Random(scene.seed)
    side = SIZE * _SCALE
    image = Image.new("RGB", (side, side), _shade(BACKGROUNDS[scene.background], 8, draw))
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        if isinstance(item, Sign):
            _draw_sign(canvas, item, draw)
        else:
            _draw_group(canvas, item, draw)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    noise = draw.randrange(_NUM_NOISES)
    return ImageChops.subtract(ImageChops.add(image, _noise(noise)), _noise(noise + _NUM_NOISES))


def degrade(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return the picture made tiny, blank or blurred."""
    kind = draw.choice(("tiny", "blank", "blur"))
    if kind == "tiny":
        side = draw.choice((12, 16, 20))
        return image.resize((side, side))
    if kind == "blank":
        level = draw.randint(0, 255)
        return Image.new("RGB", image.size, (level, level, level))
    return image.filter(ImageFilter.GaussianBlur(draw.uniform(5, 8)))


def watermark(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return the picture with a stock agency's text laid over it."""
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    canvas = ImageDraw.Draw(layer)
    text = draw.choice(("SAMPLE", "STOCK", "PREVIEW"))
    for y in range(4, SIZE, 30):
        for x in range(-10, SIZE, 58):
            place = (x + draw.randint(-4, 4), y)
            canvas.text(place, text, font=load_font(12), fill=(120, 120, 120, 150))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def shift_brightness(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return the picture slightly brighter or darker: a near duplicate."""
    pixels = np.asarray(image).astype(np.int16) + draw.randint(-6, 6)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@cache
def _noise(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 7, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _shade(color: tuple[int, int, int], spread: int, draw: random.Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, value + draw.randint(-spread, spread))) for value in color)
    return red, green, blue


def _corner(position: int) -> tuple[int, int]:
    return (position % 2) * _QUADRANT, (position // 2) * _QUADRANT


def _draw_sign(canvas: ImageDraw.ImageDraw, sign: Sign, draw: random.Random) -> None:
    left, top = _corner(sign.position)
    font = load_font(11 * _SCALE + draw.randint(0, 2))
    text = sign.word.upper()
    x0, y0, x1, y1 = canvas.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 5 * _SCALE, y1 - y0 + 5 * _SCALE
    room = _QUADRANT * _SCALE
    x = left * _SCALE + 2 + draw.randint(0, max(0, int(room - width - 4)))
    y = top * _SCALE + 2 + draw.randint(0, max(0, int(room - height - 4)))
    plate, ink = draw.choice(_PLATES)
    canvas.rectangle((x, y, x + width, y + height), fill=plate, outline=(60, 60, 60), width=_SCALE)
    place = (x + 2.5 * _SCALE - x0, y + 2.5 * _SCALE - y0)
    canvas.text(place, text, font=font, fill=ink, stroke_width=0.5, stroke_fill=ink)


def _draw_group(canvas: ImageDraw.ImageDraw, group: Group, draw: random.Random) -> None:
    left, top = _corner(group.position)
    color = _shade(COLORS[group.color], 14, draw)
    radius = draw.uniform(*_RADII[group.count]) * _SCALE
    centres = draw.choice(_CENTRES[group.count])
    jitter = _JITTER[group.count]
    for x, y in centres:
        place = (
            (left + x + draw.uniform(-jitter, jitter)) * _SCALE,
            (top + y + draw.uniform(-jitter, jitter)) * _SCALE,
        )
        _draw_shape(canvas, group.shape, place, radius, color)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    color: tuple[int, int, int],
) -> None:
    x, y = centre

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return x - half_width, y - half_height, x + half_width, y + half_height

    if shape in _POLYGONS:
        canvas.polygon(
            [(x + radius * dx, y + radius * dy) for dx, dy in _POLYGONS[shape]], fill=color
        )
    elif shape == "circle":
        canvas.ellipse(box(radius, radius), fill=color)
    elif shape == "ring":
        canvas.ellipse(box(radius, radius), outline=color, width=max(2, int(radius * 0.38)))
    elif shape == "square":
        canvas.rectangle(box(radius * 0.85, radius * 0.85), fill=color)
    elif shape == "cross":
        canvas.rectangle(box(radius * 0.32, radius), fill=color)
        canvas.rectangle(box(radius, radius * 0.32), fill=color)
    else:
        _draw_heart(canvas, x, y, radius, color)


def _draw_heart(
    canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple[int, int, int]
) -> None:
    top, bottom = y - radius * 0.9, y + radius * 0.15
    canvas.ellipse((x - radius, top, x + radius * 0.05, bottom), fill=color)
    canvas.ellipse((x - radius * 0.05, top, x + radius, bottom), fill=color)
    sides = [(-0.95, -0.2), (0.95, -0.2), (0.0, 1.0)]
    canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in sides], fill=color)
