"""vlm_export.web.node_runtime on tiny repos: the tokens are those of the same graphs run here, step by step."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import node_repo
import numpy as np
import onnxruntime
import pytest
from node_repo import EOS, IMAGE, PATCH, START, VOCABULARY, write_repo
from PIL import Image

from vlm_export.errors import CheckFailed, InputError
from vlm_export.web.captions import Caption, Item, Layout
from vlm_export.web.node_runtime import SCRIPTS, RemoteModel, caption, node_home, scripts_home

LIMIT = 40
LAYOUTS: list[Layout] = ["captioner", "chat"]
EMPTY_CACHE = [np.zeros((1, 1, 0, node_repo.HIDDEN), np.float32)] * 2

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    return {layout: write_repo(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


@pytest.fixture(autouse=True)
def no_files_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def picture(seed: int, height: int = 2 * PATCH, width: int = 3 * PATCH) -> np.ndarray:
    """Patches of one colour each, `[height, width, 3] uint8`."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // PATCH, width // PATCH, 3), dtype=np.uint8)
    return colours.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def pixels(image: np.ndarray) -> np.ndarray:
    """What the repo's preprocessor makes of an image, `[1, 3, height, width] float32`."""
    return ((image / 255 - 0.5) / 0.5).astype(np.float32).transpose(2, 0, 1)[None]


def run(repo: Path, name: str, **inputs: object) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(repo / "onnx" / f"{name}.onnx").run(None, inputs)


def decode(repo: Path, cache: list[np.ndarray], **inputs: object) -> tuple[np.ndarray, list[np.ndarray]]:
    """One run of the decoder: the logits of the last position `[vocabulary] float32` and the new cache."""
    names = ("past_key_values.0.key", "past_key_values.0.value")
    logits, *cache = run(repo, "decoder_model_merged", **inputs, **dict(zip(names, cache, strict=True)))
    return logits[0, -1], cache


def expected_captioner(repo: Path, pixel_values: np.ndarray) -> tuple[int, ...]:
    (hidden,) = run(repo, "encoder_model", pixel_values=pixel_values)
    tokens, cache = [START], EMPTY_CACHE
    while len(tokens) <= LIMIT and tokens[-1] != EOS:
        logits, cache = decode(repo, cache, input_ids=[tokens[-1:]], encoder_hidden_states=hidden)
        tokens.append(int(logits.argmax()))
    return tuple(tokens[1:])


