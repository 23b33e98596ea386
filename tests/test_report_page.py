"""The page and the JUnit file of a report: of a pico export in which a dtype fails, with hostile text all over."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from exported import Exported, prepare
from PIL import Image
from test_browser import WASM

from vlm_export.commands import Commands
from vlm_export.files import Work
from vlm_export.publish.junit import write_junit
from vlm_export.publish.page.adapter import strips
from vlm_export.publish.page.heat_map import panels, power_of_ten, shade
from vlm_export.publish.page.matrix import matrix
from vlm_export.publish.page.page import verdict, write_page
from vlm_export.publish.page.pictures import Words, differing_words
from vlm_export.publish.sbom import SBOM
from vlm_export.verify import limits
from vlm_export.verify.golden import load_golden
from vlm_export.verify.report import FAIL_ON, Captions, Check, Report
from vlm_export.verify.saved import load_report
from vlm_export.web.chromium import drive

HOSTILE = "<script>alert('x')</script><img src=https://example.org/x.png>"
DTYPES = ("fp32", "fp16", "int8", "q8", "q2")
VOID = {"meta", "link", "img", "wbr"}


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`q8` is beyond a limit for its outputs, whose reason is hostile, and so is what the recipe says of itself."""
    made = prepare(
        tmp_path_factory.mktemp("page"),
        description=HOSTILE,
        tolerances=[
            {"metric": limits.COSINE_SIMILARITY, "dtype": "q8", "limit": 1.0, "reason": HOSTILE},
            {"metric": limits.TOKENS_EXACT, "dtype": "q8", "limit": 0.0, "reason": "random weights"},
            {"metric": limits.TOKENS_EXACT, "dtype": "int8", "limit": 0.0, "reason": "random weights"},
            {"metric": limits.TOP1_AGREEMENT, "dtype": "int8", "limit": 0.5, "reason": "random weights"},
        ],
    )
    made.export("captioner", [name for name in DTYPES if name != "fp32"])
    made.verify("ort")
    return made


def report_of(made: Exported) -> Report:
    report = load_report(made.work)
    assert report is not None
    return report


