"""Florence-2: LoRA checkpoint → merge → four graphs → the same tokens, and the same boxes, in transformers.js."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pico_florence
import pytest
from click.testing import CliRunner
from exported import Exported, as_fed_to, record, write_images
from in_apps import check_apps
from pico_florence import BOS, END
from safetensors.torch import load_file, save_file
from test_browser import tokens, visit
from transformers import AutoProcessor

from vlm_export import runtime
from vlm_export.apps.load import load
from vlm_export.cli import main
from vlm_export.errors import InputError
from vlm_export.families.florence2 import FAMILY, tasks
from vlm_export.files import read_json
from vlm_export.manifest import load_manifest
from vlm_export.preprocessing import pixel_values
from vlm_export.runtime.drivers import TaskDriver
from vlm_export.runtime.images import open_image
from vlm_export.runtime.sessions import Sessions
from vlm_export.runtime.tasks import Tasks
from vlm_export.start.inspection import inspect
from vlm_export.verify import limits
from vlm_export.verify.golden import load_golden
from vlm_export.verify.report import Report
from vlm_export.wanted import parse
from vlm_export.web.captions import Item
from vlm_export.web.node_runtime import find_node, node_home

EXPORTED = ("fp32", "fp16", "int8", "q8")
DECODER = "decoder_model_merged"
GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
GOLDEN = {"images": ["images/*.png"], "prompts": ["<CAPTION>", "<OD>", f"{GROUNDING} a cat "]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With LoRA on tower, text encoder and decoder."""
    folder = tmp_path_factory.mktemp("florence")
    pico_florence.write_checkpoint(folder / "checkpoint")
    pico_florence.write_adapter(folder / "adapter")
    write_images(folder / "images")
    made = record(folder, adapters=[{"path": "adapter"}], layout="tasks", golden=GOLDEN)
    made.export("tasks", EXPORTED)
    made.check_ranges()
    made.check_by_doctor()
    return made


@pytest.fixture
def broken(exported: Exported, tmp_path: Path) -> Exported:
    """A copy that the test spoils."""
    return exported.copy(tmp_path / "copy")


