"""The page that captions with an exported repo: as served, as a static site, and its server, asked by real clients.

In headless Chromium, with the bundled recipe and on WASM: what the page shows is what PyTorch says.
"""

from __future__ import annotations

import csv
import functools
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from exported import Exported, silent
from test_browser import RECIPE, WASM, Inputs, write_inputs
from test_js import PyTorch

from vlm_export import cli, pipeline
from vlm_export.apps import demo_site
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.preprocessing import load_tokenizer
from vlm_export.web import site_server
from vlm_export.web.chromium import drive
from vlm_export.web.listening import listen
from vlm_export.web.site_server import SiteServer

CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
Step = list[Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundled recipe as a captioner, in fp32 and q8."""
    exported = Exported(RECIPE, Work(tmp_path_factory.mktemp("work")))
    pipeline.run_merge(RECIPE, exported.work, silent)
    exported.export("captioner", ["q8"])
    return exported


@pytest.fixture(scope="module")
def repo(exported: Exported) -> Path:
    return exported.work.repo


@pytest.fixture(scope="module")
def site(repo: Path) -> site_server.Site:
    return demo_site.build(repo, RECIPE.golden_dir)


@pytest.fixture(scope="module")
def pytorch(exported: Exported) -> PyTorch:
    return PyTorch(exported)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Golden images of the model's size, which a browser need not resize."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), count=4)


# Steps in the page. In their JavaScript `$` finds an element by its id.

DOLLAR = "const $ = (id) => document.getElementById(id);"


def when(condition: str) -> Step:
    """Waits for it."""
    return ["waitForFunction", f"{DOLLAR} return {condition}"]


def ask(expression: str) -> Step:
    """Its value is an answer."""
    return ["evaluate", f"{{ {DOLLAR} {expression} }}"]


def do(statements: str) -> Step:
    """Without an answer."""
    return ["evaluateHandle", f"{{ {DOLLAR} {statements} }}"]


def status(words: str) -> Step:
    return when(f"$('status').textContent === '{words}'")


def upload(path: Path) -> Step:
    return ["setInputFiles", "#file", str(path)]


def give(event: str, path: Path) -> Step:
    """Paste or drop a file."""
    content = json.dumps(list(path.read_bytes()))
    file = f"new File([new Uint8Array({content})], '{path.name}', {{ type: 'image/png' }})"
    return do(
        f"const data = new DataTransfer(); data.items.add({file}); "
        f"document.body.dispatchEvent(new {event}: data, bubbles: true }}))"
    )


PASTE = "ClipboardEvent('paste', { clipboardData"
DROP = "DragEvent('drop', { dataTransfer"
CAPTION = ask("$('caption').textContent")
ERROR = ask("$('error').hidden ? '' : $('error').textContent")


def captioned(*action: Step) -> list[Step]:
    """The action, and the caption that comes of it."""
    return [do("$('status').textContent = ''"), *action, status("Done"), CAPTION]


def use(url: str, *steps: Step, flags: Sequence[str] = ()) -> list[Any]:
    """What the steps answer; nothing failed in the page, and it asked nobody else."""
    seen = drive(url, steps, [*WASM, *flags])
    assert [line for line in seen.console if line.startswith("error")] == []
    assert seen.foreign == []
    answers: list[Any] = seen.answers
    return answers


def beams(pytorch: PyTorch, path: Path, prompt: str = "", num_beams: int = 3) -> list[str]:
    """What PyTorch's `generate` says, the best beam first."""
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 30}
    made = pytorch.generate(pytorch.preprocessor.model_inputs(path, prompt), options)
    tokenizer = load_tokenizer(pytorch.checkpoint.path)
    return [str(tokenizer.decode(one["token_ids"], skip_special_tokens=True)).strip() for one in made]


# The page


