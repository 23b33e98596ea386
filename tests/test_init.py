"""`vlm-export init`: recipes that can be used as they are written, and say where each value is from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_decoders
import pico
import pico_chat
import pytest
import yaml
from click.testing import CliRunner, Result
from exported import silent, write_images
from hub_server import TOKEN, HubServer, environment
from test_chat_families import KINDS

from vlm_export import bundled, pipeline, ready
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.recipe import PHOTOGRAPHS, Recipe, load_recipe
from vlm_export.start import missing as lacking
from vlm_export.start.draft import Wishes, draft
from vlm_export.start.named import Named
from vlm_export.start.rules import read_rules
from vlm_export.start.uses import dtypes_for

CARD = """---
license: mit
language: en
base_model: [acme/base, ./no/id]
datasets: [acme/photos]
tags: [image-captioning, peft, "base_model:adapter:acme/base"]
---
# A captioner
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with no token of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))


def init(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


def written(*arguments: str) -> Recipe:
    done = init(*arguments)
    assert done.exit_code == 0, done.stderr
    return load_recipe(Path("vlm-export.yaml")).recipe


def problems(*arguments: str) -> dict[str, list[str]]:
    """What later commands will miss, by command."""
    found: dict[str, list[str]] = {}
    for each in json.loads(init(*arguments, "--json", "--force").stdout)["missing"]:
        found.setdefault(each["command"], []).append(each["problem"])
    return found


def test_a_captioner_with_lora_inside() -> None:
    pico.write_checkpoint(Path("my-captioner"))
    Path("my-captioner/README.md").write_text(CARD)
    done = init("my-captioner")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == (
        "written to vlm-export.yaml: my-captioner (prefix_conditioning_vlm, captioner, in fp32, q8, q4)"
    )
    assert done.stdout.splitlines()[-1] == "next: vlm-export convert"
    recipe = load_recipe(Path("vlm-export.yaml")).recipe
    assert (recipe.name, recipe.model, recipe.layout) == ("my-captioner", "./my-captioner", "captioner")
    assert recipe.dtypes == ("fp32", "q8", "q4")
    assert recipe.generation.max_new_tokens == 30, "max_length of its config.json"
    assert (recipe.golden.images, recipe.golden.prompts) == ((PHOTOGRAPHS,), ())
    assert (recipe.hub.license, recipe.hub.language) == ("mit", ("en",))
    assert (recipe.hub.base_model, recipe.hub.datasets) == (("acme/base",), ("acme/photos",))
    assert recipe.hub.tags == ("image-captioning",)
    text = Path("vlm-export.yaml").read_text()
    assert "# LoRA inside: rank 4, alpha 8, on 8 modules: " in text
    assert "  license: mit  # says the card of my-captioner\n" in text
    assert max(map(len, text.splitlines())) <= 100


BEGINS = {"mistral3": "<s>", "gemma3": "<s>", "lfm2_vl": "<|endoftext|>"}  # which templates write
UNTEMPLATED = tuple(kind for kind in KINDS if kind.startswith(("got_ocr2", "paligemma")))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNTEMPLATED])
def test_a_chat_model_is_asked_by_its_own_template(kind: str) -> None:
    KINDS[kind](Path("model"))
    recipe = written("model", "--name", "pico")
    assert (recipe.model_type, recipe.layout) == (kind.partition(",")[0], "chat")
    text = {"type": "text", "text": "What is in this image?"}
    assert recipe.golden.prompts == ([{"role": "user", "content": [{"type": "image"}, text]}],)
    said = " ".join(Path("vlm-export.yaml").read_text().replace("  # ", " ").split())
    image = pico_chat.image_text(Path("model"))
    begin = next((BEGINS[each] for each in BEGINS if kind.startswith(each)), "")
    assert f"The model's own template makes of it: '{begin}user: {image}What is in this image?" in said
    positions = json.loads(Path("model/config.json").read_text())["text_config"]["max_position_embeddings"]
    assert recipe.generation.max_new_tokens == min(128, positions // 2)


@pytest.mark.parametrize("kind", UNTEMPLATED)
def test_a_chat_model_without_a_template(kind: str) -> None:
    KINDS[kind](Path("model"))
    image = pico_chat.image_text(Path("model"))
    assert written("model", "--name", "pico").golden.prompts == (f"{image}\nWhat is in this image?",)
    assert any(line.startswith("no chat template is there") for line in problems("model")["golden"])


def test_without_a_template_it_says_what_to_mend() -> None:
    pico_chat.write_llava(Path("pico-llava"))
    for name in ("chat_template.jinja", "chat_template.json"):
        Path("pico-llava", name).unlink(missing_ok=True)
    assert written("pico-llava", "--question", "Why?").golden.prompts == ("<image>\nWhy?",)
    assert (
        "no chat template is there: write the prompt as the model was trained on it" in problems("pico-llava")["golden"]
    )


def test_a_template_of_texts_alone() -> None:
    pico_chat.write_llava(Path("pico-llava"))
    Path("pico-llava/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}"
    )
    assert written("pico-llava").golden.prompts == ("<image>\nWhat is in this image?",)
    assert "the chat template leaves out <image>" in problems("pico-llava")["golden"]


def test_an_adapter_and_its_model() -> None:
    base = pico_chat.write_llava(Path("my-llava/checkpoint-20"))
    pico_chat.write_adapter(Path("runs/cats"), base)
    Path("runs/cats/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "README.md").write_text(CARD)
    recipe = written(str(base), "runs/cats")
    assert (recipe.name, recipe.model) == ("cats", "./my-llava/checkpoint-20")
    assert [adapter.path for adapter in recipe.adapters] == ["./runs/cats"]
    assert recipe.hub.license == "apache-2.0", "of the adapter"
    text = Path("vlm-export.yaml").read_text()
    assert "  # rank 4, alpha 8, on 11 modules: q_proj (6), down_proj (2), v_proj (2), linear_1; trained on" in text


def test_an_adapter_alone_brings_its_model() -> None:
    base = pico_chat.write_llava(Path("my-llava"))
    pico_chat.write_adapter(Path("runs/cats"), base)
    done = init("runs/cats")
    assert done.stderr == "runs/cats is an adapter: the model is my-llava, which it was trained on\n"
    recipe = load_recipe(Path("vlm-export.yaml")).recipe
    assert (recipe.model, recipe.adapters[0].path) == ("./my-llava", "./runs/cats")


def test_an_adapter_of_another_model_is_told() -> None:
    settings = pico.config()
    pico.write_checkpoint(Path("base"), settings, lora=False)
    adapter = pico.write_peft_adapter(Path("adapter"), settings)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "acme/other"}))
    assert problems("base", "adapter")["merge"] == ["certainty: adapter was trained on acme/other; is that this model?"]
    assert written("base", "adapter", "--force").hub.base_model == ("acme/other",)


