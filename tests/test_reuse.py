"""`verify` takes over what passed and is unchanged, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from exported import Exported, prepare, silent

from vlm_export import pipeline
from vlm_export.cli import main
from vlm_export.files import read_json, write_json
from vlm_export.targets import Target
from vlm_export.verify.report import Report

ALL = ["fp32 in ort", "q8 in ort"]


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("verified"))
    made.export("captioner", ["q8"])
    assert verify(made).reused == []
    return made


@pytest.fixture
def made(verified: Exported, tmp_path: Path) -> Exported:
    """A copy that the test may change."""
    return verified.copy(tmp_path / "copy")


def verify(made: Exported, runtimes: Sequence[Target] = ("ort",)) -> Report:
    return pipeline.run_verify(made.recipe, made.work, silent, runtimes=runtimes, reusing=True)


def test_nothing_changed(verified: Exported) -> None:
    first = json.loads((verified.work.report / "report.json").read_text())
    again = verify(verified)
    assert again.reused == ALL
    second = json.loads((verified.work.report / "report.json").read_text())
    changed = {name for name in first if first[name] != second[name]}
    assert changed <= {"reused", "files_sha256", "checks"}
    by_name = [sorted(each["checks"], key=json.dumps) for each in (first, second)]
    assert by_name[0] == by_name[1]


def test_another_graph(made: Exported) -> None:
    """The dtype is verified anew, and float32, which it is compared with."""
    path = made.graph("decoder_model_merged_quantized")
    model = ir.load(path)
    model.doc_string = "touched"
    ir.save(model, path)
    assert verify(made).reused == []
    assert verify(made).reused == ALL


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_another_file_of_the_repo(made: Exported, name: str) -> None:
    path = made.work.repo / name
    write_json(path, read_json(path) | {"processor_class": "changed"})
    assert verify(made).reused == []


def test_another_limit(made: Exported) -> None:
    tolerances = made.recipe.recipe.tolerances[:-1]
    changed = replace(made.recipe, recipe=replace(made.recipe.recipe, tolerances=tolerances))
    assert verify(Exported(changed, made.work)).reused == []


def test_what_failed_is_verified_anew(made: Exported) -> None:
    path = made.graph("encoder_model_quantized")
    path.write_bytes(made.graph("decoder_model_merged_quantized").read_bytes())
    assert verify(made).verdict == "fail"
    again = verify(made)
    assert again.verdict == "fail"
    assert again.reused == []  # float32 comes along with any other dtype


@pytest.mark.node
def test_another_runtime_is_done_alone(made: Exported) -> None:
    both = verify(made, ("ort", "node"))
    assert both.reused == ALL
    assert {check.runtime for check in both.checks} == {"ort", "node"}
    again = verify(made, ("ort", "node"))
    assert again.reused == [*ALL, "fp32 in node", "q8 in node"]
    assert any(name.startswith("node: ") for name in again.versions)


def test_the_command(verified: Exported) -> None:
    command = ["verify", str(verified.recipe.path), "--work", str(verified.work.root), "--runtime", "ort"]
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 0, said.output
    assert "unchanged since it passed: fp32 in ort, q8 in ort" in said.output
    said = CliRunner().invoke(main, [*command, "--again"])
    assert said.exit_code == 0 and "unchanged" not in said.output
