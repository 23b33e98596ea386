"""The page that captions with an exported repo, as a site: every file that it needs, under its address.

    index.html, *.js, style.css   the page, from `demo/`
    demo.json                     what it must know of the repo before it loads it
    model/                        the repo: configs and graphs
    samples/                      images to try
    vlm-export/                   our JavaScript package, from `js/`
    transformers/, onnxruntime/   stock transformers.js and its runtime; for layout single the runtime alone
    licenses/

All addresses are relative, so the site works wherever it lies. `site_server` serves it, `export` writes it to a folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Literal

from vlm_export import __version__, bundled
from vlm_export.apps.exported_repo import recipe_of
from vlm_export.atomic import atomic_folder
from vlm_export.documents import front_matter
from vlm_export.dtypes import PREFERRED
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.graph.pieces import pieces_of
from vlm_export.manifest import ONNX, Manifest, load_manifest
from vlm_export.own_files import own_file, unchanged_file
from vlm_export.runtime.repo import open_repo
from vlm_export.verify.golden import JSON, GoldenImage, load_facts
from vlm_export.verify.saved import load_report
from vlm_export.web.node_runtime import node_home
from vlm_export.web.site_server import ISOLATION, Site

FACTS = "demo.json"
PAGE = Path(__file__).parents[1] / "demo"
PACKAGE = Path(__file__).parents[1] / "js"
MAX_SAMPLES = 10
_TRANSFORMERS = "transformers/transformers.min.js"
_BARE_IMPORT = "'@huggingface/transformers'"
_REPO_FILES = ("*.json", "LICENSE*", "NOTICE*", "onnx/*.onnx", "onnx/*.onnx_data*")
_RUNTIME = "ort-wasm-simd-threaded.asyncify"
_RUNTIME_SUFFIXES = (".mjs", ".wasm")
_MODULE = "ort.webgpu.min.mjs"
_OF_PACKAGE = ("LICENSE", "*.js", "src/**/*.js")
_OF_SINGLE = ("LICENSE", "src/contract.js")
_FILE_LIST = "files.json"
_SPACE_HEADERS = "\n".join(f"  {name.lower()}: {value}" for name, value in ISOLATION.items())
_README = """---
title: {name}
sdk: static
{models}custom_headers:
{headers}
---

# {name}, in a browser

A page that captions images in the browser, with {client} and no server behind it. Any host of static files
will do; all addresses are relative.{home}

- Hugging Face Space: `hf upload your-name/{name} . --repo-type space`, run in this folder. The block above makes it a
  static Space and sends the headers below.
- GitHub Pages: commit the folder and publish it. No file may be larger than 100 MB there.
- On your machine: `python -m http.server`, run in this folder.

The runtime takes several threads only where the host sends

    Cross-Origin-Opener-Policy: same-origin
    Cross-Origin-Embedder-Policy: require-corp

which GitHub Pages cannot: there it runs on one thread, and the page says so.

