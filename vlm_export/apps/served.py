"""What a server says of the model that it serves: at `/v1/models`, on its page, and as a request to try it with."""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from vlm_export import bundled
from vlm_export.contract import TASK, LayoutName
from vlm_export.documents import load_document
from vlm_export.errors import InputError
from vlm_export.files import Work, sha256
from vlm_export.manifest import load_manifest
from vlm_export.runtime import Model
from vlm_export.runtime.model import Backend
from vlm_export.runtime.repo import CONFIG, ONNX
from vlm_export.verify.report import REPORT, Report

PAGE = Path(__file__).parents[1] / "server"
SAMPLE = "sample.json"  # the address of a whole request
_QUESTION = "What is in this image?"
# The page shows images that were chosen or sampled, and asks nobody but its own server.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


@dataclass(frozen=True)
class ServedModel:
    """A model as `/v1/models` describes it: OpenAI's four fields, and what it is here.

    Attributes:
        created: seconds since 1970 when its files were written on this machine; of PyTorch, when it was loaded.
        backend: what computes it, "onnx" or "torch".
        verified: whether `vlm-export verify` passed these graphs as they stand; None where no report is about them.
    """

    id: str
    created: int
    dtype: str
    layout: LayoutName
    backend: Backend
    verified: bool | None
    object: str = "model"
    owned_by: str = "vlm-export"


def describe(model: Model) -> ServedModel:
    """What there is to say of a model. Its graphs are read once, where there is a report to compare them with."""
    repo = model.engine.repo_path
    created = time.time() if repo is None else (repo / CONFIG).stat().st_mtime
    verified = None if repo is None else is_verified(repo, model.dtype)
    return ServedModel(model.name, int(created), model.dtype, model.layout, model.backend, verified)


def is_verified(repo: Path, dtype: str) -> bool | None:
    """Whether the report beside a repo says that a dtype passed; None where none is about its graphs as they are."""
    work = Work(repo.parent)
    if work.repo != repo or not (work.report / REPORT).is_file():
        return None
    try:
        report = load_document(work.report / REPORT, Report, "run `vlm-export verify` again")
        graphs = [graph.file for graph in load_manifest(repo).graphs if graph.dtype == dtype]
    except InputError:  # of another version, or damaged: it says nothing that is understood here
        return None
    files = [path for path in (repo / ONNX).iterdir() if any(_is_part(path.name, graph) for graph in graphs)]
    same = bool(files) and all(report.files_sha256.get(f"{ONNX}/{path.name}") == sha256(path) for path in files)
    return dtype not in report.failed_dtypes if same and dtype in report.verified_dtypes else None


def _is_part(name: str, graph: str) -> bool:
    """Whether a file is a graph's, or of its external data."""
    return name == graph or name.startswith(f"{graph}_data")


def routes(model: Model) -> list[Route]:
    """The page at the root, what it loads, and the sample."""

    async def sample(_: Request) -> Response:
        return JSONResponse(sample_request(model), headers=_HEADERS)

    return [
        Route("/", _file("index.html")),
        *(Route(f"/{name}", _file(name)) for name in ("page.js", "style.css")),
        Route(f"/{SAMPLE}", sample),
    ]


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return FileResponse(PAGE / name, headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

    return answer


def sample_request(model: Model) -> dict[str, Any]:
    """The body of a request that this model answers: about a golden image of a bundled recipe, else a photograph."""
    picture = sample_picture(model.name)
    url = f"data:{guess_type(picture.name)[0]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
    if model.takes_prompt:
        content.append({"type": "text", "text": TASK if model.layout == "tasks" else _QUESTION})
    return {"model": model.name, "messages": [{"role": "user", "content": content}]}


def sample_picture(name: str) -> Path:
    """A bundled picture of the kind that the model of this name was made for, as far as that is known."""
    own = sorted((bundled.GOLDEN / name / "images").glob("*.png"))
    return own[0] if own else bundled.photographs()[0]


def curl(base: str) -> str:
    """A line for a terminal that asks the server at `base`, which ends in a slash, about its own sample."""
    ask = f'curl -s {base}v1/chat/completions -H "content-type: application/json" -d @-'
    return f"curl -s {base}{SAMPLE} | {ask}"
