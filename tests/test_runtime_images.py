"""Pictures become the very arrays that transformers' PIL processors make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from vlm_export.errors import InputError
from vlm_export.preprocessing import pixel_values
from vlm_export.runtime.images import ImageProcessor, open_image

SQUARE = {"height": 24, "width": 24}
BESIDE = {"tiles": ["pixel_attention_mask"], "patches": ["image_grid_thw"]}
CASES: dict[str, dict[str, Any]] = {
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_convert_rgb": True},
    "SigLIP, not square, Lanczos": {
        "image_processor_type": "SiglipImageProcessorFast",
        "size": {"height": 20, "width": 32},
        "resample": 1,
        "default_to_square": False,
    },
    "no resize": {"image_processor_type": "SiglipImageProcessor", "do_resize": False},
    "not normalized": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_normalize": False},
    "not scaled": {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "do_rescale": False},
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": SQUARE},
    "CLIP, numbers": {"image_processor_type": "CLIPImageProcessor", "size": 24, "crop_size": 20},
    "CLIP, crop larger than the picture": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 15},
        "crop_size": {"height": 30, "width": 33},
    },
    "CLIP, both edges": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 24, "longest_edge": 30},
        "crop_size": SQUARE,
    },
    "CLIP, defaults": {"image_processor_type": "CLIPImageProcessor"},
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "image_mean": [0.1, 0.2, 0.3]},
    "ViT, a number": {"image_processor_type": "ViTImageProcessor", "size": 24},
    "ViT, defaults": {"image_processor_type": "ViTImageProcessor"},
    "Swin": {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "image_mean": [0.485, 0.456, 0.406]},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 28, "width": 28}, "crop_size": SQUARE},
    "DeiT, defaults": {"image_processor_type": "DeiTImageProcessor"},
    "DINOv2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": SQUARE,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "DINOv2, no crop": {
        "image_processor_type": "BitImageProcessor",
        "size": SQUARE,
        "do_center_crop": False,
        "crop_size": SQUARE,
    },
    "Idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 48},
        "max_image_size": {"longest_edge": 16},
    },
    "Idefics3, whole": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 48},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
    },
    "Pixtral": {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 40},
        "patch_size": {"height": 8, "width": 8},
    },
    "Pixtral, both edges": {
        "image_processor_type": "PixtralImageProcessorFast",
        "size": {"height": 30, "width": 50},
        "patch_size": 8,
        "do_pad": True,
    },
    "Pixtral, defaults": {"image_processor_type": "PixtralImageProcessor"},
    "Qwen2-VL": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "size": {"shortest_edge": 256, "longest_edge": 1024},
    },
    "Qwen2-VL, names of transformers 4": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 4,
        "merge_size": 3,
        "temporal_patch_size": 1,
        "min_pixels": 100,
        "max_pixels": 900,
    },
    "Qwen2-VL, defaults": {"image_processor_type": "Qwen2VLImageProcessor"},
    "GLM": {
        "image_processor_type": "Glm46VImageProcessor",
        "patch_size": 4,
        "size": {"shortest_edge": 512, "longest_edge": 2048},
    },
    "GLM, defaults": {"image_processor_type": "Glm46VImageProcessor"},
    "SmolVLM": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_pad": True,
        "do_convert_rgb": True,
        "video_sampling": {"fps": 1},
    },
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = {
    "wide": noise(70, 31),
    "high": noise(25, 66),
    "square": noise(48, 48),
    "small": noise(5, 4),
    "one pixel wide": noise(1, 40),
    "one pixel high": noise(33, 1),
    "one pixel": noise(1, 1),
}


def theirs(folder: Path, settings: dict[str, Any]) -> Any:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    reference, ours = theirs(tmp_path, settings), ImageProcessor(settings)
    for name, picture in PICTURES.items():
        try:
            expected = reference(images=[picture], return_tensors="np")
        except (ValueError, ZeroDivisionError) as error:  # a side of no pixels
            with pytest.raises(InputError):
                ours([picture])
            assert "one pixel" in name, error
            continue
        made = ours([picture]).arrays
        assert set(made) == {"pixel_values", *BESIDE.get(ours.cut, [])}
        for key, value in made.items():
            assert value.shape == expected[key].shape, (name, key)
            difference = np.abs(value.astype(np.float64) - expected[key].astype(np.float64)).max()
            assert difference <= 1e-6, (name, key, difference)
        assert made["pixel_values"].dtype == np.float32


@pytest.mark.parametrize("case", ["Idefics3", "SmolVLM"])
def test_tiles_of_several_pictures_and_how_they_were_cut(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    pictures = [PICTURES["wide"], PICTURES["square"], PICTURES["high"]]
    expected = theirs(tmp_path, settings)(images=[pictures], return_tensors="np", return_row_col_info=True)
    made = ImageProcessor(settings)(pictures)
    for key, value in made.arrays.items():
        assert value.shape == expected[key].shape
        assert np.abs(value.astype(np.float64) - expected[key]).max() <= 1e-6
    assert [tiles.rows for tiles in made.grids] == expected["rows"][0]
    assert [tiles.columns for tiles in made.grids] == expected["cols"][0]


def test_one_tile_of_llava_onevision(tmp_path: Path) -> None:
    """The first that transformers makes of an image that comes alone: all of it, as transformers.js has it."""
    settings = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": SQUARE,
        "image_grid_pinpoints": [[24, 24], [24, 48]],
        "do_pad": True,
    }
    for picture in (PICTURES["wide"], PICTURES["high"]):
        expected = theirs(tmp_path, settings)(images=[picture], return_tensors="np")["pixel_values"]
        made = ImageProcessor(settings)([picture]).arrays["pixel_values"]
        assert np.abs(made - expected[:, 0]).max() <= 1e-6


def write(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def test_opens_files_as_transformers_does(tmp_path: Path) -> None:
    """Upright by EXIF, gray and palette as RGB, and nothing left of transparency but white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = write(tmp_path / "turned.png", PICTURES["wide"], exif=exif)
    assert open_image(turned).size == (31, 70)
    with Image.open(turned) as opened:  # one that the caller opened is turned too
        made = ImageProcessor(CASES["no resize"])([opened]).arrays["pixel_values"]
    assert made.shape == (1, 3, 70, 31)
    gray = write(tmp_path / "gray.png", PICTURES["wide"].convert("L"))
    palette = write(tmp_path / "palette.png", PICTURES["wide"].quantize(16))
    deep = write(tmp_path / "deep.png", PICTURES["wide"].convert("I;16"))
    cmyk = write(tmp_path / "cmyk.jpg", PICTURES["wide"].convert("CMYK"))
    for path in (turned, gray, palette, deep, cmyk):
        found = open_image(path)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(load_image(str(path)))), path.name


