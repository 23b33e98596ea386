"""The commands that use an exported repo: run, chat, serve, demo, doctor."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Literal

import click

from vlm_export.cli.options import (
    common,
    debug_option,
    generation_options,
    output_options,
    threads_option,
    work_option,
)
from vlm_export.cli.output import UNWRAPPED, notify, print_result, write
from vlm_export.errors import InputError


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="[RECIPE|DIR|REPO_ID] IMAGE...")
@click.option("--prompt", help="What to say to a chat model; a captioner takes none.")
@click.option("--together", is_flag=True, help="All images belong to one prompt of a chat model.")
@click.option("--dtype", help="By default int8, else q8, else fp32, of those that passed verify.")
@click.option("--backend", type=click.Choice(["auto", "onnx", "torch"]), default="auto", show_default=True)
@threads_option
@click.option("--stream", is_flag=True, help="Print the text as it comes.")
@generation_options
@common
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
    What is not given here is as generation_config.json says. One image gives its caption, several a line each; a folder
    is the images in it, - is one from stdin. Of several, those that cannot be read are told at the end.

    \b
    Example: vlm-export run photo.jpg
             curl -s https://example.org/photo.jpg | vlm-export run -
             vlm-export run build/my-captioner/repo photos/ --num-beams 3
             vlm-export run org/model photo.jpg --prompt 'What is this?' --stream
    """
    from vlm_export.apps import exported_repo
    from vlm_export.apps import run as runner

    options = runner.options(**generation)
    reference, images = exported_repo.split_arguments(arguments)
    started = time.monotonic()
    model = exported_repo.open_model(reference, work, dtype=dtype, backend=backend, threads=threads, notify=notify)
    load_seconds = time.monotonic() - started
    groups = [images] if together else [[image] for image in images]
    streamed = stream and not as_json
    results, unread = [], []
    for group, answer in runner.caption(model, groups, prompt, options, write if streamed else None):
        if isinstance(answer, InputError):
            unread.append(str(answer))
            continue
        results.append((group, answer))
        if not streamed and not as_json:
            click.echo("\n".join(runner.lines(group, answer, len(groups))))
    if as_json:
        print_result(True, runner.as_json(model, results, load_seconds, unread), [])
    if unread:
        for line in unread:
            notify(line)
        raise InputError(f"{len(unread)} of {len(groups)} images cannot be read")


@click.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE|DIR|REPO_ID] [IMAGE]...")
@click.option("--dtype", help="By default int8, else q8, else fp32, of those that passed verify.")
@click.option("--backend", type=click.Choice(["auto", "onnx", "torch"]), default="auto", show_default=True)
@threads_option
@generation_options
@work_option
@debug_option
def chat(
    arguments: tuple[str, ...],
    dtype: str | None,
    backend: Literal["auto", "onnx", "torch"],
    threads: int,
    work: Path | None,
    **generation: Any,
) -> None:
    """Talk with a chat model in the terminal, about pictures.

    Each line is a turn, and the model remembers the ones before. /image FILE shows a picture with the next line, /new
    begins again, /quit or Ctrl-D ends; Ctrl-C stops an answer.

    \b
    Example: vlm-export chat org/model photo.jpg
    """
    from vlm_export.apps import chat as talking
    from vlm_export.apps import exported_repo
    from vlm_export.apps import run as runner

    options = runner.options(**generation)
    reference, images = exported_repo.split_arguments(arguments, needs_images=False)
    model = exported_repo.open_model(reference, work, dtype=dtype, backend=backend, threads=threads, notify=notify)
    talk = talking.Talk(model, options, write, notify)
    for image in images:
        talk.show(image)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        notify(f"{model.name} in {model.dtype}: {talking.HELP}")
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            break
        if (not is_terminal and not line) or not talk.hear(line):
            break


