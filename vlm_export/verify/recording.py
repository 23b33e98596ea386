"""Records golden outputs: by transformers' own forward and `generate`, and by no wrapper of ours.

They change only by `vlm-export golden`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from vlm_export.atomic import atomic_folder, write_bytes
from vlm_export.errors import InputError, blamed_on, shown
from vlm_export.files import sha256, write_json
from vlm_export.merging import merge
from vlm_export.preprocessing import image_processor_settings, load_tokenizer
from vlm_export.recipe import RecipeFile
from vlm_export.runtime.text import check_rows
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.source.companions import Choice, Companions, check_tokenizer, gathered
from vlm_export.source.generation_rules import loaded_rules, published
from vlm_export.spec.family import Preprocessor
from vlm_export.verify.golden import JSON, TENSORS, Golden, GoldenCase, GoldenImage, array_sha256, combination_of

DECODE_STEPS = 3
MIN_IMAGES = 2
_WIDEST = 1e9  # gap of two scores: where rules leave one token alone it is endless, which no JSON holds
_VERSIONS = ("torch", "transformers", "peft", "pillow", "numpy")


def record(
    recipe: RecipeFile,
    model_path: Path,
    adapter_paths: Sequence[Path],
    images: Sequence[Path],
    beside: Choice | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Golden:
    """Run the PyTorch model on `images` and write the recipe's golden folder; `beside` as of `merge.merge`.

    Raises:
        InputError: too few images, an unreadable one, a prompt that the family has no use for, or a checkpoint that
            `merge` would refuse.
    """
    if len(images) < MIN_IMAGES:
        raise InputError(f"{recipe.path}: golden.images: {MIN_IMAGES} images or more are needed; found: {len(images)}")
    with gathered(model_path, adapter_paths, beside) as companions:
        return _record(recipe, model_path, adapter_paths, images, companions, on_image)


def _record(
    recipe: RecipeFile,
    model_path: Path,
    adapter_paths: Sequence[Path],
    images: Sequence[Path],
    companions: Companions,
    on_image: Callable[[int, int], None] | None,
) -> Golden:
    checkpoint, model = merge.attach(
        model_path,
        adapter_paths,
        combination=recipe.recipe.combination,
        dequantized=recipe.recipe.base == "dequantized",
    )
    checkpoint = replace(checkpoint, path=companions.folder)  # nothing is read from here on but what lies there
    check_tokenizer(checkpoint.path, checkpoint)
    settings = image_processor_settings(
        checkpoint.path,
        checkpoint.family.image_processor(checkpoint.config),
        recipe.recipe.image_processor,
        f"{recipe.path}: image_processor",
    )
    preprocessor = checkpoint.family.preprocessor(checkpoint.path, checkpoint.config, settings)
    prompts = recipe.recipe.golden.prompts
    try:
        text, *texts = preprocessor.texts(prompts)
    except InputError as error:
        raise InputError(f"{recipe.path}: {error}") from error
    generation = published(recipe.recipe.generation, checkpoint)
    search = recipe.recipe.generation.search
    recorder = _Recorder(checkpoint, model, preprocessor, generation, search, f"{recipe.path}: golden.prompts")
    recorded = []
    for index, path in enumerate(images):
        recorded.append(recorder.image(path, text))
        if on_image:
            on_image(index + 1, len(images))
    cases, tensors = recorder.cases(images, [text, *(texts or [text])])
    golden = Golden(
        recipe=recipe.name,
        inputs_sha256=merge.input_hashes(model_path, adapter_paths, companions),
        versions={name: version(name) for name in _VERSIONS},
        generation=recorder.generation,
        eos_token_ids=recorder.eos,
        image_processor=settings,
        text=text,
        images=recorded,
        cases=cases,
        conversation=next((list(prompt) for prompt in prompts[:1] if not isinstance(prompt, str)), []),
        base=recipe.recipe.base,
        combination=combination_of(recipe.recipe),
        search=search,
        companions={kind: folder.name for kind, folder in companions.origins.items()},
    )
    with atomic_folder(recipe.golden_target) as folder:
        (folder / "images").mkdir()
        for path in images:
            shutil.copyfile(path, folder / "images" / path.name)
        write_json(folder / JSON, asdict(golden))
        write_bytes(folder / TENSORS, save(tensors))
    return golden


def _margin(gap: float | torch.Tensor) -> float:
    return min(float(f"{gap:.4g}"), _WIDEST)


class _Recorder:
    """The adapted PyTorch model, what it is fed by, and what it generates with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        preprocessor: Preprocessor,
        generation: dict[str, Any],
        search: dict[str, Any],
        prompts: str,
    ):
        self.reference = checkpoint.family.reference(model)
        self.preprocessor = preprocessor
        self.generation, self.search = generation, search
        self.prompts = prompts  # where they stand
        self.tokenizer = load_tokenizer(checkpoint.path)
        self.eos = eos_token_ids(checkpoint, self.tokenizer)
        text_config = checkpoint.family.text_config(checkpoint.config)
        self.rows = text_config.vocab_size
        self.positions = getattr(text_config, "max_position_embeddings", None)
        self.where = f"{checkpoint.path / 'config.json'}: the model cannot be run"

    def model_inputs(self, path: Path, text: str) -> dict[str, np.ndarray]:
        """What the model is fed.

        Raises:
            InputError: a token that the model has no row for, or pixels that are no numbers.
        """
        with np.errstate(all="ignore"):  # what comes of it is looked at
            inputs = self.preprocessor.model_inputs(path, text)
        if not np.isfinite(inputs["pixel_values"]).all():
            raise InputError(
                f"{path}: becomes pixels that are NaN or infinite: see image_std in preprocessor_config.json"
            )
        ids = (int(each) for each in inputs["input_ids"].flatten())
        check_rows(
            ids,
            self.rows,
            lambda token: str(self.tokenizer.convert_ids_to_tokens(token)),
            f"{self.prompts}: {shown(text)}",
        )
        if self.positions is not None and (length := inputs["input_ids"].shape[1]) > self.positions:
            raise InputError(
                f"{self.prompts}: {shown(text)}: {length} tokens, but the model has positions for {self.positions}: "
                "shorten it"
            )
        return inputs

    @torch.inference_mode()
    def image(self, path: Path, text: str) -> GoldenImage:
        inputs = self.model_inputs(path, text)
        with blamed_on(f"{self.where} on {path.name} with {shown(text)}"):
            output = self._generate(inputs, num_beams=1)
            searched, margin = self._searched(inputs) if self.search else ([], None)
        token_ids = output.sequences[0, -len(output.scores) :].tolist()  # the prompt's may be before them
        best = [torch.topk(score[0], 2).values for score in output.scores]
        return GoldenImage(
            file=path.name,
            sha256=sha256(path),
            pixel_values_sha256=array_sha256(inputs["pixel_values"]),
            prompt_ids_sha256=array_sha256(inputs["input_ids"]),
            token_ids=token_ids,
            caption=self._caption(token_ids),
            margins=[_margin(first - second) for first, second in best],
            searched=searched,
            search_margin=margin,
        )

    def _generate(self, inputs: Mapping[str, np.ndarray], **more: Any) -> Any:
        return self.reference.generate(
            as_tensors(inputs),
            do_sample=False,
            eos_token_id=self.eos,
            pad_token_id=self.eos[0],
            return_dict_in_generate=True,
            output_scores=True,
            **self.generation,
            **more,
        )

    def _searched(self, inputs: Mapping[str, np.ndarray]) -> tuple[list[int], float]:
        """The tokens of the best text that a search finds, and how much its score is above the second's."""
        output = self._generate(inputs, **self.search, num_return_sequences=2)
        best, second = output.sequences_scores.tolist()
        length = int((output.beam_indices[0] >= 0).sum())  # -1 behind the end
        sequence = output.sequences[0]
        prompt = len(sequence) - output.beam_indices.shape[1]
        return sequence[prompt : prompt + length].tolist(), _margin(best - second)

    def _caption(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids."""
        tokenizer, keeps = self.tokenizer, self.preprocessor.keeps_tokens
        around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} if keeps else set()
        kept = [each for each in token_ids if each not in around]
        return str(tokenizer.decode(kept, skip_special_tokens=not keeps))

    def cases(self, images: Sequence[Path], texts: Sequence[str]) -> tuple[list[GoldenCase], dict[str, np.ndarray]]:
        """The first text on one image, the others on two."""
        cases: list[GoldenCase] = []
        tensors: dict[str, np.ndarray] = {}
        for index, text in enumerate(texts):
            name, batch = f"case{index}", 2 if index else 1
            inputs = self._batch(images, text) if index else self.model_inputs(images[0], text)
            with blamed_on(f"{self.where} with {shown(text)}"):
                steps, values = self._case(inputs)
            cases.append(GoldenCase(name, batch, text, steps))
            tensors |= {f"{name}/{key}": value.contiguous().numpy() for key, value in values.items()}
        return cases, tensors

    def _batch(self, images: Sequence[Path], text: str) -> dict[str, np.ndarray]:
        """The first image and the next that is fed in the same shapes, or itself: a batch without padding."""
        first = self.model_inputs(images[0], text)
        others = (self.model_inputs(path, text) for path in images[1:])
        second = next(
            (inputs for inputs in others if all(inputs[name].shape == first[name].shape for name in first)),
            first,
        )
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    @torch.inference_mode()
    def _case(self, arrays: dict[str, np.ndarray]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        inputs = as_tensors(arrays)
        values = inputs | self.reference.encode(inputs)
        output = self.reference.prefill(inputs)
        values["prefill.logits"] = output.logits[:, -1:]
        steps = []
        for step in range(DECODE_STEPS):
            tokens = output.logits[:, -1:].argmax(-1)
            steps.append(tokens[:, 0].tolist())
            output = self.reference.step(tokens, output.past_key_values, inputs)
            values[f"step{step}.logits"] = output.logits
        return steps, values | cache_tensors(output.past_key_values)


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same arrays, as PyTorch is fed them."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    """A cache by goldens' names (`golden_of` in `spec/cache.py`): `cache.0.key`, or `cache.0.decoder.key`, …

    Layers that hold nothing are none: Bart's kin make as many as the encoder has that they are without. A layer of a
    short convolution holds its last inputs, `cache_conv.1`.
    """
    parts = {"": cache}
    if isinstance(cache, EncoderDecoderCache):
        parts = {"decoder.": cache.self_attention_cache, "encoder.": cache.cross_attention_cache}
    found = (
        held
        for part, layers in parts.items()
        for index, layer in enumerate(layers.layers)
        for held in _held(layer, index, part)
    )
    return {name: tensor for name, tensor in found if tensor is not None}


def _held(layer: Any, index: int, part: str) -> Iterator[tuple[str, torch.Tensor | None]]:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        yield f"cache_conv.{index}", layer.conv_states[0]
    if isinstance(layer, CacheLayerMixin):
        yield f"cache.{index}.{part}key", layer.keys
        yield f"cache.{index}.{part}value", layer.values


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """The ids at which `generate` of the loaded model stops.

    As transformers 5 decides: those of `generation_config.json`, or where there is no such file what `config.json`
    says, else its text config; a class's defaults are not asked. Where neither names one, `generate` would go on to the
    last token, and the tokenizer's end is taken.

    Raises:
        InputError: none names one, so nothing would ever stop.
    """
    rules = loaded_rules(checkpoint)
    found = tokenizer.eos_token_id if rules.eos_token_id is None else rules.eos_token_id
    ids = found if isinstance(found, list) else [found]
    rows = checkpoint.family.text_config(checkpoint.config).vocab_size
    known = list(dict.fromkeys(token for token in ids if token is not None and token < rows))
    if not known:
        raise InputError(
            f"{checkpoint.path / 'generation_config.json'}: eos_token_id: names none of the model's tokens, so no text "
            "would end: name one"
        )
    return known
