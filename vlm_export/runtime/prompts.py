"""How a chat repo's prompts are written: a conversation by its template, with the tokens of its images, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from vlm_export.contract import Cut
from vlm_export.errors import InputError
from vlm_export.runtime.drivers import image_token_id
from vlm_export.runtime.image_tokens import ImageTokens, written_by
from vlm_export.runtime.images import Grid
from vlm_export.runtime.model import Prompt
from vlm_export.runtime.repo import Repo
from vlm_export.runtime.text import Message, Text, check_rows


class Prompts:
    """The prompts of a repo, whose image processor makes `cut` of pictures."""

    def __init__(self, repo: Repo, text: Text, cut: Cut):
        self.repo, self.text, self.cut = repo, text, cut

    @cached_property
    def image_tokens(self) -> ImageTokens:
        """How images stand in this model's prompts.

        Raises:
            InputError: the repo's files do not say.
        """
        token = self.text.token(image_token_id(self.repo.config))
        return ImageTokens.of(token, self.cut, self.repo.processor, written_by(self.repo, self.text))

    def messages(self, images: Sequence[Image.Image], prompt: Prompt) -> list[Message]:
        """A prompt as a conversation: a text comes after the images.

        Raises:
            InputError: there is no prompt, and the model needs one.
        """
        if prompt is not None and not isinstance(prompt, str):
            return list(prompt)
        if prompt is None and not self.repo.has_prefix:
            raise InputError(f"{self.repo.name}: answers a question about an image: give it a prompt")
        text = [{"type": "text", "text": prompt}] if prompt else []
        return [{"role": "user", "content": [*({"type": "image"} for _ in images), *text]}]

    def ids(self, messages: Sequence[Message], grids: Sequence[Grid], rows: Sequence[int]) -> list[int]:
        """The ids of a conversation up to where the answer begins, with those of its images.

        `grids` say how each image was cut, `rows` how many rows of features it, or each of its tiles, has.

        Raises:
            InputError: the template refuses the conversation, it has another number of images, or a token has no row.
        """
        ids = self.text.conversation_ids(self.image_tokens.write(self.text.render(messages), grids, rows))
        image = image_token_id(self.repo.config)
        where = f"{self.repo.name}: the prompt"
        check_rows((id for id in ids if id != image), self.repo.rows, self.text.token, where)
        return ids
