"""Golden outputs: what the PyTorch model says with its adapter attached, before anything is merged or traced.

`golden.json` holds the tokens and captions and where they came from; `golden.safetensors` holds the tensors of two
cases (batch 1, and batch 2 with a prompt): tower, projection, prefill logits, three decode steps, and the cache after
them. They are computed by transformers' own forward and `generate`, by no wrapper of ours, and change only by
`vlm-export golden`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.cache_utils import DynamicCache

from vlm_export import merge
from vlm_export.artifacts import replaced_folder, write_json
from vlm_export.checkpoint import Checkpoint, read_json, sha256
from vlm_export.errors import InputError
from vlm_export.processing import image_processor_settings, load_tokenizer, pixel_values
from vlm_export.recipe import RecipeFile

DECODE_STEPS = 3
MIN_IMAGES = 2
_JSON, _TENSORS = "golden.json", "golden.safetensors"
_VERSIONS = ("torch", "transformers", "peft", "pillow", "numpy")


@dataclass(frozen=True)
class GoldenImage:
    """One image's greedy tokens. `margins` are the gaps between the two best scores at each token."""

    file: str
    sha256: str
    pixel_values_sha256: str
    token_ids: list[int]
    caption: str
    margins: list[float]


@dataclass(frozen=True)
class GoldenCase:
    """One run on the first `batch` images: prompt ids after the image, and the greedy token of each decode step."""

    name: str
    batch: int
    prompt_ids: list[list[int]]
    step_token_ids: list[list[int]]


@dataclass(frozen=True)
class Golden:
    """`golden.json`."""

    recipe: str
    inputs_sha256: dict[str, str]
    versions: dict[str, str]
    generation: dict[str, Any]
    eos_token_ids: list[int]
    image_processor: dict[str, Any]
    images: list[GoldenImage]
    cases: list[GoldenCase]
    schema: int = 1


@dataclass(frozen=True)
class GoldenFolder:
    """A recorded golden: the facts, the tensors by `<case>/<quantity>`, and the images."""

    path: Path
    facts: Golden
    tensors: Mapping[str, np.ndarray]

    def image_paths(self) -> list[Path]:
        return [self.path / "images" / image.file for image in self.facts.images]


def load_golden(path: Path, recipe_name: str) -> GoldenFolder:
    """Read and check a recorded golden.

    Raises:
        InputError: there is none, it is damaged, or it holds nothing to compare with.
    """
    again = f"run `vlm-export golden {recipe_name}`"
    if not (path / _JSON).is_file():
        raise InputError(f"{path}: no golden outputs recorded yet: {again}")
    try:
        facts = TypeAdapter(Golden).validate_python(read_json(path / _JSON))
        tensors = load_file(path / _TENSORS)
    except (ValidationError, OSError) as error:
        raise InputError(f"{path}: golden outputs are damaged ({type(error).__name__}): {again}") from error
    if not facts.images or not facts.cases or not tensors:
        raise InputError(f"{path / _JSON}: an empty golden proves nothing: {again}")
    for image, file in zip(facts.images, (path / "images" / image.file for image in facts.images), strict=True):
        if Path(image.file).name != image.file or not file.is_file() or sha256(file) != image.sha256:
            raise InputError(f"{file}: not the image that the golden outputs were recorded on: {again}")
    return GoldenFolder(path, facts, tensors)


def record(
    recipe: RecipeFile,
    model_path: Path,
    adapter_paths: Sequence[Path],
    images: Sequence[Path],
    on_image: Callable[[int, int], None] | None = None,
) -> Golden:
    """Run the PyTorch model on `images` and write the recipe's golden folder.

    Raises:
        InputError: too few images, an unreadable one, or a checkpoint that `merge` would refuse.
    """
    if len(images) < MIN_IMAGES:
        raise InputError(
            f"{recipe.path}: golden.images: {len(images)} image(s) found, at least {MIN_IMAGES} are needed"
        )
    checkpoint, model = merge.attach(
        model_path,
        adapter_paths,
        combination=recipe.recipe.combination,
        dequantized=recipe.recipe.base == "dequantized",
    )
    settings = image_processor_settings(
        checkpoint.path, checkpoint.family.image_processor(checkpoint.config), recipe.recipe.image_processor
    )
    pixels = np.concatenate([pixel_values([path], settings) for path in images])
    tokenizer = load_tokenizer(checkpoint.path)
    recorder = _Recorder(checkpoint, model, tokenizer, asdict(recipe.recipe.generation))
    recorded = []
    for index, path in enumerate(images):
        recorded.append(recorder.image(path, pixels[index : index + 1]))
        if on_image:
            on_image(index + 1, len(images))
    cases, tensors = recorder.cases(pixels, recipe.recipe.golden.prompts)
    golden = Golden(
        recipe=recipe.name,
        inputs_sha256=merge.input_hashes(model_path, adapter_paths),
        versions={name: version(name) for name in _VERSIONS},
        generation=recorder.generation,
        eos_token_ids=recorder.eos,
        image_processor=settings,
        images=recorded,
        cases=cases,
    )
    with replaced_folder(recipe.golden_target) as folder:
        (folder / "images").mkdir()
        for path in images:
            shutil.copyfile(path, folder / "images" / path.name)
        write_json(folder / _JSON, asdict(golden))
        save_file(tensors, folder / _TENSORS)
    return golden