def test_paths_are_relative_to_the_recipe() -> None:
    pico.write_checkpoint(Path("models/one"))
    write_images(Path("photos"))
    assert init("models/one", "--images", "photos", "--output", "recipes/one.yaml").stdout.endswith(
        "next: vlm-export convert recipes/one.yaml\n"
    )
    found = load_recipe(Path("recipes/one.yaml"))
    assert (found.recipe.model, found.recipe.golden.images) == ("../models/one", ("../photos/*.png",))
    assert len(ready.images(found)) == 3


def test_bundled_photographs_are_golden_images() -> None:
    pico.write_checkpoint(Path("checkpoint"))
    written("checkpoint", "--name", "pico")
    golden = pipeline.run_golden(load_recipe(Path("vlm-export.yaml")), silent)
    assert [image.file for image in golden.images] == [
        path.name for path in bundled.photographs() if path.suffix == ".jpg"
    ]


@pytest.mark.parametrize(
    ("uses", "dtypes"),
    [
        ([], ("fp32", "q8", "q4")),
        (["browser"], ("fp32", "q8", "q4")),
        (["node"], ("fp32", "int8")),
        (["server", "browser"], ("fp32", "int8", "q8", "q4")),
    ],
)
def test_dtypes_are_those_of_its_use(uses: list[Any], dtypes: tuple[str, ...]) -> None:
    encoder_decoders.write_checkpoint(Path("ved"), encoder_decoders.config())
    assert written("ved", *(part for use in uses for part in ("--for", use))).dtypes == dtypes
    assert not uses or dtypes_for(uses) == dtypes


def test_rules_of_the_checkpoint() -> None:
    encoder_decoders.write_checkpoint(Path("ved"), encoder_decoders.config())
    rules = {"max_length": 16, "num_beams": 4, "repetition_penalty": 1.2, "temperature": 0.5, "no_repeat_ngram_size": 0}
    Path("ved/generation_config.json").write_text(json.dumps(rules))
    assert written("ved").generation.max_new_tokens == 16
    text = Path("vlm-export.yaml").read_text()
    assert "# Taken over from the checkpoint unless set here: repetition_penalty 1.2.\n" in text
    assert "# Left out: num_beams 4. transformers.js is greedy here.\n" in text, "nothing is sampled"
    assert "  max_new_tokens: 16  # max_length of generation_config.json\n" in text


