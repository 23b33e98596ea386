"""Renders the page: the verdict and how to publish, then the parts that the other modules make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vlm_export.atomic import write_text
from vlm_export.commands import Commands
from vlm_export.documents import load_document
from vlm_export.dtypes import FP32
from vlm_export.files import Work
from vlm_export.manifest import Manifest, load_manifest
from vlm_export.measure import bench_table
from vlm_export.measure.bench import Benchmark
from vlm_export.merging.merge import MergeReport
from vlm_export.publish import quality_plot
from vlm_export.publish.findings import PAGE
from vlm_export.publish.page import adapter, from_files, heat_map
from vlm_export.publish.page.matrix import matrix, runtime_name
from vlm_export.publish.page.pictures import pictures
from vlm_export.recipe import RecipeFile
from vlm_export.verify import causes, limits
from vlm_export.verify.golden import GoldenFolder
from vlm_export.verify.report import Report


@dataclass(frozen=True)
class Verdict:
    """What may be published, or that nothing may, and what may not; and the commands that publish what may."""

    good: str
    bad: str
    commands: Sequence[str]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.good, self.bad)))


def write_page(
    recipe: RecipeFile, work: Work, report: Report, golden: GoldenFolder, benchmark: Benchmark | None
) -> None:
    """Write the page beside the report.

    Args:
        recipe: whose repo was verified.
        work: its folder, of which the manifest and the report of the merge are read.
        report: what was found.
        golden: what the repo was compared with.
        benchmark: what was measured of the same graphs, if anything was.

    Raises:
        InputError: one of those files cannot be read, or an image of the golden.
    """
    merged = load_document(work.merge_report, MergeReport, f"run `{Commands.of(recipe, work).merge()}`")
    manifest, commands = load_manifest(work.repo), Commands.of(recipe, work)
    text = _template().render(
        report=report,
        description=recipe.recipe.description.strip(),
        verdict=verdict(report, commands, manifest.mixed),
        matrix=matrix(report),
        runtimes=_enumerated([runtime_name(name) for name in report.runtimes]),
        pictures=pictures(golden, report.captions),
        images=len(golden.facts.images),
        files=from_files.table(report.from_files),
        plots=_plots(report),
        panels=heat_map.panels(report),
        shades=heat_map.LEVELS,
        strips=adapter.strips(merged.layers),
        bar=adapter,
        measured=bench_table.conditions(asdict(benchmark)) if benchmark else [],
        inputs={**report.commits, **report.golden_inputs_sha256},
        versions={**manifest.versions, **report.versions},
        again=[commands.merge(), commands.onnx(_wanted(manifest)), commands.verify()],
    )
    write_text(work.report / PAGE, text)


def _enumerated(names: Sequence[str]) -> str:
    *most, last = names or ["no runtime"]
    return f"{', '.join(most)} and {last}" if most else last


def _wanted(manifest: Manifest) -> list[str]:
    """What `--quantize` was given."""
    mixed = ",".join(f"{component}={dtype}" for component, dtype in manifest.mixed.items())
    return [*(dtype for dtype in manifest.dtypes if dtype != FP32.name), *([mixed] if mixed else [])]


def verdict(report: Report, commands: Commands, mixed: Mapping[str, str]) -> Verdict:
    """The verdict of a report; `mixed` is the manifest's."""
    good, failed = causes.passed(report), report.failed_dtypes
    if not report.checks:
        return Verdict("", "Nothing may be published: nothing was verified.", [])
    if not failed:
        return Verdict(f"May be published: {', '.join(good)}.", "", [commands.push()])
    without = causes.publishable(report, commands, mixed)
    if not without:
        return Verdict("", "Nothing may be published: fp32 is not what PyTorch computes.", [])
    return Verdict(
        good=f"May be published: {', '.join(good)};",
        bad=f"not {', '.join(failed)}.",
        commands=[*without, commands.push()],
    )


def _plots(report: Report) -> list[Markup]:
    """The pictures of `quality_plot`, which escapes what is written in them."""
    bounds = {
        check.dtype: check.limit
        for check in report.checks
        if (check.metric, check.runtime) == (limits.TOP1_AGREEMENT, "ort") and check.limit is not None
    }
    drawn = (quality_plot.agreement_svg(report.table, bounds), quality_plot.svg(report.table))
    return [Markup(svg) for svg in drawn if svg]


@cache
def _template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
