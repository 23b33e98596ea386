"""vlm_export.merging.prove: an error of 0.1 % in one layer is seen at any depth, and what is right is not refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pico
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from vlm_export.errors import CheckFailed
from vlm_export.merging import layer_proof
from vlm_export.merging import merge as merging
from vlm_export.merging.layer_proof import MAX_LAYER_ERROR, MAX_LOGITS_ERROR
from vlm_export.merging.merge import merge
from vlm_export.models.prefix import PrefixConditioningVLM
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.tensors import safetensors_writer
from vlm_export.tensors.safetensors_writer import Entry

DEPTH = 12
PER_MILLE = 1e-3


def deep_config() -> dict[str, Any]:
    """A decoder of many layers."""
    config = pico.config()
    return config | {"text_config": config["text_config"] | {"num_hidden_layers": DEPTH, "initializer_range": 0.1}}


def large_logits(tensors: pico.Tensors) -> None:
    """Scores of 20 and more, and a few channels of the residual that are far larger than others, as in trained ones."""
    for key, tensor in tensors.items():
        if key.endswith("model.norm.weight"):
            tensor.mul_(12)
        elif key.endswith("down_proj.weight"):
            tensor[:2] *= 30
        elif "lora_B" in key:
            tensor.mul_(0.02)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_checkpoint(tmp_path_factory.mktemp("deep") / "deep", deep_config(), change=large_logits)


def merged_logits(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    model = PrefixConditioningVLM(dict(checkpoint.config))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    inputs = checkpoint.family.sample_inputs(checkpoint.config, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return checkpoint.family.reference(model.eval()).prefill(inputs).logits


def test_right_merge_of_a_deep_model_with_large_logits(deep: Path, tmp_path: Path) -> None:
    report = merge(deep, [], tmp_path / "merged")
    assert merged_logits(tmp_path / "merged").abs().max() > 20
    assert report.max_layer_error is not None and report.max_layer_error < MAX_LAYER_ERROR / 2
    assert report.worst_layer in report.layers
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter <= MAX_LOGITS_ERROR


def written_with(monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One tensor is not written as it was merged."""

    def write(path: Path, entries: dict[str, Entry]) -> None:
        entry = entries[name]
        wrong = Entry(entry.dtype, entry.shape, lambda: changed(entry.make().clone()))
        safetensors_writer.write_tensors(path, entries | {name: wrong})

    monkeypatch.setattr(merging, "write_tensors", write)


def base_weight(source: Path, module: str) -> torch.Tensor:
    key = module.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"
    return load_file(source / "model.safetensors")[key]


