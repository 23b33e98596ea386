"""Alike layers are traced once: the graph computes what tracing them all would, or the report says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pico
import pytest
import torch
from exported import Exported, prepare
from torch import nn

from vlm_export.graph import stacks
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.rewrites.repeat_layers import NotRepeatable, repeat_layers
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.stacks import find_stacks
from vlm_export.graph.weights import WeightRef, attach_weights
from vlm_export.manifest import load_manifest
from vlm_export.source.checkpoint import Checkpoint, build_empty, open_checkpoint
from vlm_export.spec.graph import Component

TOWER = "vision_encoder.encoder.layers"
DECODER = {"llama": "language_model.model.layers", "gpt2": "language_model.transformer.h"}
KINDS = [("llama", 5), ("gpt2", 3)]
TRACED_WHOLE = {path: "to compare with" for path in (TOWER, *DECODER.values())}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}, {kind[1]} layers")
def kind(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def model(kind: tuple[str, int], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return prepare(tmp_path_factory.mktemp("model"), pico.config(kind[0], layers=kind[1]))


@pytest.fixture(scope="module")
def exported(model: Exported) -> Exported:
    model.export("captioner", ["fp32"])
    return model


def test_repeats_and_verifies(exported: Exported, kind: tuple[str, int]) -> None:
    decoder, layers = kind
    report = exported.verify("ort")
    assert report.verdict == "pass", report.failures
    simplified = load_manifest(exported.work.repo).simplified
    for name, path in (("encoder_model", TOWER), ("decoder_model_merged", DECODER[decoder])):
        assert (simplified[name]["repeated"], simplified[name]["not_repeated"]) == ({path: layers - 2}, {})
        assert simplified[name]["nodes_after"] == len(ir.load(exported.graph(name)).graph)


@pytest.mark.parametrize(
    ("decoder", "names"),
    [("llama", ["vision_encoder", "language_model"]), ("gpt2", ["prefix_init", "language_model"])],
)
def test_computes_what_tracing_every_layer_computes(decoder: str, names: list[str], tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config(decoder, layers=4 if decoder == "llama" else 3))
    components = {c.name: c for c in merged.family.layouts["components"].components(merged.config)}
    for component in map(components.__getitem__, names):
        results = []
        for whole in ({}, TRACED_WHOLE):
            skeleton, report = make_skeleton(component, build_empty(merged), whole)
            assert bool(report.repeated) is not bool(whole)
            path = tmp_path / f"{component.name}_{len(results)}.onnx"
            save_graph(attach_weights(skeleton, component, merged.tensors), path)
            results.append(run(path, component))
        repeated, traced = results
        assert list(repeated) == list(traced) == [spec.name for spec in component.outputs]
        for name, expected in traced.items():
            np.testing.assert_allclose(repeated[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def checkpoint(folder: Path, settings: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(pico.write_checkpoint(folder, settings, lora=False))


def run(path: Path, component: Component) -> dict[str, np.ndarray]:
    """The graph's outputs for seeded inputs: batch 2, and one position after a past of three or five without one."""
    random = np.random.default_rng(0)
    cached = any(spec.name.startswith("past_key_values.") for spec in component.inputs)
    sizes = {"batch_size": 2, "past_sequence_length": 3, "sequence_length": 1 if cached else 5}
    session = onnxruntime.InferenceSession(str(path))
    feeds = {}
    for spec in component.inputs:
        shape = [size if isinstance(size, int) else sizes.get(size, 5) for size in spec.shape]
        numbers = random.integers(0, 200, shape) if spec.dtype == "int64" else random.normal(size=shape)
        feeds[spec.name] = numbers.astype(spec.dtype)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def test_every_layer_has_the_same_nodes_under_names_of_its_own(exported: Exported, kind: tuple[str, int]) -> None:
    decoder, layers = kind
    for name, path in (("encoder_model", TOWER), ("decoder_model_merged", DECODER[decoder])):
        graph = ir.load(exported.graph(name)).graph
        nodes = [str(node.name) for node in graph]
        values = [
            v.name
            for v in (*(v for n in graph for v in n.outputs if v.name), *graph.inputs, *graph.initializers.values())
        ]
        assert len(set(nodes)) == len(nodes)
        assert len(set(values)) == len(values)
        prefixes = [f"{path}.{index}." for index in range(layers)]
        operators = [Counter(n.op_type for n in graph if str(n.name).startswith(prefix)) for prefix in prefixes[2:]]
        assert operators[0]["MatMul"] >= 4  # what GPT-2 has beside its attention operator
        assert operators == operators[:1] * (layers - 2)
        parts = [part for name in graph.initializers for part in WeightRef.parse(name).parts]
        used = [{part.removeprefix(prefix) for part in parts if part.startswith(prefix)} for prefix in prefixes]
        assert len(used[0]) > 6
        assert used == used[:1] * layers


