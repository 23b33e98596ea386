"""Layout single: the whole caption in one run of one graph, beside the same graphs driven from Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import encoder_decoders
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from elsewhere import WITHOUT_PACKAGE
from exported import Exported, record
from headers import onnxruntime_headers
from PIL import Image
from test_card_snippets import Published, published
from test_demo_page import CAPTION, ask, captioned, status, upload, use, when
from test_single_chat import edited

from vlm_export.apps import demo_site
from vlm_export.apps.load import load
from vlm_export.doctor.examine import examine
from vlm_export.doctor.repo_view import open_repo as view
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.graph import single_file
from vlm_export.graph.next_token import Rules
from vlm_export.graph.pieces import pieces
from vlm_export.manifest import load_manifest
from vlm_export.recipe import find_recipe
from vlm_export.runtime import Options, logits
from vlm_export.runtime.options import Plan
from vlm_export.verify import in_single, limits
from vlm_export.verify.golden import load_golden
from vlm_export.web import chromium, node_runtime
from vlm_export.web.captions import Item
from vlm_export.web.site_server import HEADERS, SiteServer

MODEL = "model"
VOCABULARY, ROWS = 9, 3
EXAMPLES = Path(__file__).parents[1] / "examples" / "one-file"


@pytest.fixture(scope="module")
def shapes(default_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundled recipe as one file, in float32 and q8."""
    made = Exported(find_recipe("shapes-captioner"), Work(tmp_path_factory.mktemp("single") / "work"))
    shutil.copytree(default_repo.parent / "merged", made.work.merged)
    made.export("single", ["q8"])
    return made


@pytest.fixture(scope="module")
def pictures(shapes: Exported) -> list[Image.Image]:
    paths = sorted((shapes.recipe.golden_dir / "images").iterdir())[:4]
    return [Image.open(path).convert("RGB") for path in paths]


@pytest.mark.verifies("prefix_conditioning_vlm", "single", ort="fp32 q8")
def test_one_file_in_each_dtype_says_what_pytorch_says(shapes: Exported) -> None:
    assert {path.name for path in (shapes.work.repo / "onnx").iterdir()} == {"model.onnx", "model_quantized.onnx"}
    assert load_manifest(shapes.work.repo).layout == "single"
    report = shapes.verify("ort")
    assert report.verdict == "pass"
    exact = {(check.metric, check.dtype): check.value for check in report.checks}
    assert exact[limits.TOKENS_EXACT, "fp32"] == exact[limits.TEXTS_EXACT, "q8"] == 1.0
    assert examine(view(shapes.work.repo)).found == ()


@pytest.mark.node
@pytest.mark.verifies("prefix_conditioning_vlm", "single", node="fp32")
def test_the_same_file_in_node(shapes: Exported) -> None:
    report = shapes.verify("node", dtypes=["fp32"])
    assert report.verdict == "pass"
    assert [check.value for check in report.checks if check.metric == limits.TOKENS_EXACT] == [1.0]


@pytest.mark.browser
@pytest.mark.verifies("prefix_conditioning_vlm", "single", webgpu="fp32")
def test_the_same_file_on_webgpu(shapes: Exported) -> None:
    """Its build joins no strings: a text is bytes. A few tokens will do, on a software adapter."""
    golden = load_golden(shapes.recipe.golden_dir)
    seen = chromium.caption(
        shapes.work.repo,
        layout="single",
        dtype="fp32",
        items=[Item(golden.image_paths()[0])],
        generation={"max_new_tokens": 3},
        target="webgpu",
        flags=chromium.SOFTWARE_WEBGPU,
    )
    [made], image = seen.captions, golden.facts.images[0]
    assert [*made.token_ids] == image.token_ids[:3]
    assert made.text == " ".join(image.caption.split()[:3])
    on_processor, nodes = map(int, seen.versions["nodes on the processor"].split(" of "))
    assert 0 < on_processor < nodes / 2


def test_a_text_that_is_cut_is_still_compared() -> None:
    """A tokenizer marks what the graph leaves out."""
    assert in_single.is_text("a cat", "a cat") and not in_single.is_text("a cat", "a dog")
    assert in_single.is_text("a", "a \ufffd") and in_single.is_text("\u20ac", "\ufffd\ufffd\ufffd\ufffd")
    assert in_single.is_text("a b", "a\0 b\0") and in_single.is_text("a", "a \0")
    assert not in_single.is_text("b", "a \ufffd") and not in_single.is_text("a b", "a")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "max_new_tokens": 9},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 12},
        {"max_new_tokens": 1},
    ],
)
def test_options_do_what_they_do_to_the_graphs_apart(
    options: dict[str, Any], shapes: Exported, default_repo: Path, pictures: list[Image.Image]
) -> None:
    one, apart = load(shapes.work.repo, dtype="fp32"), load(default_repo, dtype="fp32")
    for picture in pictures:
        said, expected = (model.generate([picture], options=Options(**options)) for model in (one, apart))
        assert (said.token_ids, said.finish_reason) == (expected.token_ids, expected.finish_reason)


