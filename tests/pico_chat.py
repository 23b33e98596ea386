"""Tiny checkpoints of transformers' own chat classes: saved by the library, with its processors and a PEFT adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import pico
import timm_alone
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    DeepseekVLImageProcessor,
    Gemma3ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from vlm_export import patches

IMAGE_TOKEN = "<image>"
VOCABULARY = 288
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONVERSATION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
GRID_TOKENS = {"image_token_id": 257, "video_token_id": 258, "vision_start_token_id": 259, "vision_end_token_id": 260}
_MANY_POSITIONS = {
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TEXTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**_MANY_POSITIONS, "hidden_size": 32},
    "ministral3": {
        **_MANY_POSITIONS,
        "hidden_size": 32,
        "rope_parameters": {  # queries are scaled anew from position 128 on
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
_CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_GEMMA = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_KINDS = ["sliding_attention", "full_attention"] * 3
TEXTS |= {
    "gemma": {**_GEMMA, "num_key_value_heads": 1},
    "gemma2": {**_GEMMA, **_CAPPED, "sliding_window": 4, "layer_types": _KINDS, "num_hidden_layers": 6},
    "gemma3_text": {
        **_GEMMA,
        "sliding_window": 6,
        "layer_types": _KINDS,
        "num_hidden_layers": 6,
        "max_position_embeddings": 256,
    },
}
ADAPTED = (
    r".*(language|text)_model.*\.(q_proj|v_proj|down_proj|w2|conv\.(in_proj|out_proj))|.*vision_.*\.q_proj"
    r"|.*(vision_|visual\.).*\.qkv|.*visual\.merger\.(mlp\.0|linear_fc1|proj)|.*(multi_modal_projector|vision_projection)\.(linear_1|linear|multimodal_projector)|.*aligner\.linear1|.*connector.*\.proj"
)


def text_config(model_type: str) -> dict[str, Any]:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        intermediate_size=48,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
        **{"max_position_embeddings": 128, "num_hidden_layers": 2, **TEXTS[model_type]},
    )
    return config.to_dict()


def tower_config(model_type: str, layers: int = 4) -> dict[str, Any]:
    """16 pixels, 4 patches."""
    config = AutoConfig.for_model(
        model_type,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
        initializer_factor=4.0,
        **({"vision_use_head": False} if model_type.startswith("siglip") else {}),
    )
    return config.to_dict()


def write_onevision(folder: Path) -> Path:
    """A LLaVA-OneVision checkpoint, with a SigLIP tower and a Qwen2 whose table is tied."""
    config = AutoConfig.for_model(
        "llava_onevision",
        vision_config=tower_config("siglip_vision_model"),
        text_config=text_config("qwen2"),
        image_token_index=257,
        video_token_index=258,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
    )
    save_model(folder, config)
    tokenizer([IMAGE_TOKEN, "<video>"]).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pinpoints = config.image_grid_pinpoints
    LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_llava(folder: Path, text: str = "llama", tower: str = "clip_vision_model", **selection: Any) -> Path:
    """A llava checkpoint; `selection` is of its feature layers."""
    config = AutoConfig.for_model(
        "llava",
        vision_config=tower_config(tower),
        text_config=text_config(text),
        image_token_index=257,
        **selection,
    )
    save_model(folder, config)
    size = {"height": 16, "width": 16}
    image_processor: Any = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    if tower == "siglip_vision_model":
        image_processor = SiglipImageProcessor(size=size)
    class_token = int(tower == "clip_vision_model")
    LlavaProcessor(
        image_processor,
        tokenizer([IMAGE_TOKEN]),
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=class_token,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def write_fast_vlm(folder: Path) -> Path:
    """A FastVLM checkpoint: FastViT in five stages, 64 pixels a row of features, images of 128 pixels."""
    timm_alone.use()
    stages = {"layers": [1, 3, 1, 2, 1], "embed_dims": [4, 8, 8, 32, 32], "mlp_ratios": [2] * 5}
    config = AutoConfig.for_model(
        "fast_vlm",
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "model_args": {"inference_mode": True, **stages},
            "hidden_size": 64,
        },
        text_config=text_config("qwen2"),
        image_token_index=257,
    )
    save_model(folder, config)
    size = {"height": 128, "width": 128}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 128}, crop_size=size, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
    )
    LlavaProcessor(image_processor, tokenizer([IMAGE_TOKEN]), patch_size=64, chat_template=TEMPLATE).save_pretrained(
        folder
    )
    return folder


def write_internvl(folder: Path, tied: bool = True) -> Path:
    """An InternVL checkpoint: one tile of 16 pixels, 16 patches that become 4 rows; no ends in its template."""
    tower = {key: value for key, value in tower_config("siglip_vision_model").items() if key != "model_type"}
    config = AutoConfig.for_model(
        "internvl",
        vision_config={**tower, "patch_size": 4, "attention_bias": True, "layer_scale_init_value": 1.0},
        text_config=text_config("qwen2") | {"tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        image_token_id=257,
        image_seq_length=4,
    )
    save_model(folder, config)
    tokenizer([IMAGE_TOKEN, "<img>", "</img>", "<video>"]).save_pretrained(folder)
    GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True).save_pretrained(folder)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4, "image_token": IMAGE_TOKEN}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_got_ocr2(folder: Path, tied: bool = True) -> Path:
    """A GOT-OCR checkpoint: 64 pixels, 16 × 16 patches that become 4 × 4 rows; windows that do not fit; no template."""
    config = AutoConfig.for_model(
        "got_ocr2",
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 5,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
            "output_channels": 16,
            "initializer_range": 0.2,
        },
        text_config=text_config("qwen2") | {"tie_word_embeddings": tied, "max_position_embeddings": 256},
        tie_word_embeddings=tied,
        image_token_index=257,
        image_seq_length=16,
    )
    save_model(folder, config)
    tokenizer(["<imgpad>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"]).save_pretrained(folder)
    GotOcr2ImageProcessor(size={"height": 64, "width": 64}, crop_to_patches=False).save_pretrained(folder)
    return folder


def write_deepseek_vl(folder: Path, tied: bool = False) -> Path:
    """A DeepSeek-VL checkpoint: a square of 16 pixels, 4 rows, the pooling head that nobody runs."""
    config = AutoConfig.for_model(
        "deepseek_vl",
        vision_config=tower_config("siglip_vision_model") | {"vision_use_head": True},
        text_config=text_config("llama") | {"tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        image_token_id=257,
    )
    save_model(folder, config)
    tokenizer(["<image_placeholder>"]).save_pretrained(folder)
    settings = read(folder / "tokenizer_config.json") | {"image_token": "<image_placeholder>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    half = [0.5, 0.5, 0.5]
    DeepseekVLImageProcessor(
        size={"height": 16, "width": 16}, min_size=2, image_mean=half, image_std=half
    ).save_pretrained(folder)
    processor = {"processor_class": "DeepseekVLProcessor", "num_image_tokens": 4}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(IMAGE_TOKEN, "<image_placeholder>"))
    return folder


def begun(special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token in front of every text."""
    made = tokenizer([*special, "<s>"])
    made.bos_token = "<s>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))]
    )
    return made


