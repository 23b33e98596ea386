"""Mistral 3: Ministral 3 and Mistral Small 3.1. A Pixtral tower, squares of patches merged, an MLP, a Mistral."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlm_export.errors import InputError
from vlm_export.families._pixtral import Reference, family
from vlm_export.models.pixtral import Places, cell_size
from vlm_export.spec.family import About


class Mistral3Reference(Reference):
    """The class's own forward, which fails on an image that is one row of features."""

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of `Reference`. Raises InputError for images of one cell alone."""
        given = super().arguments(inputs)
        cell = cell_size(self.model.config)
        if "image_sizes" in given and int((given["image_sizes"] // cell).prod(dim=1).sum()) == 1:
            raise InputError(f"an image of {cell}×{cell} pixels or less: transformers' class fails on it; enlarge it")
        return given


FAMILY = family(
    "mistral3",
    About(
        summary="Ministral 3 and Mistral Small 3.1, as transformers has them: a Pixtral tower before a Mistral",
        since="0.1.0",
        towers=("pixtral",),
        decoders=("ministral3",),
        notes=(
            "Images keep their proportions: the longer side is at most `size.longest_edge`, and attention costs its "
            "fourth power; a recipe's `image_processor` may set a smaller one.",
            "transformers' class fails on an image of one cell (28×28 pixels or less); the exported graphs do not.",
            "transformers.js' processor writes the tokens of one image a prompt; `vlm-export run`, `serve` and "
            "`vlm_export/js` write those of several.",
            "Ministral 3's instruct models are published in FP8, which is refused: start from those whose names end in "
            "`-BF16`.",
        ),
    ),
    places=Places("model.vision_tower", "model.multi_modal_projector"),
    architecture="Mistral3ForConditionalGeneration",
    processor_class="PixtralProcessor",
    ends=("[IMG_BREAK]", "[IMG_END]"),
    reference=Mistral3Reference,
)
