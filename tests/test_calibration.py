"""Numbers solved for on a recipe's own images, and plans of which weights get 8 bits, on exported repos."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import Exported, prepare, silent
from onnx import helper

from vlm_export import pipeline
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError
from vlm_export.files import read_json, write_json
from vlm_export.graph.graph_cache import GraphCache
from vlm_export.graph.graph_file import save_graph
from vlm_export.manifest import load_manifest
from vlm_export.quantize import calibration, graph_edits, plan
from vlm_export.quantize.calibration import Run, Solver
from vlm_export.quantize.probe import POSITIONS, Probe, keep_every_position
from vlm_export.quantize.variants import Solutions, Source, Variant
from vlm_export.runtime.logits import softmax
from vlm_export.source.checkpoint import open_checkpoint
from vlm_export.wanted import Goal, parse

DECODER = "decoder_model_merged"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    exported = prepare(tmp_path_factory.mktemp("calibration"))
    exported.export()
    return exported


@pytest.fixture(scope="module")
def source(made: Exported) -> Source:
    merged = open_checkpoint(made.work.merged)
    cache = GraphCache(merged, "captioner")
    component = next(each for each in cache.components if each.has_cache)
    skeleton, _ = cache.find(component) or cache.trace(component)
    return Source(component, skeleton, merged.tensors)


@pytest.fixture(scope="module")
def runs(made: Exported) -> list[Run]:
    images = sorted((made.recipe.path.parent / "images").glob("*.png"))
    return calibration.record(made.work.repo, images, None)[DECODER]


@pytest.fixture
def solver(runs: list[Run], tmp_path: Path) -> Solver:
    return Solver({DECODER: runs}, tmp_path)


def divergence(variant: Variant, solutions: Solutions, runs: list[Run], folder: Path) -> float:
    """Of the variant's next token from float32's, behind every token of the texts, in nats."""
    graphs = []
    for name, graph in (("float32", Variant(variant.source, DTYPES["fp32"]).make()), ("made", variant.make(solutions))):
        assert keep_every_position(graph.graph)
        save_graph(graph, folder / f"{name}.onnx")
        graphs.append(onnxruntime.InferenceSession(str(folder / f"{name}.onnx")))
    found = []
    for run in (run for run in runs if run.is_text):
        names = {value.name for value in graphs[0].get_inputs()}
        feeds = {name: value for name, value in run.feeds.items() if name in names}
        feeds[POSITIONS] = np.arange(run.feeds["input_ids"].shape[1])
        expected, own = (softmax(graph.run(["logits"], feeds)[0][0].astype(np.float64)) for graph in graphs)
        found.append((expected * np.log(expected / own)).sum(axis=-1).mean())
    return float(np.mean(found))


def test_what_is_recorded(runs: list[Run]) -> None:
    """A prompt and its texts for each image; all tokens of a text in one run, behind the prompt's cache."""
    assert [run.is_text for run in runs] == ([False] + [True] * calibration.FOR_NUMBERS.texts) * 3
    texts = [run.feeds["input_ids"] for run in runs if run.is_text]
    assert {text.shape for text in texts} == {(1, 60)}, "as many as a decoder of 64 positions has room for"
    assert len({text.tobytes() for text in texts}) > calibration.FOR_NUMBERS.texts, (
        "drawn, not the likeliest again and again"
    )
    lengths = {run.feeds["past_key_values.0.key"].shape[2] for run in runs if run.is_text}
    assert len(lengths) == 1 and 0 not in lengths


def test_what_is_recorded_is_the_same_every_time(made: Exported, runs: list[Run]) -> None:
    images = sorted((made.recipe.path.parent / "images").glob("*.png"))
    again = calibration.record(made.work.repo, images, None)[DECODER]
    for one, other in zip(runs, again, strict=True):
        np.testing.assert_array_equal(one.feeds["input_ids"], other.feeds["input_ids"])


def test_a_probe_computes_every_position(source: Source, runs: list[Run]) -> None:
    probe = Probe(source.model)
    [logits] = probe.run(runs[1].feeds, ["logits"])
    assert logits.shape[1] == 60
    assert probe.keeps_all


