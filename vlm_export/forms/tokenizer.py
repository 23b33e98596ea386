"""`tokenizer_config.json`, `special_tokens_map.json` and `chat_template.json`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from vlm_export.forms.form import Form, Number, Switch, Text


class _Added(BaseModel):
    """A token with how it is found in a text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    content: str


class _Named(BaseModel):
    """One of several chat templates."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    template: str


_Token = Annotated[str | _Added | None, Field(description="a token's text, or an object with its `content`")]
_AddedTokens = Annotated[
    dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], _Added] | None,
    Field(description="objects with a token's `content`, by the token's id"),
]
_Side = Annotated[Annotated[str, Field(pattern="^(left|right)$")] | None, Field(description="left or right")]
_Template = Annotated[
    str | list[_Named] | None,
    Field(description="a template's text, or a list of objects with a `name` and a `template`"),
]
_Extra = Annotated[list[Any] | dict[str, Any] | None, Field(description="a list of tokens, or tokens by name")]


class Tokenizer(Form):
    """What it may hold."""

    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    sep_token: _Token = None
    pad_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None
    image_token: _Token = None
    additional_special_tokens: Annotated[list[str | _Added] | None, Field(description="a list of tokens")] = None
    added_tokens_decoder: _AddedTokens = None
    extra_special_tokens: _Extra = None
    model_max_length: Number = None
    padding_side: _Side = None
    truncation_side: _Side = None
    clean_up_tokenization_spaces: Switch = None
    tokenizer_class: Text = None
    chat_template: _Template = None
