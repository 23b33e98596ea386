"""Small work folders with all that a command reads, made once; a case spoils a copy."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import encoder_decoders
import pico
import pico_chat
import pico_florence
import yaml
from exported import TOLERANCES, Exported, silent, write_images

from vlm_export import pipeline
from vlm_export.files import Work, sha256, write_json
from vlm_export.measure.bench import Benchmark, Row
from vlm_export.recipe import load_recipe

NAMES = ("captioner", "chat", "single", "families")
_CHATS = (  # those that `pico_chat` writes by their name
    "deepseek_vl",
    "gemma3",
    "glm_ocr",
    "got_ocr2",
    "lfm2_vl",
    "lighton_ocr",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
)
FAMILIES = (
    *_CHATS,
    "encoder_decoder",
    "florence2",
    "idefics3",
    "internvl",
    "onevision",
    "smolvlm",
)
RECIPE = "r.yaml"
SWEEP_FILE = "s.yaml"
SWEEP = {
    "name": "s",
    "recipes": ["r.yaml"],
    "adapters": [{"path": "adapter"}],
    "layouts": ["captioner", "single"],
    "dtypes": ["q8"],
    "runtimes": ["ort"],
    "bench": {"rounds": 1},
    "push": {"repo_id": "org/{name}-{layout}-onnx"},
}
CHAT_PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def captioner(folder: Path, layout: str = "captioner") -> Path:
    """A captioner with a PEFT adapter, merged, recorded, exported, verified, measured; and a sweep of it."""
    settings = pico.config()
    pico.write_checkpoint(folder / "base", settings, lora=False)
    pico.write_peft_adapter(folder / "adapter", dict(settings))
    write_json(folder / "base" / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "base" / "generation_config.json", {"eos_token_id": 256, "max_new_tokens": 6})
    _through(folder, adapters=[{"path": "adapter"}], layout=layout)
    (folder / SWEEP_FILE).write_text(yaml.safe_dump(SWEEP))
    return folder


def single(folder: Path) -> Path:
    """The same in one file."""
    return captioner(folder, "single")


def chat(folder: Path) -> Path:
    """A llava, exported in its own layout."""
    pico_chat.write_llava(folder / "base")
    _through(folder, layout="chat", golden={"images": ["images/*.png"], "prompts": [CHAT_PROMPT]})
    return folder


def families(folder: Path) -> Path:
    """A checkpoint of each other family, by the name of its folder, and a recipe for each."""
    pico_chat.write_onevision(folder / "onevision")
    pico_chat.write_internvl(folder / "internvl")
    pico_chat.write_tiled(folder / "idefics3")
    pico_chat.write_tiled(folder / "smolvlm", "smolvlm")
    for name in _CHATS:
        getattr(pico_chat, f"write_{name}")(folder / name)
    pico_florence.write_checkpoint(folder / "florence2")
    encoder_decoders.write_checkpoint(folder / "encoder_decoder", encoder_decoders.config())
    write_images(folder / "images")
    for name in FAMILIES:
        prompts = ["<CAPTION>"] if name == "florence2" else [CHAT_PROMPT]
        golden = (
            {}
            if name == "encoder_decoder"
            else {"golden": {"images": ["images/0.png", "images/1.png"], "prompts": prompts}}
        )
        recipe = {"name": "t", "model": name, "generation": {"max_new_tokens": 3}} | golden
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def _through(folder: Path, **recipe: object) -> None:
    write_images(folder / "images")
    values = {
        "name": "t",
        "model": "base",
        "generation": {"max_new_tokens": 6},
        "hub": {"license": "apache-2.0"},
        "golden": {"images": ["images/*.png"], "prompts": ["a cat"]},
        "tolerances": TOLERANCES,
    }
    (folder / RECIPE).write_text(yaml.safe_dump(values | recipe))
    made = Exported(load_recipe(folder / RECIPE), Work(folder / "work"))
    pipeline.run_golden(made.recipe, silent)
    pipeline.run_merge(made.recipe, made.work, silent)
    made.export(str(recipe.get("layout", "captioner")))
    assert made.verify().verdict == "pass"
    graphs = {path.name: sha256(path) for path in (made.work.repo / "onnx").glob("*.onnx")}
    row = Row("ort", "fp32", 1, 1, 0.1, 0.1, 10.0, (9.0, 11.0))
    machine: Any = {"cpu": "one", "cpus": 1, "memory_bytes": 1, "system": "any"}
    measured = Benchmark("t", "captioner", ["0.png"], None, 4, 1, machine, {"ort": {}}, graphs, [row])
    write_json(made.work.report / "bench.json", asdict(measured))


def copy(place: Path, folder: Path) -> Path:
    """Another one, that may be spoiled."""
    return Path(shutil.copytree(place, folder, symlinks=True))


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())
