"""Every kind of adapter that PEFT writes and that can be merged, on every family: logits of the merged checkpoint,
loaded by torch, are those of PEFT's own model with the adapter attached, and not the base's.

A family joins with one line in `BASES`; a kind is one line in `KINDS`.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import encoder_decoders
import peft
import pico
import pico_chat
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GotOcr2ForConditionalGeneration,
    InternVLForConditionalGeneration,
    Lfm2VlForConditionalGeneration,
    LlavaForConditionalGeneration,
    Mistral3ForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from vlm_export.errors import InputError
from vlm_export.merging.merge import MergeReport, attach, merge
from vlm_export.models.prefix import PrefixConditioningVLM
from vlm_export.recipe import Combination
from vlm_export.source.checkpoint import build_empty, open_checkpoint


@dataclass(frozen=True)
class Base:
    """A pico checkpoint, written with a tied head or without; torch's own loading of it; the names of its parts, as
    `target_modules` spell them."""

    write: Callable[[Path, bool], Path]
    load: Callable[[Path], torch.nn.Module]
    attention: tuple[str, ...]
    with_bias: str
    embedding: str
    patches: str
    tower: str
    bridge: str
    language_model: str = ""


def load_prefix(path: Path) -> torch.nn.Module:
    """A prefix-conditioning captioner; shared parameters may be stored once."""
    model = PrefixConditioningVLM(json.loads((path / "config.json").read_text()))
    tensors = load_file(path / "model.safetensors")
    result = model.load_state_dict(tensors, strict=False)
    shared = {id(parameter) for name, parameter in model.named_parameters() if name in tensors}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert not result.unexpected_keys
    assert all(id(parameters[name]) in shared for name in result.missing_keys)
    return model.eval()


def prefix(model_type: str, attention: tuple[str, str], with_bias: str, embedding: str, **text: Any) -> Base:
    """A prefix-conditioning captioner with this decoder."""

    def config(tied: bool) -> dict[str, Any]:
        if not text:
            return pico.config(model_type, tied=tied)
        ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "vocab_size": pico.VOCABULARY}
        decoder = AutoConfig.for_model(model_type, tie_word_embeddings=tied, **ids, **text)
        return pico.config() | {"text_config": decoder.to_dict()}

    return Base(
        write=lambda folder, tied: pico.write_checkpoint(folder, config(tied), lora=False),
        load=load_prefix,
        attention=attention,
        with_bias=with_bias,
        embedding=embedding,
        patches="patch_embedding",
        tower=r"vision_encoder.*\.fc1",
        bridge="projection.projection",
        language_model="language_model",
    )


def write_llava(folder: Path, tied: bool) -> Path:
    config = AutoConfig.for_model(
        "llava",
        vision_config=pico_chat.tower_config("clip_vision_model"),
        text_config=pico_chat.text_config("llama") | {"tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        image_token_index=257,
    )
    pico_chat.save_model(folder, config)
    pico_chat.tokenizer([pico_chat.IMAGE_TOKEN]).save_pretrained(folder)
    return folder


def write_encoder_decoder(folder: Path, tied: bool) -> Path:
    config = encoder_decoders.config("vit", "gpt2")
    config.decoder.tie_word_embeddings = tied
    return encoder_decoders.write_checkpoint(folder, config)


def load_by(model_class: Any) -> Callable[[Path], torch.nn.Module]:
    return lambda path: model_class.from_pretrained(path, dtype=torch.float32).eval()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
QWEN2 = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
BASES = {
    "llama": prefix("llama", ("q_proj", "v_proj"), "fc1", "embed_tokens"),
    "gpt2": prefix("gpt2", ("c_attn", "c_proj"), "c_attn", "wte"),
    "qwen2": prefix("qwen2", ("q_proj", "o_proj"), "q_proj", "embed_tokens", **QWEN2),
    "opt": prefix("opt", ("q_proj", "fc2"), "q_proj", "embed_tokens", **OPT),
    "llava": Base(
        write=write_llava,
        load=load_by(LlavaForConditionalGeneration),
        attention=("q_proj", "v_proj"),
        with_bias="linear_2",
        embedding="embed_tokens",
        patches="patch_embedding",
        tower=r"vision_tower.*\.fc1",
        bridge="multi_modal_projector.linear_1",
    ),
    "internvl": Base(
        write=pico_chat.write_internvl,
        load=load_by(InternVLForConditionalGeneration),
        attention=("q_proj", "v_proj"),
        with_bias="linear_2",
        embedding="embed_tokens",
        patches="patch_embeddings.projection",
        tower=r"vision_tower.*\.fc1",
        bridge="multi_modal_projector.linear_1",
    ),
    "got_ocr2": Base(
        write=pico_chat.write_got_ocr2,
        load=load_by(GotOcr2ForConditionalGeneration),
        attention=("q_proj", "v_proj"),
        with_bias="multimodal_projector",
        embedding="embed_tokens",
        patches="patch_embed.projection",
        tower=r"vision_tower.*\.lin1",
        bridge="multi_modal_projector.multimodal_projector",
    ),
    "mistral3": Base(
        write=pico_chat.write_mistral3,
        load=load_by(Mistral3ForConditionalGeneration),
        attention=("q_proj", "v_proj"),
        with_bias="linear_2",
        embedding="embed_tokens",
        patches="patch_conv",
        tower=r"vision_tower.*\.up_proj",
        bridge="multi_modal_projector.linear_1",
    ),
    "lfm2_vl": Base(
        write=lambda folder, tied: pico_chat.write_lfm2_vl(folder, tied, layers=2),
        load=load_by(Lfm2VlForConditionalGeneration),
        attention=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj"),  # of short convolutions too, and of the tower
        with_bias="linear_2",
        embedding="embed_tokens",
        patches="patch_embedding",
        tower=r"vision_tower.*\.(fc1|fc2)",
        bridge="multi_modal_projector.linear_1",
    ),
    "vision_encoder_decoder": Base(
        write=write_encoder_decoder,
        load=load_by(VisionEncoderDecoderModel),
        attention=("c_attn", "c_proj"),
        with_bias="c_attn",
        embedding="wte",
        patches="patch_embeddings.projection",
        tower=r"encoder.*\.q_proj",
        bridge="encoder.layers.0.attention.v_proj",
    ),
}


@dataclass(frozen=True)
class Kind:
    """Options of `LoraConfig` for a base; where it attaches; whether the base's head is tied, and still is then, but
    for bases whose tie PEFT 0.21 does not see (by names of modules, or in the config); the size of what it trains."""

    options: Callable[[Base], dict[str, Any]]
    root: Callable[[Base], str] = lambda base: ""
    tied: bool = True
    tied_after: bool = True
    unseen: tuple[str, ...] = ()
    std: float = 0.2


def on_decoder(base: Base) -> str:
    return base.language_model


HEAD = "lm_head"
KINDS = {
    "LoRA": Kind(lambda base: {}),
    "LoRA on the decoder": Kind(lambda base: {"task_type": "CAUSAL_LM"}, on_decoder),
    "all linear": Kind(lambda base: {"target_modules": "all-linear"}, on_decoder),
    "rsLoRA": Kind(lambda base: {"use_rslora": True}),
    "patterns": Kind(
        lambda base: {
            "rank_pattern": {base.attention[0]: 2, base.attention[1]: 6},
            "alpha_pattern": {base.attention[0]: 5},
        }
    ),
    "DoRA": Kind(lambda base: {"use_dora": True}),
    "DoRA and rsLoRA on an embedding": Kind(
        lambda base: {"use_dora": True, "use_rslora": True, "target_modules": [base.embedding, *base.attention]},
        on_decoder,
        tied=False,
        tied_after=False,
    ),
    "bias of LoRA": Kind(lambda base: {"lora_bias": True, "target_modules": [base.with_bias]}),
    "all biases": Kind(lambda base: {"bias": "all"}),
    "biases beside LoRA": Kind(lambda base: {"bias": "lora_only"}),
    "embedding": Kind(lambda base: {"target_modules": [base.embedding]}, tied=False, tied_after=False),
    "tied embedding": Kind(lambda base: {"target_modules": [base.embedding]}, on_decoder, tied_after=False),
    "head": Kind(lambda base: {"target_modules": [HEAD]}, tied=False, tied_after=False),
    "tied head": Kind(lambda base: {"target_modules": [HEAD]}, tied_after=False),
    "embedding and head that stay tied": Kind(
        lambda base: {"target_modules": [base.embedding, HEAD], "ensure_weight_tying": True},
        on_decoder,
        unseen=("vision_encoder_decoder",),
    ),
    "saved modules": Kind(lambda base: {"modules_to_save": [base.bridge]}),
    "saved head": Kind(lambda base: {"modules_to_save": [HEAD]}, on_decoder, tied_after=False),
    "saved embedding": Kind(lambda base: {"modules_to_save": [base.embedding]}, on_decoder, tied_after=False),
    "saved embedding that stays tied": Kind(
        lambda base: {"modules_to_save": [base.embedding], "ensure_weight_tying": True},
        on_decoder,
        unseen=("gpt2", "vision_encoder_decoder"),
    ),
    "trained tokens": Kind(
        lambda base: {"trainable_token_indices": {base.embedding: [1, 7, 65]}},
        on_decoder,
        unseen=("vision_encoder_decoder",),
    ),
    "trained tokens of an untied model": Kind(
        lambda base: {"trainable_token_indices": {base.embedding: [1, 7, 65]}}, tied=False, tied_after=False
    ),
    "convolution": Kind(lambda base: {"target_modules": [base.patches]}),
    "bare parameters among modules": Kind(
        lambda base: {"target_modules": rf".*{base.tower}", "target_parameters": [f"{base.bridge}.weight"]}
    ),
    "DoRA on a convolution": Kind(lambda base: {"target_modules": [base.patches], "use_dora": True}),
    "tower and bridge": Kind(lambda base: {"target_modules": rf".*({base.tower}|{base.bridge})"}),
    "bare parameters": Kind(
        lambda base: {"target_modules": [], "target_parameters": [f"{base.bridge}.weight"]},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """The folder of a base, tied or not, written at its first use."""
    folder = tmp_path_factory.mktemp("bases")

    def find(name: str, tied: bool) -> Path:
        path = folder / f"{name}-{'tied' if tied else 'untied'}"
        return path if path.exists() else BASES[name].write(path, tied)

    return find


def write_adapter(
    folder: Path, model: torch.nn.Module, base: Base, kind: Kind, *, seed: int = 1, tables: bool | str = "auto"
) -> Path:
    """What PEFT saves of a model with all that the adapter trains at random."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(base.attention), **kind.options(base)}
    wrapped = peft.get_peft_model(model.get_submodule(kind.root(base)), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=kind.std)
    wrapped.save_pretrained(folder, save_embedding_layers=tables)
    return folder


