"""A conversion runs again what has changed, and what comes of that; what is planted in each input is seen."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import yaml
from click.testing import CliRunner, Result
from exported import write_images
from safetensors.torch import load_file, save_file

from vlm_export.cli import main
from vlm_export.fingerprint import RECORD, Record
from vlm_export.manifest import MANIFEST
from vlm_export.start import stages

CONVERT = ("convert", "pico.yaml", "--runtime", "ort")


def converted(folder: Path, *more: str) -> set[str]:
    """Convert in a folder. Returns the stages that ran; of `verify`, whether anything was looked at anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main, [*CONVERT, *more])
    assert done.exit_code == 0, done.stderr + done.stdout
    told = set(re.findall(r"^(golden|merge|onnx): done in ", done.stderr, re.MULTILINE))
    skipped = set(re.findall(r"^(golden|merge|onnx): nothing changed since [-\d]+ [:\d]+; skipped$", done.stderr, re.M))
    assert told | skipped == {"golden", "merge", "onnx"} and not told & skipped
    return told if "verify: unchanged since it passed: fp32 in ort" in done.stderr else told | {"verify"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with an adapter of its own; it ran every stage."""
    folder = tmp_path_factory.mktemp("first")
    pico.write_checkpoint(folder / "checkpoint", lora=False)
    pico.write_peft_adapter(folder / "adapter", pico.config())
    write_images(folder / "images")
    recipe = {
        "name": "pico",
        "model": "./checkpoint",
        "adapters": [{"path": "./adapter"}],
        "generation": {"max_new_tokens": 4},
        "golden": {"images": ["images/*.png"]},
        "hub": {"license": "mit"},
    }
    (folder / "pico.yaml").write_text(yaml.safe_dump(recipe))
    assert converted(folder) == {"golden", "merge", "onnx", "verify"}
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    """A copy that a test may change: it is another folder, of the same contents."""
    return Path(shutil.copytree(first, tmp_path / "place"))


def recipe_key(section: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        recipe = yaml.safe_load((folder / "pico.yaml").read_text())
        recipe[section] = {**recipe.get(section, {}), **values}
        (folder / "pico.yaml").write_text(yaml.safe_dump(recipe))

    return change


def weights(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        [file] = (folder / name).glob("*.safetensors")
        save_file({key: tensor * 1.01 for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    return change


def another_image(folder: Path) -> None:
    shutil.copy(folder / "images" / "0.png", folder / "images" / "1.png")


def end_of_a_graph(folder: Path) -> None:
    graph = folder / "build" / "pico" / "repo" / "onnx" / "encoder_model.onnx"
    graph.write_bytes(graph.read_bytes()[:-3000] + bytes(3000))


def no_merged_weights(folder: Path) -> None:
    shutil.rmtree(folder / "build" / "pico" / "merged")


def later(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file)


def a_damaged_record(folder: Path) -> None:
    (folder / "build" / "pico" / RECORD).write_text('{"schema": 1, "stages": [')


EVERYTHING = {"golden", "merge", "onnx", "verify"}
CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "nothing": (lambda folder: None, set()),
    "only the times of files": (later, set()),
    "the licence": (recipe_key("hub", license="apache-2.0"), {"onnx", "verify"}),
    "how many tokens": (recipe_key("generation", max_new_tokens=3), {"golden", "onnx", "verify"}),
    "the model's weights": (weights("checkpoint"), EVERYTHING),
    "the adapter": (weights("adapter"), EVERYTHING),
    "a golden image": (another_image, {"golden", "onnx", "verify"}),
    "a graph": (end_of_a_graph, {"onnx"}),
    "what was merged": (no_merged_weights, {"merge"}),
    "the record": (a_damaged_record, {"golden", "merge", "onnx"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_runs_again(what: str, place: Path) -> None:
    change, expected = CHANGES[what]
    change(place)
    assert converted(place) == expected
    assert converted(place) == set()


def test_another_version_runs_everything_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "version", lambda name: "0.0.0")
    assert converted(place) - {"verify"} == {"golden", "merge", "onnx"}


def test_again_runs_everything(place: Path) -> None:
    assert converted(place, "--again") == EVERYTHING


ALONE = {"golden": "written to golden/pico", "merge": "written to build/pico/merged", "onnx": "encoder_model.onnx "}


def alone(folder: Path, *arguments: str) -> Result:
    """A command typed alone in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.stderr + done.stdout
    return done


@pytest.mark.parametrize("stage", ALONE)
def test_a_stage_that_is_typed_alone_is_skipped_and_still_prints_its_result(stage: str, place: Path) -> None:
    done = alone(place, stage, "pico.yaml")
    assert re.fullmatch(rf"{stage}: nothing changed since [-\d]+ [:\d]+; skipped", done.stderr.strip())
    assert ALONE[stage] in done.stdout and "\nnext: " in done.stdout
    assert isinstance(json.loads(alone(place, stage, "pico.yaml", "--json").stdout), dict)


@pytest.mark.parametrize("stage", ALONE)
def test_again_runs_a_stage_that_is_typed_alone(stage: str, place: Path) -> None:
    done = alone(place, stage, "pico.yaml", "--again")
    assert "skipped" not in done.stderr and ALONE[stage] in done.stdout
    assert converted(place) == set()


def test_a_stage_that_is_typed_alone_counts_for_the_others(place: Path) -> None:
    weights("adapter")(place)
    for stage in ALONE:
        assert "skipped" not in alone(place, stage, "pico.yaml").stderr
        assert "skipped" in alone(place, stage, "pico.yaml").stderr
    assert converted(place) == {"verify"}


def test_other_options_are_another_result(place: Path) -> None:
    assert "skipped" not in alone(place, "onnx", "pico.yaml", "--quantize", "q8").stderr
    assert "skipped" in alone(place, "onnx", "pico.yaml", "--quantize", "q8").stderr
    assert "skipped" not in alone(place, "onnx", "pico.yaml", "--memory", "30GB").stderr
    assert "skipped" not in alone(place, "merge", "pico.yaml", "--base", "dequantized").stderr
    assert "skipped" not in alone(place, "merge", "pico.yaml").stderr


def test_what_lacked_memory_is_tried_again(place: Path) -> None:
    manifest = place / "build" / "pico" / "repo" / MANIFEST
    values = json.loads(manifest.read_text())
    values["graphs"][0]["rounded"] = True
    manifest.write_text(json.dumps(values))
    assert "skipped" not in alone(place, "onnx", "pico.yaml").stderr
    assert "skipped" in alone(place, "onnx", "pico.yaml").stderr


def test_other_dtypes_are_another_export(place: Path) -> None:
    assert "onnx" in converted(place, "--quantize", "fp32")


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    record = Record(tmp_path)
    record.done("merge", {"files": record.digests([tmp_path / "a"])}, {"b": "0"})
    kept = json.loads((tmp_path / RECORD).read_text())
    kept["files"][str(tmp_path / "a")][2] = "as it was read"
    (tmp_path / RECORD).write_text(json.dumps(kept))
    assert Record(tmp_path).digests([tmp_path / "a"]) == {"0 a": "as it was read"}
    (tmp_path / "a").write_text("ab")
    assert Record(tmp_path).digests([tmp_path / "a"]) != {"0 a": "as it was read"}
