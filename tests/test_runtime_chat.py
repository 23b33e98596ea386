"""Chat repos, encoder-decoders and the other layouts, beside transformers: prompts, several images, turns, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pico_chat
import pytest
import yaml
from click.testing import CliRunner
from exported import silent
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from vlm_export import pipeline
from vlm_export.apps.load import load
from vlm_export.apps.pytorch_engine import TorchEngine
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.recipe import load_recipe
from vlm_export.runtime import Conversation, Model, Options
from vlm_export.runtime.onnx import OnnxEngine

RULES = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
WAYS: list[dict[str, Any]] = [{}, RULES, {"num_beams": 3, "num_return_sequences": 3, **RULES}]
LETTERS = {place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) if "a" <= letter <= "z"}


def says_letters(folder: Path) -> Path:
    """Leave a checkpoint with lower-case letters as all that it can say, which are its own tokens when read again.

    And with a template that writes what it said as it began to say it.
    """
    tensors = load_file(folder / "model.safetensors")
    [head] = [tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight")]
    head[[row for row in range(len(head)) if row not in LETTERS]] *= 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("}}: {%", "}}:{%"))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "llava": lambda folder: says_letters(pico_chat.write_llava(folder)),
    "smolvlm": lambda folder: says_letters(pico_chat.write_tiled(folder, "smolvlm")),
    "mistral3": lambda folder: says_letters(pico_chat.write_mistral3(folder)),
}


@dataclass(frozen=True)
class Pair:
    """A repo on ONNX Runtime, and its PyTorch model under transformers' processor and `generate`."""

    ours: Model
    theirs: Model

    @property
    def engine(self) -> OnnxEngine:
        assert isinstance(self.ours.engine, OnnxEngine)
        return self.ours.engine

    @property
    def reference(self) -> TorchEngine:
        assert isinstance(self.theirs.engine, TorchEngine)
        return self.theirs.engine


def export(folder: Path, layout: str) -> Pair:
    """The checkpoint in `folder`, without an adapter, in fp32."""
    values = {"name": "pico", "model": "checkpoint", "layout": layout, "generation": {"max_new_tokens": 8}}
    (folder / "pico.yaml").write_text(yaml.safe_dump(values))
    recipe, work = load_recipe(folder / "pico.yaml"), Work(folder / "work")
    pipeline.run_merge(recipe, work, silent)
    pipeline.run_export(recipe, work, silent)
    return Pair(load(work.repo, backend="onnx", threads=1), load(work.repo, backend="torch"))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def once(kind: str) -> Pair:
        folder = tmp_path_factory.mktemp(kind)
        KINDS[kind](folder / "checkpoint")
        return export(folder, "chat")

    return once


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, make: Callable[[str], Pair]) -> Pair:
    return make(request.param)


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(16, 16, 0), picture(40, 12, 1), picture(12, 30, 2)]


def same(ours: Any, theirs: Any) -> None:
    """The same tokens and text in every sequence, and the same scores."""
    for one, other in zip((ours, *ours.alternatives), (theirs, *theirs.alternatives), strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.score == pytest.approx(other.score, abs=1e-4)
    assert ours.prompt_tokens == theirs.prompt_tokens


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3], ids=lambda count: f"{count} images")
def test_answers_are_transformers(pair: Pair, count: int, options: dict[str, Any]) -> None:
    arguments = (PICTURES[:count], "what is it?", Options(**options))
    same(pair.ours.generate(*arguments), pair.theirs.generate(*arguments))


def test_an_image_makes_a_difference(pair: Pair) -> None:
    said = {pair.ours.generate([image], "what is it?").token_ids for image in PICTURES}
    assert len(said) == 3


def test_tiles_are_written_into_the_prompt_as_transformers_writes_them(make: Callable[[str], Pair]) -> None:
    pair = make("smolvlm")
    for images in ([PICTURES[0]], [PICTURES[1]], PICTURES):
        encoded = pair.engine.encode(images)
        ids = pair.engine.prompt_ids(pair.engine.prompts.messages(images, "so?"), encoded)
        assert ids == pair.reference._model_inputs(images, "so?")["input_ids"][0].tolist()
        assert ids.count(257) == len(encoded.values["image_features"]) * 4
    assert {grid.rows for grid in encoded.grids} != {0}


def test_lines_of_cells_are_written_into_the_prompt_as_transformers_writes_them(make: Callable[[str], Pair]) -> None:
    """And the token at the beginning once, whoever writes it."""
    pair = make("mistral3")
    tokenizer = pair.engine.text.tokenizer
    [end, line_end, begin] = map(tokenizer.token_to_id, ("[IMG_END]", "[IMG_BREAK]", "<s>"))
    for images in ([], [PICTURES[0]], PICTURES, [picture(8, 64, 3), picture(60, 9, 4)]):
        encoded = pair.engine.encode(images)
        ids = pair.engine.prompt_ids(pair.engine.prompts.messages(images, "so?"), encoded)
        assert ids == pair.reference._model_inputs(images, "so?")["input_ids"][0].tolist()
        assert ids.count(257) == sum(encoded.rows) == sum(grid.rows * grid.columns for grid in encoded.grids)
        assert (ids.count(end), ids.count(line_end)) == (len(images), sum(grid.rows - 1 for grid in encoded.grids))
        assert ids.index(begin) == 0 and ids.count(begin) == 1


