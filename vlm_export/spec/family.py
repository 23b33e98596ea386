"""What a model family declares. The stages act on these declarations; a family never imports a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from vlm_export.contract import LayoutName
from vlm_export.spec.graph import Component

if TYPE_CHECKING:
    from vlm_export.spec.client import Client


Config = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a conversation for a chat template


class MakeComponents(Protocol):
    """The graphs of a layout."""

    def __call__(self, config: Config, /) -> tuple[Component, ...]:
        """The graphs that a model of this config is published as, in the order in which the client runs them."""


@dataclass(frozen=True)
class Layout:
    """One way to publish a family's model: its graphs under a config, and the client that loads them.

    Two families may give one layout name to different clients: `chat` is a real llava's own config for the one, and a
    llava made up around a captioner for the other.

    Attributes:
        joins: the layout whose graphs become one file here, with the loop of generation in it; those of `components`
            are then that layout's.
    """

    components: MakeComponents
    client: Client
    joins: LayoutName | None = None


@dataclass(frozen=True)
class EmbeddedLora:
    """LoRA settings that a checkpoint's own `config.json` carries, in the place of an `adapter_config.json`."""

    r: int
    alpha: int


class Reference(Protocol):
    """A family's PyTorch model, run by transformers' own forward and `generate`, on what its client is fed.

    `inputs` holds the tensors of one case by name: `pixel_values` first, `[batch, 3, H, W] float32` or, of tiles,
    `[batch, tiles, 3, E, E]`; then the decoder's `input_ids` `[batch, tokens] int64`, and masks where there are any.
    What `prefill`, `step` and `generate` return are the outputs of transformers 5 (`modeling_outputs.py`,
    `generation/utils.py`).
    """

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named stages of the encoder side, float32, each the value of an encoder graph's output.

        The last is what the decoder reads: `image_features` `[images or tiles, rows, hidden]`, or of an encoder-decoder
        `encoder_hidden_states` `[batch, rows, width]`.
        """

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """The first run of the decoder: transformers' output.

        Its `logits` are `[batch, positions, vocabulary] float32`, the last position's those of the first new token; its
        `past_key_values` is a `Cache`.
        """

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """A later run, of `[batch, 1] int64` after the cache `past`: transformers' output, as of `prefill`."""

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The output of transformers' `generate` under `options`, which ask for a dict with scores.

        Its `sequences` are `[rows, tokens] int64`, prompt ids first where the family begins with ids; its `scores` are
        `[rows, vocabulary] float32` for each new token.
        """


class Preprocessor(Protocol):
    """Makes the model's inputs of image files and a prompt, as transformers does.

    `keeps_tokens` says whether special tokens are part of an answer, beside those that begin, end or pad it.
    """

    keeps_tokens: bool

    def texts(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """A recipe's prompts as texts, conversations rendered; the first is the one that every image is run with.

        Raises:
            InputError: a prompt that this family has no use for, or no prompt where there must be one.
        """

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """What the client feeds the model for one image and a text, by name, as arrays for a batch of one.

        `pixel_values` are `[1, 3, H, W] float32` or `[1, tiles, 3, E, E]`, `input_ids` `[1, tokens] int64`.
        """


@dataclass(frozen=True)
class About:
    """What `docs/families.md` says of a family that its code does not say.

    Attributes:
        summary: the models that are of this type.
        since: the first version of vlm-export that has it.
        towers, decoders: model types that the tests run it with, each; `tests/test_families.py` compares.
        notes: what it does not do, and what else a user must know, a sentence each.
    """

    summary: str
    since: str
    towers: tuple[str, ...]
    decoders: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Build(Protocol):
    """The model of a config."""

    def __call__(self, config: dict[str, Any], /) -> nn.Module:
        """An uninitialised model, whose parameter names are those of a merged checkpoint."""


class Rename(Protocol):
    """A translation of tensor names."""

    def __call__(self, key: str, /) -> str | None:
        """The name in the model of a checkpoint's tensor, LoRA parts included; None if inference never uses it."""


