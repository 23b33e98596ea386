"""Task prompts: a token such as `<OD>` that stands for the sentence a model was trained on, with an input behind some.

Source: `Florence2Processor._construct_prompts` in transformers 5.23. The sentences are in `preprocessor_config.json`,
where transformers.js looks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_export.contract import TASK, TASKS_ALONE, TASKS_WITH_INPUT
from vlm_export.errors import InputError
from vlm_export.runtime.text import Message

_INPUT = "{input}"


@dataclass(frozen=True)
class Tasks:
    """Sentences by task: of tasks that are all there is to a prompt, and of those that have an input."""

    alone: Mapping[str, str] = field(default_factory=dict)
    with_input: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Tasks:
        """Those of a `preprocessor_config.json`; none where it names none, and then every prompt is a sentence."""
        return cls(settings.get(TASKS_ALONE) or {}, settings.get(TASKS_WITH_INPUT) or {})

    def plain(self, prompt: str) -> str:
        """A prompt as PyTorch's processor and transformers.js's take it alike: no space around a task's input.

        Raises:
            InputError: there is nothing in it, or something beside a task that has no input.
        """
        text = prompt.strip()
        if not text:
            raise InputError(f"the prompt is empty: give a task, such as {self._example}, or a sentence")
        for task in self.alone:
            if task in text and text != task:
                raise InputError(f"{prompt!r}: {task} takes no input: it is all of the prompt")
        for task in self.with_input:
            if task in text:
                return task.strip() + text.replace(task, "").strip()
        return text

    def sentence(self, prompt: str) -> str:
        """What the model reads for a prompt: its task's sentence, or the prompt itself where it has no task.

        Raises:
            InputError: as of `plain`.
        """
        text = self.plain(prompt)
        for task, sentence in self.with_input.items():
            if task in text:
                return sentence.replace(_INPUT, text.replace(task, "").strip())
        return self.alone.get(text, text)

    def asked(self, prompt: str | Sequence[Message] | None) -> str:
        """What a caller asks, as `plain` has it: a text, or the only message of a conversation.

        Raises:
            InputError: there is no prompt, or more than one message; or as of `plain`.
        """
        if prompt is None:
            raise InputError(f"does a task about an image: give it a prompt, such as {self._example}")
        if isinstance(prompt, str):
            return self.plain(prompt)
        if len(prompt) != 1:
            raise InputError(f"does one task about one image, such as {self._example}: it takes one message, no turns")
        content = prompt[0]["content"]
        parts = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        return self.plain(parts)

    @property
    def _example(self) -> str:
        return next(iter(self.alone), TASK)
