"""vlm_export.merging.merge: merged weights are an independent sum's and PEFT's; every planted fault is named."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pico
import pico_chat
import pytest
import torch
from pico import Tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlm_export.errors import CheckFailed, InputError
from vlm_export.merging import adapter_kinds
from vlm_export.merging import merge as merging
from vlm_export.merging.adapters import Attached
from vlm_export.merging.merge import attach, merge
from vlm_export.models.prefix import PrefixConditioningVLM
from vlm_export.recipe import Combination
from vlm_export.tensors import safetensors_writer
from vlm_export.tensors.safetensors_writer import Entry

KINDS = {
    "llama, linear, tied": pico.config(),
    "llama, mlp, untied": pico.config(projection="mlp", tied=False),
    "gpt2, linear, tied": pico.config("gpt2"),
    "gpt2, mlp, untied": pico.config("gpt2", projection="mlp", tied=False),
}
TIED, UNTIED, GPT2 = KINDS["llama, linear, tied"], pico.config(tied=False), KINDS["gpt2, linear, tied"]
LAYER = "language_model.base_model.model.model.layers.0.self_attn"
Q = f"{LAYER}.q_proj.base_layer.weight"
A, B = (f"{LAYER}.q_proj.lora_{part}.default.weight" for part in "AB")
EMBEDDING = "language_model.base_model.model.model.embed_tokens.weight"
HEAD = "language_model.base_model.model.lm_head.weight"
TOWER = "vision_encoder.vision_model.encoder.layers.0.self_attn.q_proj.weight"
PEFT_Q = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj"]

Change = Callable[[Tensors], None]


# --- what the tests compare with: nothing of the package but the bare module ---


def by_hand(folder: Path) -> Tensors:
    """A distilvit2 checkpoint merged here: `W + alpha / r · B A` in float64, under transformers 5's names."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    merged = {}
    for key, tensor in tensors.items():
        if ".lora_" in key or ".head." in key:
            continue
        if key.endswith(".base_layer.weight"):
            a, b = (tensors[key.replace("base_layer", f"lora_{part}.default")].double() for part in "AB")
            delta = config["lora_alpha"] / config["lora_r"] * (b @ a)
            conv1d = config["text_config"]["model_type"] == "gpt2"
            tensor = tensor.double() + (delta.T if conv1d else delta)
        name = key.replace("vision_encoder.vision_model.", "vision_encoder.")
        name = name.replace("language_model.base_model.model.", "language_model.").replace(".base_layer.", ".")
        merged[name] = tensor
    return merged


def load_plain(folder: Path, settings: dict[str, Any]) -> PrefixConditioningVLM:
    """A checkpoint without LoRA, loaded by torch."""
    model = PrefixConditioningVLM(settings)
    result = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    head = ["language_model.lm_head.weight"] if settings["text_config"]["tie_word_embeddings"] else []
    assert result.missing_keys == head
    return model.eval()


def load_distilvit2(folder: Path, settings: dict[str, Any]) -> PrefixConditioningVLM:
    """A distilvit2 checkpoint, loaded by torch into what distilvit2 trains: PEFT around the language model."""
    model = PrefixConditioningVLM(settings)
    targets = pico.TARGETS[settings["text_config"]["model_type"]]
    config = peft.LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=targets)
    model.language_model = peft.get_peft_model(model.language_model, config)
    tensors = load_file(folder / "model.safetensors")
    names = {key: key.replace("vision_encoder.vision_model.", "vision_encoder.") for key in tensors}
    result = model.load_state_dict({name: tensors[key] for key, name in names.items() if ".head." not in key}, False)
    assert not result.unexpected_keys
    assert all("lm_head" in key for key in result.missing_keys)
    return model.eval()


def peft_merged(model: PrefixConditioningVLM, root: str, adapter: Path) -> PrefixConditioningVLM:
    peft.PeftModel.from_pretrained(model.get_submodule(root), str(adapter)).merge_and_unload()
    return model.eval()


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    pixel_values = torch.randn(3, 3, 16, 16, generator=generator)
    return model(pixel_values, torch.randint(pico.VOCABULARY, (3, 5), generator=generator))


