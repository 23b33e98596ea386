"""Idefics3 and SmolVLM: an image is split into tiles, and each tile becomes a fixed number of rows.

A client feeds `pixel_values` `[batch, tiles, 3, E, E]`, padded with tiles of zeros where the images of a batch have
unequal numbers of them, and `pixel_attention_mask` `[batch, tiles, E, E]`, which is false where an image was padded.
The graph drops the tiles of zeros: their number is known at run time only, so that is done before the traced core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlm_export.models.attention import padding_bias
from vlm_export.models.chat import Parts, load_config, text_components
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component, FrontEnd, TensorSpec

_TOWER = "model.vision_model"
_CONNECTOR = "model.connector"
_REAL_TILES = """
    zero = Constant <value_float = 0.0> ()
    tile_axes = Constant <value_ints = [1, 2, 3]> ()
    tile_shape = Constant <value_ints = [-1, 3, EDGE, EDGE]> ()
    all_tiles = Reshape (pixel_values, tile_shape)
    sizes = Abs (all_tiles)
    largest = ReduceMax <keepdims = 0> (sizes, tile_axes)
    real = Greater (largest, zero)
    tiles = Compress <axis = 0> (all_tiles, real)
    mask_shape = Constant <value_ints = [-1, 1, EDGE, EDGE]> ()
    all_masks = Reshape (pixel_attention_mask, mask_shape)
    masks = Compress <axis = 0> (all_masks, real)
    seen = Cast <to = 1> (masks)
    seen_patches = MaxPool <kernel_shape = [PATCH, PATCH], strides = [PATCH, PATCH]> (seen)
    seen_grid = Greater (seen_patches, zero)
    channel = Constant <value_ints = [1]> ()
    patch_mask = Squeeze (seen_grid, channel)
"""


def tile_tokens(config: Config) -> int:
    """Rows of `image_features` for one tile."""
    return loaded_tile_tokens(load_config(config))


def loaded_tile_tokens(config: PretrainedConfig) -> int:
    """Rows of `image_features` for one tile of E × E pixels: (E / P)² patches, joined by `scale_factor`².

    As Idefics3's connector shuffles them (transformers 5.23, `modeling_idefics3.py`, `Idefics3Connector`).
    """
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2


class TileEncoder(Parts):
    """`[tiles, 3, E, E]`, and which patches are seen `[tiles, E/P, E/P]` → `image_features` `[tiles, rows, hidden]`.

    `transformers` leaves the attention mask to the attention that is chosen; here it is a bias, so that none loses it.
    """

    def __init__(self, model: Any):
        tower = (f"{_TOWER}.{part}" for part in ("embeddings", "encoder.layers", "post_layernorm"))
        super().__init__(model, [*tower, _CONNECTOR])
        self.side = model.get_submodule(f"{_TOWER}.embeddings").num_patches_per_side

    def forward(self, tiles: Tensor, patch_mask: Tensor) -> Tensor:
        """Embed the patches, run the tower with unseen patches masked, and let the connector join them into rows."""
        tower: Any = self.get_submodule(_TOWER)
        patches = tower.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(position_ids(patch_mask, self.side))
        bias = padding_bias(patch_mask.flatten(1), hidden.shape[1], hidden.dtype)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, bias)
        return self.get_submodule(_CONNECTOR)(tower.post_layernorm(hidden))


def position_ids(patch_mask: Tensor, side: int) -> Tensor:
    """`[tiles, h, w] bool` → `[tiles, h · w] int64`: rows and columns of a table of `side` × `side`, stretched over the
    patches that are seen.

    As `SmolVLMVisionEmbeddings` has it, with comparisons in the place of `bucketize`, which has no ONNX operator.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)

    def places(seen: Tensor) -> Tensor:
        """`[tiles, n] bool` → `[tiles, n] int64` below `side`."""
        fractions = torch.arange(seen.shape[1], dtype=torch.float32) * (1.0 / seen.sum(dim=1))[:, None]
        return (torch.clamp(fractions, max=1.0 - 1e-6)[..., None] >= boundaries).sum(-1)

    rows, columns = places(patch_mask[:, :, 0]), places(patch_mask[:, 0, :])
    ids = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    return torch.where(patch_mask.flatten(1), ids, 0)


def chat(config: Config) -> tuple[Component, ...]:
    """The graphs of `chat`: `vision_encoder`, whose front end drops tiles of zeros, and the two of the text model."""
    loaded = load_config(config)
    edge, patch = loaded.vision_config.image_size, loaded.vision_config.patch_size
    grid = edge // patch
    encoder = Component(
        name="vision_encoder",
        module=TileEncoder,
        inputs=(
            TensorSpec("pixel_values", "float32", ("batch_size", "num_images", 3, edge, edge)),
            TensorSpec("pixel_attention_mask", "bool", ("batch_size", "num_images", edge, edge)),
        ),
        outputs=(
            TensorSpec("image_features", "float32", ("num_tiles", tile_tokens(config), loaded.text_config.hidden_size)),
        ),
        traced_inputs=(
            TensorSpec("tiles", "float32", ("num_tiles", 3, edge, edge)),
            TensorSpec("patch_mask", "bool", ("num_tiles", grid, grid)),
        ),
        front_end=FrontEnd(_REAL_TILES.replace("EDGE", str(edge)).replace("PATCH", str(patch))),
    )
    return encoder, *text_components(config, "model.text_model")
