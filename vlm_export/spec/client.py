"""What a client is: the config files that make it load the graphs. How it feeds them is in `runtime/drivers.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ChatTemplate = str | list[dict[str, str]]  # one, or several by name


@dataclass(frozen=True)
class RepoFacts:
    """What the config files of a repo are made of.

    Attributes:
        config: the model's, as the checkpoint has it.
        text_config: of the language model inside it, complete, with what ends a text.
        generation: rules beside those of ids.
        stored_generation: the checkpoint's `generation_config.json`, or nothing.
        processor: the checkpoint's `processor_config.json` without what belongs in `preprocessor_config.json`.
        image_processor: what belongs there, flat, under the recipe's settings.
        chat_template: the recipe's or the checkpoint's, if there is one.
        first_unused_token_id: the id after the tokenizer's last.
        token: the text of a token, by its id.
        search: how the recipe searches with beams, or nothing.
    """

    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    generation: Mapping[str, Any]
    stored_generation: Mapping[str, Any]
    processor: Mapping[str, Any]
    image_processor: Mapping[str, Any]
    chat_template: ChatTemplate | None
    eos_token_ids: Sequence[int]
    pad_token_id: int
    first_unused_token_id: int
    token: Callable[[int], str] = str
    search: Mapping[str, Any] = field(default_factory=dict)


class Client(ABC):
    """What loads a repo: a pipeline, a class, or hand-written code.

    Attributes:
        name: how the model card calls it.
        task: the model card's `pipeline_tag`.
        node: the way in which `node/caption.mjs` runs it, or None where transformers.js cannot.
        feeds_one_picture: whether it runs the vision graph for one picture at a time, each of a size of its own.
        own_token: a token that the tokenizer lacks and the repo's gets, with the id `RepoFacts.first_unused_token_id`.
        chat_template: the template of a tokenizer that has none.
        question: what the model card asks about a picture; a captioner is asked nothing.
        graphs: what each graph takes and gives, a line each, where no library loads them.
        padding_side: of the tokenizer, for several prompts at once.
        surrounds_prompts: whether it leaves the tokens that begin and end a prompt to the tokenizer.
        begins_prompts: whether its processor writes the token that begins a prompt, which the tokenizer must not.
        template_file: whether it reads the chat template from a file of its own.
        tokenizer_tokens: keys of tokenizer_config.json with tokens that its processor writes.
    """

    name: str
    task: str = "image-text-to-text"
    node: Literal["captioner", "chat", "tasks", "single"] | None = None
    feeds_one_picture: bool = False
    own_token: str | None = None
    chat_template: str | None = None
    question: str = ""
    graphs: str = ""
    padding_side: Literal["left", "right"] = "left"
    surrounds_prompts: bool = False
    begins_prompts: bool = False
    template_file: bool = False
    tokenizer_tokens: Sequence[str] = ()

    @abstractmethod
    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The JSON files that make the client load the graphs, by file name.

        `preprocessor_config.json` is among them only where the client cannot act on the checkpoint's own.
        """

    def javascript(self, repo_id: str, photo: str) -> str:
        """A module's lines that leave in `caption` what the model says of a picture, a path or an address.

        Nothing where transformers.js does not load the graphs.
        """
        return ""

    def template(self, facts: RepoFacts) -> ChatTemplate | None:
        """The repo's chat template: another than the checkpoint's where the client's processor writes other tokens."""
        return facts.chat_template or self.chat_template

    def prompt(self, text: str) -> str:
        """A golden's text as `node/caption.mjs` takes it."""
        return text


def generation_config(facts: RepoFacts, **more: Any) -> dict[str, Any]:
    """`generation_config.json`: greedy, since transformers.js ignores `num_beams`, and with the ids that stop it."""
    eos = list(facts.eos_token_ids)
    return {
        **facts.generation,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": facts.pad_token_id,
        **more,
    }
