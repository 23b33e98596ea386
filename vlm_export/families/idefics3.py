"""Idefics3, and SmolVLM 256M, 500M and 2.2B, whose checkpoints call themselves so."""

from vlm_export.families._tiled import family
from vlm_export.spec.family import About

ABOUT = About(
    summary="Idefics3, and SmolVLM 256M, 500M and 2.2B, whose checkpoints call themselves so",
    since="0.1.0",
    towers=("idefics3_vision",),
    decoders=("llama",),
)
FAMILY = family("idefics3", "Idefics3Processor", ABOUT)
