"""Tokenizer files and image processor settings: what a checkpoint has, and what transformers.js reads.

transformers.js wants one flat `preprocessor_config.json`, the chat template inside `tokenizer_config.json`, and a
tokenizer class that it knows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from jinja2.exceptions import TemplateError
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from vlm_export.errors import InputError
from vlm_export.files import read_json
from vlm_export.own_files import check_files, own_file
from vlm_export.runtime.images import open_image
from vlm_export.spec.family import Prompt

_TOKENIZER = "tokenizer.json"
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
_GENERATION = "generation_config.json"
# What transformers reads by itself where it is given a folder: vocabularies have many names.
_LOADED_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "chat_template.jinja",
)
_TEMPLATES = "additional_chat_templates/*.jinja"
_VOCABULARIES = ("*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.vocab", "*.tiktoken")
_CONFIG = "config.json"
_SPELT_OUT = {
    "image_processor_type",
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
}
_SPECIAL_TOKENS = ("special_tokens_map.json", "added_tokens.json")
_PROCESSOR_FILES = (_PREPROCESSOR, _PROCESSOR, "chat_template.json", _GENERATION)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files; transformers.js needs a `tokenizer.json`, which older checkpoints lack.

    Raises:
        InputError: there is none, and none can be made; or a link leads out of the folder.
    """
    if not own_file(source, _TOKENIZER):
        load_tokenizer(source).save_pretrained(target)
        return
    _copy(source, target, _TOKENIZER_FILES)


def copy_processor(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and those of the image processor and of generation that there are.

    Raises:
        InputError: as of `copy_tokenizer`.
    """
    copy_tokenizer(source, target)
    _copy(source, target, _PROCESSOR_FILES)


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if path := own_file(source, name):
            shutil.copyfile(path, target / name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The Python tokenizer of a checkpoint or exported repo, from its `tokenizer.json` or what it can be made of.

    Raises:
        InputError: there is neither, or a link leads out of the folder.
    """
    check_files(folder, (*_LOADED_FILES, _TEMPLATES))
    if own_file(folder, _TOKENIZER):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    check_files(folder, _VOCABULARIES)
    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError, TypeError) as error:
        made, reason = None, f" ({' '.join(str(error).split())[:200]})"
    else:
        reason = ""
    if not isinstance(made, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: no {_TOKENIZER}; save the tokenizer with a fast tokenizer class{reason}")
    return made


def image_processor_settings(
    checkpoint: Path, default: Mapping[str, Any], override: Mapping[str, Any]
) -> dict[str, Any]:
    """Flat `preprocessor_config.json` settings: the checkpoint's own or `default`, under the recipe's `override`.

    Raises:
        InputError: there are none.
    """
    settings = dict(default)
    if path := own_file(checkpoint, _PREPROCESSOR):
        settings = read_json(path)
    elif path := own_file(checkpoint, _PROCESSOR):  # transformers 5 nests it there
        settings = dict(read_json(path).get("image_processor", settings))
    if not settings:
        raise InputError(f"{checkpoint}: no {_PREPROCESSOR}; save the processor beside the model")
    if "size" in override:  # which older names would win over
        settings = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
    return _spelt_out(settings | dict(override))


def check_image_size(settings: Mapping[str, Any], image_size: int) -> None:
    """Raises InputError where settings make images of another size than the square that a tower's graph takes.

    transformers would stretch a position table over them at every run (DINOv2, whose published configs say 518, and
    whose processors crop to 224), or refuse them.
    """
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, Mapping) and size.keys() >= {"height", "width"}:
        found = (size["height"], size["width"])
        if found != (image_size, image_size):
            raise InputError(
                f"preprocessor_config.json: images become {found[0]}×{found[1]} pixels, and the tower takes "
                f"{image_size}×{image_size}: set `image_processor`"
            )