def test_captions_are_pytorchs(pytorch: PyTorch, site: site_server.Site, inputs: Inputs) -> None:
    """Images that are uploaded, pasted and dropped; the text as it grows; another precision; beams."""
    first, second, third, fourth = (inputs.folder / image.file for image in inputs.images)
    with SiteServer(site) as server:
        *captions, seen, figures, others, (note, no_webgpu) = use(
            server.url,
            status("Ready"),
            do("window.seen = []; new MutationObserver(() => seen.push($('caption').textContent))"
               ".observe($('caption'), { childList: true })"),
            *captioned(upload(first)),
            *captioned(give(PASTE, second)),
            *captioned(give(DROP, third)),
            *captioned(["check", "input[name=dtype][value=fp32]"]),
            *captioned(upload(fourth)),
            *captioned(["check", "input[name=beams][value='3']"]),
            ask("seen"),
            ask("[$('first'), $('speed'), $('tokens')].map((figure) => figure.textContent)"),
            ask("[...document.querySelectorAll('#others li')].map((item) => item.firstChild.textContent)"),
            ask("[$('note').textContent, document.querySelector('input[value=webgpu]').disabled]"),
        )  # fmt: skip
    golden = [image.caption for image in inputs.images]
    best = beams(pytorch, fourth)
    assert captions == [golden[0], golden[1], golden[2], golden[2], golden[3], best[0]]
    assert others == best[1:]
    growing = [text for text in dict.fromkeys(seen) if text and golden[0].startswith(text)]
    assert len(growing) > 5, "no streaming"
    assert re.fullmatch(r"\d+ ms / [\d.]+ tok/s / \d+", " / ".join(figures))
    assert no_webgpu and note.startswith("No WebGPU: no graphics adapter.")
    assert graphs_fetched(server) == {
        f"/model/onnx/{name}{suffix}.onnx"
        for name in ("encoder_model", "decoder_model_merged")
        for suffix in ("", "_quantized")
    }


def graphs_fetched(server: SiteServer) -> set[str]:
    return {path for code, path in server.answers if code == 200 and path.startswith("/model/onnx/")}


def test_keyboard_and_camera(site: site_server.Site) -> None:
    """From the first Tab to a sample's caption, to more beams, to Stop; then a picture from the camera."""
    tab = ["keyboard.press", "Tab"]
    focus = ask("document.activeElement.id || document.activeElement.value || document.activeElement.firstChild?.alt")
    with SiteServer(site) as server:
        where_1, caption, said, where_2, with_beams, label, caption_2, seen, camera = use(
            server.url,
            status("Ready"),
            *[tab] * 5,  # drop, choose, camera, run
            focus,
            *captioned(["keyboard.press", "Enter"]),
            ask("$('reference').textContent"),
            *[tab] * (demo_site.MAX_SAMPLES + 2),  # the other samples, runtime, precision
            focus,
            *captioned(["keyboard.press", "ArrowRight"]),
            ["focus", "#run"],
            do("window.watch = new MutationObserver(() => $('caption').textContent && dispatchEvent(new KeyboardEvent("
               "'keydown', { key: 'Escape' }))); watch.observe($('caption'), { childList: true })"),
            ["keyboard.press", "Enter"],
            status("Stopped"),
            ask("$('run').textContent"),
            CAPTION,
            do("watch.disconnect()"),
            ["click", "#camera"],
            when("!$('video').hidden"),
            *captioned(["keyboard.press", "Enter"]),
            ask("[$('image').alt, $('image').naturalWidth > 300, $('video').srcObject]"),
            flags=CAMERA,
        )  # fmt: skip
    sample, *_ = json.loads(bytes_of(site["demo.json"]))["samples"]
    assert (where_1, where_2) == (sample["caption"], "1")
    assert caption == with_beams == sample["caption"] and said == "PyTorch says the same."
    assert label == "Caption" and caption_2 != caption and caption.startswith(caption_2)
    assert seen and camera == ["Picture from the camera", True, None]


