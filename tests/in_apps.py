"""What people use, with a model of a test: the demo page, the server and `bench` say what our runtime says."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import httpx2
import pytest
from exported import Exported
from test_demo_page import captioned, status, upload, use

from vlm_export.apps import demo_site
from vlm_export.apps.load import load
from vlm_export.apps.serve import Limits, application
from vlm_export.measure import bench
from vlm_export.runtime.images import open_image
from vlm_export.web.site_server import SiteServer


def check_apps(exported: Exported, prompt: str) -> None:
    """In fp32, of one image."""
    picture = sorted((exported.recipe.path.parent / "images").iterdir())[0]
    model = load(exported.work.repo, dtype="fp32", backend="onnx", threads=1)
    answer = str(model.generate([open_image(picture)], prompt).text)
    assert answer
    assert in_the_page(exported, prompt, picture) == answer
    whole, streamed, turns = by_the_server(exported, prompt, picture)
    assert whole.json()["choices"][0]["message"]["content"] == answer
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == answer and len(pieces) > 2
    assert turns.status_code == (400 if exported.recipe.recipe.layout == "tasks" else 200), turns.text
    with pytest.MonkeyPatch.context() as patch:  # figures are no matter here
        patch.setattr(bench, "WARM_UP_SECONDS", 0.0)
        patch.setattr(bench, "MEASURED_SECONDS", 0.0)
        done = bench.bench(exported.work.repo, [picture], new_tokens=2, rounds=1, threads=1, dtypes=["fp32"])
    failures = {row.runtime: row.failure for row in done.rows}
    assert failures == {"ort": None, "node": None, "wasm": None}


def in_the_page(exported: Exported, prompt: str, picture: Path) -> str:
    """By `vlm_export/js` in WASM."""
    ask = ["fill", "#prompt", prompt]
    fp32 = ["check", "input[name=dtype][value=fp32]"]
    with SiteServer(demo_site.build(exported.work.repo, exported.recipe.golden_dir)) as server:
        *_, said = use(
            server.url, status("Ready"), fp32, status("Ready"), upload(picture), ask, *captioned(["click", "#run"])
        )
    return str(said)


def by_the_server(exported: Exported, prompt: str, picture: Path) -> list[httpx2.Response]:
    """Whole, streamed, and with a second turn."""
    model = load(exported.work.repo, dtype="fp32", backend="onnx", threads=1)
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    first = {"role": "user", "content": parts}
    more = [{"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"}]
    bodies = [{"messages": [first]}, {"messages": [first], "stream": True}, {"messages": [first, *more]}]

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(application(model, Limits()))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post("/v1/chat/completions", json={"model": model.name, **body}) for body in bodies]

    return asyncio.run(ask())
