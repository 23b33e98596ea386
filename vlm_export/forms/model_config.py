"""`config.json`: sections, and the sizes in them, whatever class they are for.

What else a class makes of its values, transformers says when it builds the model. But sizes have to be looked at
before: of too many layers, or of a table with a thousand million rows, it would be building for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from vlm_export.contract import MODEL_TYPES, SINGLE_OF
from vlm_export.errors import InputError, shown

_MOST_LAYERS = 1_000
_LARGEST_SIZE = 1_000_000
_LARGEST_TABLE = 10_000_000
_MOST_POSITIONS = 20_000_000
_LARGEST_SIDE = 16_384  # pixels
_MOST_PATCHES = 1_000_000
_MOST_TOGETHER = 1_024  # patches that become one, frames that do, times as wide
_SECTIONS = ("text_config", "vision_config", "encoder", "decoder", "qformer_config", "perceiver_config")


@dataclass(frozen=True)
class _Kind:
    """What the values of some keys must be."""

    most: int
    what: str = "a whole number"
    least: int = 1
    whole: bool = True

    def refuses(self, value: Any) -> bool:
        """Whether it is neither such a number, nor a list of them, nor null, which is left to the class."""
        if value == [] and self.least > 0:
            return True
        each = value if isinstance(value, list) else [value]
        kind = int if self.whole else int | float
        return not all(
            one is None or (isinstance(one, kind) and not isinstance(one, bool) and self.least <= one <= self.most)
            for one in each
        )

    def __str__(self) -> str:
        return f"{self.what} from {self.least:,} to {self.most:,}"


_LAYERS = _Kind(_MOST_LAYERS, "a number of layers")
_HEADS = _Kind(_LARGEST_SIZE, "a number of heads")
_SIZE = _Kind(_LARGEST_SIZE, "a size")
_COUNT = _Kind(_MOST_TOGETHER, "a number")
_PLACES = _Kind(_MOST_LAYERS, "a list of layers, each", 0)
_AXES = _Kind(_LARGEST_SIZE, "a list of sizes, each", 0)
_PIXELS = _Kind(_LARGEST_SIDE, "a number of pixels")
_TOKEN = _Kind(_LARGEST_TABLE, "a token's id", -1)
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depth"), _LAYERS
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_key_value_heads",
            "n_head",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "head_dim",
            "n_embd",
            "d_model",
            "embed_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "ffn_dim",
            "word_embed_proj_dim",
            "num_channels",
            "projection_dim",
            "mlp_hidden_dim",
            "projector_hidden_size",
            "num_patches",
            "scale_factor",
            "image_seq_length",
            "num_image_tokens",
            "mm_tokens_per_image",
            "mlp_dim",
            "output_channels",
        ),
        _SIZE,
    ),
    **dict.fromkeys(
        ("n_inner", "in_channels", "in_chans", "out_hidden_size", "num_position_embeddings", "num_groups"), _SIZE
    ),
    **dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "window_size", "max_temporal_embeddings"), _COUNT),
    **dict.fromkeys(("downsample_factor", "conv_L_cache"), _COUNT),
    **dict.fromkeys(("depths", "fullatt_block_indexes", "deepstack_visual_indexes", "global_attn_indexes"), _PLACES),
    "sliding_window": _Kind(_MOST_POSITIONS, "a number of positions"),
    "query_pre_attn_scalar": _Kind(_LARGEST_SIZE, "a number", whole=False),
    **dict.fromkeys(("patch_stride", "patch_padding"), _Kind(_LARGEST_SIDE, "a number of pixels", 0)),
    "mlp_ratio": _Kind(_MOST_TOGETHER, "a number", whole=False),
    **dict.fromkeys(("image_size", "patch_size"), _PIXELS),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), _Kind(_LARGEST_TABLE, "a number of tokens")),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _Kind(_MOST_POSITIONS, "a number of positions")),
    **dict.fromkeys(
        (
            "image_token_id",
            "image_token_index",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "decoder_start_token_id",
        ),
        _TOKEN,
    ),
}


def check_config(config: Mapping[str, Any], path: str) -> None:
    """Raises InputError where a section of a config is none, or a size in it is no size that a model has."""
    for key in ("quantization_config", "auto_map"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{path}: {key}: is {shown(config[key])}; it must be an object")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        raise InputError(f"{path}: architectures: is {shown(classes)}; it must be a list of classes' names")
    made_of = config.get(SINGLE_OF)
    if made_of is not None and (not isinstance(made_of, str) or MODEL_TYPES.get(made_of, "single") == "single"):
        raise InputError(f"{path}: {SINGLE_OF}: is {shown(made_of)}; it must be the model_type of the graphs apart")
    for place, section in sections(config, path):
        if not isinstance(section.get("model_type", ""), str):
            raise InputError(f"{path}: {place}model_type: is {shown(section['model_type'])}; it must be a class's name")
        for key, kind in _KINDS.items():
            if key in section and kind.refuses(section[key]):
                raise InputError(f"{path}: {place}{key}: is {shown(section[key])}; it must be {kind}")
        _check_patches(section, f"{path}: {place}")
        _check_axes(section, f"{path}: {place}")
    _check_feature_layers(config, path)
    _check_pooled(config, path)


def sections(config: Mapping[str, Any], path: str, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config itself, and each section in it, with a dot behind its name.

    Raises:
        InputError: one is no object.
    """
    yield place, config
    for key in _SECTIONS:
        section = config.get(key)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise InputError(f"{path}: {place}{key}: is {shown(section)}; it must be an object with a part's settings")
        yield from sections(section, path, f"{place}{key}.")


