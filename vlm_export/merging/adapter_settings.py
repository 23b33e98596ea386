"""`adapter_config.json`: what can be merged, and what its names of modules mean in today's model.

The names are those of the version of transformers that trained the adapter, as the tensors' names are. PEFT compares
them with the model's names of today; so the settings that it is given say the same in those.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from vlm_export.errors import InputError, blamed_on, shown
from vlm_export.files import read_json
from vlm_export.forms.form import Form, checked
from vlm_export.merging.adapter_kinds import refusal
from vlm_export.merging.expressions import LONGEST_EXPRESSION, check_end
from vlm_export.merging.module_names import Names

SETTINGS = "adapter_config.json"
_UNSET_VALUES: tuple[Any, ...] = (None, False, [], {}, "")
_TRAINERS_KEYS = {"unsloth_fixed", "peft_version", "auto_mapping", "lora_module_name"}  # of no effect on layers
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SUGGESTIONS = 3

_Switch = Annotated[bool | None, Field(description="true or false")]
_Names = Annotated[list[str] | None, Field(description="a list of names")]
_Expression = Annotated[str | list[str] | None, Field(description="a regular expression, or a list of names")]
_Layers = Annotated[int | list[int] | None, Field(description="a layer's index, or a list of them")]
_Tokens = Annotated[
    list[int] | dict[str, list[int]] | None, Field(description="a list of token ids, or one for each embedding's name")
]
_LARGEST_RANK = 100_000
_Rank = Annotated[int, Field(ge=1, le=_LARGEST_RANK)]
_Ranks = Annotated[
    dict[str, _Rank] | None, Field(description=f"ranks up to {_LARGEST_RANK:,}, by expressions of modules' names")
]
_Alphas = Annotated[
    dict[str, FiniteFloat] | None, Field(description="numbers, by regular expressions of modules' names")
]


class _Form(Form):
    """The settings that change what is merged, and of which kind each is: PEFT takes them as they come."""

    r: Annotated[_Rank, Field(description=f"a rank from 1 to {_LARGEST_RANK:,}")] = 8
    lora_alpha: Annotated[FiniteFloat, Field(description="a number")] = 8
    bias: Annotated[Literal["none", "all", "lora_only"], Field(description="none, all or lora_only")] = "none"
    target_modules: _Expression = None
    exclude_modules: _Expression = None
    layers_to_transform: _Layers = None
    layers_pattern: _Expression = None
    rank_pattern: _Ranks = None
    alpha_pattern: _Alphas = None
    modules_to_save: _Names = None
    target_parameters: _Names = None
    trainable_token_indices: _Tokens = None
    fan_in_fan_out: _Switch = False
    use_rslora: _Switch = False
    use_dora: _Switch = False
    lora_bias: _Switch = False

    def expressions(self) -> Iterator[tuple[str, str]]:
        """The settings that are compared as regular expressions, and each such expression."""
        for field in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, field), str):
                yield field, value
        patterns = self.layers_pattern or ()
        yield from (("layers_pattern", each) for each in ([patterns] if isinstance(patterns, str) else patterns))
        for field in _PATTERNS:
            yield from ((field, pattern) for pattern in getattr(self, field) or ())


@dataclass(frozen=True)
class Written:
    """The modules of a model, as an adapter's settings may name them.

    Attributes:
        names: every module below the one that the adapter was put on: today's name → that of its settings.
        adapted: those that the adapter holds LoRA for, by today's name.
    """

    names: Names
    adapted: frozenset[str]

    @property
    def is_today(self) -> bool:
        """Whether the settings name every module as today's model does."""
        return all(name == written for name, written in self.names.items())


