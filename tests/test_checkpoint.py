"""vlm_export.source.checkpoint and vlm_export.tensors: files are read and written as they are, or refused by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlm_export.errors import InputError
from vlm_export.families.registry import find_family
from vlm_export.files import read_json, sha256
from vlm_export.models.library import aliases, library_names
from vlm_export.source.checkpoint import Checkpoint, build_empty, open_checkpoint
from vlm_export.tensors.safetensors_writer import DTYPES, Entry, write_tensors
from vlm_export.tensors.stored import stored_tensors
from vlm_export.tensors.weight_files import weight_files

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A distilvit2 checkpoint, tied, with LoRA and a pooling head."""
    return pico.write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico.write_checkpoint(tmp_path / "base", pico.config(), lora=False)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- opening ---


def test_open(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    assert checkpoint.family.model_type == checkpoint.config["model_type"] == "prefix_conditioning_vlm"
    assert checkpoint.unused == tuple(sorted(key for key in stored if ".head." in key))
    assert len(checkpoint.tensors) + len(checkpoint.lora) + len(checkpoint.unused) == len(stored)
    a, b = (checkpoint.lora[f"language_model.model.layers.1.self_attn.v_proj.lora_{part}.weight"] for part in "AB")
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    ref = checkpoint.tensors["language_model.model.layers.1.self_attn.v_proj.weight"]
    key = "language_model.base_model.model.model.layers.1.self_attn.v_proj.base_layer.weight"
    assert (ref.file, ref.key, ref.dtype, ref.shape) == (folder / "model.safetensors", key, "F32", (16, 32))
    assert str(ref) == f"model.safetensors: {key}"
    assert torch.equal(ref.load(), stored[key])


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_are_the_model_s(decoder: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pico.write_checkpoint(tmp_path / "checkpoint", pico.config(decoder, tied=tied)))
    model = build_empty(checkpoint)
    assert set(checkpoint.tensors) == {name for name, _ in model.named_parameters()}
    assert {name.partition(".lora_")[0] for name in checkpoint.lora} <= {name for name, _ in model.named_modules()}


def config_of(folder: Path, text: str | bytes) -> None:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def values_of(folder: Path, **values: object) -> None:
    config_of(folder, json.dumps(json.loads((folder / "config.json").read_text()) | values))


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "cut off": (lambda folder: config_of(folder, '{"model_type": "prefix'), "config.json: not readable as JSON"),
    "empty": (lambda folder: config_of(folder, ""), "config.json: not readable as JSON"),
    "not UTF-8": (lambda folder: config_of(folder, b'{"a": "\xff"}'), "config.json: not readable as JSON"),
    "a list": (lambda folder: config_of(folder, "[1]"), "config.json: holds a JSON list, not an object"),
    "null": (lambda folder: config_of(folder, "null"), "config.json: holds a JSON NoneType, not an object"),
    "no model_type": (lambda folder: config_of(folder, "{}"), "config.json: no `model_type`; is this a model folder?"),
    "another model_type": (
        lambda folder: values_of(folder, model_type="mllama"),
        "config.json: model_type 'mllama' is not supported; `vlm-export recipes` lists the families that are",
    ),
    "FastVLM with its own code": (
        lambda folder: values_of(folder, model_type="llava_qwen2"),
        "config.json: model_type 'llava_qwen2' is not supported; this is FastVLM with code of its own; convert it to",
    ),
    "a module that is no family": (
        lambda folder: values_of(folder, model_type="base"),
        "config.json: model_type 'base' is not supported",
    ),
    "model_type of another kind": (
        lambda folder: values_of(folder, model_type=["llava"]),
        "config.json: model_type: is ['llava']; it must be a class's name",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_is_refused(case: str, folder: Path) -> None:
    spoil, named = CONFIGS[case]
    spoil(folder)
    assert named in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"projection_type": "conv"}, "projection_type is 'conv', not 'linear' or 'mlp'"),
        ({"text_config": {}}, "'model_type' is missing"),
        ({"vision_config": None}, "vision_config null: cannot build the model"),
        ({"text_config": {"model_type": "no-such-model"}}, "text_config.model_type 'no-such-model': cannot"),
    ],
)
def test_config_that_describes_no_model(values: dict[str, object], named: str, folder: Path) -> None:
    values_of(folder, **values)
    message = refused(lambda: build_empty(open_checkpoint(folder)))
    assert f"{folder / 'config.json'}: " in message and ": cannot build the model: " in message
    assert named in message


def weights_of(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)


