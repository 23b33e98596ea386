"""Reads what lies in a folder that somebody else may have filled: no file but the folder's own, each in its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_export.contract import IMAGE_PROCESSORS
from vlm_export.errors import InputError
from vlm_export.files import read_json, text_of
from vlm_export.forms.exported import Exported
from vlm_export.forms.form import Form, checked
from vlm_export.forms.generation import Generation
from vlm_export.forms.image_processor import ImageProcessor, OfPatches, Processor
from vlm_export.forms.model_config import check_config
from vlm_export.forms.tokenizer import Tokenizer
from vlm_export.own_files import own_file

_LARGEST_TEMPLATE_BYTES = 1_000_000
_IMAGE_PROCESSORS = ("image_processor", "video_processor")


def json_of(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a folder's JSON file, in the form that files of this name have; None where there is no such file.

    Raises:
        InputError: it is a link that leads out of the folder, or no file; holds no JSON object; or a value in it is not
            what it must be.
    """
    path = own_file(folder, name)
    if path is None:
        return None
    values = read_json(path)
    if (check := _CHECKS.get(path.name)) is not None:
        check(values, str(path))
    return values


def needed_json_of(folder: Path, name: str) -> dict[str, Any]:
    """As `json_of`; raises InputError where there is no such file, too."""
    values = json_of(folder, name)
    if values is None:
        raise InputError(f"{folder / name}: no such file")
    return values


def template_of(folder: Path, name: str) -> str | None:
    """The text of a chat template's own file; None where there is no such file.

    Raises:
        InputError: as of `json_of`, or it is no text, or too large.
    """
    path = own_file(folder, name)
    if path is None:
        return None
    try:
        return text_of(path, _LARGEST_TEMPLATE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: chat template: cannot be read as text: {error}") from error


def check_image_processor(values: Mapping[str, Any], where: str) -> None:
    """Raises InputError where settings of an image processor, which stand at `where`, are not what they must be."""
    checked(values, OfPatches if _counts_pixels(values) else ImageProcessor, where)


def _counts_pixels(values: Mapping[str, Any]) -> bool:
    """Whether the edges of a size are numbers of pixels in all; of an unnamed processor's, where there are two."""
    name = values.get("image_processor_type")
    if isinstance(name, str):
        kind = IMAGE_PROCESSORS.get(name.removesuffix("Fast").removesuffix("Pil"))
        return kind is not None and kind.cut == "patches"
    size = values.get("size")
    return isinstance(size, Mapping) and size.keys() == {"shortest_edge", "longest_edge"}


def _check_processor(values: Mapping[str, Any], path: str) -> None:
    checked(values, Processor, path)
    for key in _IMAGE_PROCESSORS:
        if isinstance(section := values.get(key), dict):
            check_image_processor(section, f"{path}: {key}")


def _check_exported(values: Mapping[str, Any], path: str) -> None:
    checked(values, Exported, path)
    check_image_processor(values.get("in_graph") or {}, f"{path}: in_graph")


def _of(form: type[Form]) -> Callable[[Mapping[str, Any], str], Any]:
    return lambda values, path: checked(values, form, path)


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], str], Any]] = {
    "config.json": check_config,
    "generation_config.json": _of(Generation),
    "preprocessor_config.json": check_image_processor,
    "processor_config.json": _check_processor,
    "tokenizer_config.json": _of(Tokenizer),
    "special_tokens_map.json": _of(Tokenizer),
    "chat_template.json": _of(Tokenizer),
    "export.json": _check_exported,
}
