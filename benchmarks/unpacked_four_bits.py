"""A 4-bit decoder that any runtime unpacks when it loads it, beside float32, q8 and packed q4: load time and memory.

python benchmarks/unpacked_four_bits.py ONNX_FOLDER     # of a repo exported with --quantize q8 --quantize q4

Each MatMulNBits of the q4 file becomes operators that ONNX Runtime folds when it makes a session: the two numbers of a
byte by BitwiseAnd and BitShift, then Cast, Sub and Mul by blocks, and a plain MatMul. The numbers are q4's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx
from harness import Row
from onnx import TensorProto, helper, numpy_helper

DECODER = "decoder_model_merged"
PREFIX, STEPS = 65, 20


class Unpacker:
    """Replaces the packed products of a graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = graph
        self.packed = {tensor.name: tensor for tensor in graph.initializer}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []

    def unpack(self) -> None:
        """Change the graph."""
        for node in self.graph.node:
            if node.op_type == "MatMulNBits":
                self._product(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for name, tensor in self.packed.items() if name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*kept, *self.constants.values()])

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _product(self, node: onnx.NodeProto) -> None:
        sizes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        outputs, inputs, share = sizes["N"], sizes["K"], sizes["block_size"]
        blocks, name = -(-inputs // share), f"{node.output[0]}.unpacked"
        last = self._constant("last_axis", np.array([-1]))
        numbers = node.input[1]
        if sizes["bits"] == 4:
            numbers = self._halves_of_bytes(numbers, name, last, [outputs, blocks, share])
            zero_points = self._add(
                "Cast", [self._zero_points(node.input[3], blocks)], f"{name}.zero", to=TensorProto.FLOAT
            )
        else:
            zero_points = self._constant("middle", np.array(128, np.float32))
        floats = self._add("Cast", [numbers], f"{name}.floats", to=TensorProto.FLOAT)
        centred = self._add("Sub", [floats, zero_points], f"{name}.centred")
        scales = self._add("Unsqueeze", [node.input[2], last], f"{name}.scales")
        by_block = self._add("Mul", [centred, scales], f"{name}.by_block")
        shape = self._constant(f"shape.{outputs}.{inputs}", np.array([outputs, inputs]))
        weight = self._add("Transpose", [self._add("Reshape", [by_block, shape], f"{name}.rows")], name, perm=[1, 0])
        self._add("MatMul", [node.input[0], weight], node.output[0])

    def _halves_of_bytes(self, packed: str, name: str, last: str, shape: list[int]) -> str:
        low = self._add("BitwiseAnd", [packed, self._constant("low_bits", np.array(15, np.uint8))], f"{name}.low")
        four = self._constant("four", np.array(4, np.uint8))
        high = self._add("BitShift", [packed, four], f"{name}.high", direction="RIGHT")
        pair = [self._add("Unsqueeze", [half, last], f"{half}.column") for half in (low, high)]
        pairs = self._add("Concat", pair, f"{name}.pairs", axis=-1)
        return self._add("Reshape", [pairs, self._constant(f"shape.{shape}", np.array(shape))], f"{name}.numbers")

    def _zero_points(self, name: str, blocks: int) -> str:
        packed = numpy_helper.to_array(self.packed[name])
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :blocks, None]
        return self._constant(f"{name}.bytes", np.ascontiguousarray(halves))


def measure(path: Path, threads: int) -> Row:
    """Load a decoder and generate, in this process."""
    import onnxruntime

    from vlm_export.measure.bench import peak_memory_bytes

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), options)
    load_s = time.perf_counter() - started
    peak = peak_memory_bytes()
    names = [value.name for value in session.get_outputs()]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    hidden = shapes["encoder_hidden_states"][-1]
    prefix = np.random.default_rng(0).normal(scale=0.1, size=(1, PREFIX, hidden)).astype(np.float32)
    feeds = {"encoder_hidden_states": prefix, "input_ids": np.array([[1]])}
    feeds |= {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    times = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        times.append(time.perf_counter() - started)
        feeds |= {name.replace("present", "past_key_values", 1): outputs[name] for name in names if name != "logits"}
        feeds["input_ids"] = outputs["logits"][:, -1].argmax(-1)[:, None]
    return {
        "MB": f"{path.stat().st_size / 1e6:.0f}",
        "load, s": f"{load_s:.2f}",
        "peak of loading, MiB": f"{peak / 2**20:.0f}",
        "tokens a second": f"{1 / statistics.median(times[1:]):.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="ONNX_FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch, "unpacked.onnx")
        model = onnx.load(options.folder / f"{DECODER}_q4.onnx")
        Unpacker(model.graph).unpack()
        onnx.save(model, unpacked)
        files = {"fp32": "", "q8": "_quantized", "q4": "_q4"}
        paths = {name: options.folder / f"{DECODER}{suffix}.onnx" for name, suffix in files.items()}
        rows = [
            {"decoder": name, **harness.in_new_process(partial(measure, path, options.threads))}
            for name, path in {**paths, "q4, unpacked at load": unpacked}.items()
        ]
    harness.report("unpacked_four_bits", rows, prefix=PREFIX)


if __name__ == "__main__":
    main()
