"""The passes over finished structures: where they apply, where they must not, and that numbers stay PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from vlm_export import decoder
from vlm_export.checkpoint import stored_tensors
from vlm_export.graph_file import save_graph
from vlm_export.metrics import max_relative_error
from vlm_export.rewrites.pack_attention import pack_attention
from vlm_export.rewrites.skip_norms import join_norms
from vlm_export.structure import make_structure
from vlm_export.weights import attach_weights

TOWER = "float[batch_size, 4, 6] x, float[6, 6] q, float[6, 6] k, float[6, 6] v, float[6] bq, float[6] bk, float[6] bv"
CACHE = "float[batch_size, 1, past, 6] past_k, float[batch_size, 1, past, 6] past_v, int32[n] seqlens, int32 t"
DECODER = f"{TOWER}, {CACHE}"


def structure(inputs: str, text: str) -> ir.Model:
    opsets = '"" : 20, "com.microsoft" : 1'
    return ir.from_onnx_text(
        f"<ir_version: 10, opset_import: [{opsets}]> graph ({inputs}) => (float[b, 4, 6] y) {{{text}}}"
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


PROJECTED = """
    xq = MatMul (x, q)
    xk = MatMul (x, k)
    xv = MatMul (x, v)
"""
BIASED = f"""{PROJECTED}
    sq = Add (xq, bq)
    sk = Add (bk, xk)
    sv = Add (xv, bv)
