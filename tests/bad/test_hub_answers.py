"""What a Hub that is none answers, such as the login page of a hotel: one line that names where it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import TOKEN, configure
from huggingface_hub import close_session

from vlm_export import hub
from vlm_export.cli import main
from vlm_export.errors import InputError

HTML = b"<!DOCTYPE html><html><body>Welcome to the hotel! Log in.</body></html>"
ANSWERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "a login page": (200, HTML, {"Content-Type": "text/html"}),
    "nothing": (200, b"", {}),
    "an object": (200, b"{}", {}),
    "a list": (200, b"[]", {}),
    "a list of numbers": (200, b"[5]", {}),
    "null": (200, b"null", {}),
    "a text": (200, b'"hello"', {}),
    "a number": (200, b"5", {}),
    "half of an object": (200, b'{"sha": "', {}),
    "no UTF-8": (200, b"\x80\x81", {}),
    "deep": (200, b"[" * 100_000, {}),
    "ids that are none": (200, b'{"sha": 5, "id": [], "name": null, "siblings": 7, "private": "x"}', {}),
    "another key": (200, b'{"error": "no"}', {}),
    "a conflict without an address": (409, b"{}", {}),
    "a redirect to itself": (302, b"", {"Location": "/"}),
    "a redirect to nowhere": (302, b"", {}),
    "a teapot": (418, HTML, {}),
    "not found, in HTML": (404, HTML, {}),
    "forbidden": (403, HTML, {}),
    "an error of two lines": (400, b'{"error": "one\\ntwo"}', {}),
    "a long error": (400, b'{"error": "' + b"x" * 5000 + b'"}', {}),
}


@contextmanager
def answering(status: int, body: bytes, headers: dict[str, str]) -> Iterator[str]:
    """A server that answers everything so; its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_POST = do_HEAD = do_PUT = answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("answer", ANSWERS)
def test_it_is_told_in_one_line(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with answering(*ANSWERS[answer]) as url:
        configure(monkeypatch, url, tmp_path / "home", TOKEN)
        calls = {
            "user": hub.user_name,
            "files": lambda: hub.list_files("org/model"),
            "download": lambda: hub.download("org/model", allow_patterns=["config.json"]),
            "plan": lambda: hub.plan_push("org/model", folder),
            "push": lambda: hub.push_folder("org/model", folder, message="x"),
            "tensors": lambda: hub.tensors_of("org/model", "model.safetensors", revision="0" * 40),
        }
        said = {}
        for name, call in calls.items():
            try:
                call()
            except InputError as error:
                said[name] = str(error)
            else:
                said[name] = "nothing"
        done = CliRunner().invoke(main, ["doctor", "org/model"])
        close_session()
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()[-1]) < 300, done.output
    assert {name for name, line in said.items() if TOKEN in line} == set()
    quiet = {name for name, line in said.items() if line == "nothing"}
    assert quiet <= {"plan"}, said  # an empty tree is one