def test_transparency_becomes_white_as_in_transformers_processors(tmp_path: Path) -> None:
    settings = CASES["SigLIP"]
    clear = PICTURES["wide"].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    gray = clear.convert("LA")
    keyed = PICTURES["wide"].quantize(16)
    for name, picture, options in (("rgba", clear, {}), ("la", gray, {}), ("key", keyed, {"transparency": 3})):
        path = write(tmp_path / f"{name}.png", picture, **options)
        with Image.open(path) as opened:
            expected = theirs(tmp_path, settings)(images=[opened], return_tensors="np")["pixel_values"]
        made = ImageProcessor(settings)([open_image(path)]).arrays["pixel_values"]
        assert np.abs(made - expected).max() <= 1e-6, name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "image_processor_type: 'DonutImageProcessor'"),
        ({}, "image_processor_type: None"),
        ({"image_processor_type": "SiglipImageProcessor", "do_pad": True}, "do_pad: True"),
        ({"image_processor_type": "SiglipImageProcessor", "do_thumbnail": True}, "do_thumbnail: True"),
        ({"image_processor_type": "CLIPImageProcessor", "do_sharpen": 2}, "do_sharpen: 2"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"max_height": 2}}, "size: {'max_height': 2}"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "resample: 9"),
    ],
)
def test_what_is_not_known_is_an_error_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"^preprocessor_config\.json: ") as error:
        ImageProcessor(settings)
    assert said in str(error.value)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b\.png: no such image"):
        open_image(tmp_path / "b.png")


def test_goldens_see_the_same_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = PICTURES["wide"].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    path = write(tmp_path / "turned.png", clear, exif=exif)
    golden = pixel_values([path], CASES["SigLIP"])
    assert np.abs(golden - ImageProcessor(CASES["SigLIP"])([open_image(path)]).arrays["pixel_values"]).max() <= 1e-6
