"""What transformers.js 4.3.1 loads for each `model_type` of vision-language models, and what it feeds to each graph.

Sources: `src/models/session_config.js` (graphs), `src/models/*/modeling_*.js` (inputs), `src/configs.js` (where the
number of layers is read), `src/models/*/processing_*.js` (processors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from vlm_export.contract import IMAGE, OPTIONS, SINGLE_GRAPH, SINGLE_TYPE

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class Fed:
    """A tensor that goes between client and graph: its type and number of axes, None where either is free."""

    dtype: ir.DataType | None
    rank: int | None = None


@dataclass(frozen=True)
class Loaded:
    """One graph of a class.

    Attributes:
        inputs: what the client can feed, by name; None says that it is not known.
        needed: those of them without which the graph could not do its work.
        outputs: what the client reads, by name.
        cached: whether it has a cache, under the names of `RepoView.cache_names`.
    """

    inputs: Mapping[str, Fed] | None = None
    needed: tuple[str, ...] = ()
    outputs: Mapping[str, Fed] = field(default_factory=dict)
    cached: bool = False


@dataclass(frozen=True)
class ClientClass:
    """What is loaded for a `model_type`.

    Attributes:
        graphs: by the base of the file's name.
        text: the section of config.json from which names of the cache are made; empty is the top.
        image_token: keys of config.json with the id of the token that image features replace, the newest first.
        processor: the class that expands it, as preprocessor_config.json names it; None where there is none.
    """

    graphs: Mapping[str, Loaded]
    text: str = "text_config"
    image_token: tuple[str, ...] = ()
    processor: str | None = None


_LOGITS = {"logits": Fed(None, 3)}
_EMBEDS = {"inputs_embeds": Fed(_FLOAT, 3)}
_STATES = {"encoder_hidden_states": Fed(_FLOAT, 3)}
_IDS = {"input_ids": Fed(_INT64, 2)}
_FEATURES = {"image_features": Fed(_FLOAT)}
_OPTIONAL = {
    "attention_mask": Fed(_INT64, 2),
    "num_logits_to_keep": Fed(_INT64, 0),
    "use_cache_branch": Fed(_BOOL, 1),
}
_OUT = {"last_hidden_state": Fed(_FLOAT, 3)}


def _pixels(rank: int | None, **others: Fed) -> Loaded:
    return Loaded({"pixel_values": Fed(_FLOAT, rank), **others}, ("pixel_values", *others), _FEATURES)


def _decoder(main: Mapping[str, Fed], position_axes: int = 2) -> Loaded:
    inputs = {**main, **_OPTIONAL, "position_ids": Fed(_INT64, position_axes)}
    return Loaded(inputs, tuple(main), _LOGITS, cached=True)


def _chat(vision: Loaded, position_axes: int = 2) -> dict[str, Loaded]:
    return {
        "vision_encoder": vision,
        "embed_tokens": Loaded(_IDS, ("input_ids",), _EMBEDS),
        "decoder_model_merged": _decoder(_EMBEDS, position_axes),
    }


def _with_audio(vision: Loaded) -> dict[str, Loaded]:
    per_layer = {"per_layer_inputs": Fed(None)}
    return {
        "vision_encoder": vision,
        "audio_encoder": Loaded(outputs={"audio_features": Fed(_FLOAT)}),
        "embed_tokens": Loaded(_IDS, ("input_ids",), {**_EMBEDS, **per_layer}),
        "decoder_model_merged": _decoder({**_EMBEDS, **per_layer}),
    }


_LLAVA = _chat(_pixels(4))
_TILES = _chat(_pixels(5, pixel_attention_mask=Fed(_BOOL, 4)))
_PATCHES = _chat(_pixels(3, pixel_attention_mask=Fed(_INT64, 2), spatial_shapes=Fed(_INT64, 2)))
_GRID = _chat(_pixels(2, image_grid_thw=Fed(_INT64, 2)), 3)
_CAPTIONER = {
    "encoder_model": Loaded({"pixel_values": Fed(_FLOAT, 4)}, ("pixel_values",), _OUT),
    "decoder_model_merged": _decoder({**_IDS, **_STATES}),
}
_FLORENCE = {
    "vision_encoder": _pixels(4),
    "embed_tokens": Loaded(_IDS, ("input_ids",), _EMBEDS),
    "encoder_model": Loaded({**_EMBEDS, "attention_mask": Fed(_INT64, 2)}, ("inputs_embeds",), _OUT),
    "decoder_model_merged": Loaded(
        {**_EMBEDS, **_STATES, **_OPTIONAL, "encoder_attention_mask": Fed(_INT64, 2)},
        ("inputs_embeds", "encoder_hidden_states"),
        _LOGITS,
        cached=True,
    ),
}
_PHI = {
    "vision_encoder": _pixels(5, image_sizes=Fed(_INT64, 2)),
    "prepare_inputs_embeds": Loaded({**_IDS, "image_features": Fed(_FLOAT, 2)}, ("input_ids",), _EMBEDS),
    "model": _decoder(_EMBEDS),
}
_JANUS = {
    "prepare_inputs_embeds": Loaded(outputs=_EMBEDS),
    "language_model": Loaded(cached=True),
    "lm_head": Loaded(outputs={"logits": Fed(None)}),
    "gen_head": Loaded(),
    "gen_img_embeds": Loaded(),
    "image_decode": Loaded(),
}
# Ours, for a loop that the user writes (`layouts/prefix_components.py`) or `vlm_export/js`.
_COMPONENTS = {
    "vision_encoder": Loaded({"pixel_values": Fed(_FLOAT, 4)}, ("pixel_values",), _OUT),
    "projection": Loaded(_OUT, ("last_hidden_state",), {"projected_prefix": Fed(_FLOAT, 3)}),
    "prefix_init": Loaded({"prefix_embeddings": Fed(_FLOAT, 3), **_IDS}, ("prefix_embeddings",), _LOGITS),
    "embed_tokens": Loaded(_IDS, ("input_ids",), _EMBEDS),
    "language_model": Loaded(_EMBEDS, ("inputs_embeds",), _LOGITS, cached=True),
}
# Ours, for ONNX Runtime alone (`layouts/single.py`).
_SINGLE = {
    SINGLE_GRAPH: Loaded(
        {
            "pixel_values": Fed(_FLOAT),
            IMAGE: Fed(ir.DataType.UINT8, 3),
            "pixel_attention_mask": Fed(None),
            "spatial_shapes": Fed(_INT64, 2),
            **_IDS,
            "attention_mask": Fed(_INT64, 2),
            OPTIONS: Fed(_FLOAT, 1),
        },
        (OPTIONS,),
        {"sequences": Fed(_INT64, 2), "lengths": Fed(_INT64, 1), "scores": Fed(_FLOAT, 2)},
    )
}
_OLD_AND_NEW = ("image_token_id", "image_token_index")
_NEW = ("image_token_id",)

CLASSES: dict[str, ClientClass] = {
    "vision-encoder-decoder": ClientClass(_CAPTIONER, "decoder"),
    "llava": ClientClass(_LLAVA, image_token=_OLD_AND_NEW, processor="LlavaProcessor"),
    "llava_onevision": ClientClass(_LLAVA, image_token=_OLD_AND_NEW),
    "llava_qwen2": ClientClass(_LLAVA, "", _OLD_AND_NEW),
    "moondream1": ClientClass(_LLAVA, "phi_config", _OLD_AND_NEW),
    "paligemma": ClientClass(_LLAVA, image_token=_OLD_AND_NEW, processor="PaliGemmaProcessor"),
    "gemma3": ClientClass(_LLAVA, image_token=_OLD_AND_NEW, processor="Gemma3Processor"),
    "mistral3": ClientClass(_LLAVA, image_token=_OLD_AND_NEW, processor="PixtralProcessor"),
    "lighton_ocr": ClientClass(_LLAVA, image_token=_OLD_AND_NEW, processor="PixtralProcessor"),
    "idefics3": ClientClass(_TILES, image_token=_NEW, processor="Idefics3Processor"),
    "smolvlm": ClientClass(_TILES, image_token=_NEW, processor="SmolVLMProcessor"),
    "lfm2_vl": ClientClass(_PATCHES, image_token=_OLD_AND_NEW, processor="Lfm2VlProcessor"),
    "qwen2_vl": ClientClass(
        _chat(_pixels(2, grid_thw=Fed(_INT64, 2)), 3), "", image_token=_NEW, processor="Qwen2VLProcessor"
    ),
    "qwen2_5_vl": ClientClass(_GRID, image_token=_NEW, processor="Qwen2_5_VLProcessor"),
    "qwen3_vl": ClientClass(_GRID, image_token=_NEW, processor="Qwen3VLProcessor"),
    "qwen3_vl_moe": ClientClass(_GRID, image_token=_NEW, processor="Qwen3VLProcessor"),
    "qwen3_5": ClientClass(_GRID, image_token=_NEW, processor="Qwen3VLProcessor"),
    "qwen3_5_moe": ClientClass(_GRID, image_token=_NEW, processor="Qwen3VLProcessor"),
    "glm_ocr": ClientClass(_GRID, image_token=_NEW, processor="Glm46VProcessor"),
    "gemma3n": ClientClass(_with_audio(_pixels(None)), image_token=_NEW, processor="Gemma3nProcessor"),
    "gemma4": ClientClass(
        _with_audio(_pixels(None, pixel_position_ids=Fed(None))), image_token=_NEW, processor="Gemma4Processor"
    ),
    "florence2": ClientClass(_FLORENCE, processor="Florence2Processor"),
    "phi3_v": ClientClass(_PHI, "", processor="Phi3VProcessor"),
    "multi_modality": ClientClass(_JANUS, "language_config", processor="VLChatProcessor"),
    "prefix_conditioning_vlm": ClientClass(_COMPONENTS),
    SINGLE_TYPE: ClientClass(_SINGLE),
}
# Those whose `is_encoder_decoder` decides which graphs are loaded, and how they are fed.
ENCODER_DECODERS = ("vision-encoder-decoder", "florence2")
