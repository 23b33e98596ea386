"""Every layout on every kind of decoder and projection: the graphs compute what PyTorch computes, in the right form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pico
import pytest
from exported import Exported, prepare

from vlm_export.apps.load import load
from vlm_export.dtypes import DTYPES, FP32
from vlm_export.graph import simplify
from vlm_export.graph.graph_file import copy_graph, save_graph
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.trace import IR_VERSION, OPSET, trace
from vlm_export.manifest import load_manifest
from vlm_export.quantize.variants import Source, Variant
from vlm_export.runtime.images import open_image
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.verify.golden import load_golden
from vlm_export.verify.metrics import cosine_similarity

KINDS = {
    "llama, linear, tied": pico.config(),
    "llama, mlp, untied": pico.config(projection="mlp", tied=False),
    "gpt2, linear, tied": pico.config("gpt2"),
}
LAYOUTS = ("captioner", "chat", "components")
DECODERS = {"captioner": "decoder_model_merged", "chat": "decoder_model_merged", "components": "language_model"}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return prepare(tmp_path_factory.mktemp("model"), KINDS[request.param])


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, model: Exported) -> str:
    model.export(request.param, ["fp16", "int8", "q8"])
    return request.param


def decoder(model: Exported, layout: str, suffix: str = "") -> ir.Model:
    return ir.load(model.work.repo / "onnx" / f"{DECODERS[layout]}{suffix}.onnx")


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner chat components", ort="fp32 fp16 int8 q8")
def test_verifies(model: Exported, layout: str) -> None:
    report = model.verify("ort")
    assert report.verdict == "pass", [check for check in report.failures]
    compared = {(check.component, check.dtype) for check in report.checks}
    graphs = {(graph.component, graph.dtype) for graph in load_manifest(model.work.repo).graphs}
    assert graphs <= compared, "a graph that no check is about"
    model.check_ranges()
    model.check_by_doctor()


def test_the_runtime_says_what_pytorch_says(model: Exported, layout: str) -> None:
    golden = load_golden(model.recipe.golden_dir)
    loaded = load(model.work.repo, dtype="fp32", backend="onnx", threads=1)
    answers = loaded.generate_batch([([open_image(path)], None) for path in golden.image_paths()])
    assert [list(answer.token_ids) for answer in answers] == [image.token_ids for image in golden.facts.images]


def test_cache_is_dynamic_and_named_for_transformers_js(model: Exported, layout: str) -> None:
    session = onnxruntime.InferenceSession(str(model.graph(DECODERS[layout])))
    cache = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    assert [value.name for value in cache] == [
        f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")
    ]
    for value in cache:
        batch, heads, past, size = value.shape
        assert (batch, type(heads), type(past), type(size)) == ("batch_size", int, str, int)
    present = [value.name for value in session.get_outputs() if value.name != "logits"]
    assert present == [value.name.replace("past_key_values", "present") for value in cache]


def test_one_graph_without_branches(model: Exported, layout: str) -> None:
    graph = decoder(model, layout)
    assert (graph.opset_imports[""], graph.ir_version) == (OPSET, IR_VERSION)
    assert not {node.op_type for node in graph.graph} & {"If", "Loop", "Scan"}


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("", ir.DataType.FLOAT), ("_int8", ir.DataType.UINT8), ("_quantized", ir.DataType.INT8)]
)
def test_tied_weights_are_stored_once(model: Exported, layout: str, suffix: str, dtype: ir.DataType) -> None:
    config = open_checkpoint(model.work.merged).config["text_config"]
    elements = pico.VOCABULARY * 32
    tables = [v for v in decoder(model, layout, suffix).graph.initializers.values() if v.const_value.size == elements]
    needs_embedding = layout == "captioner" and not config["tie_word_embeddings"]
    assert len(tables) == (2 if needs_embedding else 1)
    # A table of its own is looked up by rows, which are uint8 in both forms.
    assert {table.dtype for table in tables} == ({dtype, ir.DataType.UINT8} if needs_embedding and suffix else {dtype})


def test_no_weight_is_transposed_at_run_time(model: Exported, layout: str) -> None:
    for path in sorted((model.work.repo / "onnx").glob("*.onnx")):
        graph = ir.load(path).graph
        moved = [node for node in graph if node.op_type in ("Transpose", "Gemm") and node.inputs[0].is_initializer()]
        assert not moved, path.name


def test_int8_quantizes_every_matmul_with_a_weight(model: Exported, layout: str) -> None:
    left = [n for n in decoder(model, layout, "_int8").graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]
    assert not left


def test_simplifier_keeps_its_budgets(model: Exported) -> None:
    merged = open_checkpoint(model.work.merged)
    component = merged.family.layouts["components"].components(merged.config)[1]
    skeleton = trace(component, build_empty(merged))
    with Onnxsim() as onnxsim:
        simplified, report = simplify.simplify(skeleton, component, onnxsim, seconds=0.001)
        assert report.onnxsim == "skipped: took more than 0.001 s"
        assert len(simplified.graph) == report.nodes_after
        for _ in range(2):  # the process is started again, and takes one graph after another
            _, report = simplify.simplify(trace(component, build_empty(merged)), component, onnxsim)
            assert report.onnxsim == "applied"


def test_what_goes_wrong_in_onnxsim_is_said(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"no graph")
    with Onnxsim() as onnxsim:
        problem = onnxsim.run(tmp_path / "garbage.onnx", tmp_path / "simplified.onnx", 60)
        assert problem.startswith("DecodeError: ") and "\n" not in problem
        onnxsim.start().kill()
        onnxsim.start().wait()
        ir.save(
            ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="empty"), ir_version=10),
            tmp_path / "empty.onnx",
        )
        assert onnxsim.run(tmp_path / "empty.onnx", tmp_path / "simplified.onnx", 60) == "", "another one was started"


def test_external_data_is_named_and_declared(tmp_path: Path) -> None:
    model = prepare(tmp_path)
    merged = open_checkpoint(model.work.merged)
    component = merged.family.layouts["captioner"].components(merged.config)[0]
    skeleton, _ = make_skeleton(component, build_empty(merged))
    source = Source(component, skeleton, merged.tensors)
    path = tmp_path / "encoder_model.onnx"
    chunks = save_graph(Variant(source, FP32).make(), path, inline_bytes=0, chunk_bytes=20_000)
    files = sorted(file.name for file in tmp_path.glob("encoder_model.onnx_data*"))
    assert chunks == len(files) > 2
    assert files == ["encoder_model.onnx_data", *(f"encoder_model.onnx_data_{i}" for i in range(1, chunks))]
    assert all((tmp_path / name).stat().st_size <= 20_000 for name in files)
    copy = tmp_path / "encoder_model_again.onnx"
    assert copy_graph(path, copy) == chunks
    pixels = {"pixel_values": np.linspace(-1, 1, 3 * 16 * 16, dtype=np.float32).reshape(1, 3, 16, 16)}
    expected = onnxruntime.InferenceSession(str(path)).run(None, pixels)[0]
    for data in files:
        (tmp_path / data).unlink()
    np.testing.assert_array_equal(onnxruntime.InferenceSession(str(copy)).run(None, pixels)[0], expected)
    for name in ("fp16", "int8"):
        variant = Variant(source, DTYPES[name])
        assert save_graph(variant.make(), tmp_path / variant.file) == 0, "small enough to be one file"
        made = onnxruntime.InferenceSession(str(tmp_path / variant.file)).run(None, pixels)[0]
        assert cosine_similarity(made, expected) > 0.99
