"""Tokenizer, chat template, processor and rules beside the weights: whose are taken, by all commands alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pico
import pico_chat
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_export import pipeline
from vlm_export.apps import pytorch_engine
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.preprocessing import chat_template
from vlm_export.recipe import load_recipe
from vlm_export.runtime.options import Options
from vlm_export.source.companions import Choice, gathered

TOKENIZER, TEMPLATE, RULES = "tokenizer.json", "chat_template.jinja", "generation_config.json"
OLD_TEMPLATE = "tokenizer_config.json"


def write(folder: Path, *names: str) -> Path:
    """Each file says which folder it is of."""
    folder.mkdir()
    for name in names:
        key = "chat_template" if name in (OLD_TEMPLATE, "chat_template.json") else "of"
        text = folder.name if name == TEMPLATE else json.dumps({key: folder.name})
        (folder / name).write_text(text)
    return folder


ALL = (TOKENIZER, TEMPLATE, RULES, "preprocessor_config.json", "config.json")
# What the adapters hold, and whose tokenizer, template, processor and rules there are then.
FOLDERS: dict[str, tuple[list[tuple[str, ...]], list[str]]] = {
    "no adapter": ([], ["model"] * 4),
    "one without any": ([()], ["model"] * 4),
    "one with all": ([ALL], ["0"] * 4),
    "a tokenizer": ([(TOKENIZER,)], ["0", "model", "model", "model"]),
    "a tokenizer of files that are older": ([("vocab.json",)], ["0", "model", "model", "model"]),
    "what is no tokenizer alone": ([("special_tokens_map.json",)], ["model"] * 4),
    "a template": ([(TEMPLATE,)], ["model", "0", "model", "model"]),
    "a template in the tokenizer's config": ([(TOKENIZER, OLD_TEMPLATE)], ["0", "0", "model", "model"]),
    "a template in a file of its own": ([("chat_template.json",)], ["model", "0", "model", "model"]),
    "a processor as transformers 5 saves it": ([("processor_config.json",)], ["model", "model", "0", "model"]),
    "rules": ([(RULES,)], ["model", "model", "model", "0"]),
    "two with all": ([ALL, ALL], ["1"] * 4),
    "each with something": ([ALL, (RULES,), (TOKENIZER,)], ["2", "0", "0", "1"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_last_one_that_has_it(case: str, tmp_path: Path) -> None:
    held, expected = FOLDERS[case]
    model = write(tmp_path / "model", *ALL)
    adapters = [write(tmp_path / str(index), *names) for index, names in enumerate(held)]
    with gathered(model, adapters) as found:
        assert [folder.name for folder in found.origins.values()] == expected
        assert chat_template(found.folder) == expected[1]
        assert json.loads((found.folder / RULES).read_text()) == {"of": expected[3]}
        assert json.loads((found.folder / "config.json").read_text()) == {"of": "model"}
        assert (found.folder == model) == (set(expected) == {"model"})
        assert bool(found.chosen) == (set(expected) != {"model"})
        assert all(file.parent.name in expected for file in found.files)
    assert model.is_dir()


def test_a_recipe_says_otherwise(tmp_path: Path) -> None:
    model, adapter, other = (write(tmp_path / name, *ALL) for name in ("model", "adapter", "other"))
    for folder in (model, other):
        (folder / "adapter_config.json").write_text("{}")
    with gathered(model, [adapter], Choice({"tokenizer": model, "chat template": model})) as found:
        assert [folder.name for folder in found.origins.values()] == ["model", "model", "adapter", "adapter"]
    with gathered(model, [adapter], Choice({"processor": other}, "said here")) as found:
        assert [folder.name for folder in found.origins.values()] == ["adapter", "adapter", "other", "adapter"]
        assert chat_template(found.folder) == "said here"


def test_what_is_wrong_is_said_of_the_file_that_was_copied(tmp_path: Path) -> None:
    model, adapter = write(tmp_path / "model", *ALL), write(tmp_path / "adapter", *ALL)
    message = rf"^{adapter}/tokenizer\.json: is wrong; {adapter}: is, too$"
    with pytest.raises(InputError, match=message), gathered(model, [adapter]) as found:
        raise InputError(f"{found.folder / TOKENIZER}: is wrong; {found.folder}: is, too")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    model, adapter = write(tmp_path / "model", *ALL), write(tmp_path / "adapter")
    (adapter / TOKENIZER).symlink_to("/etc/hostname")
    message = r"adapter/tokenizer\.json: a link that leads out"
    with pytest.raises(InputError, match=message), gathered(model, [adapter]):
        pass


QUESTION = "what is it?"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `adapter`, beside which lies a processor with two tokens, another template and other settings."""
    folder = tmp_path_factory.mktemp("fine-tune")
    base = pico_chat.write_llava(folder / "base")
    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(["<cap>", "</cap>"], special_tokens=True)
    processor.chat_template = "<cap>" + pico_chat.TEMPLATE.replace("assistant:", "CAPTION:</cap>")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    (folder / "images").mkdir()
    for index in range(2):
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "images" / f"{index}.png")
    return folder