@pytest.mark.parametrize(("decoder", "layers", "added"), [("gemma3_text", 7, 2), ("smollm3", 6, 2)])
def test_kinds_of_layers_that_take_turns_are_repeated_together(
    decoder: str, layers: int, added: int, tmp_path: Path
) -> None:
    made = prepare(tmp_path, pico.config(decoder, layers=layers))
    made.export("captioner", ["fp32"])
    simplified = load_manifest(made.work.repo).simplified["decoder_model_merged"]
    assert (simplified["repeated"], simplified["not_repeated"]) == ({DECODER["llama"]: added}, {})
    assert simplified["fused"]["GroupQueryAttention"] == layers
    report = made.verify("ort")
    assert report.verdict == "pass", report.failures


def widen(layer: nn.Module) -> None:
    layer.mlp.up_proj = nn.Linear(32, 50, bias=False, device="meta")


def other_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = nn.ReLU()


def window(layer: nn.Module) -> None:
    layer.self_attn.sliding_window = 4


def buffer(layer: nn.Module) -> None:
    layer.register_buffer("mask", torch.ones(2))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (widen, "mlp.up_proj.weight"),
        (other_activation, "mlp.act_fn.SiLUActivation and ReLU"),
        (window, "self_attn.sliding_window"),
        (buffer, "mask"),
    ],
)
def test_layers_that_differ_are_no_stack(change: Callable[[nn.Module], None], where: str, tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config(layers=4))
    model, component = build_empty(merged), merged.family.layouts["captioner"].components(merged.config)[1]
    assert [stack.path for stack in find_stacks(component, model, {})[0]] == [DECODER["llama"]]
    change(model.language_model.model.layers[2])
    assert find_stacks(component, model, {}) == ((), {DECODER["llama"]: f"layers 1 and 2 differ in {where}"})


def test_a_layer_unlike_its_kind_is_no_stack(tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config("smollm3", layers=6))
    model, component = build_empty(merged), merged.family.layouts["captioner"].components(merged.config)[1]
    assert [(stack.period, stack.traced) for stack in find_stacks(component, model, {})[0]] == [(2, 4)]
    widen(model.language_model.model.layers[5])
    assert find_stacks(component, model, {})[1] == {DECODER["llama"]: "layers 3 and 5 differ in mlp.up_proj.weight"}


def test_kinds_of_layers_in_the_config_are_no_stack(tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config(layers=4))
    model, component = build_empty(merged), merged.family.layouts["captioner"].components(merged.config)[1]
    model.language_model.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    assert find_stacks(component, model, {})[1] == {DECODER["llama"]: "layers differ in the config's layer_types"}


def test_layers_that_share_weights_are_no_stack(tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config(layers=4))
    model, component = build_empty(merged), merged.family.layouts["captioner"].components(merged.config)[1]
    layers = model.language_model.model.layers
    layers[3].input_layernorm.weight = layers[0].input_layernorm.weight
    assert find_stacks(component, model, {})[1] == {DECODER["llama"]: "layers 0 and 3 share input_layernorm.weight"}


def scaled_by_index(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "text_config": {**settings["text_config"], "scale_attn_by_inverse_layer_idx": True}}


def test_unlike_layers_are_traced_whole_and_verify(tmp_path: Path) -> None:
    made = prepare(tmp_path, scaled_by_index(pico.config("gpt2", layers=3)))
    made.export()
    assert made.verify("ort").verdict == "pass"
    simplified = load_manifest(made.work.repo).simplified
    assert simplified["encoder_model"]["repeated"] == {TOWER: 1}
    assert simplified["decoder_model_merged"]["repeated"] == {}
    assert simplified["decoder_model_merged"]["not_repeated"] == {
        DECODER["gpt2"]: "layers 1 and 2 differ in attn.scaling"
    }


def test_a_graph_that_does_not_repeat_is_traced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_module_difference", lambda *_: None)  # let the graph alone show it
    made = prepare(tmp_path, scaled_by_index(pico.config("gpt2", layers=3)))
    made.export()
    assert made.verify("ort").verdict == "pass"
    simplified = load_manifest(made.work.repo).simplified["decoder_model_merged"]
    assert simplified["repeated"] == {}
    reason = simplified["not_repeated"][DECODER["gpt2"]]
    assert reason.startswith("GroupQueryAttention") and reason.endswith("differs from layer 0's")  # another scale


