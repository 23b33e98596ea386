"""The whole conversion: recipe → merged checkpoint → graphs → variants → repo → report → Hub.

The only module that knows the order of the stages and where each one's result lies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm_export import ready
from vlm_export.atomic import atomic_folder, place_of
from vlm_export.commands import Commands
from vlm_export.documents import load_document
from vlm_export.dtypes import DTYPES
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import Work, sha256, write_json
from vlm_export.graph import signature, single_file, trial_run
from vlm_export.graph.graph_cache import GraphCache
from vlm_export.graph.graph_file import copy_graph, save_graph
from vlm_export.graph.onnxsim_process import Onnxsim
from vlm_export.machine import available_memory, free_disk
from vlm_export.manifest import ONNX, GraphFile, Manifest, Range, complete_dtypes, load_manifest
from vlm_export.merging import merge
from vlm_export.merging.merge import MergeReport
from vlm_export.models import pixels
from vlm_export.models.pixels import NotInGraph
from vlm_export.own_files import check_tree
from vlm_export.publish import card, config_files, decision_table, licence, sbom
from vlm_export.publish.addresses import CARD
from vlm_export.publish.card import Found
from vlm_export.publish.findings import BENCH, load_benchmark, read_report
from vlm_export.publish.page.page import write_page
from vlm_export.publish.sbom import SBOM
from vlm_export.quantize import calibration, costs, estimate, ranges, saturation
from vlm_export.quantize import plan as plans
from vlm_export.quantize.calibration import Samples, Solver
from vlm_export.quantize.estimate import Estimate
from vlm_export.quantize.plan import Plan
from vlm_export.quantize.variants import Source, Variant
from vlm_export.recipe import RecipeFile
from vlm_export.source.checkpoint import Checkpoint, open_checkpoint
from vlm_export.source.fetch import sources, with_trusted_code
from vlm_export.source.generation_rules import published
from vlm_export.targets import Target
from vlm_export.verify import golden, recording, verify
from vlm_export.verify.report import REPORT, Report, with_files
from vlm_export.verify.saved import load_report
from vlm_export.wanted import AUTO, PLANNED, Goal, Wanted, parse

Progress = Callable[[str, int, int], None]  # what, done, of how many
_VERSIONS = ("vlm-export", "torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript", "onnxsim")


@with_trusted_code
def run_merge(recipe: RecipeFile, work: Work, progress: Progress, *, base: str | None = None) -> MergeReport:
    """LoRA → plain weights, in `merged/`; `base` in place of the recipe's."""
    place_of(work.merged)
    found = sources(recipe)
    return merge.merge(
        found.model,
        found.adapters,
        work.merged,
        combination=recipe.recipe.combination,
        dequantized=(base or recipe.recipe.base) == "dequantized",
        beside=found.beside,
        commits=found.commits,
        on_tensor=lambda done, total: progress("merging", done, total),
    )


@with_trusted_code
def run_golden(recipe: RecipeFile, progress: Progress) -> golden.Golden:
    """Record the PyTorch model's outputs in the recipe's golden folder."""
    place_of(recipe.golden_target)
    images = ready.images(recipe)
    found = sources(recipe)
    return recording.record(
        recipe,
        found.model,
        found.adapters,
        images,
        found.beside,
        lambda done, total: progress("captioning", done, total),
    )


