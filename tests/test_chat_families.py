"""Families of transformers' own chat classes: LoRA checkpoint → merge → graphs → the same tokens in transformers.js."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pico_chat
import pytest
import torch
from exported import Exported, failed_graphs, record, write_images
from in_apps import check_apps
from PIL import Image
from test_browser import tokens, visit
from transformers import AutoModelForImageTextToText, GotOcr2ImageProcessor, GotOcr2Processor, PreTrainedTokenizerFast
from transformers.utils import import_utils

from vlm_export.apps.load import load
from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.families.registry import find_family
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.simplify_report import SimplifyReport
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.layouts.pixtral import image_processor
from vlm_export.manifest import load_manifest
from vlm_export.models import chat as chat_models
from vlm_export.models import marked_rows
from vlm_export.preprocessing import image_processor_settings
from vlm_export.quantize.full_precision import _before
from vlm_export.quantize.variants import Source, Variant
from vlm_export.recipe import load_recipe
from vlm_export.runtime.images import open_image
from vlm_export.runtime.model import Memory
from vlm_export.runtime.options import Options
from vlm_export.runtime.repo import open_repo
from vlm_export.source import fetch
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.spec.client import RepoFacts
from vlm_export.start.inspection import Checkpoint as Inspected
from vlm_export.start.inspection import inspect
from vlm_export.verify import limits
from vlm_export.verify.client_inputs import OwnFiles
from vlm_export.verify.golden import load_golden
from vlm_export.verify.in_client import picture_size
from vlm_export.verify.metrics import max_relative_error
from vlm_export.verify.report import Report
from vlm_export.web import node_runtime
from vlm_export.web.captions import Item

# By what their configs say: model_type, that of the tower, that of the text model.
KINDS: dict[str, Callable[[Path], Path]] = {
    "llava, clip_vision_model, llama": pico_chat.write_llava,
    "llava, siglip_vision_model, qwen2": lambda folder: pico_chat.write_llava(
        folder, "qwen2", "siglip_vision_model", vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
    "llava_onevision, siglip_vision_model, qwen2": pico_chat.write_onevision,
    "fast_vlm, timm_wrapper, qwen2": pico_chat.write_fast_vlm,
    "internvl, internvl_vision, qwen2": pico_chat.write_internvl,
    "got_ocr2, got_ocr2_vision, qwen2": pico_chat.write_got_ocr2,
    "deepseek_vl, siglip_vision_model, llama": pico_chat.write_deepseek_vl,
    "paligemma, siglip_vision_model, gemma": lambda folder: pico_chat.write_paligemma(folder, "gemma"),
    "paligemma, siglip_vision_model, gemma2": pico_chat.write_paligemma,
    "gemma3, siglip_vision_model, gemma3_text": pico_chat.write_gemma3,
    "qwen2_vl, qwen2_vl_vision, qwen2_vl_text": pico_chat.write_qwen2_vl,
    "qwen2_5_vl, qwen2_5_vl_vision, qwen2_5_vl_text": pico_chat.write_qwen2_5_vl,
    "qwen3_vl, qwen3_vl_vision, qwen3_vl_text": pico_chat.write_qwen3_vl,
    "glm_ocr, glm_ocr_vision, glm_ocr_text": pico_chat.write_glm_ocr,
    "idefics3, idefics3_vision, llama": pico_chat.write_tiled,
    "smolvlm, smolvlm_vision, llama": lambda folder: pico_chat.write_tiled(folder, "smolvlm"),
    "mistral3, pixtral, ministral3": pico_chat.write_mistral3,
    "lighton_ocr, pixtral, qwen3": pico_chat.write_lighton_ocr,
    "lfm2_vl, siglip2_vision_model, lfm2": pico_chat.write_lfm2_vl,
}
EXPORTED = ("fp32", "fp16", "int8", "q8")
GOLDEN = {"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION, "<image>a cat", "is <image> a cat?"]}
GRIDS = tuple(kind for kind in KINDS if kind.startswith(("qwen", "glm")))


def prepare(
    folder: Path, write: Callable[[Path], Path], images: Mapping[str, tuple[int, int]] | None = None, **recipe: Any
) -> Exported:
    """A checkpoint with an adapter on text model, tower and projector, merged, and its golden outputs.

    `images` are heights and widths of pictures of noise, by name, in the place of the usual ones.
    """
    checkpoint = write(folder / "checkpoint")
    pico_chat.write_adapter(folder / "adapter", checkpoint)
    write_images(folder / "images")
    if images:
        shutil.rmtree(folder / "images")
        (folder / "images").mkdir()
    random = np.random.default_rng(1)
    for name, size in (images or {"wide": (12, 40)}).items():
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "images" / f"{name}.png")
    golden = json.loads(json.dumps(GOLDEN).replace(pico_chat.IMAGE_TOKEN, pico_chat.image_text(checkpoint)))
    return record(folder, adapters=[{"path": "adapter"}], layout="chat", golden=golden, **recipe)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a kind in every dtype, once."""

    @cache
    def once(kind: str) -> Exported:
        made = prepare(tmp_path_factory.mktemp("chat"), KINDS[kind])
        config = open_checkpoint(made.work.merged).config
        parts = (config, config["vision_config"], config["text_config"])
        assert kind == ", ".join(part["model_type"] for part in parts)
        made.export("chat", EXPORTED)
        made.check_ranges()
        made.check_by_doctor()
        return made

    return once


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, make: Callable[[str], Exported]) -> Exported:
    return make(request.param)


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind.startswith(("idefics3", "smolvlm"))])
def tiled(request: pytest.FixtureRequest, make: Callable[[str], Exported]) -> Exported:
    return make(request.param)