def bytes_of(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def test_troubles_are_told(site: site_server.Site, tmp_path: Path) -> None:
    """No image, a file that is none, a graph that is gone; and what there is still works."""
    (tmp_path / "notes.txt").write_text("no image")
    gone = {**site, "model/onnx/encoder_model_quantized.onnx": tmp_path / "gone"}
    with SiteServer(gone) as server:
        seen = drive(
            server.url,
            [
                when("!$('error').hidden"),
                ERROR,
                ["check", "input[name=dtype][value=fp32]"],
                status("Ready"),
                ["click", "#run"],
                ERROR,
                upload(tmp_path / "notes.txt"),
                when("$('error').textContent.includes('notes.txt')"),
                ERROR,
                ["click", "#samples button"],
                status("Done"),
                ERROR,
            ],
            WASM,
        )
    missing, no_image, unreadable, nothing = seen.answers
    assert "encoder_model_quantized.onnx is not there" in missing and "Export the model again" in missing
    assert no_image.startswith("There is no image yet: choose one")
    assert unreadable == "The browser cannot read “notes.txt” as an image. Choose a PNG, JPEG, WebP or GIF file."
    assert nothing == ""


def test_chat(exported: Exported, pytorch: PyTorch, inputs: Inputs, tmp_path: Path) -> None:
    """A prompt box, and the answer to what is in it."""
    chat = Exported(RECIPE, Work(tmp_path))
    (tmp_path / "merged").symlink_to(exported.work.merged)
    chat.export("chat")
    image = inputs.folder / inputs.images[0].file
    with SiteServer(demo_site.build(chat.work.repo, tmp_path)) as server:
        silent_so_far, answer, dtypes, samples = use(
            server.url,
            status("Ready"),
            upload(image),
            ["fill", "#prompt", "a large"],
            CAPTION,
            *captioned(["keyboard.press", "Enter"]),
            ask("[...document.querySelectorAll('input[name=dtype]')].map(({ value }) => value)"),
            ask("$('samples').hidden"),
        )
    (expected,) = beams(pytorch, image, "a large", num_beams=1)
    assert silent_so_far == "" and answer == expected and answer
    assert dtypes == ["fp32"] and samples is True


def test_what_was_verified_is_said(repo: Path, tmp_path: Path) -> None:
    """On each dtype's button: as the report beside the repo has it, if that is about these graphs."""
    work = Work(tmp_path / "work")
    shutil.copytree(repo, work.repo)
    said = "[...document.querySelectorAll('#dtype span')].map((words) => words.lastChild.textContent)"

    def chips() -> list[str]:
        with SiteServer(demo_site.build(work.repo, None)) as server:
            return list(use(server.url, status("Ready"), ask(said))[0])

    assert chips() == ["not verified"] * 2
    work.report.mkdir()
    merged = repo.parent / "merged"
    (work.root / "merged").symlink_to(merged)
    Exported(RECIPE, work).verify("ort", dtypes=["q8"])
    assert chips() == ["not verified", "verified ✓ 20/20"]
    report = json.loads((work.report / "report.json").read_text())
    report["table"] = [row | {"verdict": row["verdict"] and "fail"} for row in report["table"]]
    (work.report / "report.json").write_text(json.dumps(report))
    assert chips() == ["not verified", "failed verification ✗ 20/20"]
    (work.repo / "onnx" / "encoder_model.onnx").write_bytes(b"another")
    assert demo_site.build(work.repo, None).keys()
    facts = json.loads(bytes_of(demo_site.build(work.repo, None)["demo.json"]))
    assert facts["verified"] == {}


def test_another_precision_does_not_fetch_the_runtime_again(site: site_server.Site) -> None:
    """Nor does a page that is loaded again; its size is told apart from the model's."""
    runtime = "/onnxruntime/ort-wasm-simd-threaded.asyncify.wasm"
    fp32 = ["check", "input[name=dtype][value=fp32]"]
    with SiteServer(site) as server:
        [told] = use(
            server.url,
            status("Ready"),
            do("$('status').textContent = ''"),
            fp32,
            status("Ready"),
            ["reload"],
            status("Ready"),
            ask("$('dtype-note').textContent"),
        )
        assert [path for _, path in server.answers].count(runtime) == 1
    assert told == "Sizes are the model's. The runtime is 26.9 MB more, once for all of them."


def test_results_stay_side_by_side(site: site_server.Site, inputs: Inputs) -> None:
    """Several images at once, each in two precisions; all of it as a table, which spreadsheets read."""
    files = [inputs.folder / image.file for image in inputs.images[:3]]
    captions = [image.caption for image in inputs.images[:3]]
    parts = "[...item.children].map((part) => part.textContent)"
    results = f"[...document.querySelectorAll('#results li')].map((item) => {parts})"
    watched = "URL.createObjectURL = (content) => { window.saved = content; return make(content) }"
    with SiteServer(site) as server:
        last, strip, again, of_last, of_first, saved = use(
            server.url,
            status("Ready"),
            do(f"const make = URL.createObjectURL; {watched}"),
            do("$('status').textContent = ''"),
            ["setInputFiles", "#file", [str(file) for file in files]],
            when("document.querySelectorAll('#pictures button')[2]?.ariaPressed === 'true'"),
            status("Done"),
            CAPTION,
            ask("[...document.querySelectorAll('#pictures img')].map(({ alt }) => alt)"),
            *captioned(["check", "input[name=beams][value='3']"]),
            ask(results),
            ["click", "#pictures li:first-child button"],
            when("$('image').alt === '" + files[0].name + "'"),
            ask(results),
            ["click", "#csv"],
            ask("saved.text()"),
        )
    assert last == captions[2] and strip == [file.name for file in files]
    [greedy, of_beams] = of_last
    assert greedy[:2] == ["q8 · WASM", captions[2]] and of_beams[:2] == ["q8 · WASM · 3 beams", again]
    assert re.fullmatch(r"[\d.]+ tok/s · score -\d\.\d{3}", of_beams[2]) and "score" not in greedy[2]
    assert [row[1] for row in of_first] == captions[:1]
    rows = list(csv.DictReader(saved.removeprefix("\ufeff").splitlines()))
    assert [(row["image"], row["text"], row["num_beams"]) for row in rows] == [
        (files[0].name, captions[0], "1"),
        (files[1].name, captions[1], "1"),
        (files[2].name, captions[2], "1"),
        (files[2].name, again, "3"),
    ]
    assert {row["model"] for row in rows} == {"shapes-captioner"} and float(rows[-1]["score"]) < 0


def test_copy_and_share(site: site_server.Site) -> None:
    """Chromium has no share dialog here: what the page would hand to one is looked at."""
    dialog = "navigator.share = async (data) => { window.shared = data }; navigator.canShare = () => true;"
    with SiteServer(site) as server:
        caption, button, copied, shared = use(
            server.url,
            ["addInitScript", {"content": dialog}],
            ["_browserContext.grantPermissions", ["clipboard-read", "clipboard-write"]],
            ["reload"],
            status("Ready"),
            *captioned(["click", "#samples button"]),
            ["click", "#copy"],
            when("$('copy').textContent === 'Copied'"),
            ask("$('copy').textContent"),
            ask("navigator.clipboard.readText()"),
            ["click", "#share"],
            when("window.shared"),
            ask("[shared.title, shared.text, shared.files[0].type]"),
        )
    assert caption and (button, copied) == ("Copied", caption)
    assert shared == ["shapes-captioner", caption, "image/png"]


def test_the_code_runs(site: site_server.Site, inputs: Inputs) -> None:
    """A page of one's own beside the site's files, without a word from another server."""
    with SiteServer(site) as server:
        [code] = use(server.url, status("Ready"), ask("document.querySelector('#code code').textContent"))
    photo = inputs.folder / inputs.images[0].file
    mine = {**site, "mine.html": code.encode(), "photo.jpg": photo, "favicon.ico": b""}
    headers = {name: value for name, value in site_server.HEADERS.items() if name != "Content-Security-Policy"}
    with SiteServer(mine, headers) as server:
        [said] = use(f"{server.url}/mine.html", when("!/^Loading/.test($('caption').textContent)"), CAPTION)
    assert said == inputs.images[0].caption


def test_links(repo: Path) -> None:
    """To the repo, and to every licence."""
    listed = "[...document.querySelectorAll('#licences li')]"
    home = demo_site.Home("org/model", "https://huggingface.co/org/model")
    with SiteServer(demo_site.build(repo, None, home=home)) as server:
        home_link, code, licences = use(
            server.url,
            status("Ready"),
            ask("[$('home').href, $('home').textContent]"),
            ask("document.querySelector('#code code').textContent.includes(\"from_pretrained('org/model'\")"),
            ask(f"{listed}.map((item) => [item.textContent, item.firstChild.href])"),
        )
        assert home_link == ["https://huggingface.co/org/model", "org/model"] and code
        assert [words for words, _ in licences] == [
            "the model: apache-2.0",
            "vlm-export: Apache-2.0",
            "transformers.js: Apache-2.0",
            "ONNX Runtime: MIT",
        ]
        for _, address in licences[1:]:
            assert get(server, address.removeprefix(server.url)).status == 200


def test_true_causes(site: site_server.Site, tmp_path: Path) -> None:
    """A link that is dropped, words that are, and images among which one is none."""
    (tmp_path / "notes.txt").write_text("no image")
    image = next(RECIPE.golden_dir.glob("images/*.png")).absolute()

    def dropped(kind: str, text: str) -> Step:
        return do(
            f"const data = new DataTransfer(); data.setData('{kind}', '{text}'); "
            f"document.body.dispatchEvent(new {DROP}: data, bubbles: true }}))"
        )

    with SiteServer(site) as server:
        steps = [
            status("Ready"),
            dropped("text/uri-list", "https://example.org/cat.jpg"),
            when("!$('error').hidden"),
            ERROR,
            dropped("text/plain", "words"),
            when("/no file/.test($('error').textContent)"),
            ERROR,
            *captioned(["setInputFiles", "#file", [str(tmp_path / "notes.txt"), str(image)]]),
            ERROR,
        ]
        link, words, _, mixed = drive(server.url, steps, WASM).answers
    assert link.startswith(
        "That was the address of an image (https://example.org/cat.jpg), which this page does not fetch"
    )
    assert words == "There was no file in what you dropped. Drop an image file, or choose one."
    assert mixed == "The browser cannot read “notes.txt” as an image. Choose a PNG, JPEG, WebP or GIF file."


def test_a_server_that_stopped(site: site_server.Site) -> None:
    """For a precision that is not loaded yet, and for a sample."""
    server = SiteServer(site)
    with server:
        steps = [
            status("Ready"),
            ["evaluate", "fetch('stop').then(() => 0, () => 0)"],
            when("fetch('demo.json', { cache: 'no-store' }).then(() => false, () => true)"),
            ["check", "input[name=dtype][value=fp32]"],
            when("!$('error').hidden"),
            ERROR,
            do("$('error').hidden = true"),
            ["click", "#samples button"],
            when("!$('error').hidden"),
            ERROR,
        ]
        watch = threading.Thread(target=stop_when_asked, args=(server,), daemon=True)
        watch.start()
        _, precision, sample = drive(server.url, steps, WASM).answers
    assert precision == sample == "The server of this page has stopped. Run `vlm-export demo` again, then try again."


def stop_when_asked(server: SiteServer) -> None:
    while not any(path == "/stop" for _, path in server.answers):
        time.sleep(0.05)
    server.__exit__(None, None, None)


def test_without_https(site: site_server.Site, tmp_path: Path) -> None:
    """What browsers keep from such a page is said, and why. A name that leads to this machine is any other to them."""
    demo_site.export(site, tmp_path / "www")
    flags = ["--host-resolver-rules=MAP lan.example 127.0.0.1"]
    with plain_host(tmp_path / "www") as (url, _):
        told, camera = use(
            url.replace("127.0.0.1", "lan.example"),
            when("$('note').textContent"),
            ask("$('note').textContent"),
            ask("$('camera').title"),
            flags=flags,
        )
    assert told.startswith("No WebGPU: browsers have it only on https, or from this machine.")
    assert "more need https and headers" in told
    assert camera == "The browser gives a camera only to pages on https or on this machine"


# The static site


def test_static_site_below_a_path(repo: Path, inputs: Inputs, tmp_path: Path) -> None:
    """On a host that knows nothing of it: no headers, so one thread, and the page says so. Twice: from the cache."""
    site = demo_site.build(repo, RECIPE.golden_dir, cached=True)
    demo_site.export(site, tmp_path / "www" / "project")
    image = inputs.folder / inputs.images[0].file
    with plain_host(tmp_path / "www") as (url, asked):
        told, caption, again, note = use(
            f"{url}/project/",
            status("Ready"),
            ERROR,
            *captioned(upload(image)),
            ["reload"],
            status("Ready"),
            *captioned(upload(image)),
            ask("$('note').textContent"),
        )
    assert told == "" and caption == again == inputs.images[0].caption
    assert note.endswith("WASM: 1 thread; more need headers (COOP, COEP) that this site does not send.")
    assert {path.split("/")[1] for path in asked} == {"project"}
    assert asked.count("/project/model/onnx/encoder_model_quantized.onnx") == 1


@contextmanager
def plain_host(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Python's own web server, and the paths that it is asked for in full."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: Any = 0, size: Any = 0) -> None:
            if "Range" not in self.headers:
                asked.append(self.path)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as host:
        host.daemon_threads, host.block_on_close = True, False
        threading.Thread(target=host.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{host.server_port}", asked
        finally:
            host.shutdown()


def test_export_writes_what_is_needed(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "site"
    result = run("demo", str(repo), "--export", str(target), "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)["files"]
    assert written == sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert {"index.html", "README.md", ".nojekyll", "licenses/onnxruntime.txt", "model/config.json"} <= set(written)
    assert not {"model/README.md", "model/recipe.yaml"} & set(written)
    front, text = (target / "README.md").read_text().split("---\n")[1:]
    assert "sdk: static" in front and "  cross-origin-embedder-policy: require-corp\n" in front
    assert text.strip().startswith("# shapes-captioner")
    for name in ("index.html", "style.css", "app.js", "worker.js"):  # no address but relative ones
        assert not re.search(r"""["'(](/|https?:)""", (target / name).read_text()), name

    (target / "index.html").write_text("damaged")
    assert run("demo", str(repo), "--export", str(target)).exit_code == 0, "its own folder is written again"
    assert "damaged" not in (target / "index.html").read_text()

    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("ref: refs/heads/main")
    refused = run("demo", str(repo), "--export", str(target))
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: {target}: holds .git/HEAD, which `vlm-export demo --export` did not write: "
        "choose a new or empty folder\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "is the current folder" in run("demo", str(repo), "--export", ".").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"], "nothing half-written is left"


# The server


@dataclass(frozen=True)
class Response:
    """What a server answered, all of it read."""

    status: int
    headers: Message
    body: bytes


def get(server: SiteServer, path: str, method: str = "GET", **headers: str) -> Response:
    """A request as it stands: no client mends the path."""
    port = int(server.url.rpartition(":")[2])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())


def test_server_answers(site: site_server.Site, repo: Path) -> None:
    graph = (repo / "onnx" / "encoder_model.onnx").read_bytes()
    with SiteServer(site) as server:
        whole = get(server, "/model/onnx/encoder_model.onnx")
        assert whole.status == 200 and whole.body == graph
        assert whole.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert whole.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        head = get(server, "/model/onnx/encoder_model.onnx", "HEAD")
        assert head.body == b"" and head.headers["Content-Length"] == str(len(graph))
        part = get(server, "/model/onnx/encoder_model.onnx", Range="bytes=100-199")
        assert part.status == 206 and part.body == graph[100:200]
        assert part.headers["Content-Range"] == f"bytes 100-199/{len(graph)}"
        assert get(server, "/model/onnx/encoder_model.onnx", Range=f"bytes={len(graph)}-").status == 416
        for path, kind in {
            "/": "text/html; charset=utf-8",
            "/app.js": "text/javascript; charset=utf-8",
            "/onnxruntime/ort-wasm-simd-threaded.asyncify.mjs": "text/javascript; charset=utf-8",
            "/onnxruntime/ort-wasm-simd-threaded.asyncify.wasm": "application/wasm",
            "/demo.json": "application/json",
            "/style.css": "text/css; charset=utf-8",
            "/samples/00.png": "image/png",
        }.items():
            assert get(server, path, "HEAD").headers["Content-Type"] == kind
        assert get(server, "/index.html", "POST").status == 405
        assert get(server, "/", Host="example.org").status == 400


def test_nothing_else_is_reachable(repo: Path, tmp_path: Path) -> None:
    """Whatever is beside the repo, and whatever a link in it points to."""
    copy = tmp_path / "repo"
    demo_copy(repo, copy)
    (tmp_path / "secret.json").write_text("{}")
    (copy / "staying.json").symlink_to(copy / "config.json")
    (copy / ".hidden.json").write_text("{}")
    (copy / ".git").mkdir()
    (copy / ".git" / "config.json").write_text("{}")
    (copy / "leaving.json").write_text("{}")
    site = demo_site.build(copy, tmp_path)
    with SiteServer(site) as server:
        (copy / "leaving.json").unlink()
        (copy / "leaving.json").symlink_to(tmp_path / "secret.json")
        with pytest.raises(InputError, match=r"leaving\.json: a link that leads out of repo"):
            demo_site.build(copy, tmp_path)
        assert get(server, "/model/staying.json").status == 200
        for path in (
            "/model/missing.json", "/model/leaving.json", "/model/.hidden.json", "/model/.git/config.json", "/model",
            "/model/", "/model/onnx/", "/secret.json", "/../secret.json", "/model/../../secret.json",
            "/model/%2e%2e/%2e%2e/secret.json", "/model/..%2f..%2fsecret.json", "/model/..%5c..%5csecret.json",
            "/model/%252e%252e/secret.json", f"/{tmp_path}/secret.json", f"/model/{tmp_path}/secret.json",
            "//etc/passwd", "/model/config.json%00", "/model/README.md", "/site_server.py", "/../site_server.py",
        ):  # fmt: skip
            assert get(server, path).status == 404, path


def demo_copy(repo: Path, copy: Path) -> None:
    """Its small files, and empty graphs."""
    (copy / "onnx").mkdir(parents=True)
    for path in repo.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(repo)).write_bytes(path.read_bytes() if path.suffix == ".json" else b"")


def test_hub_snapshot(repo: Path, tmp_path: Path) -> None:
    """In the Hub's cache a repo is links to blobs beside it."""
    cached = tmp_path / "models--org--model"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / "0123abc"
    (snapshot / "onnx").mkdir(parents=True)
    for index, path in enumerate(path for path in repo.rglob("*") if path.is_file()):
        blob = cached / "blobs" / str(index)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.relative_to(repo)).symlink_to(blob)
    assert demo_site.build(snapshot, tmp_path).keys() == demo_site.build(repo, tmp_path).keys()


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_command_serves_until_it_is_interrupted(repo: Path, tmp_path: Path) -> None:
    """It prints the address, loads no torch, and ends quietly."""
    code = "import sys; from vlm_export.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, "demo", str(repo), "--no-open", "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(arguments, **pipes, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ captions with ", process.stdout.readline())
        assert found
        with closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)) as connection:
            connection.request("GET", "/")
            assert b"<title>" in connection.getresponse().read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "False\n", "")