@pytest.mark.node
def test_a_seed_draws_the_same_everywhere(shapes: Exported, default_repo: Path, pictures: list[Image.Image]) -> None:
    one, apart = load(shapes.work.repo, dtype="fp32"), load(default_repo, dtype="fp32")
    path = load_golden(shapes.recipe.golden_dir).image_paths()[0]
    said = []
    for seed, more in ((1, {}), (2**24 - 1, {}), (1, {"top_k": 5}), (1, {"top_k": 0, "top_p": 0.9})):
        options = {"do_sample": True, "temperature": 3.0, "seed": seed, **more}
        token_ids = one.generate([Image.open(path)], options=Options(**options)).token_ids
        assert token_ids == apart.generate([Image.open(path)], options=Options(**options)).token_ids
        made = node_runtime.caption(
            shapes.work.repo, layout="single", dtype="fp32", items=[Item(path)], generation=options
        )
        assert made.captions[0].token_ids == token_ids
        said.append(token_ids)
    assert len(set(said)) >= 3
    chance = Options(do_sample=True, temperature=3.0)
    assert len({one.generate(pictures[:1], options=chance).token_ids for _ in range(4)}) > 1


def test_what_one_file_cannot(shapes: Exported, pictures: list[Image.Image]) -> None:
    model = load(shapes.work.repo)
    for name, value in (("num_beams", 3), ("num_return_sequences", 2)):
        with pytest.raises(InputError, match=rf"{name}: .* is one file that makes one text"):
            model.generate(pictures[:1], options=Options(do_sample=True, **{name: value}))
    with pytest.raises(InputError, match=r"seed: 16777216, but .* is one file that takes at most 16777215"):
        model.generate(pictures[:1], options=Options(do_sample=True, seed=2**24))
    with pytest.raises(InputError, match="captions one image at a time, not 2"):
        model.generate(pictures[:2])
    with pytest.raises(InputError, match="one file, of one dtype"):
        shapes.export("single", ["decoder=q8"])


def test_each_weight_is_there_once(shapes: Exported, default_repo: Path) -> None:
    sizes = [path.stat().st_size for path in (default_repo / "onnx").iterdir() if not path.stem.endswith("_quantized")]
    one = shapes.graph(MODEL).stat().st_size
    assert sum(sizes) <= one < sum(sizes) + 60_000  # what chooses tokens, and the table of their texts