def failures(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


@pytest.mark.verifies("florence2", "tasks", ort="fp32 fp16 int8 q8", node="fp32 fp16 int8 q8")
def test_says_what_pytorch_says(exported: Exported) -> None:
    report = exported.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    exact = {(c.runtime, c.dtype): c.value for c in report.checks if c.metric == limits.TOKENS_EXACT}
    assert exact[("ort", "fp32")] == exact[("node", "fp32")] == 1.0
    assert exact.keys() == {(target, dtype) for target in ("ort", "node") for dtype in EXPORTED}
    golden = load_golden(exported.recipe.golden_dir).facts
    assert len({tuple(image.token_ids) for image in golden.images}) > 1, "the image does not matter"
    outputs = {check.detail.split(" (")[0] for check in report.checks if check.component == DECODER}
    parts = [f"{kind}.{part}" for kind in ("decoder", "encoder") for part in ("key", "value")]
    assert {f"present.{layer}.{part}" for layer in range(3) for part in parts} <= outputs
    length, own = "1, 2, 7, 33", "decoder_sequence_length"
    assert {(c.component, c.detail) for c in report.checks if c.metric == limits.OTHER_SIZES} == {
        ("vision_encoder", "batch_size 1, 2, 3, 13"),
        ("encoder_model", "batch_size 1, 2, 3, 13"),
        *((part, f"encoder_sequence_length {length}") for part in ("vision_encoder", "encoder_model", DECODER)),
        *((part, "batch_size, rows padded 3") for part in ("vision_encoder", "encoder_model", DECODER)),
        (DECODER, "batch_size 1, 2, 3"),
        *((DECODER, f"{own}{after} {length}") for after in ("", " after a past of 1", " after a past")),
        (DECODER, "batch_size after a past of 1 1, 2, 3"),
    }


def test_every_dtype_runs_in_both_runtimes_alike(broken: Exported) -> None:
    broken.check_every_dtype("tasks", "ort", "node")


@pytest.mark.verifies("florence2", "tasks", wasm="fp32")
def test_in_a_browser(exported: Exported) -> None:
    golden = load_golden(exported.recipe.golden_dir)
    pixels = pixel_values(golden.image_paths()[:1], golden.facts.image_processor)
    item = Item(pixel_values=as_fed_to(exported.work.repo, pixels), prompt=golden.facts.text)
    seen = visit(exported.work.repo, "tasks", [item], "fp32")
    assert seen.dtypes == {"fp32"}
    assert tokens(seen) == [golden.facts.images[0].token_ids]


def test_in_what_people_use(exported: Exported) -> None:
    check_apps(exported, "<CAPTION>")


def test_the_adapter_was_everywhere(exported: Exported) -> None:
    merged = read_json(exported.work.merged / "merge.json")
    names = (
        "model.vision_tower.blocks.1.2.spatial_block.window_attn.qkv",
        "model.vision_tower.blocks.1.0.channel_block.channel_attn.proj",
        "model.vision_tower.blocks.0.0.channel_block.ffn.fc2",
        "model.language_model.encoder.layers.1.self_attn.out_proj",
        "model.language_model.decoder.layers.2.encoder_attn.k_proj",
        "model.language_model.decoder.layers.0.fc1",
    )
    assert all(merged["layers"][name] > 0.01 for name in names)
    assert merged["max_relative_diff_vs_adapter"] < 1e-5 < 1e-3 < merged["max_relative_diff_vs_base"]


def test_what_is_fused(exported: Exported) -> None:
    """Windows are; attention between channels is not, where it would be slower."""
    simplified = load_manifest(exported.work.repo).simplified
    assert {report["unfused_attention"] for report in simplified.values()} == {""}
    fused = {name: report["fused"] for name, report in simplified.items()}
    assert fused["vision_encoder"]["MultiHeadAttention"] == 4
    assert fused["encoder_model"]["MultiHeadAttention"] == 3
    assert fused[DECODER]["GroupQueryAttention"] == fused[DECODER]["MultiHeadAttention"] == 3
    graph = ir.load(exported.graph("vision_encoder")).graph
    assert sum(node.op_type == "Softmax" for node in graph) == 4
    assert simplified["vision_encoder"]["repeated"] == {"model.vision_tower.blocks.1": 1}


def test_what_is_published(exported: Exported) -> None:
    config, generation, images, tokenizer = (
        read_json(exported.work.repo / f"{name}.json")
        for name in ("config", "generation_config", "preprocessor_config", "tokenizer_config")
    )
    assert (config["model_type"], config["is_encoder_decoder"], config["text_config"]["model_type"]) == (
        "florence2",
        True,
        "bart",
    )
    assert generation["decoder_start_token_id"] == generation["forced_eos_token_id"] == END
    assert images["processor_class"] == "Florence2Processor"
    assert images["task_prompts_without_inputs"] == tasks()["task_prompts_without_inputs"]
    assert images["tasks_answer_post_processing_type"]["<OCR_WITH_REGION>"] == "ocr"
    assert tokenizer["padding_side"] == "right"
    assert "chat_template" not in tokenizer


# Tasks


SENTENCES = {
    "<CAPTION>": "What does the image describe?",
    " <OD>\n": "Locate the objects with category name in the image.",
    f"{GROUNDING}a cat": "Locate the phrases in the caption: a cat",
    f"{GROUNDING}  a cat ": "Locate the phrases in the caption: a cat",
    "<REGION_TO_OCR><loc_1><loc_2><loc_3><loc_4>": "What text is in the region <loc_1><loc_2><loc_3><loc_4>?",
    "what is {input}?": "what is {input}?",
    f"{GROUNDING}{{input}} $&": "Locate the phrases in the caption: {input} $&",
}


@pytest.mark.parametrize("prompt", SENTENCES)
def test_sentences_are_those_of_transformers(prompt: str, exported: Exported) -> None:
    """By the tables that PyTorch's processor has, and by those that are published."""
    for settings in (tasks(), read_json(exported.work.repo / "preprocessor_config.json")):
        assert Tasks.of(settings).sentence(prompt) == SENTENCES[prompt]
    processor = AutoProcessor.from_pretrained(exported.work.merged, backend="pil")
    assert processor._construct_prompts(prompt.strip()) == [SENTENCES[prompt]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"the prompt is empty: give a task, such as <OCR>"),
        ("<CAPTION> of a cat", r"<CAPTION> takes no input"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "it takes one message, no turns"),
        (None, "give it a prompt, such as <OCR>"),
    ],
)
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_prompt_that_is_no_task(backend: Any, prompt: Any, message: str, exported: Exported) -> None:
    model = load(exported.work.repo, dtype="fp32", backend=backend, threads=1)
    with pytest.raises(InputError, match=rf"pico: .*{message}"):
        model.generate([open_image(next((exported.recipe.path.parent / "images").iterdir()))], prompt)


