"""What a vision graph that prepares pictures itself makes of them, beside Pillow: read inside the repo's own graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from PIL import Image

from vlm_export.contract import IMAGE, OPTIONS
from vlm_export.machine import own_threads
from vlm_export.models.pixels import PIXELS, Steps
from vlm_export.quantize.full_precision import PREPARED
from vlm_export.runtime.images import ImageProcessor, open_image
from vlm_export.runtime.sessions import GraphError

# Widths and heights of pictures: much and little smaller, larger, 1:8, a line.
_SIZES = ((301, 199), (40, 320), (320, 40), (17, 23), (640, 1), (900, 601))


@dataclass(frozen=True)
class PixelsInGraph:
    """The steps of a vision graph, without its tower.

    Attributes:
        graph: the file.
        settings: the image processor's, which the graph carries out.
    """

    graph: Path
    settings: Mapping[str, Any]

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        try:
            model = ir.load(self.graph)
        except (OSError, ValueError, DecodeError) as error:
            raise GraphError(f"{self.graph.name}: {' '.join(str(error).split())}") from None
        graph = model.graph
        made = next((value for node in graph for value in node.outputs if value.name == PREPARED), None)
        inputs = {str(value.name): value for value in graph.inputs}
        if made is None or inputs.keys() not in ({PIXELS}, {IMAGE, OPTIONS}):
            raise GraphError(f"{self.graph.name}: {PIXELS} does not become {PREPARED}: its steps were edited")
        made.type = ir.TensorType(ir.DataType.FLOAT)
        [fed] = [value for name, value in inputs.items() if name != OPTIONS]
        steps = ir.Model(ir.convenience.extract(graph, [fed], [made]), ir_version=model.ir_version)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = own_threads()
        options.log_severity_level = 3
        content = ir.to_proto(steps).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def made_of(self, pictures: np.ndarray) -> np.ndarray:
        """`[batch, 3, h, w] float32` in 0…255 → what the tower takes, `[batch, 3, H, W] float32`.

        Raises:
            GraphError: the graph cannot be read, or has other steps than were written.
        """
        session = self._session
        if session.get_inputs()[0].name == PIXELS:
            return np.asarray(session.run(None, {PIXELS: pictures.astype(np.float32)})[0])
        as_bytes = np.moveaxis(pictures, 1, -1).astype(np.uint8)
        return np.concatenate([session.run(None, {IMAGE: np.ascontiguousarray(each)})[0] for each in as_bytes])

    def differences(self, picture: Path) -> Iterator[tuple[str, float]]:
        """A picture in its own and in other sizes: each with the largest difference of a pixel, of 255.

        The graph's steps stand beside those of Pillow, under the same settings, rows before columns.
        """
        whole = open_image(picture)
        for size in (whole.size, *_SIZES):
            resized = whole if size == whole.size else whole.resize(size, Image.Resampling.NEAREST)
            yield f"{picture.name} at {size[0]}×{size[1]}", self._difference(resized)

    def _difference(self, picture: Image.Image) -> float:
        steps = Steps.of(self.settings)
        found = self.made_of(np.moveaxis(np.asarray(picture), -1, 0)[None])
        expected = ImageProcessor({**self.settings, "do_resize": False})([_rows_first(picture, steps)]).arrays[PIXELS]
        if found.shape != expected.shape:
            return float("inf")
        return float(np.abs(steps.bytes_of(found) - steps.bytes_of(expected)).max())


def _rows_first(picture: Image.Image, steps: Steps) -> Image.Image:
    """The picture resized: rows, then columns, as all Pillows do but 13, with pictures that lose much more height."""
    height, width = steps.resized(picture.height, picture.width)
    filter = Image.Resampling(steps.filter)
    return picture.resize((width, picture.height), filter).resize((width, height), filter)
