"""Renders chat templates, which come with a repo, from anyone: in a sandbox, and within limits of steps and of text.

Source: transformers 5.23, `_compile_jinja_template` in `utils/chat_template_utils.py`, for what a template may use.

Jinja's sandbox keeps a template from everything but texts. It does not keep it from making one of 3 GB, or from
counting to 10¹²; so each operation that can make a long text is charged for it, and each line that is run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlm_export.errors import blamed_on

MOST_CHARACTERS = 1_000_000  # of a rendered conversation
_MOST_STEPS = 1_000_000  # lines of the compiled template: a second, as they are counted
_MOST_WORK = 100 * MOST_CHARACTERS  # of all texts on the way together
_LARGEST_NUMBER = 2**63
_LARGEST_COUNT = 10_000  # that a method or filter may be given, such as a width
_WIDTH = re.compile(r"\d{5,}")  # in a format


class _TooMuch(ValueError):
    """A template that does more than any chat template has to."""


def render(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], where: str) -> str:
    """A conversation as a template writes it, up to where the answer begins.

    Raises:
        InputError: it is no template, refuses the conversation, or does not end within the limits; `where` it stands is
            told.
    """
    with blamed_on(where):
        text = _Limits().run(
            template,
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
        )
        text.encode()  # half of a surrogate pair is no character
    return text


class _Limits:
    """What one rendering has used of its limits."""

    def __init__(self) -> None:
        self.steps = 0
        self.work = 0

    def run(self, template: str, **values: Any) -> str:
        """Render a template."""
        compiled = _Environment(self).from_string(template)
        pieces, length = [], 0
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            for piece in compiled.generate(**values):
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise _TooMuch(f"more than {MOST_CHARACTERS:,} characters of text")
                pieces.append(piece)
        finally:
            sys.settrace(before)
        return "".join(pieces)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        """Count the lines of what a template was compiled to; the library's own are no concern."""
        return self._step if frame.f_code.co_filename == "<template>" else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        self.steps += event == "line"
        if self.steps > _MOST_STEPS:
            raise _TooMuch(f"more than {_MOST_STEPS:,} steps")
        return self._step

    def charge(self, size: int) -> None:
        """Raises _TooMuch for a text, or a list, of a size that is too large, or one too many."""
        self.work += size
        if size > MOST_CHARACTERS or self.work > _MOST_WORK:
            raise _TooMuch(f"texts of more than {MOST_CHARACTERS:,} characters")

    def charged(self, value: Any) -> Any:
        """A value, charged."""
        if isinstance(value, str | list | tuple | dict):
            self.charge(len(value))
        return value


class _Generation(Extension):
    """Renders `{% generation %}` as what is in it: the tag marks what an assistant wrote, for training alone."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Code(CodeGenerator):
    """Has `~` done by the environment, which Jinja does itself."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers, with its filters, functions and extensions, within limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Code

    def __init__(self, limits: _Limits):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.limits = limits
        self.filters = {name: self._bounded(each) for name, each in self.filters.items()}
        self.filters["tojson"] = self._bounded(_tojson)
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def joined(self, parts: Iterable[Any]) -> str:
        """What `~` makes."""
        texts = [str(part) for part in parts]
        self.limits.charge(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """What an operator makes of two values.

        Raises:
            _TooMuch: that would be too long, or too large a number.
        """
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    self.limits.charge(len(value) * max(count, 0))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.limits.charge(left.bit_length() * max(right, 0))
        if operator == "%" and isinstance(left, str):
            _check_arguments((left, right))
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.limits.charge(len(left) + len(right))
        return self.limits.charged(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *arguments: Any, **options: Any) -> Any:
        """What a function or a method gives; raises as `call_binop`."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | list | dict):
            self._check_method(function.__name__, owner, arguments)
            _check_arguments((owner if function.__name__ == "format" else "", *arguments, *options.values()))
        return self.limits.charged(super().call(context, function, *arguments, **options))

    def _check_method(self, name: str, owner: Any, arguments: Sequence[Any]) -> None:
        """Charge what grows with the number of places in a text."""
        if name == "replace" and len(arguments) > 1 and isinstance(owner, str):
            self.limits.charge(_replaced_length(owner, str(arguments[0]), str(arguments[1])))
        if name == "join" and arguments:
            self.limits.charge(_joined_length(owner, arguments[0]))

    def _bounded(self, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter within limits, that is passed what Jinja passes the filter itself."""

        def call(*arguments: Any, **options: Any) -> Any:
            _check_arguments((*arguments[1:], *options.values()))
            name, given = made.__name__, [each for each in arguments if not isinstance(each, _Environment | Context)]
            if name == "do_replace" and len(given) > 3:
                self.limits.charge(_replaced_length(str(given[1]), str(given[2]), str(given[3])))
            if name == "sync_do_join" and isinstance(given[-1], str):
                self.limits.charge(_joined_length(given[-1], given[-2] if len(given) > 1 else ()))
            return self.limits.charged(made(*arguments, **options))

        for attribute in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(made, attribute):
                setattr(call, attribute, getattr(made, attribute))
        call.__name__ = made.__name__
        return call


def _check_arguments(arguments: Iterable[Any]) -> None:
    """Raises _TooMuch for widths and counts that no chat template needs."""
    for each in arguments:
        if isinstance(each, int) and abs(each) > _LARGEST_COUNT:
            raise _TooMuch(f"a width or count of {each:,}")
        if isinstance(each, str) and ("%" in each or "{" in each) and _WIDTH.search(each):
            raise _TooMuch("a format with a width of more than 4 digits")


def _replaced_length(text: str, old: str, new: str) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined_length(separator: str, parts: Any) -> int:
    texts = [len(str(part)) for part in parts] if isinstance(parts, list | tuple | dict | str) else []
    return sum(texts) + len(separator) * len(texts)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