def test_squares_are_of_all_rows_however_they_are_collected(
    source: Source, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = list(dict.fromkeys(value for value, _ in Variant(source, DTYPES["q4"]).to_solve()))
    probe = Probe(source.model, values)
    found = calibration.collect_squares(probe, values, runs[:4])
    rows = [
        np.concatenate([probe.run(run.feeds, [value])[0].reshape(-1, found[value].shape[0]) for run in runs[:4]])
        for value in values
    ]
    for value, all_rows in zip(values, rows, strict=True):
        np.testing.assert_allclose(found[value], all_rows.T @ all_rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["q4", "q4f16", "q2"])
def test_solved_numbers_are_nearer_to_float32(
    dtype: str, source: Source, solver: Solver, runs: list[Run], tmp_path: Path
) -> None:
    variant = Variant(source, DTYPES[dtype])
    solutions = solver.solutions(variant)
    assert len(solutions) == len(list(variant.to_solve())) > 0
    assert divergence(variant, solutions, runs, tmp_path) < 0.9 * divergence(variant, {}, runs, tmp_path)


def test_two_dtypes_share_what_is_solved_for(source: Source, solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    first = solver.solutions(Variant(source, DTYPES["q4"]))
    monkeypatch.setattr(calibration, "solve", lambda *_: pytest.fail("solved again"))
    second = solver.solutions(Variant(source, DTYPES["q4f16"]))
    assert first.keys() == second.keys()


def test_weights_are_solved_for_in_as_many_passes_as_memory_needs(
    source: Source, solver: Solver, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = dict(solver.solutions(Variant(source, DTYPES["q4"])))
    monkeypatch.setattr(calibration, "SQUARES_BYTES", 1)
    (tmp_path / "again").mkdir()
    one_by_one = Solver({DECODER: runs}, tmp_path / "again").solutions(Variant(source, DTYPES["q4"]))
    for name, solution in at_once.items():
        np.testing.assert_array_equal(one_by_one[name].numbers, solution.numbers)


def test_a_plan_spends_bytes_where_they_save_most(
    source: Source, solver: Solver, runs: list[Run], tmp_path: Path
) -> None:
    least = plan.choose(source, solver, Goal(kl=1e9))
    most = plan.choose(source, solver, Goal(kl=0.0))
    assert {weight.bits for weight in least.weights.values()} == {4}
    assert {weight.bits for weight in most.weights.values()} == {8} and most.kl == 0
    between = plan.choose(source, solver, Goal(bytes=(least.bytes + most.bytes) // 2))
    assert least.bytes < between.bytes < most.bytes and 0 < between.kl < least.kl
    gains = {bits: [w.cost / w.bytes_saved for w in between.weights.values() if w.bits == bits] for bits in (4, 8)}
    assert np.mean(gains[8]) > np.mean(gains[4])
    found = []
    for number, made in enumerate((least, between, most)):
        variant = made.variant(source)
        solutions = solver.solutions(variant)
        path = tmp_path / f"{number}.onnx"
        save_graph(variant.make(solutions), path)
        assert made.bytes - 40_000 < path.stat().st_size <= made.bytes
        found.append(divergence(variant, solutions, runs, tmp_path))
    assert found == sorted(found, reverse=True)


def test_a_budget_below_four_bits_is_refused(source: Source, solver: Solver) -> None:
    with pytest.raises(InputError, match=r"--budget: decoder_model_merged has [0-9.e-]+ MB even in 4 bits"):
        plan.choose(source, solver, Goal(bytes=1000))


def test_a_plan_is_edited_and_replayed(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    pipeline.run_export(copy.recipe, copy.work, silent, wanted=parse(["auto"], "--quantize", Goal(kl=1e9)))
    path = copy.work.repo / plan.FILE
    assert "bits: 8" not in path.read_text()
    path.write_text(path.read_text().replace("bits: 4", "bits: 8", 1))
    edited = plan.load(path)
    pipeline.run_export(copy.recipe, copy.work, silent, wanted=parse(["q4"], "--quantize"), plan=edited)
    assert plan.load(path) == edited
    assert load_manifest(copy.work.repo).dtypes == ["fp32", "q4"]
    graph = onnx.load(copy.graph(f"{DECODER}_q4"))
    bits = [helper.get_node_attr_value(node, "bits") for node in graph.graph.node if node.op_type == "MatMulNBits"]
    assert sorted(bits, reverse=True)[:3] == [8, 8, 4], "the head, the edited one, and the rest"


@pytest.mark.parametrize(("name", "why"), [("lm_head.weight", ""), (None, "; table and head have 8 bits")])
def test_a_plan_for_other_weights(name: str | None, why: str, source: Source) -> None:
    name = name or next(iter(graph_edits.heads(source.model)))
    made = plan.Plan(DECODER, 0, 0.0, {name: plan.PlannedWeight(4)})
    with pytest.raises(InputError, match=f"has no matrix '{re.escape(name)}' for 4 bits{why}: remove it"):
        made.variant(source)


def test_a_prompt_that_leaves_no_room_for_a_text(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    config = read_json(copy.work.repo / "config.json")
    write_json(copy.work.repo / "config.json", config | {"decoder": config["decoder"] | {"max_position_embeddings": 4}})
    image = copy.recipe.path.parent / "images" / "0.png"
    with pytest.raises(InputError, match=r"0\.png: its prompt leaves the model no position for a text"):
        calibration.record(copy.work.repo, [image], None)


@pytest.mark.parametrize("layout", ["captioner", "chat", "components"])
def test_every_dtype_of_every_layout(layout: str, made: Exported, tmp_path: Path) -> None:
    made.copy(tmp_path / "copy").check_every_dtype(layout, "ort")


WRONG = {
    "weights: 3": "weights",
    "component: [": "not a plan",
    "- 1": "holds a list",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        plan.load(tmp_path / "plan.yaml")
    assert "\n" not in str(refused.value) and str(tmp_path / "plan.yaml") in str(refused.value)


def test_bits_that_no_plan_can_give(made: Exported, tmp_path: Path) -> None:
    text = "component: d\nbytes: 1\nkl: 0\nschema: 1\nweights: {w: {bits: 3}}\n"
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match=r"weights\.w\.bits: 3: give 4 or 8"):
        plan.load(tmp_path / "plan.yaml")


def test_a_dtype_of_its_own_for_each_component(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    wanted = parse(["decoder=q4f16,vision=fp16"], "--quantize")
    pipeline.run_export(copy.recipe, copy.work, silent, wanted=wanted)
    files = {path.name for path in (copy.work.repo / "onnx").iterdir()}
    assert files == {
        "encoder_model.onnx",
        "encoder_model_fp16.onnx",
        "decoder_model_merged.onnx",
        "decoder_model_merged_q4f16.onnx",
    }
    devices = read_json(copy.work.repo / "config.json")["transformers.js_config"]["device_config"]
    chosen = {"encoder_model": "fp16", "decoder_model_merged": "q4f16"}
    assert {device: each["dtype"] for device, each in devices.items()} == dict.fromkeys(devices, chosen)


def test_a_component_that_there_is_none_of(made: Exported) -> None:
    with pytest.raises(
        InputError, match="--quantize: no component 'audio'; there is encoder_model, decoder_model_merged"
    ):
        pipeline.run_export(made.recipe, made.work, silent, wanted=parse(["audio=q4"], "--quantize"))


def test_a_mixture_is_verified_as_clients_take_it(made: Exported, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    pipeline.run_export(copy.recipe, copy.work, silent, wanted=parse(["vision=q8,decoder=q4"], "--quantize"))
    report = copy.verify("ort", "node")
    mixed = [check for check in report.checks if check.dtype == "mixed"]
    assert {check.runtime for check in mixed} == {"ort", "node"}
    same = next(check for check in mixed if check.metric == "tokens_as_onnxruntime_rate")
    assert same.verdict == "pass" and same.value == 1.0
