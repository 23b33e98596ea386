"""vlm_export.source.quantized: what a library quantized is read back as it reads it, and adapters are merged into it.

`data/bitsandbytes-0.50.2.safetensors` holds weights that this version of the library quantized, the values it read back
(`expected.`), and what it left of the tensor `other` (`rounded.`). `data/gptqmodel-7.7.0.safetensors` holds layers that
GPTQModel packed, the values that it reads back, and what its quantizer leaves of `other` without a calibration.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from vlm_export.errors import InputError
from vlm_export.families.registry import find_family
from vlm_export.merging.merge import attach, merge
from vlm_export.source.checkpoint import Checkpoint, open_checkpoint
from vlm_export.source.packed import Settings, packed_weights
from vlm_export.source.quantized import base_weights
from vlm_export.tensors.stored import TensorRef, stored_tensors

WRITTEN = Path(__file__).parent / "data" / "bitsandbytes-0.50.2.safetensors"
KINDS = ("nf4", "nf4_nested", "fp4", "fp4_nested")
FOUR_BIT = [f"{kind}_{dtype}" for kind in KINDS for dtype in ("bfloat16", "float16")]


@pytest.fixture(scope="module")
def read_back() -> dict[str, TensorRef]:
    """The weights of the written file, as `base_weights` reads them."""
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    family = find_family("prefix_conditioning_vlm", "here")
    return dict(
        base_weights(Checkpoint(Path(), config, family, stored_tensors(WRITTEN), {}, ()), dequantized=True).tensors
    )


@pytest.mark.parametrize("name", [*FOUR_BIT, "int8"])
def test_values_are_those_of_bitsandbytes(name: str, read_back: dict[str, TensorRef]) -> None:
    expected = load_file(WRITTEN)[f"expected.{name}"]
    ref = read_back[f"{name}.weight"]
    assert ref.shape == tuple(expected.shape)
    assert ref.dtype == {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[expected.dtype]
    assert torch.equal(ref.load(), expected)
    beside = [other for other in read_back if other.startswith(f"{name}.")]
    assert beside == [f"{name}.weight"]


@pytest.mark.parametrize("name", [name for name in [*FOUR_BIT, "int8"] if "nested" not in name])
def test_rounding_is_that_of_bitsandbytes(name: str, read_back: dict[str, TensorRef]) -> None:
    stored = load_file(WRITTEN)
    rounded = read_back[f"{name}.weight"].rounded(stored["other"])
    expected = stored[f"rounded.{name}"]
    if name == "int8":  # it scales in float16, and so takes a neighbour now and then
        level = expected.abs().amax(1, keepdim=True) / 127
        assert ((rounded - expected).abs() < 1.01 * level).all()
        assert ((rounded - expected).abs() > 0.5 * level).float().mean() < 0.05
    else:
        assert torch.equal(rounded, expected)


PACKED = Path(__file__).parent / "data" / "gptqmodel-7.7.0.safetensors"
GPTQ_V1, GPTQ_V2 = {"quant_method": "gptq", "group_size": 16}, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
LAYERS: dict[str, dict[str, Any]] = {
    "v1_4_sym": GPTQ_V1 | {"bits": 4, "sym": True, "checkpoint_format": "gptq"},
    "v1_4_asym": GPTQ_V1 | {"bits": 4},  # zeros of 0, for which one was borrowed
    "v1_8_sym": GPTQ_V1 | {"bits": 8, "sym": True},
    "v2_4_asym_act": GPTQ_V2 | {"bits": 4, "group_size": 16, "desc_act": True},
    "v2_2_sym": GPTQ_V2 | {"bits": 2, "group_size": 16, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
}


def packed(name: str, settings: dict[str, Any], transposed: tuple[str, ...] = (), path: Path = PACKED) -> TensorRef:
    tensors = {key: ref for key, ref in stored_tensors(path).items() if key.startswith(f"{name}.")}
    return packed_weights(tensors, Settings.of(settings, "here"), transposed, "here")[f"{name}.weight"]


@pytest.mark.parametrize("name", LAYERS)
def test_values_are_those_of_gptqmodel(name: str) -> None:
    expected = load_file(PACKED)[f"expected.{name}"]
    ref = packed(name, LAYERS[name])
    assert (ref.shape, ref.dtype) == (tuple(expected.shape), "F16")
    assert torch.equal(ref.load(), expected)
    assert torch.equal(ref.load(slice(3, 7)), expected[3:7])
    turned = packed(name, LAYERS[name], (name,))
    assert turned.shape == tuple(expected.T.shape)
    assert torch.equal(turned.load(), expected.T)


def test_a_format_makes_a_difference() -> None:
    """Read as the other format, every value is off by a scale: the formats cannot be told apart by their tensors."""
    expected = load_file(PACKED)["expected.v1_4_sym"]
    wrong = packed("v1_4_sym", LAYERS["v1_4_sym"] | {"checkpoint_format": "gptq_v2"}).load()
    assert (wrong != expected).all()


def test_groups_follow_from_their_size_where_there_is_no_g_idx(tmp_path: Path) -> None:
    tensors = load_file(PACKED)
    del tensors["v1_4_sym.g_idx"]
    save_file(tensors, tmp_path / "packed.safetensors")
    ref = packed("v1_4_sym", LAYERS["v1_4_sym"], path=tmp_path / "packed.safetensors")
    assert torch.equal(ref.load(), tensors["expected.v1_4_sym"])


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_is_that_of_gptqmodel_without_calibration(name: str) -> None:
    stored = load_file(PACKED)
    rounded = packed(name, LAYERS[name]).rounded(stored["other"])
    torch.testing.assert_close(rounded, stored[f"rounded.{name}"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"here\.bits: gptq weights of 3 bits cannot be read, only of 2, 4, 8"),
        ({"checkpoint_format": "marlin"}, "here: gptq weights of the format 'marlin' cannot be read, only gptq and"),
        ({"group_size": None}, r"here\.group_size: None is no number"),
        ({"bits": 8}, "not integers of 8 bits in 32-bit words, as here says"),
        (
            {"quant_method": "awq", "version": "gemv"},
            "here: awq weights of the format 'gemv' cannot be read, only gemm",
        ),
    ],
)
def test_packed_in_another_way(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        packed("v1_4_sym", LAYERS["v1_4_sym"] | settings)


def test_a_part_is_missing(tmp_path: Path) -> None:
    tensors = load_file(PACKED)
    del tensors["v1_4_sym.qzeros"]
    save_file(tensors, tmp_path / "packed.safetensors")
    with pytest.raises(InputError, match=r"qweight: v1_4_sym\.qzeros is not beside it; the checkpoint is incomplete"):
        packed("v1_4_sym", LAYERS["v1_4_sym"], path=tmp_path / "packed.safetensors")


# --- whole checkpoints ---


def four_bit(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as bitsandbytes stores it in NF4."""
    quant_map = load_file(WRITTEN)["nf4_bfloat16.weight.quant_map"]
    flat = weight.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scales = blocks.abs().amax(1)
    distances = ((blocks / scales[:, None]).reshape(-1)[: len(flat), None] - quant_map).abs()
    codes = F.pad(distances.argmin(1), (0, len(flat) % 2)).to(torch.uint8).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        name: (codes[:, 0] << 4 | codes[:, 1])[:, None],
        f"{name}.absmax": scales,
        f"{name}.quant_map": quant_map.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def eight_bit(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = weight.abs().amax(1)
    codes = (weight * 127 / scales[:, None]).round().to(torch.int8)
    module = name.removesuffix(".weight")
    return {name: codes, f"{module}.SCB": scales, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as GPTQ's first format stores it in 4 bits, symmetric, in groups of 8 inputs that are not neighbours."""
    groups = torch.arange(weight.shape[1]) % (weight.shape[1] // 8)
    largest = torch.stack([weight[:, groups == group].abs().amax(1) for group in range(int(groups.max()) + 1)])
    scales = (2 * largest / 15).half()
    codes = (weight.T / scales[groups].float() + 8).round().clamp(0, 15).int().reshape(-1, 8, len(weight))
    module = name.removesuffix(".weight")
    return {
        f"{module}.qweight": torch.stack([codes[:, place] << 4 * place for place in range(8)]).sum(0).int(),
        f"{module}.qzeros": torch.full((len(scales), len(weight) // 8), 0x77777777, dtype=torch.int32),
        f"{module}.scales": scales,
        f"{module}.g_idx": groups.int(),
    }


SETTINGS: dict[Any, dict[str, Any]] = {
    four_bit: {"quant_method": "bitsandbytes", "load_in_4bit": True},
    eight_bit: {"quant_method": "bitsandbytes", "load_in_8bit": True},
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": True},
}


def quantize(folder: Path, store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], **settings: Any) -> Path:
    """Quantize the decoder's projections of a base model, in place, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "language_model" in name and "proj.weight" in name]:
        tensors |= store(name, tensors.pop(name).float())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = SETTINGS[store] | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico.write_checkpoint(tmp_path / "base", pico.config(), lora=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_peft_adapter(tmp_path_factory.mktemp("adapter"), pico.config())


@pytest.mark.parametrize("store", [four_bit, eight_bit, gptq])
def test_merge_into_dequantized_weights(
    store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], base: Path, adapter: Path, tmp_path: Path
) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj"
    original = load_file(base / "model.safetensors")[f"{name}.weight"]
    quantize(base, store)
    report = merge(base, [adapter], tmp_path / "merged", dequantized=True)
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter <= 1e-5
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{p}.weight"] for p in "AB")
    change = 8 / 4 * (b @ a)
    before = base_weights(open_checkpoint(base), dequantized=True).tensors[f"{name}.weight"].load().float()
    assert (before - original).norm() / original.norm() < (0.01 if store is eight_bit else 0.12)
    torch.testing.assert_close(merged[f"{name}.weight"], before + change, atol=1e-5, rtol=1e-5)
    error = merged[f"{name}.weight"] - store_and_read(store, merged[f"{name}.weight"], tmp_path)
    assert report.rounding_error[name] == pytest.approx(float(error.norm() / change.norm()), rel=0.02)
    assert 0 <= report.unchanged_if_rounded[name] < 1
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert set(merged) == set(open_checkpoint(tmp_path / "merged").tensors)


def test_a_square_weight_of_conv1d_is_not_turned(tmp_path: Path) -> None:
    """GPT-2 has its weights the other way round, and packed ones do not say so."""
    base = pico.write_checkpoint(tmp_path / "base", pico.config("gpt2"), lora=False)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.attn.c_proj.weight"))
    original = tensors.pop(name)
    assert original.shape[0] == original.shape[1]
    save_file(tensors | gptq(name, original.T.contiguous()), base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS[gptq]}))
    read = base_weights(open_checkpoint(base), dequantized=True).tensors[name].load().float()
    assert (read - original).norm() < 0.1 * original.norm()


def store_and_read(
    store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor, folder: Path
) -> torch.Tensor:
    save_file(store("a.weight", weight), folder / "again.safetensors")
    if store is gptq:
        return packed("a", SETTINGS[gptq], path=folder / "again.safetensors").load().float()
    config = {"quantization_config": SETTINGS[store]}
    family = find_family("prefix_conditioning_vlm", "here")
    checkpoint = Checkpoint(folder, config, family, stored_tensors(folder / "again.safetensors"), {}, ())
    return base_weights(checkpoint, dequantized=True).tensors["a.weight"].load().float()


def test_golden_model_of_dequantized_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantize(base, four_bit)
    _, model = attach(base, [adapter], dequantized=True)
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("q_proj.base_layer.weight")]
    assert len(weights) == 2 + 2  # decoder and tower
    assert all(parameter.dtype == torch.float32 and not parameter.is_meta for parameter in weights)


def test_quantized_base_is_refused_with_what_to_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantize(base, four_bit)
    with pytest.raises(InputError) as caught:
        merge(base, [adapter], tmp_path / "merged")
    assert str(caught.value) == (
        f"{base / 'config.json'}: quantization_config: the weights are quantized; set `model` in the recipe to the "
        "16-bit model that they were made from, or `base: dequantized` to merge into these"
    )
    assert not (tmp_path / "merged").exists()


def test_other_quantizations_are_refused_by_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantize(base, four_bit, quant_method="hqq")
    with pytest.raises(InputError, match="weights quantized with hqq cannot be merged into; set `model` in"):
        merge(base, [adapter], tmp_path / "merged", dequantized=True)
