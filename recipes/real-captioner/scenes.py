"""Scenes of one to three things on a plain or photographic ground: their pictures and their captions.

The things are emoji in three styles of drawing, named as CLDR names them. A scene follows from a seed, and has exactly
one caption ("a red apple to the left of a dog on a green background"): things do not overlap, two of them stand in a
row or in a column, three in two rows, and all are told from the left and from the top.

Some combinations are never trained on: of a thing and its place, and of two things. Nor is one of the styles. Grounds
that show things of their own are trained on, and not asked about.
"""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
from packages import FLUENT, NOTO, SCIKIT_IMAGE, SCIKIT_LEARN, TWEMOJI, Package, read_members
from PIL import Image, ImageFilter

SIDE = 224  # of a picture, pixels
TRAINED_STYLES, HELD_OUT_STYLE = ("noto", "fluent"), "twemoji"
HELD_OUT_SHARE = 10  # one of so many combinations is held out
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (4, 5, 1)
SIZES = {1: (100, 136), 2: (94, 110), 3: (88, 104)}  # smallest and largest side of a thing, pixels, by number of things
PLAIN_SHARE = 0.75

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "orange": (245, 145, 40),
    "yellow": (250, 225, 80),
    "green": (70, 165, 80),
    "blue": (60, 105, 210),
    "purple": (130, 70, 175),
    "pink": (250, 170, 200),
    "brown": (125, 80, 45),
    "gray": (140, 140, 140),
    "black": (22, 22, 22),
    "white": (248, 248, 248),
}
PHOTOGRAPHS: dict[str, tuple[Package, str]] = {
    "in front of a brick wall": (SCIKIT_IMAGE, "skimage/data/brick.png"),
    "on a field of grass": (SCIKIT_IMAGE, "skimage/data/grass.png"),
    "on a bed of gravel": (SCIKIT_IMAGE, "skimage/data/gravel.png"),
    "in front of many galaxies": (SCIKIT_IMAGE, "skimage/data/hubble_deep_field.jpg"),
    "in front of a cup of coffee": (SCIKIT_IMAGE, "skimage/data/coffee.png"),
    "in front of a temple": (SCIKIT_LEARN, "sklearn/datasets/images/china.jpg"),
    "in front of a flower": (SCIKIT_LEARN, "sklearn/datasets/images/flower.jpg"),
}
WITH_THINGS = ("in front of a cup of coffee", "in front of a temple", "in front of a flower")
WITHOUT_THINGS = tuple(ground for ground in PHOTOGRAPHS if ground not in WITH_THINGS)
PLACES = {
    (0, 0): "in the top left corner",
    (2, 0): "in the top right corner",
    (1, 1): "in the middle",
    (0, 2): "in the bottom left corner",
    (2, 2): "in the bottom right corner",
}
ROW, COLUMN, TWO_ABOVE, TWO_BELOW = "row", "column", "two above one", "two below one"


@dataclass(frozen=True)
class Thing:
    """A noun with its article, and the square that it fills: left, top and side in pixels."""

    noun: str
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `place` is how things stand, or where the only one is; `seed` is that of the ground."""

    things: tuple[Thing, ...]
    place: str
    ground: str
    style: str
    seed: int

    @property
    def caption(self) -> str:
        """Of 6 to 25 words."""
        first, *others = (thing.noun for thing in self.things)
        article = "an" if self.ground == "orange" else "a"
        ground = f"on {article} {self.ground} background" if self.ground in COLOURS else self.ground
        match self.place, others:
            case "row", [second]:
                return f"{first} to the left of {second} {ground}"
            case "column", [second]:
                return f"{first} above {second} {ground}"
            case "two above one", [second, third]:
                return f"{first} and {second} above {third} {ground}"
            case "two below one", [second, third]:
                return f"{first} above {second} and {third} {ground}"
        return f"{first} {self.place} {ground}"

    @property
    def held_out(self) -> bool:
        """Whether a combination in it is never trained on."""
        nouns = sorted(thing.noun for thing in self.things)
        pairs = combinations(nouns, 2) if len(nouns) > 1 else [(nouns[0], self.place)]
        return any(zlib.crc32("|".join(pair).encode()) % HELD_OUT_SHARE == 0 for pair in pairs)


@cache
def codes() -> dict[str, str]:
    """The code points of each noun's emoji, as the packages' files are named."""
    lines = (Path(__file__).parent / "nouns.txt").read_text(encoding="utf-8").splitlines()
    return {noun: code for code, _, noun in (line.partition(" ") for line in lines)}


def trained_scene(seed: int) -> Scene:
    """A scene without anything that is held out; the same for the same seed."""
    rng = random.Random(f"trained {seed}")
    while True:
        scene = _sample(rng, rng.choice(TRAINED_STYLES), tuple(PHOTOGRAPHS))
        if not scene.held_out:
            return scene


def held_out_scene(seed: int) -> Scene:
    """A scene with a combination that was never trained on; the same for the same seed."""
    rng = random.Random(f"held out {seed}")
    while True:
        scene = _sample(rng, rng.choice(TRAINED_STYLES), WITHOUT_THINGS)
        if scene.held_out:
            return scene


def new_style_scene(seed: int) -> Scene:
    """The same in the style that was never trained on."""
    return replace(held_out_scene(seed), style=HELD_OUT_STYLE)


def draw(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture, so many pixels high and wide; resized as the image processor does it."""
    rng = random.Random(scene.seed)
    picture = _plain(COLOURS[scene.ground], rng) if scene.ground in COLOURS else _photographic(scene.ground, rng)
    for thing in scene.things:
        drawn = emoji(scene.style)[thing.noun].resize((thing.side, thing.side), Image.Resampling.BICUBIC)
        picture.paste(drawn, (thing.left, thing.top), drawn)
    return picture if side == SIDE else picture.resize((side, side), Image.Resampling.BICUBIC)


