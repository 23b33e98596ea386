"""Tiny repos that stock transformers.js loads, one for each layout, written by hand: no torch, no download.

The graphs are ONNX text. The one-layer decoder has no attention: its logits follow from the sum over the whole masked
cache, the last embedding and the last position, so that whatever a runtime feeds wrongly changes the tokens. The last
position also pushes towards eos, so that every caption ends by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper, parser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS, START = 0, 1
LETTERS = "aĠbcdefghijklmnopqrstuvwxyz"  # Ġ is byte-level BPE's space; it stands where some captions begin
VOCABULARY = 2 + len(LETTERS)
IMAGE = VOCABULARY  # a row of the embedding table, but not of the logits: it cannot be generated
HIDDEN = 16
PATCH = 32

HEADER = '<ir_version: 10, opset_import: ["": 18]>'

# [batch, 3, height, width] → one row for each patch of 32×32.
VISION = """
vision (float[batch_size, 3, height, width] pixel_values) => (float[batch_size, patches, 16] OUTPUT)
<int64[3] rows = {0, 3, -1}>
{
    pooled = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (pixel_values)
    channels = Reshape (pooled, rows)
    patches = Transpose <perm = [0, 2, 1]> (channels)
    OUTPUT = MatMul (patches, w_vision)
}
"""

EMBED_TOKENS = """
embed (int64[batch_size, sequence] input_ids) => (float[batch_size, sequence, 16] inputs_embeds)
{
    inputs_embeds = Gather (embedding, input_ids)
}
"""

# From `embeds`, `positions` [1 or batch, sequence] and `mask` [batch, 1, total, 1].
DECODER = """
    wave_angle = Mul (positions, step)
    wave = Cos (wave_angle)
    wave_column = Unsqueeze (wave, last)
    keys = MatMul (embeds, w_key)
    plain_values = MatMul (embeds, w_value)
    values = Mul (plain_values, wave_column)
    key = Unsqueeze (keys, one)
    value = Unsqueeze (values, one)
    "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", key)
    "present.0.value" = Concat <axis = 2> ("past_key_values.0.value", value)
    both = Mul ("present.0.key", "present.0.value")
    seen = Mul (both, mask)
    sum = ReduceSum <keepdims = 0> (seen, two)
    state = Tanh (sum)
    state_logits = MatMul (state, w_state)
    last_embed = Gather <axis = 1> (embeds, last)
    embed_logits = MatMul (last_embed, w_last)
    last_position = Gather <axis = 1> (positions, last)
    position_column = Unsqueeze (last_position, last)
    position_logits = MatMul (position_column, w_position)
    some_logits = Add (state_logits, embed_logits)
    logits = Add (some_logits, position_logits)
"""

CACHE_INPUTS = """
    float[batch_size, 1, past_sequence, 16] "past_key_values.0.key",
    float[batch_size, 1, past_sequence, 16] "past_key_values.0.value"
"""
DECODER_OUTPUTS = """
    float[batch_size, 1, 29] logits,
    float[batch_size, 1, total_sequence, 16] "present.0.key",
    float[batch_size, 1, total_sequence, 16] "present.0.value"
"""
CONSTANTS = "int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, float step = {0.7}"

CHAT_DECODER = f"""
decoder (
    float[batch_size, sequence, 16] inputs_embeds, int64[batch_size, mask_sequence] attention_mask,
    int64[batch_size, sequence] position_ids, {CACHE_INPUTS}
) => ({DECODER_OUTPUTS})
<{CONSTANTS}, int64[2] mask_axes = {{1, 3}}>
{{
    embeds = Identity (inputs_embeds)
    positions = Cast <to = 1> (position_ids)
    float_mask = Cast <to = 1> (attention_mask)
    mask = Unsqueeze (float_mask, mask_axes)
    {DECODER}
}}
"""

# With an empty cache the image takes the place of the start token; else the new token is embedded.
CAPTIONER_DECODER = f"""
decoder (
    int64[batch_size, decoder_sequence] input_ids, float[batch_size, prefix, 16] encoder_hidden_states, {CACHE_INPUTS}
) => ({DECODER_OUTPUTS})
<
    {CONSTANTS}, int64[1] zero = {{0}}, int64[1] end = {{9223372036854775807}}, int64 unit = {{1}},
    float[1, 1, 1, 1] mask = {{1}}
