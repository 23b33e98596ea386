"""Adapters as trainers of other years wrote them: their settings and tensors name modules as transformers did then.

What a merged weight must be is computed by hand, W + s·B·A: today's PEFT cannot read most of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import encoder_decoders
import peft
import pico
import pico_chat
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from vlm_export.errors import CheckFailed, InputError
from vlm_export.merging.adapter_places import find_place
from vlm_export.merging.adapters import Held
from vlm_export.merging.merge import merge

R, ALPHA = 4, 8
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Case:
    """An adapter on the modules whose names of today match `targets`.

    Attributes:
        key: a module's name of today → the one in the adapter's keys, without `base_model.model.`.
        ranks, alphas: of the modules that match, where they are not the usual.
        saved: prefixes of weights that are replaced, in today's names.
    """

    base: str
    targets: str
    settings: Mapping[str, Any]
    key: Rename = lambda name: name
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    key_root: str = "base_model.model."


def renamed(*pairs: tuple[str, str]) -> Rename:
    def rename(name: str) -> str:
        for pattern, by in pairs:
            name = re.sub(pattern, by, name)
        return name

    return rename


V436 = renamed(
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector", "multi_modal_projector"),
)
V452 = renamed((r"^model\.vision_tower\.", "model.vision_tower.vision_model."))
LANGUAGE_MODEL = renamed((r"^model\.language_model\.", ""))
CAUSAL_LM = renamed((r"^model\.language_model\.", "model."))
TOWER = renamed((r"^model\.vision_tower\.", ""))
VIT4 = renamed(
    (r"^(encoder|vision_encoder)\.layers\.", r"\1.encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"mlp\.fc1", "intermediate.dense"),
)
DECODER, BOTH = r"model\.language_model\..*\.(q|v)_proj", r".*\.(q|v)_proj"
LEAVES = {"target_modules": ["q_proj", "v_proj"]}
FIRST = "model.language_model.layers.0.self_attn.q_proj"


def full_names(*names: str) -> dict[str, Any]:
    return {"target_modules": list(names)}


CASES = {
    "leaves, transformers 4.36": Case("llava", BOTH, LEAVES, V436),
    "leaves, transformers 4.52": Case("llava", BOTH, LEAVES, V452),
    "full names, transformers 4.36": Case(
        "llava",
        r"model\.language_model\.layers\.\d\.self_attn\.q_proj",
        full_names(*(f"language_model.model.layers.{index}.self_attn.q_proj" for index in (0, 1))),
        V436,
    ),
    "full names, transformers 4.52": Case(
        "llava",
        r"model\.vision_tower\..*layers\.[01]\..*q_proj",
        full_names(*(f"model.vision_tower.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1))),
        V452,
    ),
    "ms-swift's expression": Case(
        "llava",
        DECODER,
        {"target_modules": r"^(language_model)(?!.*(lm_head|output|emb|wte|shared)).*\.(q_proj|v_proj)$"},
        V436,
    ),
    "axolotl's expression": Case(
        "llava",
        DECODER,
        {"target_modules": r"language_model.model.layers.[\d]+.(mlp|cross_attn|self_attn).(q|v)_proj"},
        V436,
    ),
    "LlamaFactory's expression": Case(
        "llava", DECODER, {"target_modules": r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:q_proj|v_proj).*"}
    ),
    "LlamaFactory's expression of then": Case(
        "llava",
        DECODER,
        {"target_modules": r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:q_proj|v_proj).*"},
        V436,
    ),
    "unsloth's expression": Case(
        "llava",
        BOTH,
        {
            "target_modules": r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))",
            "some_future_key": None,
        },
    ),
    "excluded by an expression": Case("llava", DECODER, {**LEAVES, "exclude_modules": r"^vision_tower.*"}, V436),
    "excluded by names": Case(
        "llava",
        r"model\.language_model\.layers\.1\..*\.(q|v)_proj|model\.vision.*\.(q|v)_proj",
        {**LEAVES, "exclude_modules": [f"language_model.model.layers.0.self_attn.{name}_proj" for name in "qv"]},
        V436,
    ),
    "layers": Case(
        "llava",
        r"model\.language_model\.layers\.1\..*\.(q|v)_proj",
        {**LEAVES, "layers_to_transform": [1], "layers_pattern": "language_model.model.layers"},
        V436,
    ),
    "rank of a full name": Case(
        "llava",
        BOTH,
        {**LEAVES, "rank_pattern": {"language_model.model.layers.0.self_attn.q_proj": 2}},
        V436,
        ranks={re.escape(FIRST): 2},
    ),
    "alpha of an expression": Case(
        "llava",
        BOTH,
        {**LEAVES, "alpha_pattern": {r"^vision_tower\..*": 32}},
        V436,
        alphas={r"model\.vision_tower.*": 32},
    ),
    "alpha of what does not begin so": Case(
        "llava",
        BOTH,
        {**LEAVES, "alpha_pattern": {r"^(?!vision_tower).*q_proj": 32}},
        V436,
        alphas={r"model\.language_model.*q_proj": 32},
    ),
    "rank and alpha, rsLoRA": Case(
        "llava",
        BOTH,
        {
            **LEAVES,
            "use_rslora": True,
            "rank_pattern": {r"^vision_tower\.vision_model\.encoder\.layers\.[01]\..*": 2},
            "alpha_pattern": {"language_model.model.layers.1.self_attn.v_proj": 3},
        },
        V436,
        ranks={r"model\.vision_tower\.encoder\.layers\.[01]\..*": 2},
        alphas={r"model\.language_model\.layers\.1\.self_attn\.v_proj": 3},
    ),
    "replaced projector": Case(
        "llava",
        BOTH,
        {**LEAVES, "modules_to_save": ["multi_modal_projector"]},
        V436,
        saved=("model.multi_modal_projector.",),
    ),
    "replaced layer of the projector": Case(
        "llava",
        DECODER,
        {**LEAVES, "modules_to_save": ["multi_modal_projector.linear_1"], "exclude_modules": ".*vision.*"},
        V436,
        saved=("model.multi_modal_projector.linear_1.",),
    ),
    "torch.compile": Case("llava", BOTH, LEAVES, lambda name: f"_orig_mod.{name}"),
    "FSDP": Case("llava", DECODER, {"target_modules": DECODER}, lambda n: n.replace(".0.", ".0._fsdp_wrapped_module.")),
    "DeepSpeed": Case("llava", BOTH, LEAVES, lambda name: f"module.{name}"),
    "wrapped by PEFT twice": Case("llava", BOTH, LEAVES, lambda name: f"base_model.model.{name}"),
    "on the language model": Case("llava", DECODER, LEAVES, LANGUAGE_MODEL),
    "on the language model, by full names": Case(
        "llava", re.escape(FIRST), full_names("layers.0.self_attn.q_proj"), LANGUAGE_MODEL
    ),
    "on the language model with its head": Case(
        "llava",
        DECODER + r"|lm_head",
        {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj|lm_head"},
        CAUSAL_LM,
    ),
    "alpha on the language model": Case(
        "llava",
        DECODER,
        {**LEAVES, "alpha_pattern": {r"^model\.layers\.1\..*": 32}},
        CAUSAL_LM,
        alphas={r".*layers\.1\..*": 32},
    ),
    "on the tower": Case("llava", r"model\.vision_tower\..*q_proj", {"target_modules": ["q_proj"]}, TOWER),
    "ViT of transformers 4": Case("vit-gpt2", r"encoder\..*\.(q|v)_proj", full_names("query", "value"), VIT4),
    "ViT's intermediate layers": Case(
        "vit-gpt2",
        r"encoder\..*(v_proj|fc1)",
        {
            "target_modules": r"encoder\.encoder\.layer\.\d+\.(intermediate\.dense|attention\.attention\.value)",
            "alpha_pattern": {"intermediate.dense": 2},
        },
        VIT4,
        alphas={r".*fc1": 2},
    ),
    "ViT in distilvit2's format": Case(
        "prefix", r"vision_encoder\..*\.(q|v)_proj", {"target_modules": r"vision_encoder.*\.(query|value)"}, VIT4
    ),
}


def write_base(name: str, folder: Path) -> Path:
    if name == "llava":
        return pico_chat.write_llava(folder)
    if name == "vit-gpt2":
        return encoder_decoders.write_checkpoint(folder, encoder_decoders.config("vit", "gpt2"))
    tower = encoder_decoders.config("vit", "gpt2").encoder.to_dict()
    return pico.write_checkpoint(folder, pico.config() | {"vision_config": tower}, lora=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base merged with nothing: its tensors have today's names."""
    folder = tmp_path_factory.mktemp("bases")

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            merge(write_base(name, folder / f"{name}-written"), [], path)
        return path

    return find


