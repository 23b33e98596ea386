"""What `vlm-export run` does with a model and image files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_export.apps.exported_repo import STDIN
from vlm_export.errors import InputError
from vlm_export.runtime import Answer, Model, Options
from vlm_export.runtime.images import decoded, open_image

_LARGEST_BYTES = 1_000_000_000  # of an image from stdin
_BATCH_SIZE = 8  # images in a batch: more of them decode together, and the first caption comes later
_EARLY_STOPPING = {"true": True, "false": False, "never": "never"}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "seed")


def options(*, sample: bool, early_stopping: str | None, **values: Any) -> Options:
    """Options of the command line; None is what the repo says.

    Raises:
        InputError: an option of sampling without sampling.
    """
    unused = [name for name in _OF_SAMPLING if values.get(name) is not None and not sample]
    if unused:
        raise InputError(f"--{unused[0].replace('_', '-')}: is for sampling: add --sample")
    stopping: Any = None if early_stopping is None else _EARLY_STOPPING[early_stopping]
    return Options(do_sample=True if sample else None, early_stopping=stopping, **values)


def caption(
    model: Model,
    groups: Sequence[Sequence[Path]],
    prompt: str | None,
    options: Options,
    stream: Callable[[str], None] | None = None,
) -> Iterator[tuple[Sequence[Path], Answer | InputError]]:
    """The answer to each group of images, or why an image of it cannot be read, if it is one of several.

    `stream` is given the text of all of them as it comes, a line each.

    Raises:
        InputError: the only image cannot be read, or the model refuses the prompt, the images or an option.
    """
    if stream is None:
        waiting = iter(groups)
        while chunk := list(islice(waiting, _BATCH_SIZE)):
            opened = [_open(group, len(groups)) for group in chunk]
            items = [(images, prompt) for images in opened if not isinstance(images, InputError)]
            said = iter(model.generate_batch(items, options))
            for group, images in zip(chunk, opened, strict=True):
                yield group, images if isinstance(images, InputError) else next(said)
        return
    for group in groups:
        images = _open(group, len(groups))
        if isinstance(images, InputError):
            yield group, images
            continue
        stream(_label(group, len(groups)))
        answer = model.generate(images, prompt, options, on_text=stream)
        stream("\n")
        for other in answer.alternatives:
            stream(f"{_label(group, len(groups))}{other.text}\n")
        yield group, answer


def lines(group: Sequence[Path], answer: Answer, groups: int) -> list[str]:
    """A line for the answer and for each alternative, after the image's name where there are several groups."""
    return [f"{_label(group, groups)}{one.text}" for one in (answer, *answer.alternatives)]


def as_json(
    model: Model, results: Sequence[tuple[Sequence[Path], Answer]], load_seconds: float, unread: Sequence[str]
) -> dict[str, Any]:
    """What `--json` prints; `unread` says which images cannot be read, and why."""
    return {
        "model": model.name,
        "layout": model.layout,
        "backend": model.backend,
        "dtype": model.dtype,
        "load_seconds": load_seconds,
        "results": [{"images": [str(path) for path in group], **asdict(answer)} for group, answer in results],
        "unread": list(unread),
    }


def _open(group: Sequence[Path], groups: int) -> list[Image.Image] | InputError:
    """The images of a group; why one cannot be read, where there are other groups.

    Raises:
        InputError: one cannot be read, and there is no other group.
    """
    try:
        return [_from_stdin() if path == STDIN else open_image(path) for path in group]
    except InputError as error:
        if groups == 1:
            raise
        return error


def _from_stdin() -> Image.Image:
    """The image that stdin holds.

    Raises:
        InputError: it holds none.
    """
    try:
        return decoded(BytesIO(sys.stdin.buffer.read(_LARGEST_BYTES)))
    except ValueError as error:
        raise InputError(f"-: stdin holds no readable image: {error}") from None


def _label(group: Sequence[Path], groups: int) -> str:
    return f"{', '.join(map(str, group))}: " if groups > 1 else ""
