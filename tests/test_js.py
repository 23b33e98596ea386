"""The JavaScript package: its own tests under Node, on exported repos and on what PyTorch said of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import encoder_decoders
import numpy as np
import pico
import pico_chat
import pico_florence
import pytest
import torch
import yaml
from exported import Exported, as_fed_to, silent, write_images
from PIL import Image
from test_browser import SOFTWARE_WEBGPU, WASM
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import vlm_export
from vlm_export import bundled, pipeline
from vlm_export.apps import demo_site
from vlm_export.contract import LayoutName
from vlm_export.files import Work
from vlm_export.merging import merge
from vlm_export.preprocessing import image_processor_settings, load_tokenizer
from vlm_export.recipe import find_recipe, load_recipe
from vlm_export.runtime.drivers import begun_with
from vlm_export.runtime.images import open_image
from vlm_export.source import fetch
from vlm_export.verify.recording import eos_token_ids
from vlm_export.web.chromium import drive
from vlm_export.web.node_runtime import node_home
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

ROOT = Path(__file__).parents[1]
PACKAGE = Path(vlm_export.__file__).parent / "js"
TYPES = Path(__file__).parent / "types"
WRONG = TYPES / "wrong.ts"
FOREIGN = {
    "no available backend found",
    "Failed to fetch dynamically imported module",
    "out of memory",
    "bad_alloc",
}
DECLARED = ("index.d.ts", "remote.d.ts", "worker.d.ts")
PROGRAMS = (TYPES / "usage.ts", WRONG)
SHAPES = find_recipe(bundled.DEFAULT_RECIPE)
Options = dict[str, Any]

BEAMS: Options = {"num_beams": 3, "num_return_sequences": 3}
# Every rule, with each number of beams.
RULES: tuple[Options, ...] = (
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0, "repetition_penalty": 1.3},
    {"num_beams": 2, "early_stopping": True, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.6, "repetition_penalty": 0.8},
    {"num_beams": 4, "length_penalty": -1.5, "no_repeat_ngram_size": 1, "num_return_sequences": 3},
    {"num_beams": 3, "min_new_tokens": 15, "max_new_tokens": 20, "length_penalty": 0.0, "num_return_sequences": 3},
    {"num_beams": 2, "repetition_penalty": 0.2},  # what was there before comes again, the start token too
)
# Of the bundled captioner's words.
BANS: tuple[Options, ...] = (
    {"suppress_tokens": [267, 327], "begin_suppress_tokens": [65], "bad_words_ids": [[287], [301, 257]]},
    {"num_beams": 3, "suppress_tokens": [257], "bad_words_ids": [[322, 287], [306]], "num_return_sequences": 2},
    {"forced_eos_token_id": 0, "max_new_tokens": 6},
    {"num_beams": 2, "forced_eos_token_id": [0, 257], "max_new_tokens": 5},
)
STOPPING: tuple[Options, ...] = tuple({"early_stopping": when} for when in (False, True, "never"))


class PyTorch:
    """A recipe's model with its adapter attached, and what it is fed."""

    def __init__(self, exported: Exported):
        recipe = exported.recipe
        self.images = sorted((recipe.path.parent / "images").glob("*.png"))
        found = fetch.sources(recipe)
        self.checkpoint, model = merge.attach(found.model, found.adapters)
        family = self.checkpoint.family
        settings = image_processor_settings(
            self.checkpoint.path, family.image_processor(self.checkpoint.config), recipe.recipe.image_processor
        )
        self.reference = family.reference(model)
        self.preprocessor = family.preprocessor(self.checkpoint.path, self.checkpoint.config, settings)
        self.eos = eos_token_ids(self.checkpoint, load_tokenizer(self.checkpoint.path))

    def model_inputs(self, images: Sequence[Path], text: str) -> dict[str, np.ndarray]:
        if len(images) == 1:
            return self.preprocessor.model_inputs(images[0], text)
        pictures = [[open_image(path) for path in images]]
        made = self.preprocessor.processor(
            images=pictures, text=[text], return_tensors="np", **getattr(self.preprocessor, "call", {})
        )
        wanted = {**self.preprocessor.input_dtypes, **getattr(self.preprocessor, "beside", {})}
        return {name: np.asarray(made[name]).astype(dtype) for name, dtype in wanted.items()}

    @torch.inference_mode()
    def generate(self, inputs: dict[str, np.ndarray], options: Options) -> list[dict[str, Any]]:
        """Ids up to the one that ends the text, and of beams the score."""
        made = self.reference.generate(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            eos_token_id=self.eos,
            pad_token_id=self.eos[0],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        prompt = 0 if self.checkpoint.config["model_type"] == "prefix_conditioning_vlm" else begun_with(inputs).shape[1]
        scores = made.sequences_scores.tolist() if options.get("num_beams", 1) > 1 else [None]
        texts = [self._ended(ids) for ids in made.sequences[:, prompt:].tolist()]
        return [{"token_ids": ids, "score": score} for ids, score in zip(texts, scores, strict=True)]

    def _ended(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self.eos), len(ids))
        return ids[: end + 1]


