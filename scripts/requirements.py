"""Write `requirements/tested.txt`: what `pyproject.toml` and `constraints.txt` resolve to, each file with its hash.

    python scripts/requirements.py

It asks the package index, by uv (`pip install uv`), and is run again after a change of either file;
`tests/test_requirements.py` says when. What comes out is for any system and Python from 3.11 on, and names no index:
the hashes are of the files that PyPI has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTED = ROOT / "requirements" / "tested.txt"
HEAD = """\
# What the tests run with, and the sha256 of every file of it on PyPI, for any system; of `pyproject.toml` and
# `constraints.txt` by `python scripts/requirements.py`:
#
#     pip install --require-hashes --no-deps -r requirements/tested.txt
#     pip install --no-deps --no-build-isolation --editable .
#
# It is complete, hence `--no-deps`; torchvision, which timm names, is left out, as the tests run without it.
# torch here is PyPI's, which on Linux brings CUDA's libraries. The build for the CPU alone (`+cpu`, from PyTorch's own
# index) is another file that PyPI does not have, so that its hash is not here: where that one is wanted, install it
# first, and the rest with `--constraint constraints.txt`, without hashes.
"""


def main() -> int:
    """Ask the index, and write the file."""
    TESTED.parent.mkdir(exist_ok=True)
    command = ["uv", "pip", "compile", "pyproject.toml", "--group", "dev", "--extra", "fastvlm", "--universal"]
    command += ["--python-version", "3.11", "--constraint", "constraints.txt", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--no-config"]
    command += ["--no-emit-package", "torchvision"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        print("uv is missing: pip install uv", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip(), file=sys.stderr)
        return 2
    TESTED.write_text(HEAD + done.stdout, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
