"""Pages for everybody: axe-core finds nothing in them, in any of the looks that readers ask their system for.

What axe-core does not look at is measured here: targets that a finger hits, a caption that is seen on a phone without
scrolling, things that move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exported import Exported
from test_browser import RECIPE, WASM
from test_demo_page import Step, ask, captioned, do, status, when

from vlm_export.apps import demo_site
from vlm_export.files import Work
from vlm_export.web.chromium import drive
from vlm_export.web.node_runtime import node_home
from vlm_export.web.site_server import Site, SiteServer, files_under

AXE = Path(__file__).parent / "axe"
PHONE = ["setViewportSize", {"width": 390, "height": 664}]
DESKTOP = ["setViewportSize", {"width": 1200, "height": 900}]
LOOKS: dict[str, dict[str, str]] = {
    "light": {"colorScheme": "light"},
    "dark": {"colorScheme": "dark"},
    "forced colours": {"colorScheme": "light", "forcedColors": "active"},
    "forced colours, dark": {"colorScheme": "dark", "forcedColors": "active"},
}
# What axe-core finds, a line each.
FINDINGS = """axe.run().then(({ violations }) => violations.flatMap(({ id, nodes }) =>
    nodes.map(({ target, failureSummary }) => `${id}: ${target.join(' ')}: ${failureSummary}`)))"""
# What can be pressed and is smaller than a finger needs, 44 pixels; links in a sentence may be.
SMALL = """[...document.querySelectorAll('button, input, textarea, summary, select, a')]
    .filter((element) => element.checkVisibility() && getComputedStyle(element).display !== 'inline')
    .map((element) => [element.id || element.outerHTML.slice(0, 60), element.getBoundingClientRect()])
    .filter(([, { width, height }]) => Math.min(width, height) < 44)
    .map(([name, { width, height }]) => `${name}: ${width} × ${height}`)"""
# What moves, in the page or in something that it draws beside an element.
MOVING = """[...document.querySelectorAll('*')].flatMap((element) => ['', '::before', '::after'].filter((beside) => {
    const { animationName, transitionDuration } = getComputedStyle(element, beside);
    return animationName !== 'none' || !/^(0s(, )?)+$/.test(transitionDuration);
}).map((beside) => element.tagName + beside))"""


def looked_at(site: Site, name: str, *steps: Step) -> list[Any]:
    """What axe-core finds in a page of a site in each look, after these steps, whose answers come first."""
    axe = node_home(AXE) / "node_modules" / "axe-core" / "axe.min.js"
    looks = [step for look in LOOKS.values() for step in (["emulateMedia", look], ask(FINDINGS))]
    with SiteServer(site) as server:
        seen = drive(f"{server.url}/{name}", [["addInitScript", {"path": str(axe)}], ["reload"], *steps, *looks], WASM)
    return seen.answers


@pytest.fixture(scope="module")
def site(default_repo: Path) -> Site:
    return demo_site.build(default_repo, RECIPE.golden_dir)


SAMPLE = ["click", "#samples button"]
BEAMS = ["check", "input[name=beams][value='3']"]
CODE = ["click", "summary"]


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_demo_page(site: Site, size: Step) -> None:
    """Empty, and full of results, in every look."""
    steps = [size, status("Ready"), ask(FINDINGS), *captioned(SAMPLE), *captioned(BEAMS), CODE]
    empty, _, _, *full = looked_at(site, "", *steps)
    assert empty == []
    assert dict(zip(LOOKS, full, strict=True)) == {look: [] for look in LOOKS}


def test_fingers_and_folds(site: Site) -> None:
    """On a phone: the caption is seen with its image, at the top and from far below; every target is large enough."""
    boxes = "[$('stage'), $('caption')].map((element) => element.getBoundingClientRect())"
    in_sight = f"{boxes}.every(({{ top, bottom }}) => top >= 0 && bottom <= innerHeight)"
    steps = [
        PHONE,
        status("Ready"),
        *captioned(SAMPLE),
        when(in_sight),
        do("scrollTo({ top: 0, behavior: 'instant' })"),
        ask(in_sight),
        CODE,
        ask(SMALL),
        ask("document.documentElement.scrollWidth <= innerWidth"),
    ]
    with SiteServer(site) as server:
        caption, at_the_top, small, fits = drive(server.url, steps, WASM).answers
    assert caption and at_the_top and fits
    assert small == []


def test_nothing_moves_for_who_asks_for_that(site: Site) -> None:
    busy = ["evaluateHandle", "document.getElementById('caption').ariaBusy = 'true'"]
    with SiteServer(site) as server:
        steps = [status("Ready"), busy, ask(MOVING), ["emulateMedia", {"reducedMotion": "reduce"}], ask(MOVING)]
        moving, still = drive(server.url, steps, WASM).answers
    assert "P::after" in moving and still == []


def test_samples_are_named_by_what_is_said_of_them(site: Site) -> None:
    facts = site["demo.json"]
    assert isinstance(facts, bytes)
    with SiteServer(site) as server:
        names = "[...document.querySelectorAll('#samples img')].map(({ alt }) => alt)"
        [named] = drive(server.url, [status("Ready"), ask(names)], WASM).answers
    assert named == [sample["caption"] for sample in json.loads(facts)["samples"]]


def test_the_report(default_repo: Path, tmp_path: Path) -> None:
    """Of a verification that passed; with what fails in it, `test_report_page` has it."""
    work = Work(tmp_path / "work")
    work.root.mkdir()
    for part in default_repo.parent.iterdir():
        (work.root / part.name).symlink_to(part)
    work.repo.unlink()
    copy_folder(default_repo, work.repo)
    Exported(RECIPE, work).verify("ort")
    assert looked_at(files_under({"/": work.report}), "index.html", DESKTOP) == [[]] * len(LOOKS)
    assert looked_at(files_under({"/": work.report}), "index.html", PHONE) == [[]] * len(LOOKS)


def copy_folder(folder: Path, copy: Path) -> None:
    """Its files, so that a card can be written anew."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