def assert_equal_models(merged: Path, settings: dict[str, Any], expected: PrefixConditioningVLM) -> None:
    """Same weights and same logits, within rounding."""
    model = load_plain(merged, settings)
    names = dict(expected.named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, names[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=0)


BESIDE = ("tokenizer.json", "tokenizer_config.json")  # the weights


# --- checkpoints and adapters, written once, and copies of them with faults ---


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tied` and `untied`: distilvit2 checkpoints; `base`: plain, untied; `whole`, `language`: adapters for `base`."""
    folder = tmp_path_factory.mktemp("disk")
    pico.write_checkpoint(folder / "tied", TIED)
    pico.write_checkpoint(folder / "untied", UNTIED)
    pico.write_checkpoint(folder / "base", UNTIED, lora=False)
    save_adapter(folder / "whole", UNTIED)
    save_adapter(folder / "language", UNTIED, "language_model", seed=2)
    return folder


def save_adapter(
    folder: Path, settings: dict[str, Any], root: str = "", *, seed: int = 1, std: float = 0.2, **lora: Any
) -> Path:
    """A folder that PEFT writes, of an adapter attached to the submodule `root`, all that it trains being random."""
    model = PrefixConditioningVLM(settings)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **lora}
    wrapped = peft.get_peft_model(model.get_submodule(root), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    wrapped.save_pretrained(folder)
    return folder


def spoiled(
    source: Path, target: Path, change: Change = lambda _: None, settings: Callable[[dict[str, Any]], Any] | None = None
) -> Path:
    """A copy of a checkpoint or adapter folder, its tensors and its config changed."""
    shutil.copytree(source, target)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, weights)
    if settings:
        file = next(file for file in (target / "adapter_config.json", target / "config.json") if file.is_file())
        values = json.loads(file.read_text())
        settings(values)
        file.write_text(json.dumps(values))
    return target


def refused(path: Path, adapters: list[Path], work: Path, error: type[Exception] = InputError) -> str:
    """The message of a merge that is refused and leaves nothing behind."""
    with pytest.raises(error) as caught:
        merge(path, adapters, work / "merged")
    assert not work.exists() or list(work.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what a merge computes ---


@pytest.mark.parametrize("kind", KINDS)
def test_distilvit2_checkpoint(kind: str, tmp_path: Path) -> None:
    settings = KINDS[kind]
    source = pico.write_checkpoint(tmp_path / "source", settings)
    report = merge(source, [], tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), by_hand(source)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=1e-6, rtol=1e-6)
    wrapped = load_distilvit2(source, settings)
    adapted = logits(wrapped)
    wrapped.language_model = wrapped.language_model.merge_and_unload()
    assert_equal_models(tmp_path / "merged", settings, wrapped)
    assert (logits(load_plain(tmp_path / "merged", settings)) - adapted).abs().max() < 1e-4
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter <= 1e-5
    assert report.max_relative_diff_vs_base is not None and report.max_relative_diff_vs_base > 0.1


def test_report(disk: Path, tmp_path: Path) -> None:
    report = merge(disk / "tied", [], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == asdict(report)
    stored, expected = load_file(disk / "tied" / "model.safetensors"), by_hand(disk / "tied")
    assert report.adapter_tensors == len([key for key in stored if ".lora_" in key]) == 16
    assert report.unused == sorted(key for key in stored if ".head." in key) != []
    assert report.tied == {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    assert report.parameters == sum(tensor.numel() for tensor in expected.values())
    assert report.layers.keys() == {
        f"language_model.model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in pico.TARGETS["llama"]
    }
    for module, ratio in report.layers.items():
        key = module.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"
        weight = stored[key].double()
        assert ratio == pytest.approx(float((expected[f"{module}.weight"] - weight).norm() / weight.norm()), rel=1e-5)
    assert report.inputs_sha256 == {
        f"tied/{name}": hashlib.sha256((disk / "tied" / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors", *BESIDE)
    }


def test_merged_folder_is_a_plain_checkpoint(disk: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    merge(disk / "tied", [], tmp_path / "merged", on_tensor=lambda done, total: counts.append((done, total)))
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [key for key in config if key.startswith("lora_")]
    total = len(load_file(tmp_path / "merged" / "model.safetensors"))
    assert counts == [(done, total) for done in range(1, total + 1)]
    again = merge(tmp_path / "merged", [], tmp_path / "again")
    assert (again.adapter_tensors, again.max_relative_diff_vs_adapter, again.max_relative_diff_vs_base) == (
        0,
        None,
        None,
    )
    first, second = (tmp_path / name / "model.safetensors" for name in ("merged", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_half_precision_is_kept_where_nothing_is_added(dtype: torch.dtype, disk: Path, tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    source = spoiled(disk / "tied", tmp_path / "source", cast)
    report = merge(source, [], tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), by_hand(source)
    adapted = {f"{name}.weight" for name in report.layers}
    assert {tensor.dtype for name, tensor in merged.items() if name not in adapted} == {dtype}
    assert {merged[name].dtype for name in adapted} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter < 1e-5
    assert all(torch.allclose(t.double(), expected[name].double(), rtol=1e-6, atol=1e-6) for name, t in merged.items())


def rename(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def add_module_prefix(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


def drop_pooling_head(tensors: Tensors) -> None:
    for key in [key for key in tensors if ".head." in key]:
        del tensors[key]


SPELLINGS: dict[str, Change] = {
    "module. of DataParallel": add_module_prefix,
    "transformers 5's tower": lambda t: rename(t, "vision_encoder.vision_model.", "vision_encoder."),
    "without the pooling head": drop_pooling_head,
    "another adapter name": lambda t: rename(t, ".default.", ".captions-2."),
    "without an adapter name": lambda t: rename(t, ".default.", "."),
    "language model not wrapped": lambda t: rename(t, "language_model.base_model.model.", "language_model."),
    "head in the place of the embedding": lambda t: rename(t, EMBEDDING, HEAD),
    "head beside the embedding, equal": lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
    "buffers of older transformers": lambda t: t.update(
        {
            "vision_encoder.vision_model.embeddings.position_ids": torch.arange(4)[None],
            f"{LAYER}.rotary_emb.inv_freq": torch.ones(4),
        }
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_checkpoint(spelling: str, disk: Path, tmp_path: Path) -> None:
    merge(spoiled(disk / "tied", tmp_path / "source", SPELLINGS[spelling]), [], tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), by_hand(disk / "tied")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=1e-6, rtol=1e-6)


def shard(folder: Path, count: int = 3) -> Path:
    """Split `model.safetensors`, with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    files = {key: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(files.values()):
        save_file({key: tensors[key] for key in files if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return folder


def test_sharded_checkpoint(disk: Path, tmp_path: Path) -> None:
    source = shard(spoiled(disk / "tied", tmp_path / "source"))
    report = merge(source, [], tmp_path / "sharded")
    merge(disk / "tied", [], tmp_path / "whole")
    sharded, whole = (tmp_path / name / "model.safetensors" for name in ("sharded", "whole"))
    assert sharded.read_bytes() == whole.read_bytes()
    shards = [f"source/model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(report.inputs_sha256) == ["source/config.json", *shards, *(f"source/{name}" for name in BESIDE)]


# --- PEFT folders ---

VARIANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "whole model": (TIED, "", {}),
    "language model only": (UNTIED, "language_model", {"task_type": "CAUSAL_LM"}),
    "all linear": (UNTIED, "language_model", {"target_modules": "all-linear"}),
    "projection": (TIED, "", {"target_modules": ["projection.projection"]}),
    "rsLoRA": (TIED, "", {"use_rslora": True}),
    "patterns": (
        UNTIED,
        "language_model",
        {
            # the first that matches counts; PEFT sorts them when it saves
            "rank_pattern": {"^model.layers.1.*v_proj": 3, "layers.0.self_attn.q_proj": 6, "q_proj": 2},
            "alpha_pattern": {r"layers\.\d.self_attn.v_proj": 5, "v_proj": 50},
        },
    ),
    "patterns and rsLoRA": (TIED, "", {"use_rslora": True, "rank_pattern": {"vision_encoder.*q_proj": 2}}),
    "replaced projection": (TIED, "", {"modules_to_save": ["projection.projection"]}),
    "replaced head": (UNTIED, "language_model", {"modules_to_save": ["lm_head"]}),
    "all biases": (UNTIED, "", {"bias": "all"}),
    "biases of LoRA": (UNTIED, "", {"bias": "lora_only"}),
    "Conv1D": (GPT2, "language_model", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_folder(variant: str, tmp_path: Path) -> None:
    settings, root, options = VARIANTS[variant]
    base = pico.write_checkpoint(tmp_path / "base", settings, lora=False)
    adapter = save_adapter(tmp_path / "adapter", settings, root, **options)
    report = merge(base, [adapter], tmp_path / "merged")
    assert_equal_models(tmp_path / "merged", settings, peft_merged(load_plain(base, settings), root, adapter))
    assert report.adapter_tensors == len(load_file(adapter / "adapter_model.safetensors"))
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter <= 1e-5
    files = [("base", "config.json"), ("base", "model.safetensors")]
    files += [("adapter", "adapter_config.json"), ("adapter", "adapter_model.safetensors")]
    files += [("base", name) for name in BESIDE]
    assert report.inputs_sha256 == {
        f"{folder}/{name}": hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest()
        for folder, name in files
    }


def test_peft_scales_by_hand(disk: Path, tmp_path: Path) -> None:
    """Independent of PEFT: `alpha / √r` with the first pattern that matches."""
    adapter = save_adapter(tmp_path / "adapter", UNTIED, use_rslora=True, alpha_pattern={"layers.1.*": 3, "q_proj": 5})
    merge(disk / "base", [adapter], tmp_path / "merged")
    base, lora, merged = (
        load_file(file)
        for file in (
            disk / "base" / "model.safetensors",
            adapter / "adapter_model.safetensors",
            tmp_path / "merged" / "model.safetensors",
        )
    )
    for layer, name, alpha in ((0, "q_proj", 5), (0, "v_proj", 8), (1, "q_proj", 3), (1, "v_proj", 3)):
        module = f"language_model.model.layers.{layer}.self_attn.{name}"
        a, b = (lora[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        expected = base[f"{module}.weight"].double() + alpha / 2 * (b @ a)
        torch.testing.assert_close(merged[f"{module}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


SEQUENCES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "two on the same modules": [("", {}), ("", {"use_rslora": True, "r": 2})],
    "whole model, then language model": [("", {}), ("language_model", {"modules_to_save": ["lm_head"]})],
    "adapted, then replaced": [
        ("", {"target_modules": ["projection.projection", "q_proj"]}),
        ("", {"modules_to_save": ["projection.projection"]}),
    ],
    "replaced, then adapted": [
        ("", {"modules_to_save": ["projection.projection"]}),
        ("", {"target_modules": ["projection.projection"]}),
    ],
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_adapters_in_sequence(sequence: str, disk: Path, tmp_path: Path) -> None:
    adapters, expected = [], load_plain(disk / "base", UNTIED)
    for index, (root, options) in enumerate(SEQUENCES[sequence]):
        adapters.append(save_adapter(tmp_path / str(index) / "adapter", UNTIED, root, seed=index, **options))
        expected = peft_merged(expected, root, adapters[-1])
    report = merge(disk / "base", adapters, tmp_path / "merged")
    assert_equal_models(tmp_path / "merged", UNTIED, expected)
    names = ("adapter_config.json", "adapter_model.safetensors")
    own = [f"base/{name}" for name in ("config.json", "model.safetensors")]
    files = [*own, *(f"{folder}/{name}" for folder in ("adapter", "1/adapter") for name in names)]
    assert list(report.inputs_sha256) == [*files, *(f"base/{name}" for name in BESIDE)]


def test_adapters_on_a_checkpoint_that_has_its_own(disk: Path, tmp_path: Path) -> None:
    report = merge(disk / "untied", [disk / "whole", disk / "language"], tmp_path / "merged")
    expected = load_distilvit2(disk / "untied", UNTIED)
    expected.language_model = expected.language_model.merge_and_unload()
    for root, name in (("", "whole"), ("language_model", "language")):
        expected = peft_merged(expected, root, disk / name)
    assert_equal_models(tmp_path / "merged", UNTIED, expected)
    assert report.adapter_tensors == 16 + 16 + 8
    weight = "language_model.model.layers.0.self_attn.q_proj"
    before = load_file(disk / "untied" / "model.safetensors")[Q]
    change = load_file(tmp_path / "merged" / "model.safetensors")[f"{weight}.weight"] - before
    assert report.layers[weight] == pytest.approx(float(change.norm() / before.norm()), rel=1e-4)


ADAPTER_SPELLINGS: dict[str, Change] = {
    "keys with the adapter's name": lambda t: rename(t, ".weight", ".default.weight"),
    "module. of DataParallel": add_module_prefix,
    "transformers 4's tower": lambda t: rename(t, "vision_encoder.", "vision_encoder.vision_model."),
    "without base_model.model.": lambda t: rename(t, "base_model.model.", ""),
}


@pytest.mark.parametrize("spelling", ADAPTER_SPELLINGS)
def test_spellings_of_one_adapter(spelling: str, disk: Path, tmp_path: Path) -> None:
    adapter = spoiled(disk / "whole", tmp_path / "adapter", ADAPTER_SPELLINGS[spelling])
    merge(disk / "base", [adapter], tmp_path / "merged")
    expected = peft_merged(load_plain(disk / "base", UNTIED), "", disk / "whole")
    assert_equal_models(tmp_path / "merged", UNTIED, expected)


def test_adapter_on_the_pooling_head_is_unused(disk: Path, tmp_path: Path) -> None:
    head = "base_model.model.vision_encoder.vision_model.head.mlp.fc1"
    extra = {f"{head}.lora_A.weight": torch.ones(4, 24), f"{head}.lora_B.weight": torch.ones(48, 4)}
    adapter = spoiled(disk / "whole", tmp_path / "adapter", lambda tensors: tensors.update(extra))
    report = merge(disk / "base", [adapter], tmp_path / "merged")
    assert (report.unused, report.adapter_tensors) == (sorted(extra), 16)


def test_adapter_settings_for_training_do_not_matter(disk: Path, tmp_path: Path) -> None:
    def settings(config: dict[str, Any]) -> None:
        config |= {"task_type": "CAUSAL_LM", "lora_dropout": 0.5, "base_model_name_or_path": "nobody/nothing"}

    adapter = spoiled(disk / "whole", tmp_path / "adapter", settings=settings)
    merge(disk / "base", [adapter], tmp_path / "merged")
    merge(disk / "base", [disk / "whole"], tmp_path / "plain")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["embedded", "folder"])
def test_attached_model_is_adapted_and_not_merged(name: str, disk: Path, tmp_path: Path) -> None:
    path, adapters = (disk / "untied", []) if name == "embedded" else (disk / "base", [disk / "language"])
    checkpoint, model = attach(path, adapters)
    assert checkpoint.path == path
    assert [key for key, _ in model.named_parameters() if ".lora_A." in key]
    assert not model.training
    merge(path, adapters, tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(load_plain(tmp_path / "merged", UNTIED)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_pickles_are_merged_with_a_warning(which: str, disk: Path, tmp_path: Path) -> None:
    base, adapter = spoiled(disk / "base", tmp_path / "base"), spoiled(disk / "whole", tmp_path / "adapter")
    folder, whole, pickle = {
        "model": (base, "model.safetensors", "pytorch_model.bin"),
        "adapter": (adapter, "adapter_model.safetensors", "adapter_model.bin"),
    }[which]
    torch.save(load_file(folder / whole), folder / pickle)
    assert merge(base, [adapter], tmp_path / "expected").warnings == []
    (folder / whole).unlink()
    report = merge(base, [adapter], tmp_path / "merged")
    assert report.warnings == [f"{folder / pickle}: a pickle, of which only the tensors were read; prefer safetensors"]
    assert f"{folder.name}/{pickle}" in report.inputs_sha256
    merged, expected = (tmp_path / name / "model.safetensors" for name in ("merged", "expected"))
    assert merged.read_bytes() == expected.read_bytes()


def test_files_of_weights_in_the_place_of_folders(disk: Path, tmp_path: Path) -> None:
    base, adapter = disk / "base" / "model.safetensors", disk / "whole" / "adapter_model.safetensors"
    by_file = merge(base, [adapter], tmp_path / "by-file")
    assert by_file == merge(base.parent, [adapter.parent], tmp_path / "by-folder")


# --- planted faults: every one is an InputError that names the tensor ---


def fill(key: str, value: float) -> Change:
    return lambda tensors: tensors[key].view(-1)[:1].fill_(value)


def put(**tensors: torch.Tensor) -> Change:
    return lambda stored: stored.update(tensors)


def drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def zero(part: str) -> Change:
    return lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if part in key]


NO_MODULE = f"{LAYER}.x_proj.lora_"
FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "an unknown tensor": (put(spare=torch.ones(2)), ("model.safetensors: spare: no such tensor",)),
    "a missing tensor": (drop(TOWER), ("vision_encoder.encoder.layers.0.self_attn.q_proj.weight is missing",)),
    "a missing base of LoRA": (drop(Q), ("language_model.model.layers.0.self_attn.q_proj.weight is missing",)),
    "another shape": (
        put(**{TOWER: torch.ones(24, 23)}),
        (f"model.safetensors: {TOWER}: shape [24, 23], the config says [24, 24]",),
    ),
    "a transposed projection": (
        put(**{"projection.projection.weight": torch.ones(24, 32)}),
        ("model.safetensors: projection.projection.weight: shape [24, 32], the config says [32, 24]",),
    ),
    "a dtype that cannot be merged": (
        put(**{TOWER: torch.ones(24, 24, dtype=torch.int8)}),
        (f"model.safetensors: {TOWER}: dtype I8; save the checkpoint in one of F64, F32, F16, BF16",),
    ),
    "both names of one tensor": (
        put(**{TOWER.replace("vision_model.", ""): torch.ones(24, 24)}),
        (": a second tensor for vision_encoder.encoder.layers.0.self_attn.q_proj.weight",),
    ),
    "NaN in the base": (fill(TOWER, torch.nan), (f"model.safetensors: {TOWER}: holds NaN or Inf",)),
    "Inf below LoRA": (fill(Q, torch.inf), (f"model.safetensors: {Q}: holds NaN or Inf",)),
    "NaN in A": (fill(A, torch.nan), (f"model.safetensors: {A}: holds NaN or Inf",)),
    "Inf in B": (fill(B, -torch.inf), (f"model.safetensors: {B}: holds NaN or Inf",)),
    "all of B zero": (
        zero(".lora_B."),
        (f"model.safetensors: {LAYER}.k_proj.lora_B", "the adapter changes nothing, every lora_B (or lora_A) is zero"),
    ),
    "all of A zero": (zero(".lora_A."), ("the adapter changes nothing",)),
    "LoRA on no module": (
        put(**{f"{NO_MODULE}A.default.weight": torch.ones(4, 32), f"{NO_MODULE}B.default.weight": torch.ones(32, 4)}),
        (f"model.safetensors: {NO_MODULE}A.default.weight: no such module in the model",),
    ),
    "A without B": (
        drop(B),
        ("config.json: its settings ask for language_model.model.layers.0.self_attn.q_proj.lora_B", "does not hold"),
    ),
    "B without A": (
        drop(A),
        ("config.json: its settings ask for language_model.model.layers.0.self_attn.q_proj.lora_A", "does not hold"),
    ),
    "A and B of other ranks": (
        put(**{B: torch.ones(32, 5)}),
        (f"model.safetensors: {B}: shape [32, 5]; the model and config.json want [32, 4]",),
    ),
    "another rank than the config's": (
        put(**{A: torch.ones(5, 32), B: torch.ones(32, 5)}),
        (f"model.safetensors: {A}: shape [5, 32]; the model and config.json want [4, 32]",),
    ),
    "A of another input": (
        put(**{A: torch.ones(4, 31)}),
        (f"model.safetensors: {A}: shape [4, 31]; the model and config.json want [4, 32]",),
    ),
    "shards that were never gathered": (
        put(**{A: torch.ones(0), B: torch.ones(0)}),
        (f"model.safetensors: {B}: shape [0]; the model and config.json want [32, 4]",),
    ),
    "two adapters in one checkpoint": (
        put(**{A.replace("default", "other"): torch.ones(4, 32)}),
        (f"model.safetensors: {A.replace('default', 'other')}: a second tensor for language_model.model.layers.0",),
    ),
    "DoRA": (
        put(**{f"{LAYER}.q_proj.lora_magnitude_vector.default.weight": torch.ones(32)}),
        (f"model.safetensors: {LAYER}.q_proj.lora_magnitude_vector.default.weight: no such tensor",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_checkpoint(fault: str, disk: Path, tmp_path: Path) -> None:
    change, named = FAULTS[fault]
    message = refused(spoiled(disk / "tied", tmp_path / "source", change), [], tmp_path / "work")
    for part in named:
        assert part in message


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_a_tie_that_is_none(decoder: str, tmp_path: Path) -> None:
    """The config ties the head, and the file has one of its own: as transformers loads it, they stay apart."""
    folder = pico.write_checkpoint(tmp_path / "disk", pico.config(decoder))
    tensors = load_file(folder / "model.safetensors")
    table = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    head = table.replace("model.embed_tokens" if decoder == "llama" else "transformer.wte", "lm_head")
    changed = tensors[table] + torch.randn(tensors[table].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {head: changed}, folder / "model.safetensors", metadata={"format": "pt"})

    report = merge(folder, [], tmp_path / "merged")
    assert any("tie_word_embeddings: true, but" in warning for warning in report.warnings)
    assert report.tied == {}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["language_model.lm_head.weight"], changed)
    assert not [key for key, value in merged.items() if "lm_head" not in key and torch.equal(value, changed)]
    untied = pico.config(decoder, tied=False)
    wrapped = load_distilvit2(folder, untied)
    wrapped.language_model = wrapped.language_model.merge_and_unload()
    assert_equal_models(tmp_path / "merged", untied, wrapped)


def test_a_tie_that_is_none_in_a_class_of_transformers(tmp_path: Path) -> None:
    folder = pico_chat.write_llava(tmp_path / "disk", text="qwen2")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    table = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors["language_model.lm_head.weight"] = tensors[table].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    report = merge(folder, [], tmp_path / "merged")
    assert report.tied == {}
    ids = torch.arange(1, 9)[None]
    expected = AutoModelForImageTextToText.from_pretrained(folder)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert found.lm_head.weight is not found.get_input_embeddings().weight
    with torch.inference_mode():
        torch.testing.assert_close(found(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=0)


def test_a_copy_of_the_tied_head_is_no_other_head(tmp_path: Path) -> None:
    folder = pico.write_checkpoint(tmp_path / "disk", pico.config())
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = merge(folder, [], tmp_path / "merged")
    assert report.tied and not report.warnings


def test_everything_that_is_wrong_is_listed(disk: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[TOWER]
        tensors["spare"] = torch.ones(1)
        tensors[A].fill_(torch.nan)

    message = refused(spoiled(disk / "tied", tmp_path / "source", change), [], tmp_path / "work")
    assert message.count("; ") == 2
    for name in ("spare", A, "vision_encoder.encoder.layers.0.self_attn.q_proj.weight"):
        assert name in message


def test_long_lists_are_cut(disk: Path, tmp_path: Path) -> None:
    spare = {f"spare.{index}": torch.ones(1) for index in range(9)}
    message = refused(spoiled(disk / "tied", tmp_path / "source", put(**spare)), [], tmp_path / "work")
    assert message.endswith("; and 4 more")


def test_settings_without_lora(disk: Path, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".lora_" in key]:
            del tensors[key]

    message = refused(spoiled(disk / "tied", tmp_path / "source", drop), [], tmp_path / "work")
    assert "config.json: lora_r, and yet the checkpoint holds no LoRA tensors" in message


def test_lora_without_settings(disk: Path, tmp_path: Path) -> None:
    source = spoiled(disk / "tied", tmp_path / "source", settings=lambda config: config.pop("lora_r"))
    message = refused(source, [], tmp_path / "work")
    assert "config.json: no lora_r and lora_alpha" in message
    assert f"{LAYER}.k_proj.lora_A.default.weight" in message


def test_no_tokenizer(disk: Path, tmp_path: Path) -> None:
    source = spoiled(disk / "tied", tmp_path / "source")
    (source / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(source, [], tmp_path / "work")


def test_nothing_but_merge_and_golden_imports_peft() -> None:
    code = "import sys, vlm_export.pipeline; print([name for name in sys.modules if name.partition('.')[0] == 'peft'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_previous_merge_survives_an_error(disk: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    merge(disk / "tied", [], work / "merged")
    before = {file.name: file.read_bytes() for file in (work / "merged").iterdir()}
    last = "vision_encoder.vision_model.post_layernorm.weight"  # of the tensors that are written last
    with pytest.raises(InputError, match="holds NaN"):
        merge(spoiled(disk / "tied", tmp_path / "source", fill(last, torch.nan)), [], work / "merged")
    assert [file.name for file in work.iterdir()] == ["merged"]
    assert {file.name: file.read_bytes() for file in (work / "merged").iterdir()} == before


PEFT_A, PEFT_B = f"{PEFT_Q}.lora_A.weight", f"{PEFT_Q}.lora_B.weight"
OTHER = "base_model.model.transformer.h.0.attn.c_attn"
ADAPTER_FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "for another model": (
        lambda t: rename(t, "language_model.model.layers.0.self_attn", "language_model.model.layers.7.self_attn"),
        ("base_model.model.language_model.model.layers.7.self_attn.q_proj.lora_A.weight: no such module",),
    ),
    "for another kind of model": (
        lambda t: (t.clear(), t.update({f"{OTHER}.lora_A.weight": torch.ones(4, 2)})),
        (f"adapter_model.safetensors: {OTHER}.lora_A.weight: no such module in the base model",),
    ),
    "of another width": (
        put(**{PEFT_A: torch.ones(4, 33)}),
        (f"adapter_model.safetensors: {PEFT_A}: shape [4, 33]; the model and adapter_config.json want [4, 32]",),
    ),
    "an unknown parameter": (
        put(**{"base_model.model.bridge.weight": torch.ones(2)}),
        ("adapter_model.safetensors: base_model.model.bridge.weight: no such module in the base model",),
    ),
    "a replaced parameter of another shape": (
        put(**{"base_model.model.projection.projection.weight": torch.ones(2, 2)}),
        ("base_model.model.projection.projection.weight: shape [2, 2]; the model and", "want [32, 24]"),
    ),
    "a replaced parameter of no float dtype": (
        put(**{"base_model.model.projection.projection.bias": torch.ones(32, dtype=torch.int32)}),
        ("base_model.model.projection.projection.bias: dtype I32",),
    ),
    "a replaced parameter with NaN": (
        put(**{"base_model.model.projection.projection.bias": torch.full((32,), torch.nan)}),
        ("adapter_model.safetensors: base_model.model.projection.projection.bias: holds NaN or Inf",),
    ),
    "A without B": (
        drop(PEFT_B),
        ("adapter_config.json: its settings ask for language_model.model.layers.0.self_attn.q_proj.lora_B.weight",),
    ),
    "one module left out": (
        lambda t: (t.pop(PEFT_A), t.pop(PEFT_B)),
        (
            "adapter_config.json: its settings ask for language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "which the adapter does not hold",
        ),
    ),
    "one module too many": (
        put(
            **{
                PEFT_A.replace("q_proj", "k_proj"): torch.ones(4, 32),
                PEFT_B.replace("q_proj", "k_proj"): torch.ones(16, 4),
            }
        ),
        (f"{PEFT_A.replace('q_proj', 'k_proj')}: the target_modules of adapter_config.json leave it out",),
    ),
    "another rank": (
        put(**{PEFT_A: torch.ones(3, 32), PEFT_B: torch.ones(32, 3)}),
        (f"adapter_model.safetensors: {PEFT_A}: shape [3, 32]; the model and adapter_config.json want [4, 32]",),
    ),
    "NaN in A": (fill(PEFT_A, torch.nan), (f"adapter_model.safetensors: {PEFT_A}: holds NaN or Inf",)),
    "Inf in B": (fill(PEFT_B, torch.inf), (f"adapter_model.safetensors: {PEFT_B}: holds NaN or Inf",)),
    "all of B zero": (zero(".lora_B."), (".lora_B.weight, …: the adapter changes nothing",)),
    "no tensors": (lambda t: t.clear(), ("the adapter holds no tensors",)),
    "LoRA on an embedding": (
        put(**{"base_model.model.language_model.model.embed_tokens.lora_embedding_A": torch.ones(4, 260)}),
        ("base_model.model.language_model.model.embed_tokens.lora_embedding_A: the target_modules", "leave it out"),
    ),
    "LoRA on a convolution": (
        put(
            **{
                "base_model.model.vision_encoder.embeddings.patch_embedding.lora_A.weight": torch.ones(4, 3, 8, 8),
                "base_model.model.vision_encoder.embeddings.patch_embedding.lora_B.weight": torch.ones(24, 4, 1, 1),
            }
        ),
        ("patch_embedding.lora_B.weight: the target_modules of adapter_config.json leave it out",),
    ),
    "LoRA on a norm": (
        put(
            **{
                "base_model.model.language_model.model.norm.lora_A.weight": torch.ones(4, 32),
                "base_model.model.language_model.model.norm.lora_B.weight": torch.ones(32, 4),
            }
        ),
        ("base_model.model.language_model.model.norm.lora_A.weight: the target_modules", "leave it out"),
    ),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_fault_in_an_adapter(fault: str, disk: Path, tmp_path: Path) -> None:
    change, named = ADAPTER_FAULTS[fault]
    message = refused(disk / "base", [spoiled(disk / "whole", tmp_path / "adapter", change)], tmp_path / "work")
    for part in named:
        assert part in message


def test_second_of_two_adapters_changes_nothing(disk: Path, tmp_path: Path) -> None:
    idle = spoiled(disk / "language", tmp_path / "idle", zero(".lora_B."))
    message = refused(disk / "base", [disk / "whole", idle], tmp_path / "work")
    assert "adapter_model.safetensors: base_model.model.model.layers.0" in message
    assert "the adapter changes nothing" in message


def to_bfloat16(tensors: Tensors) -> None:
    tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})


def to_float16(tensors: Tensors) -> None:
    tensors.update({key: tensor.half() for key, tensor in tensors.items()})


COPIES: dict[str, tuple[Change, dict[str, Any]]] = {
    "under another name": (lambda t: None, {}),
    "in bfloat16": (to_bfloat16, {}),
    "in float16": (to_float16, {}),
    "keys with the adapter's name": (lambda t: rename(t, ".weight", ".default.weight"), {}),
    "with another scale": (lambda t: None, {"lora_alpha": 5}),
    "of some modules": (
        lambda t: [t.pop(key) for key in [key for key in t if "v_proj" in key]],
        {"target_modules": ["q_proj"]},
    ),
}


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("copy", COPIES)
def test_copy_of_an_adapter(copy: str, combined: bool, disk: Path, tmp_path: Path) -> None:
    change, values = COPIES[copy]
    other = spoiled(disk / "whole", tmp_path / "copy", change, lambda config: config.update(values))
    combination = Combination("linear", (0.5, 0.5)) if combined else None
    for first, second in ((disk / "whole", other), (other, disk / "whole")):
        with pytest.raises(InputError) as caught:
            merge(disk / "base", [first, second], tmp_path / "work" / "merged", combination=combination)
        message = str(caught.value)
        assert message.startswith(f"{second}: repeats {first} (LoRA of ")
        assert message.endswith("A and B are equal), and it would be merged twice; remove one of the two from the "
                                "recipe's adapters")  # fmt: skip
    assert not (tmp_path / "work").exists()


def test_copies_in_two_half_precisions(disk: Path, tmp_path: Path) -> None:
    copies = [
        spoiled(disk / "whole", tmp_path / "bfloat16", to_bfloat16),
        spoiled(disk / "whole", tmp_path / "float16", to_float16),
    ]
    assert f"{copies[1]}: repeats {copies[0]} (" in refused(disk / "base", copies, tmp_path / "work")


def test_adapter_listed_twice(disk: Path, tmp_path: Path) -> None:
    message = refused(disk / "base", [disk / "whole", disk / "language", disk / "whole"], tmp_path / "work")
    assert message == (
        f"{disk / 'whole'}: the recipe's adapters list it twice, and it would be merged twice; list it once"
    )


@pytest.mark.parametrize("root", ["", "language_model"])
@pytest.mark.parametrize("change", [lambda t: None, to_bfloat16])
def test_adapter_that_the_checkpoint_holds_itself(change: Change, root: str, disk: Path, tmp_path: Path) -> None:
    """distilvit2 saves its LoRA in the checkpoint, and PEFT beside it."""
    stored = load_file(disk / "untied" / "model.safetensors")
    inside = "base_model.model." + ("language_model." if not root else "")
    names = {key: key.replace("language_model.base_model.model.", inside).replace(".default.", ".") for key in stored}

    def as_peft_saves_it(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update({names[key]: tensor for key, tensor in stored.items() if ".lora_" in key})
        change(tensors)

    like = save_adapter(tmp_path / "like", UNTIED, root, target_modules=r"(language_model\.|)model\..*[qkvo]_proj")
    adapter = spoiled(like, tmp_path / "adapter", as_peft_saves_it)
    merge(disk / "base", [adapter], tmp_path / "merged")
    message = refused(disk / "untied", [adapter], tmp_path / "work")
    assert message == (
        f"{adapter}: repeats what the checkpoint {disk / 'untied'} holds itself (LoRA of language_model.model.layers.0."
        "self_attn.k_proj and 7 more modules), and it would be merged twice; remove it from the recipe's adapters"
    )


def test_adapters_that_began_alike_are_no_copies(disk: Path, tmp_path: Path) -> None:
    """The same A, as of one seed, and the same module saved by both."""
    options = {"modules_to_save": ["projection.projection"]}
    first = save_adapter(tmp_path / "first", UNTIED, **options)
    second = spoiled(first, tmp_path / "second", lambda t: [t[key].mul_(-0.5) for key in t if ".lora_B." in key])
    merge(disk / "base", [first, second], tmp_path / "merged")


def test_untrained_copy_of_a_replaced_module(disk: Path, tmp_path: Path) -> None:
    """PEFT 0.21 saves a copy that nothing ever trained when `modules_to_save` matches a module and one inside it."""
    model = load_plain(disk / "base", UNTIED)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["projection"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    message = refused(disk / "base", [tmp_path / "adapter"], tmp_path / "work")
    assert "adapter_config.json: asks for projection.projection." in message
    assert "as an untrained copy: name the inner module alone" in message


def test_replaced_module_that_was_never_trained(disk: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=TARGETS, modules_to_save=["projection.projection"], init_lora_weights=False)
    peft.get_peft_model(load_plain(disk / "base", UNTIED), config).save_pretrained(tmp_path / "adapter")
    message = refused(disk / "base", [tmp_path / "adapter"], tmp_path / "work")
    assert "adapter_model.safetensors: base_model.model.projection.projection." in message
    assert "by what the base model has: it was never trained" in message


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens: activated LoRA",)),
    "Arrow": ({"arrow_config": {"top_k": 3}}, ("arrow_config: Arrow routing",)),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, ("kasa_config: KaSA",)),
    "MonteCLoRA": ({"monteclora_config": {"a": 1}}, ("monteclora_config: MonteCLoRA",)),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication: layer replication",)),
    "QALoRA": ({"use_qalora": True}, ("use_qalora: QALoRA",)),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora: BD-LoRA",)),
    "IA3": ({"peft_type": "IA3"}, ("peft_type is 'IA3'; only LORA can be merged",)),
    "AdaLoRA": ({"peft_type": "ADALORA"}, ("peft_type is 'ADALORA'",)),
    "no kind": ({"peft_type": None}, ("peft_type is None",)),
    "PiSSA": ({"init_lora_weights": "pissa"}, ("init_lora_weights: 'pissa' changes the base weights",)),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights: 'pissa_niter_4'",)),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, ("init_lora_weights: 'OLoRA'",)),
    "CorDA": ({"init_lora_weights": "corda"}, ("init_lora_weights: 'corda'",)),
    "LoftQ": ({"init_lora_weights": "loftq"}, ("init_lora_weights: 'loftq'",)),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, ("init_lora_weights: 'lora_ga'",)),
    "settings that PEFT refuses": (
        {"target_modules": "q_proj", "layers_to_transform": [0]},
        ("PEFT cannot read it: `layers_to_transform` cannot be used when `target_modules` is a str.",),
    ),
    "modules that are not there": (
        {"target_modules": ["x_proj"]},
        ("target_modules: 'x_proj' matches no module of the model; it may have meant",),
    ),
    "targets that are no expression": (
        {"target_modules": "(q_proj"},
        ("target_modules: '(q_proj' is no regular expression: missing )",),
    ),
    "exclusions that are no expression": (
        {"exclude_modules": "*_proj"},
        ("exclude_modules: '*_proj' is no regular expression: nothing to repeat",),
    ),
    "layers that are no expression": (
        {"layers_to_transform": [0], "layers_pattern": ["layers", "["]},
        ("layers_pattern: '[' is no regular expression: unterminated character set",),
    ),
    "a rank for no expression": (
        {"rank_pattern": {"layers.0[": 4}},
        ("rank_pattern: 'layers.0[' is no regular expression",),
    ),
    "an alpha for no expression": ({"alpha_pattern": {"?": 4}}, ("alpha_pattern: '?' is no regular expression",)),
    "an expression beyond any number": (
        {"alpha_pattern": {"a{99999999999999999999}": 4}},
        ("alpha_pattern: 'a{99999999999999999999}' is no regular expression",),
    ),
    "ranks without names": ({"rank_pattern": [4]}, ("rank_pattern: is [4]; it must be ranks up to 100,000",)),
    "a rank of nothing": ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern: is {'q_proj': 0}; it must be ranks",)),
    "alphas without names": ({"alpha_pattern": "q_proj"}, ("alpha_pattern: is 'q_proj'; it must be numbers, by",)),
    "an alpha in words": ({"alpha_pattern": {"q_proj": "16"}}, ("alpha_pattern: is {'q_proj': '16'}; it must be",)),
    "an alpha of all in words": ({"lora_alpha": "sixteen"}, ("lora_alpha: is 'sixteen'; it must be a number",)),
    "an alpha that is no number": ({"lora_alpha": math.nan}, ("lora_alpha: is nan; it must be a finite number",)),
    "an endless alpha": ({"lora_alpha": math.inf}, ("lora_alpha: is inf; it must be a finite number",)),
    "no rank": ({"r": 0}, ("r: is 0; it must be a rank from 1 to 100,000",)),
    "half a rank": ({"r": 1.5}, ("r: is 1.5; it must be a rank from 1 to 100,000",)),
    "targets that are no names": ({"target_modules": [1, 2]}, ("target_modules: is [1, 2]; it must be a regular",)),
    "targets by name": ({"target_modules": {"q_proj": True}}, ("target_modules: is {'q_proj': True}; it must be",)),
    "one saved module": ({"modules_to_save": "projection"}, ("modules_to_save: is 'projection'; it must be a list",)),
    "layers in words": ({"layers_to_transform": ["one"]}, ("layers_to_transform: is ['one']; it must be a layer's",)),
    "parameters by name": ({"target_parameters": {"a": 1}}, ("target_parameters: is {'a': 1}; it must be a list",)),
    "tokens in words": ({"trainable_token_indices": "all"}, ("trainable_token_indices: is 'all'; it must be a list",)),
    "a switch in words": ({"use_rslora": "no"}, ("use_rslora: is 'no'; it must be true or false",)),
    "another bias": ({"bias": "some"}, ("bias: is 'some'; it must be none, all or lora_only",)),
    "a long value": ({"rank_pattern": ["q_proj"] * 99}, ("'q_proj']; it must be ranks up to 100,000",)),
}


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_refused_adapter_settings(setting: str, disk: Path, tmp_path: Path) -> None:
    values, named = REFUSED_SETTINGS[setting]
    adapter = spoiled(disk / "whole", tmp_path / "adapter", settings=lambda config: config.update(values))
    message = refused(disk / "base", [adapter], tmp_path / "work")
    for part in ("adapter_config.json: ", *named):
        assert part in message


def test_every_variant_of_lora_is_known() -> None:
    """A variant that PEFT adds must be refused or merged on purpose, never by ignorance."""
    mergeable = {"use_dora", "velora_config"}  # VeLoRA: another backward pass, the same forward
    variants = {name for name, f in peft.LoraConfig.__dataclass_fields__.items() if f.metadata.get("is_lora_variant")}
    assert variants - mergeable <= adapter_kinds.UNSUPPORTED.keys()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_file_missing(missing: str, disk: Path, tmp_path: Path) -> None:
    adapter = spoiled(disk / "whole", tmp_path / "adapter")
    (adapter / missing).unlink()
    assert missing in refused(disk / "base", [adapter], tmp_path / "work")


# --- the proof ---


Delta = Callable[[Any, str], torch.Tensor]


def change_delta(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """What PEFT merges, but not what it computes with."""
    delta: Delta = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "get_delta_weight", lambda self, adapter: changed(self, delta(self, adapter))
    )


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    change_delta(monkeypatch, lambda layer, delta: 1.01 * delta)


def one_layer_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_of = Attached.layer_of

    def forgetful(self: Attached, name: str) -> tuple[torch.nn.Module | None, str]:
        return (None, "") if "layers.1.self_attn.v_proj" in name else layer_of(self, name)

    monkeypatch.setattr(Attached, "layer_of", forgetful)


def scale_without_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    change_delta(monkeypatch, lambda layer, delta: delta / layer.scaling["default"])


def tower_written_upside_down(monkeypatch: pytest.MonkeyPatch, part: str = "layers.1.mlp.fc1.weight") -> None:
    def upside_down(path: Path, entries: dict[str, Entry]) -> None:
        def flipped(entry: Entry) -> Entry:
            return Entry(entry.dtype, entry.shape, lambda: entry.make().flip(0))

        changed = {name: flipped(entry) if name.endswith(part) else entry for name, entry in entries.items()}
        safetensors_writer.write_tensors(path, changed)

    monkeypatch.setattr(merging, "write_tensors", upside_down)


def adapted_weight_written_upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    tower_written_upside_down(monkeypatch, "language_model.model.layers.1.self_attn.v_proj.weight")


MUTATIONS = [
    wrong_scale,
    one_layer_forgotten,
    scale_without_alpha,
    tower_written_upside_down,
    adapted_weight_written_upside_down,
]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("source", ["embedded", "folder"])
def test_wrong_merge_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None],
    source: str,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    path, adapters = (disk / "tied", []) if source == "embedded" else (disk / "base", [disk / "whole"])
    message = refused(path, adapters, tmp_path / "work", CheckFailed)
    assert "nothing was written" in message
    assert "the merge is wrong" in message


def test_untransposed_conv1d_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pico.write_checkpoint(tmp_path / "source", GPT2)
    change_delta(monkeypatch, lambda layer, delta: delta.T if len(delta) == delta.shape[1] else delta)  # attn.c_proj
    assert "the merge is wrong" in refused(source, [], tmp_path / "work", CheckFailed)


def test_adapter_without_effect_is_caught(disk: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", UNTIED, std=1e-5)
    message = refused(disk / "base", [adapter], tmp_path / "work", CheckFailed)
    assert "has no effect: what it adds is lost in rounding; nothing was written" in message