@pytest.mark.parametrize(
    ("values", "layout", "expected"),
    [
        ({"max_new_tokens": 77}, "chat", 77),
        ({"max_length": 4096}, "chat", 128),
        ({"max_length": 64}, "chat", 128),  # it counts the prompt
        ({"max_length": 64}, "captioner", 64),
        ({"max_length": 20}, "captioner", 30),  # the library's own
        ({"max_length": 4096}, "captioner", 30),
        ({}, "captioner", 30),
    ],
)
def test_how_many_tokens(values: dict[str, int], layout: Any, expected: int, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    named = Named("it", tmp_path, {})
    assert read_rules([named], layout).max_new_tokens == expected


def test_names_that_say_something() -> None:
    for folder in ("my-model!/checkpoint-500", "Captions v2", "deep/final", "sea/runs/lora"):
        pico.write_checkpoint(Path(folder))
    assert written("my-model!/checkpoint-500").name == "my-model"
    assert written("Captions v2", "--force").name == "Captions-v2"
    assert written("deep/final", "--force").name == "deep"
    assert written("sea/runs/lora", "--force").name == "my-model"


def test_what_later_commands_will_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_decoders.write_checkpoint(Path("ved"), encoder_decoders.config())
    Path("ved/preprocessor_config.json").unlink()
    for file in Path("ved").glob("*token*"):
        file.unlink()
    monkeypatch.setenv("PATH", "")
    found = problems("ved")
    assert [each.split(":")[0] for each in found["golden"]] == [
        "no tokenizer beside the model",
        "no preprocessor_config.json beside the model",
        "your own pictures (--images)",
    ]
    assert found["verify"] == ["node is not on PATH: install Node 20 or newer, or run with --runtime ort"]
    assert [each.split(":")[0] for each in found["push"]] == [
        "a licence",
        "what the model was made of",
        "a Hugging Face token",
    ]
    write_images(Path("photos"))
    options = ("--license", "mit", "--images", "photos")
    assert "a licence" not in str(problems("ved", *options)) and "your own" not in str(problems("ved", *options))


def test_a_machine_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_export.start.inspection import Machine

    pico.write_checkpoint(Path("my-captioner"))
    monkeypatch.setattr(lacking, "this_machine", lambda: Machine(memory_bytes=1_000_000, disk_bytes=2_000_000))
    found = lacking.missing(draft("my-captioner", (), Wishes(), print))
    assert [each.problem.split(":")[0] for each in found if each.command == "onnx"] == ["disk", "memory"]


def test_of_the_hub_the_commit_is_pinned(tmp_path: Path) -> None:
    base = pico_chat.write_llava(tmp_path / "base")
    (base / "README.md").write_text(CARD)
    upload = (
        "import sys; from pathlib import Path; from vlm_export import hub;"
        "hub.push_folder('acme/pico-llava', Path(sys.argv[1]), message='stand-in')"
    )
    with HubServer(tmp_path / "hub") as hub:
        environ = os.environ | environment(hub.url, tmp_path / "home", TOKEN)
        subprocess.run([sys.executable, "-c", upload, str(base)], env=environ, check=True)
        command = [sys.executable, "-m", "vlm_export", "init", "acme/pico-llava", "--json"]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    recipe = load_recipe(tmp_path / "vlm-export.yaml").recipe
    assert (recipe.name, recipe.model) == ("pico-llava", "acme/pico-llava")
    assert recipe.revision is not None and len(recipe.revision) == 40
    assert (recipe.hub.license, recipe.hub.base_model) == ("mit", ("acme/pico-llava",))
    assert isinstance(recipe.golden.prompts[0], list), "by the template, which was fetched"
    assert not list((tmp_path / "home").rglob("model.safetensors")), "no weights"
    assert "push" not in {each["command"] for each in json.loads(done.stdout)["missing"]}


def test_a_quantized_checkpoint() -> None:
    pico.write_checkpoint(Path("my-captioner"), lora=False)
    path = Path("my-captioner/config.json")
    quantized = {"quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    assert written("my-captioner").base == "dequantized"
    assert problems("my-captioner")["merge"] == [
        "plain weights: these are of bitsandbytes; `model` is better the original"
    ]


def adapter_of(text: str) -> Callable[[], None]:
    def write() -> None:
        Path("adapter").mkdir()
        Path("adapter/adapter_config.json").write_text(text)
        pico.save_file({}, Path("adapter/adapter_model.safetensors"))

    return write


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "there is one": (("ok",), "vlm-export.yaml: exists: write over it with --force, or to another file with --output"),
    "a typo": (("okk",), "no such folder: okk; did you mean ok?"),
    "no adapter": (
        ("ok", "ok2"),
        "ok2: holds a model (config.json) and no adapter_config.json: name it as `model` if it is merged already, or "
        "save the adapter with `save_pretrained`",
    ),
    "a layout": (("ved", "--layout", "chat"), "--layout chat: a vision-encoder-decoder has captioner, single"),
    "no pictures": (("ok", "--images", "fotos"), "--images: no such file or folder: fotos; did you mean photos?"),
    "too few": (("ok", "--images", "photos/0.png"), "--images: 2 pictures or more are needed; in photos/0.png: 1"),
    "no picture": (
        ("ok", "--images", "photos", "--images", "ok/config.json"),
        "--images: ok/config.json: no picture that can be opened",
    ),
    "a name": (
        ("ok", "--name", "a/b", "--output", "x.yaml"),
        "x.yaml: name: 'a/b' names a folder: use letters, digits, '.', '_' and '-'",
    ),
    "an adapter of nothing": (
        ("adapter",),
        "adapter: is an adapter and does not say of what: name the model before it",
    ),
    "a prompt adapter": (
        ("ok", "adapter"),
        "adapter/adapter_config.json: peft_type is 'PROMPT_TUNING'; only LORA can be merged",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(what: str) -> None:
    pico.write_checkpoint(Path("ok"))
    pico.write_checkpoint(Path("ok2"))
    encoder_decoders.write_checkpoint(Path("ved"), encoder_decoders.config())
    adapter_of('{"peft_type": "PROMPT_TUNING"}')()
    write_images(Path("photos"))
    if what == "there is one":
        Path("vlm-export.yaml").write_text("mine")
    arguments, message = WRONG[what]
    done = init(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert [path.name for path in Path().glob("*.yaml")] == (["vlm-export.yaml"] if what == "there is one" else [])
    assert what != "there is one" or Path("vlm-export.yaml").read_text() == "mine"


def test_force_writes_over_it() -> None:
    pico.write_checkpoint(Path("ok"))
    Path("vlm-export.yaml").write_text("mine")
    assert written("ok", "--force").name == "ok"


def test_no_path_of_this_machine_but_the_models(tmp_path: Path) -> None:
    """What is published of a recipe is not to tell where its author's files lie."""
    base = pico_chat.write_llava(tmp_path / "secret" / "pico-llava")
    pico_chat.write_adapter(tmp_path / "secret" / "cats", base)
    written(str(base), str(tmp_path / "secret" / "cats"))
    values = [line for line in Path("vlm-export.yaml").read_text().splitlines() if "secret" in line]
    assert [line.split(":")[0].strip() for line in values] == ["model", "- path"]
    assert yaml.safe_load(Path("vlm-export.yaml").read_text())["model"] == str(base)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    pico_chat.write_llava(tmp_path / "pico-llava")
    script = (
        "import sys; from vlm_export.cli import main; main(['init', 'pico-llava'], standalone_mode=False);"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_broken_adapter_config_is_told() -> None:
    pico.write_checkpoint(Path("ok"))
    adapter_of("{")()
    with pytest.raises(InputError, match=r"adapter_config.json: not readable as JSON"):
        draft("ok", ("adapter",), Wishes(), print)


def test_pictures_that_would_be_too_many_patches_are_made_smaller() -> None:
    """A published Qwen2-VL lets a picture have 12.8 million pixels; one that has a sensible limit keeps it."""
    folder = pico_chat.write_qwen2_vl(Path("checkpoint"))
    assert written(str(folder)).image_processor == {}
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"min_pixels": 256, "max_pixels": 12_845_056}))
    assert written(str(folder), "--force").image_processor == {
        "size": {"shortest_edge": 256, "longest_edge": 512 * 8 * 8}
    }
    text = Path("vlm-export.yaml").read_text()
    assert "lets a picture become 200,704 tokens" in " ".join(text.replace("# ", "").split())
    path.write_text(json.dumps(settings | {"max_pixels": "many"}))
    assert "preprocessor_config.json: max_pixels: is 'many'; it must be" in init(str(folder), "--force").stderr
