"""What transformers' own vision-language classes have in common, for the families that are one of them.

Such a class holds a tower, a projector, a headless text model and a `lm_head`; its forward writes the images' features
over the embeddings of the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from vlm_export.models.blocks import Blocks, whole_prompt
from vlm_export.models.decoder import DecoderCore, Geometry, chat_decoder, embed_tokens
from vlm_export.spec.family import Config
from vlm_export.spec.graph import Component

_IGNORED_KEYS = {"dtype", "torch_dtype", "auto_map"}


def load_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a `config.json`, in float32: parts would be built in the dtypes that it names.

    Code that it names is not looked for.
    """
    return AutoConfig.for_model(**_plain(values))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _IGNORED_KEYS
    }


def text_config(config: Config) -> PretrainedConfig:
    """The config of the text model inside."""
    return load_config(config).get_text_config()


class Parts(nn.Module):
    """Some modules of a model under their own paths in it, so that traced weights have the checkpoint's names."""

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        super().__init__()
        for path in paths:
            put(self, path, model.get_submodule(path))


def put(owner: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the submodule `path` of `owner`, with empty modules on the way to it."""
    *outer, name = path.split(".")
    for part in outer:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(name, module)


class ChatDecoder(DecoderCore):
    """A headless text model at `path`, and the head beside it.

    `cap` is the largest logit that the class lets through, where it caps them.
    """

    def __init__(self, model: PreTrainedModel, path: str, cap: float | None = None):
        nn.Module.__init__(self)
        self.path, self.cap = path, cap
        for part in (path, "lm_head"):
            put(self, part, model.get_submodule(part))

    @property
    def text_model(self) -> Any:
        """The headless text model, whose attention runs."""
        return self.get_submodule(self.path)

    def logits(self, kept_positions: Tensor, **arguments: Any) -> Tensor:
        """Logits of the kept positions, `[B, kept, V]`: the head runs on no others."""
        hidden = self.text_model(**arguments).last_hidden_state
        logits: Tensor = self.lm_head(hidden[:, kept_positions])  # type: ignore[operator]
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class WholePromptDecoder(ChatDecoder):
    """A text model that sees all of a prompt from each of its tokens, and of an answer what is before each."""

    def blocks(self, inputs_embeds: Tensor, past: int) -> tuple[Tensor, Blocks]:
        """The prompt is one block."""
        return inputs_embeds, whole_prompt(inputs_embeds, past)


class ChatEmbedding(Parts):
    """Token ids `[B, S]` → `[B, S, H]`."""

    def __init__(self, model: PreTrainedModel, path: str):
        super().__init__(model, [f"{path}.embed_tokens"])
        self.path = path

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look the ids up, scaled where the model's own embedding module scales."""
        return self.get_submodule(f"{self.path}.embed_tokens")(token_ids)


def text_components(
    config: Config, path: str, axes: int = 1, decoder: Callable[[Any, str], nn.Module] = ChatDecoder
) -> tuple[Component, Component]:
    """`embed_tokens` and `decoder_model_merged` of a class whose text model is at `path`, with `axes` of places.

    `decoder` is made of the class and that path.
    """
    geometry = Geometry.of(text_config(config))
    return (
        embed_tokens(geometry, lambda model: ChatEmbedding(model, path)),
        chat_decoder(geometry, lambda model: decoder(model, path), axes),
    )
