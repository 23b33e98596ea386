"""Connections to a server that are dropped when their client leaves them idle.

uvicorn waits without end for the head of a request, and for a client to read what it was sent. Source of what is called
here: uvicorn 0.54, `H11Protocol` in `protocols/http/h11_impl.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

_LEAST_READ_BYTES = 16_384


@dataclass(frozen=True)
class Patience:
    """How long a server waits for a client, in seconds, and how many of them may be connected.

    Attributes:
        head: for the whole head of a request.
        body: for its whole body.
        body_pause: for the next piece of the body.
        body_grace: that a body may pause without losing its place to another one.
        write: until the client has read 16 KB, when what it was sent fills all buffers.
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
        self._watch_the_rest()

    def pause_writing(self) -> None:
        """The buffers are full."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._read_on()
        self._watch_the_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._arrived()
        self._read_on()
        super().connection_lost(exc)

    def _is_answered(self) -> bool:
        """Whether no request is being answered; some of the answer may lie in buffers."""
        return self.cycle is None or self.cycle.response_complete

    def _unread_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def _waits(self) -> bool:
        """Whether the client has all that it asked for."""
        return self._is_answered() and not self._unread_bytes()

    def _watch_head(self) -> None:
        if not self._is_answered():
            self._arrived()
        elif self._head is None:
            self._head = self.loop.call_later(self.patience.head, self._look_for_head)

    def _look_for_head(self) -> None:
        self._head = None
        if self._waits():
            self._drop("sent no whole request", self.patience.head)
        else:  # it still reads its last answer
            self._watch_head()

    def _watch_the_rest(self) -> None:
        """Watch whether a whole answer is read."""
        if self._is_answered() and self._unread_bytes():
            self._watch_writing()

    def _watch_writing(self) -> None:
        if self._write is None:
            before = self._unread_bytes()
            self._write = self.loop.call_later(self.patience.write, self._look_for_reading, before)

    def _look_for_reading(self, before: int) -> None:
        """Drop a client that has read next to nothing of what lay in the buffers `before`."""
        self._write = None
        left = self._unread_bytes()
        if not self.flow.write_paused and not (left and self._is_answered()):
            return
        if before - left < _LEAST_READ_BYTES:
            self._drop("read next to nothing", self.patience.write)
        else:
            self._watch_writing()

    def _drop(self, what: str, seconds: float) -> None:
        self.logger.info("dropped a client that %s for %g s", what, seconds)
        self.transport.abort()

    def _arrived(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _read_on(self) -> None:
        if self._write is not None:
            self._write.cancel()
            self._write = None