def _spelt_out(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with everything in them that Python's class would add, in the words of today.

    Older ones say one number where sides have names, which transformers.js reads as another side than Python does, and
    are silent about what their class does without being told, which transformers.js does not know.
    """
    made = _load_image_processor(settings).to_dict()
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}
    if "feature_extractor_type" in settings:  # of transformers 4.25 and before; the class of today has other names
        return _for_any_backend(values)
    return _for_any_backend(settings | {name: value for name, value in values.items() if name in _SPELT_OUT})


def _for_any_backend(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a class name that is of no backend: without `Fast` or `Pil` at its end."""
    name = settings["image_processor_type"]
    return settings | {"image_processor_type": name.removesuffix("Fast").removesuffix("Pil")}


def processor_settings(checkpoint: Path) -> dict[str, Any]:
    """`processor_config.json` without the processors inside it, or nothing where there is none."""
    path = own_file(checkpoint, _PROCESSOR)
    settings = read_json(path) if path else {}
    return {key: value for key, value in settings.items() if not isinstance(value, dict)}


def stored_generation(checkpoint: Path) -> dict[str, Any]:
    """`generation_config.json`, or nothing where there is none."""
    path = own_file(checkpoint, _GENERATION)
    return read_json(path) if path else {}


def chat_template(checkpoint: Path) -> str | list[dict[str, str]] | None:
    """A checkpoint's chat template, from any of the three places where transformers has kept it."""
    if path := own_file(checkpoint, "chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = own_file(checkpoint, name)
        if path and "chat_template" in (settings := read_json(path)):
            return settings["chat_template"]
    return None


class PixelsAndPrompt:
    """Feeds an image processor's pixels, and the ids of a text that needs no place for the image (`Preprocessor`)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.settings = settings
        self.tokenizer = load_tokenizer(folder)

    def texts(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """An empty text, which every image is run with, and the recipe's prompts.

        Raises:
            InputError: a prompt is a conversation.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InputError("golden.prompts: a captioner continues a text; it has no use for a conversation")
        return ("", *(str(prompt) for prompt in prompts))

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """`pixel_values` `[1, 3, H, W] float32`, and `input_ids` `[1, tokens] int64` without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"pixel_values": pixel_values([image], self.settings), "input_ids": np.array([ids], dtype=np.int64)}


def pixel_values(images: Sequence[Path], settings: Mapping[str, Any]) -> np.ndarray:
    """Preprocess image files with transformers' PIL processor: `[images, 3, H, W] float32`.

    Raises:
        InputError: a file is missing or no image, or the settings name no image processor.
    """
    processor = _load_image_processor(settings)
    return processor(images=[open_image(path) for path in images], return_tensors="np")["pixel_values"]


def _is_of_the_library(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in CONFIG_MAPPING


def _load_image_processor(settings: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="vlm-export-") as folder:
        Path(folder, _PREPROCESSOR).write_text(json.dumps(dict(settings)), encoding="utf-8")
        try:
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except (ValueError, OSError, ImportError) as error:
            raise InputError(f"image processor settings: {' '.join(str(error).split())}") from error


def _processor_class(name: str) -> Any:
    """What loads the processor of a class of transformers: one that takes videos too does so without them.

    Its video processor would want torchvision, for what no client feeds.
    """
    found = getattr(transformers, name)
    attributes = found.get_attributes()
    kept = [each for each in attributes if each != "video_processor"]
    if kept == attributes:
        return AutoProcessor
    return type(name, (found,), {"get_attributes": classmethod(lambda cls: kept)})


class ChatProcessor:
    """Feeds what the model's own processor makes of an image and a text that says where it goes (`Preprocessor`).

    The processor is read from the very files that a repo gets: a flat `preprocessor_config.json`, and
    `processor_config.json` for the rest, under the settings of `processor`. Beside them lie the checkpoint's other
    files that `AutoProcessor` reads: `config.json` decides which class the tokenizer is of, and so how it splits a
    text. `input_dtypes` are the arrays that the client feeds, and their types.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        input_dtypes: Mapping[str, type[np.generic]],
        *,
        processor_class: str,
        **processor: Any,
    ):
        self.input_dtypes = input_dtypes
        named = {"processor_class": processor_class}
        files = {_PREPROCESSOR: {**settings, **named}, _PROCESSOR: {**processor_settings(folder), **processor, **named}}
        with tempfile.TemporaryDirectory(prefix="vlm-export-") as scratch:
            copy_tokenizer(folder, Path(scratch))
            _copy(folder, Path(scratch), _SPECIAL_TOKENS)
            if _is_of_the_library(config := read_json(folder / _CONFIG)):
                files[_CONFIG] = {key: value for key, value in config.items() if key != "auto_map"}
            for name, values in files.items():
                Path(scratch, name).write_text(json.dumps(values), encoding="utf-8")
            if (template := chat_template(folder)) is not None:
                text = json.dumps({"chat_template": template})
                Path(scratch, "chat_template.json").write_text(text, encoding="utf-8")
            try:
                self.processor = _processor_class(processor_class).from_pretrained(
                    scratch, backend="pil", trust_remote_code=False
                )
            except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
                raise InputError(f"{folder}: processor: {' '.join(str(error).split())}") from error

    def texts(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """The recipe's prompts as texts, conversations rendered by the processor's chat template.

        Raises:
            InputError: there is no prompt, the template refuses one, or a text has not exactly one image token.
        """
        if not prompts:
            raise InputError("golden.prompts: a chat model needs one: a conversation, or a text with its image token")
        return tuple(self._text(prompt) for prompt in prompts)

    def _text(self, prompt: Prompt) -> str:
        text = prompt
        if not isinstance(prompt, str):
            try:
                text = self.processor.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            except (ValueError, TypeError, KeyError, TemplateError) as error:
                raise InputError(f"golden.prompts: the chat template: {' '.join(str(error).split())}") from error
        if str(text).count(self.processor.image_token) != 1:
            raise InputError(f"golden.prompts: {text!r} needs the image token {self.processor.image_token!r} once")
        return str(text)

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """Those of the processor's arrays for an image and a text that the client feeds, `[1, …]` each."""
        made = self.processor(images=[open_image(image)], text=[text], return_tensors="np")
        return {name: np.asarray(made[name]).astype(dtype) for name, dtype in self.input_dtypes.items()}