def test_a_batch_of_unequal_prompts_gives_each_what_it_gets_alone(pair: Pair) -> None:
    items = [([PICTURES[0]], "a"), (PICTURES[:2], "what is it then?"), ([], "well"), ([PICTURES[2]], "what?")]
    for options in (Options(**RULES), Options(num_beams=2, **RULES)):
        together = pair.ours.generate_batch(items, options)
        alone = [pair.ours.generate(images, prompt, options) for images, prompt in items]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("options", [RULES, {"num_beams": 2}], ids=str)
def test_turns_are_the_whole_conversation_and_run_only_what_is_new(pair: Pair, options: dict[str, Any]) -> None:
    conversation = Conversation(pair.ours)
    given: list[Image.Image] = []
    cached: list[int] = []
    for text, images in (("what is it?", PICTURES[:1]), ("and this?", PICTURES[1:]), ("both?", [])):
        given += images
        answer = conversation.say(text, images, Options(**options))
        expected = pair.theirs.generate(given, conversation.messages[:-1], Options(**options))
        same(answer, expected)
        ids = pair.engine.prompt_ids(conversation.messages[:-1], pair.engine.encode(given))
        common = next((at for at, (a, b) in enumerate(zip(ids, cached, strict=False)) if a != b), len(cached))
        assert conversation.tokens_fed == len(ids) - common
        assert common == len(cached), "every token of the turns before was in the cache"
        cached = ids if "num_beams" in options else [*ids, *answer.token_ids[:-1]]
    assert conversation.tokens_fed < len(ids) / 2


def test_on_the_command_line(make: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = make("llava")
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, image in zip(paths, PICTURES, strict=False):
        image.save(path)
    arguments = ["run", str(pair.engine.repo.path), *map(str, paths), "--prompt", "what is it?"]
    each = CliRunner().invoke(main, arguments)
    said = [pair.ours.generate([image], "what is it?").text for image in PICTURES[:2]]
    assert each.stdout == "".join(f"{path}: {text}\n" for path, text in zip(paths, said, strict=True))
    both = CliRunner().invoke(main, [*arguments, "--together", "--stream"])
    assert both.stdout == f"{pair.ours.generate(PICTURES[:2], 'what is it?').text}\n"


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(make: Callable[[str], Pair]) -> None:
    conversation = Conversation(make("llava").ours)
    conversation.say("what is it?", PICTURES[:1])
    before = list(conversation.messages)
    with pytest.raises(InputError, match="2 places for images"):
        conversation.say("this <image>?", [])
    assert conversation.messages == before
    assert conversation.say("so?").text


def test_torch_talks_too(make: Callable[[str], Pair]) -> None:
    pair = make("llava")
    ours, theirs = Conversation(pair.ours), Conversation(pair.theirs)
    for text, images in (("what is it?", PICTURES[:1]), ("and?", PICTURES[1:2])):
        same(ours.say(text, images), theirs.say(text, images))


def test_torch_takes_over_in_the_middle_of_a_conversation(make: Callable[[str], Pair]) -> None:
    pair = make("llava")
    told: list[str] = []
    model = load(pair.engine.repo.path, threads=1, notify=told.append)
    ours, theirs = Conversation(model), Conversation(pair.theirs)
    same(ours.say("what is it?", PICTURES[:1]), theirs.say("what is it?", PICTURES[:1]))
    assert isinstance(model.engine, OnnxEngine)
    graphs = model.engine.sessions
    graphs._open["vision_encoder"] = graphs.session("embed_tokens")  # a graph that has no use for pixels
    for text, images in (("and this?", PICTURES[1:]), ("both?", [])):
        same(ours.say(text, images), theirs.say(text, images))
    assert model.backend == "torch"
    assert ours.tokens_fed == theirs.tokens_fed
    [line] = told
    assert "vision_encoder wants 'input_ids'" in line and line.endswith(": captioning with PyTorch instead")


def test_a_chat_model_wants_a_prompt_with_a_place_for_each_image(make: Callable[[str], Pair]) -> None:
    ours = make("llava").ours
    with pytest.raises(InputError, match="give it a prompt"):
        ours.generate(PICTURES[:1])
    with pytest.raises(InputError, match=r"0 places for images \(<image>\), but there are 1"):
        ours.generate(PICTURES[:1], [{"role": "user", "content": [{"type": "text", "text": "well?"}]}])
    with pytest.raises(InputError, match="chat template"):
        ours.generate(PICTURES[:1], [{"role": "user", "content": None}])
