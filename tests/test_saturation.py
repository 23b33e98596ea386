"""Integer products that would saturate on processors without VNNI are found from weights alone, on any processor."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from vlm_export.quantize.saturation import LIMIT, UNKNOWN, integer_products, worst

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\n'
PRODUCT = """
    g (uint8[rows, 4] x) => (int32[rows, 2] y)
    <{kind}[4, 2] w = {{ {values} }}>
    {{ y = MatMulInteger (x, w) }}
"""
# Columns of [4, 2]: neighbours lie two numbers apart.
CASES = {
    "100, 0, 29, 0, 0, 0, 0, 0": 129,
    "100, 0, 28, 0, 0, 0, 0, 0": 128,
    "-100, 0, -29, 0, 0, 0, 0, 0": 129,
    "127, 127, -127, -127, 127, 127, -127, -127": 127,
    "100, 100, 0, 0, 100, 100, 0, 0": 100,
    "0, 0, 127, 0, 127, 0, 0, 0": 254,
    "-128, 0, -128, 0, 0, 0, 0, 0": 256,
}


def parse(text: str) -> ir.Graph:
    return ir.from_onnx_text(HEAD + text).graph


@pytest.mark.parametrize(("values", "pair"), CASES.items())
def test_the_largest_pair_of_neighbours(values: str, pair: int) -> None:
    graph = parse(PRODUCT.format(kind="int8", values=values))
    assert [product.largest_pair for product in integer_products(graph)] == [pair]
    found = worst(graph)
    assert (found is not None) == (pair > LIMIT)
    if found:
        assert f"neighbouring weights add up to {pair}, above 128" in str(found)


def test_unsigned_weights_are_safe() -> None:
    assert integer_products(parse(PRODUCT.format(kind="uint8", values="255, 255, 255, 255, 255, 255, 255, 255"))) == []


OTHERS = {
    "convolution": """
        g (uint8[1, 1, 2, 2] x) => (int32[1, 1, 1, 1] y) <int8[1, 1, 2, 2] w = { 0, 100, 100, 0 }>
        { y = ConvInteger (x, w) }""",
    "a float input that is quantized inside": """
        g (float[rows, 2] x) => (float[rows, 1] y)
        <int8[2, 1] w = { 100, 100 }, float s = { 0.1 }, int8 z = { 0 }>
        { y = com.microsoft.DynamicQuantizeMatMul (x, w, s, z) }""",
    "what ONNX Runtime fuses": """
        g (uint8[rows, 2] x) => (float[rows, 1] y)
        <int8[2, 1] w = { 100, 100 }, float s = { 0.1 }>
        { a = DequantizeLinear (x, s) b = DequantizeLinear (w, s) y = MatMul (a, b) }""",
    "transposed": """
        g (uint8[rows, 2] x) => (float[rows, 1] y)
        <int8[1, 2] w = { 100, 100 }, float s = { 0.1 }>
        { a = DequantizeLinear (x, s) b = DequantizeLinear (w, s) y = Gemm <transB = 1> (a, b) }""",
}


@pytest.mark.parametrize("graph", OTHERS.values(), ids=OTHERS)
def test_other_products(graph: str) -> None:
    assert [product.largest_pair for product in integer_products(parse(graph))] == [200]


def test_weights_that_a_graph_computes_may_be_anything() -> None:
    graph = parse("g (uint8[r, 2] x, int8[2, 1] w) => (int32[r, 1] y) { y = MatMulInteger (x, w) }")
    assert [product.largest_pair for product in integer_products(graph)] == [UNKNOWN]


def test_float_products_of_8_bit_weights_are_none() -> None:
    """Weights that are unpacked, whatever they are multiplied by."""
    graph = parse("""
        g (float[r, 2] x) => (float[r, 1] y) <int8[2, 1] w = { 127, 127 }, float s = { 0.1 }>
        { a = Cast <to = 1> (w) b = Mul (a, s) y = MatMul (x, b) c = DequantizeLinear (w, s) z = MatMul (x, c) }""")
    assert integer_products(graph) == []
