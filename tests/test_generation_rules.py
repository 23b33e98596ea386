"""Rules of generation that a checkpoint brings: what a greedy client heeds is published, and all runtimes heed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_decoders
import pico_chat
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlm_export import pipeline
from vlm_export.artifacts import Work, read_json
from vlm_export.generation_rules import published, unheeded
from vlm_export.recipe import Generation, load_recipe


@pytest.mark.parametrize(
    ("rules", "config", "wanted", "expected", "named"),
    [
        ({}, {}, Generation(), {"max_new_tokens": 30}, {}),
        ({"repetition_penalty": 1.2}, {}, Generation(), {"max_new_tokens": 30, "repetition_penalty": 1.2}, {}),
        ({"repetition_penalty": 1.2}, {}, Generation(repetition_penalty=1.0), {"max_new_tokens": 30}, {}),
        ({"max_new_tokens": 7}, {}, Generation(), {"max_new_tokens": 30}, {}),
        ({"max_new_tokens": 7}, {}, Generation(True), {"max_new_tokens": 7}, {}),
        ({"max_new_tokens": 7}, {}, Generation(True, 9), {"max_new_tokens": 9}, {}),
        ({"max_length": 17}, {}, Generation(True), {"max_new_tokens": 17}, {}),
        (
            {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3},
            {},
            Generation(),
            {"max_new_tokens": 30, "no_repeat_ngram_size": 3},
            {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        ),
        (
            None,
            {"num_beams": 4, "no_repeat_ngram_size": 3},
            Generation(),
            {"no_repeat_ngram_size": 3},
            {"num_beams": 4},
        ),
        ({}, {"num_beams": 4, "no_repeat_ngram_size": 3}, Generation(), {"max_new_tokens": 30}, {}),
        ({"do_sample": False, "temperature": 0.2, "top_p": 0.9}, {}, Generation(), {"max_new_tokens": 30}, {}),
        ({"do_sample": True, "temperature": 0.2}, {}, Generation(), {}, {"do_sample": True, "temperature": 0.2}),
    ],
)
def test_what_is_published_and_what_is_named(
    rules: dict[str, Any] | None,
    config: dict[str, Any],
    wanted: Generation,
    expected: dict[str, Any],
    named: dict[str, Any],
    tmp_path: Path,
) -> None:
    if rules is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    found = published(wanted, tmp_path, config)
    assert found == {"max_new_tokens": 30} | expected
    assert unheeded(tmp_path, config) == named


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


MODELS = ["vit-gpt2", "llava"]  # a text that begins with a start token alone, and one with a prompt


def write(folder: Path, model: str) -> Path:
    if model == "llava":
        return pico_chat.write_llava(folder)
    return encoder_decoders.write_checkpoint(folder, encoder_decoders.config("vit", "gpt2"))


def plain_transformers(base: Path, images: list[Path]) -> list[list[int]]:
    """Greedy tokens, by the loaded model's own rules."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(base)
    tokens = []
    for path in images:
        picture = Image.open(path)
        if not hasattr(processor, "image_processor"):
            fed = AutoImageProcessor.from_pretrained(base)(images=[picture], return_tensors="pt")
        else:
            text = processor.apply_chat_template(pico_chat.CONVERSATION, add_generation_prompt=True)
            fed = processor(images=[picture], text=[text], return_tensors="pt")
        made = model.generate(**fed, max_new_tokens=8, do_sample=False, num_beams=1)
        start = fed["input_ids"].shape[1] if "input_ids" in fed else 1
        tokens.append(made[0, start:].tolist())
    return tokens


@pytest.mark.parametrize("model", MODELS)
def test_every_runtime_heeds_them(model: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", model)
    (tmp_path / "images").mkdir()
    images = [tmp_path / "images" / f"{index}.png" for index in range(2)]
    for index, path in enumerate(images):
        noise = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    ids = {"eos_token_id": 256, "decoder_start_token_id": 256}
    (base / "generation_config.json").write_text(json.dumps(ids))
    free = plain_transformers(base, images)
    rules = ids | {
        "suppress_tokens": [free[0][0]],
        "begin_suppress_tokens": [free[1][0]],
        "bad_words_ids": [[free[0][1]], free[1][1:3]],
        "min_length": 6,
        "min_new_tokens": 3,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 70,
        "forced_eos_token_id": 256,
        "num_beams": 3,
    }
    (base / "generation_config.json").write_text(json.dumps(rules))
    expected = plain_transformers(base, images)
    assert expected != free
    recipe = {
        "name": "m",
        "model": str(base),
        "layout": "chat" if model == "llava" else "captioner",
        "generation": {"max_new_tokens": 8},
        "golden": {"images": ["images/*.png"]} | ({"prompts": [pico_chat.CONVERSATION]} if model == "llava" else {}),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found, work = load_recipe(tmp_path / "recipe.yaml"), Work(tmp_path / "work")
    golden = pipeline.run_golden(found, silent)
    assert [image.token_ids for image in golden.images] == expected
    report = pipeline.run_merge(found, work, silent)
    [warning] = [line for line in report.warnings if "greedily" in line]
    assert f"{base}/generation_config.json: num_beams: 3: " in warning
    pipeline.run_export(found, work, silent)
    verified = pipeline.run_verify(found, work, silent, runtimes=("ort", "node"))
    assert verified.verdict == "pass", verified.failures
    written = read_json(work.repo / "generation_config.json")
    heeded = {name: value for name, value in rules.items() if name not in ("num_beams", "decoder_start_token_id")}
    assert {name: written.get(name) for name in heeded} == heeded
    assert written["num_beams"] == 1
