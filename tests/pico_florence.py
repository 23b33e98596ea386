"""A tiny Florence-2 on disk as transformers saves it: the real config classes, pictures of 64 pixels, windows of 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pico
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, Florence2ForConditionalGeneration, Florence2Processor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BOS, PAD, END = 256, 257, 258
IMAGE = 1269
VOCABULARY = 1270
SIZE = 64
ROWS = 65  # of features: the mean of 8 × 8 cells, and the cells
LOCATIONS = [f"<loc_{place}>" for place in range(1000)]
ADAPTED = r".*\.(qkv|proj|fc1|fc2|q_proj|k_proj|v_proj|out_proj)"
POST_PROCESSING: dict[str, Any] = {
    "ocr": {
        "PATTERN": r"(.+?)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>",
        "AREA_THRESHOLD": 0.0,
    },
    "phrase_grounding": {"banned_grounding_tokens": ["it", "he", "the image"]},
    "pure_text": {},
    "description_with_bboxes": {},
    "description_with_polygons": {},
    "polygons": {},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}


def config(*, layers: int = 3, heads: int = 4, scaled: bool = False, size: int | None = SIZE) -> Any:
    """Two stages of the tower, the second of them `layers` blocks deep, as are encoder and decoder."""
    vision: dict[str, Any] = {
        "depths": [1, layers],
        "embed_dim": [8, 16],
        "num_heads": [1, 2],
        "num_groups": [1, 4],
        "window_size": 3,
        "projection_dim": 32,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 9,
    }
    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 160,
        "scale_embedding": scaled,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": END,
        "forced_eos_token_id": END,
    }
    own = {} if size is None else {"image_size": size}
    ids = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": END}
    return AutoConfig.for_model("florence2", vision_config=vision | own, text_config=text, image_token_id=IMAGE, **ids)


def tokenizer(*, surrounds: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level; `surrounds` says whether it puts the tokens around a text that begin and end it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    others = ["<od>", "</od>", "<poly>", "</poly>", "<sep>", "<ocr>", "</ocr>", "<cap>", "</cap>"]
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", *LOCATIONS, *others, "<image>"])
    if surrounds:
        made.post_processor = processors.RobertaProcessing(("</s>", END), ("<s>", BOS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    assert fast.image_token_id == IMAGE
    return fast


def processor(tokens: PreTrainedTokenizerFast, size: int = SIZE) -> Florence2Processor:
    """Transformers' own, with the image processor that Florence-2 has."""
    square = {"height": size, "width": size}
    image_processor = CLIPImageProcessorPil(size=square, do_center_crop=False, crop_size=square, image_seq_length=ROWS)
    return Florence2Processor(image_processor, tokens, post_processor_config=POST_PROCESSING)


def model(settings: Any, *, seed: int = 4) -> Florence2ForConditionalGeneration:
    """Random weights with which pictures, prompts and positions show in the logits."""
    torch.manual_seed(seed)
    made = Florence2ForConditionalGeneration(settings).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        std = 0.5 if "shared" in name else 0.3 if "encoder_attn." in name else 0.2
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.05 if parameter.dim() == 1 else std)
    made.tie_weights()
    return made


def write_checkpoint(folder: Path, settings: Any = None, *, surrounds: bool = True, size: int = SIZE) -> Path:
    model(settings or config()).save_pretrained(folder)
    processor(tokenizer(surrounds=surrounds), size).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, settings: Any = None, targets: str = ADAPTED, *, seed: int = 1) -> Path:
    """A PEFT adapter (saved by PEFT) on whatever modules the pattern finds; none of its weights is zero."""
    wrapped = peft.get_peft_model(
        model(settings or config()), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    torch.manual_seed(seed)
    pico._fill_adapter(wrapped)
    wrapped.save_pretrained(folder)
    return folder
