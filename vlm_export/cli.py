"""The command line: parse, call the pipeline, print. Results on stdout, progress on stderr, one line for an error."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from vlm_export import __version__, collector
from vlm_export.errors import InputError, VlmExportError

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
        vlm-export run photo.jpg          caption an image with it
        vlm-export demo                   open a page that does

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
    _print(as_json, {**asdict(report), "path": str(folder.merged)}, [*lines, f"written to {folder.merged}"])


@main.command()
@_recipe_argument
@click.option("--quantize", multiple=True, type=click.Choice(["fp32", "fp16", "int8", "q8"]), help="A dtype; repeats.")
@click.option("--layout", type=click.Choice(["captioner", "chat", "components"]), help="In place of the recipe's.")
@click.option("--retrace", is_flag=True, help="Trace every component anew, whatever earlier exports kept.")
@_common
def onnx(
    recipe: str | None,
    quantize: tuple[str, ...],
    layout: str | None,
    retrace: bool,
    work: Path | None,
    as_json: bool,
) -> None:
    """Trace each component, simplify, quantize, and lay out repo/.

    float32 graphs are always written. int8 is fast on processors, q8 in browsers. What is traced is kept in the user's
    cache folder, for every later export of the same architecture.

    Example: vlm-export onnx --quantize int8 --quantize q8
    """
    found, folder = _open(recipe, work)
    from vlm_export import pipeline

    with _Progress(as_json) as progress:
        manifest = pipeline.run_export(
            found, folder, progress, dtypes=quantize, layout=layout, retrace=retrace, notify=_notify
        )
    lines = [f"{graph.file:40} {graph.size_bytes / 1e6:9.2f} MB" for graph in manifest.graphs]
    if "int8" in manifest.dtypes and "q8" not in manifest.dtypes:
        lines.append("browsers will load float32, because int8 is slow there: --quantize q8 adds what they want")
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
    from vlm_export.publish.gate import REPORT
    from vlm_export.verify.causes import explain
    from vlm_export.verify.verify import RUNTIMES

    with _Progress(as_json) as progress:
        report = pipeline.run_verify(found, folder, progress, runtimes=runtimes or RUNTIMES)  # type: ignore[arg-type]
    lines = _report_lines(report, folder.report / REPORT)
    advice = explain(report, recipe or found.name)
    _print(as_json, asdict(report) | {"advice": advice}, [*lines, *advice])
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
    from vlm_export.publish import gate

    if dry_run:
        plan = gate.run_plan(folder, repo_id, revision=revision)
        lines = [f"{change.action:7} {change.path} ({change.size_bytes / 1e6:.2f} MB)" for change in plan.changes]
        _print(as_json, asdict(plan), [*lines, f"nothing was uploaded to {repo_id}"])
        return
    result = gate.run_push(
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
@click.argument("repo", metavar="[RECIPE|DIR|REPO_ID]", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen. Who can reach it can use the model: there is no key and no TLS.",
)
@click.option("--dtype", help="By default int8, else q8, else fp32, of those that passed verify.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="For each graph; 0 is ONNX Runtime's choice.")
@click.option("--max-body-mb", type=click.IntRange(1), default=20, show_default=True, help="Of one request.")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Requests at work at a time.")
@click.option("--queue", type=click.IntRange(0), default=16, show_default=True, help="Requests that may wait for that.")
@_common
def serve(
    repo: str | None,
    port: int,
    host: str,
    dtype: str | None,
    threads: int,
    max_body_mb: int,
    concurrency: int,
    queue: int,
    work: Path | None,
    as_json: bool,
) -> None:
    """Serve an exported repo as OpenAI's API does, on this machine.

    POST /v1/chat/completions takes images as data: URLs, and streams; there are GET /v1/models and GET /health.

    \b
    Example: vlm-export serve --port 8000
      client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
      client.chat.completions.create(model="shapes-captioner", messages=[
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}])

    \b
    max_tokens, max_completion_tokens   new tokens; else what the repo says
    temperature                         0 takes the best token, more samples; else what the repo says
    top_p, seed, stop, n, stream, stream_options.include_usage
    extra_body                          num_beams, length_penalty, early_stopping, top_k, repetition_penalty,
                                        no_repeat_ngram_size, min_new_tokens

    Anything else that would change the answer is refused by name. So are http(s) addresses of images: this server
    fetches nothing.
    """
    from vlm_export.apps import exported_repo
    from vlm_export.apps import serve as server
    from vlm_export.apps.listening import LOOPBACK, check_host

    check_host(host)
    model = exported_repo.open_model(repo, work, dtype=dtype, threads=threads, notify=_notify, spare=False)
    limits = server.Limits(max_body_mb * 1_000_000, concurrency, queue)
    if host not in LOOPBACK:
        _notify(f"warning: listening at {host}: whoever can reach it can use the model, without a key")

    def ready(url: str) -> None:
        what = {"url": url, "model": model.name, "dtype": model.dtype, "backend": model.backend}
        _print(as_json, what, [f"{model.name} in {model.dtype} at {url} (Ctrl-C stops it)"])

    server.serve(model, limits, host=host, port=port, ready=ready)


@main.command()
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
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0 is each runtime's own choice.")
@click.option("--card", is_flag=True, help="Write the table into the model card.")
@_common
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

    recipe = exported_repo.recipe_of(repo)
    if card and recipe is None:
        raise InputError(f"{repo}: --card: a recipe's card can be written, not that of a folder: name the recipe")
    for dtype in dtypes or (None,):  # of the Hub's, each fetches its own graphs, into one folder
        folder = exported_repo.find_repo(repo, work, dtype=dtype)
    chosen = images or benchmark.images_of(recipe)
    with _Progress(as_json) as progress:
        done = benchmark.bench(folder, chosen, runtimes=runtimes, dtypes=dtypes, progress=progress, **settings)
    if as_json:
        _print(True, asdict(done), [])
    else:
        Console().print(bench_table.table(asdict(done)))
    if card and recipe is not None:
        from vlm_export import pipeline

        _notify(f"written to {pipeline.run_card(recipe, _open(repo, work)[1], asdict(done))}")
    if done.failures:
        click.get_current_context().exit(1)


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
@click.argument("arguments", nargs=-1, required=True, metavar="[RECIPE|DIR|REPO_ID] IMAGE...")
@click.option("--prompt", help="What to say to a chat model; a captioner takes none.")
@click.option("--together", is_flag=True, help="All images belong to one prompt of a chat model.")
@click.option("--dtype", help="By default int8, else q8, else fp32, of those that passed verify.")
@click.option("--backend", type=click.Choice(["auto", "onnx", "torch"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="For each graph; 0 is ONNX Runtime's choice.")
@click.option("--stream", is_flag=True, help="Print the text as it comes.")
@click.option("--num-beams", type=int, help="Beam search.")
@click.option("--num-return-sequences", type=int, help="So many beams or samples, a line each.")
@click.option("--length-penalty", type=float, help="Above 0 favours long beams.")
@click.option("--early-stopping", type=click.Choice(["true", "false", "never"]), help="When beam search ends.")
@click.option("--sample", is_flag=True, help="Draw each token instead of taking the best.")
@click.option("--temperature", type=float, help="With --sample.")
@click.option("--top-k", type=int, help="With --sample: among so many of the best.")
@click.option("--top-p", type=float, help="With --sample: among the best that have this share of the probability.")
@click.option("--seed", type=int, help="With --sample: makes it repeatable.")
@click.option("--max-new-tokens", type=int)
@click.option("--min-new-tokens", type=int)
@click.option("--repetition-penalty", type=float)
@click.option("--no-repeat-ngram-size", type=int)
@click.option("--stop", multiple=True, help="A text that ends an answer; repeats.")
@_common
def run(
    arguments: tuple[str, ...],
    prompt: str | None,
    together: bool,
    dtype: str | None,
    backend: Literal["auto", "onnx", "torch"],
    threads: int,
    stream: bool,
    work: Path | None,
    as_json: bool,
    **generation: Any,
) -> None:
    """Caption images, or ask about them.

    With ONNX Runtime alone, neither PyTorch nor transformers; a recipe that is not exported yet runs with PyTorch.
    What is not given here is as generation_config.json says. One image gives its caption, several a line each.

    \b
    Example: vlm-export run photo.jpg
             vlm-export run build/my-captioner/repo photos/ --num-beams 3
             vlm-export run org/model photo.jpg --prompt 'What is this?' --stream
    """
    from vlm_export.apps import exported_repo
    from vlm_export.apps import run as runner

    options = runner.options(**generation)
    reference, images = exported_repo.split_arguments(arguments)
    started = time.monotonic()
    model = exported_repo.open_model(reference, work, dtype=dtype, backend=backend, threads=threads, notify=_notify)
    load_seconds = time.monotonic() - started
    groups = [images] if together else [[image] for image in images]
    streamed = stream and not as_json
    results = []
    for group, answer in runner.caption(model, groups, prompt, options, _write if streamed else None):
        results.append((group, answer))
        if not streamed and not as_json:
            click.echo("\n".join(runner.lines(group, answer, len(groups))))
    if as_json:
        _print(True, runner.as_json(model, results, load_seconds), [])


@main.command()
@click.argument("reference", metavar="[RECIPE|DIR]", required=False)
@click.option(
    "--export", "export_to", type=click.Path(path_type=Path), metavar="DIR", help="Write it as a static site."
)
@click.option("--port", type=click.IntRange(0, 65535), default=7861, show_default=True, help="0: any that is free.")
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
@_common
def demo(
    reference: str | None, export_to: Path | None, port: int, no_open: bool, work: Path | None, as_json: bool
) -> None:
    """Open a page that captions images with the exported repo.

    The page loads repo/ of a recipe, or an exported repo in DIR, in stock transformers.js, served from this machine to
    this machine alone. Ctrl-C ends it. With --export it is written to a folder instead, for a Space or GitHub Pages.

    Example: vlm-export demo --export site
    """
    from vlm_export.apps import demo_server, demo_site
    from vlm_export.apps.exported_repo import find_repo
    from vlm_export.apps.listening import listen, url_of

    repo = find_repo(reference, work)
    site = demo_site.build(repo, demo_site.goldens_of(reference, repo), cached=export_to is not None)
    if export_to is not None:
        written = demo_site.export(site, export_to)
        _print(as_json, {"path": str(export_to), "files": written}, [f"written to {export_to}: {len(written)} files"])
        return
    listening = listen(port)
    url = url_of(listening)
    _print(as_json, {"url": url, "path": str(repo)}, [f"{url} captions with {repo}; Ctrl-C ends it"])
    demo_server.serve(site, listening, open_browser=not no_open)


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
    from vlm_export.files import Work
    from vlm_export.recipe import LOCAL_RECIPE, find_recipe

    recipe = find_recipe(reference)
    if reference is None and recipe.is_bundled:
        click.echo(f"no {LOCAL_RECIPE} in this folder: this is about the bundled {recipe.name}", err=True)
    if recipe.recipe.trust_remote_code and builds_model:
        click.echo(f"warning: trust_remote_code: runs code of {recipe.recipe.model}@{recipe.recipe.revision}", err=True)
    return recipe, Work(work or Path("build") / recipe.name)


def _notify(line: str) -> None:
    click.echo(line, err=True)


def _write(text: str) -> None:
    click.echo(text, nl=False)


def _print(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, default=str) if as_json else "\n".join(lines))


def _report_lines(report: Any, path: Path) -> list[str]:
    shown: dict[Any, Any] = {}
    for check in report.failures:  # one overflow makes all that follows it infinite
        key = (check.dtype, check.runtime) if math.isnan(check.value) else check
        shown.setdefault(key, check)
    lines = [
        f"FAIL {check.component} {check.dtype} {check.runtime} {check.metric} = {check.value:.3g}"
        + (f" (limit {check.limit:g})" if check.limit is not None else "")
        + (f": {check.detail}" if check.detail else "")
        for check in list(shown.values())[:10]
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


collector.relax()
_quiet_libraries()
