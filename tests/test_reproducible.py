"""The same inputs give the same bytes: in another folder, by other hashes of strings, threads and kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pico_chat
import pytest
from exported import Exported, prepare, record

from vlm_export.files import MERGE_REPORT, file_hashes, read_json

DTYPES = ["q8", "q4", "fp16"]
# How far two ways to compute the same are apart: noise of the kernels, in what `merge` reports and nothing is made of.
DISTANCES = ("max_relative_diff_vs_adapter", "max_relative_diff_vs_base", "max_layer_error", "worst_layer")
# PyTorch as on a processor that adds in another order.
KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
# Merged and exported in a process of its own, from the folder of the recipe, on one core but with two threads in torch.
_AGAIN = """
import os, sys
from pathlib import Path
import torch
from vlm_export import pipeline
from vlm_export.files import Work
from vlm_export.recipe import load_recipe

torch.set_num_threads(2)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
for folder in sys.argv[1:]:
    os.chdir(folder)
    recipe, work = load_recipe(Path("pico.yaml")), Work(Path("elsewhere"))
    pipeline.run_merge(recipe, work, lambda *_: None)
    pipeline.run_export(recipe, work, lambda *_: None)
"""


def captioner(folder: Path) -> Exported:
    """With its own LoRA, in the dtypes whose numbers are chosen in three ways."""
    return prepare(folder, dtypes=DTYPES)


def chat(folder: Path) -> Exported:
    """With an adapter beside it, which PEFT wrote."""
    pico_chat.write_llava(folder / "checkpoint")
    pico_chat.write_adapter(folder / "adapter", folder / "checkpoint")
    golden = {"images": ["images/*.png"], "prompts": [pico_chat.CONVERSATION]}
    return record(folder, adapters=[{"path": "./adapter"}], layout="chat", dtypes=DTYPES, golden=golden)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By kind of model, the work folder of each of two conversions of one recipe."""
    root = tmp_path_factory.mktemp("twice")
    made = {}
    for write in (captioner, chat):
        (root / write.__name__).mkdir()
        first = write(root / write.__name__)
        first.export(first.recipe.recipe.layout)
        second = root / "another" / "folder" / write.__name__
        shutil.copytree(root / write.__name__, second, ignore=shutil.ignore_patterns("work"))
        made[write.__name__] = first.work.root, second / "elsewhere"
    environment = {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "VLM_EXPORT_STRUCTURES": str(root / "traced")}
    command = [sys.executable, "-c", _AGAIN, *(str(second.parent) for _, second in made.values())]
    subprocess.run(command, env={**os.environ, **environment, **KERNELS}, check=True, timeout=600)
    return made


@pytest.mark.parametrize("kind", ["captioner", "chat"])
def test_two_conversions_are_the_same_bytes(kind: str, twice: dict[str, tuple[Path, Path]]) -> None:
    first, second = twice[kind]
    proofs = [read_json(work / "merged" / MERGE_REPORT) for work in (first, second)]
    assert [{**proof, **dict.fromkeys(DISTANCES)} for proof in proofs] == [proofs[0] | dict.fromkeys(DISTANCES)] * 2
    for folder in ("merged", "repo"):
        found, again = (file_hashes(work / folder) for work in (first, second))
        for each in (found, again):
            each.pop(MERGE_REPORT, None)
        assert found == again and len(found) >= 4
    graphs = {name for name in found if name.endswith(".onnx")}
    for suffix in ("", "_quantized", "_q4", "_fp16"):
        assert f"onnx/decoder_model_merged{suffix}.onnx" in graphs


@pytest.mark.parametrize("kind", ["captioner", "chat"])
def test_no_file_names_the_folder_it_was_made_in(kind: str, twice: dict[str, tuple[Path, Path]]) -> None:
    first, _ = twice[kind]
    for path in (first / "repo").rglob("*"):
        if path.is_file():
            assert os.fsencode(first.parent) not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["captioner", "chat"])
def test_what_depends_on_the_kernels_of_a_processor_is_told_in_few_digits(
    kind: str, twice: dict[str, tuple[Path, Path]]
) -> None:
    """The largest numbers are those that ONNX Runtime computed: the last digits are the processor's."""
    manifest = json.loads((twice[kind][0] / "repo" / "export.json").read_text())
    assert manifest["ranges"]
    for found in manifest["ranges"].values():
        for value in (found["largest"], found["headroom"]):
            assert value == float(f"{value:.3g}")
