"""Requests that a server refuses: 4xx and one line, never 500, and the next one is answered as if nothing had been."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bad.requests import asking, picture, post, said, served, url
from vlm_export.runtime import Model

BODIES: dict[str, Any] = {
    "empty": b"",
    "half": b'{"model":',
    "no UTF-8": b"\x80\x81",
    "a list": [],
    "null": None,
    "a text": "x",
    "a number": 5,
    "deep": b'{"a":' * 100_000,
    "digits": b'{"model": ' + b"1" * 100_000 + b"}",
    "NaN": b'{"model": NaN}',
    "no keys": {},
    "no messages": {"model": "repo"},
    "empty messages": {"model": "repo", "messages": []},
    "messages null": {"model": "repo", "messages": None},
    "a message that is a text": {"model": "repo", "messages": ["x"]},
    "no content": {"model": "repo", "messages": [{"role": "user"}]},
    "another role": said("x") | {"messages": [{"role": "root", "content": "x"}]},
    "another model": asking() | {"model": "other"},
    "model is a number": asking() | {"model": 5},
    "a long model": asking() | {"model": "m" * 100_000},
    "text for a captioner": said("what is it?"),
    "nothing": said(""),
    "no parts": said([]),
    "a part without a type": said([{}]),
    "a part of another type": said([{"type": "input_audio", "input_audio": {}}]),
    "a part of two kinds": said([{"type": "text", "text": "x", "image_url": {"url": url()}}]),
    "17 images": said([{"type": "image_url", "image_url": {"url": url()}}] * 17),
    "two images": said([{"type": "image_url", "image_url": {"url": url()}}] * 2),
    "an image of the system": {
        "model": "repo",
        "messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": url()}}]}],
    },
    "detail high": said([{"type": "image_url", "image_url": {"url": url(), "detail": "high"}}]),
    "url null": asking(None),
    "url number": asking(5),
    "url empty": asking(""),
    "http": asking("http://127.0.0.1/secret"),
    "https": asking("https://example.org/x.png"),
    "file": asking("file:///etc/passwd"),
    "a path": asking("/etc/passwd"),
    "another type": asking("data:text/plain;base64,QQ=="),
    "svg": asking("data:image/svg+xml;base64,QQ=="),
    "not base64": asking("data:image/png;base64,!!!!"),
    "no ASCII": asking("data:image/png;base64,é"),
    "surrogate": json.dumps(asking("data:image/png;base64,X")).replace("X", "\\ud800").encode(),
    "no image": asking(url(b"hello")),
    "no bytes": asking(url(b"")),
    "half an image": asking(url(picture()[:60])),
    "a header alone": asking(url(picture()[:33])),
    "half a JPEG": asking(url(picture(form="JPEG")[:150], "jpeg")),
    "half a GIF": asking(url(picture(form="GIF")[:20], "gif")),
    "half a WebP": asking(url(picture(form="WEBP")[:20], "webp")),
    "a TIFF": asking(url(picture(form="TIFF"))),
    "too many pixels": asking(url(picture(7000, 6000, mode="1"))),
    **{
        f"{name} = {json.dumps(value):.40}": asking(**{name: value})
        for name, values in {
            "max_tokens": (0, -1, "5", 1.5, 10**6, 10**9, 10**30, True, []),
            "max_completion_tokens": (0, 10**9),
            "temperature": (-1, 3, "x", 1e-320, [], True),
            "top_p": (0, 1.5, -1, "x"),
            "seed": (-1, 1.5, "x", 2**70),
            "n": (0, 17, -1, "x"),
            "stop": (5, [5], [""], ["a"] * 5, {}),
            "stream": ("x", 5),
            "stream_options": (5, {"x": 1}),
            "num_beams": (0, 17, 10**6, "x"),
            "length_penalty": ("x", []),
            "early_stopping": ("x", 5),
            "top_k": (-1, "x"),
            "repetition_penalty": (0, -1, 1e300, "x"),
            "no_repeat_ngram_size": (-1, "x"),
            "min_new_tokens": (-1, 10**6, "x"),
            "logit_bias": ({"5": 1},),
            "tools": ([{"type": "function"}],),
            "response_format": ({"type": "json_object"},),
            "unknown": (1,),
        }.items()
        for value in values
    },
    "beams and a penalty": asking(num_beams=2, length_penalty=1e308),
    "beams and a small penalty": asking(num_beams=2, length_penalty=-1e308),
    "two limits": asking(max_tokens=1, max_completion_tokens=2),
    "n and stream": asking(n=2, stream=True),
    "twice a key": b'{"model": "repo", "model": "other", "messages": []}',
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return served(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("name", BODIES)
def test_a_request_is_refused(name: str, model: Model) -> None:
    body = BODIES[name]
    status, answer = post(model, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status in (400, 404, 413, 415), answer
    message = answer["error"]["message"]
    assert len(message) < 300 and "\n" not in message and "Traceback" not in message
    assert model.backend == "onnx"


def test_the_next_one_is_answered(model: Model) -> None:
    status, answer = post(model, json.dumps(asking()).encode())
    assert status == 200 and answer["choices"][0]["message"]["content"]


def test_pixels_of_noise_are_answered_too(model: Model, tmp_path: Path) -> None:
    """The largest and the smallest pictures that are taken."""
    noise = np.random.default_rng(0).integers(0, 255, (1, 4000, 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(noise).save(made, "PNG")
    for data in (picture(1, 1), made.getvalue()):
        assert post(model, json.dumps(asking(url(data))).encode())[0] == 200
