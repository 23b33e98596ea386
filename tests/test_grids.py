"""Models whose images are patches with a grid: places in three axes, windows, DeepStack, pictures of any size."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pico_chat
import pytest
import torch
from exported import Exported, failed_graphs
from PIL import Image
from test_chat_families import GRIDS, KINDS, export_tower, failures, prepare
from transformers import Qwen2VLForConditionalGeneration

import vlm_export
from vlm_export.apps.load import load
from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.families import qwen2_5_vl
from vlm_export.graph.graph_file import save_graph
from vlm_export.graph.skeleton import make_skeleton
from vlm_export.manifest import load_manifest
from vlm_export.models import grid, wide_rows
from vlm_export.models.chat import ChatDecoder
from vlm_export.quantize.variants import Source, Variant
from vlm_export.runtime.conversation import Conversation
from vlm_export.runtime.options import Options
from vlm_export.runtime.positions import grid_positions
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.verify import limits

IMAGE = 257
POSITIONS = Path(vlm_export.__file__).parent / "js" / "src" / "positions.js"
# Prompts: numbers of tokens of text, and grids of cells.
PROMPTS: dict[str, Sequence[int | tuple[int, int]]] = {
    "an image": [3, (2, 3), 8],
    "an image first": [(5, 1), 2],
    "an image last": [4, (1, 7)],
    "several": [2, (2, 3), 1, (4, 4), 3, (1, 1), 5],
    "a text": [6],
    "one token": [1],
}


def ids_of(prompt: Sequence[int | tuple[int, int]]) -> list[int]:
    parts = [[7] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1]) for part in prompt]
    return [token for part in parts for token in part]


def grids_of(prompt: Sequence[int | tuple[int, int]]) -> np.ndarray:
    """In patches, two lines and columns of them a cell."""
    grids = [(1, 2 * part[0], 2 * part[1]) for part in prompt if not isinstance(part, int)]
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


@cache
def qwen2_vl() -> Any:
    """transformers' own count of places needs a config alone."""
    with torch.device("meta"):
        config = Qwen2VLForConditionalGeneration.config_class(image_token_id=IMAGE)
        config.text_config.num_hidden_layers = config.vision_config.depth = 1
        return Qwen2VLForConditionalGeneration(config).model


