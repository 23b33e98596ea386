"""Code for the model card that runs as it is pasted: a page, Node, Python, and ONNX Runtime without any of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from vlm_export.contract import SINGLE_GRAPH
from vlm_export.manifest import ONNX
from vlm_export.publish.addresses import address
from vlm_export.source.generation_rules import HEEDED
from vlm_export.spec.client import Client
from vlm_export.web import node_runtime

PACKAGE = "@huggingface/transformers"
CDN = "https://cdn.jsdelivr.net/npm"
_STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class Snippet:
    """Code that can be pasted and run.

    Attributes:
        title: where it runs.
        install: what has to be installed before, as a line for a shell; nothing for a page.
        language: of the code.
        code: the whole file.
    """

    title: str
    install: str
    language: Literal["html", "js", "python", "text"]
    code: str

    def markdown(self) -> str:
        """A heading and the code."""
        install = f"`{self.install}`, then\n\n" if self.install else ""
        return f"### {self.title}\n\n{install}```{self.language}\n{self.code}\n```"


@dataclass(frozen=True)
class Subject:
    """What snippets are about.

    Attributes:
        repo_id: of the Hub.
        example: the path of a picture in the repo; nothing where it has none.
        client: what loads the repo.
        settings: `preprocessor_config.json`.
        generation: `generation_config.json`.
        has_texts: whether one graph, in one file, gives texts, for which no tokenizer is needed.
    """

    repo_id: str
    example: str
    client: Client
    settings: Mapping[str, Any]
    generation: Mapping[str, Any]
    has_texts: bool = False

    @property
    def photo(self) -> str:
        """The address of the picture, or the name of one that the reader has."""
        return address(self.repo_id, self.example) if self.example else "photo.jpg"


def snippets(subject: Subject) -> list[Snippet]:
    """Every way to run the repo, the easiest first."""
    if subject.client.node == "single":
        return [*_one_file(subject), _python(subject)]
    found = []
    if module := subject.client.javascript(subject.repo_id, subject.photo):
        file = f"{PACKAGE}@{transformers_version()}/dist/transformers.min.js"
        found = [_page(module, PACKAGE, file), _node(module)]
    found.append(_python(subject))
    if subject.client.node == "captioner" and _is_plain(subject):
        found.append(_onnxruntime(subject))
    if subject.client.graphs:
        found.append(Snippet("ONNX Runtime, and a loop of your own", "", "text", subject.client.graphs))
    return found


def _one_file(subject: Subject) -> list[Snippet]:
    """ONNX Runtime alone, where the one file takes a picture as it is, and nothing else, and gives a text."""
    if subject.client.question or not _takes_pictures(subject.settings) or not subject.has_texts:
        return []
    file = f"{ONNX}/{SINGLE_GRAPH}.onnx"
    page = f"""import * as ort from 'onnxruntime-web';

const photo = await createImageBitmap(await (await fetch('{subject.photo}')).blob());
const canvas = new OffscreenCanvas(photo.width, photo.height).getContext('2d');
canvas.drawImage(photo, 0, 0);
const {{ data, width, height }} = canvas.getImageData(0, 0, photo.width, photo.height);
const image = new ort.Tensor('uint8', Uint8Array.from(data.filter((_, place) => place % 4 < 3)), [height, width, 3]);
const options = new ort.Tensor('float32', [], [0]);
const session = await ort.InferenceSession.create('{address(subject.repo_id, file)}');
const {{ texts }} = await session.run({{ image, options }}, ['texts']);
const caption = new TextDecoder().decode(texts.data);"""
    node = f"""import {{ InferenceSession, Tensor }} from 'onnxruntime-node';
import sharp from 'sharp';

const read = async (address) => Buffer.from(await (await fetch(address)).arrayBuffer());
const photo = sharp({_read(subject)}).removeAlpha().toColourspace('srgb');
const {{ data, info }} = await photo.raw().toBuffer({{ resolveWithObject: true }});
const image = new Tensor('uint8', data, [info.height, info.width, 3]);
const options = new Tensor('float32', [], [0]);
const session = await InferenceSession.create(await read('{address(subject.repo_id, file)}'));
const {{ texts }} = await session.run({{ image, options }}, ['texts']);
console.log(new TextDecoder().decode(texts.data));"""
    photo = f'hf_hub_download("{subject.repo_id}", "{subject.example}")' if subject.example else '"photo.jpg"'
    python = f"""import numpy as np
from huggingface_hub import hf_hub_download
from onnxruntime import InferenceSession
from PIL import Image

session = InferenceSession(hf_hub_download("{subject.repo_id}", "{file}"))
photo = np.asarray(Image.open({photo}).convert("RGB"))
[texts] = session.run(["texts"], {{"image": photo, "options": np.zeros(0, np.float32)}})
print(bytes(texts).decode())"""
    install = "pip install onnxruntime pillow numpy huggingface_hub"
    in_node = f"npm install onnxruntime-node@{installed_version('onnxruntime-node')} sharp"
    web = "onnxruntime-web"
    return [
        _page(page, web, f"{web}@{installed_version(web)}/dist/ort.wasm.min.mjs"),
        Snippet("In Node", in_node, "js", node),
        Snippet("ONNX Runtime alone", install, "python", python),
    ]


def _read(subject: Subject) -> str:
    """What `sharp` is given: the bytes of the picture in the repo, or the name of a file that the reader has."""
    return f"await read('{subject.photo}')" if subject.example else f"'{subject.photo}'"


@cache
def transformers_version() -> str:
    """The release of transformers.js that repos are verified with."""
    package = json.loads((node_runtime.SCRIPTS / "package.json").read_text(encoding="utf-8"))
    return str(package["dependencies"][PACKAGE])


@cache
def installed_version(package: str) -> str:
    """The release of a package of npm that comes with it."""
    lock = json.loads((node_runtime.SCRIPTS / "package-lock.json").read_text(encoding="utf-8"))
    return str(lock["packages"][f"node_modules/{package}"]["version"])


def _page(module: str, package: str, file: str) -> Snippet:
    """A page whose module makes `caption`; it imports a package, which is this file of the CDN."""
    code = f"""<!doctype html>
