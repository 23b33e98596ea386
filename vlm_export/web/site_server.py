"""Serves a site on the loopback interface: a fixed set of files under their addresses, and 404 for everything else.

The address of a request is looked up in that set. It never becomes a path, so it cannot lead out of the site.
"""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from mimetypes import guess_type
from pathlib import Path, PurePosixPath
from types import TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_export.web.connections import Patience, patient
from vlm_export.web.listening import LOOPBACK, listen, url_of

Site = Mapping[str, Path | bytes]  # address without its leading slash → a file, or what it holds

INDEX = "index.html"
# Without them WASM has one thread.
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The policy keeps the page off every other server; `blob:` is for pictures, and for the runtime's loader, which
# transformers.js imports from memory.
HEADERS = {
    **ISOLATION,
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; connect-src 'self' blob:; "
        "img-src 'self' blob: data:; media-src 'self' blob:; worker-src 'self' blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# A browser runs no module of another type, and what `mimetypes` says is up to the machine.
_MODULE_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}

# A page that makes a session of one graph reads nothing of the next one meanwhile, which can take minutes.
READERS = Patience(write=600)


def files_under(folders: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """A site of these folders' files; the keys are addresses that begin and end with a slash."""
    return {
        f"{prefix}{path.relative_to(folder).as_posix()}".removeprefix("/"): path
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }


def application(site: Site, headers: Mapping[str, str] = HEADERS) -> Starlette:
    """Answers GET and HEAD for the site's addresses, also for ranges of bytes, if they are sent to this machine.

    What has become a link to another file since is not there any more.
    """
    places = {address: os.path.realpath(content) for address, content in site.items() if isinstance(content, Path)}

    async def answer(request: Request) -> Response:
        address = request.path_params["address"] or INDEX
        content = site.get(address)
        if isinstance(content, bytes):
            return Response(content, headers=headers, media_type=_media_type(address))
        if content is None or os.path.realpath(content) != places[address] or not content.is_file():
            raise HTTPException(404)
        return FileResponse(content, headers=headers, media_type=_media_type(address))

    # A name of somebody else's that points to this machine does not make their page this one's origin.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    return Starlette(routes=[Route("/{address:path}", answer)], middleware=[hosts])


def _media_type(address: str) -> str:
    known = _MODULE_TYPES.get(PurePosixPath(address).suffix)
    return known or guess_type(address)[0] or "application/octet-stream"


def server(app: ASGIApp, patience: Patience = READERS) -> uvicorn.Server:
    """A server that logs nothing but its own failures; `run(sockets=[…])` returns after SIGINT or SIGTERM."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=patient(patience),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )


def serve(site: Site, listening: socket.socket, *, open_browser: bool) -> None:
    """Serve until Ctrl-C."""
    if open_browser:  # not here: a browser in the terminal would keep the server from answering it
        threading.Thread(target=webbrowser.open, args=(url_of(listening),), daemon=True).start()
    with suppress(KeyboardInterrupt):
        server(application(site)).run(sockets=[listening])


class SiteServer:
    """Serves a site in a thread, for as long as its context lasts.

    Attributes:
        answers: status and path of every answer so far.
    """

    def __init__(self, site: Site, headers: Mapping[str, str] = HEADERS):
        self.answers: list[tuple[int, str]] = []
        self._app = application(site, headers)
        self._listening = listen(0)
        self._server = server(self._answer)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)

    @property
    def url(self) -> str:
        """The address of the site's root, without a slash at the end."""
        return url_of(self._listening).removesuffix("/")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((message["status"], scope["path"]))
            await send(message)

        await self._app(scope, receive, recorded)

    def __enter__(self) -> SiteServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()
