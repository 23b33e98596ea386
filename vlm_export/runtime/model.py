"""A model that captions: what is the same whether ONNX Runtime or PyTorch computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.generate import FinishReason, Generated
from vlm_export.runtime.options import Options
from vlm_export.runtime.repo import ASKED, LayoutName
from vlm_export.runtime.text import Message, Stream, Text

Prompt = str | Sequence[Message] | None
Backend = Literal["onnx", "torch"]
Item = tuple[Sequence[Image.Image], Prompt]
OnText = Callable[[str], None]
Cancelled = Callable[[], bool]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens, or a stop text and what came after it.
        token_ids: the generated ones, the one that ends it included.
        prompt_tokens: ids that it was given, those of images included.
        score: the beam's log probability under the length penalty; None without beams.
        alternatives: the other beams or samples that were asked for.
        first_token_seconds, seconds: since the call, for the whole batch.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    score: float | None
    alternatives: tuple[Answer, ...]
    first_token_seconds: float
    seconds: float


class EngineFailed(Exception):
    """The engine cannot compute the model, for a reason that is not the user's; another engine may."""


class ModelFailed(InputError):
    """The engine failed, and none can take its place. The request is not at fault."""


@dataclass(frozen=True)
class Memory:
    """What an engine keeps of a conversation from one turn to the next; an engine that keeps more has its own kind.

    Attributes:
        tokens_fed: how many tokens of the last turn's prompt were run.
    """

    tokens_fed: int = 0


class Engine(Protocol):
    """What computes a model: ONNX Runtime, or PyTorch.

    `repo_path` is the folder of the repo whose graphs it runs, `fed_as` the layout whose inputs it takes.
    """

    name: str
    layout: LayoutName
    fed_as: LayoutName
    dtype: str
    backend: Backend
    repo_path: Path | None

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: Prompt,
        options: Options,
        on_text: OnText | None,
        cancelled: Cancelled | None,
    ) -> Answer:
        """Answer one prompt; arguments are those of `Model.generate`.

        Raises:
            InputError: the model cannot be asked so.
            EngineFailed: it cannot be computed; another engine may.
        """

    def generate_batch(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """Answer several prompts, each with the tokens that it gets alone; raises as `generate` does."""

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None,
        cancelled: Cancelled | None,
    ) -> tuple[Answer, Memory]:
        """Answer a whole conversation; what this engine's own `memory` holds of it need not be run again.

        `images` are those of all messages. A memory of another engine's kind is as good as none. Raises as `generate`
        does.
        """


class Model:
    """A loaded model: an engine, and what makes the one that takes over when it fails.

    `fallback` is given the reason, which it passes on to the user.
    """

    def __init__(self, engine: Engine, fallback: Callable[[str], Engine] | None = None):
        self.engine = engine
        self._fallback = fallback

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's where there is none."""
        return self.engine.name

    @property
    def layout(self) -> LayoutName:
        """captioner, chat, tasks, components or single."""
        return self.engine.layout

    @property
    def dtype(self) -> str:
        """The dtype of the graphs that run; fp32 in PyTorch."""
        return self.engine.dtype

    @property
    def backend(self) -> Backend:
        """Which engine computes the model now: "onnx" or "torch"."""
        return self.engine.backend

    @property
    def takes_prompt(self) -> bool:
        """Whether the model reads a text or a conversation beside the image."""
        return self.engine.fed_as in ASKED

    @property
    def takes_turns(self) -> bool:
        """Whether the model reads a conversation."""
        return self.engine.fed_as == "chat"

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: Prompt = None,
        options: Options = Options(),  # noqa: B008 (frozen)
        *,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> Answer:
        """Caption, or answer.

        `on_text` is given the text in pieces as it comes; of beams, at the end. `cancelled` is asked at every token.

        Raises:
            InputError: the model takes no prompt, or needs one, or another number of images; or an option is wrong.
            ModelFailed: ONNX Runtime fails, and there is no PyTorch model to run instead.
        """
        self._check(prompt)
        return self._run(lambda engine: engine.generate(images, prompt, options, on_text, cancelled))

    def generate_batch(self, items: Sequence[Item], options: Options = Options()) -> list[Answer]:  # noqa: B008
        """Several images or conversations at once; each gets the tokens that it gets alone.

        Raises:
            InputError: as of `generate`.
        """
        for _, prompt in items:
            self._check(prompt)
        return self._run(lambda engine: engine.generate_batch(items, options)) if items else []

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Answer, Memory]:
        """Answer a whole conversation with the images of all its messages; returns what the next turn is given.

        Raises:
            InputError, ModelFailed: as of `generate`.
        """
        self._check(messages)
        return self._run(lambda engine: engine.turn(memory, images, messages, options, on_text, cancelled))

    def _check(self, prompt: Prompt) -> None:
        if prompt is not None and not self.takes_prompt:
            raise InputError(f"{self.name}: a {self.layout} repo takes no prompt; it captions the image")

    def _run(self, call: Callable[[Engine], Result]) -> Result:
        try:
            return call(self.engine)
        except EngineFailed as error:
            if self._fallback is None:
                raise ModelFailed(str(error)) from error
            try:
                self.engine, self._fallback = self._fallback(str(error)), None
            except InputError as missing:
                raise ModelFailed(str(missing)) from error
            return call(self.engine)


def answers(
    generated: Sequence[Generated], text: Text, stop: Sequence[str], prompt_tokens: int, started: float, first: float
) -> Answer:
    """The sequences of one prompt, best first, as an answer and its alternatives."""
    seconds = time.perf_counter() - started
    made = [
        Answer(
            before_stop(text.decode(one.token_ids), stop),
            tuple(one.token_ids),
            one.finish_reason,
            prompt_tokens,
            one.score,
            (),
            first - started,
            seconds,
        )
        for one in generated
    ]
    return Answer(**{**vars(made[0]), "alternatives": tuple(made[1:])})


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of its stop texts."""
    found = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(found)].rstrip() if found else text


class Watcher:
    """Looks at the tokens after each step: hands out the text of the first row, and says which end in a stop text."""

    def __init__(self, text: Text, stop: Sequence[str], on_text: OnText | None):
        self.text = text
        self.stop = stop
        self.stream = Stream(text, on_text) if on_text else None

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Look at the rows' new tokens so far; returns for each row whether its text holds a stop text (`Watch`)."""
        ends = [bool(self.stop) and self._ends(ids) for ids in rows]
        if self.stream is not None and not ends[0]:
            self.stream.update(rows[0], max((len(one) - 1 for one in self.stop), default=0))
        return ends

    def _ends(self, token_ids: Sequence[int]) -> bool:
        text = self.text.decode(token_ids)
        return any(one in text for one in self.stop)

    def finish(self, text: str) -> None:
        """Hand out what is left of the text, if it is streamed."""
        if self.stream is not None:
            self.stream.finish(text)


def finish(answer: Answer, watcher: Watcher, on_text: OnText | None) -> None:
    """Hand out what is left of the text; of beams, all of it."""
    if watcher.stream is not None:
        watcher.finish(answer.text)
    elif on_text is not None and answer.text:
        on_text(answer.text)
