"""Requests that wait where the Hub asks for it, and that end where it does not answer.

Around the HTTP client of huggingface_hub, whichever that is: what it does by itself differs from request to request.
Some are retried five times in 23 s, with three lines of warning each; a commit never; and an answer that comes byte by
byte is waited for without end. Here every request is treated alike:

- where the Hub is busy or the connection breaks, the same is asked again after a while, which is told in one line;
- what the Hub says of when to come back (`Retry-After`, `RateLimit`) is kept to;
- a whole answer has a limit in time, and so has all of the waiting.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import FrameType
from typing import Any, TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, logging, parse_ratelimit_headers

from vlm_export.errors import InputError, one_line
from vlm_export.hub import xet
from vlm_export.hub.token import redacted
from vlm_export.news import teller

# A request is made again for so long, first after a second, then after twice as long each time.
WAITING_SECONDS = 300.0
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
# An answer is there after so long, and after what was sent with the request at that rate.
ANSWER_SECONDS = 120.0
SLOWEST_BYTES_PER_SECOND = 50_000
# A download brings at least a kilobyte a second, looked at so often; nothing at all is waited for as long.
QUIET_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 1000
_MOST_BREAKS = 20  # of a download that brings less than a megabyte between two of them
_CONNECT_SECONDS = 15.0
_BUSY = (408, 429, 500, 502, 503, 504)
_BROKEN = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_NO_CONNECTION = (httpx2.ConnectError, httpx2.ConnectTimeout)

Given = TypeVar("Given")


class Unreachable(InputError):
    """The Hub does not answer, or is not to be asked."""


@contextmanager
def patient(subject: str, waiting_seconds: float | None = None) -> Iterator[None]:
    """Within, requests of huggingface_hub wait for the Hub up to `waiting_seconds` (else WAITING_SECONDS) each.

    `subject` is what messages begin with, say a repo id. A Hub that cannot be connected to and has not answered yet is
    not waited for.

    Raises:
        Unreachable: the Hub did not answer in that time.
    """
    if constants.is_offline_mode():
        yield
        return
    client = get_session()
    asking = _Asking(subject, WAITING_SECONDS if waiting_seconds is None else waiting_seconds, client)
    level = logging.get_verbosity()
    if level == logging.WARNING:  # neither more nor less was asked for
        logging.set_verbosity_error()
    vars(client).update(request=asking.request, stream=asking.stream)
    try:
        with _interrupting(asking.stop), xet.watched(asking.tell_quiet, asking.too_slow):
            yield
    finally:
        for name in ("request", "stream"):
            vars(client).pop(name, None)
        logging.set_verbosity(level)


@contextmanager
def _interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """Within, Ctrl-C calls `stop` too: the threads that upload know nothing of it, and are waited for."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop()
        before(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Asking:
    """The requests of one thing that is done at the Hub, such as a push, from several threads."""

    def __init__(self, subject: str, waiting_seconds: float, client: httpx2.Client):
        self._subject = subject
        self._waiting_seconds = waiting_seconds
        self._request = client.request
        self._stream = client.stream
        self._tell = teller()  # of this thread: those that upload have none
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._has_answered = False
        self._breaks = 0
        self._stopped = threading.Event()
        self._asked: set[queue.SimpleQueue[tuple[bool, Any]]] = set()  # what is waited for at the moment

    def stop(self) -> None:
        """End what is waited for, in every thread. May be called from a signal's handler: it takes no lock."""
        self._stopped.set()
        for done in tuple(self._asked):
            done.put((False, self._interrupted()))

    def request(self, method: str, url: Any, **given: Any) -> httpx2.Response:
        """As httpx2's, until it has an answer that is one. Raises Unreachable."""
        content, body = given.get("content"), given.get("data")
        sent = len(content) if isinstance(content, bytes) else 0
        rewind: Callable[[], object] = lambda: None  # noqa: E731
        if body is not None and hasattr(body, "seek"):  # a file, or a part of one
            start = body.tell()
            sent, rewind = body.seek(0, os.SEEK_END) - start, lambda: body.seek(start)

        def ask() -> httpx2.Response:
            rewind()
            return self._request(method, url, **given | {"timeout": _timeouts(given)})

        opens_request = bool((given.get("params") or {}).get("create_pr")) and "/commit/" in str(url)
        return self._answered(ask, ANSWER_SECONDS + sent / SLOWEST_BYTES_PER_SECOND, once=opens_request)

    @contextmanager
    def stream(self, method: str, url: Any, **given: Any) -> Iterator[httpx2.Response]:
        """As httpx2's, the body watched while it comes. Raises Unreachable."""
        opened: list[AbstractContextManager[httpx2.Response]] = []

        def ask() -> httpx2.Response:
            manager = self._stream(method, url, **given | {"timeout": _timeouts(given)})
            response = manager.__enter__()
            if response.status_code in _BUSY:
                manager.__exit__(None, None, None)
            else:
                opened.append(manager)
            return response

        response = self._answered(ask, ANSWER_SECONDS)
        with ExitStack() as stack:
            stack.push(opened[-1])
            response.stream = _Watched(response.stream, self)
            yield response

    def _answered(
        self, ask: Callable[[], httpx2.Response], limit_seconds: float, once: bool = False
    ) -> httpx2.Response:
        """The first answer of a Hub that is not busy. With `once`, what may have been done is not asked for again."""
        end = time.monotonic() + self._waiting_seconds
        wait = FIRST_WAIT_SECONDS
        while True:
            asked_seconds: float | None = None
            try:
                response = self._within(limit_seconds, ask)
            except _BROKEN as error:
                if isinstance(error, _NO_CONNECTION) and not self._has_answered:
                    raise self.cannot_reach() from error
                if once and not isinstance(error, _NO_CONNECTION):
                    raise Unreachable(self._broke_off("")) from error
                why, told = self._broke_off(f" for {self._waiting_seconds:.0f} s"), "the connection broke"
            else:
                self._has_answered = True
                if response.status_code not in _BUSY:
                    return response
                status = response.status_code
                why, told = self._busy(response), f"the Hub answered {status}"
                asked_seconds = _asked_seconds(response)
                if once and status != 429:
                    raise Unreachable(why)
            pause = wait if asked_seconds is None else asked_seconds
            if time.monotonic() + pause > end:
                if asked_seconds is not None and asked_seconds > self._waiting_seconds:
                    why = f"{self._subject}: the Hub asks to wait for {asked_seconds:,.0f} s: run again then"
                raise Unreachable(why)
            self.tell_waiting(told, asked_seconds)
            if self._stopped.wait(pause):
                raise self._interrupted()
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _within(self, limit_seconds: float, ask: Callable[[], Given]) -> Given:
        """What `ask` returns. In a thread of its own, since no time-out of the client's is about a whole answer."""
        done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        context = copy_context()

        def run() -> None:
            try:
                done.put((True, context.run(ask)))
            except BaseException as error:
                done.put((False, error))

        self._asked.add(done)
        try:
            if self._stopped.is_set():
                raise self._interrupted()
            threading.Thread(target=run, daemon=True).start()
            is_answer, found = done.get(timeout=limit_seconds)
        except queue.Empty:
            # Not asked again: the thread may still be reading what it sends.
            raise self.too_slow(f"no whole answer within {limit_seconds:,.0f} s") from None
        finally:
            self._asked.discard(done)
        if not is_answer:
            raise found
        answer: Given = found
        return answer

    def tell_waiting(self, why: str, asked_seconds: float | None = None) -> None:
        """Tell once of each reason that it is waited."""
        with self._lock:
            if why in self._told:
                return
            self._told.add(why)
        long = f"{asked_seconds:,.0f} s" if asked_seconds else f"{self._waiting_seconds:,.0f} s at most"
        self._tell(redacted(f"{self._subject}: waiting, {long}: {why}"))

    def tell_quiet(self, why: str) -> None:
        """Tell once of a transfer by Xet in which nothing moves."""
        self.tell_waiting(why, xet.QUIET_SECONDS)

    def broke(self, len_bytes: int, error: Exception) -> None:
        """A download broke after so many bytes. Raises Unreachable after many times with few."""
        with self._lock:
            self._breaks = 0 if len_bytes > 10**6 else self._breaks + 1
        if self._breaks > _MOST_BREAKS:
            raise Unreachable(self._broke_off(f" {self._breaks} times")) from error
        self.tell_waiting("the connection broke")

    def cannot_reach(self) -> Unreachable:
        """No connection at all."""
        return Unreachable(
            f"{self._subject}: cannot reach {constants.ENDPOINT}: check the network and HF_ENDPOINT, then run again"
        )

    def too_slow(self, what: str) -> Unreachable:
        """A Hub that answers byte by byte."""
        return Unreachable(f"{self._subject}: {constants.ENDPOINT}: {what}: check the network, then run again")

    def _interrupted(self) -> Unreachable:
        return Unreachable(f"{self._subject}: interrupted")

    def _broke_off(self, long: str) -> str:
        return f"{self._subject}: the connection to {constants.ENDPOINT} broke{long}: check the network, then run again"

    def _busy(self, response: httpx2.Response) -> str:
        said = response.headers.get("X-Error-Message")
        told = f" ({one_line(said, 80)})" if said else ""
        return f"{self._subject}: the Hub answered {response.status_code}{told}: wait some minutes, then run again"


class _Watched(httpx2.SyncByteStream):
    """The body of a download. Raises Unreachable where it brings next to nothing for QUIET_SECONDS."""

    def __init__(self, body: Any, asking: _Asking):
        self._body = body
        self._asking = asking

    def __iter__(self) -> Iterator[bytes]:
        began, count = time.monotonic(), 0
        try:
            for piece in self._body:
                count += len(piece)
                now = time.monotonic()
                if now - began > QUIET_SECONDS:
                    if count < _LEAST_BYTES_PER_SECOND * QUIET_SECONDS:
                        raise self._asking.too_slow(f"sent {count:,} bytes in {now - began:,.0f} s")
                    began, count = now, 0
                yield piece
        except _BROKEN as error:
            self._asking.broke(len_bytes=count, error=error)
            raise  # huggingface_hub goes on where it was

    def close(self) -> None:
        """As the body's."""
        self._body.close()


def _timeouts(given: dict[str, Any]) -> Any:
    """Those of one step of a request, where the caller has none."""
    callers = given.get("timeout")
    if callers is not None and callers is not httpx2.USE_CLIENT_DEFAULT:
        return callers
    return httpx2.Timeout(QUIET_SECONDS, connect=_CONNECT_SECONDS, pool=None)


def _asked_seconds(response: httpx2.Response) -> float | None:
    """How long the Hub asks to wait: seconds or a date in `Retry-After`, or the rest of a window of `RateLimit`."""
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isdigit() and len(asked) < 10:
        return float(asked)
    if asked:
        try:
            until = parsedate_to_datetime(asked)
        except ValueError:
            return None
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max((until - datetime.now(UTC)).total_seconds(), 0.0)
    limits = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    return float(limits.reset_in_seconds) if limits is not None and limits.remaining == 0 else None
