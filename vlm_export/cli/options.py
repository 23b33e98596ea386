"""What commands have in common: options, the recipe that they are about, and errors as one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vlm_export import news
from vlm_export.cli import output
from vlm_export.errors import VlmExportError, refused, shown

if TYPE_CHECKING:
    from vlm_export.commands import Commands
    from vlm_export.files import Work
    from vlm_export.recipe import RecipeFile


Command = TypeVar("Command", bound=Callable[..., Any])


_DEBUG = "vlm_export.debug"
_MOST_THREADS = 1024  # each has a stack of its own
_COLUMNS = 100  # of help, at most
_SHORT = 200  # characters of a command's first sentence, which wraps


class FiniteRange(click.FloatRange):
    """A range that has no place for NaN, which is neither below its least nor above its most."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Fails where it is NaN, or out of the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


class Group(click.Group):
    """Lists its commands in the order of work, and turns the errors of `errors.py` into one line and their exit status.

    `sections` are headings, with the commands below each.
    """

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[click.Command]], **settings: Any):
        context = {"help_option_names": ["-h", "--help"], "max_content_width": _COLUMNS}
        super().__init__(*arguments, context_settings=context, **settings)
        self.sections = sections
        for commands in sections.values():
            for command in commands:
                self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, in their order."""
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(command.name or "", command.get_short_help_str(limit=_SHORT)) for command in commands]
                )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Exits with 2 where an argument cannot be a name of anything."""
        if wrong := next((each for each in args if "\0" in each), None):
            output.fail(f"{shown(wrong)}: holds a zero character, which no name has")
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Exits with an error's own status, and with 2 for an OSError; `--debug` lets both through."""
        try:
            with news.told_to(output.notify):
                return super().invoke(ctx)
        except VlmExportError as error:
            if ctx.meta.get(_DEBUG):
                raise
            output.fail(str(error))
            ctx.exit(error.exit_code)
        except OSError as error:
            if ctx.meta.get(_DEBUG) or isinstance(error, BrokenPipeError):  # click ends in silence: nobody reads on
                raise
            output.fail(refused(error))
            ctx.exit(2)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.find_root().meta[_DEBUG] = value


work_option = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VLM_EXPORT_WORK",
    help="Work folder, in place of build/<recipe name>.",
)

again_option = click.option("--again", is_flag=True, help="Do it even if nothing changed since it was done.")

threads_option = click.option(
    "--threads",
    type=click.IntRange(0, _MOST_THREADS),
    default=0,
    help="For each graph; 0 is the runtime's own choice.",
)


def debug_option(command: Command) -> Command:
    """Options of every command: what it tells beside its result, and of an error."""
    quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=lambda context, _, value: output.be_quiet(context, value),
        help="Only the result, warnings and errors: no progress, no notes.",
    )
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
    )
    return quiet(debug(command))


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
    from vlm_export.typed import typed

    recipe = find_recipe(reference)
    folder = Work(work or Path("build") / recipe.name)
    if reference is None and recipe.is_bundled:
        output.notify(f"no {LOCAL_RECIPE} in this folder: this is about the bundled {recipe.name}")
    if recipe.trusted_code and builds_model:
        output.warn(f"trust_remote_code: runs code of {recipe.trusted_code}")
    commands = next_commands(recipe, folder)
    if context := click.get_current_context(silent=True):
        context.with_resource(typed(commands.recipe, commands.work))
    return recipe, folder


def next_commands(recipe: RecipeFile, work: Work) -> Commands:
    """The recipe's commands, as its user would type them."""
    from vlm_export.commands import Commands

    return Commands.of(recipe, work)