def theirs(ids: np.ndarray, mask: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = torch.from_numpy(ids)
    kinds, given = (tokens == IMAGE).int(), torch.from_numpy(grids)
    places, shifts = qwen2_vl().get_rope_index(tokens, kinds, given, attention_mask=torch.from_numpy(mask))
    return places.numpy(), shifts.numpy()


@pytest.mark.parametrize("name", PROMPTS)
def test_places_are_transformers_(name: str) -> None:
    ids = np.array([ids_of(PROMPTS[name])])
    mask = np.ones_like(ids)
    ours, expected = (
        grid_positions(ids, mask, grids_of(PROMPTS[name]), IMAGE, 2),
        theirs(ids, mask, grids_of(PROMPTS[name])),
    )
    for mine, their in zip(ours, expected, strict=True):
        assert np.array_equal(mine, their)


def test_places_of_padded_rows() -> None:
    rows = [ids_of(prompt) for prompt in PROMPTS.values()]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    grids = np.concatenate([grids_of(prompt) for prompt in PROMPTS.values()])
    places, shifts = grid_positions(ids, mask, grids, IMAGE, 2)
    expected, their_shifts = theirs(ids, mask, grids)
    assert np.array_equal(places[:, mask == 1], expected[:, mask == 1])
    assert np.array_equal(shifts, their_shifts)


def test_places_in_javascript() -> None:
    prompts = [
        {"is_image": [token == IMAGE for token in ids_of(prompt)], "grids": (grids_of(prompt)[:, 1:] // 2).tolist()}
        for prompt in PROMPTS.values()
    ]
    code = f"""
        import {{ grid_places }} from {json.dumps(POSITIONS.as_uri())};
        const made = {json.dumps(prompts)}.map(({{ is_image, grids }}) => grid_places(is_image, grids));
        console.log(JSON.stringify(made));
    """
    command = ["node", "--input-type=module", "--eval", code]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for found, prompt in zip(made, PROMPTS.values(), strict=True):
        ids = np.array([ids_of(prompt)])
        places, shifts = grid_positions(ids, np.ones_like(ids), grids_of(prompt), IMAGE, 2)
        assert found == {"places": places.flatten().tolist(), "shift": int(shifts[0, 0])}


@pytest.mark.parametrize(
    ("prompt", "grids", "said"),
    [
        ([1, (2, 2)], [(1, 4, 6)], "4 image tokens in a row for an image of 6 cells"),
        ([1, (2, 2)], [], "for an image of 0 cells"),
        ([3], [(1, 4, 6)], "fewer places"),
    ],
)
def test_a_prompt_and_images_that_do_not_fit(prompt: Any, grids: Any, said: str) -> None:
    ids = np.array([ids_of(prompt)])
    with pytest.raises(InputError, match=said):
        grid_positions(ids, np.ones_like(ids), np.array(grids, dtype=np.int64).reshape(-1, 3), IMAGE, 2)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a kind in float32, once."""

    @cache
    def once(kind: str) -> Exported:
        made = prepare(tmp_path_factory.mktemp("grids"), KINDS[kind])
        made.export("chat", ("fp32",))
        return made

    return once


@pytest.fixture(params=GRIDS)
def spoilt(request: pytest.FixtureRequest, make: Callable[[str], Exported], tmp_path: Path) -> Exported:
    """A copy that the test may spoil."""
    return make(request.param).copy(tmp_path / "copy")


def of_type(model_type: str) -> str:
    return next(kind for kind in GRIDS if kind.startswith(f"{model_type},"))


def test_swapped_lines_and_columns_are_caught(spoilt: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = property(lambda places: torch.stack([places.column, places.row], dim=-1))
    monkeypatch.setattr(grid.Places, "pairs", swapped)
    export_tower(spoilt, spoilt.graph("vision_encoder"))
    report = spoilt.verify("ort")
    assert failed_graphs(report) == {"vision_encoder"}
    assert "image_features (case0, batch 1)" in failures(report)


def test_patches_of_a_cell_line_by_line_are_caught(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places as if patches came line by line, and not cell by cell."""
    spoilt = make(of_type("qwen2_vl")).copy(tmp_path / "copy")

    def line_by_line(count: int, grid_thw: torch.Tensor, merge: int) -> grid.Places:
        number, width = torch.arange(count), grid_thw[0, 2]
        return grid.Places(number // width, number % width, grid_thw[0, 1], width)

    monkeypatch.setattr(grid.Places, "of", line_by_line)
    export_tower(spoilt, spoilt.graph("vision_encoder"))
    assert failed_graphs(spoilt.verify("ort")) == {"vision_encoder"}


def test_missing_windows_are_caught(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(of_type("qwen2_5_vl")).copy(tmp_path / "copy")
    monkeypatch.setattr(qwen2_5_vl.WindowEncoder, "biases", grid.GridEncoder.biases)
    export_tower(made, made.graph("vision_encoder"))
    assert failed_graphs(made.verify("ort")) == {"vision_encoder"}


def test_missing_deepstack_is_caught(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in graphs that others publish: stock transformers.js feeds no further features."""
    made = make(of_type("qwen3_vl")).copy(tmp_path / "copy")

    def first_part_alone(decoder: Any, kept_positions: torch.Tensor, **arguments: Any) -> torch.Tensor:
        arguments["inputs_embeds"] = arguments["inputs_embeds"].chunk(decoder.parts, dim=-1)[0]
        return ChatDecoder.logits(decoder, kept_positions, **arguments)

    monkeypatch.setattr(wide_rows.WideDecoder, "logits", first_part_alone)
    merged = open_checkpoint(made.work.merged)
    decoder = merged.family.layouts["chat"].components(merged.config)[-1]
    skeleton, _ = make_skeleton(decoder, build_empty(merged))
    save_graph(Variant(Source(decoder, skeleton, merged.tensors), FP32).make(), made.graph("decoder_model_merged"))
    report = made.verify("ort")
    assert failed_graphs(report) == {"decoder_model_merged"}


def test_what_is_repeated(make: Callable[[str], Exported]) -> None:
    """Blocks that see windows and those that see all take turns; the first layers of DeepStack come by themselves."""
    repeated = {kind.split(",")[0]: load_manifest(make(kind).work.repo).simplified for kind in GRIDS}
    assert repeated["qwen2_vl"]["vision_encoder"]["repeated"] == {"model.visual.blocks": 2}
    assert repeated["qwen2_5_vl"]["vision_encoder"]["repeated"] == {"model.visual.blocks": 2}
    assert repeated["qwen3_vl"]["decoder_model_merged"]["repeated"] == {"model.language_model.layers": 2}
    assert repeated["qwen3_vl"]["vision_encoder"]["not_repeated"]


@pytest.mark.parametrize("kind", GRIDS)
def test_several_images_and_turns(kind: str, make: Callable[[str], Exported]) -> None:
    """Pictures of three sizes in one conversation: the runtime says what PyTorch says, and runs what is new alone."""
    made = make(kind)
    model, torch_model = (
        load(made.work.repo, dtype="fp32", backend=backend, threads=1) for backend in ("onnx", "torch")
    )
    random = np.random.default_rng(3)
    pictures = [
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in ((16, 40), (31, 9), (64, 64))
    ]
    options = Options(max_new_tokens=6)
    ours, theirs = Conversation(model), Conversation(torch_model)
    for turn, images in enumerate((pictures[:2], [], pictures[2:])):
        answer, expected = (talk.say(f"what is it, {turn}?", images, options) for talk in (ours, theirs))
        assert answer.token_ids == expected.token_ids
        assert not turn or ours.tokens_fed < answer.prompt_tokens


def test_a_batch_of_prompts_with_and_without_images(make: Callable[[str], Exported]) -> None:
    model = load(make(of_type("qwen2_vl")).work.repo, dtype="fp32", backend="onnx", threads=1)
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    items = [([], "a text alone"), ([picture], "what is it?"), ([picture, picture.resize((70, 20))], "and these two?")]
    options = Options(max_new_tokens=5)
    alone = [model.generate(*item, options) for item in items]
    assert [answer.token_ids for answer in model.generate_batch(items, options)] == [one.token_ids for one in alone]
    beams = replace(options, num_beams=3)
    torch_model = load(make(of_type("qwen2_vl")).work.repo, dtype="fp32", backend="torch", threads=1)
    assert model.generate(*items[1], beams).token_ids == torch_model.generate(*items[1], beams).token_ids


def test_published_settings(make: Callable[[str], Exported]) -> None:
    """What transformers.js takes for granted is there; of two names for a size, one."""
    repo = make(of_type("qwen2_vl")).work.repo
    config, settings = (json.loads((repo / f"{name}.json").read_text()) for name in ("config", "preprocessor_config"))
    assert config["num_hidden_layers"] == config["text_config"]["num_hidden_layers"] == 3
    assert config["vision_start_token_id"] == pico_chat.GRID_TOKENS["vision_start_token_id"]
    assert config["vision_config"]["spatial_merge_size"] == 2
    assert settings["size"] == {"shortest_edge": 256, "longest_edge": 768}
    assert not {"min_pixels", "max_pixels"} & settings.keys()
    assert settings["processor_class"] == "Qwen2VLProcessor"


def test_a_picture_that_javascript_makes_larger(tmp_path: Path) -> None:
    """20 pixels are 2.5 cells: 2 in Python, 3 in JavaScript. The report says so, and judges the other pictures."""
    sizes = {"half": (20, 24), "wide": (8, 64), "plain": (24, 32)}
    made = prepare(tmp_path, pico_chat.write_qwen2_vl, images=sizes)
    made.export("chat", ("fp32",))
    report = made.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    (check,) = (check for check in report.checks if check.metric == limits.PIXELS_FROM_FILE)
    assert check.detail.endswith(".png, of 2 pictures; not judged: half.png (made of another size)")


def test_a_recipe_s_size_wins_over_older_names(tmp_path: Path) -> None:
    made = prepare(
        tmp_path, pico_chat.write_qwen2_vl, image_processor={"size": {"shortest_edge": 64, "longest_edge": 256}}
    )
    made.export("chat", ("fp32",))
    report = made.verify("ort")
    assert report.verdict == "pass", failures(report)
    settings = json.loads((made.work.repo / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 64, "longest_edge": 256}