@with_trusted_code
def run_export(
    recipe: RecipeFile,
    work: Work,
    progress: Progress,
    *,
    wanted: Wanted | None = None,
    layout: str | None = None,
    plan: Plan | None = None,
    retrace: bool = False,
    memory_bytes: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
    announce: Callable[[Estimate], None] = lambda expected: None,
) -> Manifest:
    """Merged checkpoint → graphs in every dtype, and everything beside them, in `repo/`.

    float32 is always among the dtypes: the others are made from it, and it is what is compared with PyTorch. What an
    earlier export traced of the same architecture is not traced again, unless `retrace` says so. Dtypes of fewer than 8
    bits and of float16 are made last: the float32 graphs are run on the recipe's images to calibrate them, and to see
    which numbers float16 cannot hold. A `plan`, or one that is made for the goal of `wanted`, says which weights of a
    q4 decoder get 8 bits.

    `announce` is told what the export will take before anything is written. Where calibration needs more memory than
    there is, or than `memory_bytes` allows, weights are rounded to the nearest, and `notify` is told.

    Raises:
        InputError: nothing was merged yet, or the layout is not one of the family's, or a component that is named not
            one of the layout's; or disk or memory do not suffice.
    """
    place_of(work.repo)
    merge_report, merged = _merged(recipe, work)
    layout = layout or recipe.recipe.layout
    if layout not in merged.family.layouts:
        known = ", ".join(merged.family.layouts)
        raise InputError(f"{recipe.path}: layout: {merged.family.model_type} has no layout {layout!r}; it has {known}")
    wanted = wanted or parse(recipe.recipe.dtypes, f"{recipe.path}: dtypes")
    joins = merged.family.layouts[layout].joins
    if joins and wanted.of_one:
        raise InputError(f"{wanted.where}: layout {layout} is one file, of one dtype: name dtypes without components")
    if recipe.recipe.generation.search and not joins:
        raise InputError(
            f"{recipe.path}: generation.num_beams: layout {layout} is greedy, as its client is: leave it out, or "
            "export --layout single"
        )
    apart = joins or layout
    in_graph = _in_graph(recipe, merged, apart, notify)
    keep = not recipe.recipe.trust_remote_code
    cache = GraphCache(merged, apart, in_graph=in_graph, keep=keep, retrace=retrace, notify=notify)
    names = [component.name for component in cache.components]
    mixed = wanted.mixed(names)
    with atomic_folder(work.repo) as folder, Onnxsim() as onnxsim:
        (folder / ONNX).mkdir()
        sources, reports = _traced(cache, merged, onnxsim, progress)
        variants = [
            _by_plan(Variant(source, DTYPES[name]), plan)
            for source in sources
            for name in wanted.of(source.name, mixed)
        ]
        variants = _within(variants, wanted.goal, work.root, memory_bytes, notify, announce, twice=bool(joins))
        if plan is not None and any(variant.chosen for variant in variants):
            plans.save(plan, folder / plans.FILE)
        graphs = _write(folder, [variant for variant in variants if not variant.needs_samples], progress)
        manifest = Manifest(
            recipe=recipe.name,
            layout=apart,
            dtypes=complete_dtypes(graphs, names),
            graphs=graphs,
            simplified=reports,
            inputs_sha256=merge_report.inputs_sha256,
            versions={name: version(name) for name in _VERSIONS},
            in_graph=in_graph,
            commits=merge_report.commits,
        )
        config_files.write_config_files(folder, recipe, merged, manifest)
        if waiting := [variant for variant in variants if variant.needs_samples]:
            made, found = _write_with_samples(folder, recipe, waiting, wanted.goal, progress, notify)
            asked = [variant.file for variant in variants]
            graphs = sorted([*graphs, *made], key=lambda graph: asked.index(graph.file))
            manifest = replace(manifest, graphs=graphs, dtypes=complete_dtypes(graphs, names), ranges=found)
        manifest = replace(manifest, mixed=mixed)
        if joins:
            manifest = _joined(folder, manifest, layout, recipe.recipe.generation.search, progress)
        config_files.write_config_files(folder, recipe, merged, manifest)
        if licence.is_missing(asdict(recipe.recipe.hub)):
            notify(f"warning: {recipe.path}: {licence.NO_LICENCE}; push refuses it")
        card.write_card(folder, recipe, merged.family.layouts[layout].client, manifest)
    return manifest


