"""The demo page as a static Space beside the model, under the same name; each links to the other."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from vlm_export import hub
from vlm_export.apps import demo_site
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.publish.gate import Destination
from vlm_export.recipe import RecipeFile
from vlm_export.runtime.images import open_image

_SAMPLES = "samples/"


def space_files(recipe: RecipeFile, work: Work, to: Destination) -> hub.Files:
    """The files of the Space for the model that goes to a destination.

    Samples are golden images, made again of their pixels alone; none, where the recipe keeps its pictures back.

    Raises:
        InputError: the model does not go to the main branch; or transformers.js cannot be installed.
    """
    if to.revision is not None or to.create_pr:
        raise InputError(
            "--create-space: shows what is on the main branch: push there, without --revision, --create-pr"
        )
    goldens = recipe.golden_dir if recipe.recipe.hub.pictures else None
    home = demo_site.Home(to.repo_id, hub.page_of(to.repo_id))
    site = demo_site.build(work.repo, goldens, cached=True, home=home)
    return {name: _published(name, content) for name, content in demo_site.with_notes(site).items()}


def _published(name: str, content: Path | bytes) -> Path | bytes:
    if not name.startswith(_SAMPLES) or isinstance(content, bytes):
        return content
    pixels = BytesIO()
    open_image(content).save(pixels, "PNG")
    return pixels.getvalue()
