"""Draw the golden images: held-out scenes at the model's own size, and at others that must be resized.

    python recipes/shapes-captioner/draw_golden.py

Writes `golden/shapes-captioner/images/`; `vlm-export golden shapes-captioner` then records what the model says of them.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from shapes import draw, sample_scene

SEED = 2_000_000  # apart from training's and the held-out images' seeds
SIZES: tuple[int | tuple[int, int], ...] = (*[48] * 14, 64, 96, 224, 320, (96, 64), (200, 150))
FOLDER = Path(__file__).parents[2] / "golden" / "shapes-captioner" / "images"


def main() -> None:
    """Replace the folder's images by one scene for each size, named by number."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    rng = random.Random(SEED)
    for index, size in enumerate(SIZES):
        draw(sample_scene(rng), size).save(FOLDER / f"{index:02}.png")


if __name__ == "__main__":
    main()
