"""A web server on the loopback interface: folders under URL prefixes, 404 for the rest, and a record of the answers.

Pages are cross-origin isolated, which WASM threads need.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
}
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".png": "image/png",
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, folders: Mapping[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = dict(sorted(folders.items(), key=lambda item: len(item[0]), reverse=True))
        self.answers: list[tuple[int, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that is closed while it loads is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    extensions_map = CONTENT_TYPES
    server: _Server

    def translate_path(self, path: str) -> str:
        url = urlsplit(path).path
        prefix = next((prefix for prefix in self.server.folders if url.startswith(prefix)), None)
        if prefix is None:
            return ""
        self.directory = str(self.server.folders[prefix])
        return super().translate_path(url.removeprefix(prefix))

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_request(self, code: Any = 0, size: Any = 0) -> None:
        self.server.answers.append((int(code), urlsplit(self.path).path))

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests look at `StaticServer.answers`."""


class StaticServer:
    """The running server; of the prefixes in `folders` that a path has, the longest counts."""

    def __init__(self, folders: Mapping[str, Path]):
        self._server = _Server(folders)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def answers(self) -> list[tuple[int, str]]:
        """Status and path of every answer so far."""
        return self._server.answers

    def __enter__(self) -> StaticServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
