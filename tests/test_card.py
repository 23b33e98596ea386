"""The model card: what it says, what the Hub makes of it, and that no path of this machine is in what is published."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported import Exported, prepare
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import ModelCard, close_session, snapshot_download
from PIL import Image

from vlm_export.errors import CheckFailed, InputError
from vlm_export.publish import examples, gate, licence
from vlm_export.publish.addresses import draft_id, readdressed, signature
from vlm_export.publish.examples import Example
from vlm_export.publish.front_matter import relation
from vlm_export.publish.gate import Allowed, Destination
from vlm_export.publish.local_paths import forget_folders, leaks, published_recipe
from vlm_export.recipe import AdapterSource, HubMetadata, load_recipe

REPO = "acme/pico"
HUB_KEYS = {  # of those that a card of ours may have; hub-docs, `modelcard.md`
    "library_name", "pipeline_tag", "license", "license_name", "license_link", "language", "base_model",
    "base_model_relation", "datasets", "tags", "thumbnail", "widget", "model-index",
}  # fmt: skip


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export whose recipe names folders of this machine in every place that takes one, verified."""
    folder = tmp_path_factory.mktemp("verified")
    made = prepare(
        folder,
        model=str(folder / "checkpoint"),
        tokenizer=str(folder / "checkpoint"),
        description="Noise, in words | and more.",
        golden={"images": [str(folder / "images" / "*.png")], "prompts": ["a cat"]},
        hub={
            "license": "apache-2.0",
            "language": ["en"],
            "base_model": ["org/tower", "org/decoder"],
            "datasets": ["org/set"],
        },
    )
    made.export(dtypes=["int8", "q8"])
    made.verify("ort")
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield server
        close_session()


def card(made: Exported) -> str:
    return (made.work.repo / "README.md").read_text()


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


# What it says


def test_it_shows_the_first_pictures_and_what_is_said_of_them(verified: Exported) -> None:
    golden = json.loads((verified.recipe.golden_dir / "golden.json").read_text())
    text = card(verified)
    for number, image in enumerate(golden["images"][:3], start=1):
        assert f"](assets/example-{number}.png)" in text
        with Image.open(verified.work.repo / f"assets/example-{number}.png") as copy:
            assert copy.tobytes() == Image.open(verified.recipe.golden_dir / "images" / image["file"]).tobytes()
    [spoken] = [line for line in text.splitlines() if line.startswith("| PyTorch |")]
    assert spoken.count(" | ") == 3
    gate.check_verified(verified.work)  # the pictures are among the files that the report is about


def test_a_row_for_each_dtype_that_says_something_else() -> None:
    shown = [
        Example("assets/1.png", "a *cat* | a dog", {"fp32": "a *cat* | a dog", "q4": "a cot"}),
        Example("assets/2.png", "", {"fp32": "", "q4": ""}),
    ]
    assert examples.markdown(shown, ["fp32", "q4", "q2"]).splitlines() == [
        r"|  | ![a \*cat\* \| a dog](assets/1.png) | ![(nothing)](assets/2.png) |",
        "|---|---|---|",
        r"| PyTorch | a \*cat\* \| a dog | (nothing) |",
        "| q4 | **a cot** | the same |",
        "",
        "Word for word the same: fp32.",
    ]


def test_a_line_in_words_for_each_dtype(verified: Exported) -> None:
    lines = re.findall(r"^- \*\*(\w+)\*\* · (.*)$", card(verified), re.MULTILINE)
    said = dict(lines)
    assert set(said) == {"fp32", "int8", "q8"}
    assert re.fullmatch(r"0\.\d MB · 3 of 3 captions equal · loaded by browsers on WebGPU", said["fp32"])
    assert said["int8"].endswith(" of 3 captions equal · loaded by Node")
    assert said["q8"].endswith(" · loaded by browsers")


def test_it_warns_where_the_graph_resizes(verified: Exported) -> None:
    assert "Give transformers.js one picture at a time" in card(verified)


def test_no_name_of_a_metric_is_in_it(verified: Exported) -> None:
    report = json.loads((verified.work.report / "report.json").read_text())
    text = card(verified).replace("exact_match", "")
    assert [name for name in {check["metric"] for check in report["checks"]} if "_" in name and name in text] == []


def test_it_links_base_licence_and_data_and_says_how_to_verify(verified: Exported) -> None:
    text = card(verified)
    for name in ("org/tower", "org/decoder", "datasets/org/set"):
        assert f"(https://huggingface.co/{name})" in text
    assert "Licence: apache-2.0." in text and "Language: en." in text
    assert "vlm-export verify recipe.yaml" in text and "vlm-export doctor your-name/pico" in text


