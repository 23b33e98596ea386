"""Tokenizer files and image processor settings: what a checkpoint has, and what transformers.js reads.

transformers.js wants one flat `preprocessor_config.json`, the chat template inside `tokenizer_config.json`, and a
tokenizer class that it knows.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from vlm_export import patches
from vlm_export.atomic import scratch_folder
from vlm_export.errors import InputError, blamed_on, shown
from vlm_export.forms.reading import json_of, needed_json_of, template_of
from vlm_export.own_files import check_files, own_file
from vlm_export.runtime import templates
from vlm_export.runtime.images import open_image
from vlm_export.runtime.tasks import Tasks
from vlm_export.spec.client import ChatTemplate
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
_TEMPLATE = "chat_template.jinja"
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
_ALWAYS_KNOWN = {*_SPELT_OUT, "image_processor_type", "do_pad", "pad_size", "max_image_size"}
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
    template_of(folder, _TEMPLATE)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        json_of(folder, name)
    if own_file(folder, _TOKENIZER):
        with blamed_on(lambda: f"{_to_blame(folder)}: not a tokenizer"):
            return PreTrainedTokenizerFast.from_pretrained(folder)
    check_files(folder, _VOCABULARIES)
    remedy = f"no {_TOKENIZER}; save the tokenizer with a fast tokenizer class"
    with blamed_on(f"{folder}: {remedy}"):
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(made, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: {remedy}")
    return made


def _to_blame(folder: Path) -> Path:
    """Which of a tokenizer's files transformers could not read."""
    try:
        Tokenizer.from_file(str(folder / _TOKENIZER))
    except Exception:  # the library raises nothing more particular
        return folder / _TOKENIZER
    return folder / "tokenizer_config.json"


