"""Prefix-conditioning captioners of any tower and any decoder: every tower and every decoder in one pair at least."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import padded
import pico
import pytest
from exported import Exported, prepare, record
from safetensors.torch import load_file

from vlm_export.contract import LAYERS_FIELD
from vlm_export.errors import InputError
from vlm_export.files import read_json
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.graph.weights import WeightRef, attach_weights
from vlm_export.manifest import load_manifest
from vlm_export.models.prefix import PrefixConditioningVLM
from vlm_export.models.towers import image_processor
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.web.node_runtime import node_home


@dataclass(frozen=True)
class Pair:
    """What a pair must come to: image tokens of 4 patches, and operators of the two-layer decoder."""

    tower: str
    decoder: str
    image_tokens: int
    rotary_inside: bool = False  # GroupQueryAttention rotates, where there is no padding
    rotations: int = 4  # RotaryEmbedding operators where there is: query and key of each layer
    norms: int = 5


# SigLIP 2 of a fixed resolution is SigLIP. Llama, GPT-2 and SigLIP go through test_export in every layout.
PAIRS = [
    Pair("clip_vision_model", "qwen2", 5),
    Pair("dinov2", "opt", 5, rotations=0, norms=4),
    Pair("dinov2_with_registers", "qwen3", 8, rotary_inside=True, norms=9),
    Pair("siglip_vision_model", "smollm3", 4, rotary_inside=True, rotations=2),
    Pair("clip_vision_model", "phi3", 5),
    Pair("vit", "gemma", 5, rotary_inside=True),
    Pair("dinov2", "gemma2", 5, rotary_inside=True, norms=9),
    Pair("siglip_vision_model", "gemma3_text", 4, rotary_inside=True, norms=13),
]
UNUSED = {
    "siglip_vision_model": "vision_encoder.vision_model.head.probe",
    "clip_vision_model": "vision_encoder.vision_model.post_layernorm.weight",
    "vit": "vision_encoder.pooler.dense.weight",
    "dinov2": "vision_encoder.embeddings.mask_token",
    "dinov2_with_registers": "vision_encoder.embeddings.mask_token",
}


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair.tower} and {pair.decoder}")
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(scope="module")
def model(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return prepare(tmp_path_factory.mktemp("model"), pico.config(pair.decoder, tower=pair.tower))


@pytest.fixture(scope="module")
def exported(model: Exported) -> Exported:
    model.export("captioner")
    return model


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner", ort="fp32")
def test_captioner(exported: Exported, pair: Pair) -> None:
    report = exported.verify("ort")
    assert report.verdict == "pass", report.failures
    _, tokens, size = ir.load(exported.graph("encoder_model")).graph.outputs[0].shape
    assert (tokens, size) == (pair.image_tokens, 16 if pair.decoder == "opt" else 32)
    simplified = load_manifest(exported.work.repo).simplified
    tower, decoder = simplified["encoder_model"], simplified["decoder_model_merged"]
    assert tower["unfused_attention"] == decoder["unfused_attention"] == decoder["unfused_rotary"] == ""
    assert tower["fused"]["MultiHeadAttention"] == 2
    assert decoder["fused"]["GroupQueryAttention"] == 2
    assert decoder["fused"].get("RotaryEmbedding", 0) == (0 if pair.rotary_inside else pair.rotations)
    assert (
        sum(count for operator, count in decoder["fused"].items() if operator.endswith("Normalization")) == pair.norms
    )


def test_padded_chat(model: Exported, pair: Pair, tmp_path: Path) -> None:
    merged = open_checkpoint(model.work.merged)
    component = merged.family.layouts["chat"].components(merged.config)[2]
    skeleton, report = make_skeleton(component, build_empty(merged))
    assert (report.unfused_attention, report.unfused_rotary) == ("", "")
    assert report.fused["GroupQueryAttention"] == 2
    assert report.fused.get("RotaryEmbedding", 0) == pair.rotations
    path = tmp_path / "decoder.onnx"
    save_graph(attach_weights(skeleton, component, merged.tensors), path)
    reference = PrefixConditioningVLM(dict(merged.config)).eval()
    reference.load_state_dict(load_file(model.work.merged / "model.safetensors"), strict=False)
    padded.compare(onnxruntime.InferenceSession(str(path)), reference.language_model)


def test_what_inference_does_not_read_is_neither_merged_nor_exported(exported: Exported, pair: Pair) -> None:
    assert UNUSED[pair.tower] in read_json(exported.work.merged / "merge.json")["unused"]
    merged = open_checkpoint(exported.work.merged).tensors
    graph = ir.load(exported.graph("encoder_model")).graph
    used = {part for name in graph.initializers for part in WeightRef.parse(name).parts}
    assert used >= {name for name in merged if name.startswith("vision_encoder.")}


@pytest.mark.verifies("prefix_conditioning_vlm", "captioner chat", ort="fp32", node="fp32")
@pytest.mark.parametrize(
    ("tower", "decoder", "layout"),
    [("clip_vision_model", "qwen2", "captioner"), ("dinov2", "gemma3_text", "chat"), ("vit", "seed_oss", "captioner")],
)
def test_in_transformers_js(tower: str, decoder: str, layout: str, tmp_path: Path) -> None:
    made = prepare(tmp_path, pico.config(decoder, tower=tower))
    made.export(layout)
    report = made.verify("ort", "node")
    assert report.verdict == "pass", report.failures
    assert any(check.runtime == "node" for check in report.checks)
    text_config = read_json(made.work.repo / "config.json")["decoder" if layout == "captioner" else "text_config"]
    assert text_config["model_type"] == (decoder if decoder in LAYERS_FIELD else "llama")


def test_the_client_reads_a_text_models_layers_where_we_say() -> None:
    source = (node_home() / "node_modules/@huggingface/transformers/src/configs.js").read_text()
    found = {}
    for block in source.split("break;"):
        field = re.search(r"mapping\['num_layers'\] = '(\w+)'", block)
        found |= {name: field[1] for name in re.findall(r"case '([^']+)':", block) if field}
    assert {name: found.get(name) for name in LAYERS_FIELD} == LAYERS_FIELD
    assert "seed_oss" not in found


@pytest.mark.parametrize("tower", pico.TOWERS)
def test_the_client_has_the_towers_image_processor(tower: str) -> None:
    models = node_home() / "node_modules/@huggingface/transformers/src/models"
    sources = "".join(path.read_text() for path in models.glob("*/image_processing_*.js"))
    settings = image_processor(pico.config(tower=tower)["vision_config"])
    assert f"export class {settings['image_processor_type']} extends ImageProcessor" in sources
    assert settings.get("crop_size", settings["size"]) == {"height": 16, "width": 16}


def test_a_tower_of_patches_is_refused_by_name(tmp_path: Path) -> None:
    path = pico.write_checkpoint(tmp_path, lora=False) / "config.json"
    path.write_text(path.read_text().replace("siglip_vision_model", "siglip2_vision_model"))
    with pytest.raises(InputError, match=r"vision_config\.model_type: 'siglip2_vision_model' .*NaFlex"):
        open_checkpoint(tmp_path)


def test_images_of_another_size_than_the_tower_s(tmp_path: Path) -> None:
    """As the published DINOv2's are: 518 in the config, and a processor that crops to 224."""
    settings = pico.config(tower="dinov2")
    pico.write_checkpoint(tmp_path / "checkpoint", settings)
    crop = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}}
    with pytest.raises(InputError, match=r"images become 8×8 pixels, and the tower takes 16×16: set `image_processor`"):
        record(tmp_path, image_processor=crop)
