"""How a repo is laid out, and how its client drives the graphs: one file a layout, found by its name."""

from __future__ import annotations

import importlib

from vlm_export.layouts.base import Layout


def find_layout(name: str) -> Layout:
    """The layout of that name (`recipe.LayoutName`)."""
    return importlib.import_module(f"{__name__}.{name}").LAYOUT