@torch.inference_mode()
def logits(model: torch.nn.Module, path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    inputs = checkpoint.family.sample_inputs(checkpoint.config, torch.Generator().manual_seed(3))
    return checkpoint.family.reference(model).prefill(inputs).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def adapted_logits(path: Path, base: Base, kind: Kind, adapter: Path) -> torch.Tensor:
    """By PEFT alone, nothing merged."""
    model = base.load(path)
    peft.PeftModel.from_pretrained(model.get_submodule(kind.root(base)), str(adapter))
    return logits(model.eval(), path)


STAY_TIED = "embedding and head that stay tied"
FORGOTTEN_HEAD = (STAY_TIED, "gpt2")  # PEFT 0.21 does not find it again when it loads
FEW_KINDS = ("LoRA on the decoder", "DoRA", "bias of LoRA", "tied embedding")  # of decoders that are like others
CASES = [
    (kind, name)
    for kind in KINDS
    for name in BASES
    if (kind, name) != FORGOTTEN_HEAD and (name not in ("qwen2", "opt") or kind in FEW_KINDS)
]


@pytest.mark.parametrize(("kind_name", "name"), CASES)
def test_merged_is_what_peft_computes(
    kind_name: str, name: str, bases: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    base, kind = BASES[name], KINDS[kind_name]
    path = bases(name, kind.tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = write_adapter(tmp_path / "adapter", base.load(path), base, kind)
        expected = adapted_logits(path, base, kind, adapter)
    report = merge(path, [adapter], tmp_path / "merged")
    merged = logits(base.load(tmp_path / "merged"), path)
    assert relative(merged, expected) <= 1e-5
    assert relative(merged, logits(base.load(path), path)) > 1e-2
    stored = load_file(adapter / "adapter_model.safetensors").keys() - set(report.unused)
    factors = [key for key in stored if re.search(r"lora_(embedding_)?A", key)]
    stays_tied = kind.tied_after and name not in kind.unseen
    assert report.weights_by_hand == len(factors) - (kind_name == STAY_TIED and stays_tied)
    assert_reported(report, tmp_path / "merged", stays_tied)


def test_head_that_peft_forgets_to_tie_is_refused(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    kind, base, path = KINDS[FORGOTTEN_HEAD[0]], BASES[FORGOTTEN_HEAD[1]], bases(FORGOTTEN_HEAD[1], True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = write_adapter(tmp_path / "adapter", base.load(path), base, kind)
    with pytest.raises(InputError, match=r"lm_head\.lora_A\.weight: the target_modules of .* leave it out"):
        merge(path, [adapter], tmp_path / "merged")


def test_a_convolution_in_groups_is_refused_before_any_work(tmp_path: Path) -> None:
    path = pico_chat.write_fast_vlm(tmp_path / "base")
    checkpoint = open_checkpoint(path)
    model = build_empty(checkpoint)
    convolutions = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Conv2d)}
    name, grouped = next((name, each) for name, each in convolutions.items() if each.groups > 1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": grouped.groups, "lora_alpha": 8, "target_modules": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    sides = {"A": (grouped.groups, grouped.in_channels, *grouped.kernel_size), "B": (grouped.out_channels, 1, 1, 1)}
    save_file(
        {f"base_model.model.{name}.lora_{part}.weight": torch.ones(shape) for part, shape in sides.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(
        InputError, match=rf"{name} is a convolution in {grouped.groups} groups, which PEFT cannot merge"
    ):
        merge(path, [folder], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_lora_bias_needs_a_bias(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base, path = BASES["llama"], bases("llama", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = write_adapter(tmp_path / "adapter", base.load(path), base, Kind(lambda base: {"lora_bias": True}))
    with pytest.raises(InputError, match=r"lora_bias: language_model\.model\.layers\.0\.self_attn\.q_proj has no bias"):
        merge(path, [adapter], tmp_path / "merged")


def resized(model: torch.nn.Module, rows: int) -> torch.nn.Module:
    """The model with so many tokens; new ones have random rows."""
    part: Any = getattr(model, "language_model", None) or getattr(model, "decoder", None) or model
    part.resize_token_embeddings(rows, mean_resizing=False)
    return model


SAVED_BESIDE, TOKENS = "tables beside LoRA", "trained tokens behind the table"
RESIZED: dict[str, tuple[int, Kind]] = {
    "saved tables": (5, Kind(lambda base: {"modules_to_save": [base.embedding, HEAD]}, tied=False)),
    "fewer rows": (-3, Kind(lambda base: {"modules_to_save": [base.embedding, HEAD]}, tied=False)),
    "saved tables that were tied": (3, Kind(lambda base: {"modules_to_save": [base.embedding, HEAD]}, on_decoder)),
    SAVED_BESIDE: (4, Kind(lambda base: {}, on_decoder, tied=False)),
    "LoRA on both tables": (2, Kind(lambda base: {"target_modules": [base.embedding, HEAD]}, tied=False)),
    TOKENS: (2, Kind(lambda base: {}, on_decoder)),
}
UNKNOWN_ROWS = [
    (TOKENS, "vision_encoder_decoder")
]  # PEFT 0.21 does not see this model's tie: its head's new rows are lost


def rows_of(path: Path) -> int:
    checkpoint = open_checkpoint(path)
    return checkpoint.family.text_config(checkpoint.config).vocab_size


@pytest.mark.parametrize("name", ["llama", "llava", "vision_encoder_decoder"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_table_that_was_resized(case: str, name: str, bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    more, kind = RESIZED[case]
    base, path = BASES[name], bases(name, kind.tied)
    rows = rows_of(path)
    if case == TOKENS:
        kind = replace(kind, options=lambda base: {"trainable_token_indices": {base.embedding: [7, rows, rows + 1]}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained, model = (resized(base.load(path), rows + more) for _ in range(2))
        adapter = write_adapter(tmp_path / "adapter", trained, base, kind, tables=case == SAVED_BESIDE or "auto")
        if (case, name) in UNKNOWN_ROWS:
            with pytest.raises(InputError, match=r"has 262 tokens, the model 260, and .* lacks the new rows"):
                merge(path, [adapter], tmp_path / "merged")
            return
        peft.PeftModel.from_pretrained(model.get_submodule(kind.root(base)), str(adapter))
    merge(path, [adapter], tmp_path / "merged")
    assert rows_of(tmp_path / "merged") == rows + more
    expected = logits(model.eval(), tmp_path / "merged")  # on ids that both have
    merged = logits(base.load(tmp_path / "merged"), tmp_path / "merged")
    assert merged.shape[-1] == rows + more
    assert relative(merged, expected) <= 1e-5


def test_new_rows_that_nobody_has(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base, path = BASES["llava"], bases("llava", False)
    kind = Kind(lambda base: {"target_modules": [base.embedding]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = write_adapter(tmp_path / "adapter", resized(base.load(path), 300), base, kind)
    file = adapter / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if ".lora_" in key}
    save_file(tensors, file)
    message = r"has 300 tokens, the model 288, and .* lacks the new rows"
    with pytest.raises(InputError, match=message):
        merge(path, [adapter], tmp_path / "merged")


def assert_reported(report: MergeReport, merged: Path, tied: bool) -> None:
    assert report.max_relative_diff_vs_adapter is not None and report.max_relative_diff_vs_adapter <= 1e-5
    assert report.max_relative_diff_vs_base is not None and report.max_relative_diff_vs_base > 1e-2
    assert json.loads((merged / "merge.json").read_text())["layers"] == report.layers
    assert bool(report.tied) is tied
    names = {name for name, _ in build_empty(open_checkpoint(merged)).named_parameters()}
    assert set(load_file(merged / "model.safetensors")) == names


# --- several adapters as one ---

WEIGHTS = (0.7, -0.4)
COMBINATIONS = {
    "linear": Combination("linear", WEIGHTS),
    "cat": Combination("cat", WEIGHTS),
    "svd": Combination("svd", WEIGHTS),
    "svd of a lower rank": Combination("svd", WEIGHTS, svd_rank=2),
    "ties": Combination("ties", WEIGHTS, density=0.5),
    "ties by frequency": Combination("ties", WEIGHTS, density=0.5, majority_sign_method="frequency"),
    "ties_svd": Combination("ties_svd", WEIGHTS, density=0.5),
    "dare_linear": Combination("dare_linear", WEIGHTS, density=0.5, seed=3),
    "dare_linear_svd": Combination("dare_linear_svd", WEIGHTS, density=0.5, seed=3),
    "dare_ties": Combination("dare_ties", WEIGHTS, density=0.5, seed=3),
    "dare_ties_svd": Combination("dare_ties_svd", WEIGHTS, density=0.5, seed=3),
    "magnitude_prune": Combination("magnitude_prune", WEIGHTS, density=0.5),
    "magnitude_prune_svd": Combination("magnitude_prune_svd", WEIGHTS, density=0.5),
}


@pytest.fixture(scope="module")
def pair(bases: Callable[[str, bool], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Two adapters of a base, with other scales, one of them on more modules."""
    folder = tmp_path_factory.mktemp("pairs")

    def find(name: str) -> list[Path]:
        base, paths = BASES[name], [folder / name / which for which in ("first", "second")]
        if not paths[0].exists():
            more = [*base.attention, base.bridge]
            kinds = [Kind(lambda base: {"lora_alpha": 6}), Kind(lambda base: {"lora_alpha": 3, "target_modules": more})]
            for seed, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
                write_adapter(path, base.load(bases(name, True)), base, kind, seed=seed)
        return paths

    return find


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("combination_name", COMBINATIONS)
def test_combination_is_what_peft_computes(
    combination_name: str,
    name: str,
    bases: Callable[[str, bool], Path],
    pair: Callable[[str], list[Path]],
    tmp_path: Path,
) -> None:
    base, combination, path = BASES[name], COMBINATIONS[combination_name], bases(name, True)
    first, second = pair(name)
    model = base.load(path)
    wrapped = peft.PeftModel.from_pretrained(model, str(first), adapter_name="first")
    wrapped.load_adapter(str(second), adapter_name="second")
    torch.manual_seed(combination.seed)
    wrapped.add_weighted_adapter(
        ["first", "second"],
        list(WEIGHTS),
        "both",
        combination.type,
        svd_rank=combination.svd_rank,
        density=combination.density,
        majority_sign_method=combination.majority_sign_method,
    )
    wrapped.set_adapter("both")
    report = merge(path, [first, second], tmp_path / "merged", combination=combination)
    merged = logits(base.load(tmp_path / "merged"), path)
    assert relative(merged, logits(model.eval(), path)) <= 1e-5
    assert relative(merged, logits(base.load(path), path)) > 1e-2
    assert_reported(report, tmp_path / "merged", True)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    given = [f"{which}/{file}" for which in ("first", "second") for file in files]
    own = [f"{path.name}/{file}" for file in ("config.json", "model.safetensors")]
    beside = [f"{path.name}/{file}" for file in ("tokenizer.json", "tokenizer_config.json")]
    assert list(report.inputs_sha256) == [*own, *given, *beside]


def delta(adapter: Path, module: str, scale: float) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    if f"base_model.model.{module}.lora_A.weight" not in tensors:
        return torch.zeros(())
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    return scale * (b @ a)


@pytest.mark.parametrize("combination_name", ["cat", "svd"])
def test_exact_combinations_by_hand(
    combination_name: str, bases: Callable[[str, bool], Path], pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    """`W + Σ weight · alpha / r · B A`; an svd of rank 8 loses nothing of two adapters of rank 4."""
    combination = replace(COMBINATIONS[combination_name], svd_rank=8 if combination_name == "svd" else None)
    path, (first, second) = bases("llama", True), pair("llama")
    merge(path, [first, second], tmp_path / "merged", combination=combination)
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged"))
    for module in ("language_model.model.layers.1.self_attn.v_proj", "projection.projection"):
        change = delta(first, module, WEIGHTS[0] * 6 / 4) + delta(second, module, WEIGHTS[1] * 3 / 4)
        expected = before[f"{module}.weight"].double() + change
        torch.testing.assert_close(after[f"{module}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_tensor_left_out_of_a_combined_adapter(
    bases: Callable[[str, bool], Path], pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pair("llama")[1], tmp_path / "other"))
    settings = json.loads((other / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"v_proj\.lora_A\.weight: the target_modules of adapter_config.json leave it"):
        adapters = [pair("llama")[0], other]
        merge(bases("llama", True), adapters, tmp_path / "merged", combination=COMBINATIONS["cat"])


def test_dare_depends_on_the_seed_alone(
    bases: Callable[[str, bool], Path], pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    def merged(name: str, seed: int) -> dict[str, torch.Tensor]:
        combination = Combination("dare_ties", WEIGHTS, density=0.5, seed=seed)
        merge(bases("llama", True), pair("llama"), tmp_path / name, combination=combination)
        return load_file(tmp_path / name / "model.safetensors")

    first, again, other = merged("first", 1), merged("again", 1), merged("other", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_rank_stabilized_adapters_are_combined_with_their_own_scales(
    bases: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """PEFT 0.21 would let the sum inherit the first one's `use_rslora`, and so scale it by √r once more."""
    base, path = BASES["llama"], bases("llama", True)
    adapters = [
        write_adapter(tmp_path / str(seed), base.load(path), base, Kind(lambda base: {"use_rslora": True}), seed=seed)
        for seed in (0, 1)
    ]
    merge(path, adapters, tmp_path / "merged", combination=Combination("cat", (1, 1)))
    merge(path, adapters, tmp_path / "in-sequence")
    both = (logits(base.load(tmp_path / name), path) for name in ("merged", "in-sequence"))
    torch.testing.assert_close(*both, atol=1e-4, rtol=0)


def test_attached_combination(
    bases: Callable[[str, bool], Path], pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, path = BASES["llama"], bases("llama", True)
    _, model = attach(path, pair("llama"), combination=COMBINATIONS["ties"])
    merge(path, pair("llama"), tmp_path / "merged", combination=COMBINATIONS["ties"])
    torch.testing.assert_close(logits(model, path), logits(base.load(tmp_path / "merged"), path), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (KINDS["DoRA"], r"lora_magnitude_vector: only LoRA's A and B can be combined; merge such adapters in sequence"),
        (KINDS["saved modules"], r"projection\.projection\.\w+: only LoRA's A and B can be combined"),
        (
            KINDS["LoRA on the decoder"],
            r"attached to language_model\., the first one to the whole model; only adapters",
        ),
        (Kind(lambda base: {"r": 2}), r"combination: PEFT refuses it: All adapters must have the same r value"),
        (Kind(lambda base: {}, std=0), r"lora_B\.weight, …: the adapter changes nothing"),
    ],
)
def test_what_cannot_be_combined(
    kind: Kind, named: str, bases: Callable[[str, bool], Path], pair: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, path = BASES["llama"], bases("llama", True)
    other = write_adapter(tmp_path / "other", base.load(path), base, kind)
    with pytest.raises(InputError, match=named):
        merge(path, [pair("llama")[0], other], tmp_path / "merged", combination=COMBINATIONS["linear"])