PIXTRALS = [kind for kind in KINDS if ", pixtral, " in kind]


@pytest.fixture(scope="module", params=PIXTRALS)
def pixtral(request: pytest.FixtureRequest, make: Callable[[str], Exported]) -> Exported:
    return make(request.param)


@pytest.fixture
def llava(make: Callable[[str], Exported], tmp_path: Path) -> Exported:
    """A copy that the test may spoil."""
    return make("llava, clip_vision_model, llama").copy(tmp_path / "copy")


def export_tower(made: Exported, target: Path, **changes: Any) -> SimplifyReport:
    """The vision encoder alone, under a changed config."""
    merged = open_checkpoint(made.work.merged)
    changed = replace(merged, config={**merged.config, **changes})
    component = merged.family.layouts["chat"].components(changed.config)[0]
    model = build_empty(changed)
    merged.family.trim(model)
    skeleton, report = make_skeleton(component, model)
    save_graph(Variant(Source(component, skeleton, merged.tensors), FP32).make(), target)
    return report


def merged_model(made: Exported) -> Any:
    return AutoModelForImageTextToText.from_pretrained(made.work.merged, attn_implementation="eager").eval()


def failures(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


def simplified(made: Exported, component: str) -> dict[str, Any]:
    return load_manifest(made.work.repo).simplified[component]


@pytest.mark.verifies(
    "llava llava_onevision fast_vlm internvl got_ocr2 deepseek_vl idefics3 smolvlm qwen2_vl qwen2_5_vl qwen3_vl "
    "glm_ocr mistral3 lighton_ocr lfm2_vl paligemma gemma3",
    "chat",
    ort="fp32 fp16 int8 q8",
    node="fp32 fp16 int8 q8",
)
def test_verifies_in_both_runtimes(exported: Exported) -> None:
    report = exported.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    exact = {(c.runtime, c.dtype): c.value for c in report.checks if c.metric == "tokens_exact_rate"}
    assert exact[("ort", "fp32")] == exact[("node", "fp32")] == 1.0
    assert exact.keys() == {(runtime, dtype) for runtime in ("ort", "node") for dtype in EXPORTED}
    costs = {row.dtype: row.kl for row in report.table}
    assert costs.keys() == set(EXPORTED) and {dtype for dtype, kl in costs.items() if kl is None} == {"fp32"}
    assert {c.detail.split(",")[0] for c in report.checks if "(case" in c.detail} >= {"logits (case0", "logits (case2"}


@pytest.mark.verifies(
    "llava fast_vlm smolvlm qwen2_vl qwen2_5_vl qwen3_vl glm_ocr mistral3 lighton_ocr lfm2_vl paligemma gemma3",
    "chat",
    wasm="fp32",
)
@pytest.mark.parametrize(
    "model_type",
    [
        "llava",
        "fast_vlm",
        "smolvlm",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "glm_ocr",
        "mistral3",
        "lighton_ocr",
        "lfm2_vl",
        "paligemma",
        "gemma3",
    ],
)
def test_in_a_browser(model_type: str, make: Callable[[str], Exported]) -> None:
    made = make(next(kind for kind in KINDS if kind.startswith(f"{model_type},")))
    golden = load_golden(made.recipe.golden_dir)
    case = {name.removeprefix("case0/"): value for name, value in golden.tensors.items() if name.startswith("case0/")}
    item = Item(
        golden.image_paths()[0],
        golden.tensors["case0/pixel_values"],
        golden.facts.text,
        size=picture_size(made.work.repo, case, golden.image_paths()[0]),
    )
    # The processors that make tiles resize in a graph, which looks for a GPU first.
    logs = ["warning: No available adapters."] if model_type in ("smolvlm", "lfm2_vl") else []
    seen = visit(made.work.repo, "chat", [item], "fp32", logs=logs)
    assert seen.dtypes == {"fp32"}
    assert tokens(seen) == [golden.facts.images[0].token_ids]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "lighton_ocr", "lfm2_vl"])
def test_in_what_people_use(model_type: str, make: Callable[[str], Exported]) -> None:
    check_apps(make(next(kind for kind in KINDS if kind.startswith(f"{model_type},"))), "what is it?")


@pytest.mark.parametrize("kind", ["llava, clip_vision_model, llama", "idefics3, idefics3_vision, llama"])
def test_every_dtype_runs_in_both_runtimes_alike(kind: str, make: Callable[[str], Exported], tmp_path: Path) -> None:
    make(kind).copy(tmp_path / "copy").check_every_dtype("chat", "ort", "node")


def test_the_runtime_says_it_too(exported: Exported) -> None:
    """From image files and the conversation: preprocessing, template and tokenizer are its own."""
    facts = load_golden(exported.recipe.golden_dir)
    model = load(exported.work.repo, dtype="fp32", backend="onnx", threads=1)
    items = [([open_image(path)], facts.facts.conversation) for path in facts.image_paths()]
    answers = [model.generate(*item) for item in items]
    assert [list(answer.token_ids) for answer in answers] == [image.token_ids for image in facts.facts.images]
    assert [answer.token_ids for answer in model.generate_batch(items)] == [answer.token_ids for answer in answers]