The licenses of {parts} are in `licenses/`, that of `vlm-export/` is Apache-2.0.
Written by `vlm-export demo --export`, which overwrites this folder only while nothing is added to it.
"""


@dataclass(frozen=True)
class Home:
    """The repo on the Hub that a site is about: its id, and the address of its page."""

    repo_id: str
    address: str


@dataclass(frozen=True)
class Verified:
    """What `verify` said of a dtype, as the page shows it.

    Attributes:
        verdict: whether a check failed.
        captions_exact: how many captions have exactly PyTorch's tokens, as `31 of 32`; None where nobody counted.
    """

    verdict: Literal["pass", "fail"]
    captions_exact: str | None = None


@dataclass(frozen=True)
class Licence:
    """What may be done with a part of the site, and the address of the text, relative unless it is elsewhere."""

    of: str
    name: str
    address: str | None


def build(
    repo: Path, goldens: Path | None, *, cached: bool = False, home: Home | None = None
) -> dict[str, Path | bytes]:
    """The site for an exported repo. Samples are the images of its `goldens`, if there are any.

    `cached`: a browser keeps the model until the repo is another; the runtime it always keeps. A site with a `home`
    links to it. What `verify` said comes from the report beside the repo, if that is about these graphs.

    Raises:
        InputError: the repo was not made by `vlm-export onnx`, or is one file that a page cannot run; or a
            package cannot be installed.
    """
    manifest = load_manifest(repo)
    is_single = manifest.layout == "single"
    if is_single:
        _check_single(repo, manifest)
    model = dict(_files(repo, _REPO_FILES))
    libraries = _libraries(is_single=is_single)
    captions, prompt = _samples(goldens, manifest.inputs_sha256) if goldens else ({}, "")
    facts = {
        "generator": f"vlm-export {__version__}",
        "name": manifest.recipe,
        "layout": manifest.layout,
        "preferred": {device: list(names) for device, names in PREFERRED.items()},
        "verified": {dtype: asdict(said) for dtype, said in _verified(repo, manifest.failed).items()},
        "download_bytes": _download_bytes(manifest, model),
        "cache": _fingerprint(model) if cached else None,
        "runtime": {
            "bytes": sum(libraries[f"onnxruntime/{_RUNTIME}{suffix}"].stat().st_size for suffix in _RUNTIME_SUFFIXES),
            "cache": _fingerprint({name: path for name, path in libraries.items() if name.startswith("onnxruntime/")}),
        },
        "licences": [asdict(licence) for licence in _licences(repo, model, is_single=is_single)],
        "home": asdict(home) if home else None,
        "prompt": prompt,
        "samples": [{"file": f"samples/{path.name}", "caption": caption} for path, caption in captions.items()],
    }
    return {
        **{path.name: path for path in PAGE.iterdir()},
        FACTS: _json(facts),
        **{f"model/{name}": path for name, path in model.items()},
        **{f"samples/{path.name}": path for path in captions},
        **{
            f"vlm-export/{name}": _bound(name, path)
            for name, path in _files(PACKAGE, _OF_SINGLE if is_single else _OF_PACKAGE)
        },
        **libraries,
    }


def _check_single(repo: Path, manifest: Manifest) -> None:
    """Raises InputError: the one file takes pixels, gives no text, or is not one file."""
    if open_repo(repo).takes_prompt:
        raise InputError(f"{repo}: the demo of layout single captions: of a chat take layout chat")
    if not manifest.in_graph:
        raise InputError(f"{repo}: the demo of layout single needs a graph that takes pictures: `preprocess: graph`")
    if pieces_of(repo / "tokenizer.json", 1) is None:
        raise InputError(f"{repo}: the demo of layout single needs texts, which this tokenizer's tokens do not make")
    if large := next((graph.file for graph in manifest.graphs if graph.data_chunks), None):
        raise InputError(f"{repo / ONNX / large}: too large for a page: export a smaller dtype")


def with_notes(site: Site) -> dict[str, Path | bytes]:
    """The site with what hosts of files read: a README that makes it a static Space, and a list of its files."""
    facts = json.loads(_bytes(site[FACTS]))
    home, is_single = facts["home"], facts["layout"] == "single"
    readme = _README.format(
        name=facts["name"],
        client="ONNX Runtime" if is_single else "stock transformers.js",
        parts="`onnxruntime/`" if is_single else "`transformers/` and `onnxruntime/`",
        headers=_SPACE_HEADERS,
        models=f"models:\n- {home['repo_id']}\n" if home else "",
        home=f" The model is [{home['repo_id']}]({home['address']})." if home else "",
    )
    # GitHub Pages would otherwise look for what Jekyll has to do.
    whole: dict[str, Path | bytes] = {**site, "README.md": readme.encode(), ".nojekyll": b""}
    files = sorted([*whole, _FILE_LIST])
    return whole | {_FILE_LIST: _json({"generator": f"vlm-export {__version__}", "files": files})}


def export(site: Site, target: Path) -> list[str]:
    """Write the site to a new or empty folder, or over one that this wrote, for any host of static files.

    Returns the addresses that were written. Raises InputError if the folder holds something else.
    """
    target = target.resolve()
    _check_replaceable(target)
    whole = with_notes(site)
    with atomic_folder(target) as folder:
        for address, content in whole.items():
            path = folder / address
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
    return sorted(whole)


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file: choose a folder")
    if Path.cwd().is_relative_to(target):
        raise InputError(f"{target}: is the current folder or around it: choose another folder")
    found = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    written: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = set(json.loads((target / _FILE_LIST).read_bytes())["files"])
    if others := sorted(found - written):
        raise InputError(
            f"{target}: holds {others[0]}, which `vlm-export demo --export` did not write: choose a new or empty folder"
        )


def goldens_of(reference: str | None, repo: Path) -> Path:
    """Where the goldens of a repo would lie: those of the recipe that was named, or bundled ones of the repo's."""
    recipe = recipe_of(reference)
    return recipe.golden_dir if recipe else bundled.GOLDEN / Path(load_manifest(repo).recipe).name


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Files below `folder` by their relative address, without hidden ones.

    Raises:
        InputError: one is a link that leads out of it, or no file.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        address = path.relative_to(folder).as_posix()
        if not path.name.startswith(".") and own_file(folder, address):
            yield address, path