def test_no_picture_leaves_where_the_recipe_keeps_them(verified: Exported, tmp_path: Path) -> None:
    made = verified.copy(tmp_path)
    path = made.recipe.path
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"hub": values["hub"] | {"pictures": False}}))
    Exported(load_recipe(path), made.work).verify("ort")
    assert not (made.work.repo / "assets").exists()
    assert "assets/" not in card(made).replace('"assets/*"', "") and "photo.jpg" in card(made)
    gate.check_verified(made.work)


def test_a_photograph_loses_its_size_and_what_its_file_says(verified: Exported, tmp_path: Path) -> None:
    golden = verified.recipe.golden_dir
    made = verified.copy(tmp_path)
    photo = Image.new("RGB", (2000, 1000), "red")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    facts = json.loads((golden / "golden.json").read_text())
    photo.save(tmp_path / "photo.png", exif=exif)
    target = examples._write(tmp_path / "photo.png", made.work.repo / "assets" / "photo")
    with Image.open(target) as small:
        assert (target.suffix, small.size) == (".jpg", (512, 256))
    assert b"taken at home" not in target.read_bytes()
    assert len(facts["images"]) == 3


# What the Hub makes of it


def test_the_front_matter_is_what_the_hub_reads(verified: Exported) -> None:
    data = ModelCard(card(verified)).data  # raises for a model-index that cannot be read
    values = front(card(verified))
    assert set(values) <= HUB_KEYS
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers.js", "image-to-text", "apache-2.0")
    assert (values["base_model"], values["base_model_relation"]) == (["org/tower", "org/decoder"], "finetune")
    assert values["thumbnail"] == "https://huggingface.co/your-name/pico/resolve/main/assets/example-1.png"
    assert [widget["src"].rsplit("/", 1)[1] for widget in values["widget"]] == [f"example-{n}.png" for n in (1, 2, 3)]
    assert all(widget["output"]["text"] == widget["example_title"] for widget in values["widget"])
    measured = {result.metric_name: result.metric_value for result in data.eval_results or ()}
    assert measured["Captions equal to PyTorch's, fp32"] == 1.0
    assert {name.rsplit(" ", 1)[1] for name in measured} == {"fp32", "int8", "q8"}


@pytest.mark.parametrize(
    ("adapters", "model", "said", "expected"),
    [
        ((), "org/base", None, "quantized"),
        ((), "checkpoint", None, "finetune"),
        ((AdapterSource("org/lora"),), "org/base", None, "finetune"),
        ((AdapterSource("org/lora"),), "org/base", "merge", "merge"),
    ],
)
def test_what_a_repo_is_to_its_base(
    verified: Exported, adapters: tuple[AdapterSource, ...], model: str, said: Any, expected: str
) -> None:
    hub = HubMetadata(base_model=("org/base",), base_model_relation=said)
    assert relation(replace(verified.recipe.recipe, adapters=adapters, model=model, hub=hub)) == expected


def test_a_misspelt_relation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{name: a, model: m, hub: {base_model_relation: fine-tune}}")
    with pytest.raises(InputError, match=r"hub\.base_model_relation"):
        load_recipe(tmp_path / "a.yaml")


# The repo's id


def test_a_push_writes_the_id_and_leaves_the_folder_as_it_was_verified(verified: Exported, hub: HubServer) -> None:
    before = card(verified)
    gate.run_push(verified.recipe, verified.work, Destination(REPO))
    pushed = (Path(snapshot_download(REPO)) / "README.md").read_text()
    assert "your-name" not in pushed and card(verified) == before
    assert pushed == before.replace("your-name/pico", REPO)
    assert front(pushed)["thumbnail"] == f"https://huggingface.co/{REPO}/resolve/main/assets/example-1.png"
    plan = gate.run_plan(verified.recipe, verified.work, Destination(REPO))
    assert {change.action for change in plan.changes} == {"same"}


@pytest.mark.parametrize(
    ("repo_id", "expected"), [(None, "your-name/pico"), ("me/pico", "me/pico"), ("org/tower", "your-name/pico")]
)
def test_the_draft_names_the_recipes_id_unless_that_is_a_base(
    verified: Exported, repo_id: str | None, expected: str
) -> None:
    hub = replace(verified.recipe.recipe.hub, repo_id=repo_id)
    assert draft_id(replace(verified.recipe, recipe=replace(verified.recipe.recipe, hub=hub))) == expected


def test_only_a_whole_id_is_another() -> None:
    text = f"'a/b' a/b-c x/a/b. https://h/a/b/resolve {signature('a/b')}"
    assert readdressed(text, "c/d") == f"'c/d' a/b-c x/c/d. https://h/c/d/resolve {signature('c/d')}"
    assert readdressed("a card of somebody else's", "c/d") == "a card of somebody else's"