def _sample(rng: random.Random, style: str, photographs: Sequence[str]) -> Scene:
    count = rng.choices(COUNTS, COUNT_WEIGHTS)[0]
    nouns = rng.sample(list(codes()), count)
    side = rng.randint(*SIZES[count])
    place = rng.choice(_ARRANGEMENTS[count])
    corners = _alone(place, side, rng) if count == 1 else _in_rows(place, side, rng)
    things = tuple(Thing(noun, *corner, side) for noun, corner in zip(nouns, corners, strict=True))
    ground = rng.choice(list(COLOURS) if rng.random() < PLAIN_SHARE else photographs)
    return Scene(things, place, ground, style, rng.getrandbits(32))


def _alone(place: str, side: int, rng: random.Random) -> list[tuple[int, int]]:
    """Left and top of one thing whose place in a grid of three by three is told."""
    across, down = next(cell for cell, name in PLACES.items() if name == place)
    span = (SIDE - side) // 2
    jitter = span // 5
    return [
        (
            _within(across * span + rng.randint(-jitter, jitter), side),
            _within(down * span + rng.randint(-jitter, jitter), side),
        )
    ]


def _in_rows(place: str, side: int, rng: random.Random) -> list[tuple[int, int]]:
    """Left and top of things in rows or columns, which they leave a little."""
    half = SIDE // 2
    slack = half - side
    if place in (ROW, COLUMN):
        base = rng.randint(0, SIDE - side)
        beside = [_within(base + rng.randint(-side // 4, side // 4), side) for _ in range(2)]
        along = [index * half + rng.randint(0, slack) for index in range(2)]
        return list(zip(along, beside, strict=True) if place == ROW else zip(beside, along, strict=True))
    pair, alone = (0, half) if place == TWO_ABOVE else (half, 0)
    of_pair = [(index * half + rng.randint(0, slack), pair + rng.randint(0, slack)) for index in range(2)]
    single = (rng.randint(0, SIDE - side), alone + rng.randint(0, slack))
    return [*of_pair, single] if place == TWO_ABOVE else [single, *of_pair]


def _within(position: int, side: int) -> int:
    return min(max(position, 0), SIDE - side)


def _plain(colour: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """One colour, a little lighter at one end, with fine noise."""
    base = np.array(colour) + np.array([rng.randint(-10, 10) for _ in range(3)])
    ramp = np.linspace(-1, 1, SIDE) * rng.uniform(-10, 10)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 2, (SIDE, SIDE, 1))
    lightness = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    return Image.fromarray(np.clip(base + lightness + noise, 0, 255).astype(np.uint8))


def _photographic(ground: str, rng: random.Random) -> Image.Image:
    """Most of a photograph, as often as not mirrored, out of focus, lighter or darker."""
    photograph = photographs()[ground]
    side = int(min(photograph.size) * rng.uniform(0.75, 1.0))
    left, top = (rng.randint(0, size - side) for size in photograph.size)
    part = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    blurred = part.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 3)))
    brightness = rng.uniform(0.8, 1.15)
    return blurred.point(lambda value: value * brightness)


@cache
def photographs() -> dict[str, Image.Image]:
    """The photographs, by what is said of them."""
    return {
        ground: Image.open(io.BytesIO(read_members(package, [name])[name])).convert("RGB")
        for ground, (package, name) in PHOTOGRAPHS.items()
    }


@cache
def emoji(style: str) -> dict[str, Image.Image]:
    """Each noun's picture in a style, RGBA."""
    package, names = _STYLES[style]
    found = {noun: names.format(code=code) for noun, code in codes().items()}
    contents = read_members(package, found.values())
    return {noun: Image.open(io.BytesIO(contents[name])).convert("RGBA") for noun, name in found.items()}


_ARRANGEMENTS = {1: list(PLACES.values()), 2: [ROW, COLUMN], 3: [TWO_ABOVE, TWO_BELOW]}
_STYLES = {
    "noto": (NOTO, "package/img/google/64/{code}.png"),
    "twemoji": (TWEMOJI, "package/img/twitter/64/{code}.png"),
    "fluent": (FLUENT, "package/assets/{code}.webp"),
}