def with_another_template(made: Exported, folder: Path) -> Exported:
    """A copy whose template writes other prompts."""
    spoilt_repo = made.copy(folder)
    path = spoilt_repo.work.repo / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    spoilt = settings["chat_template"].replace("role", "content")
    if "role" not in settings["chat_template"]:  # a PaliGemma's names none
        spoilt = settings["chat_template"].replace("part['text']", "part['type']")
    path.write_text(json.dumps(settings | {"chat_template": spoilt}))
    if (spoilt_repo.work.repo / "chat_template.jinja").exists():
        (spoilt_repo.work.repo / "chat_template.jinja").write_text(spoilt)
    return spoilt_repo


def test_the_template_is_the_client_s_own(exported: Exported, tmp_path: Path) -> None:
    """Node is given the conversation, not the text: a repo whose template differs fails by its prompt's ids."""
    report = with_another_template(exported, tmp_path / "copy").verify("ort", "node", dtypes=["fp32"])
    assert {(check.runtime, check.dtype, check.metric) for check in report.failures} == {
        ("ort", "fp32", limits.PROMPT_IDS),
        ("node", "fp32", limits.PROMPT_IDS),
        ("node", "fp32", limits.TOKENS_EXACT),
        ("node", "fp32", limits.LOGITS),
    }


def test_the_template_is_the_client_s_own_in_each_dtype(make: Callable[[str], Exported], tmp_path: Path) -> None:
    made = with_another_template(make("llava, clip_vision_model, llama"), tmp_path / "copy")
    found = {(check.runtime, check.dtype, check.metric) for check in made.verify("ort", "node").failures}
    in_fewer_bits = [dtype for dtype in load_manifest(made.work.repo).dtypes if dtype != "fp32"]
    assert "q8" in in_fewer_bits
    for dtype in in_fewer_bits:
        failed = {(runtime, metric) for runtime, of, metric in found if of == dtype}
        of_tokens = {("node", metric) for metric in (limits.TOKENS_AS_ORT, limits.TOKENS_EXACT, limits.LOGITS)}
        assert ("node", limits.PROMPT_IDS) in failed <= {("node", limits.PROMPT_IDS), *of_tokens}
        assert failed & of_tokens or dtype == "int8", "random weights in int8 may say the same of another prompt"


def test_the_adapter_was_everywhere(exported: Exported) -> None:
    adapted = "\n".join(json.loads((exported.work.merged / "merge.json").read_text())["layers"])
    assert "layers.1.self_attn.v_proj" in adapted
    assert re.search(r"layers\.0\.(mlp\.down_proj|feed_forward\.w2)", adapted)
    assert re.search("vision|visual", adapted)
    bare = "mm_input_projection_weight"  # Gemma 3's projector has no layer that an adapter could sit on
    tensors = open_checkpoint(exported.work.merged).tensors
    assert re.search("projector|projection|connector|merger|downsample|aligner", adapted) or any(
        name.endswith(bare) for name in tensors
    )


def test_attention_is_fused(exported: Exported) -> None:
    """But in SAM's tower, which adds to scores what depends on the query, and where tokens see later ones."""
    model_type = open_checkpoint(exported.work.merged).config["model_type"]
    own = {"vision_encoder": ("got_ocr2",), "decoder_model_merged": ("paligemma", "gemma3")}
    for component, operator in (
        ("vision_encoder", "MultiHeadAttention"),
        ("decoder_model_merged", "GroupQueryAttention"),
    ):
        report = simplified(exported, component)
        if model_type in own[component]:
            assert operator not in report["fused"]
            assert bool(report["unfused_attention"]) == (component == "decoder_model_merged")
            continue
        assert report["unfused_attention"] == ""
        assert report["fused"][operator] > 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*GRIDS, *PIXTRALS)])
def test_a_wrong_position_is_caught(kind: str, make: Callable[[str], Exported], tmp_path: Path) -> None:
    """Those whose positions are no table are in test_grids.py and below."""
    made = make(kind).copy(tmp_path / "copy")
    model = ir.load(made.graph("vision_encoder"))
    tables = (
        "position_embedding.weight",
        "embeddings.position_embeddings",
        "pos_emb.reparam_conv.weight",
        "tower.pos_embed",
    )
    table = next(v for n, v in model.graph.initializers.items() if n.endswith(tables))
    stored = table.const_value.numpy().copy()
    rows = stored[0] if len(stored) == 1 else stored
    rows[[-1, -2]] = rows[[-2, -1]]
    table.const_value = ir.Tensor(stored, name=table.name)
    ir.save(model, made.graph("vision_encoder"))
    report = made.verify("ort", dtypes=["fp32"])
    assert failed_graphs(report) == {"vision_encoder"}
    assert "image_features (case0, batch 1)" in failures(report)


def test_a_wrong_feature_layer_is_caught(llava: Exported) -> None:
    export_tower(llava, llava.graph("vision_encoder"), vision_feature_layer=-1)
    report = llava.verify("ort")
    assert failed_graphs(report) == {"vision_encoder"}
    assert "vision_encoder fp32 max_relative_error: image_features" in failures(report)


def test_the_layers_above_the_feature_layer_are_left_out(llava: Exported) -> None:
    assert simplified(llava, "vision_encoder")["repeated"] == {"model.vision_tower.encoder.layers": 1}
    initializers = ir.load(llava.graph("vision_encoder")).graph.initializers
    assert {name.split(".")[4] for name in initializers if "encoder.layers" in name} == {"0", "1", "2"}
    assert not any("post_layernorm" in name for name in initializers)


