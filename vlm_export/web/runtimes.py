"""The runtimes of stock transformers.js behind one interface: Node, and Chromium with WASM or WebGPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from vlm_export.targets import ClientTarget
from vlm_export.web import chromium, node_runtime
from vlm_export.web.captions import Caption, Captions, Item, Layout


class Captioning(Protocol):
    """Captions items with a repo's graphs of one dtype, and calls `on_item` after each one.

    Raises CheckFailed when the model does not load or run, NoAnswer when that takes too long.
    """

    def __call__(
        self,
        repo: Path,
        /,
        *,
        layout: Layout,
        dtype: str,
        items: Sequence[Item],
        generation: Mapping[str, float],
        on_item: Callable[[Caption], None] | None = None,
    ) -> Captions:
        """What was said of the items, in their order."""


@dataclass(frozen=True)
class Runtime:
    """Where transformers.js runs, all that it needs being there.

    Attributes:
        target: its name.
        caption: captions with it.
        versions: of what it runs on.
        no_float16: why it cannot compute in float16, or nothing.
        is_software: whether a processor plays what it runs on, so that slowness says nothing about a model.
    """

    target: ClientTarget
    caption: Captioning
    versions: Mapping[str, str] = field(default_factory=dict)
    no_float16: str = ""
    is_software: bool = False


def open_runtime(target: ClientTarget) -> Runtime:
    """Install what a runtime needs, and see that it starts.

    Raises:
        InputError: a program is missing, or does not start.
    """
    if target == "node":
        node_runtime.node_home()
        return Runtime(target, node_runtime.caption)
    adapter = chromium.check(target)
    if adapter is None:
        return Runtime(target, partial(chromium.caption, target=target, flags=chromium.WASM))
    no_float16 = "" if adapter.float16 else f"the WebGPU adapter ({adapter}) has no float16 (shader-f16)"
    in_page = partial(chromium.caption, target=target, flags=adapter.flags)
    return Runtime(target, in_page, {"adapter": str(adapter)}, no_float16, adapter.software)
