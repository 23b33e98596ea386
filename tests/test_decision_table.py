"""The table that a dtype is chosen by, and its picture: of documents made by hand, and of a repo that was verified."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from exported import Exported, prepare
from rich.console import Console

from vlm_export import pipeline
from vlm_export.manifest import GraphFile, Manifest
from vlm_export.publish import decision_table, quality_plot
from vlm_export.publish.gate import check_verified
from vlm_export.verify import limits
from vlm_export.verify.report import Check, DtypeRow, Report, Speed

SIZES = {"fp32": (90.2, 538.2), "q8": (23.8, 135.6), "q4": (23.8, 91.8), "q2": (23.8, 71.9)}
SVG = "{http://www.w3.org/2000/svg}"


def manifest(**changes: Any) -> Manifest:
    graphs = [
        GraphFile(component, dtype, f"{component}_{dtype}.onnx", round(size * 1e6), 0)
        for dtype, sizes in SIZES.items()
        for component, size in zip(("encoder_model", "decoder_model_merged"), sizes, strict=True)
    ]
    made = Manifest("hand-made", "captioner", list(SIZES), graphs, {}, {}, {})
    return replace(made, **changes)


def checks(dtype: str, kl: float | None, exact: int, *, verdict: Any = "pass", runtime: str = "ort") -> list[Check]:
    detail = f"{exact} of 32 images" + ("" if exact == 32 else "; differ: 05.png from token 3")
    found = [
        Check("decoder_model_merged", dtype, runtime, limits.COSINE_SIMILARITY, 0.9, 0.5, "pass"),
        Check("all", dtype, runtime, limits.TOKENS_EXACT, exact / 32, 0.9, verdict, detail),
        Check("all", dtype, runtime, limits.TOP1_AGREEMENT, 0.98765, 0.9, "pass", "32 images"),
        Check("all", dtype, runtime, limits.ROUGE_L, 0.9876, None, "reported", "32 images"),
    ]
    if kl is not None:
        found.append(Check("all", dtype, runtime, limits.TEACHER_FORCED_KL, kl, None, "reported"))
    return found


def report(found: Sequence[Check]) -> dict[str, Any]:
    return asdict(Report("hand-made", "captioner", "pass", ["ort"], list(found), {}, {}, {}, {}))


def measured(runtime: str, dtype: str, first: float | None, rate: float | None) -> dict[str, Any]:
    failure = None if first else "too little memory"
    return {
        "runtime": runtime,
        "dtype": dtype,
        "first_token_seconds": first,
        "tokens_per_second": rate,
        "failure": failure,
    }


REPORT = report(
    [
        *checks("fp32", None, 32),
        *checks("q8", 0.00391, 31),
        *checks("q4", 0.0812, 30),
        *checks("q2", 2.5, 3, verdict="fail"),
        *checks("q8", None, 1, runtime="node"),
        *checks("mixed", 0.04, 31),
    ]
)
BENCHMARK = {
    "rows": [
        measured("ort", "fp32", 0.268, 40.04),
        measured("wasm", "fp32", 1.9, 20.0),
        measured("ort", "q8", 0.27, 41.3),
        measured("node", "q8", 0.3, 39.0),
        measured("wasm", "q8", None, None),
    ]
}


def cells(text: str) -> dict[str, dict[str, str]]:
    """A table in Markdown: by the first cell of a row, its cells by heading."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    titles, _, *below = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in below}


def test_a_row_for_each_dtype_the_smallest_first() -> None:
    rows = decision_table.rows(manifest(), REPORT, BENCHMARK)
    assert [row.dtype for row in rows] == ["q2", "q4", "q8", "fp32"]
    assert rows[2] == DtypeRow(
        dtype="q8",
        size_bytes={"encoder_model": 23_800_000, "decoder_model_merged": 135_600_000},
        total_bytes=159_400_000,
        kl=0.00391,
        top1=0.98765,
        captions_exact="31 of 32",
        rouge_l=0.9876,
        speed={"ort": Speed(0.27, 41.3), "node": Speed(0.3, 39.0)},
        verdict="pass",
    )
    assert [row.verdict for row in rows] == ["fail", "pass", "pass", "pass"]


def test_a_mixture_is_a_row_of_the_files_that_a_client_takes() -> None:
    mixed = {"encoder_model": "q8", "decoder_model_merged": "q4"}
    made = manifest(mixed=mixed)
    odd = GraphFile("decoder_model_merged", "q4f16", "odd.onnx", 90_000_000, 0)  # of one component: no row of its own
    rows = decision_table.rows(replace(made, graphs=[*made.graphs, odd]), REPORT, None)
    assert [row.dtype for row in rows] == ["q2", "q4", "mixed", "q8", "fp32"]
    found = next(row for row in rows if row.dtype == "mixed")
    assert (found.total_bytes, found.kl, found.verdict) == (115_600_000, 0.04, "pass")


