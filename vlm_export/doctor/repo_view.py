"""A repo as rules see it: names and sizes of its files, its JSON, and its graphs without weights.

Nothing is read from outside the repo's folder. What cannot be read is no error here: the view says so, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_export.contract import LAYERS_FIELD, SUFFIXES
from vlm_export.doctor.classes import CLASSES, ClientClass, Loaded
from vlm_export.errors import InputError
from vlm_export.files import read_json
from vlm_export.graph.graph_on_disk import external_files, open_graph
from vlm_export.own_files import leads_out, own_file

CONFIG, GENERATION = "config.json", "generation_config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DOCUMENTS = (CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG)
ONNX = "onnx/"
CLIENT_CONFIG = "transformers.js_config"
# By device: the dtype that transformers.js takes where config.json names none, and who runs there.
DEVICES = {"cpu": ("fp32", "Node"), "wasm": ("q8", "a browser"), "webgpu": ("fp32", "a browser with WebGPU")}
# Members of config.json whose settings of generation win over those beside them.
_OVERWRITING = ("decoder", "generator", "text_config")
# Decoders with a cache of cross-attention beside their own.
_WITH_CROSS_CACHE = ("bart", "blenderbot", "florence2_language", "m2m_100", "marian", "mbart", "trocr", "whisper")
_CROSS_CACHE_LAYERS = "decoder_layers"


@dataclass(frozen=True)
class GraphFile:
    """A graph of the repo.

    Attributes:
        file: its path in the repo.
        component, dtype: what the file's name stands for.
        model: the graph; what its weights are is on disk.
        has_weights: whether all of them are, in files and not behind links.
        data_ends: by name of another file with weights, where the last byte of them lies.
    """

    file: str
    component: str
    dtype: str
    model: ir.Model
    has_weights: bool
    data_ends: Mapping[str, int]

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.file.removeprefix(ONNX)

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def inputs(self) -> dict[str, ir.Value]:
        """What must be fed, by name: the inputs that are no weights."""
        return {str(value.name): value for value in self.graph.inputs if value.name not in self.graph.initializers}

    @property
    def outputs(self) -> dict[str, ir.Value]:
        """What comes out, by name."""
        return {str(value.name): value for value in self.graph.outputs}

    def nodes(self, *operators: str) -> Iterator[ir.Node]:
        """The nodes of these operators, those of inner graphs included."""
        return (node for node in self.graph.all_nodes() if node.op_type in operators)


@dataclass(frozen=True)
class RepoView:
    """A repo as rules see it.

    Attributes:
        path: its folder, in which graphs and JSON lie.
        sizes_bytes: every file of the repo by its path in it, those included that were not fetched from the Hub.
    """

    path: Path
    sizes_bytes: Mapping[str, int]

    @cached_property
    def _read(self) -> tuple[dict[str, dict[str, Any]], tuple[GraphFile, ...], dict[str, str]]:
        """The JSON, the graphs, and by file what is wrong with those that cannot be read."""
        documents, graphs, damaged = {}, [], {}
        for file in self.sizes_bytes:
            try:
                path = own_file(self.path, file)
                if path is not None and file in DOCUMENTS:
                    documents[file] = read_json(path)
                elif path is not None and file in self.graph_files:
                    graphs.append(self._open(file, path))
            except InputError as error:
                damaged[file] = str(error).removeprefix(f"{self.path / file}: ")
        return documents, tuple(graphs), damaged

    def _open(self, file: str, path: Path) -> GraphFile:
        model = open_graph(path)
        ends = external_files(model, path)
        has_weights = all(_holds(path.parent, name, end) for name, end in ends.items())
        return GraphFile(file, *split_name(file), model, has_weights, ends)

    @property
    def damaged(self) -> Mapping[str, str]:
        """What is wrong with each file that cannot be read."""
        return self._read[2]

    @property
    def graphs(self) -> Sequence[GraphFile]:
        """The graphs that can be read."""
        return self._read[1]

    def document(self, name: str) -> Mapping[str, Any]:
        """A JSON file's object; empty where there is none, or none that can be read."""
        return self._read[0].get(name, {})

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`."""
        return self.document(CONFIG)

    def has(self, name: str) -> bool:
        """Whether the repo has a file of that name, damaged or not."""
        return name in self.sizes_bytes

    @cached_property
    def graph_files(self) -> list[str]:
        """The paths of all graphs, damaged ones included, wherever they lie."""
        return [file for file in self.sizes_bytes if file.endswith(".onnx")]

    @property
    def model_type(self) -> str:
        """What transformers.js chooses a class by; empty where config.json has none."""
        return str(self.config.get("model_type") or "")

    @property
    def client(self) -> ClientClass | None:
        """What transformers.js loads for it, if it is a vision-language model that it knows."""
        return CLASSES.get(self.model_type)

    def loaded(self) -> Iterator[tuple[GraphFile, Loaded]]:
        """Each graph that a client can load, with what it feeds to it."""
        declared = self.client.graphs if self.client else {}
        return ((graph, declared[graph.component]) for graph in self.graphs if graph.component in declared)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The section of config.json that describes the decoder."""
        section = self.client.text if self.client else "text_config"
        return mapping(self.config.get(section)) if section else self.config

    @property
    def client_config(self) -> Mapping[str, Any]:
        """What config.json tells transformers.js alone."""
        return mapping(self.config.get(CLIENT_CONFIG))

    def client_setting(self, key: str, device: str) -> Any:
        """A setting of `client_config` on a device, where `device_config` may have another; None where neither is."""
        own = mapping(mapping(self.client_config.get("device_config")).get(device))
        return own.get(key, self.client_config.get(key))

    def named_dtype(self, component: str, device: str) -> str | None:
        """The dtype that config.json names for a component on a device, if it is one there is."""
        named = self.client_setting("dtype", device)
        named = named.get(component) if isinstance(named, Mapping) else named
        return named if isinstance(named, str) and named in SUFFIXES else None

    def taken(self, component: str, device: str) -> str:
        """The file that transformers.js loads for a component on a device unless the user names a dtype."""
        return graph_file(component, self.named_dtype(component, device) or DEVICES[device][0])

    def devices_of(self, file: str) -> list[str]:
        """The devices that load a file unless the user names a dtype."""
        component, _ = split_name(file)
        return [device for device in DEVICES if self.taken(component, device) == file]

    @property
    def generation(self) -> dict[str, Any]:
        """What `generate` goes by, merged as transformers.js does it, nulls included."""
        merged = dict(self.config)
        for section in _OVERWRITING:
            merged |= mapping(self.config.get(section))
        return {**merged, **self.document(GENERATION)}

    @property
    def layers(self) -> int | None:
        """How many layers transformers.js thinks have a cache; None where it does not know the type of text model."""
        text = self.text_config
        field = LAYERS_FIELD.get(str(text.get("model_type")))
        if self.model_type in ("moondream1", "multi_modality", "qwen2_vl", "llava_qwen2", "phi3_v"):
            field = "num_hidden_layers"
        elif has_cross_cache(text):
            field = _CROSS_CACHE_LAYERS
        elif field is None and str(text.get("model_type")).startswith(("gemma3n", "gemma4", "lfm2", "qwen3_5")):
            field = "num_hidden_layers"
        return integer(text.get(field)) if field else None

    @property
    def cache_names(self) -> set[str]:
        """The names that transformers.js gives to entries of the cache, those that a graph may leave out included."""
        kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
        parts = kinds if has_cross_cache(self.text_config) else ("key", "value")
        layers = range(min(self.layers or 0, 10_000))
        names = {f"past_key_values.{layer}.{part}" for layer in layers for part in parts}
        if isinstance(self.text_config.get("layer_types"), list):  # of hybrid models
            names |= {f"{kind}.{layer}" for layer in layers for kind in ("past_conv", "past_recurrent", "past_ssm")}
        return names


def has_cross_cache(text_config: Mapping[str, Any]) -> bool:
    """Whether a decoder's cache has `.decoder.` and `.encoder.` entries."""
    return text_config.get("model_type") in _WITH_CROSS_CACHE


def _holds(folder: Path, name: str, size_bytes: int) -> bool:
    """Whether a graph's folder holds a file of that name with so many bytes; onnx_ir reads through no link."""
    path = folder / name
    return is_plain(name) and path.is_file() and not path.is_symlink() and path.stat().st_size >= size_bytes


def is_plain(name: str) -> bool:
    """Whether the name of a file has no folder in it."""
    return bool(name) and name not in (".", "..") and not {"/", "\\", "\0"} & set(name)


def open_repo(path: Path, sizes_bytes: Mapping[str, int] | None = None) -> RepoView:
    """The view of a folder; `sizes_bytes` has the files of a repo of which only some are in it.

    Raises:
        InputError: it has no config.json, or one that cannot be read, without which there is nothing to go by.
    """
    repo = RepoView(path, sizes_bytes if sizes_bytes is not None else _sizes_bytes(path))
    if not repo.has(CONFIG):
        raise InputError(f"{path}: no {CONFIG}, so this is no repo for transformers.js")
    if CONFIG in repo.damaged:
        raise InputError(f"{path / CONFIG}: {repo.damaged[CONFIG]}")
    return repo


def _sizes_bytes(folder: Path) -> dict[str, int]:
    """What a client could read: files of the folder itself and of onnx/. A link that leads out has 0 bytes."""
    places = (folder, folder / ONNX)
    found = [path for place in places if place.is_dir() and not leads_out(folder, place) for path in place.iterdir()]
    files = [path for path in sorted(found) if not path.is_dir() or path.suffix == ".onnx" or leads_out(folder, path)]
    return {path.relative_to(folder).as_posix(): 0 if leads_out(folder, path) else _size_bytes(path) for path in files}


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def split_name(file: str) -> tuple[str, str]:
    """The component and the dtype that a graph's file stands for: all of the name, and fp32, where it has no suffix."""
    stem = file.removeprefix(ONNX).removesuffix(".onnx")
    for dtype, suffix in sorted(SUFFIXES.items(), key=lambda item: -len(item[1])):
        if suffix and stem.endswith(suffix):
            return stem.removesuffix(suffix), dtype
    return stem, "fp32"


def graph_file(component: str, dtype: str) -> str:
    """The path of a component's graph in a dtype."""
    return f"{ONNX}{component}{SUFFIXES[dtype]}.onnx"


def mapping(value: Any) -> Mapping[str, Any]:
    """A value that should be a JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}


def integer(value: Any) -> int | None:
    """A value that should be a whole number; None where it is something else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def dimensions(value: ir.Value) -> list[int | str] | None:
    """A tensor's axes, as integers and symbols; None where not even their number is known."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else str(size.value or "?") for size in value.shape]
