"""Graphs of others that never end, or ask for more memory than there is: refused, or ended, and said why."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from node_repo import GRAPHS, HEADER, write_repo
from onnx import TensorProto, helper, parser
from PIL import Image

from vlm_export.apps.load import load
from vlm_export.errors import LONGEST_LINE, InputError
from vlm_export.runtime.graph_bounds import MOST_ELEMENTS, MOST_TRIPS, check_graph
from vlm_export.runtime.sessions import GraphError, Sessions
from vlm_export.tensors.graph_message import read_message

BODY = "<body = step (int64 i, bool c, float[N] v) => (bool d, float[N] w) { d = Identity(c) w = Add(v, v) }>"
YES = "yes = Constant<value = bool {1}>()"


def written(folder: Path, nodes: str, inputs: str = "float[N] x", constants: str = "") -> Path:
    """A graph of these nodes, whose output is y."""
    text = f"{HEADER} made ({inputs}) => (float[M] y) <{constants}> {{ {nodes} }}"
    path = folder / "onnx" / "encoder_model.onnx"
    path.parent.mkdir(exist_ok=True)
    onnx.save(parser.parse_model(text), path)
    return path


def looked_at(path: Path) -> None:
    check_graph(path, read_message(path))


def loop(trips: str) -> str:
    return f"{YES} y = Loop({trips}, yes, x) {BODY}"


def nested(trips: int) -> str:
    inner = "<body = again (int64 j, bool e, float[N] s) => (bool f, float[N] t) { f = Identity(e) t = Add(s, s) }>"
    body = BODY.replace("w = Add(v, v)", f"w = Loop(n, c, v) {inner}")
    return f"{YES} n = Constant<value = int64 {{{trips}}}>() y = Loop(n, yes, x) {body}"


TOO_LONG = {
    "a constant": loop("n").replace(YES, f"{YES} n = Constant<value = int64 {{{2**62}}}>()"),
    "a number": loop("n").replace(YES, f"{YES} n = Constant<value_int = {2**62}>()"),
    "a product": loop("n").replace(
        YES, f"{YES} a = Constant<value_int = {2**31}>() b = Mul(a, a) one = Constant<value_ints = [1]>() "
        "c = Unsqueeze(b, one) d = Cast<to = 7>(c) n = Squeeze(d)"
    ),
    "a sum": loop("n").replace(YES, f"{YES} a = Constant<value_int = {2**61}>() n = Add(a, a)"),
    "nested": nested(10_000),
    "in a branch": f"{YES} n = Constant<value_int = {2**62}>() y = If(yes) <then_branch = a () => (float[N] p) "
    f"{{ p = Loop(n, yes, x) {BODY} }}, else_branch = b () => (float[N] q) {{ q = Identity(x) }}>",
}  # fmt: skip
TOO_LARGE = {
    "a shape": "n = Constant<value = int64[2] {1000000, 1000000}>() y = ConstantOfShape(n)",
    "joined": "a = Constant<value_ints = [1000000]>() n = Concat<axis = 0>(a, a) y = Expand(x, n)",
    "repeated": "n = Constant<value_ints = [1000000000000]>() y = Tile(x, n)",
    "counted": "a = Constant<value_float = 0.0>() b = Constant<value_float = 1e15>() c = Constant<value_float = 1.0>() "
    "y = Range(a, b, c)",
    "padded": "n = Constant<value_ints = [0, 1000000000000]>() y = Pad(x, n)",
    "made up": "y = RandomNormal<shape = [1000000, 1000000]>()",
    "of one": "n = Constant<value_int = 1000000000000>() a = Constant<value_floats = [0.0, 1.0]>() "
    "b = Cast<to = 7>(x) y = OneHot(b, n, a)",
    "beside an unknown one": "n = Constant<value_ints = [-1, 1000000000000]>() y = Expand(x, n)",
}  # fmt: skip


@pytest.mark.parametrize("nodes", TOO_LONG.values(), ids=TOO_LONG)
def test_a_loop_of_more_trips_than_any_model_has(nodes: str, tmp_path: Path) -> None:
    path = written(tmp_path, nodes)
    with pytest.raises(InputError, match=rf"encoder_model\.onnx: .*trips; at most {MOST_TRIPS:,}") as caught:
        looked_at(path)
    assert len(str(caught.value)) < LONGEST_LINE
    with pytest.raises(InputError, match="trips"):
        Sessions(path.parent, "").session("encoder_model")


@pytest.mark.parametrize("nodes", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_tensor_of_more_elements_than_any_model_has(nodes: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"encoder_model\.onnx: .*elements; .*{MOST_ELEMENTS:,}"):
        looked_at(written(tmp_path, nodes))


@pytest.mark.parametrize(
    "nodes",
    [
        loop("n").replace(YES, f"{YES} n = Constant<value = int64 {{1000}}>()"),
        loop("n").replace(YES, f"{YES} big = Constant<value_int = {2**62}>() n = Min(trips, big)"),
        loop("trips"),
        "n = Constant<value_ints = [4, 4]>() y = ConstantOfShape(n)",
        "n = Shape(x) y = Expand(x, n)",
    ],
    ids=["few trips", "trips that a client feeds, bounded", "trips that a client feeds", "a shape", "a fed shape"],
)  # fmt: skip
def test_what_models_do_is_taken(nodes: str, tmp_path: Path) -> None:
    looked_at(written(tmp_path, nodes, "float[N] x, int64 trips"))


def test_functions_that_hold_each_other_many_times(tmp_path: Path) -> None:
    """ONNX Runtime writes them out when it loads a graph: forty that hold the one before twice are 2⁴⁰ nodes."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "f0", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], opsets)]
    for depth in range(1, 40):
        nodes = [
            helper.make_node(f"f{depth - 1}", [source], [made], domain="own")
            for source, made in (("a", "m"), ("m", "b"))
        ]
        functions.append(helper.make_function("own", f"f{depth}", ["a"], ["b"], nodes, opsets))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("f39", ["x"], ["y"], domain="own")], "made", value[:1], value[1:])
    path = tmp_path / "encoder_model.onnx"
    onnx.save(helper.make_model(graph, functions=functions, opset_imports=opsets), path)
    with pytest.raises(InputError, match="more than 200,000 nodes"):
        looked_at(path)