def plain_transformers(folder: Path, files: Path) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, and greedy tokens of each image, by PEFT and AutoProcessor on `files`."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    processor = AutoProcessor.from_pretrained(files)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    tokens, prompt = [], []
    for path in sorted((folder / "images").iterdir()):
        inputs = processor(images=[Image.open(path)], text=[text], return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist()
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tokens.append(made[0, len(prompt) :].tolist())
    return prompt, tokens


def write_recipe(folder: Path, source: Path, **keys: Any) -> Path:
    folder.mkdir()
    recipe = {
        "name": "m",
        "model": str(source / "base"),
        "adapters": [{"path": str(source / "adapter")}],
        "layout": "chat",
        "generation": {"max_new_tokens": 8},
        "golden": {"images": [str(source / "images" / "*.png")], "prompts": [MESSAGES]},
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_one_truth(whose: str, fine_tune: Path, tmp_path: Path) -> None:
    """Golden, the PyTorch model with its adapter, and the exported repo agree with plain transformers."""
    keys = {} if whose == "adapter" else {"tokenizer": "model", "processor": str(fine_tune / "base")}
    recipe, work = load_recipe(write_recipe(tmp_path / "r", fine_tune, **keys)), Work(tmp_path / "work")
    prompt, tokens = plain_transformers(fine_tune, fine_tune / whose)

    golden = pipeline.run_golden(recipe, silent)
    assert [image.token_ids for image in golden.images] == tokens
    engine = pytorch_engine.from_recipe(recipe)
    images = [Image.open(path) for path in sorted((fine_tune / "images").iterdir())]
    answers = [engine.generate([image], QUESTION, Options()) for image in images]
    assert [list(answer.token_ids) for answer in answers] == tokens
    assert {answer.prompt_tokens for answer in answers} == {len(prompt)}

    report = pipeline.run_merge(recipe, work, silent)
    assert bool(report.companions) == (whose == "adapter")
    pipeline.run_export(recipe, work, silent)
    verified = pipeline.run_verify(recipe, work, silent, runtimes=("ort", "node"))
    assert verified.verdict == "pass", verified.failures


def test_a_template_of_the_recipe_is_the_goldens_too(fine_tune: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r", fine_tune, chat_template=pico_chat.TEMPLATE.replace("assistant:", "say:"))
    golden = pipeline.run_golden(load_recipe(path), silent)
    assert golden.text.endswith("say:") and "<cap>" not in golden.text


def test_a_tokenizer_of_another_model_is_refused_before_any_work(fine_tune: Path, tmp_path: Path) -> None:
    other = pico.write_checkpoint(tmp_path / "other", lora=False)
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["vocab"] |= {f"word{index}": 900 + index for index in range(3)}
    (other / "tokenizer.json").write_text(json.dumps(text))
    recipe, work = load_recipe(write_recipe(tmp_path / "r", fine_tune, tokenizer=str(other))), Work(tmp_path / "work")
    message = r"tokenizer\.json: \d+ tokens, and text_config\.vocab_size is 288: .* another model \('word0'\)"
    with pytest.raises(InputError, match=message):
        pipeline.run_merge(recipe, work, silent)
    with pytest.raises(InputError, match=message):
        pipeline.run_golden(recipe, silent)
    assert not work.merged.exists()


def beyond_the_table(folder: Path) -> Path:
    """A checkpoint whose tokenizer was given tokens that its table of 288 rows never was."""
    base = pico_chat.write_llava(folder)
    processor = AutoProcessor.from_pretrained(base)
    fill = [f"<{index}>" for index in range(288 - len(processor.tokenizer))]
    processor.tokenizer.add_tokens([*fill, "<more>"])
    processor.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    processor.save_pretrained(base)
    assert processor.tokenizer.pad_token_id == 289
    return base


def test_tokens_beyond_the_table_that_nothing_feeds(fine_tune: Path, tmp_path: Path) -> None:
    base = beyond_the_table(tmp_path / "base")
    path = write_recipe(tmp_path / "r", fine_tune, model=str(base), adapters=[])
    recipe, work = load_recipe(path), Work(tmp_path / "work")
    pipeline.run_golden(recipe, silent)
    pipeline.run_merge(recipe, work, silent)
    pipeline.run_export(recipe, work, silent)
    assert pipeline.run_verify(recipe, work, silent, runtimes=("ort", "node")).verdict == "pass"
    assert json.loads((work.repo / "generation_config.json").read_text())["pad_token_id"] < 288


def test_a_token_beyond_the_table_that_the_prompt_feeds(fine_tune: Path, tmp_path: Path) -> None:
    base = beyond_the_table(tmp_path / "base")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it <more>?"}]}]
    golden = {"images": [str(fine_tune / "images" / "*.png")], "prompts": [messages]}
    path = write_recipe(tmp_path / "r", fine_tune, model=str(base), adapters=[], golden=golden)
    message = r"golden\.prompts: .*: '<more>' \(token 288\) has no row in the model's table of 288"
    with pytest.raises(InputError, match=message):
        pipeline.run_golden(load_recipe(path), silent)
    engine = pytorch_engine.from_recipe(load_recipe(path))
    with pytest.raises(InputError, match=r"the prompt: '<more>' \(token 288\) has no row"):
        engine.generate([Image.new("RGB", (16, 16))], "is it <more>?", Options())
