"""What a model family declares. The stages act on these declarations; a family never imports a stage."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor, nn

from vlm_export import families
from vlm_export.errors import InputError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` holds integers for fixed sizes and symbols for dynamic axes.

    One symbol means one size in the whole graph: ONNX Runtime re-uses buffers by symbol.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FrontEnd:
    """ONNX text put before a traced graph, so that it takes what the client feeds instead of what the tracer saw.

    `outputs` of the text replace the traced inputs of the same names; an input of the text that is a weight's name
    takes that weight.
    """

    text: str


@dataclass(frozen=True)
class Component:
    """One graph of a repo: the file `onnx/<name>.onnx`.

    Attributes:
        module: wraps the model into a module whose positional inputs are `traced_inputs`, in order.
        inputs, outputs: the graph as the client sees it.
        traced_inputs: what the tracer sees, where a front end stands before it; `inputs` otherwise.
    """

    name: str
    module: Callable[[Any], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    traced_inputs: tuple[TensorSpec, ...] = ()
    front_end: FrontEnd | None = None

    @property
    def trace_signature(self) -> tuple[TensorSpec, ...]:
        return self.traced_inputs or self.inputs


@dataclass(frozen=True)
class EmbeddedLora:
    """LoRA settings that a checkpoint's own `config.json` carries, in the place of an `adapter_config.json`."""

    r: int
    alpha: int


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        build: an uninitialised model for a config, its parameter names being those of a merged checkpoint.
        rename: a checkpoint's tensor name (LoRA parts included) → the model's, or None for what inference never uses.
        rename_in: by config, what `rename` gives → the same, where the names depend on the parts of the model.
        embedded_lora: the settings of LoRA tensors inside the checkpoint itself.
        adapter_roots: prefixes below which a PEFT adapter may have been attached.
        merged_config: `config.json` of the merged checkpoint.
        language_model: the causal language model inside the model.
        sample_inputs: seeded random inputs of the whole model's forward, for comparing two versions of its weights.
        encode: pixel_values → named stages, the last being `image_features`.
        image_tokens: rows of `image_features` for one image.
        image_processor: `preprocessor_config.json` of the tower, used when the checkpoint has none.
        layouts: layout name → its components under a config.
    """

    model_type: str
    build: Callable[[dict[str, Any]], nn.Module]
    rename: Callable[[str], str | None]
    embedded_lora: Callable[[Config], EmbeddedLora | None]
    merged_config: Callable[[Config], dict[str, Any]]
    language_model: Callable[[Any], nn.Module]
    sample_inputs: Callable[[Config, Generator], tuple[Tensor, ...]]
    encode: Callable[[Any, Tensor], dict[str, Tensor]]
    image_tokens: Callable[[Config], int]
    image_processor: Callable[[Config], dict[str, Any]]
    layouts: Mapping[str, Callable[[Config], tuple[Component, ...]]]
    adapter_roots: Sequence[str] = field(default=("",))
    rename_in: Callable[[Config], Callable[[str], str | None]] = field(default=lambda config: lambda key: key)

    def names(self, config: Config) -> Callable[[str], str | None]:
        """The whole translation of tensor names for a config: `rename`, then `rename_in`."""
        rename_in = self.rename_in(config)

        def name(key: str) -> str | None:
            renamed = self.rename(key)
            return None if renamed is None else rename_in(renamed)

        return name


def names() -> list[str]:
    """Model types of all families: each module of this package but this one is a family."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__) if module.name != "base")


def find_family(model_type: str, source: str) -> Family:
    """The family of a `model_type`; `source` is the file that named it.

    Raises:
        InputError: no family has that name.
    """
    if model_type not in names():
        raise InputError(f"{source}: model_type {model_type!r} is not supported; supported: {', '.join(names())}")
    return importlib.import_module(f"{families.__name__}.{model_type}").FAMILY
