"""`vlm-export inspect`: what is said of checkpoints, adapters and repos, by their names, shapes and settings alone."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_decoders
import pico
import pico_chat
import pytest
from click.testing import CliRunner
from exported import prepare, silent
from hub_server import TOKEN, HubServer, environment
from test_chat_families import KINDS

from vlm_export import pipeline
from vlm_export.cli import main
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.families._known import layouts_of, module_names
from vlm_export.families.registry import find_family
from vlm_export.manifest import load_manifest
from vlm_export.paths import is_plainly_a_path
from vlm_export.quantize.estimate import Estimate
from vlm_export.source.checkpoint import build_empty, open_checkpoint
from vlm_export.spec.graph import Component
from vlm_export.start import inspection
from vlm_export.start.inspection import Adapter, Checkpoint, Repo, inspect
from vlm_export.start.named import find
from vlm_export.start.sizes import GRAPHS
from vlm_export.wanted import parse

ROOT = Path(__file__).parents[1]
# By model_type: each family's pico checkpoints.
WRITERS: dict[str, Callable[[Path], Path]] = {
    "prefix_conditioning_vlm": pico.write_checkpoint,
    "prefix_conditioning_vlm, gpt2": lambda folder: pico.write_checkpoint(folder, pico.config("gpt2")),
    "prefix_conditioning_vlm, untied": lambda folder: pico.write_checkpoint(folder, pico.config("qwen2", tied=False)),
    "prefix_conditioning_vlm, vit": lambda folder: pico.write_checkpoint(folder, pico.config(tower="vit")),
    **{
        f"vision-encoder-decoder, {decoder}": lambda folder, decoder=decoder: encoder_decoders.write_checkpoint(
            folder, encoder_decoders.config(decoder=decoder)
        )
        for decoder in encoder_decoders.DECODERS
    },
    **KINDS,
}


def said(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["inspect", *arguments])
    return done.exit_code, done.stdout, done.stderr


def checkpoint_of(folder: Path) -> Checkpoint:
    found = inspect(str(folder))
    assert isinstance(found, Checkpoint)
    return found


@pytest.mark.parametrize("module", module_names())
def test_layouts_are_told_as_the_family_declares_them(module: str) -> None:
    family = find_family(module, "test")
    assert layouts_of(family.model_type, "test") == tuple(family.layouts)


@pytest.mark.parametrize("kind", WRITERS)
def test_each_graph_is_told_the_weights_that_it_has(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "checkpoint")
    found, opened = checkpoint_of(folder), open_checkpoint(folder)
    model: Any = build_empty(opened)
    opened.family.trim(model)
    for name, layout in opened.family.layouts.items():
        components, graphs = layout.components(opened.config), GRAPHS[layout.joins or name]
        assert [component.name for component in components] == [graph.component for graph in graphs]
        assert [component.has_cache for component in components] == [graph.has_cache for graph in graphs]
        expected = found.expected(name, parse(["fp32"], ""))
        assert expected is not None
        for component, file in zip(components, expected.files, strict=True):
            weights = graph_weights(component, model)
            assert file.size_bytes - 100_000 == pytest.approx(4 * weights, rel=0.01), (name, component.name)


def graph_weights(component: Component, model: Any) -> int:
    """How many numbers the weights of a graph are; modules may hold a table, or all of a model, that no graph reads."""
    parameters = dict(component.module(model).named_parameters())
    parameters = {name: each for name, each in parameters.items() if ".vision_model.head." not in name}
    tables = {name: each for name, each in parameters.items() if name.endswith((".embed_tokens.weight", ".wte.weight"))}
    if component.name == "embed_tokens":
        parameters = tables
    elif feeds_embeddings(component) and any(name.endswith("lm_head.weight") for name in parameters):
        parameters = {name: each for name, each in parameters.items() if name not in tables}  # the head is its own
    return sum(each.numel() for each in parameters.values())


def feeds_embeddings(component: Component) -> bool:
    return any(spec.name == "inputs_embeds" for spec in component.inputs)


def test_sizes_and_needs_are_those_that_onnx_tells_from_the_graphs(tmp_path: Path) -> None:
    made = prepare(tmp_path)
    exact: list[Estimate] = []
    dtypes = ("fp32", "q8", "q4", "q4f16")
    pipeline.run_export(made.recipe, made.work, silent, wanted=parse(dtypes, ""), announce=exact.append)
    found = checkpoint_of(tmp_path / "checkpoint").expected("captioner", parse(dtypes, ""))
    assert found is not None
    assert [file.file for file in found.files] == [file.file for file in exact[0].files]
    assert found.memory_bytes == exact[0].memory_bytes
    assert found.calibration_memory_bytes == pytest.approx(exact[0].calibration_memory_bytes, rel=0.01)
    assert found.seconds == pytest.approx(exact[0].seconds, rel=0.02)
    assert found.disk_bytes == pytest.approx(exact[0].disk_bytes, rel=0.03)


def test_sizes_of_the_bundled_captioner(default_repo: Path) -> None:
    """The graphs weigh some megabytes, so that what is beside their weights is little."""
    found = inspection.sizes_of(checkpoint_of(ROOT / "recipes" / "shapes-captioner" / "checkpoint"))["captioner"]
    for dtype in ("fp32", "q8"):
        written = sum(graph.size_bytes for graph in load_manifest(default_repo).graphs if graph.dtype == dtype)
        assert found[dtype] == pytest.approx(written, abs=200_000), dtype


def test_a_checkpoint_with_lora_inside(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    status, out, err = said(str(folder))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{folder}: a checkpoint of the family prefix_conditioning_vlm"
    assert "LoRA inside: rank 4, alpha 8, on 8 modules: k_proj (2), o_proj (2), q_proj (2), v_proj (2)" in lines
    assert "the head is the token table (tied)" in lines
    assert any(line.split()[:2] == ["not", "used"] for line in lines), "the tower's pooling head"
    assert any(line.startswith("can be exported in  as captioner") for line in lines)
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in DTYPES] == list(DTYPES)
    assert lines[-1] == f"next: vlm-export init {folder}"
    assert max(map(len, lines[1:-1])) <= 100


def test_a_table_that_is_none_is_told_all_the_same(tmp_path: Path) -> None:
    """No weights are read: `merge` says that its shape is not the config's."""
    pico.write_checkpoint(tmp_path / "base", pico.config(), lora=False)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "base" / "model.safetensors")
    key = "language_model.model.embed_tokens.weight"
    save_file({**tensors, key: tensors[key].reshape(-1)}, tmp_path / "base" / "model.safetensors")
    status, told, _ = said(str(tmp_path / "base"))
    assert status == 0 and "token table" in told