def write_paligemma(folder: Path, text: str = "gemma2") -> Path:
    """A PaliGemma checkpoint: 16 pixels, 4 rows; a window that a prompt is longer than, caps that matter."""
    config = AutoConfig.for_model(
        "paligemma",
        vision_config=tower_config("siglip_vision_model"),
        text_config=text_config(text) | {"tie_word_embeddings": True},
        image_token_index=257,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCABULARY,
    )
    save_model(folder, config)
    begun([IMAGE_TOKEN]).save_pretrained(folder)
    settings = {"size": {"height": 16, "width": 16}, "image_seq_length": 4, "processor_class": "PaliGemmaProcessor"}
    SiglipImageProcessor(**settings).save_pretrained(folder)
    return folder


def write_gemma3(folder: Path) -> Path:
    """A Gemma 3 checkpoint: 32 pixels, 8 × 8 patches that become 16 rows, more than a window holds."""
    config = AutoConfig.for_model(
        "gemma3",
        vision_config=tower_config("siglip_vision_model") | {"image_size": 32, "patch_size": 4},
        text_config=text_config("gemma3_text") | {"tie_word_embeddings": True},
        image_token_index=257,
        boi_token_index=258,
        eoi_token_index=259,
        mm_tokens_per_image=16,
    )
    save_model(folder, config, seed=3)
    named = {"image_token": "<soft>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    begun([*named.values()]).save_pretrained(folder)
    settings = read(folder / "tokenizer_config.json") | named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    Gemma3ImageProcessor(size={"height": 32, "width": 32}, do_pan_and_scan=True).save_pretrained(folder)
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 16}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE.replace(IMAGE_TOKEN, "<start_of_image>"))
    return folder


def write_qwen2_vl(folder: Path) -> Path:
    """A Qwen2-VL checkpoint: patches of 4 pixels, cells of 8, images of 64 to 24 cells' area."""
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    vision = {"depth": 4, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4, "mlp_ratio": 2}
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config=grid_text_config("qwen2_vl_text", **text),
        vision_config={**vision, "initializer_range": 0.2},
        **GRID_TOKENS,
        tie_word_embeddings=True,
    )
    return write_grid(folder, config, "Qwen2VLProcessor")


