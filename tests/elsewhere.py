"""What pasted code asks of other servers, answered on this machine.

Requests for the Hub go to another one, those for the CDN to the packages of npm that stand in the cache, if name,
version and path are theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_export.web import node_runtime

CDN = "https://cdn.jsdelivr.net/npm"
PACKAGES = ("@huggingface/transformers", "onnxruntime-web")
ENTRIES = ("transformers.min.js", "ort.wasm.min.mjs")
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
# Requests for the Hub go to another; what is fetched is not kept in the package's own folder.
IN_NODE = """
import {{ env }} from '@huggingface/transformers';
env.cacheDir = './fetched/';
const direct = env.fetch;
env.fetch = (address, options) => direct(String(address).replace('{there}', '{here}'), options);
"""
WITHOUT_PACKAGE = """
const direct = globalThis.fetch;
globalThis.fetch = (address, options) => direct(String(address).replace('{there}', '{here}'), options);
"""
IN_PAGE = """
const direct = window.fetch;
window.fetch = (address, options) => direct(String(address).replace('{there}', '{here}'), options);
"""


def cdn(folder: Path) -> Path:
    """The packages' files under the addresses that the CDN gives them, as an archive that Playwright answers from."""
    entries = []
    for name in PACKAGES:
        home = node_runtime.node_home() / "node_modules" / name
        version = json.loads((home / "package.json").read_text())["version"]
        for path in (home / "dist").iterdir():
            if path.suffix in TYPES and (path.name.startswith("ort-wasm") or path.name in ENTRIES):
                (folder / f"{home.name}-{path.name}").symlink_to(path)
                entries.append(_entry(f"{CDN}/{name}@{version}/dist/{path.name}", f"{home.name}-{path.name}"))
    archive = {"log": {"version": "1.2", "creator": {"name": "test", "version": "1"}, "entries": entries}}
    (folder / "cdn.har").write_text(json.dumps(archive))
    return folder / "cdn.har"


def _entry(address: str, file: str) -> dict[str, Any]:
    kind = TYPES[Path(file).suffix]
    common: dict[str, Any] = {"httpVersion": "HTTP/1.1", "cookies": [], "headersSize": -1, "bodySize": -1}
    headers = [{"name": "content-type", "value": kind}, {"name": "access-control-allow-origin", "value": "*"}]
    return {
        "startedDateTime": "2026-01-01T00:00:00.000Z",
        "time": 0,
        "request": {"method": "GET", "url": address, "headers": [], "queryString": [], **common},
        "response": {
            "status": 200,
            "statusText": "OK",
            "headers": headers,
            "redirectURL": "",
            "content": {"size": -1, "mimeType": kind, "_file": file},
            **common,
        },
        "cache": {},
        "timings": {"send": 0, "wait": 0, "receive": 0},
    }