def test_a_component_that_uses_no_layer_is_traced_whole(tmp_path: Path) -> None:
    merged = checkpoint(tmp_path, pico.config(layers=3))
    components = {c.name: c for c in merged.family.layouts["chat"].components(merged.config)}
    _, report = make_skeleton(components["embed_tokens"], build_empty(merged))
    assert report.not_repeated == {DECODER["llama"]: "the graph uses no weight of layer 0"}


# A stack of two layers with a cache: h + tanh(past + h w) * ones, where both take the ones' shape from layer 0.
TWO = """
    <ir_version: 10, opset_import: ["" : 20]>
    two (float[b, 4] x, float[b, 4] past_key_values__0__key, float[b, 4] past_key_values__1__key,
         float[4, 4] s__0__w, float[4, 4] s__1__w)
        => (float[b, 4] y, float[b, 4] present__0__key, float[b, 4] present__1__key)
    {
        sizes = Shape (past_key_values__0__key)
        ones = ConstantOfShape <value = float[1] {1.0}> (sizes)
        m0 = MatMul (x, s__0__w)
        present__0__key = Add (past_key_values__0__key, m0)
        t0 = Tanh (present__0__key)
        u0 = Mul (t0, ones)
        h0 = Add (x, u0)
        m1 = MatMul (h0, s__1__w)
        present__1__key = Add (past_key_values__1__key, m1)
        t1 = Tanh (present__1__key)
        u1 = Mul (t1, ones)
        h1 = Add (h0, u1)
        y = Neg (h1)
    }
"""


def two(old: str = "", new: str = "") -> ir.Model:
    """The graph with one of its lines changed; ONNX text has no dots in names, so `__` stands for them."""
    assert old in TWO
    model = ir.from_onnx_text(TWO.replace(old, new) if old else TWO)
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    for value in values:
        value.name = str(value.name).replace("__", ".")
    return model


def test_repeats_layer_1_with_the_weights_and_cache_of_each_layer() -> None:
    model = two()
    assert repeat_layers(model, "s", 4, cached=True) == 2
    ir.passes.common.CheckerPass()(model)
    feeds = {str(v.name): np.random.default_rng(i).normal(size=(4, 4)) for i, v in enumerate(model.graph.inputs)}
    feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    made = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
    hidden = feeds["x"]
    for layer in range(4):
        present = feeds[f"past_key_values.{layer}.key"] + hidden @ feeds[f"s.{layer}.w"]
        np.testing.assert_allclose(made[f"present.{layer}.key"], present, rtol=1e-5, atol=1e-5)
        hidden = hidden + np.tanh(present)
    np.testing.assert_allclose(made["y"], -hidden, rtol=1e-5, atol=1e-5)


def test_a_hidden_state_that_is_the_output_keeps_its_name() -> None:
    model = two("y = Neg (h1)", "unused = Neg (h1)")
    model.graph.outputs[0] = next(value for node in model.graph for value in node.outputs if value.name == "h1")
    repeat_layers(model, "s", 3, cached=True)
    assert [value.name for value in model.graph.outputs] == [
        "h1",
        *(f"present.{layer}.key" for layer in range(3)),
    ]
    assert str(model.graph.outputs[0].producer().name).startswith("s.2.")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("t1 = Tanh (present__1__key)", "t1 = Erf (present__1__key)", "layer 1 has Erf for t1 where layer 0 has Tanh"),
        ("u1 = Mul (t1, ones)", "u1 = Mul (t1, x)", "layer 1 uses x where layer 0 uses ones"),
        ("m1 = MatMul (h0, s__1__w)", "m1 = MatMul (h0, s__0__w)", "the graph uses no weight of layer 1"),
        ("m1 = MatMul (h0, s__1__w)", "m1 = MatMul (m0, s__1__w)", "m0 is used outside layer 1"),
        (
            "present__1__key = Add (past_key_values__1__key, m1)\n        t1 = Tanh (present__1__key)",
            "present__1__key = Neg (past_key_values__0__key)\n        t1 = Tanh (m1)",
            "layer 1 has Neg for present.1.key where layer 0 has Add",
        ),
        ("y = Neg (h1)", "y = Mul (h1, m1)", "m1 of layer 1 has two counterparts in layer 0"),
        ("y = Neg (h1)", "y = Add (h1, h0)", "h0 is used outside layer 1"),
        ("y = Neg (h1)", "y = Add (h1, s__1__w)", "s.1.w of layer 1 has two counterparts in layer 0"),
    ],
)
def test_a_graph_of_unlike_layers_is_refused_and_left_alone(old: str, new: str, why: str) -> None:
    model = two(old, new)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(NotRepeatable) as error:
        repeat_layers(model, "s", 4, cached=True)
    assert why in str(error.value)
    assert ir.to_proto(model).SerializeToString() == before
