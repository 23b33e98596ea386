"""A recipe as a file that explains itself: every key with where its value is from, or what else it could be."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from vlm_export.dtypes import DTYPES, PREFERRED
from vlm_export.errors import InputError
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.runtime.repo import ASKED
from vlm_export.start.draft import Draft, called, reference_for
from vlm_export.start.figures import number, size
from vlm_export.start.inspection import Adapter

_WIDTH = 100
_LAYOUTS = {
    "captioner": "pipeline('image-to-text') of transformers.js",
    "chat": "a chat model's class in transformers.js, with prompts and turns",
    "tasks": "Florence-2's class in transformers.js, with task prompts",
    "components": "graphs for a loop of your own",
    "single": "one file and one run for a text, in any language that ONNX Runtime has",
}


def write_recipe(draft: Draft, *, force: bool) -> RecipeFile:
    """Write the recipe to its file, after it was read back and checked.

    Raises:
        InputError: there is such a file, and `force` was not given; or the recipe is not valid, as a name may not be.
    """
    path = draft.wishes.path
    if path.exists() and not force:
        raise InputError(f"{path}: exists: write over it with --force, or to another file with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(recipe_text(draft), encoding="utf-8")
    try:
        load_recipe(beside)
    except InputError as error:
        beside.unlink()
        raise InputError(str(error).replace(str(beside), str(path))) from error
    os.replace(beside, path)
    return load_recipe(path)


def recipe_text(draft: Draft) -> str:
    """The file's text."""
    blocks = (_head, _model, _adapters, _layout, _dtypes, _pixels, _generation, _golden, _hub)
    return "\n".join(line for block in blocks for line in block(draft)) + "\n"


def _head(draft: Draft) -> Iterator[str]:
    sources = " and ".join(called(source.reference) for source in draft.sources)
    yield from _comment(f"What to publish of {sources}, and how. `vlm-export convert` does all of it.")
    yield f"name: {_value(draft.name)}"
    yield '# description: "One sentence for the model card."'


def _model(draft: Draft) -> Iterator[str]:
    model = draft.model
    parameters = sum(part.parameters for part in model.parts)
    size_bytes = sum(part.size_bytes for part in model.parts)
    yield ""
    yield from _comment(f"{number(parameters)} parameters, {size(size_bytes)} on disk.")
    if model.lora:
        yield from _comment(f"LoRA inside: {model.lora}.")
    yield f"model: {_value(reference_for(model.named, draft.wishes.path))}"
    if model.named.commit:
        yield f"revision: {model.named.commit}"
    yield f"model_type: {model.model_type}"
    if model.quantized:
        yield from _comment(
            f"The weights are of {model.quantized}: they are merged into as they are. Better: name the 16-bit model "
            "that they were made from as `model`, and remove this."
        )
        yield "base: dequantized"


def _adapters(draft: Draft) -> Iterator[str]:
    if draft.adapters:
        yield "adapters:"
        for adapter in draft.adapters:
            yield from _adapter(adapter, draft.wishes.path)


def _adapter(adapter: Adapter, recipe: Path) -> Iterator[str]:
    yield from _comment(
        f"{adapter.lora}; trained on {called(adapter.base_model or 'a model that it does not name')}.", "  "
    )
    yield f"  - path: {_value(reference_for(adapter.named, recipe))}"
    if adapter.named.commit:
        yield f"    revision: {adapter.named.commit}"


def _layout(draft: Draft) -> Iterator[str]:
    yield ""
    for layout in draft.model.layouts:
        yield from _comment(f"{layout}: {_LAYOUTS[layout]}.")
    yield f"layout: {draft.layout}"