>
{{
    past_length = Shape <start = 2, end = 3> ("past_key_values.0.key")
    is_first = Equal (past_length, zero)
    first = Cast <to = 7> (is_first)
    image_length = Shape <start = 1, end = 2> (encoder_hidden_states)
    prefix_length = Mul (first, image_length)
    prefix = Slice (encoder_hidden_states, zero, prefix_length, one)
    words = Slice (input_ids, first, end, one)
    word_embeds = Gather (embedding, words)
    embeds = Concat <axis = 1> (prefix, word_embeds)
    length = Shape <start = 1, end = 2> (embeds)
    total_length = Add (past_length, length)
    from = Squeeze (past_length)
    to = Squeeze (total_length)
    range = Range (from, to, unit)
    float_range = Cast <to = 1> (range)
    positions = Unsqueeze (float_range, zero)
    {DECODER}
}}
"""

GRAPHS = {
    "captioner": {
        "encoder_model": VISION.replace("OUTPUT", "last_hidden_state"),
        "decoder_model_merged": CAPTIONER_DECODER,
    },
    "chat": {
        "vision_encoder": VISION.replace("OUTPUT", "image_features"),
        "embed_tokens": EMBED_TOKENS,
        "decoder_model_merged": CHAT_DECODER,
    },
}

TEXT_CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": HIDDEN}
CONFIGS: dict[str, dict[str, Any]] = {
    "captioner": {
        "model_type": "vision-encoder-decoder",
        "architectures": ["VisionEncoderDecoderModel"],
        "is_encoder_decoder": True,
        "decoder": TEXT_CONFIG,
        "encoder": {"model_type": "siglip_vision_model"},
    },
    "chat": {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "text_config": TEXT_CONFIG,
        "vision_config": {"model_type": "siglip_vision_model"},
    },
}
GENERATION = {
    "bos_token_id": START,
    "decoder_start_token_id": START,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "max_new_tokens": 40,
    "do_sample": False,
}
# Images keep their size, so that a test knows the pixels that the graphs see.
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<eos>",
    "pad_token": "<eos>",
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}


def write_repo(folder: Path, layout: Literal["captioner", "chat"], *, external_data: bool = False) -> Path:
    """Writes a whole repo in fp32; with `external_data` the decoder's weights lie beside it, as the config declares."""
    config = dict(CONFIGS[layout])
    if external_data:
        config["transformers.js_config"] = {"use_external_data_format": {"decoder_model_merged.onnx": 1}}
    preprocessor = dict(PREPROCESSOR)
    if layout == "chat":
        preprocessor["processor_class"] = "LlavaProcessor"
        processor = {"image_token": "<image>", "patch_size": PATCH, "num_additional_image_tokens": 0}
        _write_json(folder / "processor_config.json", {"processor_class": "LlavaProcessor", **processor})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", GENERATION)
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer(layout).save(str(folder / "tokenizer.json"))
    for name, graph in GRAPHS[layout].items():
        external = external_data and name == "decoder_model_merged"
        _save(parser.parse_model(HEADER + graph), folder / "onnx" / f"{name}.onnx", external)
    return folder


def tokenizer(layout: Literal["captioner", "chat"]) -> Tokenizer:
    """A byte-level BPE of single letters."""
    tokens = ["<eos>", "<start>", *LETTERS]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<eos>", "<start>"] + (["<image>"] if layout == "chat" else [])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def weights() -> dict[str, np.ndarray]:
    """The weights of all graphs; eos gains on the others with every position."""
    random = np.random.default_rng(0)
    shapes = {
        "w_vision": (3, HIDDEN),
        "embedding": (VOCABULARY + 1, HIDDEN),
        "w_key": (HIDDEN, HIDDEN),
        "w_value": (HIDDEN, HIDDEN),
        "w_state": (HIDDEN, VOCABULARY),
        "w_last": (HIDDEN, VOCABULARY),
    }
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    towards_eos = np.zeros((1, VOCABULARY), np.float32)
    towards_eos[0, EOS] = 0.35
    return {**made, "w_position": towards_eos}


def _save(model: onnx.ModelProto, path: Path, external_data: bool) -> None:
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights().items() if name in used
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=external_data, location=f"{path.name}_data", size_threshold=1024)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
