"""`export.json`, as far as one who runs the repo reads it; `manifest.py` has all of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_export.forms.form import Form, Text


class Exported(Form):
    """What it may hold."""

    recipe: Text = None
    failed: Annotated[list[str] | None, Field(description="a list of dtypes")] = None
    in_graph: Annotated[dict[str, object] | None, Field(description="settings of an image processor")] = None