def _download_bytes(manifest: Manifest, model: Mapping[str, Path]) -> dict[str, int]:
    """The bytes of all graphs by dtype, for the dtypes that lack none of them."""
    graphs = {dtype: [graph for graph in manifest.graphs if graph.dtype == dtype] for dtype in manifest.dtypes}
    return {
        dtype: sum(graph.size_bytes for graph in found)
        for dtype, found in graphs.items()
        if all(f"{ONNX}/{graph.file}" in model for graph in found)
    }


def _verified(repo: Path, failed: Sequence[str]) -> dict[str, Verified]:
    """By dtype what `verify` said; of a repo without its report only which failed, as its manifest has it."""
    report = load_report(Work(repo.parent)) if repo.name == Work(repo.parent).repo.name else None
    rows = report.table if report else []
    said = {row.dtype: Verified(row.verdict, row.captions_exact) for row in rows if row.verdict}
    return said | {dtype: replace(said.get(dtype, Verified("fail")), verdict="fail") for dtype in failed}


def _licences(repo: Path, model: Mapping[str, Path], *, is_single: bool) -> list[Licence]:
    """Of the model, where it says one, and of what runs it."""
    card = own_file(repo, "README.md")
    front = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card else {}
    text = next((f"model/{name}" for name in model if name.startswith("LICENSE")), None)
    name = front.get("license_name") or front.get("license")
    own = [Licence("the model", str(name or "its licence"), text or _web_address(front))] if name or text else []
    return [
        *own,
        Licence("vlm-export", "Apache-2.0", "vlm-export/LICENSE"),
        *([] if is_single else [Licence("transformers.js", "Apache-2.0", "licenses/transformers.js.txt")]),
        Licence("ONNX Runtime", "MIT", "licenses/onnxruntime.txt"),
    ]


def _web_address(front: Mapping[str, Any]) -> str | None:
    link = str(front.get("license_link"))
    return link if link.startswith("https://") else None


def _samples(goldens: Path, inputs_sha256: dict[str, str]) -> tuple[dict[Path, str | None], str]:
    """Golden images with their captions, and the prompt that belongs to them.

    No captions where the golden is about other weights, or has several turns.

    Raises:
        InputError: an image is not the one that was recorded, or is a link that leads out of the golden.
    """
    if own_file(goldens, JSON) is None:
        return {}, ""
    golden = load_facts(goldens)
    turns = [turn for turn in golden.conversation if turn["role"] == "user"]
    prompt = _text(turns[0]) if turns else golden.text
    usable = golden.inputs_sha256 == inputs_sha256 and len(turns) <= 1
    images = golden.images[:MAX_SAMPLES]
    return {_sample(goldens, image): image.caption if usable else None for image in images}, prompt


def _sample(goldens: Path, image: GoldenImage) -> Path:
    name = f"images/{Path(image.file).name}"
    path = unchanged_file(goldens, name, image.sha256)
    if path is None:
        raise InputError(
            f"{goldens / name}: not the image that the golden outputs were recorded on: run `vlm-export golden` again"
        )
    return path


def _text(turn: dict[str, Any]) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _bound(address: str, path: Path) -> bytes:
    """A module of our package that imports transformers.js from the site: no worker has an import map."""
    up = "../" * (address.count("/") + 1)
    return path.read_text(encoding="utf-8").replace(_BARE_IMPORT, f"'{up}{_TRANSFORMERS}'").encode()


def _libraries(*, is_single: bool) -> dict[str, Path]:
    """What runs the repo: ONNX Runtime, with transformers.js or, for one file, with its own module."""
    packages = node_home() / "node_modules"
    transformers = packages / "@huggingface/transformers"
    onnxruntime = Path(str(distribution("onnxruntime").locate_file("onnxruntime")))
    of_client = {
        _TRANSFORMERS: transformers / "dist/transformers.min.js",
        "licenses/transformers.js.txt": transformers / "LICENSE",
        "licenses/tokenizers.txt": packages / "@huggingface/tokenizers/LICENSE",
        "licenses/jinja.txt": packages / "@huggingface/jinja/LICENSE",
    }
    alone = {f"onnxruntime/{_MODULE}": packages / "onnxruntime-web/dist" / _MODULE}
    return {
        **(alone if is_single else of_client),
        **{
            f"onnxruntime/{_RUNTIME}{suffix}": packages / f"onnxruntime-web/dist/{_RUNTIME}{suffix}"
            for suffix in _RUNTIME_SUFFIXES
        },
        # The npm package of onnxruntime has no license file; the Python package is built from the same repository.
        "licenses/onnxruntime.txt": onnxruntime / "LICENSE",
        "licenses/onnxruntime-third-party.txt": onnxruntime / "ThirdPartyNotices.txt",
    }


def _fingerprint(model: Mapping[str, Path]) -> str:
    """A short hash of the names, sizes and modification times of the repo's files: it changes when one of them does."""
    facts = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in model.items()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
