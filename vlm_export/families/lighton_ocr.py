"""LightOnOCR 1 and 2, which write what a page says: a Pixtral tower, squares of patches merged, an MLP, Qwen3."""

from __future__ import annotations

from vlm_export.families._pixtral import family
from vlm_export.models.pixtral import Places
from vlm_export.spec.family import About

FAMILY = family(
    "lighton_ocr",
    About(
        summary="LightOnOCR 1 and 2, as transformers has it: a Pixtral tower before a Qwen3",
        since="0.1.0",
        towers=("pixtral",),
        decoders=("qwen3",),
        notes=(
            "Checkpoints that call themselves `mistral3`, as LightOn's own do, are known by the class that their "
            "`architectures` name.",
            "Images keep their proportions: the longer side is at most `size.longest_edge`, and attention costs its "
            "fourth power; a recipe's `image_processor` may set a smaller one.",
            "transformers.js' processor writes the tokens of one image a prompt; `vlm-export run`, `serve` and "
            "`vlm_export/js` write those of several.",
        ),
    ),
    places=Places("model.vision_encoder", "model.vision_projection"),
    architecture="LightOnOcrForConditionalGeneration",
    processor_class="LightOnOcrProcessor",
)