def _joined(folder: Path, manifest: Manifest, layout: str, search: Mapping[str, Any], progress: Progress) -> Manifest:
    """Make one file of the graphs in each dtype; returns what the repo then holds."""
    files = []
    for done, dtype in enumerate(manifest.dtypes):
        progress(f"one file in {dtype}", done, len(manifest.dtypes))
        rounded = any(graph.rounded for graph in manifest.graphs if graph.dtype == dtype)
        files.append(replace(single_file.write(folder, dtype, search), rounded=rounded))
    single_file.remove_parts(folder)
    return replace(manifest, layout=layout, graphs=files)


def _merged(recipe: RecipeFile, work: Work) -> tuple[MergeReport, Checkpoint]:
    """What `merge` left in the work folder.

    Raises:
        InputError: nothing yet.
    """
    ready.for_onnx(recipe, work)
    again = f"run `{Commands.of(recipe, work).merge()}`"
    return load_document(work.merge_report, MergeReport, again), open_checkpoint(work.merged)


def _in_graph(recipe: RecipeFile, merged: Checkpoint, layout: str, notify: Callable[[str], None]) -> dict[str, Any]:
    """The image processor settings that the vision graph carries out; none where the client does.

    `notify` is told where the graph would by itself, and cannot.

    Raises:
        InputError: the recipe asks for the graph, and it cannot.
    """
    asked, wanted = recipe.recipe.preprocess, merged.family.layouts[layout]
    if asked == "client" or (asked == "auto" and not wanted.client.feeds_one_picture):
        return {}
    settings = config_files.image_processor(recipe, merged, layout)
    try:
        pixels.published(wanted.components(merged.config), settings)
    except NotInGraph as error:
        if asked == "graph":
            raise
        notify(f"the client resizes pictures, each in its own way: {error.reason}")
        return {}
    return settings


def _traced(
    cache: GraphCache, merged: Checkpoint, onnxsim: Onnxsim, progress: Progress
) -> tuple[list[Source], dict[str, dict[str, Any]]]:
    """What each component's variants are made of, and by component how its graph was simplified."""
    sources, reports = [], {}
    for done, component in enumerate(cache.components):
        cached = cache.find(component)
        what = f"{component.name} as traced before" if cached else f"tracing {component.name}"
        progress(what, done, len(cache.components))
        skeleton, report = cached or cache.trace(component, onnxsim)
        reports[component.name] = asdict(report)
        sources.append(Source(component, skeleton, merged.tensors))
    return sources, reports


def _by_plan(variant: Variant, plan: Plan | None) -> Variant:
    """The variant, or what a plan makes of it."""
    return plan.variant(variant.source) if plan is not None and _is_planned(variant) else variant


def _to_goal(variant: Variant, goal: Goal | None, solver: Solver, folder: Path) -> Variant:
    """The variant, or what a plan makes of it that is chosen for the goal and is then in the repo too."""
    if goal is None or not _is_planned(variant):
        return variant
    chosen = plans.choose(variant.source, solver, goal, solver.progress)
    plans.save(chosen, folder / plans.FILE)
    return chosen.variant(variant.source)


def _write_with_samples(
    folder: Path,
    recipe: RecipeFile,
    variants: Sequence[Variant],
    goal: Goal | None,
    progress: Progress,
    notify: Callable[[str], None],
) -> tuple[list[GraphFile], dict[str, Range]]:
    """Write the variants that the float32 graphs in `folder` must have run for.

    Returns what the manifest says of each, and of each component in float16 how large its numbers become.
    """
    samples = _recorded(folder, recipe, variants, progress)
    in_range, found = _in_range(variants, samples, progress, notify)
    with TemporaryDirectory(prefix=".calibration-", dir=folder) as scratch:
        solver = Solver(samples, Path(scratch), progress)
        to_goal = [_to_goal(variant, goal, solver, folder) for variant in in_range]
        return _write(folder, to_goal, progress, solver), found


