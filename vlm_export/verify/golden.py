"""Golden outputs, as they are read: what the PyTorch model said, with its adapter attached and nothing merged.

`golden.json` holds the tokens and captions and where they came from; `golden.safetensors` holds the tensors of two
cases (batch 1, and batch 2 with a prompt): what the client is fed, stages of the encoder side, prefill logits, three
decode steps, and the cache after them. `recording.py` writes both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vlm_export.documents import load_document
from vlm_export.errors import InputError, shown
from vlm_export.forms.conversation import Conversation
from vlm_export.forms.form import LARGEST_ID
from vlm_export.own_files import own_file, unchanged_file
from vlm_export.recipe import Recipe
from vlm_export.typed import command

JSON, TENSORS = "golden.json", "golden.safetensors"
_LARGEST_BATCH = 16
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_ID)]], Field(min_length=1)]


@dataclass(frozen=True)
class GoldenImage:
    """One image's greedy tokens. `margins` are the gaps between the two best scores at each token.

    Where the recipe searches with beams, `searched` are the tokens that are found, and `search_margin` is the gap
    between the scores of the best two texts.
    """

    file: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    sha256: str
    pixel_values_sha256: str
    prompt_ids_sha256: str
    token_ids: Tokens
    caption: str
    margins: list[float]
    searched: list[Annotated[int, Field(ge=0, le=LARGEST_ID)]] = field(default_factory=list)
    search_margin: float | None = None


@dataclass(frozen=True)
class GoldenCase:
    """One run on `batch` images with one text, and the greedy token of each decode step."""

    name: str
    batch: Annotated[int, Field(ge=1, le=_LARGEST_BATCH)]
    text: str
    step_token_ids: Annotated[list[Tokens], Field(min_length=1)]


@dataclass(frozen=True)
class Golden:
    """`golden.json`. Every image is run with `text`; if a chat template made it, of `conversation`.

    `companions` are the names of the folders that tokenizer, template, processor and rules came from.
    """

    recipe: str
    inputs_sha256: dict[str, str]
    versions: dict[str, str]
    generation: dict[str, Any]
    eos_token_ids: Tokens
    image_processor: dict[str, Any]
    text: str
    images: list[GoldenImage]
    cases: list[GoldenCase]
    conversation: Conversation | Annotated[list[Any], Field(max_length=0)] = field(default_factory=list)
    base: str = "original"
    combination: dict[str, Any] | None = None
    companions: dict[str, str] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    schema: int = 3

    def differences(self, recipe: Recipe, generation: Mapping[str, Any]) -> list[str]:
        """The keys of a recipe that are not as they were when this was recorded; `generation` is what it comes to."""
        pairs = {
            "generation": ((self.generation, self.search), (dict(generation), recipe.generation.search)),
            "base": (self.base, recipe.base),
            "combination": (self.combination, combination_of(recipe)),
        }
        return [key for key, (recorded, now) in pairs.items() if recorded != now]


class CaseTensors(dict[str, np.ndarray]):
    """The tensors of a golden case by golden name; one that is missing is an InputError that names the `file`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], file: Path, case: str):
        super().__init__(tensors)
        self.file = file
        self.case = case

    def __missing__(self, name: str) -> np.ndarray:
        raise InputError(f"{self.file}: case {self.case} has no {name}: run `{command('golden')}`")

    def damaged(self, what: str) -> InputError:
        """The error of a tensor that is another than was recorded."""
        return InputError(f"{self.file}: is damaged: case {self.case}: {what}: run `{command('golden')}`")


