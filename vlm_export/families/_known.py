"""What is told of the families without importing them, and torch with them."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_export import families
from vlm_export.contract import LayoutName
from vlm_export.errors import InputError

# Layouts of the families that have others than `chat`, the usual one first: tests compare with the families.
_JOINED = ("llava", "llava_onevision", "internvl", "got_ocr2", "deepseek_vl", "idefics3", "smolvlm")
_LAYOUTS: Mapping[str, tuple[LayoutName, ...]] = {
    **dict.fromkeys(_JOINED, ("chat", "single")),
    "prefix_conditioning_vlm": ("captioner", "chat", "components", "single"),
    "vision-encoder-decoder": ("captioner", "single"),
    "florence2": ("tasks",),
}
# Model types that are no family, and what to do with a checkpoint of one.
_INSTEAD = {
    "llava_qwen2": "this is FastVLM with code of its own; convert it to a fast_vlm with transformers' "
    "convert_fastvlm_weights_to_hf.py, or start from one of KamilaMila/FastVLM-0.5B, -1.5B, -7B",
}


@dataclass(frozen=True)
class _Renamed:
    """What a config calls otherwise than its family does: the `model_type`, and keys: the new name of each."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)


# By the class that a config's `architectures` name, where its `model_type` is that of another family.
_BY_ARCHITECTURE = {
    "LightOnOCRForConditionalGeneration": _Renamed("lighton_ocr", {"image_token_index": "image_token_id"}),
}
_OWN_CODE = "; the code that its auto_map names is run with `trust_remote_code: true` and a full commit as `revision`"


def named_as_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` under the names of its family, where its `architectures` say that it is of another than it says.

    Checkpoints that are older than their class in transformers call themselves by the type that they came from.
    """
    classes = config.get("architectures") or [""]
    renamed = _BY_ARCHITECTURE.get(str(classes[0]))
    if renamed is None or config.get("model_type") == renamed.model_type:
        return dict(config)
    return {renamed.keys.get(key, key): value for key, value in config.items()} | {"model_type": renamed.model_type}


def module_names() -> list[str]:
    """The modules of all families: each of this package is one's, but `registry` and those whose name begins with `_`.

    A module has its family's `model_type` as its name, with `_` for `-`.
    """
    found = (module.name for module in pkgutil.iter_modules(families.__path__))
    return sorted(name for name in found if name != "registry" and not name.startswith("_"))


def layouts_of(model_type: object, source: str, *, has_code: bool = False) -> tuple[LayoutName, ...]:
    """The layouts of a family, the usual one first; `source` is the file that named the `model_type`.

    Raises:
        InputError: no family has that name.
    """
    if model_type is None:
        raise InputError(f"{source}: no `model_type`; is this a model folder?")
    written = {name.replace("-", "_"): name for name in _LAYOUTS}
    known = [written.get(module, module) for module in module_names()]
    if str(model_type) not in known:
        raise InputError(f"{source}: {not_supported(model_type, has_code=has_code)}")
    return _LAYOUTS.get(str(model_type), ("chat",))


def not_supported(model_type: object, *, has_code: bool) -> str:
    """What to do with a checkpoint of no family; `has_code` says that its config names code of its own."""
    instead = _INSTEAD.get(str(model_type), "`vlm-export recipes` lists the families that are")
    return f"model_type {model_type!r} is not supported; {instead}{_OWN_CODE if has_code else ''}"