@dataclass(frozen=True)
class Suite:
    """What the JavaScript tests read: repos by name, and runs with what PyTorch said."""

    folder: Path
    content: dict[str, Any]

    def add(
        self,
        name: str,
        repo: Path,
        pytorch: PyTorch,
        pictures: Sequence[Path | tuple[Path, ...]],
        settings: Sequence[Options],
        prompt: str | None = None,
        *,
        from_files: bool = False,
        **defaults: Any,
    ) -> None:
        """Runs of a repo: each picture, or several in one prompt, with each of the settings.

        They are fed PyTorch's pixels, or make them of the files themselves.
        """
        runs = []
        text = prompt or ""
        for index, images in enumerate((one,) if isinstance(one, Path) else one for one in pictures):
            inputs = pytorch.model_inputs(images, text)
            file = self.folder / f"{name}-{index}.f32"
            fed = as_fed_to(repo, inputs["pixel_values"])
            fed.astype("<f4").tofile(file)
            for options in settings:
                asked = defaults | options
                runs.append(
                    {
                        "images": [str(image.absolute()) for image in images],
                        "pixel_values": {"path": str(file), "shape": fed.shape},
                        "from_files": from_files,
                        "prompt": prompt,
                        "options": asked,
                        "expected": pytorch.generate(inputs, {"do_sample": False, **asked}),
                    }
                )
        self.content["repos"][name] = {"path": str(repo), "runs": runs}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`suite.json`."""
    folder = tmp_path_factory.mktemp("js")
    made = Suite(folder, {"repos": {}, "warped": warped()})
    torch.set_num_threads(1)
    add_shapes(made)
    add_prefix(made)
    add_llava(made)
    add_tiled(made)
    add_cells(made)
    add_patches(made)
    add_patched_tiles(made)
    add_seen_whole(made)
    add_encoder_decoder(made)
    add_florence(made)
    path = folder / "suite.json"
    path.write_text(json.dumps(made.content))
    return path


def add_shapes(suite: Suite) -> None:
    """The bundled captioner: beams on every golden image, all else on the first."""
    exported = Exported(SHAPES, Work(suite.folder / "shapes"))
    pipeline.run_merge(SHAPES, exported.work, silent)
    exported.export("captioner")
    pytorch = PyTorch(exported)
    images = sorted((SHAPES.golden_dir / "images").glob("*.png"))
    assert len(images) == 20
    suite.add("captioner", exported.work.repo, pytorch, images, [BEAMS], max_new_tokens=30)
    suite.add("captioner, rules", exported.work.repo, pytorch, images[:4], [*RULES, *BANS], max_new_tokens=30)


def add_prefix(suite: Suite) -> None:
    """The layouts of such a captioner that take a prompt."""
    pico.write_checkpoint(suite.folder / "prefix-made" / "checkpoint")
    exported = merged(suite.folder / "prefix-made")
    pytorch = PyTorch(exported)
    for layout in ("chat", "components"):
        exported.export(layout)
        repo = exported.work.repo.rename(suite.folder / layout)
        add_pico(suite, layout, pytorch, repo, "a cat")
    add_many_ends(suite, pytorch, suite.folder / layout)


def merged(folder: Path) -> Exported:
    """A checkpoint with a recipe and images beside it, merged."""
    write_images(folder / "images", count=2)
    (folder / "pico.yaml").write_text(yaml.safe_dump({"name": "pico", "model": "checkpoint"}))
    exported = Exported(load_recipe(folder / "pico.yaml"), Work(folder / "work"))
    pipeline.run_merge(exported.recipe, exported.work, silent)
    return exported


def add_many_ends(suite: Suite, pytorch: PyTorch, repo: Path) -> None:
    """Where many tokens end a text, when to stop decides which texts are found."""
    name = "many ends"
    pytorch.eos = [256, *range(0, 260, 8)]
    copy = Path(shutil.copytree(repo, suite.folder / name))
    change_json(copy / "generation_config.json", eos_token_id=pytorch.eos)
    settings = [options | {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0} for options in STOPPING]
    suite.add(name, copy, pytorch, pytorch.images, settings, max_new_tokens=10)
    expected = [json.dumps(run["expected"]) for run in suite.content["repos"][name]["runs"]]
    assert any(len(set(expected[first : first + 3])) == 3 for first in range(0, len(expected), 3))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_llava(suite: Suite) -> None:
    folder = suite.folder / "llava-made"
    pico_chat.write_llava(folder / "checkpoint")
    add_exported(suite, "llava", merged(folder), "is <image> a cat?")


def add_tiled(suite: Suite) -> None:
    folder = suite.folder / "idefics3-made"
    pico_chat.write_tiled(folder / "checkpoint")
    add_exported(suite, "idefics3", merged(folder), "<image>a cat")


def add_cells(suite: Suite) -> None:
    """Pictures of whole cells, which nobody resizes, of several sizes in one prompt."""
    folder = suite.folder / "mistral3-made"
    pico_chat.write_mistral3(folder / "checkpoint")
    exported = merged(folder)
    exported.export("chat")
    pytorch = PyTorch(exported)
    small, wide = pytorch.images[0], folder / "wide.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(wide)
    for images in ((wide,), (small, wide), (wide, small, wide)):
        prompt = "is " + "<image> " * len(images) + "a cat?"
        name = f"mistral3, {len(images)} pictures"
        suite.add(name, exported.work.repo, pytorch, [images], [{}, BEAMS], prompt, from_files=True, max_new_tokens=10)


def add_patches(suite: Suite) -> None:
    """The same of patches with a grid, whose tokens have places in three axes."""
    folder = suite.folder / "qwen2_vl-made"
    pico_chat.write_qwen2_vl(folder / "checkpoint")
    exported = merged(folder)
    exported.export("chat")
    pytorch = PyTorch(exported)
    pictures = [folder / f"{height}-{width}.png" for height, width in ((16, 24), (32, 24))]
    for path in pictures:
        height, width = (int(side) for side in path.stem.split("-"))
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    image = pico_chat.image_text(folder / "checkpoint")
    for images in (pictures[:1], pictures, [*pictures, pictures[0]]):
        prompt = "is " + f"{image} " * len(images) + "a cat?"
        name = f"qwen2_vl, {len(images)} pictures"
        settings = [{}, BEAMS]
        suite.add(
            name, exported.work.repo, pytorch, [tuple(images)], settings, prompt, from_files=True, max_new_tokens=10
        )


def add_patched_tiles(suite: Suite) -> None:
    """The same of tiles of any proportions, for a decoder that keeps states: pictures that nobody resizes or cuts."""
    folder = suite.folder / "lfm2_vl-made"
    pico_chat.write_lfm2_vl(folder / "checkpoint")
    exported = merged(folder)
    exported.export("chat")
    pytorch = PyTorch(exported)
    small, wide = pytorch.images[0], folder / "wide.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 40, 3), dtype=np.uint8)).save(wide)
    for images in ((wide,), (small, wide)):
        prompt = "is " + "<image> " * len(images) + "a cat?"
        name = f"lfm2_vl, {len(images)} pictures"
        suite.add(name, exported.work.repo, pytorch, [images], [{}, BEAMS], prompt, from_files=True, max_new_tokens=10)


def add_seen_whole(suite: Suite) -> None:
    """Prompts and images that their tokens see as a whole, and the text that a processor writes around an image."""
    for name, write, prompt in (
        ("paligemma", pico_chat.write_paligemma, "<image>a cat?"),
        ("gemma3", pico_chat.write_gemma3, "is <start_of_image> a cat?"),
    ):
        folder = suite.folder / f"{name}-made"
        write(folder / "checkpoint")
        exported = merged(folder)
        exported.export("chat")
        pytorch = PyTorch(exported)
        place, pictures = prompt[prompt.index("<") : prompt.index(">") + 1], pytorch.images
        for images, text in (((pictures[0],), prompt), (tuple(pictures[:2]), place + prompt)):
            label = f"{name}, {len(images)} pictures"
            suite.add(label, exported.work.repo, pytorch, [images], [{}, BEAMS], text, max_new_tokens=10)


def add_encoder_decoder(suite: Suite) -> None:
    folder = suite.folder / "encoder-decoder-made"
    encoder_decoders.write_checkpoint(folder / "checkpoint", encoder_decoders.config())
    add_exported(suite, "encoder-decoder", merged(folder), None)


def add_florence(suite: Suite) -> None:
    folder = suite.folder / "florence2-made"
    settings = pico_florence.config()
    settings.text_config.forced_eos_token_id = None  # PyTorch is asked for no rule but those of the runs
    pico_florence.write_checkpoint(folder / "checkpoint", settings)
    add_exported(suite, "florence2", merged(folder), "<CAPTION>", "tasks")


def add_exported(
    suite: Suite, name: str, exported: Exported, prompt: str | None, layout: LayoutName | None = None
) -> None:
    exported.export(layout or ("chat" if prompt else "captioner"))
    add_pico(suite, name, PyTorch(exported), exported.work.repo, prompt)


def add_pico(suite: Suite, name: str, pytorch: PyTorch, repo: Path, prompt: str | None) -> None:
    images = pytorch.images
    rules = [*RULES, *bans(pytorch, prompt)]
    suite.add(name, repo, pytorch, images, [BEAMS, *rules], prompt, max_new_tokens=10)
    if prompt and "<image>" in prompt:
        several = [(images[0], images[1]), (images[1], images[0])]
        suite.add(f"{name}, two images", repo, pytorch, several, [{}, BEAMS], f"{prompt} <image>", max_new_tokens=10)


def bans(pytorch: PyTorch, prompt: str | None) -> Iterator[Options]:
    """Of what comes without them: each changes it, greedily and in beams."""
    inputs = pytorch.model_inputs(pytorch.images[:1], prompt or "")
    free = {"do_sample": False, "max_new_tokens": 10}
    [said] = pytorch.generate(inputs, free)
    first, second, third, *_ = said["token_ids"]
    found: list[Options] = [
        {"suppress_tokens": [first]},
        {"begin_suppress_tokens": [first]},
        {"bad_words_ids": [[second], [second, third]]},
        {"forced_eos_token_id": 256 if said["token_ids"][-1] != 256 else 7},
    ]
    if prompt is None:  # a start token alone
        found += [{"forced_bos_token_id": 70 if first != 70 else 71, "begin_suppress_tokens": [second]}]
    for options in found:
        assert pytorch.generate(inputs, free | options) != [said], options
        yield options
        yield options | {"num_beams": 2, "num_return_sequences": 2}


def warped() -> list[dict[str, Any]]:
    """Scores, and the probabilities that transformers' warpers make of them."""
    torch.manual_seed(0)
    made = []
    for temperature, top_k, top_p, least in (
        (1.0, 0, 1.0, 1),
        (0.7, 0, 0.8, 1),
        (1.0, 5, 1.0, 1),
        (1.3, 20, 0.9, 1),
        (0.5, 1, 0.1, 3),
    ):
        scores = torch.randn(1, 60) * 3
        kept = scores
        if temperature != 1:
            kept = TemperatureLogitsWarper(temperature)(None, kept)
        if top_k:
            kept = TopKLogitsWarper(top_k, min_tokens_to_keep=least)(None, kept)
        if top_p < 1:
            kept = TopPLogitsWarper(top_p, min_tokens_to_keep=least)(None, kept)
        made.append(
            {
                "scores": scores[0].tolist(),
                "options": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
                "least": least,
                "probabilities": kept[0].softmax(-1).tolist(),
            }
        )
    return made


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package where its imports are found, as npm would lay it out."""
    folder = tmp_path_factory.mktemp("npm")
    (folder / "node_modules").mkdir()
    for name in ("@huggingface", "onnxruntime-common", "onnxruntime-node", "sharp"):
        (folder / "node_modules" / name).symlink_to(node_home() / "node_modules" / name)
    return Path(shutil.copytree(PACKAGE, folder / "node_modules" / "vlm-export"))


@pytest.mark.parametrize("file", sorted(path.name for path in (PACKAGE / "test").glob("*.test.js")))
def test_in_node(file: str, package: Path, suite: Path) -> None:
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", str(package / "test" / file)],
        env=os.environ | {"VLM_EXPORT_SUITE": str(suite)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"pass [1-9]", done.stdout)


@pytest.mark.parametrize(
    ("name", "flags", "options", "count"),
    [
        pytest.param("captioner", WASM, {"dtype": "fp32"}, 4, id="wasm"),
        pytest.param("encoder-decoder", SOFTWARE_WEBGPU, {"device": "webgpu"}, 3, id="webgpu"),
    ],
)
def test_in_chromium(suite: Path, name: str, flags: Sequence[str], options: Options, count: int) -> None:
    """PyTorch's beams; on WebGPU their cache never leaves the GPU."""
    repo = json.loads(suite.read_text())["repos"][name]
    packages = node_home() / "node_modules"
    folders = {
        "/": Path(__file__).parent / "browser",
        "/inputs/": suite.parent,
        "/vlm-export/": PACKAGE,
        "/transformers/": packages / "@huggingface/transformers/dist",
        "/onnxruntime/": packages / "onnxruntime-web/dist",
        "/tester/model/resolve/main/": Path(repo["path"]),
    }
    runs = repo["runs"][:count]
    for run in runs:
        run["pixel_values"]["path"] = f"/inputs/{Path(run['pixel_values']['path']).name}"
    request = {"id": "tester/model", "options": options, "runs": runs}
    with SiteServer(files_under(folders), ISOLATION) as server:
        seen = drive(f"{server.url}/js.html", [["evaluate", f"run({json.dumps(request)})"]], flags)
    assert seen.console == seen.foreign == []
    (answer,) = seen.answers
    assert answer["token_ids"] == [[sequence["token_ids"] for sequence in run["expected"]] for run in runs]
    assert (answer["dtype"], answer["device"]) == ("fp32", options.get("device", "wasm"))
    assert answer["loaded"] == 100