@dataclass(frozen=True)
class GoldenFolder:
    """A recorded golden: the facts, the tensors by `<case>/<golden name>`, and the images."""

    path: Path
    facts: Golden
    tensors: Mapping[str, np.ndarray]

    def case(self, name: str) -> CaseTensors:
        """The tensors of a case, by golden name."""
        own = {key.removeprefix(f"{name}/"): value for key, value in self.tensors.items() if key.startswith(f"{name}/")}
        return CaseTensors(own, self.path / TENSORS, name)

    def image_paths(self) -> list[Path]:
        """The image files, in the order of the golden's images."""
        return [self.path / "images" / image.file for image in self.facts.images]

    def check_rows(self, rows: int) -> None:
        """Raises InputError where a token is none of a model's, whose table has so many rows."""
        for place, image in enumerate(self.facts.images):
            _check_rows(self.path, f"images.{place}.token_ids", image.token_ids, rows)
        for place, case in enumerate(self.facts.cases):
            _check_rows(self.path, f"cases.{place}.step_token_ids", list(chain(*case.step_token_ids)), rows)

    def check_fed(self, first: Mapping[str, np.ndarray]) -> None:
        """Check what the cases are fed, by golden name: the first is fed `first`, which its image and text give, and
        the others arrays of that kind.

        Raises:
            InputError: an array is missing, or is another.
        """
        for place, case in enumerate(self.facts.cases):
            tensors = self.case(case.name)
            for name, array in first.items():
                found, rows = tensors[name], len(array) * case.batch
                if (found.dtype, found.ndim, len(found)) != (array.dtype, array.ndim, rows):
                    kind = f"{found.dtype} {list(found.shape)}, not {array.dtype} of {array.ndim} axes and {rows} rows"
                    raise tensors.damaged(f"{name} is {kind}")
                if place == 0 and not np.array_equal(found, array):
                    raise tensors.damaged(f"{name} is not what {self.facts.images[0].file} gives")

    def largest_logit(self) -> float:
        """The size of this model's scores, which margins are judged by."""
        logits = [value[np.isfinite(value)] for name, value in self.tensors.items() if name.endswith(".logits")]
        return max((float(np.abs(value).max(initial=0.0)) for value in logits), default=0.0)


def _check_rows(path: Path, key: str, token_ids: Sequence[int], rows: int) -> None:
    if (largest := max(token_ids)) >= rows:
        raise InputError(f"{path / JSON}: {key}: token {largest}, but the model has {rows}: run `{command('golden')}`")


def check_recorded(path: Path) -> None:
    """Raises InputError where no golden was recorded in a folder."""
    if not own_file(path, JSON):
        raise InputError(f"{path}: no golden outputs recorded yet: run `{command('golden')}`")


def load_facts(path: Path) -> Golden:
    """Read and check `golden.json` alone.

    Raises:
        InputError: as of `load_golden`.
    """
    again = f"run `{command('golden')}`"
    facts = load_document(path / JSON, Golden, again)
    for key, whole in _agreements(facts):
        if not whole:
            raise InputError(f"{path / JSON}: is damaged: {key}: not as many as belong together: {again}")
    return facts


def _agreements(facts: Golden) -> Iterator[tuple[str, bool]]:
    """The keys whose values belong to those of another, and whether there are as many of them."""
    for place, image in enumerate(facts.images):
        yield f"images.{place}.margins", len(image.margins) == len(image.token_ids)
    steps = {len(case.step_token_ids) for case in facts.cases}
    for place, case in enumerate(facts.cases):
        rows = {len(step) for step in case.step_token_ids}
        yield f"cases.{place}.batch", rows == {case.batch}
        yield f"cases.{place}.step_token_ids", len(steps) == 1


def load_golden(path: Path) -> GoldenFolder:
    """Read and check a recorded golden.

    Raises:
        InputError: there is none, it is damaged, it holds nothing to compare with, or a link leads out of it.
    """
    again = f"run `{command('golden')}`"
    check_recorded(path)
    facts = load_facts(path)
    own_file(path, TENSORS)
    try:
        tensors = load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / TENSORS}: is damaged ({type(error).__name__}): {again}") from error
    if not facts.images or not facts.cases:
        raise InputError(f"{path / JSON}: an empty golden proves nothing: {again}")
    for case in facts.cases:
        if not any(name.startswith(f"{case.name}/") for name in tensors):
            raise InputError(f"{path / TENSORS}: has no tensors of the case {shown(case.name)}: {again}")
    for image in facts.images:
        name = f"images/{image.file}"
        if Path(image.file).name != image.file or not unchanged_file(path, name, image.sha256):
            raise InputError(f"{path / name}: not the image that the golden outputs were recorded on: {again}")
    return GoldenFolder(path, facts, tensors)


def combination_of(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe's combination of adapters, as JSON has it; None without one."""
    combination = recipe.combination
    return asdict(combination) | {"weights": list(combination.weights)} if combination else None


def array_sha256(array: np.ndarray) -> str:
    """Hex digest of an array's little-endian bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
