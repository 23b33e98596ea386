"""OpenAI's chat completions as data: what a request may hold, what is asked of a model, and the shapes of answers.

A parameter that is unknown or not supported is refused by name. Only those that say who is asking are ignored.
"""

from __future__ import annotations

import base64
import io
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic_core
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from vlm_export.errors import InputError, one_line, shown
from vlm_export.runtime import Answer, Model, Options
from vlm_export.runtime.images import as_rgb
from vlm_export.runtime.model import ModelFailed

MAX_PIXELS = 40_000_000  # of all images of a request together, before they are decoded
MAX_IMAGES = 16
MAX_CHARACTERS = 100_000  # of all texts of a request together
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
# Parameters of OpenAI's that are not done here, each with the value that asks for nothing.
_NEUTRAL_VALUES: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "service_tier": "auto",
    "store": False,
}
# What the runtime calls some of them.
_OPENAI_NAMES = {"num_return_sequences": "n", "max_new_tokens": "max_tokens"}
_WHO_ASKS = ("user", "safety_identifier", "prompt_cache_key", "metadata")


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and the message, parameter and code that the client is told."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response: OpenAI's `error` object, whose `type` follows from the status."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Strict(BaseModel):
    """Refuses unknown keys and values of another type. A null is read as an absent key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class ImageUrl(_Strict):
    """The address of an image, a `data:` URL. `detail`, how closely OpenAI's models look at it, is "auto" or absent."""

    url: str
    detail: Literal["auto"] = "auto"


class Part(_Strict):
    """One part of a message's content: a text, or an image by its address."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> Part:
        if (self.type == "text") != (self.text is not None) or (self.type == "image_url") != bool(self.image_url):
            raise ValueError(f"a part of type {self.type!r} holds {self.type!r} and nothing else")
        return self


class ChatMessage(_Strict):
    """One message. A `content` that is a plain string is read as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Strict):
    """What a streamed answer holds beside its text. `include_usage` adds a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Strict):
    """The body of a request. From `min_new_tokens` on, its parameters are transformers', beyond OpenAI's."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = []
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=16)] | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {
            key: value for key, value in values.items() if key not in _NEUTRAL_VALUES or value != _NEUTRAL_VALUES[key]
        }
        kept = {key: value for key, value in kept.items() if key not in _WHO_ASKS}
        return kept | ({"stop": [kept["stop"]]} if isinstance(kept.get("stop"), str) else {})

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one")
        if self.stream and self.n > 1:
            raise ValueError("n: several answers cannot be streamed; ask for one, or without stream")
        return self

    def options(self) -> Options:
        """The request's parameters as the runtime's options.

        A temperature above 0, or a top_p below 1, asks for sampling; without either the repo decides.
        """
        samples = None if self.top_p in (None, 1) else True
        samples = samples if self.temperature is None else self.temperature > 0
        return Options(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            min_new_tokens=self.min_new_tokens,
            num_beams=self.num_beams,
            num_return_sequences=self.n,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            do_sample=samples,
            temperature=self.temperature if samples else None,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            stop=tuple(self.stop),
        )


