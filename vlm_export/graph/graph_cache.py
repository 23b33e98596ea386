"""The graph cache: each component of an architecture is traced once, and its skeleton is kept in the cache folder.

A skeleton holds no weights, so every checkpoint of an architecture has the same. An export that finds it needs nothing
that traces (`skeleton.py`, onnxscript, the exporter), so these are imported only when something is to be traced.

A kept skeleton is found by a key, which is a hash of all that a trace depends on:
- the model as it would be traced, trimmed: every module's path, class, config and plain attributes; shapes, types and
  ties of parameters; shapes, types and values of buffers and other tensors, which become constants of the graph;
- the checkpoint's config, from which family and layout make the component, and what the component declares;
- this package's own files; the files of each package that a class of the model comes from, in the folders of that
  class, of its bases, and of what their modules import by name; those of onnxscript, onnx-ir and onnxsim;
- the versions of these, of torch, ONNX Runtime and the rest, of Python, and the kind of machine.
Of torch, compiled libraries and what else is not listed the key knows the version alone: who edits them in place, under
the same version, needs `--retrace`. Code of a Hub repo (`trust_remote_code`) could change anything, so nothing is kept
of a model that comes with some.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn
from transformers import PretrainedConfig

from vlm_export.atomic import write_bytes
from vlm_export.files import SKELETON, graph_cache_folder
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.graph.simplify_report import ONNXSIM_RAN, SimplifyReport
from vlm_export.graph.stacks import attributes
from vlm_export.models import pixels
from vlm_export.models.library import aliases
from vlm_export.source.checkpoint import Checkpoint, build_empty
from vlm_export.spec.graph import Component

FORMAT = 1  # of the files
UNUSED_DAYS = 90  # after which a skeleton is deleted
PACKAGE = Path(__file__).parents[1]
_TRACERS = ("onnx_ir", "onnxscript", "onnxsim")
_DISTRIBUTIONS = (
    *("torch", "transformers", "accelerate", "optimum", "timm", "numpy"),
    *("onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime"),
)
_ORIGIN_KEYS = ("_name_or_path", "transformers_version")  # in a config: where it came from
_PLAIN_TYPES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)

Entry = tuple[ir.Model, SimplifyReport]  # a skeleton, and how it was made


class GraphCache:
    """The skeletons of the components of a layout of a merged checkpoint: looked for, or traced and kept.

    `in_graph` are image processor settings that the tower's graph carries out, if it does.
    With `retrace` none is looked for, without `keep` none is kept either. `notify` is told, once, when they cannot be.
    """

    def __init__(
        self,
        merged: Checkpoint,
        layout: str,
        *,
        in_graph: Mapping[str, Any] | None = None,
        keep: bool = True,
        retrace: bool = False,
        notify: Callable[[str], None] = lambda line: None,
    ):
        self.components = pixels.published(merged.family.layouts[layout].components(merged.config), in_graph)
        self.model = build_empty(merged)
        merged.family.trim(self.model)
        self.keep, self.retrace, self.notify = keep, retrace, notify
        self._model_key = model_key(merged, layout, self.model) if keep else ""

    def find(self, component: Component) -> Entry | None:
        """A component's skeleton, if it is there and whole."""
        if self.retrace or not self.keep:
            return None
        path = self.path(component)
        content = _read(path)
        if content is None:
            return None
        with suppress(OSError):  # the folder may be somebody else's
            os.utime(path)  # it was used
        return _parse(content)

    def trace(self, component: Component, onnxsim: Onnxsim | None = None) -> Entry:
        """Trace a component, and keep its skeleton for the next time.

        What is returned went through the file's form, so that graphs made of it are byte for byte those of the next.
        One that onnxsim did not simplify is not kept: a lack of time or memory is no property of an architecture.
        """
        from vlm_export.graph.skeleton import make_skeleton

        skeleton, report = make_skeleton(component, self.model, onnxsim=onnxsim)
        content = _serialize(skeleton, report)
        if self.keep and report.onnxsim == ONNXSIM_RAN:
            path = self.path(component)
            try:
                write_bytes(path, content, shared=True)
                _delete_unused(path.parent)
            except OSError as error:
                self.notify(f"warning: {path.parent}: cannot keep what was traced: {error.strerror or error}")
                self.notify = lambda line: None
        return _parse(content)

    def path(self, component: Component) -> Path:
        """The file of a component's skeleton."""
        return graph_cache_folder() / f"{component_key(self._model_key, component)}{SKELETON}"


def component_key(model: str, component: Component) -> str:
    """The key of a component's skeleton in a model with the key `model`."""
    tensors = component.inputs, component.outputs, component.traced_inputs
    return _sha256(repr((FORMAT, model, component.name, tensors, component.front_end)).encode())


