"""SmolVLM2: Idefics3's architecture under a name of its own. Images only: transformers.js feeds it no video."""

from vlm_export.tiled_model import family

FAMILY = family("smolvlm", "SmolVLMProcessor")
