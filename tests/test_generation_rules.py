"""Rules of generation that a checkpoint brings: what a greedy client heeds is published, and all runtimes heed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import encoder_decoders
import pico
import pico_chat
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vlm_export import pipeline
from vlm_export.apps import pytorch_engine
from vlm_export.apps.load import load
from vlm_export.errors import InputError
from vlm_export.files import Work, read_json
from vlm_export.recipe import Generation, RecipeFile, load_recipe
from vlm_export.runtime.images import open_image
from vlm_export.runtime.options import Options
from vlm_export.source.checkpoint import Checkpoint, open_checkpoint
from vlm_export.source.generation_rules import HEEDED, published, unheeded


def write(folder: Path, model: str) -> Path:
    if model == "llava":
        return pico_chat.write_llava(folder)
    if model == "prefix":
        return pico.write_checkpoint(folder, lora=False)
    return encoder_decoders.write_checkpoint(folder, encoder_decoders.config("vit", "gpt2"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write(tmp_path_factory.mktemp("base"), "vit-gpt2"))


@pytest.mark.parametrize(
    ("rules", "config", "wanted", "expected", "named"),
    [
        ({}, {}, Generation(), {"max_new_tokens": 30}, {}),
        ({"repetition_penalty": 1.2}, {}, Generation(), {"max_new_tokens": 30, "repetition_penalty": 1.2}, {}),
        ({"repetition_penalty": 1.2}, {}, Generation(repetition_penalty=1.0), {"max_new_tokens": 30}, {}),
        ({"max_new_tokens": 7}, {}, Generation(), {"max_new_tokens": 30}, {}),
        ({"max_new_tokens": 7}, {}, Generation(from_checkpoint=True), {"max_new_tokens": 7}, {}),
        ({"max_new_tokens": 7}, {}, Generation(9, from_checkpoint=True), {"max_new_tokens": 9}, {}),
        ({"max_length": 17}, {}, Generation(from_checkpoint=True), {"max_new_tokens": 17}, {}),
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
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    if rules is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    opened = replace(checkpoint, path=tmp_path, config=config)
    assert published(wanted, opened) == {"max_new_tokens": 30} | expected
    assert unheeded(opened) == named


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"max_new_tokens": -3}, r"max_new_tokens: is -3"),
        ({"cache_implementation": "nope"}, r"rules of generation: .*cache_implementation"),
    ],
)
def test_rules_that_are_none(rules: dict[str, object], said: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    with pytest.raises(InputError, match=rf"generation_config\.json: {said}"):
        published(Generation(), replace(checkpoint, path=tmp_path))


def test_ids_that_pytorch_is_not_given_are_not_counted(tmp_path: Path) -> None:
    """A captioner that continues embeddings: its clients give it a start token or image tokens, and PyTorch none."""
    opened = open_checkpoint(write(tmp_path, "prefix"))
    rules = {"min_length": 9, "forced_bos_token_id": 5, "suppress_tokens": [7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    assert published(Generation(), opened) == {"max_new_tokens": 30, "suppress_tokens": [7]}
    assert unheeded(opened) == {"min_length": 9, "forced_bos_token_id": 5}


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


class PlainTransformers:
    """The loaded model and its own processor, and nothing of ours."""

    def __init__(self, base: Path):
        self.model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
        processor: Any = AutoProcessor.from_pretrained(base)
        self.images: Any = AutoImageProcessor.from_pretrained(base)
        self.chat = processor if hasattr(processor, "image_processor") else None

    @torch.inference_mode()
    def tokens(self, paths: Sequence[Path], rules: dict[str, Any]) -> list[list[int]]:
        """Greedy, by these rules as its `generation_config.json`."""
        self.model.generation_config = GenerationConfig(**rules)
        found = []
        for path in paths:
            inputs = self.images(images=[Image.open(path)], return_tensors="pt")
            if self.chat:
                text = self.chat.apply_chat_template(pico_chat.CONVERSATION, add_generation_prompt=True)
                inputs = self.chat(images=[Image.open(path)], text=[text], return_tensors="pt")
            made = self.model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
            found.append(made[0, inputs["input_ids"].shape[1] if self.chat else 1 :].tolist())
        return found


@dataclass(frozen=True)
class Exported:
    """A model of the library, exported with no rules of its own, and its pictures."""

    model: str
    base: Path
    work: Work
    images: tuple[Path, ...]
    plain: PlainTransformers

    @property
    def prompt(self) -> str | None:
        return "what is it?" if self.model == "llava" else None

    @property
    def prompt_tokens(self) -> int:
        return 31 if self.model == "llava" else 1

    def recipe(self) -> RecipeFile:
        prompts = {"prompts": [pico_chat.CONVERSATION]} if self.prompt else {}
        recipe = {
            "name": "m",
            "model": str(self.base),
            "layout": "chat" if self.prompt else "captioner",
            "generation": {"max_new_tokens": 8},
            "golden": {"images": [str(path) for path in self.images]} | prompts,
        }
        path = self.base.parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(path)


IDS = {"eos_token_id": 256, "decoder_start_token_id": 256}


@pytest.fixture(scope="module", params=["vit-gpt2", "llava"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of a text that begins with a start token alone, and of one with a prompt."""
    folder = tmp_path_factory.mktemp("exported")
    base = write(folder / "base", request.param)
    (base / "generation_config.json").write_text(json.dumps(IDS))
    images = tuple(folder / f"{index}.png" for index in range(2))
    for index, path in enumerate(images):
        noise = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    made = Exported(request.param, base, Work(folder / "work"), images, PlainTransformers(base))
    pipeline.run_merge(made.recipe(), made.work, silent)
    pipeline.run_export(made.recipe(), made.work, silent)
    return made


