"""Vision encoder-decoders: each tower and each decoder from checkpoint to transformers.js, and what must fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoders
import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml
from encoder_decoders import DECODERS, ENCODERS, END, START
from exported import TOLERANCES, Exported, as_fed_to, silent, write_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_browser import tokens, visit

from vlm_export import pipeline, runtime
from vlm_export.apps.load import load
from vlm_export.errors import InputError
from vlm_export.files import Work, read_json
from vlm_export.manifest import load_manifest
from vlm_export.preprocessing import image_processor_settings, load_tokenizer, pixel_values
from vlm_export.publish import config_files
from vlm_export.recipe import load_recipe
from vlm_export.runtime.drivers import EncoderDecoderDriver
from vlm_export.runtime.images import open_image
from vlm_export.runtime.sessions import Sessions
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.targets import BrowserTarget
from vlm_export.verify.golden import load_golden
from vlm_export.verify.metrics import max_relative_error
from vlm_export.verify.report import Report
from vlm_export.web.captions import Item

LAYERS = 3  # of the decoder: two are traced, one is a repetition
PAIRS = [
    ("vit", "gpt2"),
    ("siglip_vision_model", "bert"),
    ("swin", "roberta"),
    ("deit", "trocr"),
    ("vit", "trocr, sinusoidal"),
    ("vit", "mbart"),
]
LORA_TARGETS = ["c_attn", "q_attn", "c_proj", "q_proj", "v_proj", "enc_to_dec_proj"]
DECODER = "decoder_model_merged"
HALF = [
    {"metric": metric, "dtype": "fp16", "limit": limit, "reason": "random weights leave no margin between tokens"}
    for metric, limit in (("tokens_exact_rate", 0.6), ("teacher_forced_top1_agreement", 0.9))
]


def prepare(folder: Path, encoder: str = "vit", decoder: str = "gpt2", **recipe: Any) -> Exported:
    """A checkpoint with a recipe beside it; nothing done yet."""
    encoder_decoders.write_checkpoint(folder / "checkpoint", encoder_decoders.config(encoder, decoder, layers=LAYERS))
    write_images(folder / "images")
    values = {
        "name": "pico",
        "model": "checkpoint",
        "generation": {"max_new_tokens": 6},
        "golden": {"images": ["images/*.png"], "prompts": ["a cat"]},
        "tolerances": TOLERANCES,
    }
    (folder / "pico.yaml").write_text(yaml.safe_dump(values | recipe))
    return Exported(load_recipe(folder / "pico.yaml"), Work(folder / "work"))


def export(made: Exported, *dtypes: str) -> Exported:
    pipeline.run_golden(made.recipe, silent)
    pipeline.run_merge(made.recipe, made.work, silent)
    made.export("captioner", dtypes)
    made.check_by_doctor()
    return made


@pytest.fixture(scope="module")
def vit_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With LoRA on both parts."""
    folder = tmp_path_factory.mktemp("vit-gpt2")
    made = prepare(folder, adapters=[{"path": "adapter"}], tolerances=[*TOLERANCES, *HALF])
    encoder_decoders.write_adapter(folder / "adapter", encoder_decoders.config(layers=LAYERS), LORA_TARGETS)
    return export(made, "fp16", "int8", "q8")


@pytest.fixture
def broken(vit_gpt2: Exported, tmp_path: Path) -> Exported:
    """A copy that the test spoils."""
    return vit_gpt2.copy(tmp_path / "copy")


def test_every_part_is_in_a_pair() -> None:
    assert {encoder for encoder, _ in PAIRS} == set(ENCODERS)
    assert {decoder for _, decoder in PAIRS} == set(DECODERS)