def _check_axes(section: Mapping[str, Any], where: str) -> None:
    """A token that has places in several axes has numbers of a head for each of them."""
    rotation = section.get("rope_parameters") or section.get("rope_scaling")
    axes = rotation.get("mrope_section") if isinstance(rotation, dict) else None
    if (
        isinstance(rotation, dict)
        and "mrope_section" in rotation
        and (not isinstance(axes, list) or _AXES.refuses(axes))
    ):
        raise InputError(f"{where}rope_parameters.mrope_section: is {shown(axes)}; it must be {_AXES}")


def _check_patches(section: Mapping[str, Any], where: str) -> None:
    """A tower has a position for each patch."""
    image, patch = (_smallest(section.get(key)) for key in ("image_size", "patch_size"))
    if image is None or patch is None:
        return
    if patch > image:
        raise InputError(f"{where}patch_size: {patch} is more than image_size, {image}: no patch fits into an image")
    if (image // patch) ** 2 > _MOST_PATCHES:
        raise InputError(
            f"{where}image_size: {image} in patches of {patch} are {(image // patch) ** 2:,}; it must be at most "
            f"{_MOST_PATCHES:,}"
        )


def _check_feature_layers(config: Mapping[str, Any], path: str) -> None:
    """Features are those of one of the tower's layers, or of several: of 0, its input, to the last."""
    value, tower = config.get("vision_feature_layer"), config.get("vision_config")
    count = tower.get("num_hidden_layers") if isinstance(tower, dict) else None
    if value is None:
        return
    most = count if isinstance(count, int) else _MOST_LAYERS
    kind = _Kind(most, "a layer of the tower, or some of them,", -most - 1)
    if kind.refuses(value) or value == []:
        raise InputError(f"{path}: vision_feature_layer: is {shown(value)}; it must be {kind}")


def _check_pooled(config: Mapping[str, Any], path: str) -> None:
    """A square of patches becomes a square of tokens, so many of one as go into each of the other."""
    tokens, tower = config.get("mm_tokens_per_image"), config.get("vision_config")
    image, patch = (
        _smallest(tower.get(key)) if isinstance(tower, dict) else None for key in ("image_size", "patch_size")
    )
    if not isinstance(tokens, int) or image is None or patch is None:
        return
    patches, side = image // patch, isqrt(tokens)
    if side**2 != tokens or patches % side:
        raise InputError(
            f"{path}: mm_tokens_per_image: is {tokens:,}; it must be a square that {patches} × {patches} patches become"
        )


def _smallest(value: Any) -> int | None:
    sides = [side for side in (value if isinstance(value, list) else [value]) if isinstance(side, int)]
    return min(sides) if sides else None
