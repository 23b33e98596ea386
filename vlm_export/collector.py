"""Python's cycle collector, set for commands: they import, run once and end.

By default it walks the 400,000 objects of torch and transformers again and again while they are imported, and once more
when the process ends: together 1.2 s of each command, where such objects live as long as the process anyway.
"""

from __future__ import annotations

import atexit
import gc

_THRESHOLDS = (20_000, 200, 100)  # the youngest in objects, the others in collections of the one before


def relax() -> None:
    """Collect less often, and not at all at the end of the process."""
    gc.set_threshold(*_THRESHOLDS)
    atexit.register(gc.freeze)