@pytest.mark.verifies("vision-encoder-decoder", "captioner", ort="fp32 q8", node="fp32 q8")
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=[" + ".join(pair) for pair in PAIRS])
def test_says_what_pytorch_says(encoder: str, decoder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In ONNX Runtime every output at batches 1 and 2, and the tokens of stock transformers.js."""
    if (encoder, decoder) == PAIRS[0]:
        made = request.getfixturevalue("vit_gpt2")
    else:
        made = export(prepare(tmp_path, encoder, decoder), "q8")
    report = made.verify("ort", "node")
    assert report.verdict == "pass", report.failures
    checked = {(check.dtype, check.runtime) for check in report.checks if check.metric == "tokens_exact_rate"}
    _says_so_in_the_runtime(made)
    assert checked >= {(dtype, runtime) for dtype in ("fp32", "q8") for runtime in ("ort", "node")}
    outputs = {check.detail.split(" (")[0] for check in report.checks if check.component == DECODER}
    parts = [f"{kind}.{part}" for kind in ("decoder", "encoder") for part in ("key", "value")]
    assert {f"present.{layer}.{part}" for layer in range(LAYERS) for part in parts} <= outputs
    golden = read_json(made.recipe.golden_dir / "golden.json")
    assert len({tuple(image["token_ids"]) for image in golden["images"]}) > 1, "the image does not matter"
    simplified = read_json(made.work.repo / "export.json")["simplified"]
    assert simplified["encoder_model"]["unfused_attention"] == simplified[DECODER]["unfused_attention"] == ""
    fused = simplified[DECODER]["fused"]
    assert fused["GroupQueryAttention"] == fused["MultiHeadAttention"] == LAYERS
    assert list(simplified[DECODER]["repeated"].values()) == [1]


class _Graphs:
    """The graphs of a repo in float32, and what one image and a start token give."""

    def __init__(self, made: Exported):
        self.sessions = Sessions(made.work.repo / "onnx", "")
        self.driver = EncoderDecoderDriver(self.sessions)
        pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
        ids = np.full((2, 1), START, dtype=np.int64)
        self.inputs = {"pixel_values": pixels, "input_ids": ids}
        self.inputs |= {observed.golden_name: observed.value for observed in self.driver.encode(self.inputs)}
        self.cache = {name: value.numpy() for name, value in self.driver.prefill(self.inputs).cache.items()}

    def step(self, cache: dict[str, np.ndarray], states: np.ndarray) -> dict[str, np.ndarray]:
        return self.sessions.run(DECODER, {"input_ids": np.array([[7], [9]]), "encoder_hidden_states": states, **cache})


def test_the_image_is_read_once(vit_gpt2: Exported) -> None:
    """With cross keys and values in the cache, the encoder's states do not matter, and nothing is made of them."""
    graphs = _Graphs(vit_gpt2)
    states = graphs.inputs["encoder_hidden_states"]
    right, wrong = (graphs.step(graphs.cache, states) for states in (states, np.full_like(states, 99)))
    assert np.array_equal(right["logits"], wrong["logits"])
    assert right["present.0.encoder.key"].shape == (2, 4, 0, 8)
    assert graphs.cache["past_key_values.0.encoder.key"].shape == (2, 4, 5, 8)


def test_a_cache_that_comes_without_the_image_is_filled(vit_gpt2: Exported) -> None:
    """As when a client hands over a cache of its own, which transformers.js then keeps empty."""
    graphs = _Graphs(vit_gpt2)
    states = graphs.inputs["encoder_hidden_states"]
    emptied = {name: value[:, :, :0] if ".encoder." in name else value for name, value in graphs.cache.items()}
    done = graphs.step(emptied, states)
    assert max_relative_error(done["logits"], graphs.step(graphs.cache, states)["logits"]) < 1e-6
    assert done["present.0.encoder.key"].shape == (2, 4, 5, 8)


def edit(made: Exported, change: Callable[[ir.Graph], None]) -> None:
    model = ir.load(made.graph(DECODER))
    change(model.graph)
    ir.save(model, made.graph(DECODER))


def messages(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


def test_swapped_cross_outputs_are_seen(broken: Exported) -> None:
    def swap(graph: ir.Graph) -> None:
        key, value = (v for v in graph.outputs if v.name.startswith("present.1.encoder."))
        key.name, value.name = value.name, key.name

    edit(broken, swap)
    report = broken.verify()
    assert "present.1.encoder.key (case0, batch 1, prefill): it holds cache.1.encoder.value" in messages(report)


def test_another_layers_cross_cache_is_seen(broken: Exported) -> None:
    """Right in the first run, which computes its own; wrong in every later one."""

    def mix(graph: ir.Graph) -> None:
        one, two = (v for v in graph.inputs if v.name in [f"past_key_values.{i}.encoder.value" for i in (0, 1)])
        one.name, two.name = two.name, one.name

    edit(broken, mix)
    failures = [check.detail for check in broken.verify().failures]
    assert any("decode step 1" in detail for detail in failures)
    assert not any("prefill" in detail for detail in failures)


def test_a_stale_image_is_seen(broken: Exported) -> None:
    """A graph that goes on as if the cached image were there, when it is not."""

    def forget(graph: ir.Graph) -> None:
        (node,) = (node for node in graph if node.op_type == "Equal")
        zero = ir.Value(name="never", const_value=ir.Tensor(np.array([-1]), name="never"))
        graph.register_initializer(zero)
        node.replace_input_with(1, zero)

    edit(broken, forget)
    assert "present.0.encoder.key (case0, batch 1, prefill) is empty: [1, 4, 0, 8]" in messages(broken.verify())


def test_rules_on_repetition_see_the_start_token(broken: Exported) -> None:
    """Start and end are one token, as in nlpconnect/vit-gpt2-image-captioning: PyTorch and clients count it as said."""
    folder = broken.recipe.path.parent
    config = read_json(folder / "checkpoint" / "config.json") | {"decoder_start_token_id": END}
    config["decoder"] |= {"num_beams": 4, "no_repeat_ngram_size": 1, "eos_token_id": None}  # the recipe has others
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    (folder / "checkpoint" / "generation_config.json").unlink()
    rules = {"generation": {"max_new_tokens": 8, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2}}
    recipe = yaml.safe_load(broken.recipe.path.read_text()) | rules
    broken.recipe.path.write_text(yaml.safe_dump(recipe))
    made = Exported(load_recipe(broken.recipe.path), broken.work)
    pipeline.run_golden(made.recipe, silent)
    pipeline.run_merge(made.recipe, made.work, silent)
    inputs = read_json(made.work.merged / "merge.json")["inputs_sha256"]  # the graphs stay as they are
    manifest = replace(load_manifest(made.work.repo), inputs_sha256=inputs)
    config_files.write_config_files(made.work.repo, made.recipe, open_checkpoint(made.work.merged), manifest)

    report = made.verify("ort", "node")
    assert report.verdict == "pass", report.failures
    generation = read_json(made.work.repo / "generation_config.json")
    assert generation["decoder_start_token_id"] == generation["eos_token_id"] == END
    golden = read_json(folder / "golden" / "pico" / "golden.json")
    assert all(len(set(image["token_ids"])) == len(image["token_ids"]) for image in golden["images"])


def test_checkpoints_of_transformers_4_and_before(tmp_path: Path) -> None:
    """Old names (which transformers 5 still writes), pooling heads, buffers that were saved, no start token on top."""
    made = prepare(tmp_path)
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    assert "encoder.encoder.layer.0.attention.attention.query.weight" in tensors
    assert "encoder.pooler.dense.weight" in tensors
    tensors["decoder.transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    tensors["decoder.transformer.h.0.crossattention.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    pipeline.run_merge(made.recipe, made.work, silent)
    with safe_open(made.work.merged / "model.safetensors", "pt") as merged:
        names = set(merged.keys())
    assert "encoder.layers.0.attention.q_proj.weight" in names
    assert not [name for name in names if "pooler" in name or name.endswith((".attn.bias", "masked_bias"))]
    unused = read_json(made.work.merged / "merge.json")["unused"]
    assert "encoder.pooler.dense.weight" in unused


def test_lora_on_decoder_and_tower(vit_gpt2: Exported) -> None:
    """GPT-2's Conv1D, whose weights lie transposed, its cross-attention, and the tower's linear layers."""
    merged = read_json(vit_gpt2.work.merged / "merge.json")
    names = (
        "encoder.layers.0.attention.q_proj",
        "decoder.transformer.h.1.attn.c_attn",
        "decoder.transformer.h.2.crossattention.q_attn",
        "enc_to_dec_proj",
    )
    assert all(merged["layers"][name] > 0.01 for name in names)
    assert merged["max_relative_diff_vs_adapter"] < 1e-5 < 1e-3 < merged["max_relative_diff_vs_base"]


def test_no_start_token(tmp_path: Path) -> None:
    made = prepare(tmp_path)
    config = read_json(tmp_path / "checkpoint" / "config.json")
    for part in (config, config["decoder"]):
        part.update({"decoder_start_token_id": None, "bos_token_id": None})
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint" / "generation_config.json").unlink()
    with pytest.raises(InputError, match="decoder_start_token_id: not set"):
        pipeline.run_golden(made.recipe, silent)


@pytest.mark.verifies("vision-encoder-decoder", "captioner", ort="fp32 fp16 int8 q8")
def test_in_eight_bits_and_half_precision(vit_gpt2: Exported) -> None:
    report = vit_gpt2.verify("ort")
    assert report.verdict == "pass", report.failures
    exact = {check.dtype for check in report.checks if check.metric == "tokens_exact_rate"}
    assert exact == {"fp32", "fp16", "int8", "q8"}
    vit_gpt2.check_ranges()


def test_dtypes_of_fewer_bits_run_in_both_runtimes_alike(broken: Exported) -> None:
    """Its decoder computes the logits of the last position alone, on the samples that it is calibrated on too."""
    broken.check_every_dtype("captioner", "ort", "node")


@pytest.mark.verifies("vision-encoder-decoder", "captioner", wasm="q8", webgpu="fp32")
@pytest.mark.parametrize(("target", "dtype"), [("wasm", "q8"), ("webgpu", "fp32")])
def test_in_a_browser(vit_gpt2: Exported, target: BrowserTarget, dtype: str) -> None:
    """Tensors without rows, which later runs give, pass through its runtimes."""
    golden = load_golden(vit_gpt2.recipe.golden_dir)
    pixels = pixel_values(golden.image_paths()[:1], golden.facts.image_processor)
    seen = visit(
        vit_gpt2.work.repo, "captioner", [Item(pixel_values=as_fed_to(vit_gpt2.work.repo, pixels))], target=target
    )
    assert seen.dtypes == {dtype}
    assert tokens(seen) == [golden.facts.images[0].token_ids]


def test_a_feature_extractor_becomes_an_image_processor(tmp_path: Path) -> None:
    old = {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 224, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    settings = image_processor_settings(tmp_path, {}, {})
    assert settings["size"] == {"height": 224, "width": 224}
    assert settings["image_processor_type"] == "ViTImageProcessor"
    json.dumps(settings)


def test_a_tokenizer_of_vocabulary_and_merges(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(["<s>", "</s>", "a", "b", "ab"])})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path)("ab", add_special_tokens=False)["input_ids"] == [4]


RULES = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}


def _says_so_in_the_runtime(made: Exported) -> None:
    golden = load_golden(made.recipe.golden_dir)
    model = load(made.work.repo, dtype="fp32", backend="onnx", threads=1)
    answers = model.generate_batch([([open_image(path)], None) for path in golden.image_paths()])
    assert [list(answer.token_ids) for answer in answers] == [image.token_ids for image in golden.facts.images]


@pytest.mark.parametrize("options", [RULES, {"num_beams": 3, "num_return_sequences": 3, **RULES}], ids=str)
def test_rules_and_beams_are_transformers(vit_gpt2: Exported, options: dict[str, Any]) -> None:
    """A rule on repetition looks back on the start token too; beams take the cache of cross-attention along."""
    images = sorted((vit_gpt2.recipe.path.parent / "images").iterdir())
    ours = load(vit_gpt2.work.repo, dtype="fp32", backend="onnx", threads=1)
    theirs = load(vit_gpt2.work.repo, backend="torch")
    items = [([open_image(path)], None) for path in images]
    for one, other, expected in zip(
        [ours.generate(*item, runtime.Options(**options)) for item in items],
        ours.generate_batch(items, runtime.Options(**options)),
        [theirs.generate(*item, runtime.Options(**options)) for item in items],
        strict=True,
    ):
        sequences = [answer.token_ids for answer in (expected, *expected.alternatives)]
        assert [answer.token_ids for answer in (one, *one.alternatives)] == sequences
        assert [answer.token_ids for answer in (other, *other.alternatives)] == sequences
        assert one.prompt_tokens == 1
