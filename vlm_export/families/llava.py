"""LLaVA 1.5, LLaVA-Interleave and their kin: one fixed grid of features for each image."""

from vlm_export.families._llava import family
from vlm_export.spec.family import About

ABOUT = About(
    summary="LLaVA 1.5, LLaVA-Interleave and their kin: a CLIP or SigLIP tower, a projector, a text model",
    since="0.1.0",
    towers=("clip_vision_model", "siglip_vision_model"),
    decoders=("llama", "qwen2"),
    notes=("One size of image: LLaVA-NeXT, which has tiles, is another `model_type`.",),
)
FAMILY = family("llava", ABOUT)