def test_no_cdn_unless_the_author_names_it(default_repo: Path) -> None:
    """transformers.js would take the runtime from one where nothing is said."""
    loading = "VisionLanguageModel.from_pretrained('model').catch(({ message }) => message)"
    said = "load_from({ models: './', runtime: 'onnxruntime/' })"
    module = "import('./vlm-export/index.js').then(({ load_from, VisionLanguageModel }) => "
    with SiteServer({**demo_site.build(default_repo, None), "empty.html": b"<!doctype html>"}) as server:
        steps = [
            ["evaluate", f"{module} {loading})"],
            ["evaluate", f"{module} {{ {said}; return {loading} }}).then(String)"],
        ]
        seen = drive(f"{server.url}/empty.html", steps, WASM)
    refused, loaded = seen.answers
    assert refused.startswith("the runtime would be fetched from cdn.jsdelivr.net: say where it lies, as load_from(")
    assert loaded == "[object Object]" and seen.foreign == []


def test_a_model_in_a_worker(default_repo: Path) -> None:
    """Its tokens, its answer, a stop, an error of its own, and its end; a script that is not there."""
    site = demo_site.build(default_repo, SHAPES.golden_dir)
    script = (Path(__file__).parent / "browser" / "remote.js").read_bytes()
    answering = (Path(__file__).parent / "browser" / "remote-worker.js").read_bytes()
    pages = {"empty.html": b"<!doctype html>", "remote.js": script, "remote-worker.js": answering}
    with SiteServer({**site, **pages}) as server:
        steps = [["evaluate", "import('./remote.js').then(({ run }) => run())"]]
        [said] = drive(f"{server.url}/empty.html", steps, WASM).answers
    caption = json.loads(bytes(site["demo.json"]))["samples"][0]["caption"]
    assert (said["layout"], said["dtype"], said["progress"]) == ("captioner", "fp32", 100)
    assert said["text"] == said["last"] == caption and said["tokens"] > 5
    assert len(said["beams"]) == 2 and said["beams"][0] < 0
    assert said["stopped"] == "cancelled"
    assert (
        said["wrong"]
        == "TypeError: layout captioner takes no prompt: export the model with --layout chat to give it one"
    )
    assert said["unsendable"].startswith("TypeError: image: to a worker goes a Blob or an address")
    assert said["ended"] == "Error: the worker failed: it was ended"
    assert said["missing"] == "Error: the worker failed: its script cannot be loaded"


