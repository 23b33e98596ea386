"""Where the bundled recipes and goldens are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "bundled"  # pyproject.toml maps `recipes/` and `golden/` here when it builds a wheel
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent

RECIPES = ROOT / "recipes"
GOLDEN = ROOT / "golden"
_PHOTOGRAPHS = GOLDEN / "photographs"
DEFAULT_RECIPE = "shapes-captioner"


def photographs() -> list[Path]:
    """The bundled photographs, by name: as cameras write them, and of kinds that decoders read in different ways."""
    return sorted(path for path in _PHOTOGRAPHS.iterdir() if path.suffix in (".jpg", ".png"))


def recipe_names() -> list[str]:
    """Names of the bundled recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
