"""What vlm-export serve offers beside the API: its page, pages of other origins, what it says of the model, a curl."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner
from exported import Exported, silent
from test_browser import WASM
from test_serve import COMMAND, NAME, RECIPE, Parts, Served, serving, shown

from vlm_export import pipeline
from vlm_export.apps.load import load
from vlm_export.apps.served import describe, is_verified, sample_request
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.verify.golden import load_golden
from vlm_export.web.chromium import drive
from vlm_export.web.listening import check_origin

ORIGIN = "https://example.org"
OTHER = "http://localhost:3000"
GOLDEN = load_golden(RECIPE.golden_dir.absolute())
CAPTION = GOLDEN.facts.images[0].caption


@pytest.fixture(scope="module")
def server(default_repo: Path) -> Iterator[Served]:
    with serving(default_repo, "--cors", ORIGIN, "--cors", OTHER) as served:
        yield served


@pytest.fixture(scope="module")
def picture() -> Parts:
    return shown(GOLDEN.image_paths()[0].read_bytes())


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The bundled recipe in fp32 and q8, of which ONNX Runtime's checks passed."""
    made = Exported(RECIPE, Work(tmp_path_factory.mktemp("verified")))
    pipeline.run_merge(RECIPE, made.work, silent)
    made.export("captioner", ["q8"])
    made.verify("ort")
    return made.work


def root(served: Served) -> str:
    return served.url.removesuffix("v1")


# The page


