"""LLaVA 1.5, LLaVA-Interleave and their kin: one fixed grid of features for each image."""

from vlm_export.llava_model import family

FAMILY = family("llava")
