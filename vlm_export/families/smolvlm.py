"""SmolVLM2: Idefics3's architecture under a name of its own. Images only: transformers.js feeds it no video."""

from vlm_export.families._tiled import family
from vlm_export.spec.family import About

ABOUT = About(
    summary="SmolVLM2 256M, 500M and 2.2B",
    since="0.1.0",
    towers=("smolvlm_vision",),
    decoders=("llama",),
    notes=("No video: transformers.js feeds none.",),
)
FAMILY = family("smolvlm", "SmolVLMProcessor", ABOUT)
