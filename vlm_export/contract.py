"""What transformers.js loads and how it feeds it, as data that Python and JavaScript read.

`scripts/contract.py` writes the same as `js/src/contract.js`, which is put beside the Node driver as `contract.mjs`.
Source: transformers.js 4.3.1, `src/models/registry.js` (classes by `model_type`), `src/models/*/processing_*.js` and
`image_processing_*.js` (calls), `src/utils/dtypes.js`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LayoutName = Literal["captioner", "chat", "tasks", "components", "single"]
# What an image processor makes of pictures: all of one size; tiles of a larger one; pictures of their own proportions,
# whose sides are whole cells; such pictures, taken apart into patches; tiles of any proportions, taken apart into
# patches. A cell's features are one row.
Cut = Literal["whole", "tiles", "cells", "patches", "patched tiles"]


# By `model_type` of config.json: which graphs there are, and the way that they are fed.
MODEL_TYPES: dict[str, LayoutName] = {
    "vision-encoder-decoder": "captioner",
    "llava": "chat",
    "llava_onevision": "chat",
    "llava_qwen2": "chat",
    "idefics3": "chat",
    "smolvlm": "chat",
    "qwen2_vl": "chat",
    "qwen2_5_vl": "chat",
    "qwen3_vl": "chat",
    "glm_ocr": "chat",
    "mistral3": "chat",
    "lighton_ocr": "chat",
    "lfm2_vl": "chat",
    "paligemma": "chat",
    "gemma3": "chat",
    "florence2": "tasks",
    "prefix_conditioning_vlm": "components",  # by no class of its own, but by vlm_export/js
    "single_graph": "single",  # by no class: ONNX Runtime alone runs it
}
SINGLE_TYPE, SINGLE_GRAPH = "single_graph", "model"  # the `model_type` of layout single, and its one graph
SINGLE_OF = "single_of"  # the key of config.json with the `model_type` of the graphs that it is made of
# The graph's inputs beside `pixel_values`: a picture as it is, and numbers that a caller may set at each run, in this
# order; what is left out at the end of them is as the repo was exported.
IMAGE, OPTIONS = "image", "options"
IMAGE_ROWS = "image_rows"  # its metadata: how many rows of features a picture, or a tile of one, has
SINGLE_OPTIONS = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
TEXTS_BETWEEN = "\0"  # stands between the texts of several pictures, which are UTF-8 in one row
# And behind them, where the graph takes one token after another: above a `temperature` of 0 they are drawn.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "seed")
MOST_SEED = 2**24 - 1  # of what float32 holds
# Or, where it searches with beams; `early_stopping` as the place of its value.
SEARCH_OPTIONS = ("num_beams", "length_penalty", "early_stopping")
EARLY_STOPPING: tuple[bool | str, ...] = (False, True, "never")


# Those whose tokens have places in three axes (`src/models/qwen2_vl/modeling_qwen2_vl.js`: `get_rope_index`).
GRID_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm_ocr")
# Those whose tokens are numbered from 1 (`src/models/modeling_utils.js`: `decoder_forward`).
NUMBERED_FROM_ONE = ("paligemma", "gemma3")
# Those whose prompt is seen as a whole by each of its tokens: what is in a cache has not seen what a prompt adds to it.
WHOLE_PROMPT_TYPES = ("paligemma",)


@dataclass(frozen=True)
class Written:
    """What a processor writes around an image's tokens; names in braces are tokens of tokenizer_config.json.

    Attributes:
        place: what stands for an image in a text; nothing where that is the image token.
        before, after: each image's tokens.
        behind: the last image's tokens, or before the text where there is none.
        end: of the text.
    """

    place: str = ""
    before: str = ""
    after: str = ""
    behind: str = ""
    end: str = ""


# By `processor_class` of preprocessor_config.json (`src/models/*/processing_*.js`), of those that write any.
PROCESSORS: dict[str, Written] = {
    "PaliGemmaProcessor": Written(behind="{bos_token}", end="\n"),
    "Gemma3Processor": Written(place="{boi_token}", before="\n\n{boi_token}", after="{eoi_token}\n\n"),
}


@dataclass(frozen=True)
class ImageProcessorKind:
    """An image processor that transformers and transformers.js have under the same name.

    Attributes:
        defaults: what transformers' class takes for a setting that is not in `preprocessor_config.json`, beside those
            that all have.
        cut: what it makes of pictures; tiles come with a mask, patches with a grid, patches of tiles with a mask and
            with the shape of each tile.
        inert: settings on which transformers acts and transformers.js does not.
        counts_frames: whether the numbers of pixels that patches may have are those of all frames, and a picture
            smaller than a cell is enlarged first.
        wanted: settings without which transformers.js fails, as it takes them, and transformers has them elsewhere.
        fills: whether a picture keeps its proportions in a square of `image_size`, on `background_color`, which is
            that of pixels that are normalized, but for a factor `rescale_factor`.
        text_first: whether the processor in transformers.js that holds it takes the text before the images.
    """

    defaults: Mapping[str, Any]
    cut: Cut = "whole"
    inert: tuple[str, ...] = ()
    counts_frames: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)
    fills: bool = False
    text_first: bool = False

    @property
    def own_sizes(self) -> bool:
        """Whether sizes of what it makes follow from those of a picture."""
        return self.cut in ("cells", "patches", "patched tiles")


_OPENAI_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_SQUARE = {"size": {"height": 224, "width": 224}}
_CROPPED = {
    "resample": 3,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}
_PATCHES = {**_OPENAI_CLIP, "resample": 3, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_TILED = {
    **_IMAGENET_STANDARD,
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "do_pad": True,
}
# By `image_processor_type` of preprocessor_config.json, without the `Fast` or `Pil` at the end of some.
IMAGE_PROCESSORS: dict[str, ImageProcessorKind] = {
    "SiglipImageProcessor": ImageProcessorKind({**_SQUARE, **_IMAGENET_STANDARD, "resample": 3}),
    "ViTImageProcessor": ImageProcessorKind({**_SQUARE, **_IMAGENET_STANDARD, "resample": 2}),
    "DeiTImageProcessor": ImageProcessorKind({**_CROPPED, **_IMAGENET_STANDARD, "size": {"height": 256, "width": 256}}),
    "CLIPImageProcessor": ImageProcessorKind({**_CROPPED, **_OPENAI_CLIP}),
    "BitImageProcessor": ImageProcessorKind({**_CROPPED, **_OPENAI_CLIP}),
    "Idefics3ImageProcessor": ImageProcessorKind(_TILED, cut="tiles", text_first=True),
    "SmolVLMImageProcessor": ImageProcessorKind(_TILED, cut="tiles", text_first=True),
    "Gemma3ImageProcessor": ImageProcessorKind(
        {**_SQUARE, **_IMAGENET_STANDARD, "resample": 2},
        inert=(
            "do_pan_and_scan",
            *(f"pan_and_scan_{each}" for each in ("min_crop_size", "max_num_crops", "min_ratio_to_activate")),
        ),
        text_first=True,
    ),
    "LlavaOnevisionImageProcessor": ImageProcessorKind(
        {**_OPENAI_CLIP, "resample": 3, "size": {"height": 384, "width": 384}},
        inert=("image_grid_pinpoints", "do_pad"),  # one tile, as the exported graph has it too
    ),
    "PixtralImageProcessor": ImageProcessorKind(
        {
            **_OPENAI_CLIP,
            "resample": 3,
            "size": {"longest_edge": 1024},
            "patch_size": {"height": 16, "width": 16},
        },
        cut="cells",
        inert=("do_pad",),  # to the largest of several pictures, which are run one by one here
        wanted={"patch_size": 16, "spatial_merge_size": 1},
    ),
    # Edges of these are numbers of pixels, not of a side.
    "Qwen2VLImageProcessor": ImageProcessorKind(
        {**_PATCHES, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
        cut="patches",
        text_first=True,
    ),
    "Glm46VImageProcessor": ImageProcessorKind(
        {**_PATCHES, "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}},
        cut="patches",
        counts_frames=True,
        text_first=True,
    ),
    # Of Janus in transformers.js; transformers has it as `DeepseekVLImageProcessor`.
    "VLMImageProcessor": ImageProcessorKind(
        {
            **_IMAGENET_STANDARD,
            "resample": 3,
            "size": {"shortest_edge": 384, "longest_edge": 384},
            "do_pad": True,
            "image_size": 384,
            "min_size": 14,
            "background_color": [-1.0, -1.0, -1.0],
        },
        fills=True,
    ),
    "Lfm2VlImageProcessor": ImageProcessorKind(
        {
            **_IMAGENET_STANDARD,
            "resample": 2,
            "downsample_factor": 2,
            "do_image_splitting": True,
            "min_tiles": 2,
            "max_tiles": 10,
            "use_thumbnail": True,
            "min_image_tokens": 64,
            "max_image_tokens": 256,
            "encoder_patch_size": 16,
            "tile_size": 512,
            "max_pixels_tolerance": 2.0,
        },
        cut="patched tiles",
        inert=("do_resize", "size", "do_pad", "max_num_patches"),  # it resizes and pads always, to sizes of its own
    ),
}
# A key of config.json: the image's features stand before the text, and have no ids. Ours: transformers.js keeps it.
PREFIX = "prefix_conditioning"
# What is appended to a graph's name, by dtype.
SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "uint8": "_uint8",
    "q8": "_quantized",
    "q4": "_q4",
    "q2": "_q2",
    "q1": "_q1",
    "q4f16": "_q4f16",
    "q2f16": "_q2f16",
    "q1f16": "_q1f16",
    "bnb4": "_bnb4",
}
# The field of a text config that says how many layers have a cache, by its `model_type` (`getNormalizedConfig` in
# `src/configs.js`).
_BY_FIELD = {
    "num_hidden_layers": (
        "afmoe apertus arcee cohere cohere2 ernie4_5 falcon gemma gemma2 gemma3_text glm glm_ocr_text gpt_neox gpt_oss "
        "granite helium hunyuan_v1_dense lfm2 llama llama4_text ministral ministral3 mistral mobilellm nanochat olmo "
        "olmo2 olmo3 opt phi phi3 qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text "
        "qwen3_vl_text smollm3 solar_open stablelm starcoder2 vaultgemma youtu"
    ),
    "n_layer": "bloom codegen gpt2 gpt_bigcode gptj jais",
    "n_layers": "mpt",
    "num_layers": "exaone gpt_neo",
    "num_transformer_layers": "openelm",
}
LAYERS_FIELD = {model_type: field for field, types in _BY_FIELD.items() for model_type in types.split()}
# What a head's size in GroupQueryAttention is a multiple of, without and with a rotation inside: ONNX Runtime 1.31
# refuses others when the graph runs. RotaryEmbedding takes any even size.
HEAD_MULTIPLE, ROTATED_MULTIPLE = 8, 16
# Rules of generation (`src/generation`) that change tokens and are heeded, each with the value with which it does not.
HEEDED: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
TASK = "<CAPTION>"  # of those that stand for a prompt in layout tasks, one that all models know
# Keys of preprocessor_config.json by which `Florence2Processor` knows them: sentences of tasks that are all of a
# prompt, those of tasks with an input, and what an answer is parsed as.
TASKS_ALONE, TASKS_WITH_INPUT, TASK_ANSWERS = TASK_KEYS = (
    "task_prompts_without_inputs",
    "task_prompts_with_input",
    "tasks_answer_post_processing_type",
)
MAX_NEW_TOKENS = 30  # of a recipe that says nothing of them
