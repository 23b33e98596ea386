"""The passes over finished skeletons: where they apply, where they must not, and that numbers stay PyTorch's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.rewrites.gather_positions import gather_positions
from vlm_export.graph.rewrites.kept_rows import pick_rows_early
from vlm_export.graph.rewrites.pack_attention import pack_attention
from vlm_export.graph.rewrites.rotary_tables import halve_tables
from vlm_export.graph.rewrites.skip_norms import join_norms
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.weights import attach_weights
from vlm_export.models import decoder
from vlm_export.tensors.stored import stored_tensors
from vlm_export.verify.metrics import max_relative_error

TOWER = "float[batch_size, 4, 6] x, float[6, 6] q, float[6, 6] k, float[6, 6] v, float[6] bq, float[6] bk, float[6] bv"
CACHE = "float[batch_size, 1, past, 6] past_k, float[batch_size, 1, past, 6] past_v, int32[n] seqlens, int32 t"
DECODER = f"{TOWER}, {CACHE}"


def skeleton(inputs: str, text: str) -> ir.Model:
    opsets = '"" : 20, "com.microsoft" : 1'
    return ir.from_onnx_text(
        f"<ir_version: 10, opset_import: [{opsets}]> graph ({inputs}) => (float[b, 4, 6] y) {{{text}}}"
    )


def with_declared(model: ir.Model) -> tuple[ir.Model, set[str]]:
    """A graph, and its inputs with an axis that varies, or none: what a client feeds."""
    shapes = {str(value.name): value.shape for value in model.graph.inputs}
    return model, {name for name, shape in shapes.items() if not shape or not all(isinstance(d, int) for d in shape)}


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
    model = skeleton(DECODER, text)
    assert pack_attention(*with_declared(model)) == 1
    assert operators(model) == ["MatMul", *["Add"][: len(names) - 1], "GroupQueryAttention"]
    attention = model.graph[-1]
    assert [value is None for value in attention.inputs[:3]] == [False, True, True]
    added = {str(value.name): value for value in model.graph.inputs}
    assert list(added)[-len(names) :] == names
    assert added["q+k+v"].shape == ir.Shape([6, 18])
    assert not {"q", "k", "v"} & added.keys()


def test_what_one_product_computed_is_not_split_first() -> None:
    split = "w = Concat <axis = 1> (q, k, v) p = MatMul (x, w) xq, xk, xv = Split <axis = {}, num_outputs = 3> (p)"
    model = skeleton(DECODER, split.format(-1) + GROUPED.format("xq, xk, xv"))
    assert pack_attention(*with_declared(model)) == 1
    assert operators(model) == ["Concat", "MatMul", "GroupQueryAttention"]
    for other in (split.format(1) + GROUPED.format("xq, xk, xv"), split.format(-1) + GROUPED.format("xk, xq, xv")):
        assert pack_attention(*with_declared(skeleton(DECODER, other))) == 0


ROTATED = """
    rq = com.microsoft.RotaryEmbedding (xq, i, c, c)
    nk = SimplifiedLayerNormalization <axis = -1> (xk, bk)
