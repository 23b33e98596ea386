"""How much of the machine this process can have: memory and disk, of a container that was given less; and threads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# By version of the kernel's control groups: limit, use, and what of the use is files that it gives up when asked.
_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


_THREADS: ContextVar[int] = ContextVar("threads", default=0)


def own_threads() -> int:
    """How many threads a graph is run by where its caller does not say: 0 leaves it to the runtime, which takes all."""
    return _THREADS.get()


@contextmanager
def threads_at_most(count: int) -> Iterator[None]:
    """Within, torch and graphs have so many threads: a process beside others leaves them their cores."""
    import torch

    before, token = torch.get_num_threads(), _THREADS.set(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _THREADS.reset(token)


def available_memory() -> int:
    """Bytes that this process can have resident, those that it has included."""
    free = [psutil.virtual_memory().available, *_free_in_groups()]
    return min(free) + psutil.Process().memory_info().rss


def free_disk(folder: Path) -> int:
    """Bytes that can be written to the file system of a folder, which exists."""
    return shutil.disk_usage(folder).free


def _free_in_groups() -> Iterator[int]:
    """Bytes that the process's control groups, and those that they are in, leave it. Nothing outside Linux."""
    if not OWN_CGROUPS.is_file():
        return
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            own = root / path.lstrip("/")
            for group in (own, *own.parents):  # a container may see its own group as the root
                if group.is_relative_to(root):
                    yield from _free(group, *_FILES["v1" if controllers else "v2"])


def _free(group: Path, limit: str, use: str, given_up: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text().strip()
        used = int((group / use).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no such group here, or none that has a limit
        return
    if most != "max":
        yield max(0, int(most) - used + int(statistics.get(given_up, 0)))
