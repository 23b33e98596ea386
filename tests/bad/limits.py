"""What a command on bad input may take: time and memory, after which it is stopped; and what it may leave: nothing."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_LINE = 300
LONGEST_SECONDS = 20
MEMORY_BYTES = 2_000_000_000  # beyond what the process has


class Hangs(BaseException):
    """No command can catch it."""


@contextmanager
def bounded(seconds: int = LONGEST_SECONDS) -> Iterator[None]:
    """Within, what waits, computes or allocates without end is stopped."""

    def stop(*_: object) -> None:
        raise Hangs

    held = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, held[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, held)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, and when it was written."""
    return {
        os.path.relpath(os.path.join(root, name), folder): (found.st_size, found.st_mtime_ns)
        for root, folders, files in os.walk(folder)
        for name in (*files, *folders)
        for found in [os.lstat(os.path.join(root, name))]
        if name in files or not os.listdir(os.path.join(root, name))
    }