def pickled(folder: Path, content: object, **options: object) -> None:
    """Put a pickle in the place of the folder's safetensors."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **options)


WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors (nor model.safetensors"),
    "safetensors that are called a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin: not tensors alone, or too old; save it as safetensors",
    ),
    "a pickle that runs code": (
        lambda folder: pickled(folder, {"a": torch.ones(1), "b": Path("/")}),
        "pytorch_model.bin: not tensors alone, or too old; save it as safetensors",
    ),
    "a pickle of more than tensors": (
        lambda folder: pickled(folder, {"state_dict": {"a": torch.ones(1)}}),
        "pytorch_model.bin: holds more than named tensors; save the model's state_dict as safetensors",
    ),
    "a pickle of a list": (
        lambda folder: pickled(folder, [torch.ones(1)]),
        "pytorch_model.bin: holds more than named tensors",
    ),
    "a pickle of before PyTorch 1.6": (
        lambda folder: pickled(folder, {"a": torch.ones(1)}, _use_new_zipfile_serialization=False),
        "pytorch_model.bin: not tensors alone, or too old; save it as safetensors",
    ),
    "an empty pickle": (
        lambda folder: (pickled(folder, {}), (folder / "pytorch_model.bin").write_bytes(b""))[0],
        "pytorch_model.bin: not tensors alone, or too old",
    ),
    "empty": (lambda folder: weights_of(folder, b""), "model.safetensors: not a readable safetensors file"),
    "not safetensors": (lambda folder: weights_of(folder, b"x" * 99), "model.safetensors: not a readable safetensors"),
    "cut off": (
        lambda folder: weights_of(folder, (folder / "model.safetensors").read_bytes()[:-4]),
        "model.safetensors: not a readable safetensors file",
    ),
    "a Git LFS pointer": (
        lambda folder: weights_of(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors: not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_refused(case: str, folder: Path) -> None:
    spoil, named = WEIGHTS[case]
    spoil(folder)
    assert named in refused(lambda: open_checkpoint(folder))


def test_pickle_is_read_like_safetensors(folder: Path) -> None:
    before = open_checkpoint(folder)
    expected = {name: ref.load().clone() for name, ref in before.tensors.items()}
    pickled(folder, load_file(folder / "model.safetensors"))
    after = open_checkpoint(folder)
    for name, ref in after.tensors.items():
        assert (ref.dtype, ref.shape) == (before.tensors[name].dtype, before.tensors[name].shape)
        assert torch.equal(ref.load(), expected[name])
    assert after.lora.keys() == before.lora.keys()
    assert {ref.file.name for ref in after.tensors.values()} == {"pytorch_model.bin"}


def test_safetensors_before_pickles(folder: Path) -> None:
    torch.save({"nothing": torch.ones(1)}, folder / "pytorch_model.bin")
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3, dtype=torch.int64)}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {key: ref.dtype for key, ref in stored_tensors(tmp_path).items()} == {"a": "BF16", "b": "torch.int64"}


def test_one_file_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "epoch-3.safetensors")
    checkpoint = open_checkpoint(folder / "epoch-3.safetensors")
    assert checkpoint.path == folder
    assert {ref.file.name for ref in checkpoint.tensors.values()} == {"epoch-3.safetensors"}


def test_two_tensors_of_one_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "vision_encoder.vision_model.post_layernorm.weight"
    tensors[key.replace("vision_model.", "")] = tensors[key].clone()
    save_file(tensors, folder / "model.safetensors")
    message = refused(lambda: open_checkpoint(folder))
    assert "a second tensor for vision_encoder.post_layernorm.weight; keep one of the two" in message


def test_module_prefix_is_removed_only_if_all_have_it(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1), "module.module.b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(stored_tensors(tmp_path)) == ["a", "module.b"]
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(stored_tensors(tmp_path)) == {"module.a", "b"}


# --- shards ---


def sharded(folder: Path, weight_map: object, **shards: dict[str, torch.Tensor]) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    sharded(tmp_path, weight_map, one={"a": torch.ones(2)}, two={"b": torch.zeros(3)})
    found = stored_tensors(tmp_path)
    assert {key: ref.file.name for key, ref in found.items()} == weight_map
    assert torch.equal(found["b"].load(), torch.zeros(3))


SHARDS: dict[str, tuple[object, str]] = {
    "a shard is missing": (
        {"a": "one.safetensors", "b": "gone.safetensors"},
        "gone.safetensors: the index names this shard, and it is not there",
    ),
    "above the folder": ({"a": "../one.safetensors"}, "weight_map: '../one.safetensors' is outside"),
    "an absolute path": ({"a": "/etc/one.safetensors"}, "weight_map: '/etc/one.safetensors' is outside"),
    "a folder below": ({"a": "below/one.safetensors"}, "weight_map: 'below/one.safetensors' is outside"),
    "the folder above": ({"a": ".."}, "weight_map: '..' is outside"),
    "no map": (None, "model.safetensors.index.json: no weight_map of tensor names to file names"),
    "a list": (["one.safetensors"], "no weight_map of tensor names to file names"),
    "numbers": ({"a": 1}, "no weight_map of tensor names to file names"),
    "the same tensor twice": (
        {"a": "one.safetensors", "b": "two.safetensors"},
        "two.safetensors: a: is in one.safetensors too; keep one of the two",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_are_refused(case: str, tmp_path: Path) -> None:
    weight_map, named = SHARDS[case]
    two = {"a": torch.zeros(2), "b": torch.zeros(2)}
    folder = sharded(tmp_path, weight_map, one={"a": torch.ones(2)}, two=two)
    assert named in refused(lambda: stored_tensors(folder))


def test_broken_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: not readable as JSON" in refused(lambda: stored_tensors(tmp_path))


# --- loading ---


def test_empty_model_has_no_weights(base: Path) -> None:
    model = build_empty(open_checkpoint(base))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@pytest.mark.parametrize(
    ("decoder", "embedding"), [("llama", EMBEDDING), ("gpt2", "language_model.transformer.wte.weight")]
)
def test_aliases(decoder: str, embedding: str) -> None:
    def names(tied: bool) -> dict[str, str]:
        family = find_family("prefix_conditioning_vlm", "here")
        return aliases(build_empty(Checkpoint(Path("unwritten"), pico.config(decoder, tied=tied), family, {}, {}, ())))

    assert names(tied=True) == {HEAD: embedding}
    assert names(tied=False) == {}


# --- names of other versions of transformers ---

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": 20, "pad_token_id": 0}
PAIR = {
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, **VISION},
    "text_config": {"model_type": "llama", "num_key_value_heads": 1, **TEXT},
}


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(**PAIR, image_token_index=1))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (  # transformers 4.x, at first
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        ),
        (  # 5, unchanged
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        (
            "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        ("language_model.model.embed_tokens.lora_embedding_B", "model.language_model.embed_tokens.lora_embedding_B"),
        ("nothing.like.it", "nothing.like.it"),
    ],
)
def test_names_that_transformers_translates(key: str, name: str, llava: LlavaForConditionalGeneration) -> None:
    assert library_names(llava)(key) == name


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlavaForConditionalGeneration(LlavaConfig(**PAIR, image_token_index=1)),
        lambda: SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                vision_config=PAIR["vision_config"] | {"model_type": "smolvlm_vision"},
                text_config=PAIR["text_config"],
                scale_factor=2,
            )
        ),
        lambda: SiglipVisionModel(AutoConfig.for_model(**PAIR["vision_config"])),
    ],
)
def test_what_transformers_saves_is_named_as_it_loads_it(model: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    saved = model()
    saved.save_pretrained(tmp_path)
    rename = library_names(saved)
    found = {rename(key) for key in stored_tensors(tmp_path)}
    assert found == {name for name, _ in saved.named_parameters()}


# --- files ---


def test_read_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ü": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ü": [1]}
    assert "not readable as JSON" in refused(lambda: read_json(tmp_path))


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["nested", "digits"])
def test_json_that_python_cannot_hold_is_told_in_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert "a.json: not readable as JSON" in refused(lambda: read_json(tmp_path / "a.json"))


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(1 << 18)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def tensors(dtype: torch.dtype) -> pico.Tensors:
    torch.manual_seed(0)
    shapes = {"matrix": (3, 5), "scalar": (), "nothing": (0, 4), "vector": (7,), "odd": (1, 1, 1)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_file_is_what_safetensors_reads(dtype: str, tmp_path: Path) -> None:
    values = tensors(DTYPES[dtype])
    entries = {name: Entry(dtype, tuple(value.shape), lambda value=value: value) for name, value in values.items()}
    write_tensors(tmp_path / "a.safetensors", entries)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    refs = stored_tensors(tmp_path / "a.safetensors")
    assert {ref.dtype for ref in refs.values()} == {dtype}


def test_dtypes_side_by_side_names_and_alignment(tmp_path: Path) -> None:
    """An odd number of half precision values before the rest, and a name that JSON escapes."""
    values = {f'{dtype} "ü"': torch.arange(3).to(DTYPES[dtype]) for dtype in reversed(DTYPES)}
    write_tensors(
        tmp_path / "a.safetensors",
        {name: Entry(name.split()[0], (3,), lambda value=value: value) for name, value in values.items()},
    )
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in values.items())
    header_bytes = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


def test_values_are_cast_once_and_any_layout_is_written(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    write_tensors(
        tmp_path / "a.safetensors",
        {
            "transposed": Entry("F32", (6, 4), lambda: matrix.T),
            "half": Entry("BF16", (4, 6), lambda: matrix),
            "strided": Entry("F16", (4, 3), lambda: matrix[:, ::2]),
        },
    )
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["transposed"], matrix.T)
    assert torch.equal(found["half"], matrix.bfloat16())
    assert torch.equal(found["strided"], matrix[:, ::2].half())


def test_tensors_are_made_one_at_a_time_in_order(tmp_path: Path) -> None:
    sizes = []

    def make() -> torch.Tensor:
        sizes.append((tmp_path / "a.safetensors").stat().st_size)
        return torch.ones(1 << 16)

    write_tensors(tmp_path / "a.safetensors", {name: Entry("F32", (1 << 16,), make) for name in "abc"})
    assert sizes[2] - sizes[1] == 4 << 16


def test_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "a.safetensors", {"a": Entry("F32", (2, 3), lambda: torch.ones(3, 2))})


def test_no_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}
