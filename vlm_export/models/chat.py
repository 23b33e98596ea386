"""What transformers' own vision-language classes have in common, for the families that are one of them.

Such a class holds a tower, a projector, a headless text model and a `lm_head`; its forward writes the images' features
over the embeddings of the image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from vlm_export.families.base import About, Component, Config, Family, Layout
from vlm_export.models.decoder import DecoderCore, Geometry, chat_decoder, embed_tokens
from vlm_export.preprocessing import ChatProcessor
from vlm_export.source.checkpoint import library_names, without_weights

_TEXT = {"input_ids", "attention_mask"}
_UNUSED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq|num_batches_tracked)$")
_PROJECTOR = re.compile(r".*\bmm_projector\.(?P<index>\d+)\.")  # an MLP, a GELU between two layers
_LEFT_OUT = {"dtype", "torch_dtype", "auto_map"}


def load_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a `config.json`, in float32: parts would be built in the dtypes that it names.

    Code that it names is not looked for.
    """
    return AutoConfig.for_model(**_plain(values))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _LEFT_OUT
    }


def build(config: Config) -> PreTrainedModel:
    """The class of a config, for an image and a text."""
    return AutoModelForImageTextToText.from_config(load_config(config))


def rename(key: str) -> str | None:
    """Drops what checkpoints of older transformers carry and inference never reads; names LLaVA's own projector."""
    return None if _UNUSED.match(key) else _PROJECTOR.sub(_of_transformers, key)


def _of_transformers(key: re.Match[str]) -> str:
    return f"multi_modal_projector.linear_{int(key['index']) // 2 + 1}."


def text_config(config: Config) -> PretrainedConfig:
    """The config of the text model inside."""
    return load_config(config).get_text_config()


def sample_ids(config: Config, image_tokens: int, generator: Generator) -> Tensor:
    """`[2, image_tokens + 8] int64`: image tokens, then random ids of others."""
    loaded = load_config(config)
    ids = torch.randint(loaded.get_text_config().vocab_size - 1, (2, 8), generator=generator)
    ids += ids >= loaded.image_token_id
    return torch.cat([torch.full((2, image_tokens), loaded.image_token_id), ids], dim=1)


@dataclass(frozen=True)
class ChatReference:
    """The class's own forward and `generate`; `image_tokens` are the rows that one image or tile becomes."""

    model: Any
    image_tokens: int

    def encode(self, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = {name: value for name, value in self.arguments(fed).items() if name not in _TEXT}
        rows = torch.cat([*self.model.get_image_features(**images, return_dict=True).pooler_output])
        return {"image_features": rows.reshape(-1, self.image_tokens, rows.shape[-1])}

    def prefill(self, fed: Mapping[str, Tensor]) -> Any:
        return self.model(**self.arguments(fed), use_cache=True)

    def step(self, token_ids: Tensor, past: Any, fed: Mapping[str, Tensor]) -> Any:
        return self.model(input_ids=token_ids, past_key_values=past, use_cache=True)

    def generate(self, fed: Mapping[str, Tensor], **options: Any) -> Any:
        return self.model.generate(**self.arguments(fed), **options)

    def arguments(self, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the class is called with."""
        return dict(fed)


def chat_family(
    model_type: str,
    about: About,
    *,
    sample_inputs: Callable[[Config, Generator], dict[str, Tensor]],
    reference: Callable[[Any], ChatReference],
    feeder: Callable[[Path, Config, Mapping[str, Any]], ChatProcessor],
    layout: Layout,
    build: Callable[[Config], PreTrainedModel] = build,
    trim: Callable[[Any], None] = lambda model: None,
) -> Family:
    """A family whose model is a class of transformers' own; `layout` is its only one, `chat`."""

    def rename_in(config: Config) -> Callable[[str], str | None]:
        """The library's own translation of tensor names, for the class of a config."""
        with without_weights():
            return library_names(build(config))

    return Family(
        model_type=model_type,
        about=about,
        build=build,
        rename=rename,
        rename_in=rename_in,
        embedded_lora=lambda config: None,
        merged_config=dict,
        text_config=text_config,
        sample_inputs=sample_inputs,
        reference=reference,
        feeder=feeder,
        layouts={"chat": layout},
        trim=trim,
        remote_code=True,
    )


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
    """A headless text model at `path`, and the head beside it."""

    def __init__(self, model: PreTrainedModel, path: str):
        nn.Module.__init__(self)
        self.path = path
        for part in (path, "lm_head"):
            put(self, part, model.get_submodule(part))

    @property
    def text_model(self) -> Any:
        return self.get_submodule(self.path)

    def logits(self, kept_positions: Tensor, **arguments: Any) -> Tensor:
        hidden = self.text_model(**arguments).last_hidden_state
        return self.lm_head(hidden[:, kept_positions])  # type: ignore[operator]


class ChatEmbedding(Parts):
    """Token ids `[B, S]` → `[B, S, H]`."""

    def __init__(self, model: PreTrainedModel, path: str):
        super().__init__(model, [f"{path}.embed_tokens"])
        self.path = path

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.get_submodule(f"{self.path}.embed_tokens")(token_ids)


def text_components(config: Config, path: str) -> tuple[Component, Component]:
    """`embed_tokens` and `decoder_model_merged` of a class whose text model is at `path`."""
    geometry = Geometry.of(text_config(config))
    return (
        embed_tokens(geometry, lambda model: ChatEmbedding(model, path)),
        chat_decoder(geometry, lambda model: ChatDecoder(model, path)),
    )
