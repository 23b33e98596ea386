"""An OpenAI-style server for one exported repo: `/v1/chat/completions`, `/v1/models`, `/health`, and a page at `/`.

A request's body is read up to a limit, in size and in time. Then it takes a place: some are answered, some wait, and
one that finds no place gets a 429. It is parsed (`openai_format.py`), and the model answers in a worker thread. A
client that disconnects cancels its answer; one that neither sends nor reads is disconnected (`web/connections.py`).
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import anyio
import uvicorn
from anyio import from_thread, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlm_export import __version__
from vlm_export.apps.openai_format import ApiError, ChatRequest, Completion, parse, question, refused
from vlm_export.apps.served import describe, routes
from vlm_export.errors import InputError
from vlm_export.runtime import Answer, Model
from vlm_export.runtime.model import ModelFailed
from vlm_export.web.connections import Patience, patient
from vlm_export.web.listening import HOST, LOOPBACK, listen, url_of

_LOG = logging.getLogger("uvicorn.error")
_LAST_SECONDS = 5  # that answers get to end when the server is stopped


@dataclass(frozen=True)
class Limits:
    """What one server takes: bytes of a body, requests at work, requests that wait for that, and bodies that arrive."""

    body_bytes: int = 20_000_000
    concurrency: int = 1
    queue: int = 16
    arriving: int = 16
    patience: Patience = field(default_factory=Patience)


def serve(
    model: Model,
    limits: Limits = Limits(),
    *,
    host: str = HOST,
    port: int = 8000,
    origins: Sequence[str] = (),
    ready: Callable[[str], None],
) -> None:
    """Serve a model until the process is told to stop. `ready` is given its address, with a slash at the end.

    Pages of `origins` may use it, too; of others only those of its own.

    Raises:
        InputError: the address cannot be listened at.
    """
    with listen(port, host) as listener:
        running = server(model, limits, hosts=_hosts(host), origins=origins, log=_logging())
        ready(url_of(listener, host))
        with suppress(KeyboardInterrupt):
            running.run([listener])


def server(
    model: Model,
    limits: Limits,
    *,
    hosts: list[str] | None = None,
    origins: Sequence[str] = (),
    log: dict[str, Any] | None = None,
) -> uvicorn.Server:
    """A server, whose `run` takes listening sockets; `log` are logging's settings, None for those that there are."""
    made = uvicorn.Server(
        uvicorn.Config(
            application(model, limits, hosts=hosts, origins=origins, stopping=lambda: made.should_exit),
            http=patient(limits.patience),
            log_config=log,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
    )
    return made


def application(
    model: Model,
    limits: Limits,
    *,
    hosts: list[str] | None = None,
    origins: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The server's ASGI application. `hosts` are the names under which it may be addressed, `origins` whose pages."""
    answering = _Answering(model, limits, stopping)
    described = asdict(describe(model))

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    async def one_model(request: Request) -> Response:
        if request.path_params["id"] != model.name:
            raise ApiError(404, f"no such model: this server has {model.name!r}", code="model_not_found")
        return JSONResponse(described)

    async def health(_: Request) -> Response:
        state = {"status": "ok", "model": model.name, "dtype": model.dtype, "backend": model.backend}
        return JSONResponse(state | {"running": answering.running, "waiting": answering.waiting})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", answering, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", one_model),
            Route("/health", health),
            *routes(model),
        ],
        # A page of another site that has its name resolved to this machine is refused by the name it asks for.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), *_cors(origins)],
        exception_handlers={
            ApiError: lambda _, error: _error(error),
            HTTPException: lambda request, error: _error(ApiError(error.status_code, _no_such(request)), error.headers),
            Exception: lambda _, __: _error(ApiError(500, "the server failed; its log says how")),
        },
    )


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """What answers the preflights of these origins' pages, and lets them read answers; nothing without any."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,  # some browsers ask for that of a page of the internet, and want an answer
        )
    ]


@dataclass(eq=False)
class _Arriving:
    """A body that arrives: what of it is here, and until when the next piece is waited for."""

    begun: float
    heard: float
    scope: anyio.CancelScope
    body: bytearray = field(default_factory=bytearray)


class _Arrivals:
    """Bodies that arrive, at most so many. One that has paused longest gives its place up to another."""

    def __init__(self, most: int, patience: Patience):
        self._most = most
        self._patience = patience
        self._present: list[_Arriving] = []

    @contextmanager
    def arriving(self) -> Iterator[_Arriving]:
        """Within, a body is waited for; the block ends early when that takes too long. Raises ApiError as `_place`."""
        now = anyio.current_time()
        if len(self._present) >= self._most:
            idlest = min(self._present, key=lambda one: one.heard)
            if now - idlest.heard < self._patience.body_grace:
                raise _busy(len(self._present))
            self._present.remove(idlest)
            idlest.scope.cancel()
        one = _Arriving(now, now, anyio.CancelScope(deadline=now + self._patience.body_pause))
        self._present.append(one)
        try:
            with one.scope:
                yield one
        finally:
            if one in self._present:
                self._present.remove(one)

    def heard(self, one: _Arriving) -> None:
        """A piece of it has come."""
        one.heard = anyio.current_time()
        one.scope.deadline = min(one.begun + self._patience.body, one.heard + self._patience.body_pause)


class _Answering:
    """Answers `POST /v1/chat/completions`; `running` and `waiting` count the requests that it holds."""

    def __init__(self, model: Model, limits: Limits, stopping: Callable[[], bool]):
        self.model = model
        self.limits = limits
        self.stopping = stopping
        self._present = 0
        self._arrivals = _Arrivals(limits.arriving, limits.patience)
        self._at_work = anyio.CapacityLimiter(limits.concurrency)

    @property
    def running(self) -> int:
        return int(self._at_work.borrowed_tokens)

    @property
    def waiting(self) -> int:
        return self._present - self.running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            self._check_places()
            body = await self._body(request)
            with self._place():
                chat = await to_thread.run_sync(parse, body)
                response, gone = None, threading.Event()
                async with anyio.create_task_group() as group:
                    group.start_soon(_until_gone, request, gone, group.cancel_scope)
                    response = await self._answer(chat, _Events(send), gone)
                    group.cancel_scope.cancel()
            if response is not None:
                await response(scope, receive, send)

    def _check_places(self) -> None:
        """Raises ApiError when all are taken."""
        if self._present >= self.limits.concurrency + self.limits.queue:
            raise _busy(self._present)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Within, a request holds one of the places. Raises ApiError when all are taken."""
        self._check_places()
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError as soon as it is more than the limit, or known to become so."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be of the content type application/json")
        too_large = ApiError(413, f"the body is larger than {self.limits.body_bytes:,} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            raise too_large
        with self._arrivals.arriving() as arriving:
            async for part in request.stream():
                self._arrivals.heard(arriving)
                arriving.body += part
                if len(arriving.body) > self.limits.body_bytes:
                    raise too_large
            return bytes(arriving.body)
        patience = self.limits.patience
        raise ApiError(
            408, f"the body did not arrive in {patience.body:g} s, with no pause of {patience.body_pause:g} s"
        )

    async def _answer(self, chat: ChatRequest, events: _Events, gone: threading.Event) -> Response | None:
        """The response to a request; None if it was streamed, and so is sent already."""
        completion = Completion(self.model.name, f"vlm-export-{__version__}-{self.model.dtype}-{self.model.backend}")
        on_text = partial(_send_piece, events, completion) if chat.stream else None
        try:
            work = partial(self._generate, chat, on_text, gone)
            answer = await to_thread.run_sync(work, limiter=self._at_work)
        except (ApiError, InputError) as error:
            if isinstance(error, ModelFailed):
                _LOG.error("%s", error)
            wrong = error if isinstance(error, ApiError) else refused(error)
            if not events.started:
                return _error(wrong)
            await events.send(wrong.body)
            await events.end()
            return None
        if not chat.stream:
            return JSONResponse(completion.whole(answer))
        if not events.started:
            await events.send(completion.chunk({"role": "assistant", "content": ""}))
        await events.send(completion.chunk({}, answer.finish_reason))
        if chat.stream_options.include_usage:
            await events.send(completion.usage_chunk(answer))
        await events.end("[DONE]")
        return None

    def _generate(self, chat: ChatRequest, on_text: Callable[[str], None] | None, gone: threading.Event) -> Answer:
        """In a worker thread: decode the images, and have the model answer."""
        asked = question(chat, self.model)
        answer = self.model.generate(
            asked.images,
            asked.prompt,
            asked.options,
            on_text=on_text,
            cancelled=lambda: gone.is_set() or self.stopping(),
        )
        if answer.finish_reason == "cancelled":
            raise ApiError(503, "the server was stopped before the answer was complete", code="stopped")
        return answer


class _Events:
    """A response of server-sent events, which starts with the first of them."""

    def __init__(self, send: Send):
        self.started = False
        self._send = send

    async def send(self, event: Mapping[str, Any]) -> None:
        await self._write(json.dumps(event, ensure_ascii=False))

    def send_from_thread(self, event: Mapping[str, Any]) -> None:
        """Send an event from a worker thread; return once it is written: no model is faster than its reader."""
        from_thread.run(self.send, event)

    async def end(self, last: str | None = None) -> None:
        if last is not None:
            await self._write(last)
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, data: str) -> None:
        if not self.started:
            self.started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _send_piece(events: _Events, completion: Completion, piece: str) -> None:
    if not events.started:
        events.send_from_thread(completion.chunk({"role": "assistant", "content": ""}))
    events.send_from_thread(completion.chunk({"content": piece}))


async def _until_gone(request: Request, gone: threading.Event, scope: anyio.CancelScope) -> None:
    """Wait for the client to go; then the model stops at its next token, or does not begin."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
    scope.cancel()


def _busy(requests: int) -> ApiError:
    return ApiError(429, f"busy with {requests} requests: ask again later", code="queue_full")


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The error as a response, which closes the connection where the body may not have been read."""
    more = {"Retry-After": "1"} if error.status == 429 else {}
    more |= {"Connection": "close"} if error.status in (408, 413, 415, 429) else {}
    return JSONResponse(error.body, error.status, {**(headers or {}), **more})


def _no_such(request: Request) -> str:
    known = "POST /v1/chat/completions, GET /v1/models, GET /health and a page at /"
    return f"there is no {request.method} {request.url.path}: there are {known}"


def _hosts(host: str) -> list[str] | None:
    return list(LOOPBACK) if host in LOOPBACK else None


def _logging() -> dict[str, Any]:
    """The logging settings of uvicorn, with everything on stderr."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
