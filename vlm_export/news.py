"""What takes long and was not asked for by name, such as a download: told to the user before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TELL: ContextVar[Callable[[str], None]] = ContextVar("tell", default=lambda line: None)


@contextmanager
def told_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, `tell` hears each line; without, nobody does."""
    before = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(before)


def tell(line: str) -> None:
    """Tell a line."""
    _TELL.get()(line)


def teller() -> Callable[[str], None]:
    """Who hears what is told here, for threads that are started from here: a new one has nobody."""
    return _TELL.get()
