"""Idefics3, and SmolVLM 256M, 500M and 2.2B, whose checkpoints call themselves so."""

from vlm_export.families.base import About
from vlm_export.models.tiled import family

ABOUT = About(
    summary="Idefics3, and SmolVLM 256M, 500M and 2.2B, whose checkpoints call themselves so",
    since="0.1.0",
    towers=("idefics3_vision",),
    decoders=("llama",),
)
FAMILY = family("idefics3", "Idefics3Processor", ABOUT)
