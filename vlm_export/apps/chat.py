"""A conversation in a terminal: lines that a user types, answers that are printed as they come."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from vlm_export.errors import InputError
from vlm_export.paths import expanded
from vlm_export.runtime import Conversation, Model, Options
from vlm_export.runtime.images import open_image

HELP = (
    "/image FILE shows a picture with your next line, /new begins again, /quit or Ctrl-D ends, Ctrl-C stops an answer"
)


class Talk:
    """What is typed, a line at a time, to a model; `write` prints pieces of its answers, `notify` whole lines beside.

    Raises:
        InputError: the model takes no prompt.
    """

    def __init__(self, model: Model, options: Options, write: Callable[[str], None], notify: Callable[[str], None]):
        self.model, self.options, self.write, self.notify = model, options, write, notify
        self.conversation = Conversation(model)
        self.waiting: list[Image.Image] = []

    def hear(self, line: str) -> bool:
        """Act on a line. Returns whether the conversation goes on."""
        text = line.strip()
        if not text.startswith("/"):
            if text:
                self._say(text)
            return True
        command, _, argument = text.partition(" ")
        if command == "/quit":
            return False
        if command == "/new":
            self.conversation, self.waiting = Conversation(self.model), []
            self.notify("a new conversation")
        elif command == "/image" and argument:
            self.show(expanded(argument.strip()))
        else:
            self.notify(HELP)
        return True

    def show(self, path: Path) -> None:
        """Show a picture with the next line; one that cannot be read is told."""
        try:
            self.waiting.append(open_image(path))
        except InputError as error:
            self.notify(f"error: {error}")

    def _say(self, text: str) -> None:
        with _interruptible() as is_interrupted:
            try:
                self.conversation.say(text, self.waiting, self.options, on_text=self.write, cancelled=is_interrupted)
            except InputError as error:
                self.notify(f"error: {error}")
                return
        self.waiting = []
        self.write("\n")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets what is yielded to true and raises nothing; the second one raises as ever."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