def test_opens_the_browser(site: site_server.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda url: url.startswith("http://127.0.0.1:") and opened.set())
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: opened.wait(5))
    with listen(0) as listening:
        site_server.serve(site, listening, open_browser=True)
    assert opened.is_set()


def test_port_in_use(repo: Path) -> None:
    with listen(0) as listening:
        port = listening.getsockname()[1]
        result = run("demo", str(repo), "--port", str(port), "--no-open")
    assert result.exit_code == 2
    assert result.stderr == f"error: 127.0.0.1:{port}: Address already in use: choose another with --port\n"


def test_nothing_exported_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("demo", "shapes-captioner", "--no-open")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: build/shapes-captioner/repo: nothing exported yet: run `vlm-export merge shapes-captioner`, "
        "then `vlm-export onnx shapes-captioner`\n"
    )
    (tmp_path / "repo" / "onnx").mkdir(parents=True)
    (tmp_path / "repo" / "config.json").write_text("{}")
    assert "export.json: missing, so this is no repo of vlm-export's" in run("demo", "repo", "--no-open").stderr


def test_samples_say_only_what_was_recorded_of_this_model(repo: Path, tmp_path: Path) -> None:
    facts = json.loads(bytes_of(demo_site.build(repo, RECIPE.golden_dir)["demo.json"]))
    assert all(sample["caption"] for sample in facts["samples"]) and len(facts["samples"]) == demo_site.MAX_SAMPLES
    demo_copy(repo, tmp_path / "repo")
    manifest = json.loads((repo / "export.json").read_text())
    (tmp_path / "repo" / "export.json").write_text(json.dumps(manifest | {"inputs_sha256": {"model": "another"}}))
    facts = json.loads(bytes_of(demo_site.build(tmp_path / "repo", RECIPE.golden_dir)["demo.json"]))
    assert {sample["caption"] for sample in facts["samples"]} == {None}
