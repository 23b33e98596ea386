"""The default recipe's captioner says what transformers' `generate` makes it say: greedy, beams, rules, sampling."""

from __future__ import annotations

import math
import random
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_export.apps.load import load
from vlm_export.errors import InputError
from vlm_export.merging import merge
from vlm_export.recipe import find_recipe
from vlm_export.runtime import Answer, Model, Options, generate, logits
from vlm_export.runtime.images import ImageProcessor
from vlm_export.runtime.onnx import OnnxEngine
from vlm_export.runtime.options import Plan
from vlm_export.runtime.options import plan as decide

EOS = 0
RULES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
# Every number of beams with every length penalty and every rule of stopping, in as few runs as hold each pair of them.
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2, "length_penalty": 0.0, "early_stopping": False},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": 0.6, "early_stopping": False, **RULES},
    {"num_beams": 2, "length_penalty": 1.0, "early_stopping": "never", **RULES},
    {"num_beams": 3, "length_penalty": 1.0, "early_stopping": False},
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": True, "min_new_tokens": 18},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": False, "min_new_tokens": 18},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, **RULES},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "max_new_tokens": 9},
]
SINGLE: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 20},
    {**RULES, "min_new_tokens": 25},
    {"max_new_tokens": 5},
]


@dataclass(frozen=True)
class Pair:
    """The exported captioner and the PyTorch model with its adapter attached, on the same 50 images."""

    model: Model
    reference: Any
    images: list[Image.Image]
    inputs: dict[str, torch.Tensor]

    @property
    def engine(self) -> OnnxEngine:
        assert isinstance(self.model.engine, OnnxEngine)
        return self.model.engine

    def theirs(self, **options: Any) -> tuple[list[list[int]], list[float | None]]:
        """New ids and scores of every sequence."""
        with torch.inference_mode():
            output = self.reference.generate(
                self.inputs,
                eos_token_id=[EOS],
                pad_token_id=EOS,
                return_dict_in_generate=True,
                output_scores=True,
                **{"do_sample": False, "max_new_tokens": 30, **options},
            )
        ids = [row[: row.index(EOS) + 1] if EOS in row else row for row in output.sequences.tolist()]
        return ids, output.sequences_scores.tolist() if options.get("num_beams", 1) > 1 else [None] * len(ids)


def images() -> list[Image.Image]:
    """40 scenes as the captioner knows them; 5 of noise and 5 of two scenes at once, on which it is unsure."""
    sys.path.insert(0, str(find_recipe("shapes-captioner").path.parent / "shapes-captioner"))
    import shapes

    rng = random.Random(5)
    scenes = [shapes.draw_resized(shapes.sample_scene(rng), 48, rng) for _ in range(40)]
    values = np.random.default_rng(0)
    noise = [Image.fromarray(values.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)) for i in range(5)]
    return [*scenes, *noise, *(Image.blend(scenes[i], scenes[i + 1], 0.5) for i in range(5))]


@pytest.fixture(scope="module")
def pair(default_repo: Path) -> Pair:
    recipe = find_recipe("shapes-captioner")
    checkpoint, model = merge.attach(recipe.path.parent / "shapes-captioner" / "checkpoint", [])
    loaded = load(default_repo, dtype="fp32", threads=1)
    assert isinstance(loaded.engine, OnnxEngine)
    prepared = ImageProcessor(loaded.engine.repo.in_graph)
    size = (prepared.settings["size"]["width"], prepared.settings["size"]["height"])
    pictures = [image.resize(size) for image in images()]  # the graph's own resizing is right to 1 of 255
    pixels = np.concatenate([prepared([image]).arrays["pixel_values"] for image in pictures])
    inputs = {"pixel_values": torch.from_numpy(pixels), "input_ids": torch.zeros((len(pixels), 0), dtype=torch.int64)}
    return Pair(loaded, checkpoint.family.reference(model), pictures, inputs)


def flat(answers: list[Answer]) -> list[Answer]:
    return [one for answer in answers for one in (answer, *answer.alternatives)]


@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_greedy_tokens_are_transformers(pair: Pair, options: dict[str, Any]) -> None:
    expected, _ = pair.theirs(**options)
    ours = pair.model.generate_batch([([image], None) for image in pair.images], Options(**options))
    assert [list(answer.token_ids) for answer in ours] == expected
    assert len({tuple(ids) for ids in expected}) > 30, "images that all say the same show nothing"
    for answer in ours:
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == EOS else "length")


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams_and_their_scores_are_transformers(pair: Pair, options: dict[str, Any]) -> None:
    options = {**options, "num_return_sequences": options["num_beams"]}
    expected, scores = pair.theirs(**options)
    ours = flat(pair.model.generate_batch([([image], None) for image in pair.images], Options(**options)))
    assert [list(answer.token_ids) for answer in ours] == expected
    assert np.abs(np.array([answer.score for answer in ours]) - np.array(scores)).max() <= 1e-4


