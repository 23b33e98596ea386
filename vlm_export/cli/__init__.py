"""The command line: parse, call the pipeline, print. Results on stdout, progress on stderr, one line for an error."""

from __future__ import annotations

import click

from vlm_export import __version__
from vlm_export.cli import convert, start, use
from vlm_export.cli.options import Group
from vlm_export.cli.sweep import sweep

_SECTIONS = {
    "Begin with a checkpoint": (start.inspect, start.init, start.convert, sweep),
    "Convert, a step at a time": (convert.golden, convert.merge, convert.onnx, convert.verify, convert.push),
    "Use what was exported": (use.run, use.chat, use.serve, use.demo, convert.bench),
    "Look after things": (use.doctor, convert.recipes, start.env, start.cache),
}


@click.group(cls=Group, sections=_SECTIONS)
@click.version_option(__version__, prog_name="vlm-export")
def main() -> None:
    """Turn a fine-tuned vision-language model into a repo that stock transformers.js loads, and prove that it says the
    same as the PyTorch model.

    \b
        vlm-export convert runs/my-captioner            from a checkpoint to a verified repo
        vlm-export convert org/base runs/lora --push org/model    with an adapter, and to the Hub
        vlm-export run photo.jpg                        caption a picture with it
        vlm-export demo                                 open a page that does
        vlm-export doctor org/model                     what is wrong with a repo, anybody's

    RECIPE is a bundled recipe's name or a YAML file. Without one it is the current folder's file, as init writes it, or
    else the bundled shapes-captioner.
    """
