"""`vlm-export`, which is `python -m vlm_export` too."""

from vlm_export.cli import main as command
from vlm_export.cli import startup


def main() -> None:
    """The command, in a process of its own."""
    startup.begin()
    command(prog_name="vlm-export")


if __name__ == "__main__":
    main()
