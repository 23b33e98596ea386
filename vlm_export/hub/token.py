"""The user's token: whether there is one, and no text that shows it."""

from __future__ import annotations

from huggingface_hub import constants, get_token

from vlm_export.errors import InputError

LOGIN = "run `hf auth login` or set HF_TOKEN"


def has_token() -> bool:
    """Whether a token is set, by HF_TOKEN or by the login file."""
    return get_token() is not None


def sent_token() -> str | None:
    """The token that huggingface_hub sends.

    Raises:
        InputError: no header can carry it; the HTTP client's own error would show it.
    """
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise InputError(f"the Hugging Face token holds characters that no token has: {LOGIN} again")
    return token


def redacted(text: str) -> str:
    """A text without the token."""
    token = sent_token()
    return text.replace(token, "<token>") if token else text
