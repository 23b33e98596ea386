"""vlm_export.recipe: a recipe is read as it is written; what is misspelt is named, with what was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from vlm_export import bundled
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.recipe import (
    AdapterSource,
    Combination,
    DtypeName,
    Generation,
    GoldenInputs,
    HubMetadata,
    LayoutName,
    MetricName,
    Recipe,
    Tolerance,
    find_recipe,
    load_recipe,
)
from vlm_export.verify import limits

FULL = """
name: captions-2.b
model: ./checkpoint
description: |
  Two
  lines.
revision: 4d7a1ed
model_type: llava
base: dequantized
combination: {type: ties, weights: [0.7, -0.3], density: 0.5, seed: 3, majority_sign_method: frequency}
adapters:
  - {path: org/adapter, revision: main}
  - path: ../local
layout: chat
dtypes: [fp32, int8]
generation: {max_new_tokens: 12, repetition_penalty: 1, no_repeat_ngram_size: 3}
image_processor: {size: {height: 8, width: 8}}
chat_template: "{{ messages }}"
golden:
  images: [images/*.png]
  prompts: [a, the]
tolerances:
  - {metric: cosine_similarity, dtype: int8, limit: 0.8, reason: one channel is an outlier}
hub: {license: mit, language: [en], tags: [t], base_model: [org/base], datasets: [d], repo_id: org/captions}
"""
MINIMAL = "name: mine\nmodel: org/model\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(reference: Path | str) -> str:
    """The one-line message; it starts with the file that is wrong, if there is one."""
    with pytest.raises(InputError) as caught:
        load_recipe(reference) if isinstance(reference, Path) else find_recipe(reference)
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(reference, Path):
        assert message.startswith(f"{reference}: ")
    return message


def test_every_key(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    found = load_recipe(path)
    assert found.path.resolve() == path.resolve()
    assert found.name == "captions-2.b"
    assert found.recipe == Recipe(
        name="captions-2.b",
        model="./checkpoint",
        description="Two\nlines.\n",
        revision="4d7a1ed",
        model_type="llava",
        base="dequantized",
        combination=Combination("ties", (0.7, -0.3), 0.5, 3, "frequency"),
        adapters=(AdapterSource("org/adapter", "main"), AdapterSource("../local")),
        layout="chat",
        dtypes=("fp32", "int8"),
        generation=Generation(12, 1.0, 3),
        image_processor={"size": {"height": 8, "width": 8}},
        chat_template="{{ messages }}",
        golden=GoldenInputs(("images/*.png",), ("a", "the")),
        tolerances=(Tolerance("cosine_similarity", "int8", 0.8, "one channel is an outlier"),),
        hub=HubMetadata("mit", ("en",), ("t",), ("org/base",), ("d",), "org/captions"),
    )


def test_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL)).recipe
    assert recipe == Recipe(name="mine", model="org/model")
    assert (recipe.layout, recipe.dtypes, recipe.generation) == ("captioner", ("fp32",), Generation())


def test_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL)).recipe
    with pytest.raises(AttributeError):
        recipe.name = "other"  # type: ignore[misc]


def test_names_are_those_of_the_tables() -> None:
    assert set(get_args(DtypeName)) == set(DTYPES)
    assert sorted(get_args(MetricName)) == limits.metrics()


UNKNOWN = {
    "nmae: a": "nmae: unknown key (did you mean 'name'?)",
    "adapter: []": "adapter: unknown key (did you mean 'adapters'?)",
    "quantize: [int8]": "quantize: unknown key",
    "license: mit": "license: unknown key (it belongs under 'hub')",
    "max_new_tokens: 3": "max_new_tokens: unknown key (it belongs under 'generation')",
    "hub: {licence: mit}": "hub.licence: unknown key (did you mean 'license'?)",
    "golden: {image: [a]}": "golden.image: unknown key (did you mean 'images'?)",
    "generation: {num_return_sequences: 3}": "generation.num_return_sequences: unknown key",
    "adapters: [{path: a, revison: b}]": "adapters.0.revison: unknown key (did you mean 'revision'?)",
    "adapters: [{path: a}, {pth: b}]": "adapters.1.pth: unknown key (did you mean 'path'?)",
    "combination: {type: cat, weight: [1]}": "combination.weight: unknown key (did you mean 'weights'?)",
    "weights: [1]": "weights: unknown key (it belongs under 'combination')",
    "hub: {name: a}": "hub.name: unknown key",
    "1: 2": "1: keys should be strings",
    '"zebra\\nfish": 1': "zebra fish: unknown key",
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown_key(line: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, f"{MINIMAL}{line}\n"))
    assert UNKNOWN[line] in message
    if "(" not in UNKNOWN[line]:
        assert "did you mean" not in message


TOLERANCE = "metric: cosine_similarity, dtype: int8, limit: 0.9, reason: because it is measured"
WRONG = {
    "layout: caption": "layout: input should be 'captioner', 'chat', 'tasks', 'components' or 'single'",
    "dtypes: fp32": "dtypes: input should be a valid tuple",
    "dtypes: [fp32, q5]": "dtypes: no dtype 'q5': there is fp32, fp16",
    "dtypes: [q1]": "dtypes: q1: neither a processor nor WASM has a kernel for 1-bit weights",
    "dtypes: ['decoder=q4,decoder=q8']": "dtypes: decoder: named twice; keep one of q4 and q8",
    "description: 3": "description: input should be a valid string",
    "revision: 12345": "revision: input should be a valid string",
    "adapters: org/adapter": "adapters: input should be a valid tuple",
    "adapters: [org/adapter]": "adapters.0: input should be a dictionary",
    "adapters: [{revision: main}]": "adapters.0.path: field required",
    "base: quantized": "base: input should be 'original' or 'dequantized'",
    "combination: {type: mean, weights: [1]}": "combination.type: input should be 'linear', 'cat', 'svd', 'ties'",
    "combination: {type: cat}": "combination.weights: field required",
    "combination: {type: cat, weights: []}": "combination.weights: tuple should have at least 1 item",
    "combination: {type: cat, weights: [1]}": "combination.weights: 1 for 0 adapters; give each of them one",
    "adapters: [{path: a}]\ncombination: {type: cat, weights: [1, 2]}": "combination.weights: 2 for 1 adapters",
    "combination: {type: ties, weights: [1], density: 0}": "combination.density: input should be greater than 0",
    "adapters: [{path: a}]\ncombination: {type: ties, weights: [1]}": "combination.density: ties needs one, above 0",
    "adapters: [{path: a}]\ncombination: {type: svd, weights: [1], density: 1}": "svd has no use for it; remove it",
    "generation: greedy": "generation: input should be a dictionary",
    "generation: {max_new_tokens: 0}": "generation.max_new_tokens: input should be greater than or equal to 1",
    "generation: {max_new_tokens: 1.5}": "generation.max_new_tokens: input should be a valid integer",
    "generation: {max_new_tokens: '30'}": "generation.max_new_tokens: input should be a valid integer",
    "generation: {max_new_tokens: true}": "generation.max_new_tokens: input should be a valid integer",
    "generation: {repetition_penalty: .inf}": "generation.repetition_penalty: input should be a finite number",
    "generation: {repetition_penalty: 0}": "generation.repetition_penalty: input should be greater than 0",
    "generation: {no_repeat_ngram_size: -1}": "generation.no_repeat_ngram_size: input should be greater than or equal",
    "generation: {num_beams: 65}": "generation.num_beams: input should be less than or equal to 64",
    "generation: {length_penalty: 2}": "generation.length_penalty: a search uses it, and there is none: give num_beams",
    "generation: {num_beams: 1, early_stopping: never}": "generation.early_stopping: a search uses it",
    "generation: {num_beams: 2, early_stopping: 1}": "generation.early_stopping",
    "generation: {num_beams: 2, length_penalty: .nan}": "generation.length_penalty: input should be",
    "image_processor: [a]": "image_processor: input should be a valid dictionary",
    "hub: {language: en}": "hub.language: input should be a valid tuple",
    "golden: {prompts: [1]}": "golden.prompts.0: input should be a valid string",
    f"tolerances: [{{{TOLERANCE.replace('cosine', 'cosin')}}}]": "tolerances.0.metric: input should be 'cosine_sim",
    f"tolerances: [{{{TOLERANCE.replace('0.9', '.nan')}}}]": "tolerances.0.limit: input should be a finite number",
    f"tolerances: [{{{TOLERANCE.replace('0.9', '.inf')}}}]": "tolerances.0.limit: input should be a finite number",
    f"tolerances: [{{{TOLERANCE.replace('because it is measured', 'why')}}}]": "tolerances.0.reason: string should",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_value(line: str, tmp_path: Path) -> None:
    assert WRONG[line] in refused(write(tmp_path, f"{MINIMAL}{line}\n"))


TWICE = {
    "name: other": "name: is there twice, in lines 1 and 3: keep one of them",
    "adapters: [{path: a}]\nlayout: chat\nadapters: []": "adapters: is there twice, in lines 3 and 5: keep one",
    "hub:\n  license: mit\n  'license': apache-2.0": "hub.license: is there twice, in lines 4 and 5",
    "adapters: [{path: a}, {path: b, path: c}]": "adapters.1.path: is there twice, in line 3:",
    "image_processor: {size: {width: 8,\n  width: 9}}": "image_processor.size.width: is there twice, in lines 3 and 4",
    "image_processor: {on: 1, true: 2}": "image_processor.true: is there twice",
    "adapters:\n- &a {path: a,\n   path: b}\n- <<: *a": "adapters.0.path: is there twice, in lines 4 and 5",
    "adapters:\n- <<: {path: a, path: b}": "adapters.0.<<.path: is there twice, in line 4:",
    "adapters:\n- &a {path: a}\n- <<: *a\n  <<: *a": "adapters.1.<<: is there twice, in lines 5 and 6",
    "image_processor: &a {b: 1, c: *a, b: 2}": "image_processor.b: is there twice, in line 3:",
}


@pytest.mark.parametrize("line", TWICE)
def test_a_key_that_is_there_twice(line: str, tmp_path: Path) -> None:
    assert TWICE[line] in refused(write(tmp_path, f"{MINIMAL}{line}\n"))


def test_all_keys_that_are_there_twice_are_listed(tmp_path: Path) -> None:
    message = refused(write(tmp_path, f"{MINIMAL}name: a\nmodel: b\nname: c\n"))
    assert message.partition(": ")[2] == (
        "name: is there twice, in lines 1 and 3: keep one of them; "
        "model: is there twice, in lines 2 and 4: keep one of them; "
        "name: is there twice, in lines 3 and 5: keep one of them"
    )


def test_a_merged_mapping_is_overridden(tmp_path: Path) -> None:
    """Which is what `<<` is for, also where it is merged into a second one."""
    adapters = "[&a {path: a, revision: r}, &b {<<: *a, path: b}, {<<: [*a, *b]}, {<<: *b}]"
    recipe = load_recipe(write(tmp_path, f"{MINIMAL}adapters: {adapters}\n")).recipe
    assert [(adapter.path, adapter.revision) for adapter in recipe.adapters] == [(p, "r") for p in "abab"]


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "name: 3\nlayuot: chat\nhub: {tags: x}\n"))
    for part in ("name: ", "model: field required", "layuot: unknown key (did you mean 'layout'?)", "hub.tags: "):
        assert part in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: mine\n", "model: field required"),
        ("model: org/model\n", "name: field required"),
        ("{}\n", "name: field required; model: field required"),
        ("name: null\nmodel: a\n", "name: input should be a valid string"),
        ("name: mine\nmodel: [a]\n", "model: input should be a valid string"),
        ("", "a recipe is a mapping with at least `name` and `model`"),
        ("# nothing yet\n", "a recipe is a mapping"),
        ("- name: mine\n", "a recipe is a mapping"),
        ("mine\n", "a recipe is a mapping"),
        ("name: [mine\nmodel: a\n", "not valid YAML: "),
        ("name: mine\n\tmodel: a\n", "not valid YAML: "),
        ("name: !!python/name:os.system\nmodel: a\n", "not valid YAML: could not determine a constructor"),
        ("name: mine\nmodel: a\nrevision: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
    ],
)
def test_not_a_recipe(text: str, named: str, tmp_path: Path) -> None:
    assert named in refused(write(tmp_path, text))


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/b", "a b", "-a", ".a", "/a", "ü", "a\\nb", "a\\n"])
def test_name_that_is_no_folder_name(name: str, tmp_path: Path) -> None:
    assert "names a folder: use letters, digits" in refused(write(tmp_path, f'name: "{name}"\nmodel: a\n'))


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\n")
    assert "cannot be read" in refused(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").mkdir()
    assert "cannot be read" in refused(tmp_path / "b.yaml")


def test_missing_file(tmp_path: Path) -> None:
    assert "no such recipe file; `vlm-export recipes` lists the bundled ones" in refused(tmp_path / "gone.yaml")


# --- which recipe ---


@pytest.mark.parametrize("name", bundled.recipe_names())
def test_bundled_recipe_loads(name: str) -> None:
    found = find_recipe(name)
    assert found.name == name
    assert found.path.resolve() == (bundled.RECIPES / f"{name}.yaml").resolve()
    assert found.recipe.description.strip()
    assert found.recipe.layout in get_args(LayoutName)


def test_default_recipe_is_bundled() -> None:
    assert bundled.DEFAULT_RECIPE in bundled.recipe_names()


def test_default_is_the_current_folder_s_else_the_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(None).name == bundled.DEFAULT_RECIPE
    write(tmp_path, MINIMAL, "vlm-export.yaml")
    found = find_recipe(None)
    assert (found.name, found.path.resolve()) == ("mine", (tmp_path / "vlm-export.yaml").resolve())
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert find_recipe(None).name == bundled.DEFAULT_RECIPE


def test_broken_recipe_in_the_current_folder_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "name: mine\n", "vlm-export.yaml")
    with pytest.raises(InputError, match=r"vlm-export\.yaml: model: field required"):
        find_recipe(None)


def test_bundled_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, MINIMAL, f"{bundled.DEFAULT_RECIPE}.yaml")
    assert find_recipe(bundled.DEFAULT_RECIPE).name == bundled.DEFAULT_RECIPE
    assert find_recipe(f"{bundled.DEFAULT_RECIPE}.yaml").name == "mine"
    write(tmp_path, MINIMAL, "other.yml")
    assert find_recipe("other.yml").name == "mine"
    assert find_recipe(str(tmp_path / "other.yml")).name == "mine"


def test_misspelt_recipe_name() -> None:
    assert refused("shapes-captoner") == "no recipe 'shapes-captoner': did you mean 'shapes-captioner'?"
    assert refused("zebra") == (
        "no recipe 'zebra': `vlm-export recipes` lists the bundled ones; or give the path of a .yaml file"
    )


def test_local_paths_start_at_the_recipe_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = load_recipe(write(tmp_path / "recipes", MINIMAL))
    assert found.local("org/model") is None
    assert found.local("../org/model") == (tmp_path / "org" / "model").resolve()
    assert found.local(str(tmp_path / "org")) == (tmp_path / "org").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found.local("~/org/model") == (tmp_path / "org" / "model").resolve()
    assert found.golden_dir.resolve() == (tmp_path / "recipes" / "golden" / "mine").resolve()


def test_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.yaml: not valid YAML: nested too deep"):
        load_recipe(path)
