"""docs/families.md says what the code and its tests say, and every family has what one must have."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import encoder_decoders
import pico
import pico_florence
import pytest
import test_chat_families
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import families  # noqa: E402

from vlm_export import __version__, bundled  # noqa: E402
from vlm_export.dtypes import DTYPES  # noqa: E402
from vlm_export.errors import InputError  # noqa: E402
from vlm_export.families.registry import find_family, names  # noqa: E402
from vlm_export.recipe import find_recipe, load_recipe  # noqa: E402
from vlm_export.source import fetch  # noqa: E402
from vlm_export.spec.family import Family  # noqa: E402

FAMILIES = [find_family(name, "test") for name in names()]
PROOFS = list(families.proofs())


def parts_in_tests() -> dict[str, tuple[set[str], set[str]]]:
    """Towers and decoders that each family is run with; the tables' own tests see to it that all of them are."""
    parts: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    parts["prefix_conditioning_vlm"] = set(pico.TOWERS), set(pico.DECODERS)
    decoders = {model_type for model_type, _ in encoder_decoders.DECODERS.values()}
    parts["vision-encoder-decoder"] = set(encoder_decoders.ENCODERS), decoders
    florence = pico_florence.config()
    parts["florence2"] = {florence.vision_config.model_type}, {florence.text_config.model_type}
    for kind in test_chat_families.KINDS:
        model_type, tower, decoder = kind.split(", ")
        parts[model_type][0].add(tower)
        parts[model_type][1].add(decoder)
    return parts


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model_type)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_the_page_is_what_the_code_says() -> None:
    written = families.PAGE.read_text(encoding="utf-8")
    assert written == families.page(), "docs/families.md is out of date: run `python scripts/families.py`"


def test_the_guide_is_about_what_there_is() -> None:
    guide = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", guide)
    rows = {name for row in re.findall(r"^\| (.*?) \|", guide, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in fields(Family)} <= rows
    paths = [span for span in spans if re.fullmatch(r"(vlm_export|tests|recipes|golden|scripts)/[\w./-]+", span)]
    assert paths and not [path for path in paths if not (ROOT / path).exists()]
    modules = {
        "_chat": "families._chat",
        "chat": "models.chat",
        "library": "models.library",
        "preprocessing": "preprocessing",
    }
    names = [span.split("(")[0].split(".") for span in spans if re.match(rf"({'|'.join(modules)})\.", span)]
    assert {module for module, _ in names} == modules.keys()
    for module, name in names:
        assert hasattr(import_module(f"vlm_export.{modules[module]}"), name), f"{module}.{name}"


def test_every_layout_is_verified_in_every_runtime(family: Family) -> None:
    proved = {(proof.layout, proof.runtime) for proof in PROOFS if proof.model_type == family.model_type}
    for name, layout in family.layouts.items():
        assert (name, "ort") in proved
        assert ((name, "node") in proved) == (layout.client.node is not None)


def test_marks_name_what_there_is() -> None:
    layouts = {family.model_type: family.layouts for family in FAMILIES}
    for proof in PROOFS:
        assert proof.layout in layouts[proof.model_type], proof
        assert proof.runtime in families.COLUMNS, proof
        assert proof.dtypes and set(proof.dtypes) <= DTYPES.keys(), proof


def test_parts_are_those_of_the_tests(family: Family) -> None:
    towers, decoders = parts_in_tests()[family.model_type]
    assert (set(family.about.towers), set(family.about.decoders)) == (towers, decoders)


def test_since_is_a_version_that_there_was(family: Family) -> None:
    assert numbers(family.about.since) <= numbers(__version__)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_every_family_has_a_recipe(family: Family) -> None:
    assert any(find_recipe(name).recipe.model_type == family.model_type for name in bundled.recipe_names())


@pytest.mark.parametrize("name", bundled.recipe_names())
def test_every_recipe_is_of_a_family(name: str) -> None:
    recipe = find_recipe(name).recipe
    (found,) = (family for family in FAMILIES if family.model_type == recipe.model_type)
    assert recipe.layout in found.layouts


def test_a_model_of_another_family_than_the_recipe_says(tmp_path: Path) -> None:
    pico.write_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump({"name": "pico", "model": "checkpoint", "model_type": "llava"}))
    message = (
        r"pico\.yaml: model_type: 'llava', but .*config\.json says 'prefix_conditioning_vlm'; correct or remove it"
    )
    with pytest.raises(InputError, match=message):
        fetch.sources(load_recipe(path))
