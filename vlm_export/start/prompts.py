"""What a chat model is asked in its golden outputs: a question as its own chat template writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.contract import PROCESSORS, TASK, LayoutName
from vlm_export.errors import InputError
from vlm_export.runtime.text import Text
from vlm_export.start.named import Named

QUESTION = "What is in this image?"
_TOKENIZER = "tokenizer.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_IMAGE_TOKEN = "<image>"
_IMAGE_IDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Prompt:
    """A recipe's prompt.

    Attributes:
        value: a conversation, or a text where there is no template that takes one.
        rendered: what the template makes of the conversation; empty where there is none.
        problem: why it is a text, for the user; empty where it is none.
    """

    value: str | list[dict[str, Any]]
    rendered: str = ""
    problem: str = ""


def prompt_for(sources: Sequence[Named], config: Mapping[str, Any], layout: LayoutName, question: str) -> Prompt | None:
    """What to ask a model of the folder's template, the first of `sources` that has one; None for a captioner.

    A model of tasks is asked for a caption, unless `question` is another than the usual one.
    """
    if layout == "tasks":
        return Prompt(TASK if question == QUESTION else question)
    if layout != "chat" or config.get("model_type") == "prefix_conditioning_vlm":
        return None
    texts = [Text(source.path) for source in sources if (source.path / _TOKENIZER).is_file()]
    text = next((each for each in texts if each.template is not None), None)
    token = _placeholder(sources, texts) or _image_token(texts, config)
    plain = f"{token}\n{question}"
    if text is None:
        return Prompt(plain, problem="no chat template is there: write the prompt as the model was trained on it")
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    try:
        rendered = text.render(conversation)
    except InputError as error:
        return Prompt(plain, problem=f"the chat template does not take a picture and a text ({error})")
    if token not in rendered or question not in rendered:
        return Prompt(plain, problem=f"the chat template leaves out {token if token not in rendered else 'the text'}")
    return Prompt(conversation, rendered)


def _placeholder(sources: Sequence[Named], texts: Sequence[Text]) -> str:
    """What a processor of `contract.PROCESSORS` takes for an image in a text; nothing where that is the image token."""
    classes = (source.json(file).get("processor_class") for source in sources for file in _PROCESSORS)
    written = PROCESSORS.get(str(next(filter(None, classes), "")))
    if written is None or not texts:
        return ""
    tokens = {**texts[0].settings, **texts[0].special_tokens}
    return written.place.format_map({name: tokens.get(name, "") for name in re.findall(r"{(\w+)}", written.place)})


def _image_token(texts: Sequence[Text], config: Mapping[str, Any]) -> str:
    index = next((config[name] for name in _IMAGE_IDS if isinstance(config.get(name), int)), None)
    return texts[0].token(index) if texts and index is not None else _IMAGE_TOKEN
