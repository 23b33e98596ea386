"""Runs exported repos in Node with stock transformers.js, as the people who load them will.

`node_home` installs the one release that `node/package-lock.json` pins, once for each user; `caption` starts
`node/caption.mjs` on it, hands it a request and reads its answers, which are described in that script. Its ONNX Runtime
is the native one for Node, or, for the target "wasm", the WASM build that browsers get.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from vlm_export.atomic import new_folder, scratch_folder
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import cache_folder
from vlm_export.news import tell
from vlm_export.targets import NodeTarget
from vlm_export.web.captions import Caption, Captions, Item, Layout, NoAnswer, caption_of, client_of, items_json

NODE_MAJOR = 20
SCRIPTS = Path(__file__).parents[1] / "node"
_MEGABYTES = 474  # of what its lock installs: transformers.js and both builds of ONNX Runtime
CONTRACT = SCRIPTS.parent / "js" / "src" / "contract.js"
_END_SECONDS = 15
NEXT_STEP = f"install Node {NODE_MAJOR} or newer"
INSTEAD = ", or run with --runtime ort"


@dataclass(frozen=True)
class RemoteModel:
    """A repo on a server with the Hub's addresses: `<host><id>/resolve/<revision>/<file>`."""

    host: str
    id: str
    revision: str = "main"


@dataclass(frozen=True)
class NodeCaptions(Captions):
    """Captions of a Node process; `peak_memory_bytes` is of the whole process."""

    load_milliseconds: float
    peak_memory_bytes: int


def caption(
    model: Path | RemoteModel,
    *,
    layout: Layout,
    dtype: str,
    items: Sequence[Item],
    generation: Mapping[str, float],
    target: NodeTarget = "node",
    threads: int | None = None,
    warm_up_seconds: float = 0,
    repeat_seconds: float = 0,
    on_item: Callable[[Caption], None] | None = None,
    silence_seconds: float = 600,
) -> NodeCaptions:
    """Captions the items in Node and calls `on_item` after each one.

    `dtype` is one of transformers.js' names, or "auto" for the one that the repo's config asks for. `generation` holds
    options of its `generate()`, such as `max_new_tokens`. `threads` are ONNX Runtime's, by default its own choice.
    Before the captions that count, items are captioned for `warm_up_seconds`. All items are captioned again until
    `repeat_seconds` have passed, and as many captions come back. Node is stopped when it says nothing for
    `silence_seconds`.

    Raises InputError when Node is missing or cannot be set up, CheckFailed when the model does not load or run.
    """
    captions: list[Caption] = []

    def hear(answer: dict[str, Any]) -> None:
        captions.append(caption_of(answer, scratch))
        if on_item:
            on_item(captions[-1])

    home = scripts_home()
    before = ["--import", (home / "onnxruntime-web.mjs").as_uri()] if target == "wasm" else []
    with scratch_folder() as folder:
        scratch = Path(folder)
        request = {
            "model": _model_json(model),
            "layout": layout,
            "dtype": dtype,
            "threads": threads,
            "warm_up_milliseconds": warm_up_seconds * 1e3,
            "repeat_milliseconds": repeat_seconds * 1e3,
            "generation": dict(generation),
            "items": items_json(items, scratch),
        }
        try:
            done = converse([*before, str(home / "caption.mjs")], request, scratch, hear, silence_seconds)
        except CheckFailed as error:
            where = f"{_name(model)}, layout {layout}, dtype {dtype}, in {client_of(layout)}"
            raise CheckFailed(f"{where}: {error}") from error
        warnings = tuple(_stderr(scratch).splitlines())
    return NodeCaptions(
        captions=tuple(captions),
        versions={name: done[name] for name in ("transformers", "onnxruntime", "node")},
        warnings=warnings,
        eos_token_ids=tuple(map(int, done["eos_token_ids"])),
        load_milliseconds=done["load_milliseconds"],
        peak_memory_bytes=done["peak_memory_bytes"],
    )


def node_home(scripts: Path = SCRIPTS, *, instead: str = INSTEAD) -> Path:
    """A folder that holds, in `node_modules`, the packages of the lock beside `scripts`; it is filled when needed.

    It lies in the cache folder (`files.cache_folder`).

    Raises InputError when Node or npm is missing or too old, and when npm fails; it ends in what can be done `instead`.
    """
    find_node(instead)
    home = home_of(scripts)
    if not home.is_dir():
        _install(scripts, home, instead)
    return home