def test_the_table_of_a_card() -> None:
    text = decision_table.markdown(decision_table.rows(manifest(), REPORT, BENCHMARK))
    found = cells(text)
    assert found["q8"] == {
        "dtype": "q8",
        "`encoder_model`": "23.8 MB",
        "`decoder_model_merged`": "136 MB",
        "together": "159 MB",
        "KL": "0.0039",
        "same token": "98.8%",
        "same captions": "31 of 32",
        "ROUGE-L": "0.988",
        "CPU: first token": "270 ms",
        "CPU: tok/s": "41.3",
        "WASM: first token": "-",
        "WASM: tok/s": "-",
        "verify": "passes",
    }
    assert found["fp32"]["KL"] == "0" and found["fp32"]["WASM: first token"] == "1.9 s"
    assert found["q2"]["verify"] == "FAILS" and found["q2"]["CPU: tok/s"] == "-"
    for word in ("KL", "same token", "same captions", "ROUGE-L", "CPU: first token", "verify"):
        assert f"\n- {word}: " in text


def test_what_nobody_measured_has_no_column_and_no_sentence() -> None:
    text = decision_table.markdown(decision_table.rows(manifest(), None, None))
    assert list(cells(text)["q4"]) == ["dtype", "`encoder_model`", "`decoder_model_merged`", "together"]
    assert "\n- " not in text
    text = decision_table.markdown(decision_table.rows(manifest(), report(checks("q4", 0.1, 32)), None))
    assert "WASM" not in text and "first token" not in text
    assert cells(text)["fp32"]["KL"] == cells(text)["fp32"]["same captions"] == cells(text)["fp32"]["verify"] == "-"
    assert "- verify: " not in text, "nothing failed"


def test_scores_that_are_no_numbers() -> None:
    wrong = [
        Check("all", "q8", "ort", limits.TOKENS_EXACT, float("nan"), 0.9, "fail", "00.png: the scores are no numbers"),
        Check("all", "q4", "ort", limits.TEACHER_FORCED_KL, float("nan"), None, "reported"),
    ]
    rows = decision_table.rows(manifest(), report(wrong), None)
    found = cells(decision_table.markdown(rows))
    assert found["q8"]["verify"] == "FAILS" and "same captions" not in found["q8"]
    assert "KL" not in found["q4"]
    assert quality_plot.svg(rows) is None


def test_what_failed_before_is_marked_where_there_is_no_report() -> None:
    rows = decision_table.rows(manifest(failed=["q2"]), None, None)
    assert {row.dtype: row.verdict for row in rows} == {"fp32": None, "q8": None, "q4": None, "q2": "fail"}


def test_captions_of_node_where_only_that_was_asked() -> None:
    [row] = [
        row
        for row in decision_table.rows(manifest(), report(checks("q8", None, 29, runtime="node")), None)
        if row.dtype == "q8"
    ]
    assert (row.captions_exact, row.top1, row.rouge_l, row.kl) == ("29 of 32", None, None, None)


def test_the_table_of_a_terminal_says_the_same_without_the_components() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(decision_table.table(decision_table.rows(manifest(), REPORT, BENCHMARK)))
    text = capture.get()
    row = next(line for line in text.splitlines() if line.startswith("q8"))
    assert " ".join(row.split()) == "q8 159 MB 0.0039 98.8% 31 of 32 0.988 270 ms 41.3 - - passes"
    assert "encoder_model" not in text and "ROUGE-L: how much" in text and "…" not in text