def _recorded(folder: Path, recipe: RecipeFile, variants: Sequence[Variant], progress: Progress) -> Samples:
    """What the float32 graphs are fed for the recipe's images: as much as the variants need."""
    calibrated = any(variant.is_calibrated for variant in variants)
    sampling = calibration.FOR_NUMBERS if calibrated else calibration.FOR_RANGES
    return calibration.record(folder, ready.images(recipe), recipe.first_prompt, sampling, progress)


def _in_range(
    variants: Sequence[Variant], samples: Samples, progress: Progress, notify: Callable[[str], None]
) -> tuple[list[Variant], dict[str, Range]]:
    """The variants, those in float16 without what it cannot hold; by component, how large numbers become.

    `notify` is told of each component that has such numbers.
    """
    halves: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.is_half:
            halves.setdefault(variant.source.name, []).append(variant)
    found, summaries = {}, {}
    for done, (name, those) in enumerate(halves.items()):
        progress(f"{name}: how large its numbers become", done, len(halves))
        model = those[0].source.model
        found[name] = measured = ranges.measure(model, samples[name])
        summaries[name] = measured.summary(model)
        if measured.too_large:
            notify(f"{', '.join(variant.dtype.name for variant in those)}: {name}: {summaries[name].remedy}")
    return [
        replace(variant, too_large=found[variant.source.name].too_large) if variant.is_half else variant
        for variant in variants
    ], summaries


def _is_planned(variant: Variant) -> bool:
    return variant.dtype.name == PLANNED and variant.is_calibrated


def _within(
    variants: list[Variant],
    goal: Goal | None,
    folder: Path,
    memory_bytes: int | None,
    notify: Callable[[str], None],
    announce: Callable[[Estimate], None],
    *,
    twice: bool,
) -> list[Variant]:
    """The variants as disk and memory allow them: calibrated, or rounded to the nearest; float16 measured, or not.

    They are `twice` on the disk for a while where they are joined.

    Raises:
        InputError: disk or memory do not suffice, or not for the goal, which needs calibration.
    """
    needs = [costs.cost(variant) for variant in variants]
    estimate.check_disk(needs * 2 if twice else needs, free_disk(folder), folder)
    available = min(available_memory(), memory_bytes or sys.maxsize)
    expected = estimate.estimate(needs)
    if expected.calibration_memory_bytes > available:
        if goal is not None:
            raise InputError(f"--quantize {AUTO}: {estimate.too_little_to_calibrate(expected, available)}")
        notify(estimate.why_rounded(needs, available))
        variants = [replace(variant, rounded=variant.is_calibrated) for variant in variants]
        expected = estimate.estimate(estimate.without_calibration(needs))
    estimate.check_memory(expected, available)
    measuring = estimate.measuring_memory(needs)
    if halves := [variant for variant in variants if variant.is_half and measuring > available]:
        names = list(dict.fromkeys(variant.dtype.name for variant in halves))
        notify(estimate.why_unmeasured(names, measuring, available))
        variants = [replace(variant, unmeasured=variant.is_half) for variant in variants]
    announce(expected)
    return variants


def _write(
    folder: Path, variants: Sequence[Variant], progress: Progress, solver: Solver | None = None
) -> list[GraphFile]:
    """Write the variants' graphs; returns what the manifest says of each.

    Raises:
        CheckFailed: one is not as the family declares it, or does not run.
    """
    written: dict[Any, Path] = {}
    found = []
    for done, variant in enumerate(variants):
        progress(variant.title, done, len(variants))
        path, component = folder / ONNX / variant.file, variant.source.component
        if variant.contents in written:  # the same in two dtypes
            chunks = copy_graph(written[variant.contents], path)
        else:
            graph = variant.make(solver.solutions(variant) if solver else {})
            if differences := signature.differences(component, graph.graph):
                wrong = "; ".join(differences)
                raise CheckFailed(f"{path.name}: not the graph that {component.name} is declared to be: {wrong}")
            if saturating := saturation.worst(graph.graph):
                raise CheckFailed(f"{path.name}: {saturating}")
            trial_run.run_once(graph, component, path.name)
            chunks = save_graph(graph, path)
            written[variant.contents] = path
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        found.append(GraphFile(component.name, variant.dtype.name, path.name, size, chunks, variant.rounded))
    return found


