"""A tiny captioner, and requests to a server of it that is called as ASGI servers call it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

from node_repo import write_repo
from PIL import Image

from vlm_export.apps.load import load
from vlm_export.apps.serve import Limits, application
from vlm_export.runtime import Model


def picture(width: int = 64, height: int = 64, form: str = "PNG", mode: str = "RGB") -> bytes:
    made = io.BytesIO()
    Image.new(mode, (width, height)).save(made, form)
    return made.getvalue()


def url(data: bytes = picture(), kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


PICTURE = url()


def asking(address: Any = PICTURE, **parameters: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": address}}]
    return {"model": "repo", "messages": [{"role": "user", "content": content}], **parameters}


def said(content: Any, **message: Any) -> dict[str, Any]:
    return {"model": "repo", "messages": [{"role": "user", "content": content, **message}]}


def served(folder: Path, positions: int = 64) -> Model:
    """The model that the requests are for, written into a folder, with so many positions."""
    repo = write_repo(folder / "repo", "captioner")
    config = json.loads((repo / "config.json").read_text())
    config["decoder"]["max_position_embeddings"] = positions
    (repo / "config.json").write_text(json.dumps(config))
    return load(repo, threads=1, fall_back_later=False)


def post(model: Model, body: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the body of what the application answers."""
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def ask() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await gone.wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }
        await application(model, Limits())(scope, receive, send)

    asyncio.run(ask())
    whole = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(whole)
