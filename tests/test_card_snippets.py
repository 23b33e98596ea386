"""The model card's code, pasted and run as it stands: Node, Python, ONNX Runtime, and a page in Chromium.

A repo is pushed to a Hub on this machine, and its card read from there. What is put in front of the code is what sends
requests for the Hub's address to that one (`elsewhere.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
from elsewhere import CDN, IN_NODE, IN_PAGE, cdn
from exported import Exported, record
from hub_server import TOKEN, HubServer, environment
from PIL import Image
from test_runtime_chat import KINDS as CHATS

from vlm_export.files import Work, read_json
from vlm_export.layouts.prefix_captioner import PrefixCaptioner
from vlm_export.manifest import load_manifest
from vlm_export.publish.addresses import HUB
from vlm_export.publish.snippets import Subject, snippets
from vlm_export.recipe import find_recipe
from vlm_export.verify.golden import load_golden
from vlm_export.web import chromium, node_runtime
from vlm_export.web.site_server import SiteServer


@dataclass(frozen=True)
class Published:
    """A repo on the Hub of this machine: the code blocks of its card, by heading, and what the model says there."""

    hub: HubServer
    home: Path
    code: dict[str, str]
    caption: str

    def python(self, title: str, folder: Path) -> str:
        """What a Python block prints, run as a file."""
        (folder / "pasted.py").write_text(self.code[title])
        return _printed([sys.executable, "pasted.py"], folder, **environment(self.hub.url, self.home, TOKEN))

    def node(self, folder: Path, before: str = IN_NODE) -> str:
        """What the block for Node prints, beside installed packages, with a module loaded before it."""
        (folder / "node_modules").symlink_to(node_runtime.node_home() / "node_modules")
        (folder / "hub.mjs").write_text(before.format(there=HUB, here=self.hub.url))
        (folder / "pasted.mjs").write_text(self.code["In Node"])
        return _printed(["node", "--import", "./hub.mjs", "pasted.mjs"], folder)

    def page(self, folder: Path) -> str:
        """What the page shows."""
        har = cdn(folder)
        shown = "document.querySelector('#caption').textContent"
        pages = {"empty.html": b"<!doctype html>", "pasted.html": self.code["In a page"].encode()}
        with SiteServer(pages, {}) as server:
            steps: list[list[Any]] = [
                ["addInitScript", {"content": IN_PAGE.format(there=HUB, here=self.hub.url)}],
                ["routeFromHAR", str(har), {"url": f"{CDN}/**", "notFound": "abort"}],
                ["goto", f"{server.url}/pasted.html"],
                ["waitForFunction", f"return {shown} !== 'Loading…'"],
                ["evaluate", shown],
            ]
            seen = chromium.drive(f"{server.url}/empty.html", steps, chromium.WASM)
        assert {address.split("/")[2] for address in seen.foreign} == {CDN.split("/")[2], self.hub.url.split("/")[2]}
        return str(seen.answers[0])


def _printed(command: list[str], folder: Path, **environ: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def published(made: Exported, repo_id: str, folder: Path) -> Iterator[Published]:
    """Push a verified export with the command, and read its card back."""
    golden = load_golden(made.recipe.golden_dir)
    with HubServer(folder / "hub") as hub:
        home = folder / "home"
        arguments = ["push", repo_id, "--recipe", str(made.recipe.path), "--work", str(made.work.root)]
        _printed([sys.executable, "-m", "vlm_export", *arguments], folder, **environment(hub.url, home, TOKEN))
        read = (
            "import sys, huggingface_hub; print(open(huggingface_hub.hf_hub_download(sys.argv[1], 'README.md')).read())"
        )
        card = _printed([sys.executable, "-c", read, repo_id], folder, **environment(hub.url, home, TOKEN))
        code = dict(re.findall(r"^### (.*?)\n.*?^```\w+\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))
        yield Published(hub, home, code, golden.facts.images[0].caption)


@pytest.fixture(scope="module")
def captioner(default_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """The bundled recipe, in fp32 and q8."""
    folder = tmp_path_factory.mktemp("captioner")
    made = Exported(find_recipe("shapes-captioner"), Work(folder / "work"))
    made.work.root.mkdir()
    for part in default_repo.parent.iterdir():
        (made.work.root / part.name).mkdir()
        subprocess.run(["cp", "-r", f"{part}/.", str(made.work.root / part.name)], check=True)
    made.verify("ort")
    yield from published(made, "acme/shapes", folder)


def test_every_way_is_there(captioner: Published) -> None:
    assert list(captioner.code) == ["In a page", "In Node", "In Python", "ONNX Runtime alone"]


def test_the_captioner_in_node(captioner: Published, tmp_path: Path) -> None:
    assert captioner.node(tmp_path) == captioner.caption


def test_the_captioner_in_python(captioner: Published, tmp_path: Path) -> None:
    assert captioner.python("In Python", tmp_path) == captioner.caption


def test_the_captioner_in_onnxruntime(captioner: Published, tmp_path: Path) -> None:
    assert captioner.python("ONNX Runtime alone", tmp_path) == captioner.caption


@pytest.mark.browser
def test_the_captioner_in_a_page(captioner: Published, tmp_path: Path) -> None:
    assert captioner.page(tmp_path) == captioner.caption


@pytest.mark.parametrize("decoder", ["gpt2", "trocr"])  # trocr keeps what it made of the picture, gpt2 makes it again
def test_an_encoder_decoder_in_onnxruntime(decoder: str, tmp_path: Path) -> None:
    encoder_decoders.write_checkpoint(tmp_path / "checkpoint", encoder_decoders.config("vit", decoder))
    made = record(tmp_path, preprocess="client" if decoder == "gpt2" else "graph")
    made.export("captioner", ["fp32"])
    made.verify("ort")
    for there in published(made, f"acme/{decoder}", tmp_path):
        assert there.python("ONNX Runtime alone", tmp_path) == there.caption


def test_no_code_that_would_say_something_else(captioner: Published, default_repo: Path) -> None:
    """Where pictures are cropped or tokens are penalized, the few lines for ONNX Runtime would not do."""
    own = read_json(default_repo / "preprocessor_config.json")
    settings = load_manifest(default_repo).in_graph
    generation = read_json(default_repo / "generation_config.json")
    subject = Subject("a/b", "", PrefixCaptioner(), settings, generation)
    titles = list(captioner.code)
    for right in (subject, replace(subject, settings=own)):
        assert [snippet.title for snippet in snippets(right)] == titles
    for changed in (
        replace(subject, settings={**own, "do_center_crop": True}),
        replace(subject, settings={**settings, "do_center_crop": True}),
        replace(subject, settings={**settings, "size": {"shortest_edge": 224}}),
        replace(subject, settings={**settings, "do_resize": False}),
        replace(subject, generation={**generation, "repetition_penalty": 1.4}),
        replace(subject, generation={**generation, "no_repeat_ngram_size": 1}),
    ):
        assert [snippet.title for snippet in snippets(changed)] == titles[:-1]


@pytest.fixture(scope="module", params=CHATS)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Small models of two classes that take picture and text in another order.

    Their pictures have one colour each, which every client resizes alike: random weights tell the least difference.
    """
    folder = tmp_path_factory.mktemp("chat")
    CHATS[request.param](folder / "checkpoint")
    (folder / "images").mkdir()
    for colour in ("white", "navy", "orange"):
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{colour}.png")
    content = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
    prompts = [[{"role": "user", "content": content}]]
    made = record(folder, layout="chat", golden={"images": ["images/*.png"], "prompts": prompts})
    made.export("chat", ["fp32"])
    made.verify("ort")
    yield from published(made, f"acme/{request.param}", folder)


def test_a_chat_model(chat: Published, tmp_path: Path) -> None:
    assert list(chat.code) == ["In a page", "In Node", "In Python"]
    assert chat.caption.strip()
    assert chat.python("In Python", tmp_path) == chat.caption
    assert chat.node(tmp_path) == chat.caption


@pytest.mark.browser
def test_a_chat_model_in_a_page(chat: Published, tmp_path: Path) -> None:
    assert chat.page(tmp_path) == chat.caption