def scripts_home(scripts: Path = SCRIPTS) -> Path:
    """A folder in `node_home` that holds `scripts`, whose imports are found in the `node_modules` above it.

    It is named by their content, so that two versions of this package can run at once.

    Raises InputError as `node_home` does.
    """
    sources = {path.name: path.read_bytes() for path in sorted(scripts.glob("*.mjs"))}
    sources["contract.mjs"] = CONTRACT.read_bytes()
    content = hashlib.sha256(b"".join(name.encode() + source for name, source in sources.items()))
    home = node_home(scripts) / f"scripts-{content.hexdigest()[:16]}"
    if not home.is_dir():
        with new_folder(home) as staging:
            if staging is not None:
                for name, source in sources.items():
                    (staging / name).write_bytes(source)
    return home


def home_of(scripts: Path = SCRIPTS) -> Path:
    """The folder that `node_home` fills, whether it is there or not: another for each lock."""
    lock = hashlib.sha256((scripts / "package-lock.json").read_bytes())
    return cache_folder() / f"node-{lock.hexdigest()[:16]}"


def find_node(instead: str = INSTEAD) -> str:
    """The path of a Node that is new enough.

    Raises:
        InputError: there is none; the message ends in what can be done `instead`.
    """
    node = _tool("node", instead)
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0] or 0) < NODE_MAJOR:
        raise InputError(f"{node} is version {version or 'unknown'}: {NEXT_STEP}{instead}")
    return node


def _tool(name: str, instead: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(f"{name} is not on PATH: {NEXT_STEP}{instead}")
    return path


def _install(scripts: Path, home: Path, instead: str) -> None:
    npm = _tool("npm", instead)
    with new_folder(home) as staging:
        if staging is None:
            return
        for name in ("package.json", "package-lock.json"):
            shutil.copy(scripts / name, staging)
        size = f": {_MEGABYTES} MB" if scripts == SCRIPTS else ""
        tell(f"installing npm packages into {home}, once{size}")
        _npm_ci(npm, staging, instead)


def _npm_ci(npm: str, folder: Path, instead: str) -> None:
    # No package needs its install script to run on the CPU; onnxruntime-node's would download the CUDA libraries.
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
    npm_ci = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if npm_ci.returncode:
        raise InputError(
            f"npm ci could not install the packages ({_one_line(npm_ci.stderr)[:250]}): "
            f"check the network and npm's registry setting{instead}"
        )


def _name(model: Path | RemoteModel) -> str:
    return f"{model.host}{model.id}" if isinstance(model, RemoteModel) else str(model)


def _model_json(model: Path | RemoteModel) -> dict[str, str]:
    if isinstance(model, RemoteModel):
        return {"remote_host": model.host, "id": model.id, "revision": model.revision}
    return {"path": str(model.absolute())}


def converse(
    arguments: Sequence[str],
    request: Mapping[str, Any],
    scratch: Path,
    hear: Callable[[dict[str, Any]], None],
    silence_seconds: float,
) -> dict[str, Any]:
    """Run Node with `arguments` in the folder `scratch`, hand it the request and pass each item's answer to `hear`.

    Returns its last answer. What it writes to stderr is kept in `scratch`.

    Raises CheckFailed when it fails, NoAnswer when it says nothing for `silence_seconds`, InputError when Node is
    missing.
    """
    (scratch / "request.json").write_text(json.dumps(request))
    command = [find_node(), *arguments]
    answer: dict[str, Any] = {}
    lines: SimpleQueue[str] = SimpleQueue()
    with (
        (scratch / "request.json").open() as stdin,
        (scratch / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            command,
            cwd=scratch,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        ) as node,
    ):
        threading.Thread(target=_pass_on, args=(node.stdout, lines), daemon=True).start()
        try:
            while line := lines.get(timeout=silence_seconds):
                answer = json.loads(line)
                if "error" in answer:
                    raise CheckFailed(_one_line(answer["error"]))
                if "index" in answer:
                    hear(answer)
            status = node.wait()
        except Empty:
            raise NoAnswer(f"no answer for {silence_seconds:g} s, so Node was stopped") from None
        finally:
            _stop(node)
    if status or "done" not in answer:
        raise CheckFailed(f"Node ended with exit status {status}: {_one_line(_stderr(scratch))[-500:]}")
    return answer


def _stop(node: subprocess.Popen[str]) -> None:
    """End a process; it first ends the browser that it may have started, with what that left on the disk."""
    node.terminate()
    try:
        node.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()


def _pass_on(stream: Iterable[str], lines: SimpleQueue[str]) -> None:
    """Put every line of a stream into a queue, and an empty one at its end: a queue can be read with a timeout."""
    for line in stream:
        lines.put(line)
    lines.put("")


def _stderr(scratch: Path) -> str:
    return (scratch / "stderr.txt").read_text(errors="replace")


def _one_line(message: str) -> str:
    return " ".join(message.split())
