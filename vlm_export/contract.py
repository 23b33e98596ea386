"""What transformers.js loads and how it feeds it, as data that Python and JavaScript read.

`scripts/contract.py` writes the same as `js/src/contract.js`, which is put beside the Node driver as `contract.mjs`.
Source: transformers.js 4.3.1, `src/models/registry.js` (classes by `model_type`), `src/models/*/processing_*.js`
(calls), `src/utils/dtypes.js`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayoutName = Literal["captioner", "chat", "components"]


@dataclass(frozen=True)
class Loaded:
    """How a repo is loaded whose config.json has a `model_type`.

    Attributes:
        layout: which graphs there are, and the way that they are fed.
        tiles: whether its processor cuts images into tiles, which it feeds with a mask, and takes the text first.
    """

    layout: LayoutName
    tiles: bool = False


MODEL_TYPES: dict[str, Loaded] = {
    "vision-encoder-decoder": Loaded("captioner"),
    "llava": Loaded("chat"),
    "llava_onevision": Loaded("chat"),
    "llava_qwen2": Loaded("chat"),
    "idefics3": Loaded("chat", tiles=True),
    "smolvlm": Loaded("chat", tiles=True),
    "prefix_conditioning_vlm": Loaded("components"),  # by no class of its own, but by vlm_export/js
}
# A key of config.json: the image's features stand before the text, and have no ids. Ours: transformers.js keeps it.
PREFIX = "prefix_conditioning"
# What is appended to a graph's name, by dtype.
SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "uint8": "_uint8",
    "q8": "_quantized",
    "q4": "_q4",
    "q2": "_q2",
    "q1": "_q1",
    "q4f16": "_q4f16",
    "q2f16": "_q2f16",
    "q1f16": "_q1f16",
    "bnb4": "_bnb4",
}