def model_key(merged: Checkpoint, layout: str, model: nn.Module) -> str:
    """The part of the key that all components of a layout share; `model` is as it would be traced."""
    facts = {
        "package": files_digest(_below(PACKAGE)),
        "tracers": [files_digest(_below(_package_folder(name))) for name in _TRACERS],
        "sources": files_digest(_sources(model)),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "machine": (sys.version, platform.machine()),
        "of": (merged.family.model_type, layout, _plain_config(merged.config)),
        "model": describe(model),
    }
    return _sha256(json.dumps(facts, sort_keys=True).encode())


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything about a model without weights that its traces depend on, as values that JSON can hold."""
    configs = {id(v): v for module in model.modules() for v in vars(module).values() if isinstance(v, PretrainedConfig)}
    numbers = {of: number for number, of in enumerate(configs)}

    def said(value: Any) -> Any:
        """An attribute as `_value` gives it; a config, which a layer shares with its model, as its number."""
        return numbers[id(value)] if isinstance(value, PretrainedConfig) else _value(value)

    return {
        "configs": [_config(config) for config in configs.values()],
        "modules": [
            (path, _name(type(module)), {name: said(value) for name, value in attributes(module).items()})
            for path, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [
            (name, list(parameter.shape), str(parameter.dtype))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        ],
        "aliases": aliases(model),
        "buffers": [(name, _value(tensor)) for name, tensor in model.named_buffers(remove_duplicate=False)],
    }


def files_digest(files: Mapping[str, Path]) -> str:
    """Hash of files by name, and of their names."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # which imports nothing
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin).parent


def _sources(model: nn.Module) -> dict[str, Path]:
    """Files that a model's code is in, by module: those beside each that its classes and their bases are defined in,
    and beside each that these take something from. torch's are not among them."""
    defining = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    defining = {name for name in defining if _has_source(name)}
    packages = {name.partition(".")[0] for name in defining}
    imported = {_module_of(value) for name in defining for value in vars(sys.modules[name]).values()}
    used = defining | {name for name in imported if name in sys.modules and name.partition(".")[0] in packages}
    files = {path for name in used for path in Path(str(sys.modules[name].__file__)).parent.glob("*.py")}
    roots = {_package_folder(package).parent for package in packages}
    return {path.relative_to(root).as_posix(): path for root in roots for path in files if path.is_relative_to(root)}


def _has_source(name: str) -> bool:
    package = name.partition(".")[0]
    return package not in sys.stdlib_module_names and package not in ("torch", __name__.partition(".")[0])


def _module_of(value: Any) -> str:
    """The name of a module, or of that which defines a class or function."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


def _value(value: Any) -> Any:
    """An attribute as JSON can hold it, the same in every process; one that is not plain as its type alone."""
    if isinstance(value, torch.Tensor):
        return _name(type(value)), list(value.shape), str(value.dtype), "meta" if value.is_meta else _bytes(value)
    if isinstance(value, _PLAIN_TYPES):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [_value(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(one) for one in value)
    if isinstance(value, dict):
        return [(_value(key), _value(one)) for key, one in value.items()]
    return _name(value if isinstance(value, type) or callable(value) else type(value))


def _bytes(tensor: torch.Tensor) -> str:
    return _sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _config(config: PretrainedConfig) -> Any:
    values = json.loads(config.to_json_string(use_diff=False))
    return _name(type(config)), _plain_config(values), repr(config._attn_implementation)


def _plain_config(values: Any) -> Any:
    """A config without what says where it came from."""
    if isinstance(values, Mapping):
        return {key: _plain_config(value) for key, value in values.items() if key not in _ORIGIN_KEYS}
    return [_plain_config(value) for value in values] if isinstance(values, (list, tuple)) else values


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _serialize(skeleton: ir.Model, report: SimplifyReport) -> bytes:
    """Two lines and a message: the hash of what follows, the report as JSON, the ONNX model."""
    content = json.dumps(asdict(report)).encode() + b"\n" + ir.to_proto(skeleton).SerializeToString()
    return _sha256(content).encode() + b"\n" + content


def _parse(content: bytes) -> Entry:
    _, report, model = content.split(b"\n", 2)
    return ir.from_proto(onnx.load_from_string(model)), SimplifyReport(**json.loads(report))


def _read(path: Path) -> bytes | None:
    """A file of a skeleton; None if it is not there, cannot be read, or is not as it was written."""
    try:
        content = path.read_bytes() if path.is_file() else b""  # no pipe is waited for
    except OSError:
        return None
    digest, _, rest = content.partition(b"\n")
    return content if digest == _sha256(rest).encode() else None


def _delete_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.glob(f"*{SKELETON}"):
        with suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < oldest:
                path.unlink()