# Licence


@pytest.mark.parametrize(
    ("front", "missing"),
    [
        ({}, True),
        ({"license": None}, True),
        ({"license": "mit"}, False),
        ({"license": "other"}, True),
        ({"license": "other", "license_name": "a", "license_link": "LICENSE"}, False),
    ],
)
def test_a_licence_of_ones_own_has_a_name_and_a_link(front: dict[str, Any], missing: bool) -> None:
    assert licence.is_missing(front) == missing


def test_without_a_licence_onnx_warns_and_push_refuses(tmp_path: Path, hub: HubServer) -> None:
    made = prepare(tmp_path, hub={})
    lines: list[str] = []
    from vlm_export import pipeline

    pipeline.run_export(made.recipe, made.work, lambda what, done, total: None, notify=lines.append)
    made.verify("ort")
    assert [line for line in lines if line.startswith("warning: ")] == [
        f"warning: {made.recipe.path}: {licence.NO_LICENCE}; push refuses it"
    ]
    for act in (gate.run_plan, gate.run_push):
        with pytest.raises(InputError, match=r"README.md: no licence: .* or push with --allow-unlicensed"):
            act(made.recipe, made.work, Destination(REPO))
    assert hub.requests == []
    assert gate.run_push(made.recipe, made.work, Destination(REPO), Allowed(unlicensed=True)).commit


# Paths of this machine


def test_no_file_that_is_published_names_a_folder_of_this_machine(verified: Exported) -> None:
    """Every byte of the repo, graphs too."""
    places = {str(place) for place in (verified.work.root, verified.recipe.path.parent, tempfile.gettempdir())}
    places |= {f"{Path.home()}/", str(Path(__file__).parents[1])}
    files = [path for path in verified.work.repo.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"onnx", "assets"}
    assert [(path.name, place) for path in files for place in places if place.encode() in path.read_bytes()] == []
    assert list(leaks(verified.work.repo, verified.recipe, verified.work.root)) == []


def test_the_published_recipe_is_one(verified: Exported) -> None:
    recipe = load_recipe(verified.work.repo / "recipe.yaml").recipe
    assert (recipe.model, recipe.tokenizer, recipe.golden.images) == ("checkpoint", "checkpoint", ("*.png",))
    own = verified.recipe.recipe
    assert replace(recipe, model=own.model, tokenizer=own.tokenizer, golden=own.golden) == own


def test_paths_become_names_and_ids(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--base" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    (tmp_path / "recipes" / "images").mkdir(parents=True)
    (tmp_path / "lora").mkdir()
    values = {
        "name": "a",
        "model": str(cached),
        "adapters": [{"path": "../lora"}, {"path": "org/lora", "revision": "main"}, {"path": "/not/there"}],
        "processor": "model",
        "golden": {"images": ["images/*.png", "../images/*.jpg", "~/photos/**/*.webp"]},
        "description": "One.\nTwo.\n",
    }
    path = tmp_path / "recipes" / "a.yaml"
    path.write_text(f"# {tmp_path}\n{yaml.safe_dump(values)}")
    text = published_recipe(load_recipe(path))
    made = yaml.safe_load(text)
    assert (made["model"], made["processor"]) == ("org/base", "model")
    assert [adapter["path"] for adapter in made["adapters"]] == ["lora", "org/lora", "there"]
    assert made["golden"]["images"] == ["images/*.png", "*.jpg", "*.webp"]
    assert "description: |\n  One.\n  Two.\n" in text and "#" not in text


def test_config_files_forget_where_they_were_loaded_from(tmp_path: Path) -> None:
    kept = {"_name_or_path": "org/base", "model_type": "gpt2", "chat_template": "/no path"}
    places = {
        "_name_or_path": "/home/me/model",
        "tokenizer_file": "C:\\models\\tokenizer.json",
        "vocab_file": "./vocab",
    }
    (tmp_path / "config.json").write_text(json.dumps({**kept, "text_config": {**places, "layers": [places]}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a_path": "/root"}))
    forget_folders(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**kept, "text_config": {"layers": [{}]}}
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"a_path": "/root"}


def test_a_description_that_names_a_folder_is_refused(verified: Exported, tmp_path: Path, hub: HubServer) -> None:
    made = verified.copy(tmp_path)
    path = made.work.repo / "README.md"
    path.write_text(f"{card(made)}\nTrained in {Path.home()}/runs.\n")
    for act in (gate.run_plan, gate.run_push):
        with pytest.raises(CheckFailed, match=rf"README.md: names {Path.home()}, a folder of this machine"):
            act(made.recipe, made.work, Destination(REPO), Allowed(unverified=True))
    assert hub.requests == []
