"""The command line: parse, call the pipeline, print. Results on stdout, progress on stderr, one line for an error."""

from __future__ import annotations

import click

from vlm_export import __version__
from vlm_export.cli import convert, start, use
from vlm_export.cli.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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
        vlm-export doctor org/model       what is wrong with a repo, anybody's

    RECIPE is a bundled recipe's name or a YAML file. Without one it is ./vlm-export.yaml if there is one, else the
    bundled shapes-captioner.
    """


for _command in (*start.COMMANDS, *convert.COMMANDS, *use.COMMANDS):
    main.add_command(_command)