def write_qwen2_5_vl(folder: Path) -> Path:
    """A Qwen2.5-VL checkpoint: windows of two cells' side, a block in two that sees all; a head of its own."""
    vision = {"depth": 6, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
    windows = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1, 3, 5], "initializer_range": 0.2}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=grid_text_config(
            "qwen2_5_vl_text", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
        ),
        vision_config={**vision, **windows},
        **GRID_TOKENS,
        tie_word_embeddings=False,
    )
    return write_grid(folder, config, "Qwen2_5_VLProcessor")


def write_qwen3_vl(folder: Path) -> Path:
    """A Qwen3-VL checkpoint: a position table of 6 × 6, two of its blocks give features to the text model."""
    vision = {"depth": 6, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
    deep = {"patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [1, 3]}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=grid_text_config(
            "qwen3_vl_text",
            layers=6,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        ),
        vision_config={**vision, **deep, "initializer_range": 0.2},
        **GRID_TOKENS,
        tie_word_embeddings=True,
    )
    return write_grid(folder, config, "Qwen3VLProcessor")


def write_glm_ocr(folder: Path) -> Path:
    """A GLM-OCR checkpoint, with a layer that predicts a further token, which the library passes over."""
    vision = {"depth": 4, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
    config = AutoConfig.for_model(
        "glm_ocr",
        text_config=grid_text_config(
            "glm_ocr_text", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
        ),
        vision_config={**vision, "patch_size": 4, "initializer_range": 0.2},
        **{name: value for name, value in GRID_TOKENS.items() if not name.startswith("vision")},
        tie_word_embeddings=False,
    )
    write_grid(folder, config, "Glm46VProcessor", "Glm46VImageProcessor", image_token="<|image|>")
    tensors = load_file(folder / "model.safetensors")
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {key.replace("layers.0", "layers.16"): tensors[key].clone()}, folder / "model.safetensors")
    return folder


def grid_text_config(model_type: str, layers: int = 3, **settings: Any) -> dict[str, Any]:
    """A text model whose places have three axes, a quarter of a head for each but the last, which has a half."""
    size = settings["hidden_size"] // settings["num_attention_heads"] // 2
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        intermediate_size=48,
        num_hidden_layers=layers,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [size // 4, size // 4, size // 2],
        },
        **settings,
    )
    return config.to_dict()


def write_grid(
    folder: Path,
    config: Any,
    processor_class: str,
    image_processor: str = "Qwen2VLImageProcessor",
    *,
    image_token: str = "<|image_pad|>",
) -> Path:
    """Save a model whose images are patches with a grid, and its tokenizer and processor."""
    save_model(folder, config)
    tokenizer([image_token, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]).save_pretrained(folder)
    vision = config.vision_config
    processor = {
        "image_processor_type": image_processor,
        "processor_class": processor_class,
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    least, most = (cells * (2 * vision.patch_size) ** 2 for cells in (4, 12))
    if image_processor == "Qwen2VLImageProcessor":
        processor |= {"min_pixels": least, "max_pixels": most}  # as transformers 4 wrote them
    else:
        processor["size"] = {"shortest_edge": 2 * least, "longest_edge": 2 * most}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    image = f"<|vision_start|>{image_token}<|vision_end|>"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(IMAGE_TOKEN, image))
    return folder


def pixtral_config(layers: int = 4) -> dict[str, Any]:
    """4 pixels a patch; 8 a cell, where 2 × 2 patches become one row."""
    config = AutoConfig.for_model(
        "pixtral",
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
    )
    return config.to_dict()


def write_mistral3(folder: Path, tied: bool = False) -> Path:
    """A Mistral 3 checkpoint, whose tokenizer and template both write the token at the beginning."""
    config = AutoConfig.for_model(
        "mistral3",
        vision_config=pixtral_config(),
        text_config=text_config("ministral3") | {"tie_word_embeddings": tied},
        image_token_index=257,
        spatial_merge_size=2,
        multimodal_projector_bias=True,
        tie_word_embeddings=tied,
    )
    save_model(folder, config)
    made = tokenizer([IMAGE_TOKEN, "[IMG_BREAK]", "[IMG_END]", "<s>"])
    begin = made.convert_tokens_to_ids("<s>")
    made.bos_token = "<s>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    made.save_pretrained(folder)
    PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 4, "width": 4}).save_pretrained(folder)
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": 4,
        "spatial_merge_size": 2,
        "image_token": IMAGE_TOKEN,
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return folder