def test_a_conversation_is_refused(exported: Exported) -> None:
    model = load(exported.work.repo, dtype="fp32", backend="onnx", threads=1)
    with pytest.raises(InputError, match="a tasks repo takes one prompt about one image, so there is no talking"):
        runtime.Conversation(model)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "golden.prompts: it needs one: a task, such as <OCR>"),
        ([[{"role": "user", "content": "a"}]], "golden.prompts: a task prompt is a text"),
        (["<OCR> this"], "golden.prompts: .*<OCR> takes no input"),
    ],
)
def test_golden_prompts_that_are_no_tasks(prompts: list[Any], message: str, exported: Exported) -> None:
    checkpoint = exported.recipe.path.parent / "checkpoint"
    config, settings = read_json(checkpoint / "config.json"), read_json(checkpoint / "processor_config.json")
    preprocessor = FAMILY.preprocessor(checkpoint, config, settings["image_processor"])
    with pytest.raises(InputError, match=message):
        preprocessor.texts(prompts)


# What is made of answers

SIZE = (641, 480)  # of a picture: width and height, in Python and in transformers.js
BOX, OTHER = "<loc_52><loc_332><loc_932><loc_774>", "<loc_0><loc_7><loc_999><loc_998>"
QUAD = "<loc_1><loc_2><loc_300><loc_2><loc_300><loc_44><loc_1><loc_44>"
ANSWERS = {
    "caption": ("<CAPTION>", "a green car parked in front of a yellow building."),
    "text": ("<OCR>", "CLUB 54\nopen"),
    "boxes": ("<OD>", f"car{BOX}door handle{OTHER}"),
    "boxes of one label": ("<OD>", f"wheel{BOX}{OTHER}"),
    "captions of regions": ("<DENSE_REGION_CAPTION>", f"a green car, parked{BOX}wheel{OTHER}"),
    "no boxes": ("<OD>", "nothing"),
    "regions": ("<REGION_PROPOSAL>", f"{BOX}{OTHER}"),
    "phrases": (GROUNDING, f"A green car{BOX}{OTHER} a yellow building{OTHER}"),
    "lines": ("<OCR_WITH_REGION>", f"CLUB{QUAD}54 é{QUAD}"),
    "category": ("<REGION_TO_CATEGORY>", f"car{BOX}"),
}
PARSE = """
import { AutoProcessor, env } from '@huggingface/transformers';
import { text } from 'node:stream/consumers';
env.allowRemoteModels = false;
const { repo, size, answers } = JSON.parse(await text(process.stdin));
const processor = await AutoProcessor.from_pretrained(repo);
const parsed = answers.map(([task, ids]) => {
    const answer = processor.tokenizer.decode(ids, { skip_special_tokens: false });
    try {
        return processor.post_process_generation(answer, task, size)[task];
    } catch (error) {
        return error.message;
    }
});
console.log(JSON.stringify(parsed));
"""


def parsed_by_both(made: Exported, answers: list[tuple[str, str]]) -> list[tuple[Any, Any]]:
    """What transformers.js and PyTorch's processor make of the same ids."""
    processor = AutoProcessor.from_pretrained(made.recipe.path.parent / "checkpoint", backend="pil")
    ids = [[END, *processor.tokenizer(text)["input_ids"]] for _, text in answers]
    asked = {
        "repo": str(made.work.repo),
        "size": SIZE,
        "answers": [[task, each] for (task, _), each in zip(answers, ids, strict=True)],
    }
    command = [find_node(), "--input-type=module", "--eval", PARSE]
    done = subprocess.run(command, cwd=node_home(), input=json.dumps(asked), capture_output=True, text=True, check=True)
    ours = json.loads(done.stdout)
    theirs = [
        processor.post_process_generation(
            processor.batch_decode([each], skip_special_tokens=False)[0], task=task, image_size=SIZE
        )[task]
        for (task, _), each in zip(answers, ids, strict=True)
    ]
    return list(zip(ours, theirs, strict=True))


def whole(parsed: Any) -> Any:
    """Places without their fractions, which transformers cuts off."""
    if isinstance(parsed, dict):
        return {
            key: [[int(side) for side in box] if key.endswith("boxes") else box for box in boxes]
            for key, boxes in parsed.items()
        }
    return parsed


def test_answers_are_parsed_as_by_pytorch_s_processor(exported: Exported) -> None:
    both = parsed_by_both(exported, list(ANSWERS.values()))
    assert [whole(ours) for ours, _ in both] == [theirs for _, theirs in both]
    made = dict(zip(ANSWERS, both, strict=True))
    assert made["boxes"][1]["bboxes"] == [[33, 159, 597, 371], [0, 3, 640, 479]]
    assert made["boxes"][1]["labels"] == ["car", "door handle"]
    assert made["lines"][0]["quad_boxes"][0][:2] == pytest.approx([1.5 * 0.641, 2.5 * 0.48])


