"""Transfers by Xet, whose client is a library of its own that retries by itself and says nothing meanwhile: watched.

Where no byte moves for a while, the user is told; where none moves for long, the transfer is ended. Source of what is
called here: huggingface_hub 2.4, `utils/_xet.py`, which makes the one session of a process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import _xet

TOLD_SECONDS = 20.0
# Its client gives up after five attempts of 120 s each; while the Hub checks what it got, nothing moves for minutes.
QUIET_SECONDS = 900.0


@contextmanager
def watched(tell: Callable[[str], None], stuck: Callable[[str], Exception]) -> Iterator[None]:
    """Within, `tell` hears once that nothing moves.

    Raises:
        what `stuck` makes of what happened: nothing moved for QUIET_SECONDS.
    """
    watch, own = _Watch(tell), _xet.get_xet_session
    _xet.get_xet_session = lambda: _Session(own(), watch)  # the library imports it anew for each transfer
    try:
        yield
    except Exception as error:
        if watch.has_ended:
            raise stuck(f"no byte moved by Xet for {QUIET_SECONDS:,.0f} s") from error
        raise
    finally:
        _xet.get_xet_session = own


class _Watch:
    """When something moved last, in any of the transfers that go on."""

    def __init__(self, tell: Callable[[str], None]):
        self.has_ended = False
        self._tell = tell
        self._lock = threading.Lock()
        self._moved = time.monotonic()

    def begin(self) -> None:
        """Another transfer begins."""
        self._moved = time.monotonic()

    def look(self, has_moved: bool) -> None:
        """Called many times a second while a transfer goes on."""
        now = time.monotonic()
        if has_moved:
            self._moved = now
        quiet = now - self._moved
        if quiet > TOLD_SECONDS:
            self._tell("no byte moves by Xet, which tries again by itself")
        with self._lock:
            ends = quiet > QUIET_SECONDS and not self.has_ended
            self.has_ended |= ends
        if ends:  # in another thread: the one that this is called in waits for the end of the call
            threading.Thread(target=_xet.abort_xet_session, daemon=True).start()


class _Session:
    """A session of Xet's client, the progress of its transfers looked at."""

    def __init__(self, session: Any, watch: _Watch):
        self._session = session
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def new_upload_commit(self, **given: Any) -> Any:
        """As of the session."""
        return self._session.new_upload_commit(**self._looked_at(given))

    def new_file_download_group(self, **given: Any) -> Any:
        """As of the session."""
        return self._session.new_file_download_group(**self._looked_at(given))

    def _looked_at(self, given: dict[str, Any]) -> dict[str, Any]:
        show, before = given.get("progress_callback"), None
        self._watch.begin()

        def look(report: Any, items: Any = None) -> None:
            nonlocal before
            now = _moved(report)
            self._watch.look(now != before)
            before = now
            if show is not None:
                show(report, items)

        return given | {"progress_callback": look}


def _moved(report: Any) -> tuple[Any, ...]:
    """What grows while a transfer goes on: bytes, and what the Hub has checked of them."""
    shard = report.shard
    counts = [] if shard is None else [getattr(shard, name) for name in dir(shard) if name.startswith("total_")]
    return (report.total_bytes_completed, report.total_transfer_bytes_completed, *counts)