"""


@pytest.mark.parametrize(("projected", "names"), [(PROJECTED, ["q+k+v"]), (BIASED, ["q+k+v", "bq+bk+bv"])])
def test_one_product_is_split_for_what_is_rotated_and_normalized(projected: str, names: list[str]) -> None:
    rotated = ROTATED if projected is PROJECTED else ROTATED.replace("(xq", "(sq").replace("(xk", "(sk")
    value = "xv" if projected is PROJECTED else "sv"
    norm = ", float[6] nw"
    text = projected + rotated.replace("bk)", "nw)") + GROUPED.format(f"rq, nk, {value}")
    model = skeleton(f"{DECODER}{norm}, int64[1] i, float[4, 3] c", text)
    assert pack_attention(*with_declared(model)) == 1
    found = [name for name in operators(model) if name != "Constant"]
    expected = ["MatMul", *["Add"][: len(names) - 1], "Split", "RotaryEmbedding", "SimplifiedLayerNormalization"]
    assert found == [*expected, "GroupQueryAttention"]
    split = next(node for node in model.graph if node.op_type == "Split")
    sizes = ir.convenience.get_const_tensor(split.inputs[1])
    assert sizes is not None
    assert sizes.numpy().tolist() == [6, 6, 6]
    assert [use.node.op_type for value in split.outputs for use in value.uses()] == [*expected[-2:], found[-1]]


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
    model = skeleton(DECODER, text)
    before = operators(model)
    assert pack_attention(*with_declared(model)) == 0
    assert operators(model) == before


def test_a_tower_adds_its_biases_in_attention() -> None:
    model = skeleton(TOWER, f"{BIASED} y = com.microsoft.MultiHeadAttention <num_heads = 2> (sq, sk, sv)")
    assert pack_attention(*with_declared(model)) == 1
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "MultiHeadAttention"]
    assert [str(value.name) for value in model.graph[-1].inputs] == ["xq", "xk", "xv", "bq+bk+bv"]


def test_a_tower_without_biases_stays() -> None:
    model = skeleton(TOWER, f"{PROJECTED} y = com.microsoft.MultiHeadAttention <num_heads = 2> (xq, xk, xv)")
    assert pack_attention(*with_declared(model)) == 0


NORM = "y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (s, bq)"


def test_a_norm_is_joined_with_its_sum() -> None:
    model = skeleton(TOWER, f"p = MatMul (x, q) s = Add (x, p) n = {NORM[4:]} y = Add (n, s)")
    assert join_norms(*with_declared(model)) == 1
    assert operators(model) == ["MatMul", "SkipSimplifiedLayerNormalization", "Add"]
    joined = model.graph[1]
    assert joined.attributes.get_float("epsilon") == pytest.approx(0.001)
    assert list(model.graph[2].inputs) == [joined.outputs[0], joined.outputs[3]]


def test_a_norm_is_joined_with_the_sum_of_what_was_normalized() -> None:
    layer = "p = MatMul (x, q) n = SimplifiedLayerNormalization <axis = -1> (p, bk) s = Add (x, n)"  # Gemma 2's
    model = skeleton(TOWER, f"{layer} {NORM}")
    assert join_norms(*with_declared(model)) == 1
    assert operators(model) == ["MatMul", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"]


def test_a_norm_whose_weight_is_computed_after_the_sum() -> None:
    one = "o = Constant <value_float = 1.0> () w = Add (bq, o)"  # Gemma's norms
    model = skeleton(TOWER, f"p = MatMul (x, q) s = Add (x, p) {one} {NORM.replace('bq', 'w')}")
    assert join_norms(*with_declared(model)) == 1
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
    model = skeleton(TOWER, text)
    before = operators(model)
    assert join_norms(*with_declared(model)) == 0
    assert operators(model) == before


LOOKUP = """
    t = Transpose <perm = [1, 0, 2]> (x)
    positions = Add (p, p)
    largest = Max ({})
    shape = Shape (largest)
    expanded = Expand (positions, shape)
    one = Constant <value_ints = [-1]> ()
    i = Unsqueeze (expanded, one)
    g = GatherND (t, i)
    y = Transpose <perm = [1, 0, 2]> (g)
"""


@pytest.mark.parametrize(("broadcast", "looked_up"), [("positions", "positions"), ("positions, q", "expanded")])
def test_positions_are_looked_up_as_they_are_unless_another_index_shapes_them(broadcast: str, looked_up: str) -> None:
    model = skeleton("float[batch_size, 4, 6] x, int64[k] p, int64[k] q", LOOKUP.format(broadcast))
    assert gather_positions(model) == 1
    (lookup,) = [node for node in model.graph if node.op_type == "Gather"]
    assert [str(value.name) for value in lookup.inputs if value is not None] == ["x", looked_up]


LAYER = f"""
    {PROJECTED}
    a = com.microsoft.MultiHeadAttention <num_heads = 2> (xq, xk, xv)
    s = MatMul (a, q)
    n = LayerNormalization <axis = -1> (s, bq)
    u = MatMul (n, k)
    g = Sigmoid (u)
    m = Mul (u, g)
    d = MatMul (m, v)
    t = Add (s, d)
