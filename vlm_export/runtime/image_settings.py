"""Read the settings of a `preprocessor_config.json`: each is known, or has no effect, or is an error that names it.

What a file is silent about is as transformers has it. Source: transformers 5.23, `PilBackend` in
`image_processing_backends.py`; its subclasses in `models/*/image_processing_pil_*.py` give each kind's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from vlm_export.contract import IMAGE_PROCESSORS, TASK_KEYS
from vlm_export.errors import InputError
from vlm_export.forms.image_processor import LARGEST_AREA

SETTINGS_FILE = "preprocessor_config.json"
_STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
# Settings that change nothing here: names, and what concerns other inputs than pictures or other libraries.
_INERT_SETTINGS = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "return_row_col_info",
    "video_sampling",
    "_valid_processor_keys",
    "default_to_square",
    "model_input_names",
    "image_seq_length",
    *TASK_KEYS,
}
# Settings that do something, with the values that are as good as none.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "do_pad": (None, False),
    "pad_size": (None,),
    "do_thumbnail": (None, False),
    "do_align_long_axis": (None, False),
    "do_flip_channel_order": (None, False),
    "do_reduce_labels": (None, False),
    "do_crop_margin": (None, False),
    "do_center_crop": (None, False),
    "crop_size": (None,),
    "device": (None,),
    "disable_grouping": (None,),
    "input_data_format": (None,),
    "data_format": (None, "channels_first"),
    "return_tensors": (None,),
    "crop_pct": (None,),
    "use_square_size": (None, False),
}


def kind_of(settings: Mapping[str, Any]) -> str:
    """The name in `IMAGE_PROCESSORS` of the processor that the settings are for. Raises InputError if it has none."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in IMAGE_PROCESSORS:
        known = ", ".join(IMAGE_PROCESSORS)
        raise InputError(f"{SETTINGS_FILE}: image_processor_type: {name or None!r} is not supported: there is {known}")
    return name


def checked(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of the processor of this name, with transformers' defaults."""
    kind = IMAGE_PROCESSORS[name]
    known = {**kind.wanted, **kind.defaults}
    given = {key: value for key, value in settings.items() if value is not None and key not in kind.inert}
    if kind.cut == "patches":
        given = _with_areas(given)
    merged = {**_STEPS, **kind.defaults, **given}
    for key, value in merged.items():
        if (
            key in _STEPS
            or key in known
            or key in _INERT_SETTINGS
            or key in ("resample", "image_mean", "image_std", "size")
        ):
            continue
        if key in ("do_center_crop", "crop_size") and kind.cut == "whole":
            continue
        if value not in _INERT_VALUES.get(key, ()):
            raise InputError(f"{SETTINGS_FILE}: {key}: {value!r} is not supported of a {name}")
    for key in ("size", "crop_size", "max_image_size"):
        if key in merged:
            merged[key] = _size(key, merged[key], square=key != "size" or "shortest_edge" not in known["size"])
    if kind.cut == "patched tiles":
        _check_tiles(merged)
    for key in ("image_mean", "image_std"):
        merged[key] = [merged[key]] * 3 if isinstance(merged[key], int | float) else merged[key]
    if merged["resample"] not in [int(one) for one in Image.Resampling]:
        raise InputError(f"{SETTINGS_FILE}: resample: {merged['resample']!r} is none of Pillow's filters, 0 to 5")
    return merged


def _check_tiles(settings: Mapping[str, Any]) -> None:
    """Raises InputError for tiles of no whole cells, limits that leave nothing, and more pixels than any model has."""
    cell = settings["encoder_patch_size"] * settings["downsample_factor"]
    if settings["tile_size"] % cell:
        raise InputError(
            f"{SETTINGS_FILE}: tile_size: {settings['tile_size']} is no number of whole cells of {cell} pixels"
        )
    for least, most in (("min_tiles", "max_tiles"), ("min_image_tokens", "max_image_tokens")):
        if settings[least] > settings[most]:
            raise InputError(f"{SETTINGS_FILE}: {least}: {settings[least]} is above {most}, {settings[most]}")
    pixels = (settings["max_tiles"] + 1) * max(settings["tile_size"] ** 2, settings["max_image_tokens"] * cell**2)
    if pixels > LARGEST_AREA:
        raise InputError(
            f"{SETTINGS_FILE}: max_tiles: tiles and the whole have {pixels:,} pixels together: make fewer or "
            f"smaller ones, of at most {LARGEST_AREA:,}"
        )


def _with_areas(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with numbers of pixels under the names of today, if they are under those of transformers 4."""
    size = dict(settings.get("size") or {})
    for older, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if older in settings:
            size[name] = settings[older]
    plain = {key: value for key, value in settings.items() if key not in ("min_pixels", "max_pixels", "size")}
    return plain | ({"size": size} if size else {})


def _size(name: str, value: Any, *, square: bool) -> dict[str, int]:
    """A size as a mapping; one number is both sides, or the shorter one where a processor keeps proportions."""
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    forms: tuple[set[str], ...] = (
        {"height", "width"},
        {"shortest_edge"},
        {"shortest_edge", "longest_edge"},
        {"longest_edge"},
    )
    if isinstance(value, Mapping):
        given = {key: side for key, side in value.items() if side is not None}
        if set(given) in forms and all(isinstance(side, int) and side > 0 for side in given.values()):
            return given
    raise InputError(f"{SETTINGS_FILE}: {name}: {value!r} is no size: give height and width, or shortest_edge")