def test_where_parsing_differs(exported: Exported) -> None:
    """As the notes of the family say."""
    answers = [
        ("<OD>", f"café{BOX}"),
        (GROUNDING, f"the image{BOX}a car{BOX}"),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", BOX),
        ("<OPEN_VOCABULARY_DETECTION>", f"car{BOX}"),
    ]
    (cafe, plain), (grounded, kept), (refused, polygons), (unknown, boxes) = parsed_by_both(exported, answers)
    assert (cafe["labels"], plain["labels"]) == (["café"], ["caf"])
    assert (grounded["labels"], kept["labels"]) == (["the image", "a car"], ["a car"])
    assert "not yet implemented" in refused and "not yet implemented" in unknown
    assert polygons["polygons"] and boxes["bboxes_labels"] == ["car"]


# Our runtimes


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2}], ids=str
)
def test_the_runtime_says_it_too(exported: Exported, options: dict[str, Any]) -> None:
    """Prompts of several lengths together, each with the tokens that it gets alone and in PyTorch."""
    paths = sorted((exported.recipe.path.parent / "images").iterdir())
    items = [([open_image(path)], prompt) for path, prompt in zip(paths, GOLDEN["prompts"], strict=True)]
    ours = load(exported.work.repo, dtype="fp32", backend="onnx", threads=1)
    theirs = load(exported.work.repo, backend="torch")
    said = runtime.Options(**options)
    together = ours.generate_batch(items, said)
    for item, one in zip(items, together, strict=True):
        expected, alone = theirs.generate(*item, said), ours.generate(*item, said)
        sequences = [answer.token_ids for answer in (expected, *expected.alternatives)]
        for answer in (one, alone):
            assert [each.token_ids for each in (answer, *answer.alternatives)] == sequences
        assert alone.text == expected.text


def test_places_stay_in_the_text(exported: Exported) -> None:
    text = runtime.text.Text(exported.work.repo)
    ids = [END, BOS, *text.encode("cat<loc_1><loc_20>dog"), END]
    assert text.decode(ids) == "cat<loc_1><loc_20>dog"


def test_run_takes_a_task(exported: Exported) -> None:
    golden = load_golden(exported.recipe.golden_dir)
    image = golden.facts.images[1]
    arguments = [
        "run",
        str(exported.work.repo),
        str(golden.image_paths()[1]),
        "--prompt",
        "<CAPTION>",
        "--dtype",
        "fp32",
    ]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    [result] = json.loads(done.stdout)["results"]
    assert (result["token_ids"], result["text"]) == (image.token_ids, image.caption)


# Faults


def edit(made: Exported, component: str, change: Callable[[ir.Graph], None]) -> None:
    model = ir.load(made.graph(component))
    change(model.graph)
    ir.save(model, made.graph(component))


def spoil(name: str, change: Callable[[np.ndarray], None]) -> Callable[[ir.Graph], None]:
    def spoiled(graph: ir.Graph) -> None:
        weight = next(value for key, value in graph.initializers.items() if key.endswith(name))
        stored = weight.const_value.numpy().copy()
        change(stored)
        weight.const_value = ir.Tensor(stored, name=weight.name)

    return spoiled


def off_by_one(table: np.ndarray) -> None:
    table[:-1] = table[1:].copy()


def swapped_rows(table: np.ndarray) -> None:
    table[[0, 1]] = table[[1, 0]]


@pytest.mark.parametrize(
    ("component", "weight", "change"),
    [
        (DECODER, "embed_positions.weight", off_by_one),
        ("encoder_model", "embed_positions.weight", off_by_one),
        ("vision_encoder", "row_embeddings.weight", swapped_rows),
    ],
)
def test_a_wrong_position_is_caught(
    component: str, weight: str, change: Callable[[np.ndarray], None], broken: Exported
) -> None:
    edit(broken, component, spoil(weight, change))
    of_golden = {c.component for c in broken.verify("ort").failures if c.metric == limits.MAX_RELATIVE_ERROR}
    assert of_golden == {component}


def test_another_layers_cross_cache_is_caught(broken: Exported) -> None:
    """Right in the first run, which computes its own; wrong in every later one."""

    def mix(graph: ir.Graph) -> None:
        one, two = (v for v in graph.inputs if v.name in [f"past_key_values.{i}.encoder.value" for i in (0, 1)])
        one.name, two.name = two.name, one.name

    edit(broken, DECODER, mix)
    found = [check.detail for check in broken.verify("ort").failures]
    assert any("decode step 1" in detail for detail in found)
    assert not any("prefill" in detail for detail in found)