class RenameIn(Protocol):
    """The part of the translation that depends on the parts of the model."""

    def __call__(self, config: Config, /) -> Rename:
        """What a model of this config makes of the names that `Family.rename` gives."""


class EmbeddedLoraOf(Protocol):
    """LoRA inside the checkpoint itself."""

    def __call__(self, config: Config, /) -> EmbeddedLora | None:
        """The settings of the LoRA tensors that a checkpoint of this `config.json` holds; None if it holds none."""


class MergedConfig(Protocol):
    """The config after a merge."""

    def __call__(self, config: Config, /) -> dict[str, Any]:
        """`config.json` of the merged checkpoint, made of the original's."""


class TextConfig(Protocol):
    """The config of the language model inside the model."""

    def __call__(self, config: Config, /) -> PretrainedConfig:
        """It as transformers has it, with every default filled in.

        Raises:
            InputError: a language model that is not known.
        """


class SampleInputs(Protocol):
    """What two versions of a model's weights are compared on."""

    def __call__(self, config: Config, generator: Generator, /) -> dict[str, Tensor]:
        """Random inputs for `Reference.prefill`, out of a seeded generator.

        They are those of one prompt with one image, whose caches and logits take memory: `pixel_values`
        `[1, 3, H, W] float32`, of tiles `[1, tiles, 3, E, E]`, of patches `[patches, numbers]`; `input_ids`
        `[1, tokens] int64`; masks and grids where there are any.
        """


class MakeReference(Protocol):
    """PyTorch's side of a comparison."""

    def __call__(self, model: Any, /) -> Reference:
        """A model that `Family.build` built, weights loaded, as transformers runs it."""


class MakePreprocessor(Protocol):
    """What stands between image files and a model."""

    def __call__(self, folder: Path, config: Config, settings: Mapping[str, Any], /) -> Preprocessor:
        """The preprocessor of the checkpoint in `folder`, under these image processor settings.

        Raises:
            InputError: the settings make images that the graphs do not take, or a file is missing.
        """


class Trim(Protocol):
    """What a graph's model need not have."""

    def __call__(self, model: Any, /) -> None:
        """Drop from an empty model the layers that no graph runs."""


class DefaultImageProcessor(Protocol):
    """Image processor settings of checkpoints that come without."""

    def __call__(self, config: Config, /) -> dict[str, Any]:
        """`preprocessor_config.json` for a checkpoint that has none; empty if it must have one."""


@dataclass(frozen=True)
class Family:
    """One `model_type`; what each of its functions is given and returns, the function's type says.

    Attributes:
        about: what the documentation says of it.
        adapter_roots: prefixes below which a PEFT adapter is likely to have been attached; other parts are found.
        layouts: by name.
        begins_with_ids: whether PyTorch's `generate` is given ids, which rules on lengths and on the first token count;
            not where it is given embeddings alone.
        remote_code: whether `build` builds the class that a config's `model_type` is registered for.
    """

    model_type: str
    about: About
    build: Build
    rename: Rename
    embedded_lora: EmbeddedLoraOf
    merged_config: MergedConfig
    text_config: TextConfig
    sample_inputs: SampleInputs
    reference: MakeReference
    preprocessor: MakePreprocessor
    layouts: Mapping[str, Layout]
    trim: Trim = field(default=lambda model: None)
    image_processor: DefaultImageProcessor = field(default=lambda config: {})
    adapter_roots: Sequence[str] = field(default=("",))
    begins_with_ids: bool = True
    remote_code: bool = False
    rename_in: RenameIn = field(default=lambda config: lambda key: key)

    def names(self, config: Config) -> Rename:
        """The whole translation of tensor names for a config: `rename`, then `rename_in`."""
        rename_in = self.rename_in(config)

        def name(key: str) -> str | None:
            renamed = self.rename(key)
            return None if renamed is None else rename_in(renamed)

        return name
