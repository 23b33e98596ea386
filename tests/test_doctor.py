"""vlm_export.doctor: our own exports have no findings, and for each rule there are repos that break it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from exported import prepare
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session

from vlm_export.cli import main
from vlm_export.doctor.examine import examine, find_rules
from vlm_export.doctor.findings import Finding, Severity
from vlm_export.doctor.repo_view import DOCUMENTS, graph_file, open_repo, split_name
from vlm_export.errors import InputError
from vlm_export.files import read_json, write_json
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.graph_on_disk import open_graph
from vlm_export.hub import push_folder

Change = Callable[[Path], None]
LAYOUTS = ("captioner", "chat")
DECODER, EMBED, VISION = (f"onnx/{name}.onnx" for name in ("decoder_model_merged", "embed_tokens", "vision_encoder"))
HALF = "onnx/decoder_model_merged_fp16.onnx"


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pico captioner in both layouts, the chat in three dtypes; none of them may be changed."""
    made = prepare(tmp_path_factory.mktemp("made"))
    folder = tmp_path_factory.mktemp("repos")
    for layout in LAYOUTS:
        made.export(layout, ["fp16", "q8"] if layout == "chat" else ["q8"])
        made.work.repo.rename(folder / layout)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture
def copy(repos: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a layout's repo, to be spoiled."""
    return lambda layout: Path(shutil.copytree(repos[layout], tmp_path / "repo"))


def findings(repo: Path) -> list[tuple[str, Finding]]:
    return list(examine(open_repo(repo)).found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_exports_have_no_findings(layout: str, repos: dict[str, Path]) -> None:
    found = examine(open_repo(repos[layout]))
    assert found.found == ()
    assert found.graphs == len(read_json(repos[layout] / "export.json")["graphs"])


# What breaks a repo


def edit(name: str, *path: str, **values: Any) -> Change:
    """Set values in a JSON file, or in an object of it."""

    def change(repo: Path) -> None:
        contents = read_json(repo / name)
        inner: Any = contents
        for key in path:
            inner = inner[key]
        inner.update(values)
        write_json(repo / name, contents)

    return change


def drop(name: str, *keys: str) -> Change:
    """Remove keys of a JSON file, those of its objects included."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if key not in keys}
        return value

    return lambda repo: write_json(repo / name, without(read_json(repo / name)))


def remove(name: str) -> Change:
    return lambda repo: (repo / name).unlink()


def write(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda repo: (repo / name).write_bytes(data) and None


def duplicate(name: str, other: str) -> Change:
    return lambda repo: shutil.copyfile(repo / name, repo / other) and None


def grow(name: str, size_bytes: int) -> Change:
    """Make a file larger, at no cost on the disk."""

    def change(repo: Path) -> None:
        (repo / name).touch()
        os.truncate(repo / name, size_bytes)

    return change


def graph(file: str, change: Callable[[ir.Model], object]) -> Change:
    """Change a graph; its weights stay inside the file."""

    def changed(repo: Path) -> None:
        model = ir.load(repo / file)
        change(model)
        ir.save(model, repo / file)

    return changed


def value(model: ir.Model, name: str) -> ir.Value:
    return next(one for one in (*model.graph.inputs, *model.graph.outputs) if one.name == name)


def rename(old: str, new: str) -> Callable[[ir.Model], None]:
    return lambda model: setattr(value(model, old), "name", new)


def shape(name: str, *axes: int | str) -> Callable[[ir.Model], None]:
    return lambda model: setattr(value(model, name), "shape", ir.Shape(axes))


def dtype(name: str, kind: ir.DataType) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        value(model, name).dtype = kind

    return change


def half_cache(model: ir.Model) -> None:
    for one in (*model.graph.inputs, *model.graph.outputs):
        if str(one.name).startswith(("past", "present")):
            one.dtype = ir.DataType.FLOAT16


def operator(name: str, domain: str = "com.microsoft", **attributes: Any) -> Callable[[ir.Model], None]:
    """Append a node that nothing reads."""

    def change(model: ir.Model) -> None:
        first = model.graph.node(0).inputs[0]
        model.graph.append(ir.node(name, [first], attributes=attributes, domain=domain))

    return change


def product(model: ir.Model) -> None:
    weight = ir.tensor(np.full((4, 2), 100, dtype=np.int8), name="weight")
    known = ir.Value(name="weight", const_value=weight, type=ir.TensorType(weight.dtype), shape=ir.Shape((4, 2)))
    model.graph.initializers["weight"] = known
    model.graph.append(ir.node("MatMulInteger", [model.graph.inputs[0], known]))


def store_twice(model: ir.Model) -> None:
    """The largest matrix, transposed, under another name."""
    matrices = [one for one in model.graph.initializers.values() if len(one.shape or ()) == 2]
    largest = max(matrices, key=lambda one: one.const_value.nbytes if one.const_value else 0)
    assert largest.const_value is not None
    tensor = ir.tensor(np.ascontiguousarray(largest.const_value.numpy().T), name="again")
    model.graph.initializers["again"] = ir.Value(name="again", const_value=tensor)


def grouped_product(model: ir.Model) -> None:
    """A MatMulNBits with zero points of floats and a group index, which nothing reads."""
    first = model.graph.inputs[0]
    points = ir.Value(
        name="points", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.zeros(1, np.float32))
    )
    model.graph.initializers["points"] = points
    model.graph.append(ir.node("MatMulNBits", [first, first, first, points, first], domain="com.microsoft"))


def rotary(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def newer(ir_version: int | None = None, opset: int | None = None) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        model.ir_version = ir_version or model.ir_version
        model.opset_imports[""] = opset or model.opset_imports[""]

    return change


def external(file: str, declared: int | None = None, chunk_bytes: int = 10_000_000) -> Change:
    """Put a graph's weights beside it, as export does of large ones; declare so many chunks, or as many there are."""

    def change(repo: Path) -> None:
        model = ir.load(repo / file)
        (repo / file).unlink()
        written = save_graph(model, repo / file, inline_bytes=0, chunk_bytes=chunk_bytes)
        count = written if declared is None else declared
        edit("config.json", "transformers.js_config", use_external_data_format={Path(file).name: count})(repo)

    return change


def all_external(file: str) -> Change:
    """All of a graph's constants, small ones too."""

    def change(repo: Path) -> None:
        model = ir.load(repo / file)
        name = Path(file).name
        ir.save(model, repo / file, external_data=f"{name}_data", size_threshold_bytes=0)
        edit("config.json", "transformers.js_config", use_external_data_format={name: 1})(repo)

    return change


def relocate(file: str, location: str) -> Change:
    """Name another file in a graph whose weights lie beside it, and move that one there."""

    def change(repo: Path) -> None:
        external(file)(repo)
        model = ir.load(repo / file)
        for one in model.graph.initializers.values():
            if isinstance(one.const_value, ir.ExternalTensor):
                old = one.const_value
                moved = ir.ExternalTensor(
                    location, old.offset, old.length, old.dtype, shape=old.shape, name=str(old.name), base_dir=repo
                )
                one.const_value = moved
        ir.save(model, repo / file)
        data = repo / f"{file}_data"
        data.rename((repo / file).parent / location)

    return change


def both(*changes: Change) -> Change:
    def change(repo: Path) -> None:
        for one in changes:
            one(repo)

    return change


def link_out(name: str) -> Change:
    def change(repo: Path) -> None:
        outside = repo.parent / "outside"
        (repo / name).rename(outside)
        (repo / name).symlink_to(outside)

    return change


def pipe(name: str) -> Change:
    return both(remove(name), lambda repo: os.mkfifo(repo / name))


def onnx_text(file: str, text: str) -> Change:
    head = '<ir_version: 10, opset_import: ["": 21]>\n'
    return lambda repo: ir.save(ir.from_onnx_text(head + text), repo / file)


PIXELS_TO_LOGITS = """
    g (float[1, 3, 16, 16] pixel_values) => (float[1, 196, 260] logits)
    <int64[3] form = {1, 196, 260}>
    { sum = ReduceSum <keepdims = 0> (pixel_values) logits = Expand (sum, form) }
"""
NO_CACHE = """
    g (float[batch_size, length, 32] inputs_embeds) => (float[batch_size, length, 32] logits)
    { logits = Identity (inputs_embeds) }
"""
TWO_ROWS = """
    g (int64[batch_size, length] input_ids) => (float[batch_size, length, 2] inputs_embeds)
    <float[2, 2] table = {0, 0, 0, 0}>
    { inputs_embeds = Gather (table, input_ids) }
"""
NO_DTYPES = drop("config.json", "transformers.js_config")


@dataclass(frozen=True)
class Break:
    """A change that breaks a rule: the file that is named, and words of the finding and its fix.

    `also` are the other rules that have something to say of it.
    """

    rule: str
    file: str
    change: Change
    words: str
    layout: str = "chat"
    severity: Severity = Severity.ERROR
    also: tuple[str, ...] = ()


warns = partial(Break, severity=Severity.WARNING)
of_captioner = partial(Break, layout="captioner")
BREAKS = [
    Break("readable", VISION, lambda repo: os.truncate(repo / VISION, 20_000), "is damaged or cut off"),
    Break("readable", VISION, write(VISION, ""), "is empty"),
    Break("readable", VISION, write(VISION, "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    Break("readable", VISION, write(VISION, b"\x08\x0a"), "holds no ONNX graph"),
    Break("readable", "tokenizer.json", write("tokenizer.json", "{"), "not readable as JSON"),
    Break("readable", "generation_config.json", write("generation_config.json", "[]"), "holds a JSON list"),
    Break("readable", "tokenizer_config.json", write("tokenizer_config.json", "[" * 100_000), "nested too deep"),
    Break("readable", "processor_config.json", link_out("processor_config.json"), "a link that leads out of"),
    Break("readable", EMBED, link_out(EMBED), "a link that leads out of"),
    Break("readable", "tokenizer.json", pipe("tokenizer.json"), "is a pipe, a socket or a device"),
    Break(
        "readable",
        "onnx/folder.onnx",
        lambda repo: (repo / "onnx/folder.onnx").mkdir(),
        "is a folder",
        also=("file-names",),
    ),
    Break("readable", "onnx", link_out("onnx"), "a link that leads out of", also=("graph-files",)),
    Break("model-class", "config.json", drop("config.json", "model_type"), "has no model_type"),
    warns("model-class", "config.json", edit("config.json", model_type="qwen9"), "no vision-language model"),
    of_captioner("model-class", "config.json", drop("config.json", "is_encoder_decoder"), "is_encoder_decoder"),
    Break(
        "model-class",
        "config.json",
        edit(
            "config.json",
            model_type="llava_qwen2",
            architectures=["LlavaQwen2ForConditionalGeneration"],
            num_hidden_layers=2,
        ),
        "loads the text model alone",
    ),
    Break(
        "graph-files",
        "onnx/vision_encoder_quantized.onnx",
        remove("onnx/vision_encoder_quantized.onnx"),
        "as config.json says",
    ),
    of_captioner(
        "graph-files",
        "onnx/encoder_model_quantized.onnx",
        both(
            remove("onnx/encoder_model_quantized.onnx"), remove("onnx/decoder_model_merged_quantized.onnx"), NO_DTYPES
        ),
        "a browser loads it by default (q8)",
    ),
    Break("client-config", "config.json", edit("config.json", "transformers.js_config", dtype="q8f16"), "is no dtype"),
    warns(
        "client-config",
        "config.json",
        edit("config.json", "transformers.js_config", dtype={"decoder": "fp16"}),
        "about no graph of llava",
    ),
    Break(
        "client-config",
        "config.json",
        edit("config.json", **{"transformers.js_config": ["q8"]}),
        "is no object",
    ),
    Break("webgpu-products", DECODER, graph(DECODER, grouped_product), "zero points of float"),
    Break("webgpu-products", DECODER, graph(DECODER, grouped_product), "a group index"),
    warns("webgpu-products", DECODER, graph(DECODER, operator("MatMulBnb4")), "name q4 for webgpu"),
    warns("file-names", "onnx/vision_encoder_int4.onnx", duplicate(VISION, "onnx/vision_encoder_int4.onnx"), "_q4"),
    warns("file-names", "model.onnx", duplicate(VISION, "model.onnx"), "move it to onnx/"),
    warns("file-names", "onnx/vision_encoder_bnb4.onnx", duplicate(VISION, "onnx/vision_encoder_bnb4.onnx"), "bnb4"),
    Break("external-data", "config.json", external(VISION, declared=0), "declares 0 for vision_encoder.onnx"),
    Break("external-data", "config.json", external(VISION, declared=2), "loading never ends"),
    Break("external-data", "config.json", external(VISION, 1, chunk_bytes=10_000), "a browser does not fetch all"),
    Break(
        "external-data",
        "config.json",
        edit("config.json", "transformers.js_config", use_external_data_format=True),
        "drop",
    ),
    Break("external-data", f"{VISION}_data", both(external(VISION), remove(f"{VISION}_data")), "add it to the repo"),
    Break("external-data", f"{VISION}_data", both(external(VISION), grow(f"{VISION}_data", 9)), "ends at byte 9"),
    Break("external-data", f"{VISION}_data", both(external(VISION), grow(f"{VISION}_data", 2**31)), "2 GB"),
    Break("external-data", VISION, relocate(VISION, "weights.bin"), "which no client fetches"),
    Break("external-data", VISION, relocate(VISION, "../weights"), "a path"),
    Break("external-data", VISION, relocate(VISION, "vision_encoder.onnx_data_1"), "number them from 0 on"),
    Break("external-data", VISION, relocate(VISION, "vision_encoder.onnx_data_100"), "clients take 100"),
    Break("external-data", VISION, grow(VISION, 2**31), "2 GB", also=("readable",)),
    Break("inline-constants", DECODER, all_external(DECODER), "small constant"),
    Break("memory", "config.json", grow("onnx/embed_tokens_quantized.onnx_data", 5 * 10**9), "5.0 GB"),
    warns("memory", "config.json", grow("onnx/embed_tokens_quantized.onnx_data", 2 * 10**9), "1.5 GB"),
    Break("graph-inputs", DECODER, graph(DECODER, rename("attention_mask", "cache_position")), "'cache_position'"),
    Break("graph-inputs", VISION, graph(VISION, rename("pixel_values", "images")), "has no input 'pixel_values'"),
    Break("graph-outputs", VISION, graph(VISION, rename("image_features", "features")), "call it image_features"),
    Break("border-types", VISION, graph(VISION, dtype("pixel_values", ir.DataType.FLOAT16)), "is float16"),
    Break("border-types", EMBED, graph(EMBED, dtype("input_ids", ir.DataType.INT32)), "has int64"),
    Break("border-types", DECODER, graph(DECODER, dtype("logits", ir.DataType.BFLOAT16)), "logits are bfloat16"),
    Break("border-types", VISION, graph(VISION, shape("pixel_values", "b", "n", 3, "h", "w")), "has 5 axes, not 4"),
    Break("fixed-sizes", EMBED, graph(EMBED, shape("input_ids", "batch_size", 7)), "axis 1 of input_ids is fixed at 7"),
    warns("fixed-sizes", VISION, graph(VISION, shape("pixel_values", 1, 3, 16, 16)), "axis 0 of pixel_values"),
    Break(
        "cache-inputs",
        DECODER,
        graph(DECODER, shape("past_key_values.0.key", "batch", 2, "past", 8)),
        "name it batch_size",
    ),
    Break(
        "cache-inputs",
        DECODER,
        graph(DECODER, shape("past_key_values.0.key", "batch_size", "k", "past", 8)),
        "become 0",
    ),
    Break(
        "cache-inputs",
        DECODER,
        graph(DECODER, shape("past_key_values.0.key", "batch_size", 2, 16, 8)),
        "no free length",
    ),
    Break(
        "cache-inputs",
        DECODER,
        graph(DECODER, shape("past_key_values.0.key", "batch_size", 16)),
        "not 4 axes",
        also=("cache-outputs",),
    ),
    Break(
        "cache-inputs",
        DECODER,
        graph(DECODER, rename("past_key_values.1.key", "past_key_values.layers.1.keys")),
        "is not made by transformers.js",
        also=("cache-outputs",),
    ),
    Break("cache-inputs", DECODER, edit("config.json", "text_config", num_hidden_layers=1), "reads 1 layers"),
    Break("cache-inputs", "config.json", edit("config.json", "text_config", model_type="own"), "it makes no cache"),
    Break("cache-inputs", "config.json", edit("config.json", text_config="llama"), "it makes no cache"),
    Break("cache-inputs", DECODER, onnx_text(DECODER, NO_CACHE), "has no cache"),
    Break("cache-outputs", DECODER, graph(DECODER, rename("present.0.key", "key.0")), "call it present.0.key"),
    Break("cache-outputs", DECODER, graph(DECODER, dtype("present.0.key", ir.DataType.FLOAT16)), "the same type"),
    Break(
        "cache-outputs", DECODER, graph(DECODER, shape("present.0.key", "batch_size", 2, "all", 16)), "the same axes"
    ),
    warns("cache-type", "config.json", graph(HALF, half_cache), '"kv_cache_dtype": {"fp16": "float16"}'),
    Break("versions", VISION, graph(VISION, newer(ir_version=14)), "has IR version 14"),
    Break("versions", VISION, graph(VISION, newer(opset=27)), "has opset 27"),
    Break("versions", VISION, graph(VISION, operator("Own", "acme")), "the domain 'acme'"),
    warns("versions", HALF, graph(HALF, newer(opset=16)), "export with opset 17 or higher"),
    Break(
        "gather-block-quantized",
        "onnx/embed_tokens_quantized.onnx",
        graph("onnx/embed_tokens_quantized.onnx", operator("GatherBlockQuantized")),
        "it takes this file by default",
    ),
    warns("gather-block-quantized", HALF, graph(HALF, operator("GatherBlockQuantized")), "fails with dtype 'fp16'"),
    Break("one-bit", HALF, graph(HALF, operator("MatMulNBits", bits=1)), "kernels take 2, 4 or 8"),
    Break("dynamic-integers", VISION, graph(VISION, operator("DynamicQuantizeLinear", "")), "WebGPU takes this file"),
    Break("saturation", HALF, graph(HALF, product), "saturates on processors without VNNI"),
    Break("head-size", DECODER, graph(DECODER, rotary), "heads of 8, and takes multiples of 16"),
    of_captioner(
        "vision-logits",
        "onnx/model_int8.onnx",
        onnx_text("onnx/model_int8.onnx", PIXELS_TO_LOGITS),
        "196 rows of logits where the next token's alone is wanted",
        also=("file-names",),
    ),
    warns(
        "tied-weights",
        DECODER,
        graph(DECODER, store_twice),
        "again is",
        layout="captioner",
    ),
    Break("preprocessor", "preprocessor_config.json", remove("preprocessor_config.json"), "is missing"),
    Break(
        "preprocessor",
        "preprocessor_config.json",
        both(remove("preprocessor_config.json"), edit("processor_config.json", image_processor={"size": 16})),
        "nested, which transformers 5 alone reads",
    ),
    Break(
        "preprocessor",
        "preprocessor_config.json",
        edit("preprocessor_config.json", image_processor={}),
        "move them to the top level",
    ),
    of_captioner(
        "preprocessor",
        "preprocessor_config.json",
        drop("preprocessor_config.json", "image_processor_type"),
        "names neither",
    ),
    Break("normalization", "preprocessor_config.json", drop("preprocessor_config.json", "do_normalize"), "off in"),
    Break(
        "normalization", "preprocessor_config.json", edit("preprocessor_config.json", image_std=[0, 0, 0]), "image_std"
    ),
    Break("image-size", "preprocessor_config.json", edit("preprocessor_config.json", size=16), "keeps proportions"),
    Break(
        "image-size",
        "preprocessor_config.json",
        edit("preprocessor_config.json", size={"height": 32, "width": 32}),
        "16",
    ),
    warns("image-size", "preprocessor_config.json", drop("preprocessor_config.json", "size"), "resizes nothing"),
    Break("processor", "preprocessor_config.json", drop("preprocessor_config.json", "processor_class"), "images alone"),
    Break("processor", "processor_config.json", remove("processor_config.json"), "is missing, and LlavaProcessor"),
    Break("processor", "processor_config.json", drop("processor_config.json", "patch_size"), "patch_size is None"),
    Break(
        "image-rows",
        "processor_config.json",
        edit("processor_config.json", num_additional_image_tokens=9),
        "gives 4 rows",
    ),
    Break("image-rows", "processor_config.json", edit("processor_config.json", patch_size=4), "writes 20 image tokens"),
    Break(
        "chat-template",
        "tokenizer_config.json",
        both(drop("tokenizer_config.json", "chat_template"), write("chat_template.jinja", "{{ messages }}")),
        "chat_template.jinja is not read for llava",
    ),
    warns(
        "chat-template", "tokenizer_config.json", drop("tokenizer_config.json", "chat_template"), "apply_chat_template"
    ),
    warns(
        "chat-template",
        "tokenizer_config.json",
        edit("tokenizer_config.json", chat_template="{% generation %}{% endgeneration %}"),
        "before 4.3 does not parse",
    ),
    Break("tokenizer", "tokenizer.json", remove("tokenizer.json"), "is missing"),
    Break("tokenizer", "tokenizer.json", edit("tokenizer.json", "model", type="WordLevel"), "'WordLevel'"),
    Break("tokenizer", "tokenizer.json", drop("tokenizer.json", "post_processor"), "has no post_processor"),
    warns(
        "tokenizer", "tokenizer_config.json", drop("tokenizer_config.json", "clean_up_tokenization_spaces"), "vanish"
    ),
    warns(
        "tokenizer",
        "tokenizer_config.json",
        edit("tokenizer_config.json", tokenizer_class="TokenizersBackend"),
        "PreTrainedTokenizerFast",
    ),
    Break(
        "image-token", "config.json", drop("config.json", "image_token_id", "image_token_index"), "no image can be put"
    ),
    Break("image-token", "config.json", edit("config.json", image_token_index=12), "two image tokens"),
    warns("image-token", "config.json", drop("config.json", "image_token_index"), "transformers.js 3.x"),
    Break("image-token", "config.json", edit("generation_config.json", pad_token_id=257), "is also pad_token_id"),
    Break("image-token", EMBED, onnx_text(EMBED, TWO_ROWS), "its table has 2 rows"),
    Break(
        "image-token",
        "tokenizer.json",
        edit("config.json", image_token_id=200, image_token_index=200),
        "has the id 257",
    ),
    Break("image-token", "tokenizer.json", edit("processor_config.json", image_token="<picture>"), "several ids"),
    Break("generation", "generation_config.json", remove("generation_config.json"), "is missing"),
    Break(
        "generation",
        "generation_config.json",
        both(drop("generation_config.json", "eos_token_id"), edit("config.json", "text_config", eos_token_id=None)),
        "no text ends",
    ),
    of_captioner(
        "generation",
        "generation_config.json",
        both(
            drop("generation_config.json", "decoder_start_token_id"),
            drop("config.json", "decoder_start_token_id", "bos_token_id"),
        ),
        "no text begins",
    ),
    warns("generation", "generation_config.json", drop("generation_config.json", "max_new_tokens"), "20 tokens"),
    warns("generation", "generation_config.json", edit("generation_config.json", num_beams=4), "num_beams is 4"),
    warns("generation", "generation_config.json", edit("generation_config.json", max_new_tokens=65), "64 positions"),
    warns("generation", "generation_config.json", edit("generation_config.json", top_p=0.9), "top_p: transformers.js"),
]


def label(broken: Break) -> str:
    return f"{broken.rule}: {broken.words}"


@pytest.mark.parametrize("broken", BREAKS, ids=label)
def test_what_breaks_a_rule_is_found(broken: Break, copy: Callable[[str], Path]) -> None:
    repo = copy(broken.layout)
    broken.change(repo)
    found = findings(repo)
    assert {rule for rule, _ in found} == {broken.rule, *broken.also}
    told = [
        finding
        for rule, finding in found
        if rule == broken.rule and finding.file == broken.file and finding.severity == broken.severity
    ]
    assert any(broken.words in f"{finding.problem} {finding.fix}" for finding in told), found
    assert not any("\n" in f"{finding.problem}{finding.fix}" for _, finding in found)


def test_every_rule_has_a_repo_that_breaks_it_and_names_its_section() -> None:
    rules = find_rules()
    assert {rule.name for rule in rules} == {broken.rule for broken in BREAKS}
    for rule in rules:
        assert str(sys.modules[rule.check.__module__].__doc__).startswith("Contract §"), rule.name


@pytest.mark.parametrize("chunk_bytes", [10_000_000, 10_000])
def test_weights_outside_that_are_named_and_declared_are_no_finding(
    chunk_bytes: int, copy: Callable[[str], Path]
) -> None:
    repo = copy("chat")
    external(VISION, chunk_bytes=chunk_bytes)(repo)
    assert (repo / f"{VISION}_data_1").exists() == (chunk_bytes == 10_000)
    assert findings(repo) == []


def test_weights_outside_are_looked_at_where_they_are_there(copy: Callable[[str], Path]) -> None:
    repo = copy("chat")
    both(graph(DECODER, store_twice), external(DECODER))(repo)
    assert [rule for rule, _ in findings(repo)] == ["tied-weights"]
    (repo / f"{DECODER}_data").unlink()
    assert [rule for rule, _ in findings(repo)] == ["external-data"]


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "x", [], {}, [[]], {"x": None}], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_any_kind_are_findings_and_no_traceback(layout: str, value: Any, copy: Callable[[str], Path]) -> None:
    """Every key of every file at once, then every key of their objects, with the class known and the sections there."""
    repo = copy(layout)
    for file in (repo / "onnx").iterdir():
        if split_name(f"onnx/{file.name}")[1] != "fp32":
            file.unlink()
    for name in DOCUMENTS:
        if not (repo / name).exists():
            continue
        before = read_json(repo / name)
        inner = {
            key: dict.fromkeys([*part, *before], value) if isinstance(part, dict) else part
            for key, part in before.items()
        }
        write_json(repo / name, inner | {"architectures": value})
        assert name == "config.json" or findings(repo), name
        write_json(repo / name, dict.fromkeys(before, value) | ({"model_type": before.get("model_type")}))
        assert findings(repo), name
        write_json(repo / name, before)


# Graphs are read without their weights


def test_a_graph_reads_as_onnx_ir_reads_it_and_its_weights_stay_on_disk(repos: dict[str, Path]) -> None:
    for path in sorted((repos["chat"] / "onnx").iterdir()):
        opened, read = open_graph(path), ir.load(path)
        assert [node.op_type for node in opened.graph] == [node.op_type for node in read.graph]
        for name, one in read.graph.initializers.items():
            expected, found = one.const_value, opened.graph.initializers[name].const_value
            assert expected is not None and found is not None
            assert found.tobytes() == expected.tobytes()
            assert isinstance(found, ir.ExternalTensor) == (expected.nbytes >= 1024)


def test_a_graph_that_is_cut_anywhere_is_told_in_a_line(repos: dict[str, Path], tmp_path: Path) -> None:
    whole = (repos["chat"] / EMBED).read_bytes()
    for length in range(1, len(whole), 211):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.onnx: (is|holds)") as caught:
            open_graph(tmp_path / "cut.onnx")
        assert "\n" not in str(caught.value)


def test_a_graph_whose_bytes_are_wrong_is_examined_or_told_in_a_line(copy: Callable[[str], Path]) -> None:
    repo = copy("captioner")
    file = repo / "onnx" / "encoder_model.onnx"
    whole = file.read_bytes()
    for other in ("encoder_model_quantized", "decoder_model_merged", "decoder_model_merged_quantized"):
        (repo / "onnx" / f"{other}.onnx").unlink()
    random = np.random.default_rng(0)
    told = 0
    for _ in range(100):
        spoiled = bytearray(whole)
        for place in random.integers(0, 6000, 4):
            spoiled[place] = random.integers(0, 256)
        file.write_bytes(spoiled)
        told += any(rule == "readable" for rule, _ in findings(repo))
    assert told > 50


# The command


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_a_repo_without_findings_is_0(repos: dict[str, Path]) -> None:
    done = doctor(str(repos["chat"]))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"no findings: {len(find_rules())} rules, 9 graphs\n"


def test_findings_are_printed_by_file_with_their_fixes(copy: Callable[[str], Path]) -> None:
    repo = copy("chat")
    edit("generation_config.json", num_beams=4)(repo)
    assert doctor(str(repo)).exit_code == 0, "warnings alone"
    (repo / "onnx" / "vision_encoder.onnx").unlink()
    done = doctor(str(repo))
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "generation_config.json",
        "  warning  num_beams is 4, and transformers.js takes the best token all the same [generation]",
        '           fix: write "num_beams": 1, and validate the captions of greedy search',
        "onnx/vision_encoder.onnx",
        "  error    is missing: a browser with WebGPU loads it as config.json says [graph-files]",
        "           fix: export fp32, or name one of fp16, q8 in transformers.js_config.device_config of config.json",
        f"1 error, 1 warning: {len(find_rules())} rules, 8 graphs",
    ]


def test_names_and_values_of_any_kind_are_printed_in_a_line(copy: Callable[[str], Path]) -> None:
    repo = copy("chat")
    duplicate(VISION, "onnx/\x1b[31m\n.onnx")(repo)
    config = read_json(repo / "config.json")
    (repo / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "\x1b" + "x" * 1000}}))
    done = doctor(str(repo))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert "onnx/\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}.onnx" in lines
    assert any("('\\x1bxxx" in line for line in lines)
    assert max(map(len, lines)) < 600


