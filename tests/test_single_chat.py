"""Layout single of chats: prompt and pictures go in, the answer comes out, in one run of one graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx
import pico_chat
import pytest
from click.testing import CliRunner
from exported import Exported
from in_apps import by_the_server
from test_chat_families import prepare

from vlm_export.apps.load import load
from vlm_export.cli import main
from vlm_export.doctor.examine import examine
from vlm_export.doctor.repo_view import open_repo as view
from vlm_export.measure import bench
from vlm_export.runtime import Options
from vlm_export.runtime.conversation import Conversation
from vlm_export.runtime.images import open_image
from vlm_export.verify import limits
from vlm_export.verify.golden import load_golden
from vlm_export.verify.report import RUNS, Report

KINDS = {
    "llava": pico_chat.write_llava,
    "llava_onevision": pico_chat.write_onevision,  # tied
    "internvl": pico_chat.write_internvl,
    "got_ocr2": pico_chat.write_got_ocr2,
    "deepseek_vl": pico_chat.write_deepseek_vl,
    "idefics3": pico_chat.write_tiled,
    "smolvlm": lambda folder: pico_chat.write_tiled(folder, "smolvlm"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a kind as one file in float32 and q8, once."""

    @cache
    def once(kind: str) -> Exported:
        made = prepare(tmp_path_factory.mktemp("single"), KINDS[kind])
        made.export("single", ["q8"])
        return made

    return once


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, make: Callable[[str], Exported]) -> Exported:
    return make(request.param)


def failures(report: Report) -> str:
    return "\n".join(f"{c.component} {c.dtype} {c.metric}: {c.detail}" for c in report.failures)


