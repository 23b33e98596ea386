"""What is told of the families without importing them, and torch with them; `tests/test_inspect.py` compares."""

from __future__ import annotations

from collections.abc import Mapping

from vlm_export.contract import LayoutName
from vlm_export.errors import InputError

# The layouts that each family's models can be published in, the usual one first.
LAYOUTS: Mapping[str, tuple[LayoutName, ...]] = {
    "fast_vlm": ("chat",),
    "idefics3": ("chat",),
    "internvl": ("chat",),
    "llava": ("chat",),
    "llava_onevision": ("chat",),
    "prefix_conditioning_vlm": ("captioner", "chat", "components"),
    "smolvlm": ("chat",),
    "vision-encoder-decoder": ("captioner",),
}

# Model types that are no family, and what to do with a checkpoint of one.
INSTEAD = {
    "llava_qwen2": "this is FastVLM with code of its own; convert it to a fast_vlm with transformers' "
    "convert_fastvlm_weights_to_hf.py, or start from one of KamilaMila/FastVLM-0.5B, -1.5B, -7B",
}


def layouts_of(model_type: object, source: str) -> tuple[LayoutName, ...]:
    """The layouts of a family, the usual one first; `source` is the file that named the `model_type`.

    Raises:
        InputError: no family has that name.
    """
    if model_type is None:
        raise InputError(f"{source}: no `model_type`; is this a model folder?")
    found = LAYOUTS.get(str(model_type))
    if found is None:
        instead = INSTEAD.get(str(model_type), f"supported: {', '.join(LAYOUTS)}")
        raise InputError(f"{source}: model_type {model_type!r} is not supported; {instead}")
    return found
