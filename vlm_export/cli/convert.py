"""The commands that convert: golden, merge, onnx, verify, push; and those that list and measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from vlm_export.cli.options import (
    FiniteRange,
    again_option,
    common,
    next_commands,
    open_recipe,
    recipe_argument,
    threads_option,
)
from vlm_export.cli.output import Progress, notify, plan_lines, print_result, report_lines, tell_next, warn
from vlm_export.contract import LayoutName
from vlm_export.dtypes import FP32, preferred
from vlm_export.errors import InputError
from vlm_export.targets import TARGETS, Target
from vlm_export.verify.report import FAIL_ON, REPORT
from vlm_export.wanted import AUTO, PLANNED, Goal, Wanted, parse, parse_size

if TYPE_CHECKING:
    from vlm_export.files import Work
    from vlm_export.hub import Files
    from vlm_export.manifest import Manifest
    from vlm_export.publish.gate import Allowed, Destination
    from vlm_export.recipe import RecipeFile


@click.command()
@recipe_argument
@click.option("--base", type=click.Choice(["original", "dequantized"]), help="In place of the recipe's.")
@again_option
@common
def merge(recipe: str | None, base: str | None, again: bool, work: Path | None, as_json: bool) -> None:
    """Merge LoRA adapters into plain weights, in merged/.

    Example: vlm-export merge my-captioner.yaml
    """
    found, folder = open_recipe(recipe, work)
    from vlm_export import ready

    ready.for_merge(found)
    from vlm_export import pipeline
    from vlm_export.documents import load_document
    from vlm_export.merging.merge import MergeReport
    from vlm_export.start.stages import Options, Stages

    with Progress(as_json) as progress, folder.alone():
        stages = Stages(found, folder, Options(base=base if base != found.recipe.base else None))
        made = stages.run("merge", lambda: pipeline.run_merge(found, folder, progress, base=base), notify, again=again)
        remedy = f"run `{next_commands(found, folder).merge()}`"
        report = made or load_document(folder.merge_report, MergeReport, remedy)
    for warning in report.warnings:
        warn(warning)
    lines = [f"merged {report.adapter_tensors} adapter tensors into {report.parameters:,} parameters"]
    if report.companions:
        lines.append(report.companions)
    if report.max_layer_error is not None:
        lines.append(
            f"layers differ from base + adapter by at most {report.max_layer_error:.1e} of what they compute "
            f"({report.worst_layer})"
        )
    if report.max_relative_diff_vs_adapter is not None:
        lines.append(
            f"logits differ from base + adapter by at most {report.max_relative_diff_vs_adapter:.1e} of the largest, "
            f"from the base alone by {report.max_relative_diff_vs_base:.1e}"
        )
    print_result(as_json, {**asdict(report), "path": str(folder.merged)}, [*lines, f"written to {folder.merged}"])
    tell_next(as_json, next_commands(found, folder).onnx())


@click.command()
@recipe_argument
@click.option("--quantize", multiple=True, metavar="DTYPE", help="A dtype, `all`, `auto`, or COMPONENT=DTYPE.")
@click.option("--budget", metavar="SIZE", help="Of `auto`: the decoder's file is at most so large, e.g. 115MB.")
@click.option(
    "--max-kl", type=FiniteRange(min=0, max=1000, min_open=True), help="Of `auto`: at most so many nats a token."
)
@click.option("--plan", type=click.Path(path_type=Path), help="A plan of an earlier `auto`, edited or not.")
@click.option("--layout", type=click.Choice(get_args(LayoutName)), help="In place of the recipe's.")
@click.option("--retrace", is_flag=True, help="Trace every component anew, whatever earlier exports kept.")
@click.option("--memory", metavar="SIZE", help="Take at most so much, e.g. 3GB. q4 and q2 may not be calibrated then.")
@again_option
@common
def onnx(
    recipe: str | None,
    quantize: tuple[str, ...],
    budget: str | None,
    max_kl: float | None,
    plan: Path | None,
    layout: str | None,
    retrace: bool,
    memory: str | None,
    again: bool,
    work: Path | None,
    as_json: bool,
) -> None:
    """Trace each component, simplify, quantize, and lay out repo/.

    float32 graphs are always written. int8 is fast on processors, q8 in browsers, q4 small; q4 and q2 are calibrated on
    the recipe's images. A client takes COMPONENT=DTYPE by itself. What is traced is kept in the user's cache folder,
    for every later export of the same architecture.

    Dtypes: fp16, int8, uint8, q8, q4, q4f16, bnb4, q2, q2f16. `auto` is a q4 in which those weights have 8 bits that 4
    would hurt most, as many as --budget or --max-kl allows; the plan is written to quantization.yaml, for --plan.

    Example: vlm-export onnx --quantize q8 --quantize decoder=q4,vision=q8
    """
    wanted = _wanted(quantize, budget, max_kl, plan)
    most = None if memory is None else parse_size(memory, "--memory")
    found, folder = open_recipe(recipe, work)
    from vlm_export import ready

    if plan is not None and not plan.exists():
        raise InputError(f"{plan}: no such file")
    ready.for_onnx(found, folder)
    from vlm_export import pipeline
    from vlm_export.manifest import load_manifest
    from vlm_export.quantize.estimate import Estimate
    from vlm_export.quantize.plan import load as load_plan
    from vlm_export.start.stages import Options, Stages

    expected: list[Estimate] = []

    def announce(estimate: Estimate) -> None:
        expected.append(estimate)
        notify(str(estimate))

    options = Options(wanted=wanted, layout=layout, plan=load_plan(plan) if plan else None, memory_bytes=most)
    with Progress(as_json) as progress, folder.alone():

        def export() -> Manifest:
            return pipeline.run_export(
                found,
                folder,
                progress,
                wanted=options.wanted,
                layout=options.layout,
                plan=options.plan,
                retrace=retrace,
                memory_bytes=options.memory_bytes,
                notify=notify,
                announce=announce,
            )

        made = Stages(found, folder, options).run("onnx", export, notify, again=again or retrace)
        manifest = made or load_manifest(folder.repo)
    lines = [f"{graph.file:40} {graph.size_bytes / 1e6:9.2f} MB" for graph in manifest.graphs]
    if manifest.dtypes != [FP32.name] and not manifest.mixed and preferred("wasm", manifest.dtypes) == FP32.name:
        lines.append(
            "browsers will load float32, since packed weights are slow there: --quantize q8 adds what they want"
        )
    result = {**asdict(manifest), "path": str(folder.repo), "estimate": asdict(expected[-1]) if expected else None}
    print_result(as_json, result, [*lines, f"written to {folder.repo}"])
    tell_next(as_json, next_commands(found, folder).verify())


def _wanted(quantize: tuple[str, ...], budget: str | None, max_kl: float | None, plan: Path | None) -> Wanted | None:
    """What the options of `onnx` ask for; None leaves it to the recipe.

    Raises:
        InputError: they do not go together, or one is wrong.
    """
    if (budget is not None) + (max_kl is not None) + (plan is not None) > 1:
        raise InputError("--budget, --max-kl and --plan: give one of them")
    size = None if budget is None else parse_size(budget, "--budget")
    goal = None if size is None and max_kl is None else Goal(size, max_kl)
    if not quantize and goal is None and plan is None:
        return None
    wanted = parse(quantize or [PLANNED if plan else AUTO], "--quantize", goal)
    if plan is not None and PLANNED not in (*wanted.everywhere, *wanted.of_one.values()):
        raise InputError(f"--plan: says how {PLANNED} is made: add --quantize {PLANNED}")
    return wanted


@click.command()
@recipe_argument
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(TARGETS),
    help="Only this one; repeats. By itself it is ort and node.",
)
@click.option("--dtype", "dtypes", multiple=True, metavar="DTYPE", help="Only this one, as it was exported; repeats.")
@click.option("--again", is_flag=True, help="Verify what is unchanged since it passed, too.")
@click.option("--bisect", "bisecting", is_flag=True, help="Name the first stage and tensor of what fails.")
@click.option(
    "--fail-on",
    type=click.Choice([*FAIL_ON]),
    default="fail",
    show_default=True,
    help="The mildest verdict that makes the exit status 1.",
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the checks as JUnit XML too.")
@common
def verify(
    recipe: str | None,
    runtimes: tuple[Target, ...],
    dtypes: tuple[str, ...],
    again: bool,
    bisecting: bool,
    fail_on: str,
    junit: Path | None,
    work: Path | None,
    as_json: bool,
) -> None:
    """Compare graphs and tokens with golden outputs.

    Golden outputs are the PyTorch model's, recorded with its adapter attached. The graphs run in ONNX Runtime (ort)
    and in stock transformers.js: in Node (node), and in headless Chromium on WASM (wasm) and on WebGPU (webgpu), in
    software where there is no graphics adapter. transformers.js is installed once, into the user's cache folder.

    What was found is in report/: report.json, and index.html, a page to look at. A near-tie is two scores that are
    equal to rounding, so that either token is right. Whatever --fail-on says, push refuses what failed.

    \b
    Example: vlm-export verify --runtime ort --runtime wasm --dtype q8
             vlm-export verify --fail-on near-tie --junit verify.xml
    """
    from rich.console import Console

    found, folder = open_recipe(recipe, work)
    from vlm_export import ready

    ready.for_verify(found, folder)
    from vlm_export import pipeline
    from vlm_export.manifest import load_manifest
    from vlm_export.publish import decision_table
    from vlm_export.publish.findings import PAGE
    from vlm_export.publish.junit import write_junit
    from vlm_export.verify.causes import explain

    with Progress(as_json) as progress, folder.alone():
        report = pipeline.run_verify(
            found,
            folder,
            progress,
            runtimes=runtimes or None,
            dtypes=dtypes,
            bisecting=bisecting,
            reusing=not again,
        )
    lines = report_lines(report, folder.report / REPORT)
    commands = next_commands(found, folder)
    advice = explain(report, commands, load_manifest(folder.repo).mixed)
    page = folder.report / PAGE
    reused = [f"unchanged since it passed: {', '.join(report.reused)}"] if report.reused else []
    found_by_bisecting = [*map(str, report.faults)]
    if bisecting and report.verdict == "fail" and not report.faults:
        found_by_bisecting = ["--bisect: no output of a golden case is beyond its limit, so that no stage can be told"]
    said = [*lines, *reused, *found_by_bisecting, *advice]
    print_result(as_json, asdict(report) | {"advice": advice, "page": str(page)}, said)
    if not as_json:
        Console().print(decision_table.table(report.table))
        click.echo(f"to look at: {page}")
    if report.verdict == "pass":
        tell_next(as_json, commands.push())
    if junit is not None:
        write_junit(junit, report, FAIL_ON[fail_on] or FAIL_ON["fail"])
    if report.fails(fail_on):
        click.get_current_context().exit(1)


@click.command()
@click.argument("repo_id")
@click.option("--recipe", help="A bundled recipe's name or a YAML file.")
@click.option("--dry-run", is_flag=True, help="List what would change, or why it would be refused; upload nothing.")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--revision", help="Push to this branch.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or go on with the one that is open.")
@click.option("--tag", help="Give the commit a tag, such as v1.0.")
@click.option("--create-space", is_flag=True, help="Publish the demo page too, as a static Space of the same name.")
@click.option("--allow-unverified", is_flag=True, help="Push files that no passing report is about.")
@click.option("--allow-unlicensed", is_flag=True, help="Push a repo that does not say what its users may do.")
@common
def push(
    repo_id: str,
    recipe: str | None,
    dry_run: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
    create_space: bool,
    allow_unverified: bool,
    allow_unlicensed: bool,
    work: Path | None,
    as_json: bool,
) -> None:
    """Upload repo/ to REPO_ID on the Hugging Face Hub.

    Refuses files that no passing report is about, a repo without a licence, and what the Hub would not take; --dry-run
    refuses the same, and lists what is new, changed, deleted and unchanged. A Hub that is busy is waited for; what was
    interrupted is pushed again without sending its large files twice. The model card that is uploaded has REPO_ID in
    its code. The token is the one of `hf auth login` or HF_TOKEN.

    Example: vlm-export push org/model --dry-run
    """
    found, folder = open_recipe(recipe, work, builds_model=False)
    from vlm_export.publish.gate import Allowed, Destination

    to = Destination(repo_id, private, revision, create_pr, create_space, tag)
    act = _plan if dry_run else _push
    with folder.reading():
        value, lines = act(found, folder, to, Allowed(allow_unverified, allow_unlicensed))
    print_result(as_json, value, lines)


def _plan(recipe: RecipeFile, work: Work, to: Destination, allowed: Allowed) -> tuple[dict[str, Any], list[str]]:
    """What `push --dry-run` found, as JSON and as lines."""
    from vlm_export.publish import gate

    page = _page(recipe, work, to)
    plan = gate.run_plan(recipe, work, to, allowed)
    of_page = gate.plan(page, to, gate.message_of(recipe), "space") if page else None
    lines = [*plan_lines(plan), *(plan_lines(of_page) if of_page else []), f"nothing was uploaded to {to.repo_id}"]
    return asdict(plan) | {"space": asdict(of_page) if of_page else None}, lines


def _push(recipe: RecipeFile, work: Work, to: Destination, allowed: Allowed) -> tuple[dict[str, Any], list[str]]:
    """What `push` did, as JSON and as lines."""
    from vlm_export.publish import gate

    page = _page(recipe, work, to)
    done = gate.run_push(recipe, work, to, allowed)
    of_page = gate.push(page, to, gate.message_of(recipe), "space") if page else None
    lines = [f"pushed to {done.pull_request or done.url}", *([f"its demo page is {of_page.url}"] if of_page else [])]
    return asdict(done) | {"space": asdict(of_page) if of_page else None}, lines


def _page(recipe: RecipeFile, work: Work, to: Destination) -> Files | None:
    """The files of the Space, made before anything is pushed, if there is to be one."""
    if not to.has_space:
        return None
    from vlm_export.publish.space import space_files

    return space_files(recipe, work, to)


@click.command()
@recipe_argument
@again_option
@common
def golden(recipe: str | None, again: bool, work: Path | None, as_json: bool) -> None:
    """Record golden outputs of the PyTorch model.

    The adapter is attached and nothing is merged. They go to golden/<recipe name>, beside the recipe.

    Example: vlm-export golden my-captioner.yaml
    """
    found, folder = open_recipe(recipe, work)
    from vlm_export import ready

    ready.for_golden(found)
    from vlm_export import pipeline
    from vlm_export.start.stages import Options, Stages
    from vlm_export.verify.golden import load_golden

    with Progress(as_json) as progress, folder.alone():
        stages = Stages(found, folder, Options())
        made = stages.run("golden", lambda: pipeline.run_golden(found, progress), notify, again=again)
        recorded = made or load_golden(found.golden_target).facts
    lines = [f"{image.file}: {image.caption}" for image in recorded.images]
    target = found.golden_target
    print_result(as_json, {**asdict(recorded), "path": str(target)}, [*lines, f"written to {target}"])
    tell_next(as_json, next_commands(found, folder).merge())


@click.command()
@click.argument("repo", metavar="[RECIPE|DIR|REPO_ID]", required=False)
@click.option(
    "--runtime", "runtimes", multiple=True, type=click.Choice(["ort", "node", "wasm"]), help="Only this one; repeats."
)
@click.option("--dtype", "dtypes", multiple=True, help="Only this one; repeats.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="In place of golden ones; repeats."
)
@click.option("--prompt", help="What to say to a chat model.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, help="For each image.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@threads_option
@click.option("--card", is_flag=True, help="Write the table into the model card.")
@common
def bench(
    repo: str | None,
    runtimes: tuple[Any, ...],
    dtypes: tuple[str, ...],
    images: tuple[Path, ...],
    card: bool,
    work: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure load time, time to the first token, tokens a second and peak memory.

    By dtype, in ONNX Runtime in Python (ort), stock transformers.js in Node (node), and the same on onnxruntime-web's
    WASM build (wasm), which runs in Node here and needs no browser. Each of them in a process of its own, in turns.

    \b
    Example: vlm-export bench
             vlm-export bench build/my-captioner/repo --runtime ort --dtype q8 --image photo.jpg
             vlm-export bench my-captioner.yaml --card
    """
    from rich.console import Console

    from vlm_export.apps import exported_repo
    from vlm_export.measure import bench as benchmark
    from vlm_export.measure import bench_table
    from vlm_export.publish import decision_table

    recipe = exported_repo.recipe_of(repo)
    if card and recipe is None:
        raise InputError(f"{repo}: --card: a recipe's card can be written, not that of a folder: name the recipe")
    for dtype in dtypes or (None,):  # of the Hub's, each fetches its own graphs, into one folder
        folder = exported_repo.find_repo(repo, work, dtype=dtype)
    chosen = images or benchmark.images_of(recipe)
    with Progress(as_json) as progress:
        done = benchmark.bench(folder, chosen, runtimes=runtimes, dtypes=dtypes, progress=progress, **settings)
    rows = decision_table.rows_of(exported_repo.work_of(recipe, work), asdict(done)) if recipe else []
    if as_json:
        print_result(True, asdict(done) | {"table": [asdict(row) for row in rows]}, [])
    else:
        Console().print(bench_table.table(asdict(done)), *([decision_table.table(rows)] if rows else []))
    if card and recipe is not None:
        from vlm_export import pipeline

        of = open_recipe(repo, work)[1]
        with of.alone():
            notify(f"written to {pipeline.run_card(recipe, of, asdict(done))}")
    if done.failures:
        click.get_current_context().exit(1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def recipes(as_json: bool) -> None:
    """List the bundled recipes: family, size, licence and layouts.

    The size is the number of parameters, as counted or as the model's name says; then that of the graphs that a browser
    would take. What is not known without asking the Hub is a dash.

    Example: vlm-export recipes
    """
    from vlm_export import bundled
    from vlm_export.families._known import layouts_of
    from vlm_export.recipe import find_recipe
    from vlm_export.start.recipe_sizes import size_of

    opened = [find_recipe(name) for name in bundled.recipe_names()]
    found = [each.recipe for each in opened]
    sizes = [size_of(each) for each in opened]
    summaries: list[dict[str, Any]] = [
        {
            "name": each.name,
            "model_type": each.model_type,
            "license": each.hub.license,
            "layout": each.layout,
            "layouts": layouts_of(each.model_type, each.name),
            "size": asdict(of),
            "description": each.description.strip(),
        }
        for each, of in zip(found, sizes, strict=True)
    ]
    rows = [
        (
            each["name"],
            each["model_type"],
            of.model,
            of.export,
            each["license"] or "not stated",
            " ".join(each["layouts"]),
            each["description"].splitlines()[0].partition(":")[0],
        )
        for each, of in zip(summaries, sizes, strict=True)
    ]
    table = [("recipe", "family", "size", "exported", "licence", "layouts", "what it is"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    print_result(as_json, {"recipes": summaries}, lines)
    tell_next(as_json, "vlm-export convert RECIPE")
