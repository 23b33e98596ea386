"""A recipe: what to publish. One YAML file, one published repo; every key is checked, none is guessed.

How to run (work folder, verbosity, dtypes of this run) is not part of it: those are command line options.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vlm_export import bundled
from vlm_export.contract import LayoutName
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError, shown
from vlm_export.forms.conversation import Prompt
from vlm_export.forms.generation import MOST_TOKENS
from vlm_export.forms.reading import check_image_processor
from vlm_export.forms.yaml_file import described, read_yaml
from vlm_export.paths import expanded, is_no_id, no_such_folder
from vlm_export.wanted import parse

DtypeName = Literal["fp32", "fp16", "int8", "uint8", "q8", "q4", "q4f16", "bnb4", "q2", "q2f16"]
MetricName = Literal[
    "cosine_similarity",
    "max_logits_difference",
    "max_relative_error",
    "max_relative_error_at_other_sizes",
    "searched_tokens_exact_rate",
    "teacher_forced_top1_agreement",
    "tokens_as_onnxruntime_rate",
    "tokens_exact_rate",
    "tokens_together_as_alone_rate",
]
BaseName = Literal["original", "dequantized"]
BaseModelRelation = Literal["adapter", "finetune", "merge", "quantized"]
CombinationType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
PHOTOGRAPHS = "bundled:photographs"  # among golden images
OF_MODEL, FROM_CHECKPOINT = "model", "from_checkpoint"
MOST_BEAMS = 64  # each is a row of the cache
LOCAL_RECIPE = "vlm-export.yaml"
_NO_RECIPE = "no such recipe file; `vlm-export recipes` lists the bundled ones"
_STRICT = ConfigDict(extra="forbid")
_LARGEST_RANK = 10_000


def _printable(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("must be a path, or an id of the Hub, without control characters")
    return text


Reference = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]


@dataclass(frozen=True, config=_STRICT)
class AdapterSource:
    """A PEFT adapter: a local folder or the file of weights in one, or a Hub id, with the revision to pin."""

    path: Reference
    revision: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Combination:
    """How several adapters become one before it is merged, as PEFT's `add_weighted_adapter` does it.

    Without it they are merged one after the other. `weights` has one for each of `adapters`; `density` is the share of
    values that ties, dare and magnitude_prune keep, and `seed` chooses those of dare; `svd_rank` is the rank of what an
    svd gives (by default the largest of the adapters').
    """

    type: CombinationType
    weights: tuple[Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)], ...] = Field(min_length=1)
    density: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0, strict=True)
    majority_sign_method: Literal["total", "frequency"] = "total"
    svd_rank: int | None = Field(default=None, ge=1, le=_LARGEST_RANK, strict=True)


@dataclass(frozen=True, config=_STRICT)
class Generation:
    """Greedy generation, as it is published in `generation_config.json`: transformers.js has no beam search.

    What is left out is as the checkpoint has it; but there are 30 new tokens, unless `from_checkpoint` says that their
    number is the checkpoint's too. `generation: from_checkpoint` is short for that alone.

    Layout single can search: with `num_beams` of more than one its file does, and `length_penalty` and `early_stopping`
    are then its defaults. They are never the checkpoint's.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS, strict=True)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1e20, strict=True, allow_inf_nan=False)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=MOST_TOKENS, strict=True)
    from_checkpoint: bool = Field(default=False, strict=True)
    num_beams: int | None = Field(default=None, ge=1, le=MOST_BEAMS, strict=True)
    length_penalty: float | None = Field(default=None, ge=-10, le=10, strict=True, allow_inf_nan=False)
    early_stopping: Annotated[bool, Field(strict=True)] | Literal["never"] | None = None

    @property
    def search(self) -> dict[str, Any]:
        """How to search with beams, as transformers' `generate` takes it; nothing where generation is greedy."""
        if self.num_beams is None or self.num_beams == 1:
            return {}
        return {
            "num_beams": self.num_beams,
            "length_penalty": 1.0 if self.length_penalty is None else self.length_penalty,
            "early_stopping": bool(self.early_stopping) if self.early_stopping != "never" else "never",
        }


@dataclass(frozen=True, config=_STRICT)
class GoldenInputs:
    """What the golden outputs are recorded on.

    `images` are globs relative to the recipe, or `bundled:photographs`, which come with the package; none means the
    images of the bundled `shapes-captioner`. A prompt is a text, or a conversation for the model's chat template. A
    captioner's tokens are recorded without a prompt, and each prompt is run on the first two images; a chat model's
    tokens are recorded with the first prompt.
    """

    images: tuple[Reference, ...] = ()
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Tolerance:
    """An exception to a limit of `limits.py`, with the reason that the report repeats."""

    metric: MetricName
    dtype: DtypeName
    limit: float = Field(strict=True, allow_inf_nan=False)
    reason: str = Field(min_length=10)


@dataclass(frozen=True, config=_STRICT)
class HubMetadata:
    """Front matter of the model card.

    `license: other` takes a name and a link. `base_model_relation` follows from the rest of the recipe if it is left
    out. Without `pictures` no golden image is published.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    repo_id: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model_relation: BaseModelRelation | None = None
    pictures: bool = Field(default=True, strict=True)


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """A checked recipe. `model` is a path relative to the recipe's file, an absolute path, or a Hub id.

    `base` says what adapters are merged into where the model's weights are quantized: not into those, but into the
    `original` 16-bit model, which `model` then has to name; or into them, `dequantized`.

    `model_type` is what the model's config must say, so that a recipe can be listed by family before it is downloaded.

    `preprocess` says where pictures are resized and normalized: by the `client`, each in its own way, or in the vision
    `graph`, which then takes pictures of any size. By itself (`auto`) it is the graph where the client feeds one
    picture at a time and the steps have operators.

    `tokenizer` (with its chat template) and `processor` name a folder or Hub repo to take them from, or `model`.
    Without them those of the last adapter that has them win over the model's.

    `trust_remote_code` runs the model's classes out of its Hub repo, as they are in the commit `revision`.
    """

    name: Annotated[str, Field(max_length=100)]
    model: Reference
    description: str = ""
    revision: str | None = None
    trust_remote_code: bool = Field(default=False, strict=True)
    base: BaseName = "original"
    adapters: tuple[AdapterSource, ...] = ()
    combination: Combination | None = None
    layout: LayoutName = "captioner"
    preprocess: Literal["auto", "client", "graph"] = "auto"
    dtypes: tuple[str, ...] = ("fp32",)
    generation: Generation = Field(default_factory=Generation)
    tokenizer: Reference | None = None
    processor: Reference | None = None
    image_processor: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | None = None
    golden: GoldenInputs = Field(default_factory=GoldenInputs)
    tolerances: tuple[Tolerance, ...] = ()
    hub: HubMetadata = Field(default_factory=HubMetadata)
    model_type: str | None = None


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and the file that it was read from, which its relative paths start at."""

    recipe: Recipe
    path: Path

    @property
    def name(self) -> str:
        """The recipe's name, which its work folder and golden folder have too."""
        return self.recipe.name

    @property
    def golden_target(self) -> Path:
        """Where golden outputs are recorded: `golden/<name>` beside the recipe, or in the current folder if bundled."""
        return (Path() if self.is_bundled else self.path.parent) / "golden" / self.name

    @property
    def golden_dir(self) -> Path:
        """Where golden outputs are read: what was recorded here, else what is bundled with a bundled recipe."""
        recorded = self.golden_target
        shipped = bundled.GOLDEN / self.name
        return shipped if self.is_bundled and shipped.exists() and not recorded.exists() else recorded

    @property
    def first_prompt(self) -> str | list[dict[str, Any]] | None:
        """The prompt that tokens of a chat model are recorded with, if the recipe has one."""
        return next(iter(self.recipe.golden.prompts), None)

    @property
    def trusted_code(self) -> str:
        """The repo and the commit whose code the recipe lets run, or nothing."""
        return f"{self.recipe.model}@{self.recipe.revision}" if self.recipe.trust_remote_code else ""

    @property
    def is_bundled(self) -> bool:
        """Whether it came with the package."""
        return self.path.resolve().parent == bundled.RECIPES

    def local(self, reference: str) -> Path | None:
        """The existing local path that `reference` names, or None when it can only be a Hub id."""
        candidate = (self.path.parent / expanded(reference)).resolve()
        return candidate if candidate.exists() else None

    def found(self, reference: str, key: str) -> Path | None:
        """The existing local path that `reference` names, which stands at `key`; None where it is an id of the Hub.

        Raises:
            InputError: it can only be a path, and nothing is there.
        """
        local = self.local(reference)
        if local is None and is_no_id(reference):
            raise InputError(f"{self.path}: {key}: {no_such_folder(reference, self.path.parent)}")
        return local


def find_recipe(reference: str | None) -> RecipeFile:
    """Load the recipe that a user named: a bundled name, a YAML path, or (None) the current folder's or the default.

    Raises:
        InputError: no such recipe, or the file does not hold a valid one.
    """
    if reference is None:
        local = Path(LOCAL_RECIPE)
        return load_recipe(local) if local.is_file() else find_recipe(bundled.DEFAULT_RECIPE)
    if reference in bundled.recipe_names():
        return load_recipe(bundled.RECIPES / f"{reference}.yaml")
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        return load_recipe(path)
    names = bundled.recipe_names()
    close = difflib.get_close_matches(reference, names, n=1)
    listed = "`vlm-export recipes` lists the bundled ones; or give the path of a .yaml file"
    hint = f"did you mean {close[0]!r}?" if close else listed
    raise InputError(f"no recipe {reference!r}: {hint}")


def load_recipe(path: Path) -> RecipeFile:
    """Read and check one YAML file.

    Raises:
        InputError: the file is missing, is not YAML, or a key is unknown, missing, there twice or of the wrong kind.
    """
    values = read_yaml(path, _NO_RECIPE)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping with at least `name` and `model`")
    if values.get("generation") == FROM_CHECKPOINT:
        values["generation"] = {FROM_CHECKPOINT: True}
    try:
        recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{path}: {described(error, Recipe, _SECTIONS)}") from error
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        raise InputError(f"{path}: name: {shown(recipe.name)} names a folder: use letters, digits, '.', '_' and '-'")
    _check_combination(recipe, path)
    _check_search(recipe.generation, path)
    check_image_processor(recipe.image_processor, f"{path}: image_processor")
    parse(recipe.dtypes, f"{path}: dtypes")
    if recipe.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", recipe.revision or ""):
        raise InputError(
            f"{path}: trust_remote_code: runs code of {recipe.model}; pin it: `revision` must be a commit's 40 digits"
        )
    return RecipeFile(recipe, path)


def _check_combination(recipe: Recipe, path: Path) -> None:
    """Raises InputError for weights or a density that do not belong to the adapters or the type of combination."""
    combination = recipe.combination
    if combination is None:
        return
    if len(combination.weights) != len(recipe.adapters):
        weights, adapters = len(combination.weights), len(recipe.adapters)
        raise InputError(f"{path}: combination.weights: {weights} for {adapters} adapters; give each of them one")
    thins_out = combination.type.startswith(("ties", "dare", "magnitude_prune"))
    if thins_out != (combination.density is not None):
        need = "needs one, above 0 and up to 1" if thins_out else "has no use for it; remove it"
        raise InputError(f"{path}: combination.density: {combination.type} {need}")


def _check_search(generation: Generation, path: Path) -> None:
    """Raises InputError for a setting of a search where there is none."""
    unused = [name for name in ("length_penalty", "early_stopping") if getattr(generation, name) is not None]
    if unused and not generation.search:
        raise InputError(f"{path}: generation.{unused[0]}: a search uses it, and there is none: give num_beams above 1")


_SECTIONS = {
    "adapters": AdapterSource,
    "combination": Combination,
    "generation": Generation,
    "golden": GoldenInputs,
    "tolerances": Tolerance,
    "hub": HubMetadata,
}


assert set(DtypeName.__args__) == set(DTYPES), "DtypeName and DTYPES name the same dtypes"  # type: ignore[attr-defined]