def read_settings(source: Path) -> tuple[Any, tuple[str, ...]]:
    """PEFT's own reading of an `adapter_config.json`: a `peft.LoraConfig`; and what a user must know of it.

    Raises:
        InputError: a kind that cannot be merged, or settings that PEFT refuses.
    """
    from peft import LoraConfig

    settings = read_json(source)
    if reason := refusal(settings):
        raise InputError(f"{source}: {reason}")
    _check_form(source, settings)
    with blamed_on(f"{source}: PEFT cannot read it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys, which are named below
        config = LoraConfig.from_pretrained(str(source.parent))
    config.init_lora_weights = False  # how training began; some ways need the weights, which are not there
    unknown = [key for key, value in settings.items() if key not in _known(LoraConfig) and value not in _UNSET_VALUES]
    note = f"{source}: {', '.join(unknown)}: unknown to PEFT {version('peft')}, and not applied: is it newer?"
    return config, (note,) if unknown else ()


def _check_form(source: Path, settings: Mapping[str, Any]) -> None:
    form = checked(settings, _Form, str(source))
    for field, expression in form.expressions():
        if len(expression) > LONGEST_EXPRESSION:
            raise InputError(f"{source}: {field}: {shown(expression)} has more than {LONGEST_EXPRESSION:,} characters")
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{source}: {field}: {shown(expression)} is no regular expression: {error}") from error


def _known(config_class: type) -> set[str]:
    return {*config_class.__dataclass_fields__, *_TRAINERS_KEYS}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Settings:
    """Settings in today's names: a `peft.LoraConfig`, and alpha of each adapted module, read without PEFT."""

    config: Any
    alphas: Mapping[str, float]


def in_todays_names(source: Path, config: Any, candidates: Iterator[Written]) -> Settings:
    """Settings that say to today's PEFT, of today's model, what `config` says in the names that it was written with.

    Those are the names under which it targets every module that the adapter holds LoRA for, and as few others as may
    be, and under which each of its patterns matches one. `candidates` begin with the likeliest.

    Raises:
        InputError: there are no such names.
    """
    found: list[tuple[int, Written]] = []
    first = next(candidates)
    for written in chain([first], candidates):
        check_end(source, _expressions(config), {*written.names.values()})
        targeted = _targeted(config, written)
        leaves_out = not config.target_parameters and written.adapted - targeted
        if leaves_out or _without_match(config, written):
            continue
        found.append((len(targeted - written.adapted), written))
        if found[-1][0] == 0:
            break
    if found:
        written = min(found, key=lambda pair: pair[0])[1]
        return Settings(config if written.is_today else _translated(config, written), _alphas(config, written))
    _check_patterns(source, config, first)
    _check_targets(source, config, first)
    return Settings(config, _alphas(config, first))


def _expressions(config: Any) -> Iterator[tuple[str, str]]:
    """The settings that PEFT, and what follows here, compare as regular expressions."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(value := getattr(config, key), str):
            yield key, value
    for key in _PATTERNS:
        yield from ((key, pattern) for pattern in getattr(config, key) or {})


def _alphas(config: Any, written: Written) -> dict[str, float]:
    return {
        name: _value(config.alpha_pattern, written.names.get(name, name), config.lora_alpha) for name in written.adapted
    }


def _targeted(config: Any, written: Written) -> set[str]:
    """The modules that settings name, by today's name; of all linear ones no more than the adapter has."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return set(written.adapted)
    return {name for name, earlier in written.names.items() if check_target_module_exists(config, earlier)}


def _without_match(config: Any, written: Written) -> list[tuple[str, str]]:
    """The settings and their patterns that no module of the model matches."""
    return [
        (field, pattern)
        for field in _PATTERNS
        for pattern in getattr(config, field) or {}
        if not any(_matches(pattern, earlier) for earlier in written.names.values())
    ]


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's name.

    PEFT compares so: a regular expression for the whole name, or for all that follows one of its dots.
    """
    return bool(re.match(rf"(.*\.)?({pattern})$", name))


def _translated(config: Any, written: Written) -> Any:
    """A copy of the settings in which whole names of today's modules stand for each name and pattern."""
    translated = copy.deepcopy(config)
    if config.target_modules:
        translated.target_modules = _targeted(config, written)
    translated.exclude_modules = translated.layers_to_transform = translated.layers_pattern = None
    for field, usual in zip(_PATTERNS, (config.r, config.lora_alpha), strict=True):
        values = {name: _value(getattr(config, field), written.names[name], usual) for name in written.names}
        setattr(translated, field, {f"^{re.escape(name)}": of for name, of in values.items() if of != usual})
    if config.modules_to_save:
        translated.modules_to_save = [
            name for name, earlier in written.names.items() if earlier.endswith(tuple(config.modules_to_save))
        ]
    if isinstance(config.trainable_token_indices, Mapping):
        translated.trainable_token_indices = {
            name: indices
            for key, indices in config.trainable_token_indices.items()
            for name, earlier in written.names.items()
            if earlier.endswith(key)
        }
    if config.target_parameters:
        translated.target_parameters = [
            f"{name}.{parameter}"
            for module, _, parameter in (key.rpartition(".") for key in config.target_parameters)
            for name, earlier in written.names.items()
            if earlier == module or earlier.endswith(f".{module}")
        ]
    return translated


def _value(pattern: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """The value of the first pattern that matches a module's name, else the usual one."""
    return next((value for key, value in (pattern or {}).items() if _matches(key, name)), usual)


def _check_patterns(source: Path, config: Any, written: Written) -> None:
    for field, pattern in _without_match(config, written):
        raise InputError(f"{source}: {field}: {pattern!r} matches no module of the model{_meant(pattern, written)}")


def _check_targets(source: Path, config: Any, written: Written) -> None:
    if not config.target_parameters and not _targeted(config, written):
        targets = config.target_modules
        shown = targets if isinstance(targets, str) else next(iter(sorted(targets)), "")
        raise InputError(f"{source}: target_modules: {shown!r} matches no module of the model{_meant(shown, written)}")


def _meant(pattern: str, written: Written) -> str:
    """Names of modules that look like what matches none, as the end of a sentence."""
    wanted = re.sub(r"\\(.)", r"\1", pattern).strip("^$.*+()").split(".*")[-1] or pattern
    depth = wanted.count(".") + 1
    names: Collection[str] = {".".join(name.split(".")[-depth:]) for name in written.adapted or written.names}
    close = difflib.get_close_matches(wanted, sorted(names), _SUGGESTIONS, 0.4)
    return f"; it may have meant {' or '.join(map(repr, close))}" if close else ""