def parse(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON, or asks for what is not known or not done here.
    """
    try:
        return ChatRequest.model_validate(pydantic_core.from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise _refusal(error) from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    wrong = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(step) for step in wrong["loc"]) or None
    if wrong["type"] == "extra_forbidden":
        return ApiError(
            400, one_line(f"{param}: not supported here; leave it out"), param=param, code="unsupported_parameter"
        )
    message = wrong["msg"].removeprefix("Value error, ")
    return ApiError(400, one_line(f"{param}: {message}" if param else message), param=param, code="invalid_value")


def refused(error: InputError) -> ApiError:
    """What the client is told of an error of the runtime: parameters have OpenAI's names in it.

    The status is 400; it is 500 for a ModelFailed, for which the request is not to blame.
    """
    message = one_line(str(error))
    if isinstance(error, ModelFailed):
        return ApiError(500, "the model failed on this request; the server's log says how")
    for own, name in _OPENAI_NAMES.items():
        message = message.replace(own, name)
    param = message.partition(": ")[0]
    return ApiError(
        400, message, param=param if param in ChatRequest.model_fields else "messages", code="invalid_value"
    )


@dataclass(frozen=True)
class Question:
    """What a request asks of a model."""

    images: list[Image.Image]
    prompt: list[dict[str, Any]] | None
    options: Options


def question(request: ChatRequest, model: Model) -> Question:
    """The images of a request, decoded, and its texts as the model takes them.

    Raises:
        ApiError: it is for another model, or this one does not take such messages.
    """
    if request.model != model.name:
        message = f"no model {shown(request.model)}: this server has {model.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    located = [
        (f"messages.{index}.content.{place}", message, part)
        for index, message in enumerate(request.messages)
        for place, part in enumerate(message.content)
    ]
    texts = [part.text for *_, part in located if part.text is not None]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise ApiError(400, f"messages: more than {MAX_CHARACTERS:,} characters of text", param="messages")
    pictures = [(where, message, part.image_url.url) for where, message, part in located if part.image_url]
    if len(pictures) > MAX_IMAGES:
        raise ApiError(400, f"messages: {len(pictures)} images, but at most {MAX_IMAGES}", param="messages")
    for where, sender, _ in pictures:
        if sender.role != "user":
            raise ApiError(400, f"{where}: only messages of the user hold images", param=where)
    if not model.takes_prompt:
        _check_captions(model, len(pictures), texts)
    images = _decode([(where, url) for where, _, url in pictures])
    return Question(images, _conversation(request) if model.takes_prompt else None, request.options())


def _check_captions(model: Model, images: int, texts: Sequence[str]) -> None:
    if any(text.strip() for text in texts):
        message = f"{model.name} captions an image and takes no text: send the image alone"
        raise ApiError(400, message, param="messages", code="text_not_supported")
    if images == 0:
        raise ApiError(400, f"{model.name} captions an image: send one", param="messages", code="missing_image")
    if images > 1:
        message = f"{model.name} captions one image at a time: send {images} requests"
        raise ApiError(400, message, param="messages", code="too_many_images")


def _conversation(request: ChatRequest) -> list[dict[str, Any]]:
    """The messages as transformers' chat templates take them."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                {"type": "image"} if part.image_url else {"type": "text", "text": part.text} for part in message.content
            ],
        }
        for message in request.messages
    ]


def _decode(located: Sequence[tuple[str, str]]) -> list[Image.Image]:
    """The pictures of `data:` addresses, each with where it stands in the request."""
    images, pixels = [], 0
    for where, url in located:
        param = f"{where}.image_url.url"
        data = _image_bytes(url, param)
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                pixels += image.width * image.height
                if pixels > MAX_PIXELS:
                    raise _too_many_pixels(param)
                images.append(as_rgb(image))
        except ApiError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_many_pixels(param) from error
        except Exception as error:  # decoders raise what comes: OSError, SyntaxError, struct.error, IndexError, …
            message = f"{param}: not a readable PNG, JPEG, WebP or GIF image"
            raise ApiError(400, message, param=param, code="invalid_image") from error
    return images


def _too_many_pixels(param: str) -> ApiError:
    message = f"{param}: the images have more than {MAX_PIXELS:,} pixels together: make them smaller"
    return ApiError(400, message, param=param, code="image_too_large")


def _image_bytes(url: str, param: str) -> bytes:
    """Raises ApiError for any address but `data:`: who can make a server fetch sees what it can reach."""
    scheme = url[:100].partition(":")[0].lower()
    if scheme in ("http", "https"):
        message = f"{param}: this server does not fetch {scheme} addresses: send the image itself, as a data: URL"
        raise ApiError(400, message, param=param, code="image_url_not_fetched")
    head = _DATA_URL.match(url)
    if head is None:
        message = f"{param}: send data:image/png;base64,… (or jpeg, webp, gif); other addresses and paths are not read"
        raise ApiError(400, message, param=param, code="invalid_image_url")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:  # also of what is not ASCII
        raise ApiError(400, f"{param}: not base64: {error}", param=param, code="invalid_base64") from error


@dataclass(frozen=True)
class Completion:
    """The shapes of one answer, whole and in chunks, under one id."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed: a `chat.completion` with a choice for each alternative."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate((answer, *answer.alternatives))
        ]
        return self._object("chat.completion", choices) | {"usage": usage(answer)}

    def chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk`: what came since the last one and, in the last with text, why the answer ended."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The chunk that ends a stream whose client asked for the token counts: it has no choices."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(answer)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage(answer: Answer) -> dict[str, int]:
    """Tokens of the prompt, those of images included, and of all answers to it."""
    completion = sum(len(one.token_ids) for one in (answer, *answer.alternatives))
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": answer.prompt_tokens + completion,
    }
