"""Who the user is at the Hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from vlm_export.errors import InputError
from vlm_export.hub.answers import hub_errors
from vlm_export.hub.token import LOGIN, sent_token


def check_token(repo_id: str) -> None:
    """Raises InputError if there is no token to push with."""
    if sent_token() is None:
        raise InputError(f"{repo_id}: no Hugging Face token to push with: {LOGIN}")


def user_name() -> str:
    """The name of the token's user, whose repos it may push to.

    Raises:
        InputError: there is no token, the Hub does not accept it, or cannot be reached.
    """
    with hub_errors("whoami", None):
        if sent_token() is None:
            raise InputError(f"no Hugging Face token: {LOGIN}")
        return name_of(HfApi())


def name_of(api: HfApi) -> str:
    """As the Hub says it."""
    name = api.whoami()["name"]
    if not isinstance(name, str):
        raise TypeError("no name of a user")
    return name