def test_json_is_one_object(copy: Callable[[str], Path]) -> None:
    repo = copy("captioner")
    edit("generation_config.json", num_beams=4)(repo)
    done = doctor(str(repo), "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (told["repo"], told["errors"], told["warnings"], told["graphs"]) == (str(repo), 0, 1, 4)
    assert told["rules"] == [rule.name for rule in find_rules()]
    (finding,) = told["findings"]
    assert set(finding) == {"severity", "rule", "file", "problem", "fix"}
    assert (finding["severity"], finding["rule"]) == ("warning", "generation")


def test_the_repo_of_a_work_folder(repos: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(repos["chat"], tmp_path / "repo")
    assert doctor(str(tmp_path)).exit_code == 0


WRONG = {
    "nowhere": "no such folder: nowhere; nor is it an id of the Hub (org/name)",
    "./a/b": "no such folder: ./a/b; nor is it an id of the Hub (org/name)",
    ".": ".: no config.json, so this is no repo for transformers.js",
}


@pytest.mark.parametrize("reference", WRONG)
def test_wrong_input_is_one_line_and_exit_2(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = doctor(reference)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {WRONG[reference]}\n")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_config_is_one_line_and_exit_2(content: str, copy: Callable[[str], Path]) -> None:
    repo = copy("captioner")
    write("config.json", content)(repo)
    done = doctor(str(repo))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {repo / 'config.json'}: ")
    assert done.stderr.count("\n") == 1


def test_neither_torch_nor_transformers_nor_onnxruntime_is_imported(repos: dict[str, Path]) -> None:
    script = (
        "import sys; from vlm_export.cli import main; main(['doctor', sys.argv[1]], standalone_mode=False);"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'huggingface_hub') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(repos["chat"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()


def test_of_the_hub_configs_and_graphs_are_fetched_and_no_weights_beside_them(
    hub: HubServer, copy: Callable[[str], Path]
) -> None:
    repo = copy("chat")
    external(VISION)(repo)
    push_folder("tester/whole", repo, message="whole")
    done = doctor("tester/whole")
    assert (done.exit_code, done.stdout[:11]) == (0, "no findings"), done.stdout
    assert "fetching 9 graphs, 0 MB, but for those in the cache\n" in done.stderr
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    graphs = {graph_file(*split_name(f"onnx/{path.name}")) for path in (repo / "onnx").glob("*.onnx")}
    assert fetched == graphs | {name for name in DOCUMENTS if (repo / name).exists()}


def test_of_the_hub_what_is_missing_is_found(hub: HubServer, copy: Callable[[str], Path]) -> None:
    repo = copy("chat")
    both(external(VISION), remove(f"{VISION}_data"), remove("tokenizer.json"))(repo)
    push_folder("tester/broken", repo, message="broken")
    done = doctor("tester/broken", "--json")
    assert done.exit_code == 1
    assert {one["file"] for one in json.loads(done.stdout)["findings"]} == {f"{VISION}_data", "tokenizer.json"}
    assert "was not found" in doctor("tester/none").stderr