def test_as_json(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    status, out, _ = said(str(folder), "--json")
    found = json.loads(out)
    assert (status, found["kind"], found["tied_head"], found["lora"]["ranks"]) == (0, "checkpoint", True, [4])
    assert found["layouts"] == ["captioner", "chat", "components", "single"]
    assert set(found["sizes_bytes"]) == set(found["layouts"]) and set(found["sizes_bytes"]["chat"]) == set(DTYPES)
    parameters = {part["name"]: part["parameters"] for part in found["parts"]}
    assert parameters["token table"] == pico.VOCABULARY * 32
    assert found["estimate"]["memory_bytes"] > 700 << 20 and found["machine"]["disk_bytes"] > 0


def test_a_quantized_checkpoint_tells_no_sizes(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint", lora=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    lines = said(str(folder))[1].splitlines()
    assert "quantized with gptq: sizes are known once it is merged (`base: dequantized`)" in lines
    found = json.loads(said(str(folder), "--json")[1])
    assert (found["quantized"], found["estimate"], found["sizes_bytes"]) == ("gptq", None, {})


def test_an_adapter(tmp_path: Path) -> None:
    settings = pico.config()
    base = pico.write_checkpoint(tmp_path / "base", settings, lora=False)
    options = {"modules_to_save": ["projection"], "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    adapter = pico.write_peft_adapter(tmp_path / "adapter", settings, **options)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    found = inspect(str(adapter))
    assert isinstance(found, Adapter)
    assert (found.lora.ranks, found.lora.alpha, found.lora.saved) == ((4,), 8, ("projection",))
    assert set(found.lora.targets) == {"q_proj", "v_proj"} and found.lora.kinds == ("rank-stabilized",)
    status, out, _ = said(str(adapter))
    assert (status, out.splitlines()[-1]) == (0, f"next: vlm-export init {base} {adapter}")
    assert f"trained on: {base}" in out.splitlines()


def test_an_adapter_that_cannot_be_merged(tmp_path: Path) -> None:
    adapter = pico.write_peft_adapter(tmp_path / "adapter", pico.config())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    status, out, _ = said(str(adapter))
    assert status == 0
    assert out.splitlines()[-1].startswith("cannot be merged: init_lora_weights: 'pissa' changes the base weights")


def test_an_exported_repo_and_the_work_folder_around_it(default_repo: Path) -> None:
    manifest = load_manifest(default_repo)
    for folder in (default_repo, default_repo.parent):
        found = inspect(str(folder))
        assert isinstance(found, Repo)
        assert (found.graphs.layout, found.graphs.recipe, found.graphs.dtypes) == (
            "captioner",
            "shapes-captioner",
            ("fp32", "q8"),
        )
        assert found.graphs.size_bytes == sum(graph.size_bytes for graph in manifest.graphs)
        status, out, _ = said(str(folder))
        assert (status, out.splitlines()[-1]) == (0, f"next: vlm-export doctor {folder}")


def test_a_repo_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "modeling_own.py").write_text("")
    for name, count in {"decoder_model_merged_q4f16.onnx": 3, "decoder_model_merged_q4f16.onnx_data": 7}.items():
        (tmp_path / "onnx" / name).write_bytes(bytes(count))
    found = inspect(str(tmp_path))
    assert isinstance(found, Repo)
    assert (found.graphs.graphs, found.graphs.layout) == ({"decoder_model_merged": {"q4f16": 10}}, "chat")
    assert said(str(tmp_path))[1].splitlines()[0].endswith("an exported llava (chat), not made by vlm-export")


def test_of_the_hub_kilobytes_are_fetched(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    upload = (
        "import sys; from pathlib import Path; from vlm_export import hub;"
        "hub.push_folder('acme/pico', Path(sys.argv[1]), message='stand-in')"
    )
    with HubServer(tmp_path / "hub") as hub:
        environ = os.environ | environment(hub.url, tmp_path / "home", TOKEN)
        subprocess.run([sys.executable, "-c", upload, str(folder)], env=environ, check=True)
        command = [sys.executable, "-m", "vlm_export", "inspect", "acme/pico", "--json"]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["reference"], len(found["commit"])) == ("acme/pico", 40)
    assert found["sizes_bytes"] == json.loads(said(str(folder), "--json")[1])["sizes_bytes"]
    assert done.stderr == "no folder acme/pico here: asking the Hub for the files that describe it\n"
    assert not list((tmp_path / "home").rglob("model.safetensors")), "no weights"


WRONG = {
    "checkpont": "no such folder: checkpont; did you mean checkpoint?",
    "./checkpont/": "no such folder: ./checkpont/; did you mean checkpoint?",
    "runs/on": "no such folder: runs/on; did you mean runs/one?",
    "rnus/one": "no such folder: rnus/one; did you mean runs/one?",
    "nothing-like-it": "no such folder: nothing-like-it",
    "/no/such/place": "no such folder: /no/such/place",
    "empty": "empty: no config.json, adapter_config.json or onnx/: neither a model, an adapter nor an exported repo",
    "trainer": "trainer: holds checkpoint-100, checkpoint-20: name one of these folders",
    "bert": "bert/config.json: model_type 'bert' is not supported; `vlm-export recipes` lists the families that are",
    "own": "own/config.json: model_type 'own' is not supported; `vlm-export recipes` lists the families that are; "
    "the code that its auto_map names is "
    "run with `trust_remote_code: true` and a full commit as `revision`",
    "weightless": "weightless: no model.safetensors (nor model.safetensors.index.json, pytorch_model.bin); "
    "save the weights as safetensors",
    "notes.txt": "notes.txt: is a file: name the folder of a model, an adapter or an exported repo",
    "shapeless": "shapeless/model.safetensors: not a readable safetensors file: a tensor without dtype or shape",
    "damaged": "damaged/model.safetensors: not a readable safetensors file: unpack requires a buffer of 8 bytes",
}


@pytest.mark.parametrize("reference", WRONG)
def test_wrong_input_is_one_line(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint", "runs/one", "empty", "trainer/checkpoint-20", "trainer/checkpoint-100"):
        (tmp_path / name).mkdir(parents=True)
    for name, model_type in {"bert": "bert", "weightless": "llava", "damaged": "llava", "shapeless": "llava"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "own", "auto_map": {}}')
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"none")
    (tmp_path / "shapeless" / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b'{"a":{}}')
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    status, out, err = said(reference)
    assert (status, out, err) == (2, "", f"error: {WRONG[reference]}\n")


def test_a_folder_with_a_name_like_an_organisations_is_no_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "HuggingFace").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_plainly_a_path("HuggingFaceTB/SmolVLM-256M-Instruct")
    assert is_plainly_a_path("HuggingFace/SmolVLM-256M-Instruct")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="a link that leads out of"):
        inspect(str(folder))


def test_pickles_are_read_too(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    before = checkpoint_of(folder).parts
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoint_of(folder).parts == before


def test_it_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    folder = pico_chat.write_llava(tmp_path / "checkpoint")
    script = (
        "import sys; from vlm_export.cli import main; main(['inspect', sys.argv[1]], standalone_mode=False);"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - started < 10, "seconds, where a heavy import takes several on a busy machine"


def test_a_file_of_weights_stands_for_its_folder(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "checkpoint")
    assert find(str(folder / "model.safetensors")).path == folder
