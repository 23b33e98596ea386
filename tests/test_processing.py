"""What is published of an image processor's settings is what Python does with them, spelt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pico_chat
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoProcessor

from vlm_export.preprocessing import image_processor_settings, pixel_values
from vlm_export.source.checkpoint import open_checkpoint

CLIP = {"image_processor_type": "CLIPImageProcessor", "resample": 3}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one number is CLIP's shortest edge": (
        CLIP | {"size": 16, "crop_size": 16},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
    ),
    "and ViT's two sides": (
        {"image_processor_type": "ViTImageProcessor", "size": 16},
        {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5]},
    ),
    "two numbers": (
        {"image_processor_type": "SiglipImageProcessor", "size": [16, 24]},
        {"size": {"height": 16, "width": 24}},
    ),
    "a fast class": (
        {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 16, "width": 16}},
        {"image_processor_type": "SiglipImageProcessor", "do_normalize": True},
    ),
    "almost nothing": (
        {"image_processor_type": "CLIPImageProcessor"},
        {"size": {"shortest_edge": 224}, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
    ),
    "a feature extractor": (
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "do_normalize": True},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}},
    ),
    "what the class does not know stays": (CLIP | {"size": 16, "anything": 1}, {"anything": 1}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_spelt_out(case: str, tmp_path: Path) -> None:
    stored, expected = SETTINGS[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    settings = image_processor_settings(tmp_path, {}, {})
    assert {name: settings[name] for name in expected} == expected
    json.dumps(settings)
    random = np.random.default_rng(0)
    path = tmp_path / "image.png"
    Image.fromarray(random.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(path)
    np.testing.assert_array_equal(pixel_values([path], settings), pixel_values([path], stored))


def test_so_is_what_a_recipe_says_instead(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    settings = image_processor_settings(tmp_path, {}, {"size": 16, "crop_size": [16, 24]})
    assert (settings["size"], settings["crop_size"]) == ({"shortest_edge": 16}, {"height": 16, "width": 24})


def write_llama_tokenizer(folder: Path, **named: Any) -> None:
    """As transformers 4 saved LlamaTokenizer: a space is put before the text, and `config.json` names the class."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdehinorstwx"]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>", "<image>")])
    made.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = tokens | {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True} | named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_id": made.token_to_id("<image>"), "image_token_index": made.token_to_id("<image>")}
    (folder / "config.json").write_text(json.dumps(config))


# What else a folder says of the tokenizer's class, and the files beside it.
SPLIT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LlamaTokenizer": ({}, {}),
    "LlamaTokenizerFast": ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "as it was before": ({"legacy": True}, {}),
    "no class": ({"tokenizer_class": None}, {}),
    "a class of no model": ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "without a first token": ({"add_bos_token": False}, {}),
    "special tokens in a file of their own": (
        {"bos_token": None, "eos_token": None},
        {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}},
    ),
    "added tokens in a file of their own": ({}, {"added_tokens.json": {"<image>": 259 + 15}}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_prompts_are_split_as_the_models_own_processor_splits_them(case: str, tmp_path: Path) -> None:
    named, files = SPLIT[case]
    folder = pico_chat.write_llava(tmp_path)
    write_llama_tokenizer(folder, **named)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    checkpoint = open_checkpoint(folder)
    settings = image_processor_settings(folder, checkpoint.family.image_processor(checkpoint.config), {})
    preprocessor = checkpoint.family.preprocessor(folder, checkpoint.config, settings)
    path = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(path)
    own = AutoProcessor.from_pretrained(folder)
    for text in ("<image>\nwhat is it", "a <image> b", "it is <image>nice"):
        expected = own(images=[Image.open(path)], text=[text], return_tensors="np")["input_ids"]
        np.testing.assert_array_equal(preprocessor.model_inputs(path, text)["input_ids"], expected)
