"""Connections to a server that are dropped when their client leaves them idle.

uvicorn waits without end for the head of a request, and for a client to read what it was sent. Source of what is called
here: uvicorn 0.54, `H11Protocol` in `protocols/http/h11_impl.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class Patience:
    """How long a server waits for a client, in seconds, and how many of them may be connected.

    Attributes:
        head: for the whole head of a request.
        body: for its whole body.
        body_pause: for the next piece of the body.
        body_grace: that a body may pause without losing its place to another one.
        write: until the client reads on, when what it was sent fills all buffers.
        connections: beyond so many, the one that has waited longest for a request goes.
    """

    head: float = 10
    body: float = 60
    body_pause: float = 10
    body_grace: float = 1
    write: float = 20
    connections: int = 256


def patient(patience: Patience) -> type[H11Protocol]:
    """The class of connections that uvicorn is given as its `http`."""
    return type("PatientConnection", (Connection,), {"patience": patience})


class Connection(H11Protocol):
    """A client's connection, with limits in time."""

    patience: ClassVar[Patience] = Patience()
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; of too many connections, drop one that waits too."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._watch_head()
        opened = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(opened) > self.patience.connections:
            min((one for one in opened if one._waits()), key=lambda one: one._idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Go on, and wait for the rest of a head, if that is what is missing."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """The client has its answer, or most of it lies in buffers."""
        super().on_response_complete()
        self._idle_since = self.loop.time()
        self._watch_head()
        if self.transport.get_write_buffer_size():
            self._watch_writing()

    def pause_writing(self) -> None:
        """The buffers are full."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._arrived()
        self._read_on()
        super().connection_lost(exc)

    def _waits(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if not self._waits():
            self._arrived()
        elif self._head is None:
            self._head = self._drop_later(self.patience.head, self._waits, "sent no whole request")

    def _watch_writing(self) -> None:
        if self._write is None:
            self._write = self._drop_later(self.patience.write, self._is_stuck, "read nothing")

    def _is_stuck(self) -> bool:
        unread = self.transport.get_write_buffer_size() > 0
        return self.flow.write_paused or (unread and self._waits())

    def _drop_later(self, seconds: float, still: Callable[[], bool], what: str) -> asyncio.TimerHandle:
        def drop() -> None:
            if still():
                self.logger.info("dropped a client that %s for %g s", what, seconds)
                self.transport.abort()

        return self.loop.call_later(seconds, drop)

    def _arrived(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _read_on(self) -> None:
        if self._write is not None:
            self._write.cancel()
            self._write = None
