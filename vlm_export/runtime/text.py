"""Texts and token ids: the tokenizer and the chat template.

Sources, in transformers 5.23: `tokenization_utils_tokenizers.py` and `clean_up_tokenization` in
`tokenization_utils_base.py` for what a decoded text is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vlm_export.contract import TASK_ANSWERS
from vlm_export.errors import InputError, blamed_on
from vlm_export.forms.reading import json_of, template_of
from vlm_export.own_files import own_file
from vlm_export.runtime import templates

Message = Mapping[str, Any]  # {"role", "content": str | [{"type": "image"}, {"type": "text", "text": …}]}
_TOKENIZER, _SETTINGS, _PREPROCESSOR = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
_TEMPLATE, _TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token")
_PARTIAL_CHARACTER = "\ufffd"  # what stands for bytes that are no whole character yet
_SPACED_MARKS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Text:
    """The tokenizer of a repo, and its chat template if it has one.

    Where the repo's answers hold places in a picture, which are special tokens, decoded texts keep all of those but the
    ones that begin, end or pad a text; `keeps_tokens` says so where there is no `preprocessor_config.json`.

    Raises:
        InputError: `tokenizer.json` is missing or holds no tokenizer.
    """

    def __init__(self, folder: Path, *, keeps_tokens: bool = False):
        self.folder = folder
        self.keeps_tokens = keeps_tokens or TASK_ANSWERS in (json_of(folder, _PREPROCESSOR) or {})
        path = own_file(folder, _TOKENIZER)
        if path is None:
            raise InputError(f"{folder / _TOKENIZER}: no such file; a repo without it cannot be run")
        with blamed_on(f"{path}: not a tokenizer"):
            self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.settings = json_of(folder, _SETTINGS) or {}
        is_bpe = type(self.tokenizer.model).__name__ == "BPE"
        self.cleans_up = bool(self.settings.get("clean_up_tokenization_spaces")) and not is_bpe

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The text of each special token by transformers' name for it, such as `bos_token`."""
        values = {**(json_of(self.folder, "special_tokens_map.json") or {}), **self.settings}
        found = {name: values.get(name) for name in _SPECIAL}
        return {
            name: value["content"] if isinstance(value, Mapping) else value for name, value in found.items() if value
        }

    @cached_property
    def _around(self) -> set[int | None]:
        """The ids that begin, end or pad a text."""
        names = ("bos_token", "eos_token", "pad_token")
        return {self.tokenizer.token_to_id(self.special_tokens[name]) for name in names if name in self.special_tokens}

    @cached_property
    def template(self) -> str | None:
        """The chat template, from any of the places where transformers keeps it."""
        if (text := template_of(self.folder, _TEMPLATE)) is not None:
            return text
        own = json_of(self.folder, _TEMPLATE_JSON)
        stored = (self.settings if own is None else own).get("chat_template")
        if isinstance(stored, list):
            stored = next((entry["template"] for entry in stored if entry.get("name") == "default"), None)
        return stored

    @property
    def _template_file(self) -> str:
        """The file that the chat template is in, or would be."""
        return next((name for name in (_TEMPLATE, _TEMPLATE_JSON) if own_file(self.folder, name)), _SETTINGS)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text; `add_special_tokens` adds those that the tokenizer puts around one."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids: without special tokens, and without space at either end."""
        kept = list(token_ids)
        if self.keeps_tokens:
            kept = [each for each in kept if each not in self._around]
        text = self.tokenizer.decode(kept, skip_special_tokens=not self.keeps_tokens)
        if self.cleans_up:
            for spaced in _SPACED_MARKS:
                text = text.replace(spaced, "'" if spaced == " ' " else spaced[1:])
        return text.strip()

    def token(self, token_id: int) -> str:
        """The text of a special token.

        Raises:
            InputError: the tokenizer has no such id.
        """
        found = self.tokenizer.id_to_token(token_id)
        if found is None:
            raise InputError(f"{self.folder / _TOKENIZER}: no token has the id {token_id} that config.json names")
        return found

    def conversation_ids(self, text: str) -> list[int]:
        """The ids of a rendered conversation: special tokens are added unless the template put the first there."""
        bos = self.special_tokens.get("bos_token")
        return self.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the template writes it, up to where the answer begins.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        where = f"{self.folder / self._template_file}: chat template"
        if self.template is None:
            raise InputError(f"{where}: not set, so a conversation cannot be written")
        return templates.render(self.template, messages, self.special_tokens, where)


def check_rows(ids: Iterable[int], rows: int | None, token: Callable[[int], str], where: str) -> None:
    """Raises InputError for an id that the model's table of so many rows does not have.

    A tokenizer may have tokens more, which were added to it and never to the model.
    """
    beyond = next((int(each) for each in ids if rows is not None and each >= rows), None)
    if beyond is not None:
        raise InputError(
            f"{where}: {token(beyond)!r} (token {beyond}) has no row in the model's table of {rows}: leave it "
            "out, or train the model with it"
        )


class Stream:
    """Hands out a text as it grows: whole characters, and nothing that later tokens could still change.

    What `on_text` is given, put together, is the final text.
    """

    def __init__(self, text: Text, on_text: Callable[[str], None]):
        self.text = text
        self.on_text = on_text
        self.given = ""

    def update(self, token_ids: Sequence[int], held_back: int = 0) -> None:
        """Hand out what is certain of the text of `token_ids`, which are all ids so far.

        Its last `held_back` characters may yet turn out to belong to a stop text.
        """
        sure = self.text.decode(token_ids).rstrip(_PARTIAL_CHARACTER)
        sure = sure[: len(sure) - held_back].rstrip()
        if self.text.cleans_up:  # it would take away the space before what comes next
            sure = sure.rpartition(" ")[0]
        self._give(sure)

    def finish(self, text: str) -> None:
        """Hand out what is left of `text`, the final one."""
        self._give(text)

    def _give(self, text: str) -> None:
        if len(text) > len(self.given) and text.startswith(self.given):
            piece, self.given = text[len(self.given) :], text
            self.on_text(piece)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids of unequal lengths → ids and mask, `[rows, longest] int64` each."""
    longest = max(map(len, rows))
    ids = np.array([[pad] * (longest - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids.reshape(len(rows), longest), mask.reshape(len(rows), longest)
