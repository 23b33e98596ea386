"""Graph passes on what the tracer made: where each fires, where it must not, and that the numbers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from vlm_export.graph import trace as tracing
from vlm_export.graph.rewrites.embedding_scale import scale_lookups, scale_of
from vlm_export.graph.rewrites.flat_products import unflatten_products
from vlm_export.graph.rewrites.gelu import fuse_gelu
from vlm_export.graph.rewrites.same_shape import join_reshapes
from vlm_export.spec.graph import TensorSpec

GELUS = {
    "gelu_new": """
        half = Constant <value_float = 0.5> ()  h = Mul (half, x)
        three = Constant <value_float = 3.0> ()  cube = Pow (x, three)
        small = Constant <value_float = 0.044715> ()  t = Mul (small, cube)  u = Add (x, t)
        root = Constant <value_float = 0.7978845608028654> ()  v = Mul (root, u)  w = Tanh (v)
        one = Constant <value_float = 1.0> ()  s = Add (one, w)  y = Mul (h, s)
    """,
    "gelu_fast": """
        half = Constant <value_float = 0.5> ()  h = Mul (x, half)
        root = Constant <value_float = 0.7978845608> ()  r = Mul (x, root)
        small = Constant <value_float = 0.044715> ()  t = Mul (x, small)  tx = Mul (t, x)
        one = Constant <value_float = 1.0> ()  u = Add (tx, one)  v = Mul (r, u)  w = Tanh (v)
        s = Add (w, one)  y = Mul (h, s)
    """,
    "gelu_python": """
        half = Constant <value_float = 0.5> ()  h = Mul (x, half)
        two = Constant <value_float = 1.4142135623730951> ()  d = Div (x, two)  e = Erf (d)
        one = Constant <value_float = 1.0> ()  s = Add (e, one)  y = Mul (h, s)
    """,
    "quick_gelu": """
        alpha = Constant <value_float = 1.702> ()  a = Mul (alpha, x)  s = Sigmoid (a)  y = Mul (x, s)
    """,
}
OPERATORS = {"gelu_new": "Gelu", "gelu_fast": "Gelu", "gelu_python": "Gelu", "quick_gelu": "QuickGelu"}
NO_GELUS = {
    "silu": "s = Sigmoid (x)  y = Mul (x, s)",
    "another sigmoid's gate": "a = Constant <value_float = 1.702> ()  b = Mul (g, a)  s = Sigmoid (b)  y = Mul (x, s)",
    "a scale for each channel": (
        "a = Constant <value_floats = [1.0, 1.5, 2.0]> ()  b = Mul (x, a)  s = Sigmoid (b)  y = Mul (x, s)"
    ),
    "another cubic": GELUS["gelu_new"].replace("0.044715", "0.05"),
    "another power": GELUS["gelu_new"].replace("3.0", "2.0"),
    "erf of x / 2": GELUS["gelu_python"].replace("1.4142135623730951", "2.0"),
}


def graph(body: str, inputs: str = "float[n, 3] x, float[n, 3] g", output: str = "float[n, 3] y") -> ir.Model:
    domains = '["" : 20, "com.microsoft" : 1]'
    return ir.from_onnx_text(f"<ir_version: 10, opset_import: {domains}> made ({inputs}) => ({output}) {{{body}}}")


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in feeds.items() if name in wanted})[0]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape, scale=3).astype(np.float32)


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_is_one_operator(name: str) -> None:
    model = graph(GELUS[name])
    assert fuse_gelu(model) == 1
    assert operators(model) == {OPERATORS[name]: 1}
    x = numbers(50, 3)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(model, x=x, g=x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NO_GELUS)
def test_what_is_no_gelu_stays(name: str) -> None:
    model = graph(NO_GELUS[name])
    before = operators(model)
    assert fuse_gelu(model) == 0
    assert operators(model) == before


def reshapes(sizes: tuple[tuple[int | str | None, ...], ...]) -> ir.Model:
    """`x` reshaped from each of the sizes to the next, the tracer's shapes written on the values."""
    model = graph(
        "t = Reshape (x, s0)  y = Reshape (t, s1)  z = Neg (y)", "float[n] x, int64[k] s0, int64[k] s1", "float[n] z"
    )
    values = [model.graph.inputs[0], *(node.outputs[0] for node in list(model.graph)[:2])]
    for value, shape in zip(values, sizes, strict=True):
        value.shape = ir.Shape(shape)
    return model


