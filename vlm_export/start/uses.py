"""What a model is exported for, and the dtypes that serve that best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from vlm_export.dtypes import FP32, PREFERRED

Use = Literal["browser", "node", "server"]
_DEVICES: Mapping[Use, tuple[str, ...]] = {"browser": ("wasm", "webgpu"), "node": ("cpu",), "server": ("cpu",)}
USES: tuple[Use, ...] = get_args(Use)
USUAL: tuple[Use, ...] = ("browser",)


def dtypes_for(uses: Iterable[Use]) -> tuple[str, ...]:
    """float32, which the others are made of, and the first choice of each device that these uses run on."""
    best = [PREFERRED[device][0] for use in uses for device in _DEVICES[use]]
    return tuple(dict.fromkeys([FP32.name, *best]))