def test_the_errors_of_the_readme_are_those_of_the_package() -> None:
    """Each that is quoted there, but for those of the browser and of ONNX Runtime."""
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", readme[readme.index("## Errors") :], re.MULTILINE)
    quoted = {phrase for row in rows for phrase in re.findall(r"`(.*?)`", row)} - FOREIGN
    source = "".join(path.read_text(encoding="utf-8") for path in sources())
    words = "runtime would be fetched from", "its script cannot be loaded", "it was ended", "the worker failed: "
    assert all(word in source for word in words)
    built = {phrase for phrase in quoted if phrase.startswith(("the runtime would", "the worker failed"))}
    pieces = {piece.strip("' ") for phrase in quoted - built for piece in phrase.split("…")}
    assert len(quoted) > 6
    assert [piece for piece in pieces if piece not in source and piece != "generate() has no option"] == []


def test_places_in_node(package: Path) -> None:
    """Node has a runtime of its own."""
    code = """
        import { load_from } from 'vlm-export';
        for (const places of [{ runtime: './' }, { model: './' }]) {
            try { load_from(places) } catch ({ message }) { console.log(message) }
        }"""
    command = ["node", "--input-type=module", "--eval", code]
    done = subprocess.run(command, cwd=package.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "runtime: Node has its own, onnxruntime-node: leave it out",
        "load_from() has no option 'model'; it has models, runtime",
    ]