def test_the_rules_of_stopping_and_of_length_make_a_difference(pair: Pair) -> None:
    """What the tests above compare is not the same result thirteen times."""
    unsure = replace(pair, inputs={name: value[40:] for name, value in pair.inputs.items()})
    results = {
        str(unsure.theirs(num_beams=4, num_return_sequences=4, length_penalty=penalty, early_stopping=early)[0])
        for penalty, early in ((0.0, False), (2.0, False), (2.0, True), (2.0, "never"))
    }
    assert len(results) >= 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_a_batch_gives_each_image_what_it_gets_alone(pair: Pair, options: dict[str, Any], default_repo: Path) -> None:
    chosen = pair.images[30:44]
    for model in (pair.model, load(default_repo, dtype="q8", threads=1)):
        together = flat(model.generate_batch([([image], None) for image in chosen], Options(**options)))
        alone = flat([model.generate([image], options=Options(**options)) for image in chosen])
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 0},
    {"top_k": 5},
    {"top_k": 0, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 3.0, "top_k": 1000, "top_p": 0.5},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_distribution_that_is_drawn_from_is_transformers(options: dict[str, Any]) -> None:
    scores = np.random.default_rng(3).normal(scale=3, size=(20, 300)).astype(np.float32)
    scores[0, :9] = scores[0].max() + 1  # equals, more than top_k takes
    plan = Plan((EOS,), EOS, do_sample=True, **options)
    warpers = LogitsProcessorList()
    if plan.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(plan.temperature))
    if plan.top_k:
        warpers.append(TopKLogitsWarper(plan.top_k))
    if plan.top_p < 1:
        warpers.append(TopPLogitsWarper(plan.top_p))
    expected = warpers(torch.zeros((20, 0), dtype=torch.int64), torch.from_numpy(scores)).numpy()
    ours = logits.warp(scores, plan)
    assert np.isneginf(expected).any() == (plan.top_k > 0 or plan.top_p < 1)
    rows = slice(1, None) if plan.top_p < 1 else slice(None)  # which of equals top_p keeps is nobody's promise
    assert np.array_equal(np.isneginf(ours[rows]), np.isneginf(expected[rows]))
    kept = ~np.isneginf(expected[rows])
    assert np.array_equal(ours[rows][kept], expected[rows][kept])


def test_sampling_draws_with_those_frequencies(pair: Pair) -> None:
    """First tokens of 4000 samples of an image of noise, beside the probabilities of PyTorch."""
    options = {"temperature": 2.0, "top_k": 12, "top_p": 0.95}
    image = 41
    drawn = pair.model.generate(
        [pair.images[image]],
        options=Options(do_sample=True, num_return_sequences=4000, max_new_tokens=1, seed=1, **options),
    )
    counts = np.bincount([one.token_ids[0] for one in flat([drawn])], minlength=341) / 4000
    inputs = {name: value[image : image + 1] for name, value in pair.inputs.items()}
    with torch.inference_mode():
        output = pair.reference.generate(
            inputs, do_sample=True, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, **options
        )
    expected = output.scores[0].softmax(-1)[0].numpy()
    assert (expected > 0).sum() > 3
    deviations = np.sqrt(expected * (1 - expected) / 4000)
    assert np.all(np.abs(counts - expected) <= 5 * deviations + 1e-12)
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=str)
def test_a_seed_makes_sampling_repeatable_alone_and_in_a_batch(pair: Pair, more: dict[str, Any]) -> None:
    options = Options(do_sample=True, temperature=4.0, seed=7, max_new_tokens=8, **more)
    first = [pair.model.generate([image], options=options).token_ids for image in pair.images[:3]]
    assert first == [pair.model.generate([image], options=options).token_ids for image in pair.images[:3]]
    batch = pair.model.generate_batch([([image], None) for image in pair.images[:3]], options)
    assert first == [answer.token_ids for answer in batch]
    other = Options(do_sample=True, temperature=4.0, seed=8, max_new_tokens=8, **more)
    assert first[0] != pair.model.generate(pair.images[:1], options=other).token_ids


def test_samples_of_one_prompt_differ(pair: Pair) -> None:
    options = Options(do_sample=True, temperature=4.0, seed=7, max_new_tokens=8, num_return_sequences=4)
    assert len({one.token_ids for one in flat([pair.model.generate(pair.images[:1], options=options)])}) == 4


