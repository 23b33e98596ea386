"""`generation_config.json`: ids of tokens, and rules of generation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlm_export.forms.form import AboveZero, Form, ListOfTokens, Number, OneTokenId, Switch, TokenId, TokenIds

MOST_TOKENS = 10_000_000  # more than any model has positions for
MOST_ROWS = 4096  # beams, or samples: each is a row of the cache

_Count = Annotated[
    Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None,
    Field(description=f"a whole number, from 0 to {MOST_TOKENS:,}"),
]
_NewTokens = Annotated[
    Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None,
    Field(description=f"a whole number, from 1 to {MOST_TOKENS:,}"),
]
_Rows = Annotated[
    Annotated[int, Field(ge=1, le=MOST_ROWS)] | None, Field(description=f"a whole number, from 1 to {MOST_ROWS:,}")
]
_Words = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1)]] | None, Field(description="a list of lists of token ids")
]
_Share = Annotated[Annotated[float | int, Field(gt=0, le=1)] | None, Field(description="a number above 0, at most 1")]
_Ends = Annotated[bool | Literal["never"] | None, Field(description="true, false or never")]


class Generation(Form):
    """What it may hold; values that depend on each other are looked at where they are used."""

    eos_token_id: TokenIds = None
    bos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    decoder_start_token_id: TokenIds = None
    forced_bos_token_id: OneTokenId = None
    forced_eos_token_id: TokenIds = None
    suppress_tokens: ListOfTokens = None
    begin_suppress_tokens: ListOfTokens = None
    bad_words_ids: _Words = None
    max_new_tokens: _NewTokens = None
    max_length: _Count = None
    min_new_tokens: _Count = None
    min_length: _Count = None
    no_repeat_ngram_size: _Count = None
    num_beams: _Rows = None
    num_return_sequences: _Rows = None
    do_sample: Switch = None
    early_stopping: _Ends = None
    length_penalty: Number = None
    repetition_penalty: AboveZero = None
    temperature: Number = None
    top_k: _Count = None
    top_p: _Share = None
