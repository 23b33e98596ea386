"""What a user named: a folder of this machine or a repo of the Hub, as far as it describes itself without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_export.errors import InputError
from vlm_export.families._known import named_as_today
from vlm_export.files import Work
from vlm_export.forms.reading import json_of
from vlm_export.own_files import leads_out, own_file
from vlm_export.paths import expanded, is_plainly_a_path, no_such_folder

CONFIG, ADAPTER_CONFIG, GENERATION = "config.json", "adapter_config.json", "generation_config.json"
CARD, MANIFEST, ONNX = "README.md", "export.json", "onnx/"
# What is fetched of a Hub repo: kilobytes.
DESCRIBING = (
    CONFIG,
    ADAPTER_CONFIG,
    GENERATION,
    CARD,
    MANIFEST,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors.index.json",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Named:
    """A folder or a repo.

    Attributes:
        reference: as the user wrote it; of a Hub repo its id, without a revision.
        path: the folder, or the one of the Hub's cache with the files that describe the repo.
        sizes_bytes: of every file, by its path in the folder or repo; those included that were not fetched.
        commit: of a Hub repo.
    """

    reference: str
    path: Path
    sizes_bytes: Mapping[str, int]
    commit: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.commit is None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty where there is no such file.

        Raises:
            InputError: it is a link that leads out of the folder, or holds something else.
        """
        return json_of(self.path, name) or {}

    def text(self, name: str) -> str:
        """A text file's contents; empty where there is no such file."""
        path = own_file(self.path, name)
        return path.read_text(encoding="utf-8", errors="replace") if path else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, under the names of its family."""
        return named_as_today(self.json(CONFIG))

    @property
    def graphs(self) -> dict[str, int]:
        """The sizes of the files in `onnx/`, by name."""
        return {file.removeprefix(ONNX): size for file, size in self.sizes_bytes.items() if file.startswith(ONNX)}


def find(reference: str, notify: Callable[[str], None] = lambda line: None) -> Named:
    """The folder or repo that a user named; of the Hub, only what describes it is fetched, and `notify` is told so.

    Raises:
        InputError: there is no such folder or repo, it is a file and not of weights, or the Hub cannot be reached.
    """
    path = expanded(reference)
    if path.is_file():
        if path.suffix not in _WEIGHTS:
            raise InputError(f"{reference}: is a file: name the folder of a model, an adapter or an exported repo")
        path = path.parent
    if path.is_dir():
        inner = Work(path).repo
        folder = inner if not (path / CONFIG).exists() and (inner / CONFIG).exists() else path
        return Named(reference, folder, _sizes(folder))
    if is_plainly_a_path(reference):
        raise InputError(no_such_folder(reference))
    return _on_the_hub(reference, notify)


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and those of its `onnx/`; no links that lead out of it."""
    paths = [path for place in (folder, folder / ONNX) if place.is_dir() for path in sorted(place.iterdir())]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in paths
        if path.is_file() and not leads_out(folder, path)
    }


def _on_the_hub(repo_id: str, notify: Callable[[str], None]) -> Named:
    from vlm_export import hub

    notify(f"no folder {repo_id} here: asking the Hub for the files that describe it")
    folder = hub.download(repo_id, allow_patterns=DESCRIBING)
    files = hub.list_files(repo_id, revision=folder.name)
    return Named(repo_id.partition("@")[0], folder, files, folder.name)
