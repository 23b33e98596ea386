"""What commands have in common: options, the recipe that they are about, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vlm_export.errors import VlmExportError

if TYPE_CHECKING:
    from vlm_export.files import Work
    from vlm_export.recipe import RecipeFile


Command = TypeVar("Command", bound=Callable[..., Any])


_DEBUG = "vlm_export.debug"


class Group(click.Group):
    """Turns the errors of `errors.py` into one line and their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Exits with an error's own status, and with 2 for an OSError; `--debug` lets both through."""
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


work_option = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VLM_EXPORT_WORK",
    help="Work folder, in place of build/<recipe name>.",
)
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
)


def common(command: Command) -> Command:
    """Options of every command that works on a recipe."""
    return work_option(output_options(command))


def output_options(command: Command) -> Command:
    """Options of every command that prints a result."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(
        debug_option(command)
    )


def generation_options(command: Command) -> Command:
    """Options of how tokens are chosen, as `apps.run.options` takes them."""
    options = (
        click.option("--num-beams", type=int, help="Beam search."),
        click.option("--num-return-sequences", type=int, help="So many beams or samples, a line each."),
        click.option("--length-penalty", type=float, help="Above 0 favours long beams."),
        click.option("--early-stopping", type=click.Choice(["true", "false", "never"]), help="When beam search ends."),
        click.option("--sample", is_flag=True, help="Draw each token instead of taking the best."),
        click.option("--temperature", type=float, help="With --sample."),
        click.option("--top-k", type=int, help="With --sample: among so many of the best."),
        click.option("--top-p", type=float, help="With --sample: among the best that have this share."),
        click.option("--seed", type=int, help="With --sample: makes it repeatable."),
        click.option("--max-new-tokens", type=int, help="At most so many."),
        click.option("--min-new-tokens", type=int, help="At least so many."),
        click.option("--repetition-penalty", type=float, help="Above 1 makes what was said less likely."),
        click.option("--no-repeat-ngram-size", type=int, help="No run of so many tokens comes twice."),
        click.option("--stop", multiple=True, help="A text that ends an answer; repeats."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def recipe_argument(command: Command) -> Command:
    """RECIPE, which may be left out."""
    return click.argument("recipe", required=False)(command)


def open_recipe(reference: str | None, work: Path | None, *, builds_model: bool = True) -> tuple[RecipeFile, Work]:
    """The recipe that a command is about, and its work folder; says so where the user named none.

    Raises:
        InputError: there is no such recipe, or something is wrong in it.
    """
    from vlm_export.files import Work
    from vlm_export.recipe import LOCAL_RECIPE, find_recipe

    recipe = find_recipe(reference)
    if reference is None and recipe.is_bundled:
        click.echo(f"no {LOCAL_RECIPE} in this folder: this is about the bundled {recipe.name}", err=True)
    if recipe.trusted_code and builds_model:
        click.echo(f"warning: trust_remote_code: runs code of {recipe.trusted_code}", err=True)
    return recipe, Work(work or Path("build") / recipe.name)
