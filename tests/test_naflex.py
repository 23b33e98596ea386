"""LFM2-VL: tiles of any proportions, layers that keep a state and no positions, pictures of any size."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pico_chat
import pytest
import torch
from exported import Exported, failed_graphs
from PIL import Image
from test_chat_families import export_tower, failures, merged_model, prepare
from torch.nn import functional

from vlm_export.apps.load import load
from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.layouts.naflex import NaflexChat
from vlm_export.manifest import load_manifest
from vlm_export.models import attention
from vlm_export.models.decoder import Geometry, KeyValues, State
from vlm_export.models.naflex import NaflexEncoder, Places, stretched
from vlm_export.preprocessing import image_processor_settings
from vlm_export.quantize.variants import Source, Variant
from vlm_export.runtime.conversation import Conversation
from vlm_export.runtime.image_tokens import ImageTokens
from vlm_export.runtime.images import Grid, ImageProcessor
from vlm_export.runtime.onnx import OnnxMemory
from vlm_export.runtime.options import Options
from vlm_export.runtime.repo import open_repo
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.spec import cache
from vlm_export.spec.client import RepoFacts
from vlm_export.verify import limits
from vlm_export.verify.client_inputs import OwnFiles
from vlm_export.verify.golden import load_golden
from vlm_export.verify.metrics import max_relative_error
from vlm_export.web import node_runtime
from vlm_export.web.captions import Item

# Heights and widths: 1:8, halves of a cell (8 pixels) either way, tiny, several tiles, one cell more than none.
SIDES = [(8, 64), (64, 8), (12, 40), (20, 12), (1, 1), (3, 5), (100, 99), (65, 33), (36, 36), (24, 24)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    done = prepare(tmp_path_factory.mktemp("naflex"), pico_chat.write_lfm2_vl)
    done.export("chat", ("fp32",))
    return done


@pytest.fixture
def spoilt(made: Exported, tmp_path: Path) -> Exported:
    """A copy that the test may spoil."""
    return made.copy(tmp_path / "copy")


@pytest.mark.parametrize("shape", [(18, 50), (8, 100), (4, 64), (31, 10), (16, 16), (1, 1), (2, 3)])
def test_positions_are_torch_s(shape: tuple[int, int]) -> None:
    """The table of 16 × 16 is stretched as `interpolate` does with `antialias`."""
    table = torch.rand(16, 16, 5, generator=torch.Generator().manual_seed(0))
    places = Places.of(shape[0] * shape[1] + 3, torch.tensor([shape]))
    lines, columns = stretched(places.row, places.height, 16), stretched(places.column, places.width, 16)
    found = torch.einsum("pi,pj,ijc->pc", lines[0], columns[0], table)[:-3]
    [expected] = functional.interpolate(
        table.permute(2, 0, 1)[None], size=shape, mode="bilinear", align_corners=False, antialias=True
    )
    assert (found - expected.flatten(1).T).abs().max() < 2e-6


@pytest.mark.parametrize(
    "shapes", [[(2, 2)], [(2, 12), (12, 2)], [(4, 6), (4, 4), (2, 8)], [(2, 2), (2, 4), (4, 2), (6, 4)]], ids=str
)
def test_any_tiles(shapes: Sequence[tuple[int, int]], made: Exported) -> None:
    most, random = 30, torch.Generator().manual_seed(0)
    counts = [height * width for height, width in shapes]
    feeds = {
        "pixel_values": torch.rand(len(shapes), most, 48, generator=random) * 2 - 1,
        "pixel_attention_mask": torch.tensor([[1] * count + [0] * (most - count) for count in counts]),
        "spatial_shapes": torch.tensor(shapes),
    }
    session = onnxruntime.InferenceSession(made.graph("vision_encoder"))
    (features,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    with torch.inference_mode():
        expected = torch.cat([*merged_model(made).get_image_features(**feeds, return_dict=True).pooler_output])
    assert features.shape == (sum(counts) // 4, 32)
    assert max_relative_error(features, expected.numpy()) < 1e-5


def test_squares_column_by_column_are_caught(spoilt: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches of a square in the order of another unshuffle."""
    right = NaflexEncoder.squares

    def turned(encoder: NaflexEncoder, hidden: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        squares, found = right(encoder, hidden, places)
        return squares.unflatten(2, (2, 2, -1)).transpose(2, 3).flatten(2), found

    monkeypatch.setattr(NaflexEncoder, "squares", turned)
    export_tower(spoilt, spoilt.graph("vision_encoder"))
    report = spoilt.verify("ort")
    assert failed_graphs(report) == {"vision_encoder"}
    assert "image_features (case0, batch 1)" in failures(report)


def test_a_state_that_is_not_carried_is_caught(spoilt: Exported) -> None:
    """A convolution that begins anew with every run: right for a prompt, wrong for each token after it."""
    path = spoilt.graph("decoder_model_merged")
    model = ir.load(path)
    state = next(value for value in model.graph.inputs if value.name == "past_conv.2")
    uses = list(state.uses())
    none = ir.node("Sub", [state, state])
    model.graph.insert_before(model.graph[0], none)
    for use in uses:
        use.node.replace_input_with(use.idx, none.outputs[0])
    ir.save(model, path)
    report = spoilt.verify("ort")
    assert failed_graphs(report) == {"decoder_model_merged"}
    found = [check for check in report.failures if check.metric == limits.MAX_RELATIVE_ERROR]
    assert found and not [check for check in found if check.phase == "prefill"]


def test_padding_that_comes_into_a_state_is_caught(spoilt: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_cache = attention.decoder_cache

    def without_mask(*arguments: Any, **keywords: Any) -> Any:
        """As a decoder that masks scores alone: layers of convolutions see the embeddings of what pads a row."""
        monkeypatch.setattr("transformers.models.lfm2.modeling_lfm2.create_recurrent_attention_mask", lambda **_: None)
        return decoder_cache(*arguments, **keywords)

    monkeypatch.setattr(attention, "decoder_cache", without_mask)
    merged = open_checkpoint(spoilt.work.merged)
    decoder = merged.family.layouts["chat"].components(merged.config)[-1]
    skeleton, _ = make_skeleton(decoder, build_empty(merged))
    save_graph(Variant(Source(decoder, skeleton, merged.tensors), FP32).make(), spoilt.graph("decoder_model_merged"))
    monkeypatch.undo()
    report = spoilt.verify("ort")
    assert failed_graphs(report) == {"decoder_model_merged"}
    assert {check.metric for check in report.failures if check.component == "decoder_model_merged"} == {
        limits.OTHER_SIZES
    }
    assert "rows padded" in failures(report)


def test_what_each_layer_keeps(made: Exported) -> None:
    config = open_checkpoint(made.work.merged)
    geometry = Geometry.of(config.family.text_config(config.config))
    assert geometry.kept == (State("conv", (32, 3)), KeyValues(2, 8)) * 3
    assert [spec.name for spec in geometry.past[:4]] == [
        "past_conv.0",
        "past_key_values.1.key",
        "past_key_values.1.value",
        "past_conv.2",
    ]
    assert [spec.name for spec in geometry.present[:2]] == ["present_conv.0", "present.1.key"]
    inputs = {value.name: value.shape for value in ir.load(made.graph("decoder_model_merged")).graph.inputs}
    assert list(inputs["past_conv.4"]) == ["batch_size", 32, 3]
    repeated = load_manifest(made.work.repo).simplified["decoder_model_merged"]["repeated"]
    assert repeated == {"model.language_model.layers": 2}


def test_names_of_a_cache() -> None:
    names = {
        "past_key_values.3.key": ("present.3.key", "cache.3.key"),
        "past_key_values.0.encoder.value": ("present.0.encoder.value", "cache.0.encoder.value"),
        "past_conv.11": ("present_conv.11", "cache_conv.11"),
        "past_recurrent.2": ("present_recurrent.2", "cache_recurrent.2"),
    }
    for past, (present, golden) in names.items():
        assert (cache.present_of(past), cache.past_of(present), cache.golden_of(past)) == (present, past, golden)
        assert cache.is_past(past) and cache.is_present(present)
        assert not cache.is_past(present) and not cache.is_present(past)
        assert cache.layer_of(past) == cache.layer_of(present)
        assert cache.has_positions(past) == past.startswith("past_key_values")
    assert cache.at_layer("past_conv.1", 9) == "past_conv.9"
    for other in ("past_sequence_length", "logits", "position_ids", "presented.1"):
        assert cache.layer_of(other) is None and not cache.is_past(other) and not cache.is_present(other)


def test_pixels_and_prompts_of_any_proportions(made: Exported, tmp_path: Path) -> None:
    """Python's processor, transformers.js' and ours, from the same files.

    Ours makes the same sizes and ids of all, and pixels within a level of 255 or two, which is what Pillow and torch
    differ by. transformers.js rounds halves of a cell up, Python to the even one, and does not smooth.
    """
    golden, merged = load_golden(made.recipe.golden_dir), open_checkpoint(made.work.merged)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    repo = open_repo(made.work.repo)
    ours, processor = OwnFiles(repo), ImageProcessor(repo.preprocessor)
    paths = [tmp_path / f"{height}x{width}.png" for height, width in SIDES]
    for path, size in zip(paths, SIDES, strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    expected = [preprocessor.model_inputs(path, golden.facts.text) for path in paths]
    items = [Item(path, prompt=golden.facts.conversation, keep_pixels=True) for path in paths]
    captions = node_runtime.caption(
        made.work.repo, layout="chat", dtype="fp32", items=items, generation={"max_new_tokens": 1}
    ).captions
    other_sizes = []
    for size, path, inputs, caption in zip(SIDES, paths, expected, captions, strict=True):
        arrays = processor([Image.open(path)]).arrays
        assert {name: array.shape for name, array in arrays.items()} == {name: inputs[name].shape for name in arrays}
        assert np.array_equal(arrays["spatial_shapes"], inputs["spatial_shapes"])
        assert np.array_equal(arrays["pixel_attention_mask"], inputs["pixel_attention_mask"])
        assert np.abs(arrays["pixel_values"] - inputs["pixel_values"]).max() < 2.01 / 127.5
        ids = inputs["input_ids"][0].tolist()
        assert ours.prompt_ids(golden.facts, inputs, path) == ids
        assert ids.count(256) == 1, "a text begins once"
        if list(caption.prompt_ids) != ids:
            other_sizes.append(size)
        elif np.array_equal(inputs["spatial_shapes"] * 4, [size]):
            assert caption.pixel_values is not None
            assert np.abs(caption.pixel_values - inputs["pixel_values"]).max() < 1e-5
    assert other_sizes == [(20, 12)], "2.5 cells: 2 in Python, 3 in JavaScript"


def test_settings_with_which_javascript_keeps_proportions(made: Exported, tmp_path: Path) -> None:
    """With `do_resize` and `size`, which transformers saves, every picture becomes a square first."""
    names = ("config", "preprocessor_config", "processor_config")
    config, settings, processor = (json.loads((made.work.repo / f"{name}.json").read_text()) for name in names)
    assert settings["do_resize"] is False and "size" not in settings
    assert settings["image_processor_type"] == "Lfm2VlImageProcessor"
    assert processor == {"processor_class": "Lfm2VlProcessor"}
    assert config["text_config"]["layer_types"] == ["conv", "full_attention"] * 3
    assert config["image_token_index"] == config["image_token_id"] == 257
    copy = made.copy(tmp_path / "copy")
    path = copy.work.repo / "preprocessor_config.json"
    path.write_text(json.dumps(settings | {"do_resize": True, "size": {"height": 16, "width": 16}}))
    report = copy.verify("ort", "node")
    found = {(check.runtime, check.metric) for check in report.failures}
    assert ("node", limits.PROMPT_IDS) in found and not [each for each in found if each[0] == "ort"]


@pytest.mark.parametrize(
    ("processor", "token", "said"),
    [
        ({"use_image_special_tokens": False}, "<image>", "use_image_special_tokens: is false; transformers.js always"),
        ({}, "<|image|>", "image_token_id: is '<|image|>', and transformers.js writes '<image>'"),
    ],
)
def test_tokens_that_javascript_does_not_write(processor: dict[str, Any], token: str, said: str) -> None:
    config = pico_chat.lfm2_vl_config().to_dict()
    facts = RepoFacts(config, config["text_config"], {}, {}, processor, {}, None, [1], 0, 300, lambda _: token)
    with pytest.raises(InputError, match=re.escape(said)):
        NaflexChat().config(facts)


def test_several_images_and_turns(made: Exported) -> None:
    """Pictures of three sizes in one conversation: the runtime says what PyTorch says, and runs what is new alone."""
    model, torch_model = (
        load(made.work.repo, dtype="fp32", backend=backend, threads=1) for backend in ("onnx", "torch")
    )
    random = np.random.default_rng(3)
    pictures = [
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in ((16, 16), (8, 16), (16, 8))
    ]
    options = Options(max_new_tokens=4)
    ours, theirs = Conversation(model), Conversation(torch_model)
    for turn, images in enumerate((pictures[:2], [], pictures[2:])):
        said: list[str] = []
        answer = ours.say(f"what, {turn}?", images, options, on_text=said.append)
        assert answer.token_ids == theirs.say(f"what, {turn}?", images, options).token_ids
        assert "".join(said) == answer.text
        assert not turn or ours.tokens_fed < answer.prompt_tokens
    beams = Options(max_new_tokens=4, num_beams=3)
    asked = (pictures[:1], "what is it?")
    assert model.generate(*asked, beams).token_ids == torch_model.generate(*asked, beams).token_ids


def test_a_state_is_gone_back_to_and_not_cut() -> None:
    """An answer that is tokenized anew: its keys can be cut, the state of its last token can not."""
    whole, before = ({"past_conv.0": object(), "past_key_values.1.key": object()} for _ in range(2))
    memory = OnnxMemory(ids=[1, 2, 3, 4], cache=whole, prompt=([1, 2], before))  # type: ignore[arg-type]
    assert memory.holding([1, 2, 3, 4, 5]) == (4, whole)
    assert memory.holding([1, 2, 3, 9, 5]) == (2, before)
    assert memory.holding([1, 9]) == (0, {})


def test_tokens_of_tiles() -> None:
    tokens = ImageTokens("<image>", "patched tiles")
    assert tokens.write("a<image>b", [Grid(1, 1, (2,))], [2]) == "a<|image_start|><image><image><|image_end|>b"
    tiles = "".join(f"<|img_row_{row}_col_{column}|><image>" for row in (1, 2) for column in (1, 2))
    whole = "<|img_thumbnail|><image><image>"
    assert tokens.write("<image>", [Grid(2, 2, (1, 1, 1, 1, 2))], [6]) == f"<|image_start|>{tiles}{whole}<|image_end|>"
    assert tokens.write("<image>", [Grid(2, 2, (1,) * 4)], [4]) == f"<|image_start|>{tiles}<|image_end|>"
    assert tokens.rows(Grid(2, 2, (1, 1, 1, 1, 2))) == 6


@pytest.mark.parametrize(
    "settings", [{}, {"do_image_splitting": False}, {"use_thumbnail": False}, {"min_tiles": 1, "max_tiles": 1}], ids=str
)
@pytest.mark.parametrize("size", [(300, 800), (1100, 700), (720, 1280), (1, 1), (512, 512)], ids=str)
def test_pictures_at_the_sizes_of_the_published_models(
    size: tuple[int, int], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Beside transformers' own processor, at its defaults."""
    written = {"image_processor_type": "Lfm2VlImageProcessorFast", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    spelt = image_processor_settings(tmp_path, {}, {})
    assert spelt["image_processor_type"] == "Lfm2VlImageProcessor"
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 7, 3), dtype=np.uint8)).resize(size[::-1])
    ours = ImageProcessor(spelt)([picture]).arrays
    theirs = pico_chat.lfm2_vl_image_processor(written)([[picture]], return_tensors="np")
    assert ours.keys() == {*theirs}
    for name in ("spatial_shapes", "pixel_attention_mask"):
        assert np.array_equal(ours[name], theirs[name])
    assert np.abs(ours["pixel_values"] - theirs["pixel_values"]).max() < 2.01 / 127.5


def test_the_tied_head_may_be_left_out(tmp_path: Path) -> None:
    """As in Liquid's own checkpoints, and under the names of the tower that transformers 4 had."""
    checkpoint = open_checkpoint(pico_chat.write_lfm2_vl(tmp_path / "tied"))
    assert "lm_head.weight" not in checkpoint.tensors
    names = checkpoint.family.names(checkpoint.config)
    older = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert names(older) == "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
