"""Florence-2: DaViT's features stand before the prompt's embeddings in a text encoder; a decoder looks at the result.

Graphs: `vision_encoder`, `embed_tokens` (of prompt and decoder both), `encoder_model` and `decoder_model_merged`.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.florence2.modeling_florence2 import Florence2VisionChannelAttention

from vlm_export import patches
from vlm_export.models.attention import padding_bias
from vlm_export.models.chat import Parts, load_config
from vlm_export.models.cross_decoder import embedded_cross_decoder
from vlm_export.models.decoder import Geometry, embed_tokens
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component, TensorSpec

USUAL_SIZE = 768  # pixels: configs do not say what pictures the models are trained on
_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"
_TABLE = "model.language_model.shared"
_ENCODER = "model.language_model.encoder"
_DECODER = "model.language_model.decoder"


def image_size(config: Config) -> int:
    """Height and width of the pictures: `vision_config.image_size`, which no class reads, or the usual size."""
    return int(config.get("vision_config", {}).get("image_size", USUAL_SIZE))


def image_rows(config: Config) -> int:
    """Rows of `image_features` for one picture: the mean of the tower's grid, then the grid.

    As `Florence2MultiModalProjector` joins them (transformers 5.23, `modeling_florence2.py`).
    """
    vision, side = load_config(config).vision_config, image_size(config)
    for stage in range(len(vision.embed_dim)):
        side = (side + 2 * vision.patch_padding[stage] - vision.patch_size[stage]) // vision.patch_stride[stage] + 1
    return 1 + side**2


class VisionEncoder(Parts):
    """`pixel_values` `[images, 3, H, W]` → `image_features` `[images, rows, hidden]`.

    Attention between channels is plain. A head of it is as wide as the picture has cells, 36864 in the first stage,
    where the fused operator takes 30 times as long (569 and 18 ms with ONNX Runtime 1.31 on two threads).
    """

    def __init__(self, model: Any):
        super().__init__(model, [_TOWER, _PROJECTOR])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run the tower, and join the mean of its cells and the cells."""
        tower: Any = self.get_submodule(_TOWER)
        plain = copy.copy(tower.config)
        plain._attn_implementation = "eager"
        with ExitStack() as replaced:
            for module in tower.modules():
                if isinstance(module, Florence2VisionChannelAttention):
                    replaced.enter_context(patches.replaced(module, "config", plain))
            grid = tower(pixel_values).last_hidden_state
        return self.get_submodule(_PROJECTOR)(grid)


class TextEncoder(Parts):
    """`inputs_embeds` `[B, S, H]`, features first, and a mask `[B, S]` of what is no padding → `[B, S, H]`.

    Transformers leaves the mask to the attention that is chosen; here it is a bias, so that none loses it.
    """

    def __init__(self, model: Any):
        super().__init__(model, [f"{_ENCODER}.{part}" for part in ("layers", "embed_positions", "layernorm_embedding")])

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Add positions, which count from the first feature on, and run the layers."""
        encoder: Any = self.get_submodule(_ENCODER)
        hidden = encoder.layernorm_embedding(inputs_embeds + encoder.embed_positions(inputs_embeds[:, :, 0]))
        bias = padding_bias(attention_mask, inputs_embeds.shape[1], inputs_embeds.dtype)
        for layer in encoder.layers:
            hidden = layer(hidden, bias)
        return hidden


class Embedding(Parts):
    """Token ids `[B, S]` → `[B, S, H]`."""

    def __init__(self, model: Any):
        super().__init__(model, [_TABLE])

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look the ids up, scaled where the model scales."""
        return self.get_submodule(_TABLE)(token_ids)


def geometry(text: PretrainedConfig) -> Geometry:
    """The sizes of the decoder of a Bart."""
    return Geometry.alike(
        text.decoder_layers,
        kv_heads=text.decoder_attention_heads,
        head_dim=text.d_model // text.decoder_attention_heads,
        hidden=text.d_model,
        vocabulary=text.vocab_size,
    )


def components(config: Config) -> tuple[Component, ...]:
    """The four graphs, in the order in which a client runs them."""
    size, sizes = image_size(config), geometry(load_config(config).get_text_config())
    states = ("batch_size", "encoder_sequence_length", sizes.hidden)
    vision = Component(
        name="vision_encoder",
        module=VisionEncoder,
        inputs=(TensorSpec("pixel_values", "float32", ("batch_size", 3, size, size)),),
        outputs=(TensorSpec("image_features", "float32", ("batch_size", image_rows(config), sizes.hidden)),),
    )
    encoder = Component(
        name="encoder_model",
        module=TextEncoder,
        inputs=(
            TensorSpec("inputs_embeds", "float32", states),
            TensorSpec("attention_mask", "int64", ("batch_size", "encoder_sequence_length")),
        ),
        outputs=(TensorSpec("last_hidden_state", "float32", states),),
    )
    return (
        vision,
        embed_tokens(sizes, Embedding),
        encoder,
        embedded_cross_decoder(sizes, sizes.hidden, _DECODER),
    )