def test_the_page_loads_nothing_from_elsewhere(server: Served) -> None:
    page = httpx2.get(root(server))
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in {"page.js": "text/javascript", "style.css": "text/css"}.items():
        answer = httpx2.get(f"{root(server)}{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text and "https://" not in answer.text
    assert httpx2.get(f"{root(server)}page.py").status_code == 404
    assert httpx2.get(root(server), headers={"host": "attacker.example"}).status_code == 400


def test_the_page_captions_an_image_and_the_sample(server: Served) -> None:
    def answered(number: int) -> list[Any]:
        text = "document.getElementById('note').textContent"
        return ["waitForFunction", f"return /^\\d+ tokens in/.test({text}) && !document.querySelector('#ask').disabled"]

    answer = ["evaluate", "document.getElementById('answer').textContent"]
    facts = ["evaluate", "[document.title, document.getElementById('facts').textContent]"]
    chosen = ["setInputFiles", "#file", str(GOLDEN.image_paths()[1])]
    steps = [
        ["waitForFunction", "return document.getElementById('curl').textContent"],
        facts,
        chosen,
        ["click", "#ask"],
        answered(1),
        answer,
        ["click", "#sample"],
        answered(2),
        answer,
        ["evaluate", "document.getElementById('curl').textContent"],
    ]
    seen = drive(root(server), steps, WASM)
    assert [line for line in seen.console if line.startswith("error")] == seen.foreign == []
    (title, said), first, sample, line = seen.answers
    assert title == f"{NAME}: vlm-export serve"
    assert said == "captioner, in q8, on ONNX Runtime; not verified here."
    assert [first, sample] == [GOLDEN.facts.images[1].caption, CAPTION]
    assert pasted(line) == CAPTION


def test_the_page_says_what_the_server_refuses(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    steps = [
        ["waitForFunction", "return document.getElementById('curl').textContent"],
        ["setInputFiles", "#file", str(path)],
        ["click", "#ask"],
        ["waitForFunction", "return !document.getElementById('error').hidden"],
        ["evaluate", "document.getElementById('error').textContent"],
    ]
    [error] = drive(root(server), steps, WASM).answers
    assert "not a readable PNG, JPEG, WebP or GIF image" in error


# A line to paste


def pasted(line: str) -> str:
    """What comes of a line of a terminal: the text of the answer."""
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def test_the_line_that_is_printed_runs_as_pasted(default_repo: Path) -> None:
    command = [str(COMMAND), "serve", str(default_repo), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        where, announced, line = (process.stdout.readline().rstrip() for _ in range(3))
        assert where.startswith(f"{NAME} in q8 at http://127.0.0.1:") and where.endswith("/ (Ctrl-C stops it)")
        assert announced == "try it:"
        assert pasted(line) == CAPTION
    finally:
        process.kill()
        process.communicate()


def test_a_chat_models_sample_asks_a_question(default_repo: Path) -> None:
    model = load(default_repo, threads=1)
    assert [part["type"] for part in sample_request(model)["messages"][0]["content"]] == ["image_url"]
    model.engine.name, model.engine.fed_as = "of-no-recipe", "chat"
    image, text = sample_request(model)["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text == {"type": "text", "text": "What is in this image?"}


# Pages of other origins


def preflight(url: str, origin: str, headers: str = "authorization, content-type, x-stainless-os") -> httpx2.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers}
    return httpx2.options(f"{url}/chat/completions", headers=asked)


@pytest.mark.parametrize("origin", [ORIGIN, OTHER])
def test_an_origin_that_was_named_may_ask(origin: str, server: Served, picture: Parts) -> None:
    allowed = preflight(server.url, origin)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    body = {"model": NAME, "messages": [{"role": "user", "content": picture}]}
    for change, status in (({}, 200), ({"stream": True}, 200), ({"tools": [1]}, 400)):
        answer = httpx2.post(f"{server.url}/chat/completions", json=body | change, headers={"origin": origin})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin", ["https://example.org.evil", "http://example.org", "https://example.org:8443", "null"]
)
def test_no_other_origin_may(origin: str, server: Served) -> None:
    refused = preflight(server.url, origin)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    answer = httpx2.get(f"{server.url}/models", headers={"origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_without_the_option_no_origin_may(default_repo: Path) -> None:
    with serving(default_repo) as served:
        assert preflight(served.url, ORIGIN).status_code == 405
        answer = httpx2.get(f"{served.url}/models", headers={"origin": ORIGIN})
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "origin", ["https://example.org", "http://localhost:3000", "http://[::1]:8000", "chrome-extension://abcdefgh"]
)
def test_what_a_browser_sends_is_an_origin(origin: str) -> None:
    check_origin(origin)


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ("*", "would let every page that a browser opens use the model"),
        ("https://*.example.org", "is no origin: give one as https://example.org"),
        ("example.org", "is no origin"),
        ("", "is no origin"),
        ("null", "is no origin"),
        ("https://example.org/", "a browser calls that origin https://example.org$"),
        ("https://Example.org/page", "a browser calls that origin https://example.org$"),
        ("https://example.org:443", "a browser calls that origin https://example.org$"),
        ("http://localhost:80", "a browser calls that origin http://localhost$"),
    ],
)
def test_what_is_no_origin_is_told_before_the_model_loads(origin: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_origin(origin)
    done = CliRunner().invoke(main, ["serve", "no/such-repo", "--cors", origin])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --cors: ")


# What is said of the model


def test_models_say_what_is_served(server: Served, default_repo: Path) -> None:
    [model] = httpx2.get(f"{server.url}/models").json()["data"]
    created = int((default_repo / "config.json").stat().st_mtime)
    assert model == {
        "id": NAME,
        "object": "model",
        "created": created,
        "owned_by": "vlm-export",
        "dtype": "q8",
        "layout": "captioner",
        "backend": "onnx",
        "verified": None,
    }
    assert httpx2.get(f"{server.url}/models/{NAME}").json() == model


def test_what_was_verified_is_said_to_be(verified: Work) -> None:
    assert describe(load(verified.repo, dtype="q8", threads=1)).verified is True
    assert is_verified(verified.repo, "q4") is None


def test_what_is_not_as_it_was_verified_is_unknown(verified: Work, tmp_path: Path) -> None:
    work = Work(Path(shutil.copytree(verified.root, tmp_path / "work")))
    graph = work.repo / "onnx" / "decoder_model_merged_quantized.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert (is_verified(work.repo, "fp32"), is_verified(work.repo, "q8")) == (True, None)
    (work.report / "report.json").write_text("{}")
    assert is_verified(work.repo, "fp32") is None


def test_a_dtype_without_graphs_is_unknown_whatever_the_report_says(verified: Work, tmp_path: Path) -> None:
    work = Work(Path(shutil.copytree(verified.root, tmp_path / "work")))
    path = work.repo / "export.json"
    manifest = json.loads(path.read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["dtype"] != "fp32"]
    path.write_text(json.dumps(manifest))
    assert is_verified(work.repo, "fp32") is None


def test_what_failed_is_said_to_have(verified: Work, tmp_path: Path) -> None:
    work = Work(Path(shutil.copytree(verified.root, tmp_path / "work")))
    path = work.report / "report.json"
    report = json.loads(path.read_text())
    next(check for check in report["checks"] if check["dtype"] == "q8")["verdict"] = "fail"
    path.write_text(json.dumps(report))
    assert (is_verified(work.repo, "fp32"), is_verified(work.repo, "q8")) == (True, False)


def test_the_example_of_the_docs_runs(server: Served, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    shutil.copy(GOLDEN.image_paths()[0], tmp_path / "photo.jpg")
    script = code.replace("http://127.0.0.1:8000/v1", server.url)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, CAPTION), done.stderr