def labels(picture: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_the_picture_has_a_point_and_a_label_for_each_dtype_that_costs_something() -> None:
    picture = quality_plot.svg(decision_table.rows(manifest(), REPORT, None))
    assert picture is not None
    found = labels(picture)
    assert {"q8", "q4", "q2 (fails)"} <= set(found) and "fp32" not in found
    points = list(ElementTree.fromstring(picture).iter(f"{SVG}circle"))
    assert len(points) == 3
    assert [point.get("class") for point in points] == ["fails", None, None]
    places = {text.text: (float(text.get("x", 0)), float(text.get("y", 0))) for text in _texts(picture)}
    assert places["q2 (fails)"][0] < places["q4"][0] < places["q8"][0], "the larger is further right"
    assert places["q2 (fails)"][1] < places["q4"][1] < places["q8"][1], "the dearer is higher"


def test_labels_of_equal_points_do_not_cover_each_other() -> None:
    rows = [DtypeRow(name, {}, 100_000_000, kl=0.01) for name in ("int8", "uint8", "q8", "fp16")]
    picture = quality_plot.svg(rows)
    assert picture is not None
    heights = sorted(float(text.get("y", 0)) for text in _texts(picture) if text.text in {row.dtype for row in rows})
    assert all(below - above >= 15 for above, below in pairwise(heights))


@pytest.mark.parametrize("kl", [1e-13, 1.0, 0.0123, 3e4])
@pytest.mark.parametrize("size", [1, 999, 10**6, 54_321_987, 10**11])
def test_any_sizes_and_prices_have_a_picture(size: int, kl: float) -> None:
    picture = quality_plot.svg([DtypeRow("q8", {}, size, kl=kl), DtypeRow("<&>", {}, size, kl=kl)])
    assert picture is not None
    assert {"q8", "<&>"} <= set(labels(picture))
    for point in ElementTree.fromstring(picture).iter(f"{SVG}circle"):
        assert 84 <= float(point.get("cx", 0)) <= 690 and 44 <= float(point.get("cy", 0)) <= 340


@pytest.mark.parametrize("prices", [[], [0.1], [0.1, None], [0.1, 0.0], [0.1, float("nan")], [0.1, float("inf")]])
def test_fewer_than_two_points_are_no_picture(prices: list[float | None]) -> None:
    assert quality_plot.svg([DtypeRow("q8", {}, 10**6, kl=kl) for kl in prices]) is None


def _texts(picture: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(picture).iter(f"{SVG}text"))


# A repo that was verified


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("verified"))
    made.export(dtypes=["int8", "q8"])
    made.verify("ort")
    return made


def card(made: Exported) -> str:
    return (made.work.repo / "README.md").read_text()


def test_the_card_has_the_table_and_shows_the_picture(verified: Exported) -> None:
    text = card(verified)
    found = cells(text[text.index("## Which dtype") : text.index("## Verified")])
    assert set(found) == {"fp32", "int8", "q8"}
    assert float(found["int8"]["KL"]) > 0 and found["fp32"]["KL"] == "0"
    assert found["fp32"]["same captions"].startswith(f"{found['fp32']['same captions'].split()[-1]} of ")
    assert "files in `onnx/`: no suffix is fp32, `_int8` int8, `_quantized` q8" in text
    assert "](quality.svg)" in text
    assert {"int8", "q8"} <= set(labels((verified.work.repo / "quality.svg").read_text()))
    check_verified(verified.work)  # the picture is one of the files that the report is about


def test_a_repo_that_was_not_verified_has_sizes_and_no_picture(verified: Exported, tmp_path: Path) -> None:
    made = verified.copy(tmp_path)
    made.export(dtypes=["int8"])
    text = card(made)
    assert list(cells(text)["int8"]) == ["dtype", "`encoder_model`", "`decoder_model_merged`", "together"]
    assert "quality.svg" not in text and not (made.work.repo / "quality.svg").exists()


def test_json_and_report_hold_the_rows_and_bench_adds_the_speeds(verified: Exported, tmp_path: Path) -> None:
    made = verified.copy(tmp_path)
    arguments = ("verify", str(made.recipe.path), "--runtime", "ort", "--work", str(made.work.root))
    printed = json.loads(_run(*arguments, "--json"))
    assert {row["dtype"] for row in printed["table"]} == {"fp32", "int8", "q8"}
    assert all(row["speed"] == {} and row["rouge_l"] is not None for row in printed["table"])
    shown = _run(*arguments)
    assert "ROUGE-L: " in shown and "int8" in shown

    speeds = (str(made.recipe.path), "--work", str(made.work.root), "--runtime=ort", "--dtype=int8", "--rounds=1")
    benched = json.loads(_run("bench", *speeds, "--new-tokens=3", "--card", "--json"))
    by_dtype = {row["dtype"]: row for row in benched["table"]}
    assert by_dtype["int8"]["speed"]["ort"]["tokens_per_second"] == benched["rows"][0]["tokens_per_second"]
    assert by_dtype["q8"]["speed"] == {} and by_dtype["int8"]["kl"] is not None
    kept = json.loads((made.work.report / "report.json").read_text())
    assert kept["table"] == benched["table"]
    assert "CPU: tok/s" in card(made)
    check_verified(made.work)


def test_bench_alone_of_what_was_not_verified_has_no_table_to_show(verified: Exported, tmp_path: Path) -> None:
    made = verified.copy(tmp_path)
    (made.work.report / "report.json").unlink()
    assert decision_table.rows_of(made.work, BENCHMARK) == []
    assert pipeline.run_card(made.recipe, made.work, _empty_benchmark()).is_file()
    assert not (made.work.repo / "quality.svg").exists()


def _empty_benchmark() -> dict[str, Any]:
    return {
        "model": "pico",
        "layout": "captioner",
        "images": ["0.png"],
        "prompt": None,
        "new_tokens": 2,
        "rounds": 1,
        "machine": {"cpu": "one", "cpus": 1, "memory_bytes": 1, "system": "any"},
        "versions": {},
        "rows": [],
    }


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "vlm_export", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