@pytest.mark.node
@pytest.mark.verifies(
    "llava llava_onevision internvl got_ocr2 deepseek_vl idefics3 smolvlm", "single", ort="fp32 q8", node="fp32 q8"
)
def test_one_file_says_what_pytorch_says(one: Exported) -> None:
    """Alone, and padded on the left beside the others; in Node from the conversation, too."""
    assert {path.name for path in (one.work.repo / "onnx").iterdir()} == {"model.onnx", "model_quantized.onnx"}
    report = one.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    found = {(check.metric, check.dtype): check.value for check in report.checks if check.runtime == "ort"}
    assert found[limits.TOKENS_EXACT, "fp32"] == found[limits.TOKENS_TOGETHER, "fp32"] == 1.0
    in_node = {(check.metric, check.dtype): check.value for check in report.checks if check.runtime == "node"}
    assert in_node[limits.TOKENS_EXACT, "fp32"] == in_node[limits.TOKENS_AS_ORT, "q8"] == 1.0
    assert examine(view(one.work.repo)).found == ()


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_the_runtime_says_what_it_says_of_the_graphs_apart(
    kind: str, make: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Of one picture, of two, of none, all together, and in turns."""
    one = make(kind)
    beside = one.copy(tmp_path / "apart")
    beside.export("chat", ["fp32"])
    paths = load_golden(one.recipe.golden_dir).image_paths()
    first, second, wide = (open_image(path) for path in (paths[0], paths[1], paths[-1]))
    apart = load(beside.work.repo, dtype="fp32")
    joined = load(one.work.repo, dtype="fp32")
    assert joined.takes_turns
    items = [([first], "what is it?"), ([wide, second], "two of them"), ([], "a cat")]
    expected = [apart.generate(*item).token_ids for item in items]
    assert [joined.generate(*item).token_ids for item in items] == expected
    assert [answer.token_ids for answer in joined.generate_batch(items)] == expected
    options = Options(max_new_tokens=3, repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=3)
    assert joined.generate(*items[0], options).token_ids == apart.generate(*items[0], options).token_ids
    talks = [Conversation(model) for model in (joined, apart)]
    said = [[talk.say("what is it?", [wide]).token_ids, talk.say("why?").token_ids] for talk in talks]
    assert said[0] == said[1]


@pytest.mark.browser
@pytest.mark.verifies("llava smolvlm", "single", wasm="fp32")
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_in_a_browser(kind: str, make: Callable[[str], Exported]) -> None:
    report = make(kind).verify("wasm", dtypes=["fp32"])
    assert report.verdict == "pass", failures(report)
    assert [check.value for check in report.checks if check.metric == limits.TOKENS_EXACT] == [1.0]


def test_in_what_people_use(make: Callable[[str], Exported]) -> None:
    """`run`, the server whole, streamed and with a second turn, `bench`."""
    made = make("smolvlm")
    picture = load_golden(made.recipe.golden_dir).image_paths()[0]
    answer = load(made.work.repo, dtype="fp32").generate([open_image(picture)], "what is it?").text
    ran = CliRunner().invoke(
        main, ["run", str(made.work.repo), str(picture), "--prompt", "what is it?", "--dtype", "fp32"]
    )
    assert (ran.exit_code, ran.stdout.strip()) == (0, answer), ran.output
    whole, streamed, turns = by_the_server(made, "what is it?", picture)
    assert whole.json()["choices"][0]["message"]["content"] == answer
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == answer
    assert turns.status_code == 200
    done = bench.bench(made.work.repo, [picture], new_tokens=2, rounds=1, threads=1, dtypes=["fp32"])
    assert {row.runtime: row.failure for row in done.rows} == {"ort": None}


def edited(path: Path, change: Callable[[onnx.GraphProto, onnx.GraphProto], None]) -> Iterator[None]:
    """The file with its graph and the body of its loop changed, within."""
    whole = path.read_bytes()
    model = onnx.load(path)
    [loop] = [node for node in model.graph.node if node.op_type == "Loop"]
    change(model.graph, loop.attribute[0].g)
    path.write_bytes(model.SerializeToString())
    yield
    path.write_bytes(whole)


def _before(graph: onnx.GraphProto, output: str, *nodes: onnx.NodeProto) -> onnx.NodeProto:
    """Put nodes before the one that gives an output; returns that one."""
    place = next(place for place, node in enumerate(graph.node) if output in node.output)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    return graph.node[place + len(nodes)]


def rows_one_off(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """Each row of an image's features lies at the place before its own."""
    rows = "prompt.rows_of_images"
    made = [
        onnx.helper.make_node("Constant", [], ["spoilt.one"], value_ints=[1]),
        onnx.helper.make_node("Constant", [], ["spoilt.none"], value_ints=[0]),
        onnx.helper.make_node("Shape", [rows], ["spoilt.count"], start=0, end=1),
        onnx.helper.make_node("Slice", [rows, "spoilt.one", "spoilt.count", "spoilt.none"], ["spoilt.later"]),
        onnx.helper.make_node("Slice", [rows, "spoilt.none", "spoilt.one", "spoilt.none"], ["spoilt.first"]),
        onnx.helper.make_node("Concat", ["spoilt.later", "spoilt.first"], ["spoilt.rows"], axis=0),
    ]
    _before(graph, "prompt.first_inputs_embeds", *made).input[2] = "spoilt.rows"


def places_that_count_padding(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """A new token's place is its column, whatever pads its row."""
    made = [
        onnx.helper.make_node("Shape", ["decoder.attention_mask"], ["spoilt.columns"], start=1, end=2),
        onnx.helper.make_node("Sub", ["spoilt.columns", "fed.one_more"], ["spoilt.last"]),
    ]
    _before(body, "fed.next_position_ids", *made).input[0] = "spoilt.last"
    [added] = [node for node in body.node if "fed.next_position_ids" in node.output]
    added.input[1] = "fed.seen"  # ones, a column


def a_cache_that_is_not_carried(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """The values of the last layer stay as they were."""
    body.node.append(onnx.helper.make_node("Identity", [body.input[-1].name], ["spoilt.values"]))
    body.output[-1].name = "spoilt.values"


def a_mask_that_does_not_grow(graph: onnx.GraphProto, body: onnx.GraphProto) -> None:
    """A new token is not seen by those after it."""
    [grown] = [node for node in body.node if "fed.next_attention_mask" in node.output]
    grown.input[1] = "fed.no_more"


@pytest.mark.parametrize(
    ("change", "metrics"),
    [
        (rows_one_off, {limits.TOKENS_EXACT}),
        (places_that_count_padding, {limits.TOKENS_TOGETHER}),
        (a_cache_that_is_not_carried, {limits.TOKENS_EXACT, RUNS}),
        (a_mask_that_does_not_grow, {limits.TOKENS_EXACT}),
    ],
)
def test_a_wrong_loop_is_caught(
    change: Callable[..., None], metrics: set[str], make: Callable[[str], Exported]
) -> None:
    made = make("llava")
    for _ in edited(made.graph("model"), change):
        report = made.verify("ort", dtypes=["fp32"])
    assert metrics & {check.metric for check in report.failures}, report.checks


@pytest.mark.node
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_a_chat_searches_with_beams(kind: str, tmp_path: Path) -> None:
    """Rows of a prompt become several behind its first run: mask, places and cache of each go with its beam."""
    made = prepare(tmp_path, KINDS[kind], generation={"max_new_tokens": 6, "num_beams": 3})
    made.export("single")
    images = load_golden(made.recipe.golden_dir).facts.images
    assert any(image.searched != image.token_ids for image in images)
    report = made.verify("ort", "node")
    assert report.verdict == "pass", failures(report)
    found = [check.value for check in report.checks if check.metric == limits.SEARCHED_EXACT]
    assert found == [1.0, 1.0]