@pytest.mark.parametrize(
    ("component", "mask"), [("encoder_model", "attention_mask"), (DECODER, "encoder_attention_mask")]
)
def test_a_mask_that_is_not_heeded_is_caught(component: str, mask: str, broken: Exported) -> None:
    def ignore(graph: ir.Graph) -> None:
        value = next(value for value in graph.inputs if value.name == mask)
        ones = ir.Value(name="ones", const_value=ir.Tensor(np.array(1), name="ones"))
        graph.register_initializer(ones)
        node = ir.node("Max", [value, ones], name="ignored")
        value.replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, value)
        graph.insert_before(graph[0], node)

    edit(broken, component, ignore)
    report = broken.verify("ort")
    assert {check.metric for check in report.failures} == {limits.OTHER_SIZES}, "no golden is padded"
    assert "batch_size, rows padded 3" in failures(report)


def test_without_cross_states_again(exported: Exported) -> None:
    """With cross keys and values in the cache, the encoder's states do not matter, and nothing is made of them."""
    sessions = Sessions(exported.work.repo / "onnx", "")
    driver = TaskDriver(sessions)
    states = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
    inputs = {"encoder_hidden_states": states, "decoder_input_ids": np.full((2, 1), END)}
    cache = driver.prefill(inputs).cache
    right, wrong = (
        driver.step(np.array([[7], [9]]), cache, inputs | {"encoder_hidden_states": given})
        for given in (states, np.full_like(states, 99))
    )
    assert np.array_equal(right.logits, wrong.logits)
    assert cache["past_key_values.0.encoder.key"].shape() == [2, 4, 9, 8]


# Kinds of checkpoints


@pytest.mark.parametrize("heads", [4, 8])
def test_other_checkpoints(heads: int, tmp_path: Path) -> None:
    """A tokenizer that adds nothing, scaled embeddings; heads of 4 that no fused operator takes."""
    settings = pico_florence.config(layers=2, heads=heads, scaled=True)
    pico_florence.write_checkpoint(tmp_path / "checkpoint", settings, surrounds=False)
    made = record(tmp_path, layout="tasks", golden=GOLDEN)
    made.export("tasks", ("fp32",))
    report = made.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    unfused = load_manifest(made.work.repo).simplified[DECODER]["unfused_attention"]
    assert bool(unfused) == (heads == 8)
    assert runtime.text.Text(made.work.repo).encode("a", add_special_tokens=True)[::2] == [BOS, END]


def test_temporal_positions_are_the_checkpoint_s(tmp_path: Path) -> None:
    """Those that the class computes are rounded in a checkpoint of half precision."""
    pico_florence.write_checkpoint(tmp_path / "checkpoint")
    file, name = tmp_path / "checkpoint" / "model.safetensors", "visual_temporal_embed.pos_idx_to_embed"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, file, {"format": "pt"})
    made = record(tmp_path, layout="tasks", golden=GOLDEN)
    made.export("tasks", ("fp32",))
    assert made.verify("ort").verdict == "pass"
    graph = ir.load(made.graph("vision_encoder")).graph
    stored = next(value for key, value in graph.initializers.items() if key.endswith(name))
    assert np.allclose(stored.const_value.numpy()[0, 1], 1.5)


def test_pictures_of_another_size(tmp_path: Path) -> None:
    checkpoint = pico_florence.write_checkpoint(tmp_path / "checkpoint", pico_florence.config(size=None))
    config = read_json(checkpoint / "config.json")
    assert FAMILY.layouts["tasks"].components(config)[0].inputs[0].shape[2:] == (768, 768)
    settings = read_json(checkpoint / "processor_config.json")["image_processor"]
    with pytest.raises(InputError, match=r"images become 64×64 pixels, and the tower takes 768×768"):
        FAMILY.preprocessor(checkpoint, config, settings)


def test_a_checkpoint_of_microsoft_s_own_code() -> None:
    with pytest.raises(InputError, match=r"davit .*florence-community/Florence-2-base"):
        FAMILY.build({"model_type": "florence2", "vision_config": {"model_type": "davit"}})


def test_inspect_knows_its_parts(exported: Exported) -> None:
    found = inspect(str(exported.recipe.path.parent / "checkpoint"))
    parts = {part.name: part.parameters for part in found.parts}
    assert parts.keys() == {"vision tower", "projector", "token table", "text encoder", "decoder"}
    assert parts["token table"] == pico_florence.VOCABULARY * 32 and found.tied
    estimate = found.expected("tasks", parse(["fp32"], "dtypes"))
    for file in estimate.files:
        written = (exported.work.repo / "onnx" / file.file).stat().st_size
        assert abs(written - file.size_bytes) < 150_000