@click.command()
@click.argument("repo", metavar="[RECIPE|DIR|REPO_ID]", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen. Who can reach it can use the model: there is no key and no TLS.",
)
@click.option("--dtype", help="By default int8, else q8, else fp32, of those that passed verify.")
@threads_option
@click.option("--max-body-mb", type=click.IntRange(1), default=20, show_default=True, help="Of one request.")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Requests at work at a time.")
@click.option("--queue", type=click.IntRange(0), default=16, show_default=True, help="Requests that may wait for that.")
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin use it, as http://localhost:3000; repeats.",
)
@common
def serve(
    repo: str | None,
    port: int,
    host: str,
    dtype: str | None,
    threads: int,
    max_body_mb: int,
    concurrency: int,
    queue: int,
    origins: tuple[str, ...],
    work: Path | None,
    as_json: bool,
) -> None:
    """Serve an exported repo as OpenAI's API does, on this machine.

    POST /v1/chat/completions takes images as data: URLs, and streams; there are GET /v1/models and GET /health, and at
    / a page to try it with.

    \b
    Example: vlm-export serve --port 8000
             vlm-export serve org/model --cors http://localhost:3000

    \b
      client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
      picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
      client.chat.completions.create(
        model="shapes-captioner", messages=[{"role": "user", "content": [picture]}])

    \b
    max_tokens, max_completion_tokens   new tokens; else what the repo says
    temperature                         0 takes the best token, more samples; else what the repo says
    top_p, seed, stop, n, stream, stream_options.include_usage
    extra_body                          num_beams, length_penalty, early_stopping, top_k,
                                        repetition_penalty, no_repeat_ngram_size, min_new_tokens

    Anything else that would change the answer is refused by name. So are http(s) addresses of images: this server
    fetches nothing.
    """
    from vlm_export.apps import exported_repo
    from vlm_export.apps import serve as server
    from vlm_export.apps.served import curl
    from vlm_export.web.listening import LOOPBACK, check_host, check_origin

    check_host(host)
    for origin in origins:
        check_origin(origin)
    model = exported_repo.open_model(repo, work, dtype=dtype, threads=threads, notify=notify, fall_back_later=False)
    limits = server.Limits(max_body_mb * 1_000_000, concurrency, queue)

    def ready(url: str) -> None:
        if host not in LOOPBACK:
            notify(f"warning: listening at {host}: whoever can reach it can use the model, without a key")
        what = {"url": f"{url}v1", "page": url, "model": model.name, "dtype": model.dtype, "backend": model.backend}
        lines = [
            f"{model.name} in {model.dtype} at {url}v1, with a page at {url} (Ctrl-C stops it)",
            "try it:",
            curl(url),
        ]
        print_result(as_json, what | {"curl": curl(url)}, lines)

    server.serve(model, limits, host=host, port=port, origins=origins, ready=ready)


@click.command()
@click.argument("reference", metavar="[RECIPE|DIR]", required=False)
@click.option(
    "--export", "export_to", type=click.Path(path_type=Path), metavar="DIR", help="Write it as a static site."
)
@click.option("--port", type=click.IntRange(0, 65535), default=7861, show_default=True, help="0: any that is free.")
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
@common
def demo(
    reference: str | None, export_to: Path | None, port: int, no_open: bool, work: Path | None, as_json: bool
) -> None:
    """Open a page that captions images with the exported repo.

    The page loads repo/ of a recipe, or an exported repo in DIR, in stock transformers.js, served from this machine to
    this machine alone. Ctrl-C ends it. With --export it is written to a folder instead, for a Space or GitHub Pages.

    Example: vlm-export demo --export site
    """
    from vlm_export.apps import demo_site
    from vlm_export.apps.exported_repo import find_repo
    from vlm_export.web import site_server
    from vlm_export.web.listening import listen, url_of

    repo = find_repo(reference, work)
    site = demo_site.build(repo, demo_site.goldens_of(reference, repo), cached=export_to is not None)
    if export_to is not None:
        written = demo_site.export(site, export_to)
        print_result(
            as_json, {"path": str(export_to), "files": written}, [f"written to {export_to}: {len(written)} files"]
        )
        return
    listening = listen(port)
    url = url_of(listening)
    print_result(as_json, {"url": url, "path": str(repo)}, [f"{url} captions with {repo}; Ctrl-C ends it"])
    site_server.serve(site, listening, open_browser=not no_open)


@click.command()
@click.argument("reference", metavar="DIR|REPO_ID")
@output_options
def doctor(reference: str, as_json: bool) -> None:
    """Find what is wrong with a repo for transformers.js, whoever exported it.

    Reads config files and graphs, runs nothing, and says what would fail in Node or in a browser, and how to mend it.
    Of a repo of the Hub the graphs are fetched, and no weights that lie beside them.

    Exit status 1 says that there are errors; warnings alone are 0.

    \b
    Example: vlm-export doctor build/my-captioner/repo
             vlm-export doctor org/model --json
    """
    from rich.console import Console

    from vlm_export.doctor.examine import examine
    from vlm_export.doctor.find_repo import find_repo
    from vlm_export.doctor.findings import Severity
    from vlm_export.doctor.report import renderable

    examination = examine(find_repo(reference, notify))
    if as_json:
        print_result(True, {"repo": reference, **examination.as_json()}, [])
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else UNWRAPPED).print(renderable(examination))
    if examination.count(Severity.ERROR):
        click.get_current_context().exit(1)