def image_processor_settings(
    checkpoint: Path, default: Mapping[str, Any], override: Mapping[str, Any], where: str = "image_processor"
) -> dict[str, Any]:
    """Flat `preprocessor_config.json` settings: the checkpoint's own or `default`, under the recipe's `override`.

    `where` is what messages call the override.

    Raises:
        InputError: there are none, they name no image processor, or the override says what that does not know.
    """
    stored = json_of(checkpoint, _PREPROCESSOR)
    if stored is None and (nested := json_of(checkpoint, _PROCESSOR)):  # transformers 5 nests it there
        stored = nested.get("image_processor")
    settings = dict(default) if stored is None else stored
    if not settings:
        raise InputError(f"{checkpoint}: no {_PREPROCESSOR}; save the processor beside the model")
    if "size" in override:  # which older names would win over
        settings = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
    of_checkpoint = f"{checkpoint / _PREPROCESSOR}: image processor"
    made = _spelt_out(settings, of_checkpoint) if override.keys() - settings.keys() else settings
    for key in override.keys() - settings.keys() - made.keys() - _ALWAYS_KNOWN:
        close = difflib.get_close_matches(key, {*made, *_ALWAYS_KNOWN}, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{where}: {key}: unknown to a {made.get('image_processor_type')}{hint}")
    return _spelt_out(settings | dict(override), where if override else of_checkpoint)


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


def _spelt_out(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings with everything in them that Python's class would add, in the words of today.

    Older ones say one number where sides have names, which transformers.js reads as another side than Python does, and
    are silent about what their class does without being told, which transformers.js does not know.
    """
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    with blamed_on(f"{where}: image_processor_type {shown(name)}"):
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
    settings = json_of(checkpoint, _PROCESSOR) or {}
    return {key: value for key, value in settings.items() if not isinstance(value, dict)}


def stored_generation(checkpoint: Path) -> dict[str, Any]:
    """`generation_config.json`, or nothing where there is none."""
    return json_of(checkpoint, _GENERATION) or {}


def chat_template(checkpoint: Path) -> str | list[dict[str, str]] | None:
    """A checkpoint's chat template, from any of the three places where transformers has kept it."""
    return _located_template(checkpoint)[1]


def _located_template(folder: Path) -> tuple[str, str | list[dict[str, str]] | None]:
    """The file that a chat template is in, or would be, and the template."""
    if (text := template_of(folder, _TEMPLATE)) is not None:
        return _TEMPLATE, text
    name = "tokenizer_config.json"
    for name in ("chat_template.json", "tokenizer_config.json"):
        settings = json_of(folder, name)
        if settings and "chat_template" in settings:
            return name, settings["chat_template"]
    return name, None


_TURNS = ("user", "assistant", "user")  # some templates write the token before each of several, some take only one
Templates = TypeVar("Templates", bound=ChatTemplate | dict[str, str] | None)


def begun_once(template: Templates, tokenizer: PreTrainedTokenizerFast) -> Templates:
    """A chat template, or several by name, that leaves the token at the beginning to a tokenizer that adds it.

    Where a template writes it too, transformers' `apply_chat_template` tokenizes without special tokens; processors in
    transformers.js do not, and the model would be fed it twice.
    """
    given: Any = template
    begin = tokenizer.bos_token
    if given is None or begin is None or not _adds(tokenizer, begin):
        return given
    if isinstance(given, dict):
        return {name: begun_once(each, tokenizer) for name, each in given.items()}  # type: ignore[return-value]
    if isinstance(given, list):
        return [{**each, "template": begun_once(each["template"], tokenizer)} for each in given]  # type: ignore[return-value]
    written = _rendered(tokenizer, given)
    if written is None or not written.startswith(begin):
        return given
    plain: Any = "{%- set bos_token = '' %}" + given
    if _rendered(tokenizer, plain) == written.removeprefix(begin):
        return plain
    begins, rest = f"written[:{len(begin)}] == bos_token", f"written[{len(begin)}:]"
    whole: Any = f"{{%- set written %}}{given}{{% endset %}}{{{{ {rest} if {begins} else written }}}}"
    return whole


def _adds(tokenizer: PreTrainedTokenizerFast, begin: str) -> bool:
    """Whether a tokenizer puts the token in front of a text."""
    return tokenizer.convert_tokens_to_ids(begin) in tokenizer("")["input_ids"][:1]


def _rendered(tokenizer: PreTrainedTokenizerFast, template: str) -> str | None:
    """What a template makes of a conversation; None where it takes neither parts nor plain texts."""
    for roles, content in product((_TURNS, _TURNS[:1]), ([{"type": "text", "text": "a"}], "a")):
        conversation = [{"role": role, "content": content} for role in roles]
        with suppress(InputError):
            return templates.render(template, conversation, _special_tokens(tokenizer), "chat template")
    return None


class PixelsAndPrompt:
    """Feeds an image processor's pixels, and the ids of a text that needs no place for the image (`Preprocessor`)."""

    keeps_tokens: bool = False

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
    pictures = [open_image(path) for path in images]
    with blamed_on(f"{images[0]}: cannot be prepared as {_PREPROCESSOR} says"):
        processor = _load_image_processor(settings)
        return processor(images=pictures, return_tensors="np")["pixel_values"]


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    """The texts of a tokenizer's special tokens, by transformers' names for them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _is_of_the_library(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in CONFIG_MAPPING


def _load_image_processor(settings: Mapping[str, Any]) -> Any:
    with scratch_folder() as folder:
        Path(folder, _PREPROCESSOR).write_text(json.dumps(dict(settings)), encoding="utf-8")
        with patches.image_processor_without_torchvision(settings.get("image_processor_type")):
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


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
    files that `AutoProcessor` reads: `config.json`, or `config` in its place, decides which class the tokenizer is of,
    and so how it splits a text. `input_dtypes` are the arrays that the client feeds, and their types; `beside` those
    that transformers' class wants beside them, `call` what its processor is told with each image and text.
    """

    keeps_tokens: bool = False

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        input_dtypes: Mapping[str, type[np.generic]],
        *,
        processor_class: str,
        config: Mapping[str, Any] | None = None,
        beside: Mapping[str, type[np.generic]] | None = None,
        call: Mapping[str, Any] | None = None,
        **processor: Any,
    ):
        self.input_dtypes = input_dtypes
        self.call = call or {}
        self.beside = beside or {}
        named = {"processor_class": processor_class}
        files = {_PREPROCESSOR: {**settings, **named}, _PROCESSOR: {**processor_settings(folder), **processor, **named}}
        with scratch_folder() as scratch:
            copy_tokenizer(folder, Path(scratch))
            _copy(folder, Path(scratch), _SPECIAL_TOKENS)
            config = config or needed_json_of(folder, _CONFIG)
            if _is_of_the_library(config):
                files[_CONFIG] = {key: value for key, value in config.items() if key != "auto_map"}
            for name, values in files.items():
                Path(scratch, name).write_text(json.dumps(values), encoding="utf-8")
            name, template = _located_template(folder)
            self.template_file = folder / name
            if template is not None:
                text = json.dumps({"chat_template": template})
                Path(scratch, "chat_template.json").write_text(text, encoding="utf-8")
            kind = settings.get("image_processor_type")
            with blamed_on(f"{folder}: processor"), patches.image_processor_without_torchvision(kind):
                self.processor = _processor_class(processor_class).from_pretrained(
                    scratch, backend="pil", trust_remote_code=False
                )
        self.processor.chat_template = begun_once(self.processor.chat_template, self.processor.tokenizer)

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
            text = self.rendered(prompt, f"golden.prompts: {self.template_file}: chat template")
        if str(text).count(self.processor.image_token) != 1:
            raise InputError(f"golden.prompts: {shown(text)} needs the image token {self.processor.image_token!r} once")
        return str(text)

    def rendered(self, messages: Sequence[Mapping[str, Any]], where: str) -> str:
        """A conversation as the processor's chat template writes it.

        It is rendered within limits first, which transformers has none of.

        Raises:
            InputError: there is no template, or it refuses the conversation; `where` it stands is told.
        """
        with blamed_on(where):
            stored = self.processor.chat_template
            text = stored.get("default") if isinstance(stored, dict) else stored
            if isinstance(text, str):
                templates.render(text, messages, _special_tokens(self.processor.tokenizer), where)
            return self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """Those of the processor's arrays for an image and a text that the client feeds, `[1, …]` each."""
        picture = open_image(image)
        with blamed_on(f"{image}: cannot be prepared as processor_config.json and {_PREPROCESSOR} say"):
            made = self.processor(images=[picture], text=[text], return_tensors="np", **self.call)
        return {name: np.asarray(made[name]).astype(dtype) for name, dtype in self.input_dtypes.items()}


class TaskProcessor(ChatProcessor):
    """Feeds what the model's own processor makes of a picture and a task prompt, but for the image tokens in front.

    `tasks` are those that it knows, `start` is the id that every answer begins with.
    """

    keeps_tokens = True

    def __init__(self, *arguments: Any, tasks: Tasks, start: int, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.tasks, self.start = tasks, start

    def texts(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """The recipe's prompts, each with its task's input right behind the task.

        Raises:
            InputError: there is none, or one is a conversation, or a task that takes no input has one.
        """
        if not prompts:
            raise InputError(f"golden.prompts: it needs one: a task, such as {next(iter(self.tasks.alone))}")
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise InputError("golden.prompts: a task prompt is a text; there is no use for a conversation")
        try:
            return tuple(self.tasks.plain(str(prompt)) for prompt in prompts)
        except InputError as error:
            raise InputError(f"golden.prompts: {error}") from error

    def model_inputs(self, image: Path, text: str) -> dict[str, np.ndarray]:
        """`pixel_values` `[1, 3, H, W] float32`, `input_ids` `[1, tokens] int64` of the task's sentence, and
        `decoder_input_ids` `[1, 1] int64`, the start token.
        """
        return self.of_picture(open_image(image), text)

    def of_picture(self, image: Image.Image, text: str) -> dict[str, np.ndarray]:
        """The same of a picture that is open."""
        made = self.processor(images=[image], text=[text], return_tensors="np")
        arrays = {name: np.asarray(made[name]).astype(dtype) for name, dtype in self.input_dtypes.items()}
        ids = arrays["input_ids"]
        arrays["input_ids"] = ids[:, int((ids == self.processor.image_token_id).sum()) :]
        return {**arrays, "decoder_input_ids": np.array([[self.start]], dtype=np.int64)}