def test_the_stream_is_the_text_token_by_token(pair: Pair) -> None:
    pieces: list[str] = []
    answer = pair.model.generate(pair.images[:1], on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 8
    whole: list[str] = []
    beams = pair.model.generate(pair.images[:1], options=Options(num_beams=2), on_text=whole.append)
    assert whole == [beams.text]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(pair: Pair, beams: int) -> None:
    pieces: list[str] = []
    whole = pair.model.generate(pair.images[:1], options=Options(num_beams=beams)).text
    stop = whole.split(" on ")[0][-6:] + " o"
    options = Options(stop=("never said", stop), num_beams=beams)
    answer = pair.model.generate(pair.images[:1], options=options, on_text=pieces.append)
    assert answer.text == whole[: whole.index(stop)].rstrip()
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text


@pytest.mark.parametrize("beams", [1, 2])
def test_it_can_be_broken_off_at_every_token(pair: Pair, beams: int) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    answer = pair.model.generate(pair.images[:1], options=Options(num_beams=beams), cancelled=cancelled)
    assert (answer.finish_reason, len(answer.token_ids)) == ("cancelled", 3)
    assert pair.model.generate(pair.images[:1]).text.startswith(answer.text)


def test_times_and_counts(pair: Pair) -> None:
    answer = pair.model.generate(pair.images[:1])
    assert 0 < answer.first_token_seconds < answer.seconds
    assert answer.prompt_tokens == 0
    assert (pair.model.name, pair.model.layout, pair.model.dtype) == ("shapes-captioner", "captioner", "fp32")
    assert not pair.model.takes_prompt


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"min_new_tokens": 31}, "min_new_tokens: 31 is more than max_new_tokens, 30"),
        ({"num_beams": 0}, "num_beams: 0"),
        ({"num_return_sequences": 2}, "num_return_sequences: 2 without sampling"),
        ({"num_return_sequences": 4, "num_beams": 3, "do_sample": True}, "num_return_sequences: 4 is more"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"temperature": math.nan, "do_sample": True}, "temperature: nan, but it must be from 1e-20 to 1e\\+20"),
        ({"temperature": math.inf, "do_sample": True}, "temperature: inf"),
        ({"temperature": 1e-320, "do_sample": True}, "temperature: 1e-320"),
        ({"top_p": math.nan, "do_sample": True}, "top_p: nan"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: nan"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty: 1e-320"),
        ({"repetition_penalty": 1e308}, "repetition_penalty: 1e\\+308"),
        ({"num_beams": 2, "length_penalty": 1e308}, "length_penalty: 1e\\+308, but 30 to the power of it"),
        ({"num_beams": 2, "length_penalty": -1e308}, "length_penalty: -1e\\+308"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty: nan"),
        ({"seed": -1, "do_sample": True}, "seed: -1"),
        ({"seed": 2**63, "do_sample": True}, "seed: 9223372036854775808"),
        ({"max_new_tokens": 222}, "max_new_tokens: 222, but after the prompt the model has positions for 221"),
        ({"max_new_tokens": 10**23}, "max_new_tokens: 1"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": -1}, "top_k: -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: -1"),
        ({"early_stopping": "always"}, "early_stopping: 'always'"),
    ],
)
def test_an_option_out_of_range_is_named(pair: Pair, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        pair.model.generate(pair.images[:1], options=Options(**options))


@pytest.mark.parametrize("temperature", [1e-20, 1e-6, 1e20])
def test_probabilities_are_numbers_at_any_temperature_that_is_taken(pair: Pair, temperature: float) -> None:
    options = Options(do_sample=True, temperature=temperature, seed=3, max_new_tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = pair.model.generate(pair.images[:1], options=options)
    assert pair.model.backend == "onnx"
    if temperature < 1:
        assert answer.token_ids == pair.model.generate(pair.images[:1], options=Options(max_new_tokens=8)).token_ids


def test_nothing_is_drawn_from_what_is_no_number() -> None:
    """numpy would give the id after the last one."""
    scores = np.zeros((2, 5), dtype=np.float32)
    for value in (np.nan, np.inf):
        scores[1, 2] = value
        with pytest.raises(FloatingPointError, match="hold NaN or Inf"):
            generate._drawn(scores, [0, 1], [0, 0], 0)
    scores[1] = -np.inf
    with pytest.raises(InputError, match="no_repeat_ngram_size: no token is left to draw"):
        generate._drawn(scores, [0, 1], [0, 0], 0)


def test_what_is_not_asked_for_is_as_the_repo_says_else_as_transformers_has_it() -> None:
    stored = {"eos_token_id": [2, 3], "max_length": 40, "num_beams": 4, "early_stopping": True, "top_k": 7}
    decided = decide(Options(num_beams=2), stored, prompt_tokens=10)
    assert decided == Plan((2, 3), 2, max_new_tokens=30, num_beams=2, early_stopping=True, top_k=7)
    assert decide(Options(), {}, 5) == Plan((), 0, max_new_tokens=20)


def test_a_captioner_takes_one_image_and_no_prompt(pair: Pair) -> None:
    with pytest.raises(InputError, match="takes no prompt"):
        pair.model.generate(pair.images[:1], "what is it?")
    with pytest.raises(InputError, match="one image at a time, not 2"):
        pair.model.generate(pair.images[:2])