def array_sha256(array: np.ndarray) -> str:
    """Hex digest of an array's little-endian bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


class _Recorder:
    """The adapted PyTorch model and what it generates with."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, tokenizer: Any, generation: dict[str, Any]):
        self.family = checkpoint.family
        self.model = model
        self.language_model: Any = checkpoint.family.language_model(model)
        self.tokenizer = tokenizer
        self.generation = generation
        self.eos = eos_token_ids(tokenizer, self.language_model.config)

    @torch.inference_mode()
    def image(self, path: Path, pixels: np.ndarray) -> GoldenImage:
        features = self.family.encode(self.model, torch.from_numpy(pixels))["image_features"]
        output = self.language_model.generate(
            inputs_embeds=features,
            attention_mask=torch.ones(features.shape[:2], dtype=torch.int64),
            do_sample=False,
            num_beams=1,
            eos_token_id=self.eos,
            pad_token_id=self.eos[0],
            return_dict_in_generate=True,
            output_scores=True,
            **self.generation,
        )
        token_ids = output.sequences[0].tolist()
        best = [torch.topk(score[0], 2).values for score in output.scores]
        return GoldenImage(
            file=path.name,
            sha256=sha256(path),
            pixel_values_sha256=array_sha256(pixels),
            token_ids=token_ids,
            caption=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            margins=[round(float(first - second), 4) for first, second in best],
        )

    def cases(self, pixels: np.ndarray, prompts: Sequence[str]) -> tuple[list[GoldenCase], dict[str, np.ndarray]]:
        cases: list[GoldenCase] = []
        tensors: dict[str, np.ndarray] = {}
        prompt_ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts] or [[]]
        for index, (batch, ids) in enumerate([(1, []), *((2, ids) for ids in prompt_ids)]):
            name = f"case{index}"
            case, values = self._case(name, pixels[:batch], [ids] * batch)
            cases.append(case)
            tensors |= {f"{name}/{key}": value.contiguous().numpy() for key, value in values.items()}
        return cases, tensors

    @torch.inference_mode()
    def _case(self, name: str, pixels: np.ndarray, prompt_ids: list[list[int]]) -> tuple[GoldenCase, dict[str, Any]]:
        values = {"pixel_values": torch.from_numpy(pixels)}
        values |= self.family.encode(self.model, values["pixel_values"])
        prompt = self.language_model.get_input_embeddings()(torch.tensor(prompt_ids, dtype=torch.int64))
        embeds = torch.cat([values["image_features"], prompt], dim=1)
        cache: Any = DynamicCache()  # the model's own would forget what is outside a layer's window
        output = self.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        values["prefill.logits"] = output.logits[:, -1:]
        steps = []
        for step in range(DECODE_STEPS):
            tokens = output.logits[:, -1:].argmax(-1)
            steps.append(tokens[:, 0].tolist())
            output = self.language_model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
            values[f"step{step}.logits"] = output.logits
        for index, layer in enumerate(cache.layers):
            values |= {f"cache.{index}.key": layer.keys, f"cache.{index}.value": layer.values}
        return GoldenCase(name, len(pixels), prompt_ids, steps), values


def eos_token_ids(tokenizer: Any, text_config: Any) -> list[int]:
    """The ids that end a caption: the text config's, else the tokenizer's.

    Raises:
        InputError: neither names one, so nothing would ever stop.
    """
    configured = text_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    known = [token for token in ids if token is not None and token < text_config.vocab_size]
    if not known:
        raise InputError("tokenizer_config.json: eos_token: none is set here nor in text_config, so nothing would stop")
    return known
