"""A tower whose last hidden state a projector takes as it is: one square an image, one grid of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_export.models.chat import Parts


class TowerEncoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`: tower, then projector."""

    def __init__(self, model: Any, tower: str = "model.vision_tower", projector: str = "model.multi_modal_projector"):
        super().__init__(model, (tower, projector))
        self.tower, self.projector = tower, projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run both, as `get_image_features` of transformers 5.23 does in each class that has these parts."""
        features = self.get_submodule(self.tower)(pixel_values).last_hidden_state
        return self.get_submodule(self.projector)(features)