def page_of(work: Work) -> str:
    return (work.report / "index.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What a page holds: its elements with their attributes, and its text; complains of one that is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_says_what_may_be_published_and_how(verified: Exported) -> None:
    text = " ".join(Reader(page_of(verified.work)).text.split())
    report = report_of(verified)
    assert "q8" in report.failed_dtypes and "fp32" not in report.failed_dtypes
    good = [name for name in dict.fromkeys(check.dtype for check in report.checks) if name not in report.failed_dtypes]
    assert f"✓ May be published: {', '.join(good)}; ✗ not {', '.join(report.failed_dtypes)}." in text
    assert f"vlm-export push your-name/pico --recipe {verified.recipe.path} --work {verified.work.root}" in text


def test_every_dtype_and_picture_and_the_cause_of_a_failure(verified: Exported) -> None:
    read = Reader(page_of(verified.work))
    assert all(f" {name}" in read.text for name in DTYPES)
    assert "is far from PyTorch's: the dtype is too coarse for its weights" in read.text
    images = [dict(attributes) for tag, attributes in read.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["0.png", "1.png", "2.png"]
    for image in images:
        kind, _, packed = str(image["src"]).partition(";base64,")
        assert kind == "data:image/webp"
        assert Image.open(BytesIO(base64.b64decode(packed))).size == (16, 16)
    golden = json.loads((verified.recipe.golden_dir / "golden.json").read_text())
    assert all(" ".join(image["caption"].split()) in " ".join(read.text.split()) for image in golden["images"])


def test_needs_nothing_else_and_escapes_all_text(verified: Exported, tmp_path: Path) -> None:
    report = report_of(verified)
    said = Captions("q8", HOSTILE, "file", [HOSTILE] * 3)
    work = Work(tmp_path)
    for name in ("merged", "repo"):
        (tmp_path / name).symlink_to(verified.work.root / name)
    golden = load_golden(verified.recipe.golden_dir)
    write_page(verified.recipe, work, replace(report, captions=[said]), golden, None)
    page = page_of(work)
    read = Reader(page)
    assert read.text.count("alert('x')") >= 5, "the recipe, a limit's reason, a runtime, captions"
    assert {tag for tag, _ in read.elements}.isdisjoint({"script", "iframe", "object"})
    for _, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(str(attributes.get(name, "#")).startswith(("data:", "#")) for name in ("src", "href"))
    assert "url(" not in page and "@import" not in page


def test_a_report_without_captions_or_with_no_checks_has_a_page_too(verified: Exported) -> None:
    commands = Commands(" pico", "", "your-name/pico")
    empty = replace(report_of(verified), checks=[], captions=[], table=[])
    assert str(verdict(empty, commands, {})) == "Nothing may be published: nothing was verified."
    failed = Check("decoder_model_merged", "fp32", "ort", limits.MAX_RELATIVE_ERROR, 1.0, 1e-4, "fail")
    assert "fp32 is not what PyTorch computes" in str(verdict(replace(empty, checks=[failed]), commands, {}))
    golden = load_golden(verified.recipe.golden_dir)
    write_page(verified.recipe, Work(verified.work.root), empty, golden, None)
    assert "nothing was verified" in Reader(page_of(verified.work)).text
    write_page(verified.recipe, verified.work, report_of(verified), golden, None)


def test_a_mixture_that_passes_is_made_again_of_its_parts(verified: Exported) -> None:
    checks = [
        Check("all", name, "ort", limits.TOKENS_EXACT, 1.0, 1.0, judged)
        for name, judged in (("fp32", "pass"), ("q8", "fail"), ("mixed", "pass"))
    ]
    report = replace(report_of(verified), checks=checks)
    found = verdict(
        report, Commands(" pico", "", "your-name/pico"), {"decoder_model_merged": "q4", "encoder_model": "q8"}
    )
    assert str(found) == "May be published: fp32, mixed; not q8."
    mixture = "decoder_model_merged=q4,encoder_model=q8"
    assert found.commands[0] == f"vlm-export onnx pico --quantize fp32 --quantize {mixture}"


def test_captions_of_every_dtype_are_in_the_report(verified: Exported) -> None:
    said = report_of(verified).captions
    assert [(each.dtype, each.runtime, each.made_of) for each in said] == [
        (name, "ort", "pixels") for name in dict.fromkeys(check.dtype for check in report_of(verified).checks)
    ]
    golden = load_golden(verified.recipe.golden_dir)
    assert said[0].texts == [image.caption for image in golden.facts.images]


def test_errors_by_layer_and_step(verified: Exported) -> None:
    report = report_of(verified)
    found = {panel.dtype: panel for panel in panels(report)}
    assert set(found) == set(DTYPES)
    layers = found["q8"].layers
    assert layers.groups == ["key", "value"] and layers.phases == ["pre", "1", "2", "3", "3×"]
    assert [label for label, _ in layers.rows] == ["0", "1"]
    values = [heat for _, heats in layers.rows for heat in heats]
    assert len(values) == 2 * 2 * 5 and all(heat is not None and heat.fails for heat in values)
    assert not any(heat is not None and heat.fails for _, heats in found["fp32"].layers.rows for heat in heats)
    prefill = ("q8", limits.MAX_RELATIVE_ERROR, "present.1.key", "prefill")
    worst = max(c.value for c in report.checks if (c.dtype, c.metric, c.output, c.phase) == prefill)
    assert values[10] is not None and values[10].text == power_of_ten(worst)


@pytest.mark.parametrize(
    ("error", "text", "level"),
    [(0.0, "0", 0), (3e-12, "−12", 0), (3e-7, "−7", 2), (0.02, "−2", 7), (1.5, "0", 8), (float("nan"), "NaN", 8)],
)
def test_an_error_is_a_power_of_ten_and_a_shade(error: float, text: str, level: int) -> None:
    assert (power_of_ten(error), shade(error)) == (text, level)


def test_a_rate_that_no_limit_is_for_has_no_mark(verified: Exported) -> None:
    rows = {row.dtype: row for row in matrix(report_of(verified)).rows}
    cells = {name: {cell.title: cell for cell in row.cells} for name, row in rows.items()}
    assert cells["fp32"]["captions, ONNX Runtime"].mark == "pass"
    assert cells["fp32"]["captions, ONNX Runtime"].text == "3 of 3"
    assert cells["q2"]["captions, ONNX Runtime"].mark in ("none", "fail")
    assert cells["q8"]["graphs"].mark == "fail" and cells["q8"]["graphs"].failures
    assert rows["q8"].cause and not rows["fp32"].cause


def test_words_that_differ() -> None:
    assert list(differing_words("a red circle on white", "a small red square on white")) == [
        Words("same", "a"),
        Words("missing", "small"),
        Words("same", "red"),
        Words("missing", "square"),
        Words("other", "circle"),
        Words("same", "on white"),
    ]
    assert list(differing_words("", "a cat")) == [Words("missing", "a cat")]


def test_a_strip_of_the_adapters_changes_for_each_module() -> None:
    [keys, values] = strips({"a.10.k": 0.2, "a.2.k": 0.1, "a.2.v": None, "a.3.v": 0.05})
    assert (keys.name, keys.least, keys.largest) == ("a.*.k", "10.00%", "20.00%")
    assert [bar.title for bar in keys.bars] == ["a.2.k: 10.00%", "a.10.k: 20.00%"], "in the order of layers"
    assert keys.bars[0].height == keys.bars[1].height / 2
    assert len(values.bars) == 1


@pytest.mark.parametrize(
    ("verdicts", "fails_on"),
    [
        ((), {"fail", "near-tie"}),
        (("pass",), set()),
        (("pass", "near-tie"), {"near-tie"}),
        (("pass", "fail"), {"fail", "near-tie"}),
    ],
)
def test_what_fails_is_what_was_asked_for(verified: Exported, verdicts: tuple[Any, ...], fails_on: set[str]) -> None:
    checks = [Check("all", "fp32", "ort", limits.TOKENS_EXACT, 1.0, 1.0, verdict) for verdict in verdicts]
    passes = checks and "fail" not in verdicts
    report = replace(report_of(verified), checks=checks, verdict="pass" if passes else "fail")
    assert {choice for choice in FAIL_ON if report.fails(choice)} == fails_on


def test_a_bill_of_materials_lies_beside_it(verified: Exported) -> None:
    report, materials = (json.loads((verified.work.report / name).read_text()) for name in ("report.json", SBOM))
    files = {one["name"]: one["hashes"][0]["content"] for one in materials["metadata"]["component"]["components"]}
    assert files == report["files_sha256"]


def test_junit_has_a_case_for_each_dtype_runtime_and_metric(verified: Exported, tmp_path: Path) -> None:
    report = report_of(verified)
    odd = Check("all", "q8", "ort", "runs", 1.0, 0.0, "fail", "broken: \x00<&")
    near = Check("all", "fp32", "ort", limits.TOKENS_EXACT, 1.0, 1.0, "near-tie", "2 of 3 images; near-ties: 0.png")
    report = replace(report, checks=[*report.checks, odd, near])
    groups = {(check.dtype, check.runtime, check.metric) for check in report.checks}
    failing = {(check.dtype, check.runtime, check.metric) for check in report.failures}
    for verdicts, expected in (
        ({"fail"}, failing),
        ({"fail", "near-tie"}, failing | {("fp32", "ort", limits.TOKENS_EXACT)}),
    ):
        write_junit(tmp_path / "verify.xml", report, verdicts)
        [suite] = ElementTree.parse(tmp_path / "verify.xml").getroot()
        assert (suite.get("tests"), suite.get("failures")) == (str(len(groups)), str(len(expected)))
        cases = {(*str(case.get("classname")).split(".")[1:], case.get("name")): case for case in suite}
        assert cases.keys() == groups
        assert {key for key, case in cases.items() if case.find("failure") is not None} == expected
        failure = cases["q8", "ort", "runs"].find("failure")
        assert failure is not None and failure.text == "all: 1 (limit 0): broken: \ufffd<&"


@pytest.mark.browser
@pytest.mark.node
def test_in_a_browser_nothing_is_wider_than_a_small_phone(verified: Exported) -> None:
    url = (verified.work.report / "index.html").as_uri()
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    steps = [
        ["setViewportSize", {"width": 360, "height": 800}],
        ["evaluate", overflow],
        ["setViewportSize", {"width": 1200, "height": 800}],
        ["evaluate", overflow],
        ["click", "td.fail summary"],
        ["evaluate", "document.querySelector('details[open] .why').innerText"],
        ["evaluate", overflow],
    ]
    seen = drive(url, steps, WASM)
    narrow, wide, why, opened = seen.answers
    assert (narrow, wide, opened) == (0, 0, 0)
    assert re.match("encoder_model, .* is far from PyTorch's", why)
    assert seen.console == [] and seen.foreign == []