def expected_chat(repo: Path, pixel_values: np.ndarray, prompt: str, penalty: float = 1) -> tuple[int, ...]:
    (features,) = run(repo, "vision_encoder", pixel_values=pixel_values)
    ids = [IMAGE] * features.shape[1] + node_repo.tokenizer("chat").encode(prompt).ids
    (embeds,) = run(repo, "embed_tokens", input_ids=[ids])
    embeds[:, : features.shape[1]] = features
    length, cache = len(ids), EMPTY_CACHE
    while len(ids) < length + LIMIT and ids[-1] != EOS:
        past = cache[0].shape[2]
        positions = np.arange(past, len(ids))[None]
        mask = np.ones((1, len(ids)), np.int64)
        logits, cache = decode(repo, cache, inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        seen = [i for i in set(ids) if i < VOCABULARY]
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        ids.append(int(logits.argmax()))
        (embeds,) = run(repo, "embed_tokens", input_ids=[ids[-1:]])
    return tuple(ids[length:])


def expected(repo: Path, layout: Layout, pixel_values: np.ndarray, prompt: str) -> tuple[int, ...]:
    if layout == "captioner":
        return expected_captioner(repo, pixel_values)
    return expected_chat(repo, pixel_values, prompt)


def caption_one(model: Path | RemoteModel, layout: Layout, dtype: str = "fp32", silence_seconds: float = 60) -> Caption:
    items = [Item(pixel_values=pixels(picture(1)), prompt="<image>")]
    result = caption(model, layout=layout, dtype=dtype, items=items, generation={}, silence_seconds=silence_seconds)
    return result.captions[0]


@both_layouts
def test_pixel_values(repos: dict[Layout, Path], layout: Layout) -> None:
    repo = repos[layout]
    cases = [
        (pixels(picture(1)), ""),
        (pixels(picture(2)), "the cat"),
        (pixels(picture(3, height=3 * PATCH, width=PATCH)), "a dog"),
    ]
    items = [Item(pixel_values=pixel_values, prompt=f"<image>{prompt}") for pixel_values, prompt in cases]
    heard: list[Caption] = []
    result = caption(
        repo, layout=layout, dtype="fp32", items=items, generation={"max_new_tokens": LIMIT}, on_item=heard.append
    )

    want = [expected(repo, layout, pixel_values, prompt) for pixel_values, prompt in cases]
    assert [made.token_ids for made in result.captions] == want
    assert max(map(len, want)) > 5
    assert len(set(want)) == len(want)
    text = [node_repo.tokenizer(layout).decode(ids) for ids in want]
    if layout == "captioner":
        text = [caption_text.strip() for caption_text in text]  # the pipeline does
    assert [made.text for made in result.captions] == text
    assert heard == list(result.captions)
    assert result.versions["transformers"] == "4.3.1"
    assert result.versions["onnxruntime"] == "1.30.0"
    assert result.warnings == ()


@both_layouts
def test_image_file(repos: dict[Layout, Path], layout: Layout, tmp_path: Path) -> None:
    image = picture(4)
    Image.fromarray(image).save(tmp_path / "picture.png")
    item = Item(image=tmp_path / "picture.png", prompt="<image>see")
    result = caption(repos[layout], layout=layout, dtype="auto", items=[item], generation={})
    assert result.captions[0].token_ids == expected(repos[layout], layout, pixels(image), "see")


def test_generation_options(repos: dict[Layout, Path]) -> None:
    pixel_values = pixels(picture(2))
    items = [Item(pixel_values=pixel_values, prompt="<image>the cat")]
    short = caption(repos["chat"], layout="chat", dtype="fp32", items=items, generation={"max_new_tokens": 2})
    assert short.captions[0].token_ids == expected_chat(repos["chat"], pixel_values, "the cat")[:2]

    varied = caption(repos["chat"], layout="chat", dtype="fp32", items=items, generation={"repetition_penalty": 1.5})
    want = expected_chat(repos["chat"], pixel_values, "the cat", penalty=1.5)
    assert varied.captions[0].token_ids == want != expected_chat(repos["chat"], pixel_values, "the cat")


@both_layouts
def test_scores_are_those_of_the_same_graphs(repos: dict[Layout, Path], layout: Layout) -> None:
    """One row a token, and only of the items that ask for them; what rules do to them is in them."""
    asked = Item(pixel_values=pixels(picture(1)), prompt="<image>", keep_scores=True)
    items = [asked, Item(pixel_values=pixels(picture(2)), prompt="<image>")]
    seen, other = caption(repos[layout], layout=layout, dtype="fp32", items=items, generation={}).captions
    assert seen.scores is not None and other.scores is None
    assert seen.scores.shape == (len(seen.token_ids), VOCABULARY)
    assert seen.scores.argmax(axis=1).tolist() == list(seen.token_ids)
    if layout == "captioner":
        (hidden,) = run(repos[layout], "encoder_model", pixel_values=asked.pixel_values)
        logits, _ = decode(repos[layout], EMPTY_CACHE, input_ids=[[START]], encoder_hidden_states=hidden)
        np.testing.assert_allclose(seen.scores[0], logits, atol=1e-5)
    penalty = {"repetition_penalty": 1.5}
    [penalised] = caption(repos[layout], layout=layout, dtype="fp32", items=[asked], generation=penalty).captions
    assert not np.allclose(penalised.scores[:2], seen.scores[:2])


@both_layouts
def test_remote_model(layout: Layout, tmp_path: Path) -> None:
    repo = write_repo(tmp_path / "hub/some/model/resolve/abc", layout, external_data=True)
    with hub(tmp_path / "hub") as server:
        model = RemoteModel(f"http://127.0.0.1:{server.server_port}/", "some/model", revision="abc")
        made = caption_one(model, layout)
        server.shutdown()
    assert made.token_ids == expected(repo, layout, pixels(picture(1)), "")
    assert not list(node_home().rglob("node_modules/@huggingface/transformers/.cache"))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing, where the base class writes to stderr."""


def hub(folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_an_item_is_one_thing() -> None:
    with pytest.raises(ValueError, match="has an image or pixel_values"):
        Item()


def test_missing_graph(tmp_path: Path) -> None:
    repo = write_repo(tmp_path, "chat")
    (repo / "onnx/vision_encoder.onnx").unlink()
    with pytest.raises(CheckFailed, match=r"layout chat, dtype fp32.*not found locally at .*vision_encoder\.onnx"):
        caption_one(repo, "chat")


def test_missing_dtype(repos: dict[Layout, Path]) -> None:
    with pytest.raises(CheckFailed, match=r"not found locally at .*_int8\.onnx"):
        caption_one(repos["captioner"], "captioner", dtype="int8")


def test_unknown_dtype_is_not_replaced_by_the_default(repos: dict[Layout, Path]) -> None:
    with pytest.raises(CheckFailed, match="was loaded as fp32 instead of int3"):
        caption_one(repos["captioner"], "captioner", dtype="int3")


@both_layouts
def test_missing_external_data_is_named(layout: Layout, tmp_path: Path) -> None:
    repo = write_repo(tmp_path, layout, external_data=True)
    (repo / "onnx/decoder_model_merged.onnx_data").unlink()
    with pytest.raises(CheckFailed, match=r"not found locally at .*decoder_model_merged\.onnx_data"):
        caption_one(repo, layout, silence_seconds=10)


def test_wrong_layout(repos: dict[Layout, Path]) -> None:
    with pytest.raises(CheckFailed, match="Unsupported model type"):
        caption_one(repos["chat"], "captioner")


def test_missing_image(repos: dict[Layout, Path], tmp_path: Path) -> None:
    items = [Item(image=tmp_path / "none.png")]
    with pytest.raises(CheckFailed, match=r"item 0: Unable to read image from .*none\.png"):
        caption(repos["captioner"], layout="captioner", dtype="fp32", items=items, generation={})


def test_a_silent_load_is_stopped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        model = RemoteModel(f"http://127.0.0.1:{server.getsockname()[1]}/", "some/model")
        with pytest.raises(CheckFailed, match="no answer for 1 s"):
            caption_one(model, "chat", silence_seconds=1)


@pytest.fixture
def fake_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of its own, where `node` and `npm` are shell scripts, and an empty cache."""
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    write_tool(tools / "node", 'test "$1" = --version && echo v20.1.0 && exit; echo out of memory >&2; exit 3')
    write_tool(tools / "npm", "sleep 0.2; mkdir node_modules")
    return tools


def write_tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir())