def test_reshapes_back_to_the_first_shape_are_dropped() -> None:
    model = reshapes((("b", "s", 8), ("b", "s", 2, 4), ("b", "s", 8)))
    assert join_reshapes(model) == 1
    assert operators(model) == {"Neg": 1}


@pytest.mark.parametrize(
    "last", [("b", "s", 4, 2), ("s", "b", 8), ("b", None, 8)], ids=["other heads", "other order", "an unknown size"]
)
def test_reshapes_to_another_shape_stay(last: tuple[int | str | None, ...]) -> None:
    first = tuple(last) if None in last else ("b", "s", 8)
    model = reshapes((first, ("b", "s", 2, 4), last))
    assert join_reshapes(model) == 0
    assert operators(model)["Reshape"] == 2


def flat_product(made: tuple[int | str, ...], attributes: str = "") -> ir.Model:
    """GPT-2's Conv1D between its reshapes, the tracer's shapes written on the values."""
    model = graph(
        f"rows = Reshape (x, s0)  p = Gemm {attributes} (rows, w, b)  q = Reshape (p, s1)  y = Neg (q)",
        "float[n] x, int64[k] s0, int64[l] s1, float[3, 3] w, float[3] b",
        "float[n] y",
    )
    first, product, last, _ = model.graph
    shapes = {model.graph.inputs[0]: ("b", "s", 3), first.outputs[0]: ("b * s", 3), last.outputs[0]: made}
    for value, shape in shapes.items():
        value.shape = ir.Shape(shape)
    product.outputs[0].shape = ir.Shape(("b * s", 3))
    return model


def test_a_product_of_flattened_rows_is_one_of_the_rows_as_they_are() -> None:
    model = flat_product(("b", "s", 3))
    assert unflatten_products(model) == 1
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Neg"]
    x, w, b = numbers(2, 4, 3), numbers(3, 3), numbers(3)
    for value in (model.graph.inputs[0], model.graph.outputs[0]):
        value.shape = ir.Shape(("b", "s", 3))
    zero = np.zeros(3, np.int64)
    np.testing.assert_allclose(run(model, x=x, w=w, b=b, s0=zero, s1=zero), -(x @ w + b), rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "attributes"),
    [(("s", "b", 3), ""), (("b", 3, "s"), ""), (("b", "s", 3), "<transB = 1>"), (("b", "s", 3), "<alpha = 2.0>")],
    ids=["other order", "other axes", "a transposed weight", "a scaled product"],
)
def test_other_products_of_rows_stay(made: tuple[int | str, ...], attributes: str) -> None:
    model = flat_product(made, attributes)
    before = operators(model)
    assert unflatten_products(model) == 0
    assert operators(model) == before


class Scaled(nn.Embedding):
    embed_scale = 3.0


class Shifted(nn.Embedding):
    """Adds something to its rows, which no factor expresses."""


def test_lookups_of_the_front_end_alone_are_scaled() -> None:
    model = graph(
        "front_end__text = Gather (w, i)  core = Gather (w, i)  y = Add (front_end__text, core)",
        "float[4, 3] w, int64[n] i",
    )
    for node in model.graph:
        node.outputs[0].name = str(node.outputs[0].name).replace("__", ".")
    assert scale_lookups(model, "w", scale_of(Scaled(4, 3))) == 1
    w, i = numbers(4, 3), np.array([2, 0], dtype=np.int64)
    np.testing.assert_allclose(run(model, w=w, i=i), w[i] * 4, rtol=1e-6)
    assert scale_lookups(model, "w", scale_of(nn.Embedding(4, 3))) == 0


def test_an_embedding_that_does_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="Shifted does more than look up rows"):
        scale_of(Shifted(4, 3))


def test_no_two_axes_are_traced_with_one_size() -> None:
    """Whatever a family calls them: what is computed from one must not be taken for the other."""
    axes = ("batch_size", "num_images", "num_tiles", "sequence_length", "height", "width", "num_logits", "of_its_own")
    sizes = tracing._sizes([TensorSpec("one", "float32", axes[:5]), TensorSpec("other", "int64", axes[3:])])
    assert sizes.keys() >= set(axes)
    assert len(set(sizes.values())) == len(sizes) and min(sizes.values()) > 1
