"""What the command changes in its own process, at the start: nothing of it happens to whoever imports the package."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from vlm_export.cli.output import NO_BARS

# Python walks the 400,000 objects of torch and transformers again and again while they are imported, and once more when
# the process ends: together 1.2 s of each command, where such objects live as long as the process anyway.
_THRESHOLDS = (20_000, 200, 100)  # the youngest in objects, the others in collections of the one before
# Libraries' own advice would stand between the user and one line of result; so would their bars in a log.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def begin() -> None:
    """Collect less often, and not at all at the end of the process; keep the libraries quiet."""
    gc.set_threshold(*_THRESHOLDS)
    atexit.register(gc.freeze)
    if not sys.stderr.isatty():
        os.environ.setdefault(NO_BARS, "1")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
