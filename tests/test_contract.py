"""vlm_export.contract: Python, our JavaScript and the Node driver go by one table, which is transformers.js' own."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoImageProcessor

from vlm_export import contract, patches
from vlm_export.runtime.drivers import choose_driver
from vlm_export.web.node_runtime import node_home, scripts_home

ROOT = Path(__file__).parents[1]
CLASSES = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES"


def in_javascript(path: Path) -> dict[str, object]:
    code = f"import * as all from {json.dumps(path.as_uri())}; console.log(JSON.stringify(all))"
    command = ["node", "--input-type=module", "--eval", code]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_javascript_has_the_same() -> None:
    assert in_javascript(scripts_home() / "contract.mjs") == {
        "MODEL_TYPES": contract.MODEL_TYPES,
        "IMAGE_PROCESSORS": {
            name: {"cut": kind.cut, "text_first": kind.text_first} for name, kind in contract.IMAGE_PROCESSORS.items()
        },
        "GRID_TYPES": list(contract.GRID_TYPES),
        "NUMBERED_FROM_ONE": list(contract.NUMBERED_FROM_ONE),
        "PROCESSORS": {name: asdict(written) for name, written in contract.PROCESSORS.items()},
        "PREFIX": contract.PREFIX,
        "SUFFIXES": contract.SUFFIXES,
        "SINGLE_OPTIONS": list(contract.SINGLE_OPTIONS),
        "SEARCH_OPTIONS": list(contract.SEARCH_OPTIONS),
        "SAMPLING_OPTIONS": list(contract.SAMPLING_OPTIONS),
        "EARLY_STOPPING": list(contract.EARLY_STOPPING),
    }, "run `python scripts/contract.py`"


def test_the_table_is_that_of_transformers_js() -> None:
    """Suffixes and classes as they stand in the pinned package's own bundle."""
    bundle = node_home() / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
    source = bundle.read_text(encoding="utf-8")
    found = re.search(r"DEFAULT_DTYPE_SUFFIX_MAPPING = [^{]*\{(.*?)\}", source, re.DOTALL)
    assert found
    names = dict(re.findall(r"\[DATA_TYPES\.(\w+)\]: \"(\w*)\"", found[1]))
    assert names == contract.SUFFIXES
    for model_type, layout in contract.MODEL_TYPES.items():
        assert (f'["{model_type}", ' in source) == (layout not in ("components", "single")), model_type


def test_the_image_processors_are_those_of_transformers_js() -> None:
    """Each is a class of its own, made under transformers' defaults; tiles come with a mask, patches with a grid."""
    library = node_home() / "node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    defaults = {
        name: {
            **kind.defaults,
            **kind.wanted,
            "do_resize": "do_resize" not in kind.inert,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
        }
        for name, kind in contract.IMAGE_PROCESSORS.items()
    }
    code = f"""
        import * as all from {json.dumps(library.as_uri())};
        const image = new all.RawImage(new Uint8ClampedArray(3 * 8 * 6), 8, 6, 3);
        const made = {{}};
        for (const [name, settings] of Object.entries({json.dumps(defaults)})) {{
            made[name] = Object.keys(await new all[name](settings)([image]));
        }}
        console.log(JSON.stringify(made));
    """
    command = ["node", "--input-type=module", "--eval", code]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    beside = {"tiles": {"pixel_attention_mask"}, "patches": {"image_grid_thw"}}
    beside["patched tiles"] = {"pixel_attention_mask", "spatial_shapes"}
    for name, kind in contract.IMAGE_PROCESSORS.items():
        assert set(made[name]) & set.union(*beside.values()) == beside.get(kind.cut, set()), name


@pytest.mark.parametrize("name", [name for name, kind in contract.IMAGE_PROCESSORS.items() if not kind.fills])
def test_the_defaults_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name}))
    with patches.image_processor_without_torchvision(name):
        settings = AutoImageProcessor.from_pretrained(tmp_path, backend="pil").to_dict()
    defaults = contract.IMAGE_PROCESSORS[name].defaults
    assert json.loads(json.dumps({key: settings[key] for key in defaults})) == defaults


def test_every_model_type_has_a_driver() -> None:
    for model_type, layout in contract.MODEL_TYPES.items():
        for prefix in (False, True):
            config = {"model_type": model_type, "image_token_id": 1, contract.PREFIX: prefix}
            files = {"config.json": config, "generation_config.json": {"decoder_start_token_id": 0}}
            assert ("vision_encoder" in choose_driver(files).components) == (layout != "captioner")
