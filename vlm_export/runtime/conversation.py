"""A conversation: each turn runs only what it adds, on the cache of those before it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.model import Answer, Cancelled, Memory, Model, OnText
from vlm_export.runtime.options import Options
from vlm_export.runtime.text import Message


class Conversation:
    """Turns with a chat model, with images in any of them; the answers are those to the whole conversation run anew.

    With PyTorch each turn is run anew.

    Attributes:
        messages: what was said so far, in transformers' form.

    Raises:
        InputError: the model takes no prompt, or no turns.
    """

    def __init__(self, model: Model):
        if not model.takes_turns:
            reason = "takes one prompt about one image" if model.takes_prompt else "takes no prompt"
            raise InputError(f"{model.name}: a {model.layout} repo {reason}, so there is no talking with it")
        self.model = model
        self.messages: list[Message] = []
        self._images: list[Image.Image] = []
        self._memory = Memory()

    @property
    def tokens_fed(self) -> int:
        """How many of the last turn's prompt tokens were run: those that no turn before it had run."""
        return self._memory.tokens_fed

    def say(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        options: Options = Options(),  # noqa: B008 (frozen)
        *,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> Answer:
        """The answer to a text after images; after an error the conversation is as it was.

        Raises:
            InputError, ModelFailed: as of `Model.generate`.
        """
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        everything = [*self._images, *images]
        answer, self._memory = self.model.turn(self._memory, everything, messages, options, on_text, cancelled)
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        self._images = everything
        return answer
