"""vlm-export serve as its users meet it: the real server in a process of its own, the real openai client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import openai
import pytest
from click.testing import CliRunner
from exported import Exported
from PIL import Image

from vlm_export import bundled, runtime
from vlm_export.apps.load import load
from vlm_export.apps.openai_format import MAX_PIXELS
from vlm_export.apps.serve import Limits, application
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.recipe import find_recipe
from vlm_export.runtime.images import open_image
from vlm_export.verify.golden import GoldenFolder, load_golden
from vlm_export.web.listening import listen

COMMAND = Path(sys.executable).with_name("vlm-export")
RECIPE = find_recipe(bundled.DEFAULT_RECIPE)
NAME = RECIPE.name
# Longer than any test, unless it is cancelled.
ENDLESS: dict[str, Any] = {"max_tokens": 10**6, "extra_body": {"min_new_tokens": 10**6}}
LONG = {"num_beams": 2, "length_penalty": 1e308}
Parts = list[dict[str, Any]]


@dataclass(frozen=True)
class Served:
    """A server: its address and process, and a client that does not try again."""

    url: str
    process: subprocess.Popen[str]
    client: openai.OpenAI

    def ask(self, content: Any, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": content}], **options
        )

    def stop(self) -> None:
        """As by Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def post(self, body: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/chat/completions", json=body)

    @property
    def health(self) -> dict[str, Any]:
        return httpx2.get(self.url.replace("/v1", "/health")).json()

    def wait(self, **state: int) -> None:
        """Until `/health` says so."""
        for _ in range(100):
            if self.health | state == self.health:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.health} did not become {state}")


@contextmanager
def serving(repo: Path, *arguments: str) -> Iterator[Served]:
    """The command on a free port; ended as by Ctrl-C, after which nothing may have gone wrong in it."""
    command = [str(COMMAND), "serve", str(repo), "--port", "0", "--threads", "1", "--json", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            served = Served(url, process, client)
            yield served
        if process.poll() is None:
            served.stop()
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def repos(default_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled recipe's repo by layout, and one that says that it has positions for any answer."""
    other = Exported(RECIPE, Work(tmp_path_factory.mktemp("chat")))
    shutil.copytree(default_repo.parent / "merged", other.work.merged)
    other.export("chat", ["q8"])
    endless = Path(shutil.copytree(default_repo, tmp_path_factory.mktemp("endless") / "repo"))
    config = json.loads((endless / "config.json").read_text())
    config["decoder"]["max_position_embeddings"] = 10**7
    (endless / "config.json").write_text(json.dumps(config))
    return {"captioner": default_repo, "chat": other.work.repo, "endless": endless}


@pytest.fixture(scope="module")
def server(repos: dict[str, Path]) -> Iterator[Served]:
    with serving(repos["captioner"], "--concurrency", "2") as served:
        yield served


@pytest.fixture(scope="module")
def narrow(repos: dict[str, Path]) -> Iterator[Served]:
    """One request at work, one waiting, 1 MB each."""
    with serving(repos["endless"], "--queue", "1", "--max-body-mb", "1") as served:
        yield served


@pytest.fixture(scope="module")
def chat(repos: dict[str, Path]) -> Iterator[Served]:
    with serving(repos["chat"]) as served:
        yield served


@pytest.fixture(scope="module")
def golden() -> GoldenFolder:
    return load_golden(RECIPE.golden_dir)


@pytest.fixture(scope="module")
def picture(golden: GoldenFolder) -> Parts:
    return shown(golden.image_paths()[0].read_bytes())


def shown(data: bytes, mime: str = "image/png") -> Parts:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}]


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


# What is answered


