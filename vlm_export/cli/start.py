"""The commands that a new user begins with: inspect, init, convert; and those about this machine: env, cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from vlm_export.cli.options import Command, common, open_recipe, output_options
from vlm_export.cli.output import Progress, notify, print_result
from vlm_export.contract import LayoutName
from vlm_export.errors import InputError
from vlm_export.start.uses import USES
from vlm_export.targets import TARGETS, Target
from vlm_export.wanted import parse


def recipe_options(command: Command) -> Command:
    """What a user can say of the recipe that is written: the fields of `start.draft.Wishes`."""
    options = (
        click.option(
            "--output",
            "path",
            type=click.Path(path_type=Path, dir_okay=False),
            default=Path("vlm-export.yaml"),
            show_default=True,
            help="The recipe's file.",
        ),
        click.option("--name", help="Of the recipe; else the name of the last folder that has one of its own."),
        click.option(
            "--for",
            "uses",
            multiple=True,
            type=click.Choice(USES),
            help="What it will be used on, which says the dtypes; repeats.  [default: browser]",
        ),
        click.option("--layout", type=click.Choice(get_args(LayoutName)), help="In place of the family's usual one."),
        click.option(
            "--images",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Pictures for golden outputs: files or folders; repeats. Else photographs of the package.",
        ),
        click.option("--question", default="What is in this image?", show_default=True, help="To a chat model."),
        click.option("--license", help="In place of the one that a card names."),
        click.option("--repo-id", metavar="ID", help="The Hub repo that it will be pushed to."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("reference", metavar="CHECKPOINT|ADAPTER|REPO")
@output_options
def inspect(reference: str, as_json: bool) -> None:
    """Say what a checkpoint, an adapter or an exported repo is.

    Its parts and their sizes, LoRA inside, what it can be exported as, how large that will be and what it takes. Names
    a folder or a repo of the Hub, of which nothing but kilobytes is fetched. No weights are read.

    \b
    Example: vlm-export inspect runs/my-captioner
             vlm-export inspect HuggingFaceTB/SmolVLM-256M-Instruct --json
    """
    from vlm_export.start import inspection, inspection_text

    found = inspection.inspect(reference, notify)
    machine = inspection.this_machine()
    print_result(as_json, inspection_text.as_json(found, machine), inspection_text.lines(found, machine))


@click.command()
@click.argument("model", metavar="CHECKPOINT")
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1)
@recipe_options
@click.option("--force", is_flag=True, help="Write over the recipe that is there.")
@output_options
def init(model: str, adapters: tuple[str, ...], force: bool, as_json: bool, **wishes: Any) -> None:
    """Write a recipe for a checkpoint and its adapters.

    Each is a folder or a repo of the Hub. The recipe says where every value is from: family and layout, dtypes for what
    it will be used on, a prompt by the model's own chat template, rules of generation, licence and base model. What a
    later command will miss is said too.

    \b
    Example: vlm-export init runs/my-captioner --images photos
             vlm-export init org/model runs/lora --for browser --for node
    """
    from vlm_export.start.draft import Wishes, draft
    from vlm_export.start.init_text import init_lines
    from vlm_export.start.missing import missing
    from vlm_export.start.recipe_text import write_recipe

    found = draft(model, adapters, Wishes(**wishes), notify)
    recipe = write_recipe(found, force=force)
    lacking = missing(found)
    result = {"path": str(recipe.path), "recipe": asdict(recipe.recipe), "missing": [asdict(each) for each in lacking]}
    print_result(as_json, result, init_lines(found, recipe, lacking))


@click.command()
@click.argument("model", metavar="[CHECKPOINT|RECIPE]", required=False)
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1)
@click.option("--quantize", multiple=True, metavar="DTYPE", help="In place of the recipe's dtypes; as of `onnx`.")
@click.option("--runtime", "runtimes", multiple=True, type=click.Choice(TARGETS), help="Where to verify; repeats.")
@click.option("--push", "push_to", metavar="ID", help="Push to this repo of the Hub what passes every check.")
@click.option("--private", is_flag=True, help="With --push: make a new repo private.")
@click.option("--dry-run", is_flag=True, help="Write the recipe and tell the plan; convert nothing.")
@click.option("--again", is_flag=True, help="Run stages, too, of which nothing has changed.")
@recipe_options
@click.option("--force", is_flag=True, help="Write the recipe anew.")
@common
def convert(
    model: str | None,
    adapters: tuple[str, ...],
    quantize: tuple[str, ...],
    runtimes: tuple[Target, ...],
    push_to: str | None,
    private: bool,
    dry_run: bool,
    again: bool,
    force: bool,
    work: Path | None,
    as_json: bool,
    **wishes: Any,
) -> None:
    """Convert a checkpoint and its adapters, from recipe to verified repo.

    init, golden, merge, onnx, verify and, with --push, push. What is to be done is told first. A recipe that is there
    is used as it stands; without an argument it is ./vlm-export.yaml. A stage that would be made of the same as the
    last time is skipped, by the contents of its files. Exit status 1 says that a check failed.

    \b
    Example: vlm-export convert runs/my-captioner
             vlm-export convert org/model runs/lora --quantize q8 --push org/model-onnx
             vlm-export convert my-captioner.yaml
    """
    from vlm_export.commands import named
    from vlm_export.start import plan as plans

    run = plans.Run(quantize, runtimes, push_to, private, work, again)
    parse(quantize, "--quantize")
    tell = _once()
    found = _recipe_to_convert(model, adapters, {**wishes, "dtypes": quantize}, force, tell)
    opened, folder = open_recipe(str(found), work)
    plan = plans.plan(opened, folder, plans.model_of(opened, tell), run)
    for line in plans.lines(plan):
        notify(line)
    if dry_run:
        stages = [asdict(stage) for stage in plan.stages]
        said = ["nothing was converted", f"next: vlm-export convert{named(opened)}{run.options()}"]
        print_result(as_json, {"recipe": str(opened.path), "stages": stages}, said)
        return
    from vlm_export.start.conversion import convert as run_stages

    with Progress(as_json) as progress:
        done = run_stages(plan, progress, notify)
    if not as_json:
        from rich.console import Console

        from vlm_export.publish import decision_table

        Console().print(decision_table.table(done.report.table))
    print_result(as_json, done.as_json(), done.lines())
    if not done.passed:
        click.get_current_context().exit(1)


def _once() -> Callable[[str], None]:
    """`notify`, but for lines that it was told already."""
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            notify(line)

    return tell


def _recipe_to_convert(
    model: str | None, adapters: tuple[str, ...], wishes: dict[str, Any], force: bool, tell: Callable[[str], None]
) -> Path:
    """The file of the recipe that `convert` is about: the one that was named, or one that is written now.

    Raises:
        InputError: nothing was named, and there is no recipe in the current folder; or as of `draft`, `recipe_of`.
    """
    from vlm_export.recipe import LOCAL_RECIPE, find_recipe
    from vlm_export.start.draft import Wishes, draft
    from vlm_export.start.plan import check_unchanged, recipe_of

    if model is None and not Path(LOCAL_RECIPE).is_file():
        raise InputError(f"no {LOCAL_RECIPE} in this folder: name a checkpoint: `vlm-export convert CHECKPOINT`")
    if model is None or _is_recipe(model):
        if adapters:
            raise InputError(f"{adapters[0]}: a recipe names its adapters itself: list it under `adapters`")
        recipe = find_recipe(model)
        check_unchanged(recipe.path, Wishes(**wishes))
        return recipe.path
    return recipe_of(draft(model, adapters, Wishes(**wishes), tell), force=force, notify=tell).path


def _is_recipe(model: str) -> bool:
    """Whether an argument is the name of a recipe, of a file or bundled, and not a folder."""
    from vlm_export import bundled

    return not Path(model).is_dir() and (model.endswith((".yaml", ".yml")) or model in bundled.recipe_names())


@click.command()
@output_options
def env(as_json: bool) -> None:
    """Describe this machine for a bug report.

    Versions, what the processor can do, memory, Node, browser, and what is kept between runs. Of a Hub token it says
    only whether there is one.

    Example: vlm-export env
    """
    from vlm_export.start.environment import environment
    from vlm_export.start.environment_text import env_lines

    found = environment()
    print_result(as_json, asdict(found), env_lines(found))


@click.group(invoke_without_command=True)
@output_options
@click.pass_context
def cache(context: click.Context, as_json: bool) -> None:
    """List what is kept between runs, and delete it.

    Graphs that were traced, npm packages, and, to look at alone, the downloads of the Hub.

    \b
    Example: vlm-export cache
             vlm-export cache clean --yes
    """
    from vlm_export.start.caches import caches
    from vlm_export.start.environment_text import cache_lines

    if context.invoked_subcommand is None:
        found = caches()
        print_result(as_json, {"caches": [asdict(each) for each in found]}, cache_lines(found))


@cache.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def clean(yes: bool, as_json: bool) -> None:
    """Delete what this package keeps between runs.

    It is traced, and downloaded, again when it is needed. Lists what goes, and asks.

    Example: vlm-export cache clean
    """
    from vlm_export.start import caches
    from vlm_export.start.figures import size

    found = [each for each in caches.caches() if each.deleted]
    total = sum(each.size_bytes for each in found)
    for each in found:
        notify(f"{size(each.size_bytes):>9}  {each.what}: {each.path}")
    if found and not yes:
        click.confirm(f"delete {size(total)}?", abort=True, err=True)
    freed = caches.clean(found)
    print_result(
        as_json, {"deleted": [asdict(each) for each in found], "size_bytes": freed}, [f"deleted {size(freed)}"]
    )
