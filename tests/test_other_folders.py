"""Folders that are not what a recipe says of them: one sentence, what they hold and what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import peft
import pico_chat
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from vlm_export.errors import InputError
from vlm_export.merging.merge import merge

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
AS_MODEL: dict[str, tuple[Sequence[str], str]] = {
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        r"holds an adapter, not a model: list it under `adapters`, and name as `model` what it .* on \(org/base\)$",
    ),
    "a trainer's folder": (
        ["checkpoint-500/config.json", "checkpoint-1000/config.json", "trainer_state.json"],
        r"holds checkpoint-1000, checkpoint-500: name one of these folders",
    ),
    "DeepSpeed's state": (
        ["global_step100/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"],
        r"holds a state of DeepSpeed: make weights of it with its zero_to_fp32\.py",
    ),
    "DeepSpeed's state beside a config": (
        ["config.json", "global_step100/mp_rank_00_model_states.pt"],
        r"holds a state of DeepSpeed",
    ),
    "FSDP's shards": (["__0_0.distcp", "__1_0.distcp"], r"holds FSDP's shards: gather them with `accelerate merge"),
    "GGUF": (["model-q4.gguf"], r"holds GGUF, which is already converted and quantized"),
    "nothing": ([], r"config\.json: no such file"),
}
AS_ADAPTER: dict[str, tuple[Sequence[str], str]] = {
    "a model": (
        ["config.json", "model.safetensors"],
        r"holds a model \(config\.json\) and no adapter_config\.json: name",
    ),
    "a trainer's folder": (["checkpoint-7/adapter_config.json"], r"holds checkpoint-7: name one of these folders"),
    "DeepSpeed's state": (["global_step1/x.pt"], r"holds a state of DeepSpeed"),
    "nothing": ([], r"adapter_config\.json: no such file"),
}


def write(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ADAPTER if name.startswith("adapter") else {"model_type": "llava"}))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("case", AS_MODEL)
def test_in_the_place_of_a_model(case: str, tmp_path: Path) -> None:
    names, message = AS_MODEL[case]
    with pytest.raises(InputError, match=message):
        merge(write(tmp_path / "folder", names), [], tmp_path / "merged")


@pytest.mark.parametrize("case", AS_ADAPTER)
def test_in_the_place_of_an_adapter(case: str, tmp_path: Path) -> None:
    names, message = AS_ADAPTER[case]
    base = pico_chat.write_llava(tmp_path / "base")
    with pytest.raises(InputError, match=message):
        merge(base, [write(tmp_path / "folder", names)], tmp_path / "merged")


@pytest.fixture
def wrapped(tmp_path: Path) -> tuple[Path, peft.PeftModel]:
    """A base, and PEFT's model of it with LoRA and a module that is saved whole, all of it random."""
    base = pico_chat.write_llava(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["linear_1"])
    made = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return base, made


def test_a_state_dict_of_peft_as_a_checkpoint(wrapped: tuple[Path, peft.PeftModel], tmp_path: Path) -> None:
    """Everything in one file, under PEFT's names; its settings lie beside it."""
    base, model = wrapped
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert any(".base_layer." in key for key in tensors) and any(".original_module." in key for key in tensors)
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=r"put their adapter_config\.json beside them"):
        merge(base, [], tmp_path / "refused")
    model.peft_config["default"].save_pretrained(base)
    merge(base, [], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = {name: value.detach() for name, value in model.merge_and_unload().named_parameters()}
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)


def test_what_merging_left_of_peft_s_names(wrapped: tuple[Path, peft.PeftModel], tmp_path: Path) -> None:
    """Merged already, and saved without `unload`."""
    base, model = wrapped
    model.merge_adapter()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".lora_" not in key}
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors")
    merge(base, [], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = {name: value.detach() for name, value in model.unload().named_parameters()}
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)
