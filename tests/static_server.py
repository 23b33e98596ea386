"""The product's web server in a thread: folders under URL prefixes, 404 for the rest, and a record of the answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from vlm_export.apps import demo_server
from vlm_export.apps.demo_server import Site
from vlm_export.apps.listening import listen, url_of


def files_under(folders: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """A site of these folders' files; the keys begin and end with a slash."""
    return {
        f"{prefix}{path.relative_to(folder).as_posix()}".removeprefix("/"): path
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }


class StaticServer:
    """The running server of a site, with the product's headers unless others are given."""

    def __init__(self, site: Site, headers: Mapping[str, str] = demo_server.HEADERS):
        self.answers: list[tuple[int, str]] = []  # status and path of every answer so far
        self._app = demo_server.application(site, headers)
        self._listening = listen(0)
        self._server = demo_server.server(self._answer)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)

    @property
    def url(self) -> str:
        return url_of(self._listening).removesuffix("/")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((message["status"], scope["path"]))
            await send(message)

        await self._app(scope, receive, recorded)

    def __enter__(self) -> StaticServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()
