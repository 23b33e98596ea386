"""Make the photographs of golden/photographs of those that scikit-image ships: `pip install scikit-image` first.

Three as cameras write them, and three of kinds that decoders read in different ways: grey, transparent, 16 bits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parents[1] / "golden" / "photographs"
_QUALITY = 85  # of JPEG


def main() -> None:
    """Write all six."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise SystemExit("scikit-image is not installed: pip install scikit-image")
    data = Path(found.origin).parent / "data"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, source, size in (
        ("astronaut", "astronaut", (400, 400)),
        ("cat", "chelsea", (451, 300)),
        ("coffee", "coffee", (450, 300)),
        ("photographer-grey", "camera", (320, 320)),
    ):
        Image.open(data / f"{source}.png").resize(size).save(FOLDER / f"{name}.jpg", quality=_QUALITY)
    cat = Image.open(data / "chelsea.png").convert("RGB").resize((180, 120))
    cat.putalpha(_fading_out(cat.width, cat.height))
    cat.save(FOLDER / "cat-transparent.png", optimize=True)
    grey = np.asarray(Image.open(data / "camera.png").resize((128, 128)), dtype=np.uint16)
    Image.fromarray(grey * 257).save(FOLDER / "photographer-16-bits.png", optimize=True)


def _fading_out(width: int, height: int) -> Image.Image:
    """Opaque in the middle, transparent at the corners."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return Image.fromarray((255 * np.clip(1.4 - np.hypot(x, y), 0, 1)).astype(np.uint8))


if __name__ == "__main__":
    main()
