"""The data of shapes-captioner: seeded scenes of one or two coloured shapes, their pictures and their captions.

A scene lives in the unit square and can be drawn at any size. Every scene has exactly one full caption
("a small red circle above a large blue square on a white background"): the sizes are far apart, the shapes never
overlap, and two shapes are either clearly one above the other or clearly side by side. The upper or left one is named
first.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Point = tuple[float, float]

KINDS = ("circle", "square", "triangle")
COLOURS: dict[str, Rgb] = {
    "red": (220, 30, 35),
    "green": (30, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 225, 30),
    "purple": (150, 40, 175),
    "orange": (250, 135, 15),
}
BACKGROUNDS: dict[str, Rgb] = {"white": (248, 248, 248), "gray": (128, 128, 128), "black": (10, 10, 10)}
# Radii as fractions of the picture's side, (smallest, largest): a factor of 1.5 lies between small and large.
RADII = {"small": (0.11, 0.13), "large": (0.195, 0.225)}
# What a simple caption tells of a shape beside its kind: of each of two related ones, or of one alone.
RELATED_TOLD = (("size", "colour"), ("size", "colour"), ("size",), ("colour",))
ALONE_TOLD = (("size", "colour"), ("size", "background"), ("colour", "background"), ("background",))

JITTER = 10  # each colour channel moves by up to this many of 255 levels
MARGIN = 0.01  # between a shape and the border, of the side
GAP = 0.03  # between two shapes, of the side
CLEARANCE = 0.15  # by how much the offset along the named axis exceeds the other one, of the side
SUPERSAMPLING = 3
FILTERS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.LANCZOS,
    Image.Resampling.NEAREST,
)


@dataclass(frozen=True)
class Shape:
    """One shape: what the caption says (`kind`, `colour`, `size`), where it is (unit square) and its exact colour."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: Rgb


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a background, in the order in which the caption names them."""

    shapes: tuple[Shape, ...]
    background: str
    rgb: Rgb

    @property
    def relation(self) -> str:
        """`above` or `left of`: where the first of two shapes is, seen from the second."""
        first, second = self.shapes
        return "above" if abs(first.y - second.y) > abs(first.x - second.x) else "left of"


def sample_scene(rng: random.Random) -> Scene:
    """A random scene; one in four has a single shape."""
    background = rng.choice(tuple(BACKGROUNDS))
    rgb = _jitter(BACKGROUNDS[background], rng)
    if rng.random() < 0.25:
        return Scene((_sample_shape(rng),), background, rgb)
    while True:
        shapes = (_sample_shape(rng), _sample_shape(rng))
        if _is_clear(*shapes):
            return Scene(_in_order(*shapes), background, rgb)


def full_caption(scene: Scene) -> str:
    """The one right caption: size, colour and kind of every shape, their relation and the background."""
    phrases = [f"a {shape.size} {shape.colour} {shape.kind}" for shape in scene.shapes]
    relation = f" {scene.relation} " if len(phrases) == 2 else ""
    return f"{relation.join(phrases)} on a {scene.background} background"


def simple_caption(scene: Scene, rng: random.Random) -> str:
    """A random true statement that says less than the full caption: "a large square", "a circle above a red shape".

    It gives the relation of two shapes without the background, or one shape with up to two of size, colour and
    background.
    """
    if len(scene.shapes) == 2 and rng.random() < 0.75:
        first, second = (_phrase(shape, rng.choice(RELATED_TOLD), rng) for shape in scene.shapes)
        return f"{first} {scene.relation} {second}"
    shape, told = rng.choice(scene.shapes), rng.choice(ALONE_TOLD)
    ending = f" on a {scene.background} background" if "background" in told else ""
    return _phrase(shape, told, rng) + ending


def draw(scene: Scene, size: int | tuple[int, int]) -> Image.Image:
    """The scene as an RGB picture, `size` pixels a side or `(width, height)`; one that is not square is stretched."""
    width, height = (size, size) if isinstance(size, int) else size
    scale = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    image = Image.new("RGB", scale, scene.rgb)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        canvas.polygon([(x * scale[0], y * scale[1]) for x, y in _outline(shape)], fill=shape.rgb)
    return image.reduce(SUPERSAMPLING)


def draw_resized(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """The scene drawn at a random size and resized to `size` pixels a side with a random filter.

    Browsers, Pillow and other libraries resize differently; a model trained on all filters depends on none.
    """
    native = rng.randint(size, 4 * size)
    return draw(scene, native).resize((size, size), rng.choice(FILTERS))


def _sample_shape(rng: random.Random) -> Shape:
    colour, size = rng.choice(tuple(COLOURS)), rng.choice(tuple(RADII))
    radius = rng.uniform(*RADII[size])
    border = radius + MARGIN
    x, y = rng.uniform(border, 1 - border), rng.uniform(border, 1 - border)
    return Shape(rng.choice(KINDS), colour, size, x, y, radius, _jitter(COLOURS[colour], rng))


def _jitter(rgb: Rgb, rng: random.Random) -> Rgb:
    red, green, blue = (min(255, max(0, level + rng.randint(-JITTER, JITTER))) for level in rgb)
    return red, green, blue


def _is_clear(a: Shape, b: Shape) -> bool:
    """Whether the shapes keep their distance and the relation between them is beyond doubt."""
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return math.hypot(dx, dy) >= a.radius + b.radius + GAP and abs(dx - dy) >= CLEARANCE


def _in_order(a: Shape, b: Shape) -> tuple[Shape, Shape]:
    """The upper one first, or the left one where they stand side by side."""
    vertical = abs(a.y - b.y) > abs(a.x - b.x)
    a_first = a.y < b.y if vertical else a.x < b.x
    return (a, b) if a_first else (b, a)


def _phrase(shape: Shape, told: tuple[str, ...], rng: random.Random) -> str:
    """The shape with those of `size` and `colour` that are in `told`; now and then "shape" stands for its kind."""
    words = [value for name, value in (("size", shape.size), ("colour", shape.colour)) if name in told]
    noun = shape.kind if rng.random() < 0.9 else "shape"
    phrase = " ".join([*words, noun])
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _outline(shape: Shape) -> list[Point]:
    """The polygon of a shape within its radius, in the unit square."""
    if shape.kind == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape.kind == "triangle":
        corners = [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    else:
        angles = (2 * math.pi * step / 64 for step in range(64))
        corners = [(math.cos(angle), math.sin(angle)) for angle in angles]
    return [(shape.x + dx * shape.radius, shape.y + dy * shape.radius) for dx, dy in corners]