"""
PICKED = "kept_positions = Shape <start = 1, end = 2> (x) r = Gather <axis = 1> (t, kept_positions) y = MatMul (r, q)"


def test_only_the_rows_that_are_asked_for_go_through_the_last_mlp() -> None:
    model = skeleton(TOWER, LAYER + PICKED)
    assert pick_rows_early(*with_declared(model)) == 7
    (picked,) = [node for node in model.graph if node.op_type == "Gather"]
    assert picked.inputs[0] is not None
    assert picked.inputs[0].name == "a"
    assert [use.node.op_type for use in picked.outputs[0].uses()] == ["MatMul"]


def test_the_residual_is_picked_as_attention_is() -> None:
    second = "b = com.microsoft.MultiHeadAttention <num_heads = 2> (t, xk, xv) p = MatMul (b, q) w = Add (t, p)"
    model = skeleton(TOWER, LAYER + second + PICKED.replace("(t,", "(w,"))
    assert pick_rows_early(*with_declared(model)) == 2
    picked = {str(node.inputs[0].name) for node in model.graph if node.op_type == "Gather" and node.inputs[0]}
    assert picked == {"b", "t"}


@pytest.mark.parametrize(
    "text",
    [
        f"{LAYER} e = Softmax <axis = 1> (t) {PICKED.replace('(t,', '(e,')}",
        f"{LAYER} {PICKED.replace('(t,', '(x,')}",
        f"{LAYER} {PICKED.replace('kept_positions', 'others')}",
        f"{LAYER} {PICKED} z = Identity (t)".replace("y = MatMul (r, q)", "f = MatMul (r, q) y = Add (f, z)"),
        f"{LAYER} {PICKED.replace('(t,', '(e,')}".replace("t = Add (s, d)", "t = Add (s, d) e = Add (t, x)"),
    ],
    ids=["a function of all rows", "no attention", "other positions", "another reader", "a sum with what is no row"],
)
def test_rows_stay_where_they_are_picked(text: str) -> None:
    model = skeleton(TOWER, text)
    before = operators(model)
    assert pick_rows_early(*with_declared(model)) == 0
    assert operators(model) == before


ANGLES = "float[1, positions, 3] f"
TABLES = """
    two = Concat <axis = -1> (f, f)
    scale = Constant <value_float = 2.0> ()
    c = Cos (two)
    d = Mul (scale, c)
    e = Sin (two)
    rows = Constant <value_ints = [-1, 6]> ()
    start = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [3]> ()
    axis = Constant <value_ints = [1]> ()
    step = Constant <value_ints = [1]> ()
    dr = Reshape (d, rows)
    er = Reshape (e, rows)
    dh = Slice (dr, start, end, axis, step)
    eh = Slice (er, start, end, axis)
    y = Sub (dh, eh)
"""


def test_cosines_and_sines_of_half_a_head() -> None:
    model = skeleton(ANGLES, TABLES)
    before = skeleton(ANGLES, TABLES)
    assert halve_tables(model) == 2
    RemoveUnusedNodesPass()(model)
    names = [name for name in operators(model) if name != "Constant"]
    assert names == ["Reshape", "Cos", "Mul", "Sin", "Sub"]
    angles = np.random.default_rng(0).normal(size=(1, 5, 3)).astype(np.float32)
    made, expected = (
        onnxruntime.InferenceSession(ir.to_proto(each).SerializeToString()).run(None, {"f": angles})[0]
        for each in (model, before)
    )
    np.testing.assert_allclose(made, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [("(f, f)", "(f, g)"), ("ints = [3]", "ints = [2]"), ("ints = [0]", "ints = [1]"), ("axis = -1", "axis = 1")],
    ids=["other halves", "a third", "from the second on", "along positions"],
)
def test_other_tables_stay(old: str, new: str) -> None:
    model = skeleton(f"{ANGLES}, float[1, positions, 3] g", TABLES.replace(old, new))
    before = operators(model)
    assert halve_tables(model) == 0
    assert operators(model) == before


@pytest.mark.parametrize(("model_type", "packed"), [("llama", 3), ("qwen2", 3), ("qwen3", 3), ("gpt2", 3)])
def test_decoders_compute_what_pytorch_does(model_type: str, packed: int, tmp_path: Path) -> None:
    holder = nn.Module()
    holder.language_model = _random(model_type)
    holder.get_input_embeddings = holder.language_model.get_input_embeddings
    component = decoder.plain_decoder(decoder.Geometry.of(holder.language_model.config))
    made, report = make_skeleton(component, holder)
    assert report.rewrites["pack_attention"] == packed
    assert report.rewrites["pick_rows_early"] >= 6
    assert report.rewrites["halve_tables"] == (0 if model_type == "gpt2" else 2)
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


def test_a_client_may_ask_for_fewer_logits() -> None:
    holder = nn.Module()
    holder.language_model = _random("llama")
    holder.get_input_embeddings = holder.language_model.get_input_embeddings
    component = decoder.chat_decoder(decoder.Geometry.of(holder.language_model.config))
    made, report = make_skeleton(component, holder)
    assert report.rewrites["gather_positions"] == 1
    assert report.rewrites["pick_rows_early"] == 9
    assert report.rewrites["pack_attention"] == 3
    assert Counter(operators(made))["Gather"] == 2


def _random(model_type: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
    sizes["num_key_value_heads"] = 2
    if model_type == "gpt2":
        sizes = {"n_embd": 64, "n_head": 4}
    config = AutoConfig.for_model(model_type, vocab_size=50, num_hidden_layers=3, initializer_range=0.2, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()
