"""What `vlm-export run` does with a model and image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_export.errors import InputError
from vlm_export.runtime import Answer, Model, Options
from vlm_export.runtime.images import open_image
from vlm_export.runtime.model import Item

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
) -> Iterator[tuple[Sequence[Path], Answer]]:
    """The answer to each group of images; `stream` is given the text of all of them as it comes, a line each.

    Raises:
        InputError: an image cannot be read, or the model refuses the prompt, the images or an option.
    """
    if stream is None:
        waiting = iter(groups)
        while chunk := list(islice(waiting, _BATCH_SIZE)):
            yield from zip(chunk, model.generate_batch([_item(group, prompt) for group in chunk], options), strict=True)
        return
    for group in groups:
        images, text = _item(group, prompt)
        stream(_label(group, len(groups)))
        answer = model.generate(images, text, options, on_text=stream)
        stream("\n")
        for other in answer.alternatives:
            stream(f"{_label(group, len(groups))}{other.text}\n")
        yield group, answer


def lines(group: Sequence[Path], answer: Answer, groups: int) -> list[str]:
    """A line for the answer and for each alternative, after the image's name where there are several groups."""
    return [f"{_label(group, groups)}{one.text}" for one in (answer, *answer.alternatives)]


def as_json(model: Model, results: Sequence[tuple[Sequence[Path], Answer]], load_seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "model": model.name,
        "layout": model.layout,
        "backend": model.backend,
        "dtype": model.dtype,
        "load_seconds": load_seconds,
        "results": [{"images": [str(path) for path in group], **asdict(answer)} for group, answer in results],
    }


def _item(group: Sequence[Path], prompt: str | None) -> Item:
    return [open_image(path) for path in group], prompt


def _label(group: Sequence[Path], groups: int) -> str:
    return f"{', '.join(map(str, group))}: " if groups > 1 else ""