def test_captions_are_those_of_pytorch(server: Served, golden: GoldenFolder) -> None:
    for image, path in zip(golden.facts.images, golden.image_paths(), strict=True):
        answer = server.ask([*shown(path.read_bytes()), said("")])
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.role) == (image.caption, "assistant")
        assert choice.finish_reason == "stop"
        assert answer.usage.completion_tokens == len(image.token_ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(image.token_ids)
    assert answer.model == NAME
    assert answer.system_fingerprint.endswith("-q8-onnx")


def test_streamed_pieces_are_the_caption(server: Served, golden: GoldenFolder, picture: Parts) -> None:
    chunks = list(server.ask(picture, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == golden.facts.images[0].caption
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(golden.facts.images[0].token_ids)


def test_a_stream_is_events_that_end_with_done(server: Served, picture: Parts) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": picture}], "stream": True}
    answer = server.post(body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_options_are_the_runtimes(server: Served, repos: dict[str, Path], golden: GoldenFolder, picture: Parts) -> None:
    model = load(repos["captioner"], threads=1)
    image = open_image(golden.image_paths()[0])

    def expected(**options: Any) -> str:
        return model.generate([image], options=runtime.Options(**options)).text

    def answered(**options: Any) -> str:
        return server.ask(picture, **options).choices[0].message.content

    caption = golden.facts.images[0].caption
    short = server.ask(picture, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert caption.startswith(short.choices[0].message.content)
    assert answered(max_completion_tokens=3) == short.choices[0].message.content
    assert answered(stop=" left") == answered(stop=["nowhere", " left"]) == caption.partition(" left")[0]
    assert answered(temperature=0, top_p=0.5, seed=1) == caption
    longer = {"min_new_tokens": 20}  # it is so sure of its captions that it must go on to be sampled
    for sampled in ({"temperature": 2.0, "seed": 7}, {"top_p": 0.99, "seed": 4}):
        text = expected(do_sample=True, **sampled, **longer)
        assert answered(**sampled, extra_body=longer) == text != expected(**longer)
    beams = {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True, "no_repeat_ngram_size": 1}
    assert answered(extra_body=beams) == expected(**beams) != caption
    more = {"repetition_penalty": 3.0, "min_new_tokens": 20, "top_k": 5}
    assert answered(extra_body=more) == expected(**more) != caption


def test_several_answers(server: Served, picture: Parts) -> None:
    answer = server.ask(picture, n=3, extra_body={"num_beams": 4})
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    with pytest.raises(openai.BadRequestError, match="n: 2 without sampling needs as many num_beams") as caught:
        server.ask(picture, n=2)
    assert caught.value.param == "n"


def test_beams_are_streamed_as_one_piece(server: Served, golden: GoldenFolder, picture: Parts) -> None:
    chunks = list(server.ask(picture, stream=True, extra_body={"num_beams": 3}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert pieces == [golden.facts.images[0].caption]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_of_images(form: str, server: Served, golden: GoldenFolder) -> None:
    with Image.open(golden.image_paths()[0]) as image:
        options = {"quality": 100, "lossless": True} if form == "WEBP" else {"quality": 100} if form == "JPEG" else {}
        data = encoded(image.convert("RGB"), format=form, **options)
    assert server.ask(shown(data, f"image/{form.lower()}")).choices[0].message.content == golden.facts.images[0].caption


def test_clients_at_the_same_time(server: Served, golden: GoldenFolder) -> None:
    async def all_at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": shown(path.read_bytes())}],  # type: ignore[list-item]
                )
                for path in golden.image_paths()[:12]
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(all_at_once()) == [image.caption for image in golden.facts.images[:12]]


def test_a_chat_layout_takes_text(chat: Served, repos: dict[str, Path], golden: GoldenFolder, picture: Parts) -> None:
    model = load(repos["chat"], threads=1)
    image = open_image(golden.image_paths()[0])
    assert chat.ask(picture).choices[0].message.content == golden.facts.images[0].caption
    answer = chat.ask([*picture, said("a large")])
    expected = model.generate([image], "a large")
    assert answer.choices[0].message.content == expected.text != golden.facts.images[0].caption
    assert answer.usage.prompt_tokens == expected.prompt_tokens > 36
    with pytest.raises(openai.BadRequestError, match="captions one image at a time, not 2 together"):
        chat.ask(picture * 2)
    turns = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": picture},
        {"role": "assistant", "content": "large"},
    ]
    answer = chat.client.chat.completions.create(model=NAME, messages=turns)
    assert answer.choices[0].message.content


def test_models_and_health(server: Served) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert server.client.models.retrieve(NAME).id == NAME
    assert server.health == {
        "status": "ok",
        "model": NAME,
        "dtype": "q8",
        "backend": "onnx",
        "running": 0,
        "waiting": 0,
    }
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


# What is refused


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "message"),
    [
        ({"model": "gpt-5"}, 404, "model", "model_not_found", "no model 'gpt-5': this server has 'shapes-captioner'"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "tools: not supported here"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_parameter", "logprobs: not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter", "not support"),
        ({"extra_body": {"nonsense": 1}}, 400, "nonsense", "unsupported_parameter", "not supported"),
        ({"max_tokens": "5"}, 400, "max_tokens", "invalid_value", "should be a valid integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "greater than 0"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 400, None, "invalid_value", "two names of one limit"),
        ({"extra_body": {"min_new_tokens": 40}}, 400, "min_new_tokens", "invalid_value", "more than max_tokens, 30"),
        ({"temperature": 3}, 400, "temperature", "invalid_value", "less than or equal to 2"),
        ({"temperature": 1e-320}, 400, "temperature", "invalid_value", "must be from 1e-20 to 1e+20"),
        ({"extra_body": {"repetition_penalty": 1e308}}, 400, "repetition_penalty", "invalid_value", "from 1e-20 to"),
        ({"extra_body": LONG}, 400, "length_penalty", "invalid_value", "30 to the power of it (max_tokens) must be"),
        ({"extra_body": {**LONG, "length_penalty": -1e308}}, 400, "length_penalty", "invalid_value", "must be from"),
        ({"seed": 2**63}, 400, "seed", "invalid_value", "below 2**63"),
        ({"max_tokens": 222}, 400, "max_tokens", "invalid_value", "after the prompt the model has positions for 221"),
        ({"max_completion_tokens": 10**30}, 400, "max_tokens", "invalid_value", "has positions for 221"),
        ({"top_p": 0}, 400, "top_p", "invalid_value", "greater than 0"),
        ({"stop": [""]}, 400, "stop.0", "invalid_value", "at least 1 character"),
        ({"stop": list("abcde")}, 400, "stop", "invalid_value", "at most 4"),
        ({"n": 2, "stream": True}, 400, None, "invalid_value", "cannot be streamed"),
        ({"extra_body": {"num_beams": 99}}, 400, "num_beams", "invalid_value", "less than or equal to 16"),
        ({"messages": []}, 400, "messages", "invalid_value", "at least 1 item"),
        ({"messages": "hello"}, 400, "messages", "invalid_value", "should be a valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "invalid_value", "'user'"),
    ],
)
def test_a_request_that_asks_for_something_else(
    change: dict[str, Any], status: int, param: str | None, code: str, message: str, server: Served, picture: Parts
) -> None:
    request = {"model": NAME, "messages": [{"role": "user", "content": picture}]} | change
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.chat.completions.create(**request)
    error = caught.value
    assert (error.status_code, error.param, error.code, error.type) == (status, param, code, "invalid_request_error")
    assert message in error.message


def test_what_asks_for_nothing_is_no_error(server: Served, golden: GoldenFolder, picture: Parts) -> None:
    idle = {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "tools": [], "user": "me", "n": 1}
    answer = server.ask(picture, **idle, response_format={"type": "text"}, extra_body={"top_logprobs": None})
    assert answer.choices[0].message.content == golden.facts.images[0].caption


def bomb() -> Parts:
    """A small file of more pixels than are decoded; a server that decodes it first takes seconds and 400 MB."""
    return shown(encoded(Image.new("L", (20_000, 20_000)), format="PNG", compress_level=9))


@pytest.mark.parametrize(
    ("content", "param", "code", "message"),
    [
        ([], "messages", "missing_image", "captions an image: send one"),
        ("", "messages", "missing_image", "captions an image: send one"),
        ("What is this?", "messages", "text_not_supported", "takes no text: send the image alone"),
        (2, "messages", "too_many_images", "one image at a time: send 2 requests"),
        ("https://example.com/a.png", 0, "image_url_not_fetched", "does not fetch https addresses"),
        ("HTTP://169.254.169.254/latest", 0, "image_url_not_fetched", "does not fetch http addresses"),
        ("file:///etc/passwd", 0, "invalid_image_url", "other addresses and paths are not read"),
        ("/etc/passwd", 0, "invalid_image_url", "other addresses and paths are not read"),
        ("data:image/svg+xml;base64,PHN2Zz4=", 0, "invalid_image_url", "jpeg, webp, gif"),
        ("data:image/png;base64,@@@@", 0, "invalid_base64", "not base64"),
        ("data:image/png;base64,é", 0, "invalid_base64", "not base64"),
        ("data:image/png;base64,AAAA", 0, "invalid_image", "not a readable PNG, JPEG, WebP or GIF image"),
        (bomb, 0, "image_too_large", f"more than {MAX_PIXELS:,} pixels together"),
        ([{"type": "input_audio"}], "messages.0.content.0.type", "invalid_value", "'text' or 'image_url'"),
        ([{"type": "text"}], "messages.0.content.0", "invalid_value", "a part of type 'text' holds 'text'"),
    ],
)
def test_messages_that_are_not_understood(
    content: Any, param: str | int, code: str, message: str, server: Served, picture: Parts
) -> None:
    if param == 0:
        param = "messages.0.content.0.image_url.url"
        content = content() if callable(content) else [{"type": "image_url", "image_url": {"url": content}}]
    content = picture * content if isinstance(content, int) else content
    started = time.monotonic()
    for streamed in (False, True):  # an error before the first word is no stream
        with pytest.raises(openai.BadRequestError) as caught:
            server.ask(content, stream=streamed)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert message in caught.value.message
    assert time.monotonic() - started < 2


def test_a_truncated_image(server: Served, golden: GoldenFolder) -> None:
    with pytest.raises(openai.BadRequestError, match="not a readable") as caught:
        server.ask(shown(golden.image_paths()[0].read_bytes()[:200]))
    assert caught.value.code == "invalid_image"


def test_many_images_share_the_limit_of_pixels(chat: Served) -> None:
    half = encoded(Image.new("L", (5000, 5000)), format="PNG")
    with pytest.raises(openai.BadRequestError) as caught:
        chat.ask(shown(half) * 2)
    assert (caught.value.code, caught.value.param) == ("image_too_large", "messages.0.content.1.image_url.url")
    with pytest.raises(openai.BadRequestError, match="17 images, but at most 16"):
        chat.ask(shown(half)[:1] * 17)
    with pytest.raises(openai.BadRequestError, match="more than 100,000 characters"):
        chat.ask("x" * 100_001)


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff", b'{"seed": NaN}', b"null", b""])
def test_a_body_that_is_no_request(body: bytes, server: Served) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == ("invalid_value" if body == b"null" else "invalid_json")


def test_addresses_methods_and_hosts(server: Served, picture: Parts) -> None:
    """A page elsewhere can send neither JSON without asking first, nor ask under a name of its own."""
    answer = httpx2.get(f"{server.url}/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "there are POST /v1/chat/completions" in answer.json()["error"]["message"]
    assert httpx2.get(f"{server.url}/embeddings").json()["error"]["type"] == "invalid_request_error"
    plain = httpx2.post(f"{server.url}/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert httpx2.options(f"{server.url}/chat/completions").status_code == 405
    assert httpx2.get(f"{server.url}/models", headers={"host": "attacker.example"}).status_code == 400


@pytest.mark.parametrize("merged", [True, False], ids=["with a PyTorch model beside it", "alone"])
def test_a_graph_that_fails_is_the_servers_fault(
    merged: bool, repos: dict[str, Path], picture: Parts, tmp_path: Path
) -> None:
    """It loads, and ends with the first image: which is said of that request, and changes nothing for the others."""
    repo = Path(shutil.copytree(repos["captioner"], tmp_path / "repo"))
    if merged:
        shutil.copytree(repos["captioner"].parent / "merged", tmp_path / "merged")
    shutil.copy(repo / "onnx" / "decoder_model_merged.onnx", repo / "onnx" / "encoder_model.onnx")
    with serving(repo, "--dtype", "fp32") as served:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the model failed on this request") as caught:
                served.ask(picture)
            assert (caught.value.type, caught.value.param) == ("server_error", None)
            assert str(repo) not in caught.value.message
            assert served.health["backend"] == "onnx"
        assert served.process.stderr is not None
        assert any(f"{repo / 'onnx'}: ONNX Runtime: " in line for line in served.process.stderr)


def test_a_graph_that_does_not_load_is_replaced_at_once(
    repos: dict[str, Path], golden: GoldenFolder, picture: Parts, tmp_path: Path
) -> None:
    repo = Path(shutil.copytree(repos["captioner"], tmp_path / "repo"))
    shutil.copytree(repos["captioner"].parent / "merged", tmp_path / "merged")
    (repo / "onnx" / "encoder_model.onnx").write_bytes(b"")
    with serving(repo, "--dtype", "fp32") as served:
        assert served.health["backend"] == "torch"
        assert served.ask(picture).choices[0].message.content == golden.facts.images[0].caption


def test_what_a_request_asks_for_changes_nothing_for_others(server: Served, picture: Parts) -> None:
    """Whatever numbers it holds: none of these is the model's failure."""
    for options in (
        {"temperature": 1e-320},
        {"temperature": 1e-20, "seed": 1},
        {"temperature": 5e-324, "top_p": 1e-300},
        {"temperature": 2, "extra_body": {"no_repeat_ngram_size": 10**30, "top_k": 10**30}},
        {"temperature": 2, "seed": 1, "extra_body": {"repetition_penalty": 1e20, "min_new_tokens": 30}},
        {"extra_body": {"repetition_penalty": 1e-20, "min_new_tokens": 30}},
        {"extra_body": {"num_beams": 4, "length_penalty": 13.0}},
        {"extra_body": {"num_beams": 4, "length_penalty": -1e308}},
        {"extra_body": {"num_beams": 16, "length_penalty": 1e308, "early_stopping": "never"}},
    ):
        with suppress(openai.BadRequestError):
            server.ask(picture, **options)
        assert server.health["backend"] == "onnx"


# How much


def test_a_body_above_the_limit(narrow: Served) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 1,000,000 bytes") as caught:
        narrow.ask("x" * 1_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 100_000
            yield b" " * 100_000

    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{narrow.url}/chat/completions", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert read < 50_000_000, "the server read on"


def test_a_client_that_goes_away_cancels_its_answer_and_its_place(narrow: Served, picture: Parts) -> None:
    narrow.wait(running=0, waiting=0)
    stream = narrow.ask(picture, stream=True, **ENDLESS)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    narrow.wait(running=1, waiting=0)
    with pytest.raises(openai.APITimeoutError):  # one that waits, and gives up
        narrow.ask(picture, timeout=0.3)
    narrow.wait(running=1, waiting=0)
    stream.close()
    narrow.wait(running=0, waiting=0)
    with pytest.raises(openai.APITimeoutError):
        narrow.ask(picture, timeout=0.3, **ENDLESS)
    narrow.wait(running=0, waiting=0)
    assert narrow.ask(picture).choices[0].finish_reason == "stop"


def test_a_client_that_goes_away_while_it_is_written_to(repos: dict[str, Path], picture: Parts) -> None:
    """A piece of the text that nobody takes in any more is no error: the model stops, and the place is free."""
    request = {"model": NAME, "messages": [{"role": "user", "content": picture}], "stream": True, "min_new_tokens": 99}
    body = {"type": "http.request", "body": json.dumps(request | {"max_tokens": 99}).encode(), "more_body": False}
    path = "/v1/chat/completions"
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    sent: list[str] = []

    async def ask() -> None:
        stuck, closed = anyio.Event(), anyio.Event()
        incoming = [body]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await stuck.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) == 4:
                stuck.set()
                with anyio.move_on_after(0.5):  # a server's buffer is full until it sees that the connection is closed
                    await closed.wait()

        with anyio.fail_after(30):
            await application(load(repos["endless"]), Limits())(scope, receive, send)

    anyio.run(ask)
    assert sent == ["http.response.start", *["http.response.body"] * 3]


def test_a_full_queue_sends_away(narrow: Served, picture: Parts, golden: GoldenFolder) -> None:
    """One at work, one that waits; a third is told to come back, and the one that waited gets its answer."""

    async def crowd() -> str | None:
        async with openai.AsyncOpenAI(base_url=narrow.url, api_key="none", max_retries=0) as client:
            request: Any = {"model": NAME, "messages": [{"role": "user", "content": picture}]}
            stream = await client.chat.completions.create(stream=True, **request, **ENDLESS)
            waiting = asyncio.create_task(client.chat.completions.create(**request))
            await asyncio.to_thread(narrow.wait, running=1, waiting=1)
            with pytest.raises(openai.RateLimitError, match="busy with 2 requests") as caught:
                await client.chat.completions.create(**request)
            assert caught.value.response.headers["retry-after"] == "1"
            assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
            await stream.close()
            return (await waiting).choices[0].message.content

    narrow.wait(running=0, waiting=0)
    assert asyncio.run(crowd()) == golden.facts.images[0].caption


def test_a_server_that_is_stopped_ends_its_answers(repos: dict[str, Path], picture: Parts) -> None:
    with serving(repos["endless"]) as served:
        stream = iter(served.ask(picture, stream=True, **ENDLESS))
        next(stream)
        served.stop()
        started = time.monotonic()
        with pytest.raises(openai.APIError, match="the server was stopped before the answer was complete"):
            list(stream)
        assert time.monotonic() - started < 4, "cut off at the end of its time"


# The command


def test_a_port_that_is_taken(repos: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [str(COMMAND), "serve", str(repos["captioner"]), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: 127.0.0.1:{port}: Address already in use: choose another with --port\n"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "--host: '' is no address: give one, such as 127.0.0.1, or leave the option out"),
        (" ", "--host: ' ' is no address: give one"),
        ("\0", r"'\x00': holds a zero character, which no name has"),
        ("a" * 64, "--host: 'aaaa"),
        ("no.such.host.invalid", "no.such.host.invalid:0: "),
    ],
)
def test_a_host_that_is_none(host: str, said: str, repos: dict[str, Path]) -> None:
    """Of an empty one, such as an unset variable of the shell, a socket makes every address of this machine."""
    done = CliRunner().invoke(main, ["serve", str(repos["captioner"]), "--port", "0", "--host", host])
    assert (done.exit_code, done.stdout) == (2, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {said}") and "Unknown error" not in error
    with pytest.raises(InputError):
        listen(0, host)


def test_another_host_is_warned_of(repos: dict[str, Path], picture: Parts) -> None:
    command = [str(COMMAND), "serve", str(repos["captioner"]), "--port", "0", "--host", "0.0.0.0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        url = json.loads(process.stdout.readline())["url"].replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/models", headers={"host": "this.machine"}).status_code == 200
        assert process.stderr.readline() == (
            "warning: listening at 0.0.0.0: whoever can reach it can use the model, without a key\n"
        )
    finally:
        process.kill()
        process.communicate()
