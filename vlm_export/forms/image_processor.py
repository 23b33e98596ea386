"""`preprocessor_config.json`, and the section of a `processor_config.json` or of a recipe that says the same."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vlm_export.forms.form import AboveZero, Form, Switch, Text

LARGEST_SIDE = 16_384  # pixels
LARGEST_AREA = 40_000_000  # pixels of a picture, where a size says how many in all
_MOST_TOGETHER = 1024  # patches that become one, frames that do
_MOST_TILES = 64  # of a picture

_Pixels = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
_Name = Annotated[str | None, Field(description="the name of a class")]
_Side = Literal["height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"]
_Crop = Annotated[
    _Pixels
    | Annotated[list[_Pixels], Field(min_length=2, max_length=2)]
    | Annotated[dict[Literal["height", "width"], _Pixels], Field(min_length=2)]
    | None,
    Field(description=f"pixels from 1 to {LARGEST_SIDE:,}: a number, two of them, or height and width by name"),
]
_Size = Annotated[
    _Pixels | Annotated[list[_Pixels], Field(min_length=2, max_length=2)] | dict[_Side, _Pixels | None] | None,
    Field(description=f"pixels from 1 to {LARGEST_SIDE:,}: a number, two of them, or height and width by name"),
]
_PixelCount = Annotated[int, Field(ge=1, le=LARGEST_AREA)]
_Area = Annotated[_PixelCount | None, Field(description=f"a number of pixels, from 1 to {LARGEST_AREA:,}")]
_Areas = Annotated[
    dict[_Side, _PixelCount | None] | None,
    Field(description=f"shortest_edge and longest_edge, numbers of pixels from 1 to {LARGEST_AREA:,}"),
]
_Count = Annotated[
    Annotated[int, Field(ge=1, le=_MOST_TOGETHER)] | None, Field(description=f"a number from 1 to {_MOST_TOGETHER:,}")
]
_Tiles = Annotated[
    Annotated[int, Field(ge=1, le=_MOST_TILES)] | None, Field(description=f"a number of tiles, from 1 to {_MOST_TILES}")
]
_Rows = Annotated[
    Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None,
    Field(description=f"a number of tokens, from 1 to {LARGEST_SIDE:,}"),
]
_Tile = Annotated[_Pixels | None, Field(description=f"pixels from 1 to {LARGEST_SIDE:,}")]
_ThreeNumbers = Annotated[list[float | int], Field(min_length=3, max_length=3)]
_Means = Annotated[
    float | int | _ThreeNumbers | None, Field(description="a number, or a list of one for each of the three colours")
]
_AboveZero = Annotated[float | int, Field(gt=0)]
_Deviations = Annotated[
    _AboveZero | Annotated[list[_AboveZero], Field(min_length=3, max_length=3)] | None,
    Field(description="a number above 0, or a list of one for each of the three colours"),
]
_Filter = Annotated[
    Annotated[int, Field(ge=0, le=5)] | None, Field(description="a number from 0 to 5, of Pillow's filters")
]


class ImageProcessor(Form):
    """What it may hold."""

    image_processor_type: _Name = None
    feature_extractor_type: _Name = None
    processor_class: _Name = None
    do_convert_rgb: Switch = None
    do_resize: Switch = None
    do_center_crop: Switch = None
    do_rescale: Switch = None
    do_normalize: Switch = None
    do_pad: Switch = None
    size: _Size = None
    crop_size: _Crop = None
    max_image_size: _Size = None
    pad_size: _Size = None
    resample: _Filter = None
    patch_size: _Size = None
    merge_size: _Count = None
    temporal_patch_size: _Count = None
    do_image_splitting: Switch = None
    use_thumbnail: Switch = None
    min_tiles: _Tiles = None
    max_tiles: _Tiles = None
    tile_size: _Tile = None
    encoder_patch_size: _Count = None
    downsample_factor: _Count = None
    min_image_tokens: _Rows = None
    max_image_tokens: _Rows = None
    max_pixels_tolerance: AboveZero = None
    rescale_factor: AboveZero = None
    image_mean: _Means = None
    image_std: _Deviations = None


class OfPatches(ImageProcessor):
    """The same of a processor whose `shortest_edge` and `longest_edge` are no edges: numbers of pixels in all."""

    size: _Areas = None
    min_pixels: _Area = None
    max_pixels: _Area = None


class Processor(Form):
    """What a `processor_config.json` may hold; what it says of image processors has the form of its own file."""

    model_config = ConfigDict(extra="ignore")

    processor_class: _Name = None
    image_token: Text = None
    image_break_token: Text = None
    image_end_token: Text = None
    spatial_merge_size: _Count = None
    post_processor_config: Annotated[dict[str, object] | None, Field(description="rules by name of a task")] = None
    patch_size: _Area = None  # of a repo whose processor is to count no patches, larger than any image
    num_additional_image_tokens: Annotated[
        Annotated[int, Field(ge=0, le=LARGEST_SIDE)] | None, Field(description=f"a number, from 0 to {LARGEST_SIDE:,}")
    ] = None
    image_seq_length: Annotated[
        Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None, Field(description=f"a number, from 1 to {LARGEST_SIDE:,}")
    ] = None
    image_seq_len: Annotated[
        Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None, Field(description=f"a number, from 1 to {LARGEST_SIDE:,}")
    ] = None
    vision_feature_select_strategy: Text = None
    image_processor: Annotated[dict[str, object] | None, Field(description="settings of an image processor")] = None