@pytest.mark.node
@pytest.mark.verifies("vision-encoder-decoder", "single", ort="fp32 fp16", node="fp32")
def test_pictures_of_a_client_go_together(tmp_path: Path) -> None:
    """Without the steps in the graph it takes several pictures in a run; rules of the recipe are its defaults."""
    encoder_decoders.write_checkpoint(tmp_path / "checkpoint", encoder_decoders.config())
    rules = {"max_new_tokens": 6, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    made = record(tmp_path, preprocess="client", layout="single", generation=rules)
    made.export("single", ["fp16"])
    report = made.verify("ort")
    assert report.verdict == "pass", report.failures
    assert made.verify("node", dtypes=["fp32"]).verdict == "pass"
    metrics = {check.metric: check.value for check in report.checks if check.dtype == "fp32"}
    assert metrics[limits.TOKENS_TOGETHER] == metrics[limits.TOKENS_EXACT] == 1.0
    graph = ir.load(made.graph(MODEL)).graph
    [body] = [node.attributes["body"].as_graph() for node in graph if node.op_type == "Loop"]
    assert not body.initializers
    keys = [value for name, value in graph.initializers.items() if "crossattention.c_attn.weight" in name]
    users = {use.node for value in keys for use in value.uses()}
    assert users and users <= set(graph), "keys and values of cross-attention are computed before the loop"


def _other_end(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """A text ends at an id that no text has."""
    [ends] = [node for node in (*graph.node, *body.node) if node.output[0] == "next.ends_of_text"]
    ends.attribute[0].ints[0] = 1


def _cache_of_another_layer(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """What the loop carries of the first layer's keys comes back as its values."""
    body.output[-1].name, body.output[-2].name = body.output[-2].name, body.output[-1].name


def _bytes_of_other_pieces(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """Each piece of a text is the one before it."""
    [ends] = [tensor for tensor in graph.initializer if tensor.name == "piece_ends"]
    moved = np.roll(onnx.numpy_helper.to_array(ends), 1)
    ends.CopyFrom(onnx.numpy_helper.from_array(moved, ends.name))


@pytest.mark.parametrize(
    ("change", "metric"),
    [
        (_other_end, limits.TOKENS_EXACT),
        (_cache_of_another_layer, limits.TOKENS_EXACT),
        (_bytes_of_other_pieces, limits.TEXTS_EXACT),
    ],
)
def test_a_wrong_loop_is_caught(change: Callable[..., None], metric: str, shapes: Exported) -> None:
    for _ in edited(shapes.graph(MODEL), change):
        report = shapes.verify("ort", dtypes=["fp32"])
    assert metric in {check.metric for check in report.failures}


def _chosen(rules: Rules, scores: np.ndarray, history: np.ndarray, options: list[float]) -> np.ndarray:
    """The likeliest tokens of those that the text of the rules leaves, in ONNX Runtime; `[rows] int64`."""
    inputs = {
        "options": ("float[n]", np.array(options, dtype=np.float32)),
        "plain": ("float[B, V]", scores),
        "begun": ("int64[B, P]", history[:, :1]),
        "tokens": ("int64[B, T]", history[:, 1:]),
        "iteration": ("int64", np.array(history.shape[1] - 1)),
    }
    signature = ", ".join(f"{kind} {name}" for name, (kind, _) in inputs.items())
    text = f"{rules.options_text()}\n{rules.text()}"
    model = f'<ir_version: 10, opset_import: ["" : 20]> g ({signature}) => (float[B, V] final) {{{text}}}'
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(model).SerializeToString())
    used = {value.name for value in session.get_inputs()}
    [final] = session.run(None, {name: value for name, (_, value) in inputs.items() if name in used})
    return final.argmax(axis=1)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("penalty", [1.0, 3.0])
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
@pytest.mark.parametrize("least", [0, 4])
def test_rules_are_those_of_the_runtime(length: int, penalty: float, ngram: int, least: int) -> None:
    """Of ids without a score, such as those of images, too."""
    random = np.random.default_rng(length)
    scores = random.normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    history = random.integers(0, VOCABULARY + 2, (ROWS, length))
    given = {"eos_token_id": [2, 5], "pad_token_id": 0, "suppress_tokens": [1], "begin_suppress_tokens": [3]}
    options = {
        "max_new_tokens": 9,
        "repetition_penalty": penalty,
        "no_repeat_ngram_size": ngram,
        "min_new_tokens": least,
    }
    rules = Rules.of({"max_new_tokens": 9, **given}, VOCABULARY, 1)
    plan = Plan((2, 5), 0, suppress_tokens=(1,), begin_suppress_tokens=(3,), **options)
    expected = logits.process(scores, history.tolist(), length - 1, plan).argmax(axis=1)
    assert _chosen(rules, scores, history, list(map(float, options.values()))).tolist() == expected.tolist()
    assert Rules.of({**options, **given}, VOCABULARY, 1).defaults[:4] == tuple(map(float, options.values()))


def test_a_rule_that_the_graph_lacks_is_told() -> None:
    with pytest.raises(InputError, match="generation: bad_words_ids: layout single has no such rule"):
        Rules.of({"bad_words_ids": [[1]], "eos_token_id": 1, "pad_token_id": 1, "max_new_tokens": 3}, 9, 1)


BYTES = {"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"Ġa": 0, "Ã©": 1}}}
SENTENCE = {
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {"vocab": [["<unk>", 0], ["▁cat", -1], ["<0x0A>", -2]]},
}


def test_pieces_are_bytes_of_texts() -> None:
    end = {"added_tokens": [{"id": 2, "content": "</s>", "special": True}]}
    assert pieces({**BYTES, **end}, 4) == [b" a", "é".encode(), b"", b""]
    unknown = {"added_tokens": [{"id": 0, "content": "<unk>", "special": True}]}
    assert pieces({**SENTENCE, **unknown}, 3) == [b"", b" cat", b"\n"]
    assert pieces({"decoder": {"type": "WordPiece"}, "model": {"vocab": {}}}, 3) is None


def test_parts_are_gone(default_repo: Path, tmp_path: Path) -> None:
    shutil.copytree(default_repo, tmp_path / "repo")
    written = single_file.write(tmp_path / "repo", "fp32")
    single_file.remove_parts(tmp_path / "repo")
    assert [path.name for path in (tmp_path / "repo" / "onnx").iterdir()] == [written.file]


@pytest.mark.browser
def test_the_demo(shapes: Exported, tmp_path: Path) -> None:
    """The page captions with the one file, and so does the code that it shows."""
    golden = load_golden(shapes.recipe.golden_dir)
    picture, said = golden.image_paths()[0].resolve(), golden.facts.images[0].caption
    site = demo_site.build(shapes.work.repo, shapes.recipe.golden_dir)
    assert not [name for name in site if "transformers" in name]
    with SiteServer(site) as server:
        code = ask("$('code').querySelector('code').textContent")
        beams = ask("[...document.querySelectorAll('input[name=beams]')].map((each) => each.disabled)")
        caption, tokens, offered, page = use(
            server.url, status("Ready"), *captioned(upload(picture)), ask("$('tokens').textContent"), beams, code
        )
    assert caption == said and int(tokens) == len(golden.facts.images[0].token_ids)
    assert offered == [False, True, True, True, True]
    mine = {**site, "mine.html": page.encode(), "photo.jpg": picture, "favicon.ico": b""}
    headers = {name: value for name, value in HEADERS.items() if name != "Content-Security-Policy"}
    with SiteServer(mine, headers) as server:
        [shown] = use(f"{server.url}/mine.html", when("!/^Loading/.test($('caption').textContent)"), CAPTION)
    assert shown == said


@pytest.fixture(scope="module")
def on_the_hub(shapes: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """The one file, verified and pushed, with its card."""
    shapes.verify("ort")
    yield from published(shapes, "acme/one-file", tmp_path_factory.mktemp("hub"))


def test_its_card_in_python(on_the_hub: Published, tmp_path: Path) -> None:
    assert list(on_the_hub.code) == ["In a page", "In Node", "ONNX Runtime alone", "In Python"]
    for title in ("In Python", "ONNX Runtime alone"):
        assert on_the_hub.python(title, tmp_path) == on_the_hub.caption


@pytest.mark.node
def test_its_card_in_node(on_the_hub: Published, tmp_path: Path) -> None:
    assert on_the_hub.node(tmp_path, WITHOUT_PACKAGE) == on_the_hub.caption


@pytest.mark.browser
def test_its_card_in_a_page(on_the_hub: Published, tmp_path: Path) -> None:
    assert on_the_hub.page(tmp_path) == on_the_hub.caption


def _printed(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_example_in_python(shapes: Exported, tmp_path: Path) -> None:
    golden = load_golden(shapes.recipe.golden_dir)
    command = [
        sys.executable,
        str(EXAMPLES / "caption.py"),
        str(shapes.graph(MODEL)),
        str(golden.image_paths()[0].resolve()),
    ]
    assert _printed(command, tmp_path) == golden.facts.images[0].caption


@pytest.mark.node
def test_the_example_in_node(shapes: Exported, tmp_path: Path) -> None:
    golden = load_golden(shapes.recipe.golden_dir)
    shutil.copy(EXAMPLES / "caption.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(node_runtime.node_home() / "node_modules")
    command = ["node", "caption.mjs", str(shapes.graph(MODEL)), str(golden.image_paths()[0].resolve())]
    assert _printed(command, tmp_path) == golden.facts.images[0].caption


@pytest.mark.node
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++, on Linux")
def test_the_example_in_cpp(shapes: Exported, tmp_path: Path) -> None:
    """With the library of the Python package, laid out as a release of ONNX Runtime is."""
    golden = load_golden(shapes.recipe.golden_dir)
    [library] = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    lib = tmp_path / "onnxruntime" / "lib"
    lib.mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (lib / name).symlink_to(library)
    (lib.parent / "include").symlink_to(onnxruntime_headers())
    shutil.copy(EXAMPLES / "caption.cpp", tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "single.md").read_text()
    [build] = re.findall(r"^    (g\+\+ .*)$", page, re.MULTILINE)
    assert _printed([*build.split(), f"-Wl,-rpath,{lib}", "-Wall", "-Wextra", "-Werror"], tmp_path) == ""
    Image.open(golden.image_paths()[0]).convert("RGB").save(tmp_path / "photo.ppm")
    assert _printed(["./caption", str(shapes.graph(MODEL)), "photo.ppm"], tmp_path) == golden.facts.images[0].caption


@pytest.mark.browser
def test_the_example_in_a_page(shapes: Exported) -> None:
    golden = load_golden(shapes.recipe.golden_dir)
    packages = node_runtime.node_home() / "node_modules" / "onnxruntime-web" / "dist"
    files = {
        f"onnxruntime-web/dist/{path.name}": path for path in packages.iterdir() if path.suffix in (".mjs", ".wasm")
    }
    page = {
        "index.html": EXAMPLES / "index.html",
        "photo.png": golden.image_paths()[0].resolve(),
        "model.onnx": shapes.graph(MODEL),
    }
    shown = "document.querySelector('#caption').textContent"
    with SiteServer({**files, **page}, {}) as server:
        steps = [["goto", f"{server.url}/index.html"], ["waitForFunction", f"return {shown} !== 'Loading…'"]]
        seen = chromium.drive(f"{server.url}/index.html", [*steps, ["evaluate", shown]], chromium.WASM)
    assert seen.answers == [golden.facts.images[0].caption]