def test_installs_once_for_two_that_ask_at_once(fake_tools: Path) -> None:
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: scripts_home(), range(2))
    assert one == other
    assert names(one.parent.parent) == [one.parent.name]
    assert names(one.parent) == ["node_modules", "package-lock.json", "package.json", one.name]
    assert names(one) == [
        "caption.mjs",
        "client.mjs",
        "contract.mjs",
        "onnxruntime-web.mjs",
        "prompts.mjs",
        "single.mjs",
    ]
    (fake_tools / "npm").unlink()
    assert scripts_home() == one


def test_two_versions_have_scripts_of_their_own(fake_tools: Path, tmp_path: Path) -> None:
    """A version that starts while another runs does not change the scripts of that one."""
    changed = shutil.copytree(SCRIPTS, tmp_path / "changed")
    (changed / "client.mjs").write_text("export {};")
    ours = scripts_home()
    others = scripts_home(changed)
    assert ours.parent == others.parent
    assert [(home / "client.mjs").read_bytes() for home in (ours, others)] == [
        (SCRIPTS / "client.mjs").read_bytes(),
        b"export {};",
    ]


def test_failed_install_leaves_nothing(fake_tools: Path, tmp_path: Path) -> None:
    write_tool(fake_tools / "npm", "mkdir node_modules; echo 'npm error no\nsuch host' >&2; exit 1")
    with pytest.raises(InputError, match=r"^npm ci .*\(npm error no such host\).*--runtime ort$"):
        node_home()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("tool", ["node", "npm"])
def test_missing_tool(fake_tools: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_tools / tool).unlink()
    monkeypatch.setenv("PATH", str(fake_tools))
    with pytest.raises(InputError, match=f"^{tool} is not on PATH: install Node 20 .* --runtime ort$"):
        node_home()


def test_empty_path(repos: dict[Layout, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"^node is not on PATH"):
        caption_one(repos["chat"], "chat")


def test_old_node(fake_tools: Path) -> None:
    write_tool(fake_tools / "node", "echo v18.20.0")
    with pytest.raises(InputError, match=r"node is version v18\.20\.0: install Node 20"):
        node_home()


def test_node_that_dies(fake_tools: Path, repos: dict[Layout, Path]) -> None:
    with pytest.raises(CheckFailed, match=r"Node ended with exit status 3: out of memory$"):
        caption_one(repos["chat"], "chat")
