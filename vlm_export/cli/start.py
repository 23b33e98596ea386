"""The commands that a new user begins with: inspect, init, convert; and those about this machine: env, cache."""

from __future__ import annotations

import click

from vlm_export.cli.options import output_options
from vlm_export.cli.output import notify, print_result


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


COMMANDS = (inspect,)