<meta charset="utf-8">
<script type="importmap">
{{
  "imports": {{
    "{package}": "{CDN}/{file}"
  }}
}}
</script>
<p id="caption">Loading…</p>
<script type="module">
{module}
document.querySelector('#caption').textContent = caption;
</script>"""
    return Snippet("In a page", "", "html", code)


def _node(module: str) -> Snippet:
    install = f"npm install {PACKAGE}@{transformers_version()}"
    return Snippet("In Node", install, "js", f"{module}\nconsole.log(caption);")


def _python(subject: Subject) -> Snippet:
    prompt = f', "{subject.client.question}"' if subject.client.question else ""
    fetch, photo = "", '"photo.jpg"'
    if subject.example:
        fetch = "from huggingface_hub import hf_hub_download\n"
        photo = f'hf_hub_download("{subject.repo_id}", "{subject.example}")'
    code = f"""{fetch}from PIL import Image
from vlm_export import load

model = load("{subject.repo_id}")
photo = Image.open({photo})
print(model.generate([photo]{prompt}).text)"""
    return Snippet("In Python", "pip install vlm-export", "python", code)


def _is_plain(subject: Subject) -> bool:
    """Whether a picture becomes pixels by three steps or none, and the likeliest token is always taken as it is."""
    settings = subject.settings
    steps = all(settings.get(name, True) is True for name in _STEPS)
    square = isinstance(size := settings.get("size"), Mapping) and {"height", "width"} <= size.keys()
    whole = not settings.get("do_center_crop") and not settings.get("do_pad")
    greedy = all(subject.generation.get(name) in (None, off) for name, off in HEEDED.items())
    prepared = whole and (_takes_pictures(settings) or (steps and square))
    return prepared and greedy and "max_new_tokens" in subject.generation


def _takes_pictures(settings: Mapping[str, Any]) -> bool:
    """Whether the graph takes pictures as they are, of any size, in 0…255."""
    return not any(settings.get(name, True) for name in _STEPS)


def _pixels(settings: Mapping[str, Any], photo: str) -> str:
    """The lines that make `pixels` `[height, width, 3] float32` of a picture."""
    if _takes_pictures(settings):
        return f"""photo = Image.open({photo}).convert("RGB")
pixels = np.asarray(photo, np.float32)  # the encoder resizes and normalizes it"""
    return f"""size = ({settings["size"]["width"]}, {settings["size"]["height"]})
mean, std = np.float32({_numbers(settings["image_mean"])}), np.float32({_numbers(settings["image_std"])})
photo = Image.open({photo}).convert("RGB").resize(size, {settings.get("resample", 2)})
pixels = (np.asarray(photo, np.float32) * np.float32({settings.get("rescale_factor", 1 / 255)!r}) - mean) / std"""


def _onnxruntime(subject: Subject) -> Snippet:
    settings, generation = subject.settings, subject.generation
    ends = generation["eos_token_id"]
    photo = f'f"{{folder}}/{subject.example}"' if subject.example else '"photo.jpg"'
    code = f"""import numpy as np
from huggingface_hub import snapshot_download
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer

files = ["*.json", "assets/*", "onnx/encoder_model.onnx*", "onnx/decoder_model_merged.onnx*"]
folder = snapshot_download("{subject.repo_id}", allow_patterns=files)
encoder = InferenceSession(f"{{folder}}/onnx/encoder_model.onnx")
decoder = InferenceSession(f"{{folder}}/onnx/decoder_model_merged.onnx")

{_pixels(settings, photo)}
[seen] = encoder.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None]}})

caches = [each for each in decoder.get_inputs() if each.name.startswith("past_key_values")]
past = {{each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in caches}}
outputs = [each.name for each in decoder.get_outputs()]
tokens, ends = [{generation["decoder_start_token_id"]}], {_numbers(ends if isinstance(ends, list) else [ends])}
while len(tokens) <= {generation["max_new_tokens"]} and tokens[-1] not in ends:
    fed = {{"input_ids": np.array([tokens[-1:]]), "encoder_hidden_states": seen, **past}}
    made = dict(zip(outputs, decoder.run(None, fed)))
    tokens.append(int(made["logits"][0, -1].argmax()))
    for name in past:
        if ".encoder." not in name or len(tokens) == 2:  # those of the picture are made once
            past[name] = made[name.replace("past_key_values", "present")]
print(Tokenizer.from_file(f"{{folder}}/tokenizer.json").decode(tokens[1:]))"""
    return Snippet(
        "ONNX Runtime alone",
        "pip install onnxruntime tokenizers pillow numpy huggingface_hub",
        "python",
        code,
    )


def _numbers(values: Sequence[float]) -> str:
    """The values as Python writes a tuple."""
    return repr(tuple(values))