@pytest.mark.parametrize(("layer", "projection"), [(0, "o_proj"), (DEPTH - 1, "q_proj")])
@pytest.mark.parametrize("part", ["weight", "change", "one row"])
def test_a_layer_that_is_0_1_percent_off(
    part: str, layer: int, projection: str, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"language_model.model.layers.{layer}.self_attn.{projection}"
    base = base_weight(deep, module)

    def changed(merged: torch.Tensor) -> torch.Tensor:
        if part == "one row":
            merged[3] += PER_MILLE * (merged[3] - base[3])
            return merged
        return merged + PER_MILLE * (merged if part == "weight" else merged - base)

    written_with(monkeypatch, f"{module}.weight", changed)
    with pytest.raises(CheckFailed, match=rf"config\.json: {module}, merged, differs .* the merge is wrong, nothing"):
        merge(deep, [], tmp_path / "merged")


def test_a_bias_does_not_hide_what_is_added_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pico.config("gpt2")
    name = "language_model.transformer.h.1.attn.c_attn"

    def large_bias(tensors: pico.Tensors) -> None:
        for key, tensor in tensors.items():
            if key.endswith("c_attn.base_layer.bias"):
                tensor.fill_(1000)

    source = pico.write_checkpoint(tmp_path / "source", settings, change=large_bias)
    merge(source, [], tmp_path / "right")
    base = base_weight(source, name)
    written_with(monkeypatch, f"{name}.weight", lambda merged: merged + PER_MILLE * (merged - base))
    with pytest.raises(CheckFailed, match=rf"{name}, merged, differs"):
        merge(source, [], tmp_path / "wrong")


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.0.mlp.up_proj.weight", "vision_encoder.post_layernorm.bias"]
)
def test_a_copy_that_differs_in_one_bit(name: str, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(value: torch.Tensor) -> torch.Tensor:
        value.view(-1).view(torch.int32)[-1] ^= 1
        return value

    written_with(monkeypatch, name, flipped)
    with pytest.raises(CheckFailed, match=rf"written as {name}, it is not what was read: the merge is wrong"):
        merge(deep, [], tmp_path / "merged")


def test_right_layers_in_a_model_that_computes_something_else(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merging.write_json

    def wrong_epsilon(path: Path, values: dict[str, Any]) -> None:
        if path.name == "config.json":
            values = values | {"text_config": values["text_config"] | {"rms_norm_eps": 1e-4}}
        write(path, values)

    monkeypatch.setattr(merging, "write_json", wrong_epsilon)
    with pytest.raises(CheckFailed, match=r"merged logits differ .* \(limit .*\): the merge is wrong"):
        merge(deep, [], tmp_path / "merged")


# --- adapters that change little, or what no image shows ---


def write_adapter(folder: Path, settings: dict[str, Any], *, std: float, **options: Any) -> Path:
    wrapped = peft.get_peft_model(PrefixConditioningVLM(settings), peft.LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    wrapped.save_pretrained(folder)
    return folder


def test_weak_adapter_has_an_effect(tmp_path: Path) -> None:
    settings = pico.config(tied=False)
    base = pico.write_checkpoint(tmp_path / "base", settings, lora=False)
    adapter = write_adapter(tmp_path / "weak", settings, std=1e-3, target_modules=["q_proj", "v_proj"])
    report = merge(base, [adapter], tmp_path / "merged")
    assert all(ratio is not None and 1e-6 < ratio < 1e-4 for ratio in report.layers.values())
    assert report.max_relative_diff_vs_base is not None and report.max_relative_diff_vs_base < 1e-4


def test_trained_tokens_that_the_sample_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pico.config(tied=False)
    base = pico.write_checkpoint(tmp_path / "base", settings, lora=False)
    checkpoint = open_checkpoint(base)
    inputs = checkpoint.family.sample_inputs(checkpoint.config, torch.Generator().manual_seed(0))
    unseen = [token for token in range(pico.VOCABULARY) if token not in inputs["input_ids"][:1]][-2:]
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": unseen}}
    adapter = write_adapter(tmp_path / "tokens", settings, std=0.2, **options)
    merge(base, [adapter], tmp_path / "merged")

    def one_of_them_larger(table: torch.Tensor) -> torch.Tensor:
        table[unseen[0]] *= 1 + PER_MILLE
        return table

    written_with(monkeypatch, "language_model.model.embed_tokens.weight", one_of_them_larger)
    with pytest.raises(CheckFailed, match=r"language_model\.model\.embed_tokens, merged, differs"):
        merge(base, [adapter], tmp_path / "wrong")


# --- modules that no inputs can be made up for ---


def expert_config() -> dict[str, Any]:
    """Two layers of four experts each, two of them used by a token."""
    sizes = pico.LLAMA_LIKE | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "vocab_size": pico.VOCABULARY}
    text = AutoConfig.for_model("qwen3_moe", num_hidden_layers=2, initializer_range=0.2, **sizes, **ids)
    return pico.config() | {"text_config": text.to_dict()}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with experts, and an adapter of theirs."""
    folder = tmp_path_factory.mktemp("experts")
    settings = expert_config()
    base = pico.write_checkpoint(folder / "base", settings, lora=False)
    parameters = ["experts.down_proj"]
    adapter = write_adapter(
        folder / "adapter", settings, std=0.2, target_modules=["q_proj"], target_parameters=parameters
    )
    return base, adapter


def test_experts_are_compared_on_what_they_were_called_with(
    experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = experts
    report = merge(base, [adapter], tmp_path / "merged")
    assert report.warnings == []
    assert report.weights_by_hand == 4  # q_proj, in tower and decoder
    assert report.not_by_hand == [f"language_model.model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert report.max_layer_error is not None and report.max_layer_error < MAX_LAYER_ERROR
    name = "language_model.model.layers.1.mlp.experts"
    written_with(monkeypatch, f"{name}.down_proj", lambda merged: merged * (1 + PER_MILLE))
    with pytest.raises(CheckFailed, match=rf"{name}, merged, differs"):
        merge(base, [adapter], tmp_path / "wrong")


def test_what_nothing_called_is_reported(
    experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = experts
    name = "language_model.model.layers.0.mlp.experts"
    monkeypatch.setattr(layer_proof, "calls", lambda *_: nullcontext({}))
    report = merge(base, [adapter], tmp_path / "merged")
    assert report.warnings[0].startswith(f"{adapter / 'adapter_config.json'}: {name}: nothing called it")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["warnings"] == report.warnings
