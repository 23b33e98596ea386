"""The command line: parse, call the pipeline, print. Results on stdout, progress on stderr, one line for an error."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vlm_export import __version__
from vlm_export.errors import VlmExportError

if TYPE_CHECKING:
    from vlm_export.recipe import RecipeFile

Command = TypeVar("Command", bound=Callable[..., Any])
_DEBUG = "vlm_export.debug"


class _Group(click.Group):
    """Turns the errors of `errors.py` into one line and their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VlmExportError as error:
            if ctx.meta.get(_DEBUG):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if ctx.meta.get(_DEBUG):
                raise
            click.echo(f"error: {error.filename or 'system'}: {error.strerror or error}", err=True)
            ctx.exit(2)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.find_root().meta[_DEBUG] = value


def _common(command: Command) -> Command:
    """Options of every command that works on a recipe."""
    options = (
        click.option(
            "--work",
            type=click.Path(path_type=Path, file_okay=False),
            envvar="VLM_EXPORT_WORK",
            help="Work folder, in place of build/<recipe name>.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_remember_debug,
            help="Show the traceback of an error.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _recipe_argument(command: Command) -> Command:
    return click.argument("recipe", required=False)(command)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlm-export")
def main() -> None:
    """Turn a fine-tuned vision-language model into a repo that stock transformers.js loads, and prove that it says the
    same as the PyTorch model.

    \b
        vlm-export merge                  merge the LoRA weights
        vlm-export onnx --quantize int8   trace, simplify, quantize, lay out the repo
        vlm-export verify                 graphs and tokens against golden PyTorch outputs
        vlm-export push org/model         upload to the Hugging Face Hub

    RECIPE is a bundled recipe's name or a YAML file. Without one it is ./vlm-export.yaml if there is one, else the
    bundled shapes-captioner.
    """


@main.command()
@_recipe_argument
@click.option("--base", type=click.Choice(["original", "dequantized"]), help="In place of the recipe's.")
@_common
def merge(recipe: str | None, base: str | None, work: Path | None, as_json: bool) -> None:
    """Merge LoRA adapters into plain weights, in merged/.

    Example: vlm-export merge my-captioner.yaml
    """
    found, folder = _open(recipe, work)
    from vlm_export import pipeline

    with _Progress(as_json) as progress:
        report = pipeline.run_merge(found, folder, progress, base=base)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    lines = [f"merged {report.adapter_tensors} adapter tensors into {report.parameters:,} parameters"]
    if report.max_abs_diff_vs_adapter is not None:
        lines.append(
            f"logits differ from base + adapter by at most {report.max_abs_diff_vs_adapter:.1e}, "
            f"from the base alone by {report.max_abs_diff_vs_base:.1e}"
        )
    _print(as_json, {**asdict(report), "path": str(folder.merged)}, [*lines, f"written to {folder.merged}"])


@main.command()
@_recipe_argument
@click.option("--quantize", multiple=True, type=click.Choice(["fp32", "fp16", "int8", "q8"]), help="A dtype; repeats.")
@click.option("--layout", type=click.Choice(["captioner", "chat", "components"]), help="In place of the recipe's.")
@_common
def onnx(recipe: str | None, quantize: tuple[str, ...], layout: str | None, work: Path | None, as_json: bool) -> None:
    """Trace each component, simplify, quantize, and lay out repo/.

    float32 graphs are always written; the other dtypes are made from them.

    Example: vlm-export onnx --quantize int8 --quantize q8
    """
    found, folder = _open(recipe, work)
    from vlm_export import pipeline

    with _Progress(as_json) as progress:
        manifest = pipeline.run_export(found, folder, progress, dtypes=quantize, layout=layout)
    lines = [f"{graph.file:40} {graph.size_bytes / 1e6:9.2f} MB" for graph in manifest.graphs]
    _print(as_json, {**asdict(manifest), "path": str(folder.repo)}, [*lines, f"written to {folder.repo}"])


@main.command()
@_recipe_argument
@click.option(
    "--runtime", "runtimes", multiple=True, type=click.Choice(["ort", "node"]), help="Only this one; repeats."
)
@_common
def verify(recipe: str | None, runtimes: tuple[str, ...], work: Path | None, as_json: bool) -> None:
    """Compare graphs and tokens with golden outputs.

    Golden outputs are the PyTorch model's, recorded with its adapter attached. The graphs run in ONNX Runtime here and
    in stock transformers.js in Node, which is installed once, into the user's cache folder.

    Example: vlm-export verify --runtime ort
    """
    found, folder = _open(recipe, work)
    from vlm_export import pipeline
    from vlm_export.verify import RUNTIMES

    with _Progress(as_json) as progress:
        report = pipeline.run_verify(found, folder, progress, runtimes=runtimes or RUNTIMES)  # type: ignore[arg-type]
    _print(as_json, asdict(report), _report_lines(report, folder.report / pipeline.REPORT))
    if report.verdict != "pass":
        click.get_current_context().exit(1)


@main.command()
@click.argument("repo_id")
@click.option("--recipe", help="A bundled recipe's name or a YAML file.")
@click.option("--dry-run", is_flag=True, help="List what would change; upload nothing.")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--revision", help="Push to this branch.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch.")
@click.option("--allow-unverified", is_flag=True, help="Push files that no passing report is about.")
@_common
def push(
    repo_id: str,
    recipe: str | None,
    dry_run: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    allow_unverified: bool,
    work: Path | None,
    as_json: bool,
) -> None:
    """Upload repo/ to REPO_ID on the Hugging Face Hub.

    Refuses files that no passing report is about. The token is the one of `hf auth login` or HF_TOKEN.

    Example: vlm-export push org/model --dry-run
    """
    found, folder = _open(recipe, work, builds_model=False)
    from vlm_export import pipeline

    if dry_run:
        plan = pipeline.run_plan(folder, repo_id, revision=revision)
        lines = [f"{change.action:7} {change.path} ({change.size_bytes / 1e6:.2f} MB)" for change in plan.changes]
        _print(as_json, asdict(plan), [*lines, f"nothing was uploaded to {repo_id}"])
        return
    result = pipeline.run_push(
        found,
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        allow_unverified=allow_unverified,
    )
    _print(as_json, asdict(result), [f"pushed to {result.pull_request or result.url}"])


@main.command()
@_recipe_argument
@_common
def golden(recipe: str | None, work: Path | None, as_json: bool) -> None:
    """Record golden outputs of the PyTorch model.

    The adapter is attached and nothing is merged. They go to golden/<recipe name>, beside the recipe.

    Example: vlm-export golden my-captioner.yaml
    """
    found, _ = _open(recipe, work)
    from vlm_export import pipeline

    with _Progress(as_json) as progress:
        recorded = pipeline.run_golden(found, progress)
    lines = [f"{image.file}: {image.caption}" for image in recorded.images]
    target = found.golden_target
    _print(as_json, {**asdict(recorded), "path": str(target)}, [*lines, f"written to {target}"])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def recipes(as_json: bool) -> None:
    """List the bundled recipes."""
    from vlm_export import bundled
    from vlm_export.recipe import find_recipe

    found = [find_recipe(name).recipe for name in bundled.recipe_names()]
    summaries = [
        {"name": r.name, "model_type": r.model_type, "layout": r.layout, "description": r.description.strip()}
        for r in found
    ]
    rows = [(r.name, r.model_type or "", r.layout, r.description.splitlines()[0]) for r in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
    _print(as_json, {"recipes": summaries}, lines)


def _open(reference: str | None, work: Path | None, *, builds_model: bool = True) -> tuple[RecipeFile, Any]:
    from vlm_export.artifacts import Work
    from vlm_export.recipe import find_recipe

    recipe = find_recipe(reference)
    if recipe.recipe.trust_remote_code and builds_model:
        click.echo(f"warning: trust_remote_code: runs code of {recipe.recipe.model}@{recipe.recipe.revision}", err=True)
    return recipe, Work(work or Path("build") / recipe.name)


def _print(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, default=str) if as_json else "\n".join(lines))


def _report_lines(report: Any, path: Path) -> list[str]:
    lines = [
        f"FAIL {check.component} {check.dtype} {check.runtime} {check.metric} = {check.value:.3g}"
        + (f" (limit {check.limit:g})" if check.limit is not None else "")
        + (f": {check.detail}" if check.detail else "")
        for check in report.failures[:10]
    ]
    if len(report.failures) > len(lines):
        lines.append(f"and {len(report.failures) - len(lines)} more failures")
    for check in report.checks:
        if check.component == "all" and check.verdict != "fail":
            lines.append(
                f"{check.verdict:9} {check.dtype} {check.runtime:5} {check.metric} {check.value:.3f} ({check.detail})"
            )
    return [*lines, f"{report.verdict}: {len(report.checks)} checks, {len(report.failures)} failed; {path}"]


class _Progress:
    """A bar on stderr once something has taken a second; silent when stderr is no terminal."""

    def __init__(self, silent: bool):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=silent or not console.is_terminal)
        self.task: Any = None
        self.started = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.task is None and time.monotonic() - self.started > 1:
            self.bar.start()
            self.task = self.bar.add_task(what)
        if self.task is not None:
            self.bar.update(self.task, description=what, completed=done, total=total or None)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _quiet_libraries() -> None:
    """Libraries' own bars and advice would stand between the user and one line of result."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_quiet_libraries()