def test_a_function_that_uses_itself(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    again = [helper.make_node("f", ["a"], ["b"], domain="own")]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("a", "b")]
    graph = helper.make_graph(again, "made", value[:1], value[1:])
    function = helper.make_function("own", "f", ["a"], ["b"], again, opsets)
    path = tmp_path / "encoder_model.onnx"
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets), path)
    with pytest.raises(InputError, match="nodes"):
        looked_at(path)


def test_a_loop_in_a_function_is_given_its_trips(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    body = parser.parse_graph(f"g (float[N] x, int64 n) => (float[M] y) {{ {loop('n')} }}")
    function = helper.make_function("own", "repeat", ["x", "n"], ["y"], list(body.node), opsets)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Constant", [], ["n"], value_int=2**62),
        helper.make_node("repeat", ["x", "n"], ["y"], domain="own"),
    ]
    graph = helper.make_graph(nodes, "made", value[:1], value[1:])
    path = tmp_path / "encoder_model.onnx"
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets), path)
    with pytest.raises(InputError, match="trips"):
        looked_at(path)


def test_a_run_has_an_end(tmp_path: Path) -> None:
    """Of a loop whose trips nobody can know beforehand."""
    path = written(tmp_path, loop("trips"), "float[N] x, int64 trips")
    sessions = Sessions(path.parent, "", run_seconds=0.2)
    feeds = {"x": np.ones(3, np.float32), "trips": np.array(2**62)}
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"encoder_model: .*more than 0\.2 s"):
        sessions.run("encoder_model", feeds)
    assert time.monotonic() - begun < 10
    assert sessions.run("encoder_model", feeds | {"trips": np.array(1)})["y"].tolist() == [2, 2, 2]


def test_a_cache_of_impossible_sizes(tmp_path: Path) -> None:
    cache = 'float[1, 1000000, N, 1000000000] "past_key_values.0.key"'
    with pytest.raises(InputError, match=r"past_key_values\.0\.key: a tensor of 1,000,000,000,000,000 elements"):
        looked_at(written(tmp_path, "y = Identity(x)", f"float[N] x, {cache}"))


def test_a_cache_of_a_type_that_nobody_feeds(tmp_path: Path) -> None:
    path = written(tmp_path, "y = Identity(x)", 'float[N] x, int8[1, 1, N, 16] "past_key_values.0.key"')
    with pytest.raises(GraphError, match=r"past_key_values\.0\.key.*int8"):
        Sessions(path.parent, "").empty_cache("encoder_model", 1)


def test_a_repo_of_somebody_else(tmp_path: Path) -> None:
    """The whole of it: what runs in a second with one trip is refused with 2⁶²."""
    repo = write_repo(tmp_path / "repo", "captioner")
    for trips in (1, 2**62):
        looped = (
            "pooled = Loop(trips, yes, first) <body = step (int64 i, bool c, float[a,b,d,e] v) => "
            "(bool g, float[a,b,d,e] w) { g = Identity(c) w = Identity(v) }>"
        )
        text = GRAPHS["captioner"]["encoder_model"].replace("pooled = Average", "first = Average")
        text = text.replace(
            "    channels =",
            f"    {YES}\n    trips = Constant<value = int64 {{{trips}}}>()\n    {looped}\n    channels =",
        )
        graph = parser.parse_model(HEADER + text)
        known = onnx.load(repo / "onnx" / "encoder_model.onnx")
        graph.graph.initializer.extend(one for one in known.graph.initializer if one.name == "w_vision")
        onnx.save(graph, repo / "onnx" / "encoder_model.onnx")
        if trips == 1:
            assert load(repo).generate([Image.new("RGB", (64, 64))]).text
        else:
            with pytest.raises(InputError, match=r"encoder_model\.onnx: .*4,611,686,018,427,387,904 trips"):
                load(repo).generate([Image.new("RGB", (64, 64))])


@pytest.mark.parametrize("what", ["input", "node", "kept"])
def test_a_name_that_is_no_text(what: str, tmp_path: Path) -> None:
    """Wherever it stands: ONNX Runtime hands some of them out as they are, and Python cannot."""
    repo = write_repo(tmp_path / "repo", "captioner")
    path = repo / "onnx" / "decoder_model_merged.onnx"
    model = onnx.load(path)
    if what == "kept":
        model.metadata_props.add(key="own", value="change me")
    elif what == "node":
        model.graph.node[3].name = "change me"
    else:
        model.graph.input[0].doc_string = "change me"
    path.write_bytes(model.SerializeToString().replace(b"change me", b"\xdf\xdf\xffge me"))
    try:
        assert load(repo).generate([Image.new("RGB", (64, 64))]).text
    except InputError as error:
        assert "onnx" in str(error)


def test_a_weight_whose_name_is_no_text(tmp_path: Path) -> None:
    repo = write_repo(tmp_path / "repo", "captioner")
    path = repo / "onnx" / "decoder_model_merged.onnx"
    path.write_bytes(path.read_bytes().replace(b"input_ids", b"input\xdfids"))
    with pytest.raises(InputError, match="onnx"):
        load(repo).generate([Image.new("RGB", (64, 64))])
