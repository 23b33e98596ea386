"""Qwen2-VL: images of any size as patches and a grid, places in three axes."""

from vlm_export.families._grid import NOTES, family
from vlm_export.spec.family import About

ABOUT = About(
    summary="Qwen2-VL",
    since="0.1.0",
    towers=("qwen2_vl_vision",),
    decoders=("qwen2_vl_text",),
    notes=NOTES,
)
FAMILY = family("qwen2_vl", ABOUT, processor_class="Qwen2VLProcessor", grid_name="grid_thw")