@with_trusted_code
def run_verify(
    recipe: RecipeFile,
    work: Work,
    progress: Progress,
    *,
    runtimes: Sequence[Target] | None = None,
    dtypes: Sequence[str] = (),
    bisecting: bool = False,
    reusing: bool = False,
) -> Report:
    """Compare `repo/` with the goldens; write `report/`: JSON, a page and a bill of materials; and what was verified
    into the model card.

    `runtimes` and `dtypes` are those that were asked for by name. With `bisecting`, what failed is traced back to the
    first stage and tensor that are wrong. What was measured of these graphs goes into the report's table. A dtype that
    failed before, and was not verified now, still counts as failed. With `reusing`, what passed in the last report is
    taken over where nothing that it depends on has changed.
    """
    for folder in (work.repo, work.report):
        place_of(folder)
    recorded = golden.load_golden(recipe.golden_dir)
    manifest = load_manifest(work.repo)
    check_tree(work.repo)
    merged = open_checkpoint(work.merged)
    load_document(work.merge_report, MergeReport, f"run `{Commands.of(recipe, work).merge()}`")  # before all is done
    generation = published(recipe.recipe.generation, merged)
    if changed := recorded.facts.differences(recipe.recipe, generation):
        raise InputError(
            f"{recipe.path}: {', '.join(changed)}: changed since the golden was recorded: "
            f"run `{Commands.of(recipe, work).golden()}`"
        )
    recorded.check_rows(merged.family.text_config(merged.config).vocab_size)
    measured = load_benchmark(work)
    report = verify.verify(
        work.repo,
        merged,
        recorded,
        tolerances=recipe.recipe.tolerances,
        runtimes=runtimes,
        dtypes=dtypes,
        bisecting=bisecting,
        earlier=read_report(work) if reusing else None,
        progress=progress,
    )
    still = [dtype for dtype in manifest.failed if dtype not in report.verified_dtypes]
    client = merged.family.layouts[manifest.layout].client
    benchmark = asdict(measured) if measured else None
    with work.changing() as new:
        manifest = config_files.write_failed(new.repo, manifest, [*still, *report.failed_dtypes])
        report = replace(report, table=decision_table.rows(manifest, asdict(report), benchmark))
        card.write_card(new.repo, recipe, client, manifest, Found(asdict(report), benchmark, recorded))
        written = with_files(report, new.repo)
        write_json(new.report / REPORT, written)
        write_json(new.report / SBOM, sbom.of_export(manifest, written["files_sha256"]))
        write_page(recipe, new, report, recorded, measured)
    return report


@with_trusted_code
def run_card(recipe: RecipeFile, work: Work, benchmark: Mapping[str, Any]) -> Path:
    """Write what was measured into the model card and the report's page, and keep it. Returns the card's path.

    A report of these graphs goes on being about the repo's files: the card's hash in it is the new card's. If another
    file was changed since, its hash is not, and the report is as little about that file as before.
    """
    manifest = load_manifest(work.repo)
    report = load_report(work)
    client = open_checkpoint(work.merged).family.layouts[manifest.layout].client
    recorded = golden.load_golden(recipe.golden_dir) if report is not None else None
    verified = asdict(report) if report is not None else None
    with work.changing() as new:
        write_json(new.report / BENCH, benchmark)
        card.write_card(new.repo, recipe, client, manifest, Found(verified, benchmark, recorded))
        if report is not None and recorded is not None:
            table = decision_table.rows(manifest, verified, benchmark)
            report = replace(report, table=table, files_sha256=report.files_sha256 | {CARD: sha256(new.repo / CARD)})
            write_json(new.report / REPORT, asdict(report))
            write_page(recipe, new, report, recorded, load_benchmark(new))
    return work.repo / CARD
