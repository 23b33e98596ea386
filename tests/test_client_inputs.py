"""What a client is fed, compared: ids and pixels that differ, and pictures that decoders read differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_export.verify.client_inputs import coarse, ids_difference, peculiarity, pixel_difference


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([1, 2, 3], ""),
        ([1, 9, 3], "from id 2: [1, 9, 3], PyTorch's [1, 2, 3]"),
        ([1, 2], "from id 3: [1, 2], PyTorch's [1, 2, 3]"),
        ([1, 2, 3, 4], "from id 4: [1, 2, 3, 4], PyTorch's [1, 2, 3]"),
        ([], "from id 1: [], PyTorch's [1, 2, 3]"),
    ],
)
def test_where_prompts_part(found: list[int], said: str) -> None:
    assert ids_difference(found, [1, 2, 3]) == said


def test_pixels() -> None:
    one = np.random.default_rng(0).normal(size=(1, 3, 16, 18))
    assert pixel_difference(one, one) == 0
    assert pixel_difference(one + 0.5, one) == pytest.approx(0.5)
    assert pixel_difference(None, one) == pixel_difference(one[..., :8], one) == np.inf
    parts = coarse(one)
    assert parts is not None and parts.shape == (1, 3, 4, 4)
    assert parts[0, 0, 0, 0] == pytest.approx(one[0, 0, :4, :5].mean())
    assert parts[0, 2, 3, 3] == pytest.approx(one[0, 2, 12:, 14:].mean())
    noisy = pixel_difference(coarse(one + np.random.default_rng(1).normal(size=one.shape)), parts)
    assert noisy < 0.4 < pixel_difference(coarse(one + 0.5), parts)


def with_exif(path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
DEEP = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
ALPHA = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16))
PICTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rgb.png": (RGB.save, ""),
    "rgb.jpg": (RGB.save, ""),
    "grey.png": (RGB.convert("L").save, ""),
    "palette.png": (RGB.convert("P").save, ""),
    "bits.png": (RGB.convert("1").save, ""),
    "alpha.png": (Image.merge("RGBA", (*RGB.split(), ALPHA)).save, "transparent"),
    "grey-alpha.png": (Image.merge("LA", (ALPHA, ALPHA)).save, "grey with transparency, which transformers.js"),
    "palette-alpha.png": (lambda path: RGB.convert("P").save(path, transparency=bytes(range(256))), "transparent"),
    "one-colour.png": (lambda path: RGB.save(path, transparency=(0, 0, 255)), "transparent"),
    "deep.png": (DEEP.save, "more than 8 bits"),
    "float.tif": (DEEP.convert("F").save, "more than 8 bits"),
    "print.jpg": (RGB.convert("CMYK").save, "CMYK"),
    "moving.gif": (lambda path: RGB.save(path, save_all=True, append_images=[RGB.rotate(180)]), "animated"),
    "turned.jpg": (lambda path: with_exif(path, RGB), "turned by its EXIF data"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_decoders_read_differently(name: str, tmp_path: Path) -> None:
    save, said = PICTURES[name]
    save(tmp_path / name)
    found = peculiarity(tmp_path / name)
    assert said in found if said else found == ""
