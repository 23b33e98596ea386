"""Runs exported repos in headless Chromium with stock transformers.js, on WASM or on WebGPU.

The packages are those that `node/package-lock.json` and `browser/package-lock.json` pin. They and the repo are served
on the loopback interface, under the Hub's addresses, with 404 for what is not there; `browser/page.mjs` captions, and
`browser/drive.mjs` opens it. The page asks nothing of other servers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlm_export.atomic import scratch_folder
from vlm_export.errors import CheckFailed, InputError
from vlm_export.targets import BrowserTarget
from vlm_export.web import node_runtime
from vlm_export.web.captions import Caption, Captions, Item, Layout, caption_of, client_of, items_json
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

SCRIPTS = Path(__file__).parents[1] / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")  # on PATH; the environment's CHROMIUM comes first
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WASM = ("--disable-gpu",)
_VULKAN = ("--use-angle=vulkan", "--disable-vulkan-surface") if sys.platform == "linux" else ()
WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--ignore-gpu-blocklist", *_VULKAN)
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--ignore-gpu-blocklist",
)
_REPO = "local/model"  # a name as the Hub's are; nothing depends on it
_START_SECONDS = 60
# Lines of ONNX Runtime's log: those of no warning, and one that says where nodes run.
_VERBOSE = re.compile(r" \[[VI]:onnxruntime:")
_PLACED = re.compile(r"placed on \[(\w+)\]\. Number of nodes: (\d+)")


@dataclass(frozen=True)
class Adapter:
    """What WebGPU computes on.

    Attributes:
        name: as the browser tells it.
        software: whether a processor plays it.
        float16: whether it computes in float16 (`shader-f16`).
        flags: with which Chromium has it.
    """

    name: str
    software: bool
    float16: bool
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} in software" if self.software else self.name


@dataclass(frozen=True)
class BrowserCaptions(Captions):
    """Captions of a page.

    Attributes:
        files: what the page asked for of the repo, and got.
        missing: what it asked for and is not there.
        dtypes: what the graphs were loaded in, each once.
        isolated: whether the page may have threads.
    """

    files: tuple[str, ...]
    missing: tuple[str, ...]
    dtypes: frozenset[str]
    isolated: bool


@dataclass(frozen=True)
class Visit:
    """What came of steps in a page: answers, what the page logged, and what it asked of other servers than its own."""

    answers: list[Any]
    console: list[str]
    foreign: list[str]
    chromium: str


def find_chromium() -> str:
    """The path of Chromium.

    Raises:
        InputError: there is none.
    """
    own = os.environ.get("CHROMIUM")
    path = next(filter(None, map(shutil.which, [own] if own else NAMES)), None)
    if path is None:
        raise InputError(
            f"no Chromium ({f'CHROMIUM is {own}' if own else ', '.join(NAMES)}): install one, with `apt-get install "
            f"chromium` on Debian, or set CHROMIUM to its path{node_runtime.INSTEAD}"
        )
    return path


def check(target: BrowserTarget) -> Adapter | None:
    """Install what is needed and start Chromium once. Returns the adapter where the target is WebGPU.

    Raises:
        InputError: Node or Chromium is missing, does not start, or has no adapter.
    """
    path = find_chromium()
    node_runtime.node_home()
    if target == "webgpu":
        return find_adapter(path)
    try:
        drive("about:blank", [], WASM, silence_seconds=_START_SECONDS)
    except CheckFailed as error:
        raise _does_not_start(path, error) from error
    return None


@cache
def find_adapter(path: str) -> Adapter:
    """The adapter that the Chromium of this path has for WebGPU: the machine's own, else one in software.

    Raises:
        InputError: Chromium does not start, or has none.
    """
    for flags in (WEBGPU, SOFTWARE_WEBGPU):
        try:
            with SiteServer(_page(), ISOLATION) as server:
                steps = [["evaluate", "adapter()"]]
                seen = drive(f"{server.url}/browser/page.html", steps, flags, silence_seconds=_START_SECONDS)
        except CheckFailed as error:
            raise _does_not_start(path, error) from error
        [found] = seen.answers
        if found and (flags == SOFTWARE_WEBGPU or not found["software"]):
            return Adapter(**found, flags=flags)
    raise InputError(
        f"{path} has no WebGPU adapter, not even in software: install a newer Chromium, or run with --runtime wasm"
    )


def _does_not_start(path: str, error: CheckFailed) -> InputError:
    return InputError(
        f"{path} does not start ({str(error)[:250]}): set CHROMIUM to the path of another{node_runtime.INSTEAD}"
    )


def caption(
    repo: Path,
    *,
    layout: Layout,
    dtype: str,
    items: Sequence[Item],
    generation: Mapping[str, float],
    target: BrowserTarget,
    flags: Sequence[str],
    on_item: Callable[[Caption], None] | None = None,
    silence_seconds: float = 600,
) -> BrowserCaptions:
    """Caption the items in a page and call `on_item` after each one.

    `dtype` is one of transformers.js' names, or "auto" for the one that the repo's config asks for. `generation` holds
    options of its `generate()`. Chromium is stopped when the page says nothing for `silence_seconds`.

    Raises InputError when Node or Chromium is missing, CheckFailed when the model does not load or run, NoAnswer when
    it was stopped.
    """
    captions: list[Caption] = []

    def hear(answer: dict[str, Any]) -> None:
        captions.append(caption_of(answer, scratch))
        if on_item:
            on_item(captions[-1])

    with scratch_folder() as folder:
        scratch = Path(folder)
        images: dict[str, Path | bytes] = {}

        def address(index: int, image: Path) -> str:
            name = f"items/{index}{image.suffix}"
            images[name] = image
            return f"/{quote(name)}"

        request = {
            "id": _REPO,
            "layout": layout,
            "device": target,
            "dtype": dtype,
            "generation": dict(generation),
            "items": items_json(items, scratch, address),
        }
        prefix = f"/{_REPO}/resolve/main/"
        site = {**_page(), **files_under({prefix: repo, "/browser/": scratch}), **images}
        with SiteServer(site, ISOLATION) as server:
            steps = [["evaluate", f"run({json.dumps(request)})"]]
            try:
                seen = _drive(f"{server.url}/browser/page.html", steps, flags, scratch, hear, silence_seconds)
            except CheckFailed as error:
                where = f"{repo}, layout {layout}, dtype {dtype}, in {client_of(layout)} on {target}"
                raise type(error)(f"{where}: {error}") from error
    if seen.foreign:
        raise CheckFailed(f"{repo}: the page asks other servers: {', '.join(seen.foreign[:3])}")
    [done] = seen.answers
    asked = [(status, path.removeprefix(prefix)) for status, path in server.answers if path.startswith(prefix)]
    return BrowserCaptions(
        captions=tuple(captions),
        versions={name: done[name] for name in ("transformers", "onnxruntime")}
        | {"chromium": seen.chromium}
        | _placed(seen.console),
        warnings=tuple(line for line in seen.console if not _VERBOSE.search(line)),
        eos_token_ids=tuple(map(int, done["eos_token_ids"])),
        files=tuple(path for status, path in asked if status != 404),
        missing=tuple(path for status, path in asked if status == 404),
        dtypes=frozenset(done["sessions"].values()),
        isolated=done["isolated"],
    )


def _placed(logged: Sequence[str]) -> dict[str, str]:
    """How many nodes of a graph ONNX Runtime leaves to the processor, where it logged that."""
    counts = {found[1]: int(found[2]) for line in logged if (found := _PLACED.search(line))}
    own = counts.get("CPUExecutionProvider", 0)
    return {"nodes on the processor": f"{own} of {sum(counts.values())}"} if counts else {}


def drive(url: str, steps: Sequence[Sequence[Any]], flags: Sequence[str], *, silence_seconds: float = 150) -> Visit:
    """Open a page in headless Chromium and take the steps that `browser/drive.mjs` describes.

    Raises:
        CheckFailed: a step, the page or the browser fails, or that takes longer than `silence_seconds`.
        InputError: Node or Chromium is missing.
    """
    with scratch_folder() as folder:
        return _drive(url, steps, flags, Path(folder), lambda _: None, silence_seconds)


def _drive(
    url: str,
    steps: Sequence[Sequence[Any]],
    flags: Sequence[str],
    scratch: Path,
    hear: Callable[[dict[str, Any]], None],
    silence_seconds: float,
) -> Visit:
    """The same; what the page says of items goes to `hear`, what it saves into `scratch`."""
    script = node_runtime.scripts_home(SCRIPTS) / "drive.mjs"
    job = {"chromium": find_chromium(), "flags": [*FLAGS, *flags], "url": url, "steps": steps}
    done = node_runtime.converse([str(script)], job, scratch, hear, silence_seconds)
    return Visit(**{name: done[name] for name in ("answers", "console", "foreign", "chromium")})


def _page() -> dict[str, Path | bytes]:
    """The page, and what it loads beside a repo."""
    packages = node_runtime.node_home() / "node_modules"
    folders = {
        "/transformers/": packages / "@huggingface/transformers/dist",
        "/onnxruntime/": packages / "onnxruntime-web/dist",
    }
    return {
        **files_under(folders),
        **{f"browser/{name}": SCRIPTS / name for name in ("page.html", "page.mjs")},
        **{f"node/{name}": node_runtime.SCRIPTS / name for name in ("client.mjs", "prompts.mjs", "single.mjs")},
        "node/contract.mjs": node_runtime.CONTRACT,
    }