# Of what comes without them: the rules that change it.
RULES: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "suppressed": lambda said: {"suppress_tokens": [said[0][0], -1, 99_999]},
    "suppressed at first": lambda said: {"begin_suppress_tokens": [said[0][0]]},
    "a bad word": lambda said: {"bad_words_ids": [[said[0][1]]]},
    "a bad word of two": lambda said: {"bad_words_ids": [said[0][:2], [256]]},
    "a penalty": lambda said: {"repetition_penalty": 3.0},
    "no word again": lambda said: {"no_repeat_ngram_size": 1},
    "a last token": lambda said: {"forced_eos_token_id": 9},
    "one of two last tokens": lambda said: {"forced_eos_token_id": [9, 256]},
    "more tokens than to an end": lambda said: {"min_new_tokens": 6, "eos_token_id": said[0][0]},
    "a longer text than to an end": lambda said: {"min_length": 6, "eos_token_id": said[0][0]},
}


def assert_both_engines_say(expected: Any, exported: Any, rules: Mapping[str, Any], folder: Path) -> None:
    """ONNX Runtime and PyTorch's engine, on a copy of the repo that has these rules."""
    work = shutil.copytree(exported.work.root, folder / "work")
    file = work / "repo" / "generation_config.json"
    file.write_text(json.dumps(read_json(file) | rules))
    for engine in (load(work / "repo", backend="onnx"), pytorch_engine.beside(work / "repo", because="")):
        said = [engine.generate([open_image(path)], exported.prompt, Options()) for path in exported.images]
        assert [list(answer.token_ids) for answer in said] == expected, type(engine)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_alone(rule: str, exported: Exported, tmp_path: Path) -> None:
    """ONNX Runtime and PyTorch's engine say what the loaded model says by the rule, which is something else."""
    free = exported.plain.tokens(exported.images, IDS)
    rules = RULES[rule](free)
    if "min_length" in rules:
        rules["min_length"] += exported.prompt_tokens
    expected = exported.plain.tokens(exported.images, IDS | rules)
    without = {name: value for name, value in rules.items() if name not in HEEDED}
    assert expected != exported.plain.tokens(exported.images, IDS | without)
    assert_both_engines_say(expected, exported, rules, tmp_path)


def test_a_first_token_is_forced_behind_a_start_token_alone(exported: Exported, tmp_path: Path) -> None:
    rules = {"forced_bos_token_id": 70, "begin_suppress_tokens": [71]}
    expected = exported.plain.tokens(exported.images, IDS | rules)
    assert {said[0] == 70 for said in expected} == {exported.model == "vit-gpt2"}
    assert_both_engines_say(expected, exported, rules, tmp_path)


def test_from_the_checkpoint_to_both_clients(exported: Exported, tmp_path: Path) -> None:
    free = exported.plain.tokens(exported.images, IDS)
    rules = IDS | {
        "suppress_tokens": [free[0][0]],
        "bad_words_ids": [[free[0][1]], free[1][1:3]],
        "min_length": exported.prompt_tokens + 5,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 70,
        "forced_eos_token_id": 9,
    }
    expected = exported.plain.tokens(exported.images, rules)
    assert expected != free
    base = shutil.copytree(exported.base, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(rules | {"num_beams": 3}))
    made = replace(exported, base=base, work=Work(tmp_path / "work"))
    recipe = made.recipe()
    golden = pipeline.run_golden(recipe, silent)
    assert [image.token_ids for image in golden.images] == expected
    report = pipeline.run_merge(recipe, made.work, silent)
    [warning] = [line for line in report.warnings if "greedily" in line]
    assert f"{base}/generation_config.json: num_beams: 3: " in warning
    pipeline.run_export(recipe, made.work, silent)
    verified = pipeline.run_verify(recipe, made.work, silent, runtimes=("ort", "node"))
    assert verified.verdict == "pass", verified.failures
    engine = pytorch_engine.from_recipe(recipe)
    said = [engine.generate([open_image(path)], made.prompt, Options()) for path in made.images]
    assert [list(answer.token_ids) for answer in said] == expected
    written = read_json(made.work.repo / "generation_config.json")
    heeded = {name: value for name, value in rules.items() if name in HEEDED}
    assert {name: written.get(name) for name in heeded} == heeded
    assert written["num_beams"] == 1
