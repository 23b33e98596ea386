"""An exported repo, or one that somebody else published for transformers.js: its files, and the dtypes that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_export.contract import MODEL_TYPES, PREFIX, SINGLE_OF, SUFFIXES, LayoutName
from vlm_export.dtypes import preferred
from vlm_export.errors import InputError
from vlm_export.forms.reading import json_of
from vlm_export.own_files import own_file

ONNX = "onnx"
ASKED: tuple[LayoutName, ...] = ("chat", "tasks")
CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, MANIFEST = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "export.json",
)
_TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# Other exporters' quantize activations by the range of a whole batch, so that a row's tokens depend on the others'.
ROW_BY_ROW = ("q8", "int8", "uint8")


@dataclass(frozen=True)
class Repo:
    """A repo's folder and JSON files.

    Attributes:
        files: those four that drivers and processors read.
        in_graph: image processor settings that the vision graph carries out, if it does.
        failed: dtypes that did not pass `vlm-export verify`; none is taken unless it is asked for.
    """

    path: Path
    files: Mapping[str, dict[str, Any]]
    name: str
    failed: tuple[str, ...] = ()
    in_graph: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return self.files[CONFIG]

    @property
    def generation(self) -> dict[str, Any]:
        """`generation_config.json`, with `config.json`'s special tokens where it names none; empty without either."""
        return self.files[GENERATION]

    @property
    def preprocessor(self) -> dict[str, Any]:
        """`preprocessor_config.json`, empty where there is none."""
        return self.files[PREPROCESSOR]

    @property
    def processor(self) -> dict[str, Any]:
        """`processor_config.json`, empty where there is none."""
        return self.files[PROCESSOR]

    @property
    def layout(self) -> LayoutName:
        """The layout, by `config.json`'s `model_type`: what is neither a captioner's nor a chat's is components."""
        return MODEL_TYPES.get(self.config.get("model_type", ""), "components")

    @property
    def fed_as(self) -> LayoutName:
        """The layout whose inputs it takes: of one file, that of the graphs that it is made of."""
        if self.layout != "single":
            return self.layout
        return MODEL_TYPES.get(self.config.get(SINGLE_OF) or "", "captioner")

    @property
    def takes_prompt(self) -> bool:
        """Whether it is asked something: in a conversation, or by a task prompt."""
        return self.fed_as in ASKED

    @property
    def has_prefix(self) -> bool:
        """Whether an image stands before the text, once, and no conversation was trained on."""
        return self.layout == "components" or bool(self.config.get(PREFIX))

    @property
    def positions(self) -> int | None:
        """How many positions the decoder has, prompt and answer together; None if the config does not say."""
        text = self.config.get("text_config") or self.config.get("decoder") or self.config
        found = [text.get(name) for name in ("max_position_embeddings", "n_positions")]
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    @property
    def rows(self) -> int | None:
        """How many tokens the model's table has; None if the config does not say."""
        text = self.config.get("text_config") or self.config.get("decoder") or self.config
        return next((size for part in (text, self.config) if isinstance(size := part.get("vocab_size"), int)), None)

    @property
    def graph_files(self) -> set[str]:
        """Names of the files in onnx/."""
        return {path.name for path in (self.path / ONNX).glob("*.onnx") if own_file(self.path, f"{ONNX}/{path.name}")}


def complete_dtypes(names: Collection[str], components: Sequence[str]) -> list[str]:
    """The dtypes in which there is a file of every graph, among the `names` of files."""
    return [
        dtype
        for dtype, suffix in SUFFIXES.items()
        if all(f"{component}{suffix}.onnx" in names for component in components)
    ]


def choose_dtype(
    wanted: str | None, components: Sequence[str], names: Collection[str], where: str, failed: Collection[str] = ()
) -> str:
    """The dtype to run: the one that is wanted, else what a processor prefers, else any that did not fail.

    Raises:
        InputError: a graph of it is missing among the `names` of files, or there is no dtype with every graph, or all
            that are there are among the `failed`.
    """
    if wanted is not None and wanted not in SUFFIXES:
        raise InputError(f"dtype {wanted!r} is none of {', '.join(SUFFIXES)}")
    have = complete_dtypes(names, components)
    passed = [dtype for dtype in have if dtype not in failed]
    if wanted is None and passed:
        return preferred("cpu", passed) or passed[0]
    if wanted is None and have:
        raise InputError(f"{where}: {', '.join(have)} failed `vlm-export verify`; --dtype runs one all the same")
    if wanted in have:
        return str(wanted)
    needed = [f"{component}{SUFFIXES[wanted or 'fp32']}.onnx" for component in components]
    missing = ", ".join(name for name in needed if name not in names)
    raise InputError(f"{where}: {missing} missing" + (f"; there is {', '.join(have)}" if have else ""))


def open_repo(path: Path) -> Repo:
    """Read the JSON files of a repo.

    Raises:
        InputError: it has no config.json, or one of them is damaged.
    """
    config = json_of(path, CONFIG)
    if config is None:
        raise InputError(f"{path}: no {CONFIG}, so this is no exported repo")
    files = {CONFIG: config, **{name: json_of(path, name) or {} for name in (GENERATION, PREPROCESSOR, PROCESSOR)}}
    files[GENERATION] = _token_ids(files[CONFIG]) | files[GENERATION]
    manifest = json_of(path, MANIFEST) or {}
    name = manifest.get("recipe") or path.resolve().name
    return Repo(path, files, name, tuple(manifest.get("failed") or ()), manifest.get("in_graph") or {})


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of tokens that begin and end a text in a config.json, for where generation_config.json names none."""
    found: dict[str, Any] = {}
    for part in (config.get("text_config") or {}, config.get("decoder") or {}, config):
        found |= {name: part[name] for name in _TOKEN_IDS if part.get(name) is not None}
    return found
