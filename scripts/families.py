"""Writes docs/families.md: what is supported, verified where, and since when, from the package and its tests.

python scripts/families.py

Layouts, clients and recipes come from the package; what a test proves of a family, from its mark `verifies`; the kinds
of adapters, from the table that the tests of merging run through.
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(TESTS))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import test_adapter_names  # noqa: E402
import test_adapters  # noqa: E402

from vlm_export import bundled, recipe  # noqa: E402
from vlm_export.dtypes import DTYPES  # noqa: E402
from vlm_export.families.registry import find_family, names  # noqa: E402
from vlm_export.merging import adapter_kinds  # noqa: E402
from vlm_export.source import companions  # noqa: E402
from vlm_export.source.checkpoint import open_checkpoint  # noqa: E402
from vlm_export.spec.family import Family  # noqa: E402
from vlm_export.targets import TARGETS  # noqa: E402

COLUMNS = {
    "ort": "ONNX Runtime",
    "node": "Node",
    "wasm": "Chromium, WASM",
    "webgpu": "Chromium, WebGPU in software",
}
INTRODUCTION = """# Model families

<!-- Written by `python scripts/families.py`: change what it reads, then run it. -->

The family of a model is the `model_type` of its `config.json`. What is said here to be verified is what the tests run:
models of the real config classes with a few small layers and random weights, and with a LoRA in every family, through
merge, export and `verify`; in Chromium also the bundled `shapes-captioner`, which is trained. A recipe whose model is
on the Hub is not run by the tests: `vlm-export verify` checks it where you run it.

A family that is missing can be [added](adding-a-family.md).
"""


@dataclass(frozen=True)
class Proof:
    """A test and what its mark says of one layout of one family."""

    test: str
    model_type: str
    layout: str
    runtime: str
    dtypes: tuple[str, ...]


def proofs() -> Iterator[Proof]:
    """What the marks `verifies` say, read without running the tests."""
    for path in sorted(TESTS.glob("test_*.py")):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.verifies":
                    model_types, layouts = (ast.literal_eval(value).split() for value in mark.args)
                    for model_type in model_types:
                        for layout in layouts:
                            for given in mark.keywords:
                                dtypes = tuple(ast.literal_eval(given.value).split())
                                test = f"{path.name}::{function.name}"
                                yield Proof(test, model_type, layout, str(given.arg), dtypes)


def page() -> str:
    """The whole page."""
    families = [find_family(name, "scripts/families.py") for name in names()]
    found = list(proofs())
    sections = [
        INTRODUCTION,
        *(_family(family, [proof for proof in found if proof.model_type == family.model_type]) for family in families),
        _dtypes(),
        _adapters(),
    ]
    return "\n".join(sections)


def _family(family: Family, found: Sequence[Proof]) -> str:
    about = family.about
    return f"""## `{family.model_type}`

{about.summary[0].upper()}{about.summary[1:]}. Since version {about.since}.

- towers in tests: {_code(about.towers)}
- decoders in tests: {_code(about.decoders)}
{"".join(f"- {note}" + chr(10) for note in about.notes)}
{_table(["layout", "loads with", "`verify` runs", *COLUMNS.values()], _layouts(family, found))}
Verified by {_code(sorted({proof.test for proof in found}))}.

{_table(["recipe", "model", "layout", "golden outputs"], _recipes(family))}"""


def _layouts(family: Family, found: Sequence[Proof]) -> Iterator[list[str]]:
    for name, layout in family.layouts.items():
        client = layout.client
        runtimes = [runtime for runtime in TARGETS if runtime == "ort" or client.node]
        cells = []
        for column in COLUMNS:
            proved = {
                dtype for proof in found if (proof.layout, proof.runtime) == (name, column) for dtype in proof.dtypes
            }
            cells.append(", ".join(dtype for dtype in DTYPES if dtype in proved) or "–")
        yield [f"`{name}`", f"`{client.name}`" if client.node else client.name, ", ".join(runtimes), *cells]


def _recipes(family: Family) -> Iterator[list[str]]:
    for name in bundled.recipe_names():
        found = recipe.find_recipe(name)
        if found.recipe.model_type == family.model_type:
            local = found.local(found.recipe.model)
            golden = "bundled" if (bundled.GOLDEN / name).is_dir() else f"`vlm-export golden {name}`"
            model = "bundled" if local else f"[{found.recipe.model}](https://huggingface.co/{found.recipe.model})"
            yield [f"`{name}`", model, f"`{found.recipe.layout}`", golden]


def _dtypes() -> str:
    rows = ([f"`{dtype.name}`", f"`{dtype.suffix}`" if dtype.suffix else "none"] for dtype in DTYPES.values())
    return f"""## Dtypes

Every layout of every family can be written in each. What a table above leaves out, no test runs there.

{_table(["dtype", "file suffix"], rows)}"""


def _adapters() -> str:
    inits = _code(sorted(adapter_kinds.INITS_THAT_CHANGE_BASE))
    head = ["kind", *(f"{name} in `{model_type}`" for name, model_type in _bases().items())]
    rows = (
        [kind, *("yes" if (kind, base) in test_adapters.CASES else "–" for base in test_adapters.BASES)]
        for kind in test_adapters.KINDS
    )
    return f"""## Adapters

`merge` takes what PEFT saves as LoRA, in every family. `test_adapters.py::test_merged_is_what_peft_computes` compares
the logits of the merged model with those of PEFT's own model, to 1e-5 of the largest, for these kinds in these small
models:

{_table(head, rows)}
Several adapters are combined by {_code(get_args(recipe.CombinationType))}, or merged one after the other.

Refused by name: {", ".join(sorted(adapter_kinds.UNSUPPORTED.values()))};
what begins by changing the base ({inits}), unless it was saved as an ordinary LoRA; and
every `peft_type` but `LORA`.

### Whose folders are understood

Adapters name modules as the version of transformers did that trained them, in their tensors and in the patterns of
`adapter_config.json`; both are translated by the library's own tables. `test_adapter_names.py::test_merged_by_hand`
compares merged weights with W + s·B·A, computed by hand, of folders as these wrote them:

{_table(["as written by", "model", "settings with names of modules"], _writers())}
Beside them: `non_lora_trainables.bin` of LLaVA's own trainer; tables that were resized with the fine-tune, where the
adapter holds the new rows (`test_adapters.py::test_a_table_that_was_resized`).

Of the last adapter, and not of the model, are taken where it has them: {_code(list(companions.FILES))}
(`test_companions.py`). A recipe's `tokenizer: model` and `processor: model` say otherwise, and so does the path or Hub
id of a folder there.
"""


def _writers() -> Iterator[list[str]]:
    named = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    for name, case in test_adapter_names.CASES.items():
        fields = [field for field in (*named, "rank_pattern", "alpha_pattern") if field in case.settings]
        yield [name, f"`{case.base}`", _code(fields)]


def _bases() -> dict[str, str]:
    """The models that adapters are tested on, and the family of each, from what it writes to disk."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: open_checkpoint(base.write(Path(folder, name), False)).family.model_type
            for name, base in test_adapters.BASES.items()
        }


def _code(values: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