def _dtypes(draft: Draft) -> Iterator[str]:
    yield ""
    yield from _comment(
        f"The files that are written. Best in browsers: {PREFERRED['wasm'][0]} on WASM, {PREFERRED['webgpu'][0]} on "
        f"WebGPU; in Node and on servers: {PREFERRED['cpu'][0]}. fp32 is always written. There is "
        f"{', '.join(DTYPES)}, or COMPONENT=DTYPE."
    )
    if expected := draft.model.expected(draft.layout, draft.wanted):
        totals: dict[str, int] = {}
        for file in expected.files:
            totals[file.dtype] = totals.get(file.dtype, 0) + file.size_bytes
        yield from _comment("About " + ", ".join(f"{size(total)} in {dtype}" for dtype, total in totals.items()) + ".")
    yield f"dtypes: {_value(list(draft.dtypes))}"


def _pixels(draft: Draft) -> Iterator[str]:
    pixels = draft.pixels
    if pixels is None:
        return
    yield ""
    yield from _comment(
        f"The checkpoint lets a picture become {pixels.own_tokens:,} tokens. What the tower takes grows with their "
        f"square, so here a larger picture is made smaller, to {pixels.tokens} tokens. Goldens are recorded so too."
    )
    yield "image_processor:"
    yield f"  size: {_value({'shortest_edge': pixels.least, 'longest_edge': pixels.most})}  # pixels of a picture"


def _generation(draft: Draft) -> Iterator[str]:
    rules = draft.rules
    yield ""
    if rules.taken_over:
        yield from _comment(f"Taken over from the checkpoint unless set here: {_pairs(rules.taken_over)}.")
    if rules.left_out:
        yield from _comment(f"Left out: {_pairs(rules.left_out)}. transformers.js is greedy here.")
    yield "generation:"
    yield f"  max_new_tokens: {rules.max_new_tokens}  # {rules.because}"


def _golden(draft: Draft) -> Iterator[str]:
    yield ""
    yield from _comment("What PyTorch is recorded on, and every exported file compared with, token by token.")
    yield "golden:"
    if draft.pictures.count:
        yield from _comment(f"{draft.pictures.count} pictures.", "  ")
    else:
        yield from _comment("Photographs that come with the package. 16 or more of your own say more.", "  ")
    yield f"  images: {_value(list(draft.pictures.patterns))}"
    if draft.prompt is not None:
        yield from _prompt(draft)


def _prompt(draft: Draft) -> Iterator[str]:
    prompt = draft.prompt
    assert prompt is not None
    if prompt.rendered:
        yield from _comment(f"The model's own template makes of it: {_value(prompt.rendered)}", "  ")
    elif prompt.problem:
        yield from _comment(f"To be mended: {prompt.problem}.", "  ")
    yield "  prompts:"
    if isinstance(prompt.value, str):
        yield f"    - {_value(prompt.value)}"
        return
    for message in prompt.value:
        yield f"    - - role: {message['role']}"
        yield "        content:"
        yield from (f"          - {_value(part)}" for part in message["content"])


def _hub(draft: Draft) -> Iterator[str]:
    card = draft.card
    yield ""
    yield from _comment("Front matter of the model card.")
    yield "hub:"
    if draft.license:
        source = "" if draft.wishes.license else f"  # says the card of {called(card.license_from)}"
        yield f"  license: {_value(draft.license)}{source}"
    else:
        yield "  # license: apache-2.0  # no card names one, and nothing should be published without"
    tags = card.tags or (draft.model.model_type if draft.layout in ASKED else "image-captioning",)
    lists = {"language": card.language, "base_model": card.base_model, "datasets": card.datasets, "tags": tags}
    examples = {"language": ["en"], "base_model": ["org/model"]}
    for key, values in lists.items():
        if values:
            yield f"  {key}: {_value(list(values))}"
        elif key in examples:
            yield f"  # {key}: {_value(examples[key])}"
    if draft.wishes.repo_id:
        yield f"  repo_id: {_value(draft.wishes.repo_id)}"


def _comment(text: str, indent: str = "") -> Iterable[str]:
    begin = f"{indent}# "
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=begin, subsequent_indent=begin, break_on_hyphens=False
    )


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _value(value: Any) -> str:
    """A value as YAML, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
