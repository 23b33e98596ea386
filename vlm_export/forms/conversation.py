"""A conversation, as recipes and goldens hold it for a model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises ValueError, which pydantic tells, for what no chat template takes."""
    for place, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {place}: give it a role, such as user")
        content = message.get("content")
        if not isinstance(content, str):
            _check_parts(content, f"message {place}: content")
    try:
        json.dumps(messages)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"holds what no JSON holds ({error}): put texts into quotes") from error
    return messages


def _check_parts(parts: Any, where: str) -> None:
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{where}: give it a text, or a list of parts with a type")
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "text"):
            raise ValueError(f"{where}: a part's type is image or text")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a part of type text has a text")


Conversation = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000), AfterValidator(_checked)]

TAGS = ("text", "conversation")  # which a message of pydantic's names behind the key


def _kind(prompt: Any) -> str:
    return TAGS[isinstance(prompt, list)]


Prompt = Annotated[Annotated[str, Tag(TAGS[0])] | Annotated[Conversation, Tag(TAGS[1])], Discriminator(_kind)]