def value_of(patterns: Mapping[str, Any], name: str, usual: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.fullmatch(pattern, name)), usual)


def write_adapter(folder: Path, case: Case, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was made of the weights that it changes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    stored, expected = {}, {}
    for weight, value in weights.items():
        name = weight.removesuffix(".weight")
        if weight.startswith(case.saved or "none"):
            expected[weight] = stored[f"{case.key_root}{case.key(weight)}"] = random(*value.shape)
        elif weight.endswith(".weight") and re.fullmatch(case.targets, name):
            r, alpha = value_of(case.ranks, name, R), value_of(case.alphas, name, ALPHA)
            a, b = random(r, value.shape[1]), random(value.shape[0], r)
            scale = alpha / (r**0.5 if case.settings.get("use_rslora") else r)
            stored[f"{case.key_root}{case.key(name)}.lora_A.weight"] = a
            stored[f"{case.key_root}{case.key(name)}.lora_B.weight"] = b
            expected[weight] = (value.double() + scale * b.double() @ a.double()).float()
    save_file(stored, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05}
    settings |= {"fan_in_fan_out": False, "bias": "none", "base_model_name_or_path": "org/of-then", **case.settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert expected
    return expected


@pytest.mark.parametrize("name", CASES)
def test_merged_by_hand(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    weights = load_file(bases(case.base) / "model.safetensors")
    expected = write_adapter(tmp_path / "adapter", case, weights)
    merge(bases(case.base), [tmp_path / "adapter"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(merged[key], expected.get(key, weight), atol=1e-6, rtol=1e-6)


def test_projector_of_llavas_own_trainer(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """LoRA on the language model, and what was trained beside it in a pickle of its own."""
    weights = load_file(bases("llava") / "model.safetensors")
    expected = write_adapter(tmp_path / "adapter", Case("llava", DECODER, LEAVES, CAUSAL_LM), weights)
    generator, beside = torch.Generator().manual_seed(2), {}
    for index, layer in ((0, "linear_1"), (2, "linear_2")):
        for part in ("weight", "bias"):
            name = f"model.multi_modal_projector.{layer}.{part}"
            expected[name] = torch.randn(weights[name].shape, generator=generator)
            beside[f"base_model.model.model.mm_projector.{index}.{part}"] = expected[name]
    torch.save(beside, tmp_path / "adapter" / "non_lora_trainables.bin")
    report = merge(bases("llava"), [tmp_path / "adapter"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for key, weight in weights.items():
        torch.testing.assert_close(merged[key], expected.get(key, weight), atol=1e-6, rtol=1e-6)
    assert "adapter/non_lora_trainables.bin" in report.inputs_sha256
    assert any("non_lora_trainables.bin: a pickle" in warning for warning in report.warnings)


REFUSED = {
    "alpha of nothing": (
        Case("llava", BOTH, {**LEAVES, "alpha_pattern": {r"^vison_tower\..*\.q_proj": 32}}, V436),
        r"adapter_config\.json: alpha_pattern: '.*vison_tower.*' matches no module of the model; it may have meant",
    ),
    "rank of nothing": (
        Case("llava", BOTH, {**LEAVES, "rank_pattern": {"layers.0.self_attn.q_prj": 4}}, V436),
        r"rank_pattern: 'layers\.0\.self_attn\.q_prj' matches no module of the model; .*layers\.0\.self_attn\.q_proj",
    ),
    "targets of nothing": (
        Case("llava", BOTH, full_names("query_proj"), V436),
        r"target_modules: 'query_proj' matches no module of the model; it may have meant .*'q_proj'",
    ),
    "an expression of nothing": (
        Case("llava", BOTH, {"target_modules": r"^transformer\.h\.\d+\.q_proj$"}, V436),
        r"target_modules: '\^transformer.* matches no module of the model",
    ),
    "another rank than it has": (
        Case("llava", BOTH, {**LEAVES, "rank_pattern": {"vision_tower.*": 2}}, V436),
        r"lora_A\.weight: shape \[4, 24\]; the model and adapter_config\.json want \[2, 24\]",
    ),
    "a layer that is not there": (
        Case("llava", DECODER, LEAVES, lambda name: V436(name).replace("layers.1", "layers.7")),
        r"layers\.7\.self_attn\.q_proj\.lora_A\.weight: no such module in the base model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    case, message = REFUSED[name]
    write_adapter(tmp_path / "adapter", case, load_file(bases("llava") / "model.safetensors"))
    with pytest.raises(InputError, match=message):
        merge(bases("llava"), [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_scale_that_peft_reads_wrongly_in_both_is_caught(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PEFT computes with the adapter attached and what it merges are alike, and both are wrong."""
    case = CASES["leaves, transformers 4.36"]
    write_adapter(tmp_path / "adapter", case, load_file(bases("llava") / "model.safetensors"))
    update = peft.tuners.lora.LoraLayer.update_layer

    def twice(self: Any, adapter_name: str, r: int, lora_alpha: int, **options: Any) -> None:
        update(self, adapter_name, r, lora_alpha=2 * lora_alpha, **options)

    monkeypatch.setattr(peft.tuners.lora.LoraLayer, "update_layer", twice)
    with pytest.raises(CheckFailed, match=r"q_proj\.weight, merged, differs from W \+ s·B·A by .*s = 2\)"):
        merge(bases("llava"), [tmp_path / "adapter"], tmp_path / "merged")


class TwoModels(torch.nn.Module):
    """Two of one class, as wide as they are told."""

    def __init__(self, *widths: int):
        super().__init__()
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
        self.first, self.second = (LlamaModel(LlamaConfig(hidden_size=width, **sizes)) for width in widths)


def on_one_of(model: TwoModels) -> str:
    """The root of an adapter for 16 wide layers, attached to one of them."""
    module = "layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (R, 16), f"{module}.lora_B.weight": (16, R)}
    stored = {key: Held(f"adapter_model.safetensors: {key}", torch.ones(shape)) for key, shape in shapes.items()}
    return find_place(stored, [""], model, lambda key: key).root


def test_an_adapter_that_fits_two_parts() -> None:
    assert on_one_of(TwoModels(16, 32)) == "first."
    assert on_one_of(TwoModels(32, 16)) == "second."
    with pytest.raises(InputError, match=r"lora_A\.weight: fits several parts of the model \(first and second\)"):
        on_one_of(TwoModels(16, 16))


def test_settings_of_a_newer_peft_are_named(
    bases: Callable[[str], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    case = Case("llava", BOTH, LEAVES | {"use_nextlora": True, "future_idle": None, "unsloth_fixed": True})
    write_adapter(tmp_path / "adapter", case, load_file(bases("llava") / "model.safetensors"))
    report = merge(bases("llava"), [tmp_path / "adapter"], tmp_path / "merged")
    [warning] = report.warnings
    assert "adapter_config.json: use_nextlora: unknown to PEFT" in warning
    assert not [each for each in recwarn if "peft" in each.filename]
