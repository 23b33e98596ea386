"""What a model family declares. The stages act on these declarations; a family never imports a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Generator, Tensor, nn
from transformers import PretrainedConfig

from vlm_export.spec.graph import Component

if TYPE_CHECKING:
    from vlm_export.spec.client import Client


Config = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a conversation for a chat template


@dataclass(frozen=True)
class Layout:
    """One way to publish a family's model: its graphs under a config, and the client that loads them.

    Two families may give one layout name to different clients: `chat` is a real llava's own config for the one, and a
    llava made up around a captioner for the other.
    """

    components: Callable[[Config], tuple[Component, ...]]
    client: Client


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
    """Makes the model's inputs of image files and a prompt, as transformers does."""

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


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        about: what the documentation says of it.
        build: an uninitialised model for a config, its parameter names being those of a merged checkpoint.
        rename: a checkpoint's tensor name (LoRA parts included) → the model's, or None for what inference never uses.
        rename_in: by config, what `rename` gives → the same, where the names depend on the parts of the model.
        embedded_lora: the settings of LoRA tensors inside the checkpoint itself.
        adapter_roots: prefixes below which a PEFT adapter is likely to have been attached; other parts are found.
        merged_config: `config.json` of the merged checkpoint.
        text_config: the config of the language model inside the model.
        sample_inputs: seeded random inputs of a reference, for comparing two versions of the model's weights.
        reference: the model as transformers runs it.
        preprocessor: made of a checkpoint's folder, its config and image processor settings.
        layouts: by name.
        trim: drops from an empty model the layers that no graph runs.
        image_processor: `preprocessor_config.json` where the checkpoint has none, or nothing if it must have one.
        begins_with_ids: whether PyTorch's `generate` is given ids, which rules on lengths and on the first token count;
            not where it is given embeddings alone.
        remote_code: whether `build` builds the class that a config's `model_type` is registered for.
    """

    model_type: str
    about: About
    build: Callable[[dict[str, Any]], nn.Module]
    rename: Callable[[str], str | None]
    embedded_lora: Callable[[Config], EmbeddedLora | None]
    merged_config: Callable[[Config], dict[str, Any]]
    text_config: Callable[[Config], PretrainedConfig]
    sample_inputs: Callable[[Config, Generator], dict[str, Tensor]]
    reference: Callable[[Any], Reference]
    preprocessor: Callable[[Path, Config, Mapping[str, Any]], Preprocessor]
    layouts: Mapping[str, Layout]
    trim: Callable[[Any], None] = field(default=lambda model: None)
    image_processor: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})
    adapter_roots: Sequence[str] = field(default=("",))
    begins_with_ids: bool = True
    remote_code: bool = False
    rename_in: Callable[[Config], Callable[[str], str | None]] = field(default=lambda config: lambda key: key)

    def names(self, config: Config) -> Callable[[str], str | None]:
        """The whole translation of tensor names for a config: `rename`, then `rename_in`."""
        rename_in = self.rename_in(config)

        def name(key: str) -> str | None:
            renamed = self.rename(key)
            return None if renamed is None else rename_in(renamed)

        return name