def test_features_of_several_layers(tmp_path: Path) -> None:
    made = prepare(tmp_path, lambda folder: pico_chat.write_llava(folder, vision_feature_layer=[0, 3, -3]))
    report = export_tower(made, tmp_path / "tower.onnx")
    assert report.repeated == {}
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.stack(merged_model(made).get_image_features(pixels, return_dict=True).pooler_output)
    (features,) = onnxruntime.InferenceSession(tmp_path / "tower.onnx").run(None, {"pixel_values": pixels.numpy()})
    assert max_relative_error(features, expected.numpy()) < 1e-5


def run_tiles(made: Exported, pixels: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`image_features` of the graph and of PyTorch, as rows."""
    session = onnxruntime.InferenceSession(made.graph("vision_encoder"))
    feeds = {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}
    (features,) = session.run(None, feeds)
    with torch.inference_mode():
        rows = merged_model(made).get_image_features(pixels, mask, return_dict=True).pooler_output
    return features.reshape(-1, features.shape[-1]), torch.cat(rows).numpy()


@pytest.mark.parametrize(("batch", "tiles"), [(1, 1), (1, 7), (2, 3)])
def test_any_number_of_tiles(tiled: Exported, batch: int, tiles: int) -> None:
    pixels = torch.rand(batch, tiles, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, expected = run_tiles(tiled, pixels, torch.ones(batch, tiles, 16, 16, dtype=torch.bool))
    assert features.shape == (batch * tiles * 4, 32)
    assert max_relative_error(features, expected) < 1e-5


def test_tiles_of_padding_are_dropped(tiled: Exported) -> None:
    pixels = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.ones(2, 3, 16, 16, dtype=torch.bool)
    pixels[0, 1:], mask[0, 1:] = 0, False
    features, expected = run_tiles(tiled, pixels, mask)
    assert features.shape == (4 * 4, 32)
    assert max_relative_error(features, expected) < 1e-5


def test_half_precision_leaves_patches_where_they_are(tiled: Exported) -> None:
    """In half precision 5 · 1/26 is below 5/26: so compared, patches would be a row of the position table too low.

    ONNX Runtime's CPU kernels compare in float32 whatever the graph says, so it is the graph that is looked at.
    """
    graph = ir.load(tiled.work.repo / "onnx" / "vision_encoder_fp16.onnx").graph
    rows_and_columns = [node for node in graph if node.op_type == "GreaterOrEqual"]
    assert len(rows_and_columns) == 2
    constants = [value for node in _before(rows_and_columns) for value in node.inputs if value and value.const_value]
    floats = {value.dtype for value in constants} - {ir.DataType.INT64}
    assert floats == {ir.DataType.FLOAT}


def test_padding_within_a_tile_is_not_seen(tiled: Exported) -> None:
    pixels = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.ones(1, 3, 16, 16, dtype=torch.bool)
    mask[0, 1, 9:], mask[0, 2, :, 5:] = False, False
    features, expected = run_tiles(tiled, pixels, mask)
    assert max_relative_error(features, expected) < 1e-5
    everything, _ = run_tiles(tiled, pixels, torch.ones_like(mask))
    assert max_relative_error(everything[4:], expected[4:]) > 1e-2, "the mask matters"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (320, 192)])
def test_a_tower_of_convolutions_takes_any_size(height: int, width: int, make: Callable[[str], Exported]) -> None:
    made = make("fast_vlm, timm_wrapper, qwen2")
    pixels = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    (features,) = onnxruntime.InferenceSession(made.graph("vision_encoder")).run(None, {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected = merged_model(made).get_image_features(pixels, return_dict=True).pooler_output
    assert features.shape == (3, height * width // 64**2, 64)
    assert max_relative_error(features, expected.numpy()) < 1e-5


def test_statistics_of_norms_are_weights(make: Callable[[str], Exported], tmp_path: Path) -> None:
    made = make("fast_vlm, timm_wrapper, qwen2").copy(tmp_path / "copy")
    model = ir.load(made.graph("vision_encoder"))
    name = "model.vision_tower.timm_model.stages.4.blocks.0.mlp.conv.bn.running_mean"
    stored = open_checkpoint(made.work.merged).tensors[name].load().numpy()
    assert np.array_equal(model.graph.initializers[name].const_value.numpy(), stored)
    assert stored.any()
    model.graph.initializers[name].const_value = ir.Tensor(stored * 0, name=name)
    ir.save(model, made.graph("vision_encoder"))
    assert failed_graphs(made.verify("ort")) == {"vision_encoder"}


def test_without_timm(make: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("fast_vlm, timm_wrapper, qwen2")
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} needs timm"))
    said = r"vision_config: needs timm and torchvision: `pip install 'vlm-export\[fastvlm\]'`"
    with pytest.raises(InputError, match=said):
        open_checkpoint(made.work.merged)


def test_a_fast_vlm_is_published_as_transformers_js_knows_it(make: Callable[[str], Exported]) -> None:
    repo = make("fast_vlm, timm_wrapper, qwen2").work.repo
    config = json.loads((repo / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_qwen2", ["LlavaQwen2ForCausalLM"])
    assert (config["num_hidden_layers"], config["image_token_index"]) == (2, 257)
    assert json.loads((repo / "processor_config.json").read_text()) == {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 64,
        "num_additional_image_tokens": 0,
    }


@pytest.mark.parametrize(
    ("images", "height", "width"), [(1, 8, 8), (1, 64, 8), (2, 8, 64), (3, 24, 40)], ids=lambda size: str(size)
)
def test_a_pixtral_tower_takes_any_whole_cells(pixtral: Exported, images: int, height: int, width: int) -> None:
    """One cell alone is what the class of a Mistral 3 cannot take: it is run twice there."""
    pixels = torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (features,) = onnxruntime.InferenceSession(pixtral.graph("vision_encoder")).run(
        None, {"pixel_values": pixels.numpy()}
    )
    twice = torch.cat([pixels, pixels])
    with torch.inference_mode():
        made = merged_model(pixtral).get_image_features(
            twice, image_sizes=torch.tensor([[height, width]] * len(twice)), return_dict=True
        )
    expected = torch.stack([*made.pooler_output])[:images]
    assert features.shape == (images, height * width // 64, 32)
    assert max_relative_error(features, expected.numpy()) < 1e-5


def test_cells_in_another_order_are_caught(make: Callable[[str], Exported], tmp_path: Path) -> None:
    """Patch by patch, and of each all channels: as the weights are for who does not know torch's `unfold`."""
    made = make("lighton_ocr, pixtral, qwen3").copy(tmp_path / "copy")
    model = ir.load(made.graph("vision_encoder"))
    [merging] = [value for name, value in model.graph.initializers.items() if ".merging_layer." in name]
    stored = merging.const_value.numpy()
    assert stored.shape == (4 * 24, 24), "as it is multiplied by, from channels of 2 × 2 patches"
    merging.const_value = ir.Tensor(stored.reshape(24, 4, 24).swapaxes(0, 1).reshape(96, 24).copy(), name=merging.name)
    ir.save(model, made.graph("vision_encoder"))
    report = made.verify("ort", dtypes=["fp32"])
    assert failed_graphs(report) == {"vision_encoder"}
    assert "image_features (case0, batch 1)" in failures(report)


SIDES = [(8, 64), (64, 8), (9, 71), (130, 16), (1, 1), (3, 5), (100, 99), (65, 33), (36, 36)]


def test_pixels_and_prompts_of_any_proportions(pixtral: Exported, tmp_path: Path) -> None:
    """Python's processor, transformers.js' and ours, from the same files; sizes are equal, and so is every id.

    Only pixels of pictures that are resized differ: transformers.js does not smooth.
    """
    golden, merged = load_golden(pixtral.recipe.golden_dir), open_checkpoint(pixtral.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    ours = OwnFiles(open_repo(pixtral.work.repo))
    paths = [tmp_path / f"{height}x{width}.png" for height, width in SIDES]
    for path, size in zip(paths, SIDES, strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    expected = [preprocessor.model_inputs(path, golden.facts.text) for path in paths]
    items = [Item(path, prompt=golden.facts.conversation, keep_pixels=True) for path in paths]
    options = {"max_new_tokens": 1}
    made = node_runtime.caption(pixtral.work.repo, layout="chat", dtype="fp32", items=items, generation=options)
    unchanged = []
    for size, path, inputs, caption in zip(SIDES, paths, expected, made.captions, strict=True):
        pixels, ids = inputs["pixel_values"], inputs["input_ids"][0].tolist()
        assert ours.prompt_ids(golden.facts, inputs, path) == ids == list(caption.prompt_ids)
        assert np.abs(ours.pixels(path) - pixels).max() <= 1e-6
        assert caption.pixel_values is not None and caption.pixel_values.shape == pixels.shape
        assert {side % 8 for side in pixels.shape[2:]} == {0} and max(pixels.shape[2:]) <= 64
        if pixels.shape[2:] == size:
            unchanged.append(size)
            assert np.abs(caption.pixel_values - pixels).max() <= 1e-5
    assert unchanged == [(8, 64), (64, 8)]


def test_a_pixtral_is_published_as_transformers_js_reads_it(pixtral: Exported) -> None:
    config, processor, image_processor = (
        json.loads((pixtral.work.repo / f"{name}.json").read_text())
        for name in ("config", "processor_config", "preprocessor_config")
    )
    classes = {"mistral3": "Mistral3ForConditionalGeneration", "lighton_ocr": "LightOnOcrForConditionalGeneration"}
    assert config["architectures"] == [classes[config["model_type"]]]
    assert config["image_token_index"] == config["image_token_id"] == 257
    ends = {"mistral3": ("[IMG_BREAK]", "[IMG_END]"), "lighton_ocr": ("", "")}[config["model_type"]]
    assert processor == {
        "processor_class": "PixtralProcessor",
        "image_token": "<image>",
        "image_break_token": ends[0],
        "image_end_token": ends[1],
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    wanted = ("image_processor_type", "processor_class", "size", "patch_size", "spatial_merge_size")
    assert [image_processor[name] for name in wanted] == [
        "PixtralImageProcessor",
        "PixtralProcessor",
        {"longest_edge": 64},
        4,
        2,
    ]
    assert "do_pad" not in image_processor


def test_a_conversation_begins_once(make: Callable[[str], Exported]) -> None:
    """Template and tokenizer of a Mistral 3 both write the token: transformers adds one, and so does every client."""
    made = make("mistral3, pixtral, ministral3")
    golden, merged = load_golden(made.recipe.golden_dir), open_checkpoint(made.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    own = (merged.path / "chat_template.jinja").read_text()
    tokenizer = preprocessor.processor.tokenizer
    [path, *_] = golden.image_paths()
    content = [{"type": "image", "image": open_image(path)}, *golden.facts.conversation[0]["content"][1:]]
    by_transformers = preprocessor.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=own,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    ids = preprocessor.model_inputs(path, golden.facts.text)["input_ids"][0].tolist()
    assert list(by_transformers["input_ids"][0]) == ids
    assert ids.count(tokenizer.bos_token_id) == 1
    twice = preprocessor.processor(images=[open_image(path)], text=tokenizer.bos_token + golden.facts.text)
    assert list(twice["input_ids"][0]) == [tokenizer.bos_token_id, *ids], "what the template alone would do"


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral3", {"vision_feature_layer": 2}, r"vision_feature_layer: 2: only the last layer's"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer: \[-1, -2\]: only the last layer's"),
        (
            "lighton_ocr",
            {"vision_config": {"model_type": "pixtral", "patch_size": [4, 8]}},
            "is no number",
        ),
    ],
)
def test_features_that_no_pixtral_tower_gives(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_family(model_type, "test").layouts["chat"].components({"model_type": model_type, **changes})


@pytest.mark.parametrize(
    ("size", "limit"),
    [(40, 40), ({"height": 40, "width": 40}, 40), ({"height": 40, "width": 60}, 0), ({"shortest_edge": 40}, 0)],
)
def test_sizes_that_transformers_js_has_words_for(size: Any, limit: int) -> None:
    if limit:
        assert image_processor({"size": size, "do_pad": True})["size"] == {"longest_edge": limit}
    else:
        with pytest.raises(InputError, match=r"size: .*: transformers\.js has no limit but `longest_edge`"):
            image_processor({"size": size})


def test_an_image_of_one_cell_is_refused_where_the_class_fails(make: Callable[[str], Exported]) -> None:
    for kind, fails in (("mistral3, pixtral, ministral3", True), ("lighton_ocr, pixtral, qwen3", False)):
        reference = find_family(kind.split(",")[0], "test").reference(merged_model(make(kind)))
        inputs = {"pixel_values": torch.zeros(1, 3, 8, 8), "input_ids": torch.tensor([[257, 65]])}
        if fails:
            with pytest.raises(InputError, match="an image of 8×8 pixels or less: transformers' class fails on it"):
                reference.prefill(inputs)
        else:
            assert reference.prefill(inputs).logits.shape[:2] == (1, 2)


def test_the_family_that_architectures_name(make: Callable[[str], Exported], tmp_path: Path) -> None:
    """As LightOn's own checkpoints are: the type of Mistral 3, and its name of the image token."""
    made = make("lighton_ocr, pixtral, qwen3")
    shutil.copytree(made.recipe.path.parent / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "mistral3", "architectures": ["LightOnOCRForConditionalGeneration"]}
    config["image_token_index"] = config.pop("image_token_id")
    path.write_text(json.dumps(config))
    found = open_checkpoint(tmp_path / "checkpoint")
    assert (found.family.model_type, found.config["model_type"]) == ("lighton_ocr", "lighton_ocr")
    assert found.config["image_token_id"] == 257
    assert found.tensors.keys() == open_checkpoint(made.recipe.path.parent / "checkpoint").tensors.keys()
    inspected = inspect(str(tmp_path / "checkpoint"))
    assert isinstance(inspected, Inspected)
    assert inspected.model_type == "lighton_ocr"
    recipe = tmp_path / "pico.yaml"
    for model_type, refused in (("lighton_ocr", False), ("mistral3", True)):
        recipe.write_text(json.dumps({"name": "pico", "model": "checkpoint", "model_type": model_type}))
        with pytest.raises(InputError, match="says 'lighton_ocr'") if refused else nullcontext():
            fetch.sources(load_recipe(recipe))
    settings = image_processor_settings(found.path, {}, {})
    processor = found.family.preprocessor(found.path, found.config, settings).processor
    assert type(processor).__name__ == "LightOnOcrProcessor"


SQUARES = {"got_ocr2": 64, "deepseek_vl": 16, "paligemma": 16, "gemma3": 32}  # pixels of a side
OF_SQUARES = [(16, 16), (32, 32), (64, 64), (16, 8), (5, 16), (8, 64), (64, 8), (9, 71), (33, 65), (1, 1), (3, 5)]


@pytest.mark.parametrize("model_type", SQUARES)
def test_pixels_and_prompts_of_squares(model_type: str, make: Callable[[str], Exported], tmp_path: Path) -> None:
    """Python's processor, ours, and transformers.js': every id is equal, and pixels of pictures that keep their size.

    transformers.js does not smooth, and DeepSeek-VL's shorter side is another by a pixel.
    """
    made = make(next(kind for kind in KINDS if kind.startswith(f"{model_type},")))
    golden, merged = load_golden(made.recipe.golden_dir), open_checkpoint(made.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    ours, side = OwnFiles(open_repo(made.work.repo)), SQUARES[model_type]
    paths = [tmp_path / f"{height}x{width}.png" for height, width in OF_SQUARES]
    for path, size in zip(paths, OF_SQUARES, strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    expected = [preprocessor.model_inputs(path, golden.facts.text) for path in paths]
    items = [Item(path, prompt=golden.facts.conversation, keep_pixels=True) for path in paths]
    theirs = node_runtime.caption(
        made.work.repo, layout="chat", dtype="fp32", items=items, generation={"max_new_tokens": 1}
    )
    kept = []
    for size, path, inputs, caption in zip(OF_SQUARES, paths, expected, theirs.captions, strict=True):
        pixels, ids = inputs["pixel_values"], inputs["input_ids"][0].tolist()
        assert pixels.shape == (1, 3, side, side)
        assert ours.prompt_ids(golden.facts, inputs, path) == ids == list(caption.prompt_ids)
        assert np.abs(ours.pixels(path) - pixels).max() <= 1e-6
        assert caption.pixel_values is not None and caption.pixel_values.shape == pixels.shape
        if np.abs(caption.pixel_values - pixels).max() <= 1e-5:
            kept.append(size)
    filled = [(16, 8), (5, 16)] if model_type == "deepseek_vl" else []
    assert kept == [(side, side), *filled]


def test_what_a_square_is_filled_with_is_the_mean_colour(make: Callable[[str], Exported], tmp_path: Path) -> None:
    """transformers.js normalizes first: the whole number that transformers has would come out as half of white."""
    made = make("deepseek_vl, siglip_vision_model, llama").copy(tmp_path / "copy")
    path = made.work.repo / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    assert settings["background_color"] == pytest.approx([-1, -1, -1])
    path.write_text(json.dumps(settings | {"background_color": [127, 127, 127]}))
    report = made.verify("ort", dtypes=["fp32"])
    assert "mean_pixel_difference: wide.png, of 4 pictures" in failures(report)


def test_a_page_is_asked_as_transformers_asks(make: Callable[[str], Exported]) -> None:
    """The checkpoint has no template: the repo's writes what its own processor does."""
    made = make("got_ocr2, got_ocr2_vision, qwen2")
    golden, merged = load_golden(made.recipe.golden_dir), open_checkpoint(made.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    tokenizer = preprocessor.processor.tokenizer
    own = GotOcr2Processor(GotOcr2ImageProcessor.from_pretrained(merged.path), tokenizer)
    [path, *_] = golden.image_paths()
    expected = own(images=open_image(path), num_image_tokens=16, return_tensors="np")
    content = [{"type": "image"}, {"type": "text", "text": " OCR: "}]
    text = preprocessor.rendered([{"role": "user", "content": content}], "test")
    inputs = preprocessor.model_inputs(path, text)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    stored = json.loads((made.work.repo / "tokenizer_config.json").read_text())["chat_template"]
    assert stored == preprocessor.processor.chat_template


PALIGEMMA, GEMMA3 = "paligemma, siglip_vision_model, gemma2", "gemma3, siglip_vision_model, gemma3_text"


def export_again(made: Exported, name: str) -> None:
    """One graph, in float32, in the place of what is there."""
    merged = open_checkpoint(made.work.merged)
    component = next(each for each in merged.family.layouts["chat"].components(merged.config) if each.name == name)
    model = build_empty(merged)
    skeleton, _ = make_skeleton(component, model)
    save_graph(Variant(Source(component, skeleton, merged.tensors), FP32).make(), made.graph(name))


def causal(decoder: Any, inputs_embeds: torch.Tensor, past: int) -> tuple[torch.Tensor, None]:
    """In the place of `blocks`: each token sees what is before it, as graphs of GroupQueryAttention have it."""
    return inputs_embeds[..., : decoder.text_model.config.hidden_size], None


@pytest.mark.parametrize(
    ("kind", "decoder"), [(PALIGEMMA, chat_models.WholePromptDecoder), (GEMMA3, marked_rows.MarkedDecoder)]
)
def test_a_causal_prompt_is_caught(
    kind: str, decoder: Any, make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(kind).copy(tmp_path / "copy")
    monkeypatch.setattr(decoder, "blocks", causal)
    export_again(made, "decoder_model_merged")
    report = made.verify("ort", dtypes=["fp32"])
    assert failed_graphs(report) == {"decoder_model_merged"}
    assert "logits (case0, batch 1, prefill)" in failures(report)


def test_a_logit_that_is_not_capped_is_caught(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(PALIGEMMA).copy(tmp_path / "copy")
    init = chat_models.ChatDecoder.__init__
    monkeypatch.setattr(
        chat_models.ChatDecoder, "__init__", lambda self, model, path, cap=None: init(self, model, path)
    )
    export_again(made, "decoder_model_merged")
    report = made.verify("ort", dtypes=["fp32"])
    assert failed_graphs(report) == {"decoder_model_merged"}
    assert "logits (case0, batch 1, prefill)" in failures(report)


def test_a_missing_mark_is_caught(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, an image's tokens are a text's."""
    made = make(GEMMA3).copy(tmp_path / "copy")
    init = marked_rows.MarkedEmbedding.__init__
    monkeypatch.setattr(
        marked_rows.MarkedEmbedding, "__init__", lambda self, model, path, _: init(self, model, path, 1)
    )
    export_again(made, "embed_tokens")
    report = made.verify("ort", "node", dtypes=["fp32"])
    assert ("node", limits.TOKENS_EXACT) in {(check.runtime, check.metric) for check in report.failures}
    assert "logits (case0, batch 1, prefill)" in failures(report)


@pytest.mark.parametrize("kind", [PALIGEMMA, GEMMA3])
def test_a_further_turn_is_answered_as_if_it_were_the_first(kind: str, make: Callable[[str], Exported]) -> None:
    """A PaliGemma's is run anew: what is in its cache has not seen the new part. Images may come in any turn."""
    made = make(kind)
    paths = load_golden(made.recipe.golden_dir).image_paths()
    model, options = load(made.work.repo, dtype="fp32", backend="onnx", threads=1), Options(max_new_tokens=4)
    images = [open_image(path) for path in paths[:2]]
    first = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    answer, memory = model.turn(Memory(), images[:1], first, options)
    said = [*first, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
    second = [*said, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]}]
    answer, memory = model.turn(memory, images, second, options)
    alone = model.generate(images, second, options)
    assert answer.token_ids == alone.token_ids
    assert (memory.tokens_fed == alone.prompt_tokens) == (kind == PALIGEMMA)


INTERNVL = "internvl, internvl_vision, qwen2"


def test_an_internvl_is_fed_one_tile_between_its_ends(make: Callable[[str], Exported]) -> None:
    """Pixels are its own image processor's; ids are those that its own processor, which needs torchvision, writes."""
    made = make(INTERNVL)
    golden, merged = load_golden(made.recipe.golden_dir), open_checkpoint(made.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    own = GotOcr2ImageProcessor.from_pretrained(merged.path)
    expected = PreTrainedTokenizerFast.from_pretrained(merged.path)(
        f"user: <img>{'<image>' * 4}</img>what is it?assistant:"
    )
    tiles = []
    for path in golden.image_paths():
        inputs, image = preprocessor.model_inputs(path, golden.facts.text), open_image(path)
        assert inputs["input_ids"].tolist() == [expected["input_ids"]]
        assert np.array_equal(
            inputs["pixel_values"], own(image, crop_to_patches=False, return_tensors="np")["pixel_values"]
        )
        tiles.append(len(own(image, return_tensors="np")["pixel_values"]))
    assert max(tiles) > 1, "by its own settings, a wide image has more than one"


def test_an_internvl_is_published_as_a_llava(make: Callable[[str], Exported], tmp_path: Path) -> None:
    made = make(INTERNVL).copy(tmp_path / "copy")
    config, processor, image_processor, tokenizer = (
        json.loads((made.work.repo / f"{name}.json").read_text())
        for name in ("config", "processor_config", "preprocessor_config", "tokenizer_config")
    )
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert (processor["image_token"], processor["num_additional_image_tokens"]) == ("<image>", 4)
    assert image_processor["image_processor_type"] == "SiglipImageProcessor"
    assert not [name for name in image_processor if "patches" in name]
    whole = "<img><image></img>"
    assert whole in tokenizer["chat_template"]
    bare = tokenizer | {"chat_template": tokenizer["chat_template"].replace(whole, "<image>")}
    (made.work.repo / "tokenizer_config.json").write_text(json.dumps(bare))
    assert limits.PROMPT_IDS in {check.metric for check in made.verify("ort").failures}


def test_an_internvl_of_other_tokens_and_templates() -> None:
    client = find_family("internvl", "test").layouts["chat"].client
    facts = RepoFacts({}, {}, {}, {}, {}, {}, None, [256], 256, 300)
    assert client.template(facts) is None
    for given, expected in {
        "{{ '<IMG_CONTEXT>\n' }}": "{{ '<img><IMG_CONTEXT></img>\n' }}",
        "{{ '<img><IMG_CONTEXT></img>' }}": "{{ '<img><IMG_CONTEXT></img>' }}",
    }.items():
        assert client.template(replace(facts, chat_template=given)) == expected
        several = [{"name": "default", "template": given}]
        assert client.template(replace(facts, chat_template=several)) == [{"name": "default", "template": expected}]


def test_any_number_of_images_is_shuffled_as_the_class_does(make: Callable[[str], Exported]) -> None:
    made = make(INTERNVL)
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (features,) = onnxruntime.InferenceSession(made.graph("vision_encoder")).run(None, {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected = merged_model(made).get_image_features(pixels, return_dict=True).pooler_output
    assert features.shape == (5, 4, 64)
    assert max_relative_error(features, expected.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": 2}, r"vision_feature_layer: 2: only -1 is supported"),
        ({"vision_feature_select_strategy": "full"}, r"select_strategy: 'full': only 'default' is supported"),
        ({"vision_config": {"model_type": "internvl_vision", "image_size": [16, 32]}}, r"image_size: .* is no square"),
    ],
)
def test_features_that_no_internvl_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_family("internvl", "test").layouts["chat"].components({"model_type": "internvl", **changes})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "golden.prompts: a chat model needs one"),
        (["a cat"], "golden.prompts: 'a cat' needs the image token '<image>' once"),
        (
            [[{"role": "user", "content": 1}]],
            r"golden\.prompts\.0: message 0: content: give it a text, or a list of parts",
        ),
    ],
)
def test_a_prompt_that_is_none(prompts: list[Any], message: str, tmp_path: Path) -> None:
    pico_chat.write_llava(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=message):
        record(tmp_path, layout="chat", golden={"images": ["images/*.png"], "prompts": prompts})


def test_a_conversation_is_no_use_to_a_captioner(tmp_path: Path) -> None:
    from exported import prepare as prepare_captioner

    with pytest.raises(InputError, match=r"pico\.yaml: golden\.prompts: a captioner continues a text"):
        prepare_captioner(tmp_path, golden={"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION]})


def test_names_of_transformers_4(llava: Exported) -> None:
    names = find_family("llava", "test").names(open_checkpoint(llava.work.merged).config)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    for key, name in {
        "language_model.model.layers.0.self_attn.q_proj.weight": f"{layer}.weight",
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight": f"{layer}.lora_A.weight",
        "language_model.model.layers.0.self_attn.q_proj.qweight": f"{layer}.qweight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "multi_modal_projector.linear_2.bias": "model.multi_modal_projector.linear_2.bias",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
        "vision_tower.vision_model.embeddings.position_ids": None,
    }.items():
        assert names(key) == name
