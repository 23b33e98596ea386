"""`python -m vlm_export`, where the script is not on PATH."""

from vlm_export.cli import main

main(prog_name="vlm-export")