"""
GROUPED = (
    "y, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>({}, past_k, past_v, seqlens, t)"
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (PROJECTED + GROUPED.format("xq, xk, xv"), ["q+k+v"]),
        (BIASED + GROUPED.format("sq, sk, sv"), ["q+k+v", "bq+bk+bv"]),
    ],
)
def test_one_product_for_query_key_and_value(text: str, names: list[str]) -> None:
    model = structure(DECODER, text)
    assert pack_attention(model) == 1
    assert operators(model) == ["MatMul", *["Add"][: len(names) - 1], "GroupQueryAttention"]
    attention = model.graph[-1]
    assert [value is None for value in attention.inputs[:3]] == [False, True, True]
    added = {str(value.name): value for value in model.graph.inputs}
    assert list(added)[-len(names) :] == names
    assert added["q+k+v"].shape == ir.Shape([6, 18])
    assert not {"q", "k", "v"} & added.keys()


def test_what_one_product_computed_is_not_split_first() -> None:
    split = "w = Concat <axis = 1> (q, k, v) p = MatMul (x, w) xq, xk, xv = Split <axis = {}, num_outputs = 3> (p)"
    model = structure(DECODER, split.format(-1) + GROUPED.format("xq, xk, xv"))
    assert pack_attention(model) == 1
    assert operators(model) == ["Concat", "MatMul", "GroupQueryAttention"]
    for other in (split.format(1) + GROUPED.format("xq, xk, xv"), split.format(-1) + GROUPED.format("xk, xq, xv")):
        assert pack_attention(structure(DECODER, other)) == 0


@pytest.mark.parametrize(
    "text",
    [
        f"{PROJECTED} rq = Neg (xq) " + GROUPED.format("rq, xk, xv"),
        f"{BIASED} " + GROUPED.format("sq, xk, sv"),
        "o = Neg (x) xq = MatMul (o, q) xk = MatMul (x, k) xv = MatMul (x, v) " + GROUPED.format("xq, xk, xv"),
        "xq = MatMul (x, q) xk = MatMul (x, k) " + GROUPED.format("xq, xk, xk"),
    ],
    ids=["rotated before", "one without bias", "of two tensors", "one for both"],
)
def test_other_projections_stay(text: str) -> None:
    model = structure(DECODER, text)
    before = operators(model)
    assert pack_attention(model) == 0
    assert operators(model) == before


def test_a_tower_adds_its_biases_in_attention() -> None:
    model = structure(TOWER, f"{BIASED} y = com.microsoft.MultiHeadAttention <num_heads = 2> (sq, sk, sv)")
    assert pack_attention(model) == 1
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "MultiHeadAttention"]
    assert [str(value.name) for value in model.graph[-1].inputs] == ["xq", "xk", "xv", "bq+bk+bv"]


def test_a_tower_without_biases_stays() -> None:
    model = structure(TOWER, f"{PROJECTED} y = com.microsoft.MultiHeadAttention <num_heads = 2> (xq, xk, xv)")
    assert pack_attention(model) == 0


NORM = "y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (s, bq)"


def test_a_norm_is_joined_with_its_sum() -> None:
    model = structure(TOWER, f"p = MatMul (x, q) s = Add (x, p) n = {NORM[4:]} y = Add (n, s)")
    assert join_norms(model) == 1
    assert operators(model) == ["MatMul", "SkipSimplifiedLayerNormalization", "Add"]
    joined = model.graph[1]
    assert joined.attributes.get_float("epsilon") == pytest.approx(0.001)
    assert list(model.graph[2].inputs) == [joined.outputs[0], joined.outputs[3]]


def test_a_norm_whose_weight_is_computed_after_the_sum() -> None:
    one = "o = Constant <value_float = 1.0> () w = Add (bq, o)"  # Gemma's norms
    model = structure(TOWER, f"p = MatMul (x, q) s = Add (x, p) {one} {NORM.replace('bq', 'w')}")
    assert join_norms(model) == 1
    assert operators(model)[-2:] == ["Add", "SkipSimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    "text",
    [
        f"p = MatMul (x, q) s = Add (p, bq) {NORM}",
        f"i = Constant <value_ints = [1, 2, 0, 3]> () t = Gather (q, i) p = MatMul (x, q) s = Add (p, t) {NORM}",
        f"s = Add (x, x) {NORM}",
        "p = MatMul (x, q) s = Add (x, p) y = LayerNormalization <axis = -1> (s, bq)",
    ],
    ids=["a bias", "a table", "no projection", "a norm with a mean"],
)
def test_other_sums_stay(text: str) -> None:
    model = structure(TOWER, text)
    before = operators(model)
    assert join_norms(model) == 0
    assert operators(model) == before


@pytest.mark.parametrize(("model_type", "packed"), [("llama", 3), ("qwen2", 3), ("qwen3", 0), ("gpt2", 3)])
def test_decoders_compute_what_pytorch_does(model_type: str, packed: int, tmp_path: Path) -> None:
    holder = nn.Module()
    holder.language_model = _random(model_type)
    holder.get_input_embeddings = holder.language_model.get_input_embeddings
    component = decoder.plain_decoder(decoder.Geometry.of(holder.language_model.config))
    made, report = make_structure(component, holder)
    assert report.rewrites["pack_attention"] == packed
    save_file({name: value.clone() for name, value in holder.named_parameters()}, tmp_path / "model.safetensors")
    save_graph(attach_weights(made, component, stored_tensors(tmp_path)), tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"))
    past = {spec.name: np.zeros((2, *spec.shape[1:2], 0, *spec.shape[3:]), np.float32) for spec in component.inputs[1:]}
    cache = DynamicCache()
    for length in (5, 1, 1):
        embeds = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = holder.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits[:, -1:]
        logits, *present = session.run(None, {"inputs_embeds": embeds.numpy(), **past})
        past = dict(zip(past, present, strict=True))
        assert max_relative_error(logits, expected.numpy()) < 1e-4
        for layer, kept in enumerate(cache.layers):
            assert max_relative_error(past[f"past_key_values.{layer}.key"], kept.keys.numpy()) < 1e-4
            assert max_relative_error(past[f"past_key_values.{layer}.value"], kept.values.numpy()) < 1e-4


def _random(model_type: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
    sizes["num_key_value_heads"] = 2
    if model_type == "gpt2":
        sizes = {"n_embd": 64, "n_head": 4}
    config = AutoConfig.for_model(model_type, vocab_size=50, num_hidden_layers=3, initializer_range=0.2, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()
