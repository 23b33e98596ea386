"""Idefics3, and SmolVLM 256M, 500M and 2.2B, whose checkpoints call themselves so."""

from vlm_export.tiled_model import family

FAMILY = family("idefics3", "Idefics3Processor")
