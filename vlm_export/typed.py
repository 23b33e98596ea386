"""What a user typed of the recipe that a command is about, so that the commands in messages can be pasted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TYPED: ContextVar[tuple[str, str]] = ContextVar("typed", default=("", ""))


@contextmanager
def typed(recipe: str, work: str) -> Iterator[None]:
    """Commands in messages name this recipe and this work folder: arguments, each after a space, or nothing."""
    before = _TYPED.set((recipe, work))
    try:
        yield
    finally:
        _TYPED.reset(before)


def command(name: str, options: str = "") -> str:
    """A command of the recipe that the user is at; `options` come after a space each."""
    recipe, work = _TYPED.get()
    return f"vlm-export {name}{recipe}{work}{options}"