def write_lighton_ocr(folder: Path, tied: bool = True) -> Path:
    """A LightOnOCR checkpoint, whose processor has the size of a cell as that of a patch."""
    config = AutoConfig.for_model(
        "lighton_ocr",
        vision_config=pixtral_config() | {"hidden_act": "silu"},
        text_config=text_config("qwen3") | {"tie_word_embeddings": tied},
        image_token_id=257,
        spatial_merge_size=2,
        tie_word_embeddings=tied,
    )
    save_model(folder, config)
    named = {"image_token": IMAGE_TOKEN, "image_break_token": "<break>", "image_end_token": "<end>"}
    made = tokenizer([*named.values()])
    made.save_pretrained(folder)
    settings = read(folder / "tokenizer_config.json") | named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}).save_pretrained(folder)
    processor = {"processor_class": "LightOnOcrProcessor", "patch_size": 4, "spatial_merge_size": 2}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def lfm2_vl_config(layers: int = 6, **settings: Any) -> Any:
    """4 pixels a patch, 8 a cell; layers of a short convolution and of attention take turns."""
    vision = AutoConfig.for_model(
        "siglip2_vision_model",
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=4,
        num_patches=16,
        vision_use_head=False,
    )
    text = AutoConfig.for_model(
        "lfm2",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_types=["conv", "full_attention"] * (layers // 2),
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return AutoConfig.for_model(
        "lfm2_vl",
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=257,
        projector_hidden_size=40,
        **settings,
    )


def write_lfm2_vl(folder: Path, tied: bool = True, **settings: Any) -> Path:
    """A LFM2-VL checkpoint, whose template and tokenizer both write the token that begins a text."""
    save_model(folder, lfm2_vl_config(tie_word_embeddings=tied, **settings))
    tiles = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    around = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    made = tokenizer([IMAGE_TOKEN, *around, *(f"<|img_row_{row}_col_{column}|>" for row, column in tiles)])
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{pico.END} $A", pair=f"{pico.END} $A $B", special_tokens=[(pico.END, 256)]
    )
    made.save_pretrained(folder)
    processor = {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "processor_class": "Lfm2VlProcessor",
        "do_resize": True,  # as transformers saves them, which looks at neither
        "size": {"height": 16, "width": 16},
        "encoder_patch_size": 4,
        "downsample_factor": 2,
        "tile_size": 16,
        "min_tiles": 2,
        "max_tiles": 4,
        "min_image_tokens": 2,
        "max_image_tokens": 6,
        "max_pixels_tolerance": 1.5,
        "use_thumbnail": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return folder


def lfm2_vl_image_processor(settings: dict[str, Any]) -> Any:
    """transformers' own, whether torchvision is installed or not."""
    with tempfile.TemporaryDirectory() as folder, patches.image_processor_without_torchvision("Lfm2VlImageProcessor"):
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
        return AutoImageProcessor.from_pretrained(folder, backend="pil")


def save_model(folder: Path, config: Any, *, seed: int = 0) -> None:
    """Random weights, large enough that images, positions and adapters show in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "language_model" not in name and "text_model" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, statistics in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistics.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def write_adapter(folder: Path, base: Path, targets: str = ADAPTED, *, seed: int = 1) -> Path:
    """A PEFT adapter for a saved model, on whatever modules the pattern finds; none of its weights is zero."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(seed)
    pico._fill_adapter(wrapped)
    wrapped.save_pretrained(folder)
    return folder


def tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, an end token with id 256, then `special` ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=pico.END, bos_token=pico.END, pad_token=pico.END)
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def image_text(folder: Path) -> str:
    """What stands for an image in a text of a saved checkpoint."""
    path = folder / "chat_template.jinja"
    if not path.exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(257)
    template = path.read_text()
    return template.partition("== 'image' %}")[2].partition("{%")[0]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_tiled(folder: Path, model_type: str = "idefics3") -> Path:
    """An Idefics3 or SmolVLM checkpoint: tiles of 16 pixels, 16 patches that become 4 rows."""
    tower = {key: value for key, value in tower_config("siglip_vision_model", 3).items() if key != "model_type"}
    config = AutoConfig.for_model(
        model_type,
        vision_config={**tower, "patch_size": 4, "initializer_range": 0.2},
        text_config={**text_config("llama"), "max_position_embeddings": 512},
        image_token_id=257,
        scale_factor=2,
        pad_token_id=256,
    )
    save_model(folder, config)
    special = [IMAGE_TOKEN, "<fake_token_around_image>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 16}),
        tokenizer(special),
        image_seq_len=4,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder
