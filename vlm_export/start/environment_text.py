"""What `vlm-export env` and `vlm-export cache` print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlm_export.paths import home
from vlm_export.start.caches import Cache
from vlm_export.start.environment import Environment
from vlm_export.start.figures import columns, size


def env_lines(found: Environment) -> list[str]:
    """Lines to paste into a bug report; the user's home is `~` in them."""
    return [_without_home(line) for line in [*_machine(found), "", *cache_lines(found.caches)]]


def _machine(found: Environment) -> Iterator[str]:
    packages = [f"{name} {number}" for name, number in found.packages.items() if number]
    missing = [name for name, number in found.packages.items() if number is None]
    features = "unknown" if found.features is None else " ".join(found.features) or "none of those that matter"
    rows = [
        ("vlm-export", found.vlm_export),
        ("Python", f"{found.python} on {found.system}"),
        *(("packages" if not at else "", ", ".join(packages[at : at + 5])) for at in range(0, len(packages), 5)),
        *([("not installed", ", ".join(missing))] if missing else []),
        ("processor", f"{found.processor}, {found.cores} cores: {features}"),
        ("memory", f"{size(found.available_memory_bytes)} of {size(found.memory_bytes)} free"),
        ("disk", f"{size(found.free_disk_bytes)} free here"),
        ("Node", found.node),
        ("npm", found.npm),
        ("Chromium", found.chromium),
        ("Hub token", "set" if found.token else "not set"),
        *((name, value) for name, value in found.variables.items()),
    ]
    yield from columns(rows)


def cache_lines(found: Iterable[Cache]) -> list[str]:
    """A line for each part of what is kept, and how to be rid of it."""
    found = list(found)
    if not found:
        return ["nothing is kept between runs yet"]
    rows = [(cache.what, size(cache.size_bytes), _without_home(str(cache.path))) for cache in found]
    ours = sum(cache.size_bytes for cache in found if cache.deleted)
    return [*columns([("kept between runs", "size", "where"), *rows]), *_how(found, ours)]


def _how(found: Iterable[Cache], ours: int) -> Iterator[str]:
    yield ""
    for what, instead in {cache.what: cache.instead for cache in found if cache.instead}.items():
        yield f"{what}: {instead}"
    if ours:
        yield f"next: vlm-export cache clean  (deletes {size(ours)})"


def _without_home(text: str) -> str:
    folder = str(home() or "")
    return text.replace(folder, "~") if len(folder) > 1 else text
