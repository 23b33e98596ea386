"""Bills of materials: valid as CycloneDX's own validator has it, complete, and the same of the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from vlm_export.manifest import Manifest
from vlm_export.publish.sbom import of_export

ROOT = Path(__file__).parents[1]
DIGEST = "ab" * 32
COMMITS = {"model": f"org/base@{'c' * 40}", "adapters.0": f"org/lora@{'d' * 40}", "tokenizer": f"org/base@{'c' * 40}"}


def manifest(**changed: Any) -> Manifest:
    values: dict[str, Any] = {
        "recipe": "captioner",
        "layout": "captioner",
        "dtypes": ["fp32"],
        "graphs": [],
        "simplified": {},
        "inputs_sha256": {"model/model.safetensors": DIGEST, "adapter/adapter_model.safetensors": DIGEST},
        "commits": COMMITS,
        "versions": {"vlm-export": "0.1.0", "torch": "2.13.0+cpu"},
    }
    return Manifest(**{**values, **changed})


def problems(made: Mapping[str, Any]) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made))


def test_of_an_export() -> None:
    made = of_export(manifest(), {"onnx/encoder_model.onnx": DIGEST, "config.json": DIGEST})
    assert problems(made) is None
    names = [part["name"] for part in made["components"]]
    assert names == [
        *("org/base", "org/lora"),
        *("model/model.safetensors", "adapter/adapter_model.safetensors", "vlm-export", "torch"),
    ]
    assert made["components"][0]["purl"] == f"pkg:huggingface/org/base@{'c' * 40}"
    assert made["components"][-1]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert [part["name"] for part in made["metadata"]["component"]["components"]] == [
        "onnx/encoder_model.onnx",
        "config.json",
    ]
    known = {part["bom-ref"] for part in made["components"]}
    assert set(made["dependencies"][0]["dependsOn"]) == known and len(known) == len(names)


def test_of_the_same_it_is_the_same() -> None:
    first, again = (of_export(manifest(), {}) for _ in range(2))
    assert first == again
    other = of_export(manifest(recipe="other"), {})
    assert other["serialNumber"] != first["serialNumber"]


def test_a_wrong_one_is_seen() -> None:
    made = of_export(manifest(), {"x": "no digest"})
    assert problems(made) is not None


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom_script", ROOT / "scripts" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_of_the_package(script: ModuleType) -> None:
    made = script.of_package()
    assert problems(made) is None
    addresses = {part["purl"] for part in made["components"]}
    assert any(one.startswith("pkg:pypi/onnxruntime@") for one in addresses)
    assert any(one.startswith("pkg:npm/%40huggingface/transformers@") for one in addresses)
    assert all(part["hashes"] for part in made["components"])