@pytest.mark.parametrize("readme", [PACKAGE / "README.md", ROOT / "docs" / "browser.md"], ids=["npm", "docs"])
def test_the_readmes_command_installs_what_node_imports(readme: Path, package: Path, tmp_path: Path) -> None:
    [flags] = re.findall(r"npm install (.*?)\S*/vlm_export/js\b", readme.read_text(encoding="utf-8"))
    offline = ["--offline", "--legacy-peer-deps", "--no-audit", "--no-fund"]  # the peer is put beside it below
    subprocess.run(["npm", "install", *flags.split(), *offline, str(PACKAGE)], cwd=tmp_path, check=True)
    for path in package.parent.iterdir():
        if path.name != package.name:
            (tmp_path / "node_modules" / path.name).symlink_to(path)
    (tmp_path / "main.mjs").write_text("import 'vlm-export';\n")
    subprocess.run(["node", "main.mjs"], cwd=tmp_path, check=True)


def test_manifest() -> None:
    manifest = json.loads((PACKAGE / "package.json").read_text())
    assert manifest["version"] == vlm_export.__version__
    assert (PACKAGE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    pinned = json.loads((ROOT / "vlm_export/node/package.json").read_text())["dependencies"]
    assert manifest["peerDependencies"] == {name: f"^{version}" for name, version in pinned.items()}
    for name in (manifest["types"], *chain.from_iterable(entry.values() for entry in manifest["exports"].values())):
        assert (PACKAGE / name).exists()


def test_npm_packs_what_is_needed(tmp_path: Path) -> None:
    """What npm would publish: all that the entries import and declare, and none of the tests."""
    packed = ["npm", "pack", "--offline", "--json", "--pack-destination", str(tmp_path), str(PACKAGE)]
    [made] = json.loads(subprocess.run(packed, cwd=tmp_path, capture_output=True, check=True).stdout)
    names = {file["path"] for file in made["files"]}
    ours = {path.relative_to(PACKAGE).as_posix() for path in sources()}
    assert names == {*ours, *DECLARED, "LICENSE", "README.md", "package.json"}
    assert (tmp_path / f"vlm-export-{vlm_export.__version__}.tgz").is_file()


def sources() -> Iterator[Path]:
    yield from sorted(PACKAGE.glob("*.js"))
    yield from sorted((PACKAGE / "src").glob("*.js"))


def test_a_browser_can_import_it() -> None:
    imports = {name for path in sources() for name in re.findall(r"from '([^']+)'", path.read_text())}
    assert {name for name in imports if not name.startswith("./")} == {"@huggingface/transformers"}


@dataclass(frozen=True)
class Finding:
    """What the compiler has against a line."""

    file: str
    line: int
    code: str
    message: str


@pytest.fixture(scope="module")
def findings(package: Path) -> list[Finding]:
    """Of programs that use the package, its own declarations included: with --skipLibCheck, an error there is `any`."""
    project = package.parents[1]
    (project / "package.json").write_text('{"type": "module"}')
    for source in PROGRAMS:
        shutil.copy(source, project)
    compiler = node_home(TYPES) / "node_modules" / "typescript" / "bin" / "tsc"
    options = {"--module": "nodenext", "--target": "es2022", "--lib": "es2023,dom"}
    flags = ["--noEmit", "--strict", "--pretty", "false", *chain.from_iterable(options.items())]
    command = ["node", compiler, *flags, *(source.name for source in PROGRAMS)]
    done = subprocess.run(command, cwd=project, capture_output=True, encoding="utf-8")
    found = re.findall(r"^(\S.*?)\((\d+),\d+\): error (TS\d+): (.*(?:\n .*)*)", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return [Finding(file, int(line), code, message) for file, line, code, message in found]


def test_types_of_what_is_right(findings: list[Finding]) -> None:
    """The declarations of transformers.js have errors of their own."""
    foreign = [one for one in findings if "node_modules/" in one.file and "node_modules/vlm-export/" not in one.file]
    assert [one for one in findings if one not in foreign and one.file != WRONG.name] == []


def test_types_of_what_is_wrong(findings: list[Finding]) -> None:
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    expected = [
        (number, *comment.groups())
        for number, line in enumerate(lines, 1)
        if (comment := re.search(r"// (TS\d+): (.*)", line))
    ]
    found = [one for one in findings if one.file == WRONG.name]
    assert [(one.line, one.code) for one in found] == [(line, code) for line, code, _ in expected]
    for one, (_, _, words) in zip(found, expected, strict=True):
        assert words in one.message, f"{WRONG.name}:{one.line}"


@pytest.mark.parametrize(("there", "missing"), [([], "node"), (["node"], "npm")])
def test_the_check_fails_without_its_tools(there: list[str], missing: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in there:
        (tools / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_js.py"],
        env=os.environ | {"PATH": str(tools), "VLM_EXPORT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {missing} is not on PATH: install Node 20 or newer\n"
