"""Contract §7.1, §10, §14.7: weights outside a graph's file are named and declared so that a browser finds them.

A chunk that is declared and missing leaves `from_pretrained` waiting for ever; one that is not declared is not fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import CONFIG, DEVICES, GraphFile, RepoView, integer, is_plain

_KEY = "use_external_data_format"
LARGEST_BYTES = 2**31 - 1  # of one fetch in most browsers, and of a protobuf message


def check(repo: RepoView) -> Iterator[Finding]:
    """Find chunks of a wrong name, size or number."""
    for file in repo.graph_files:
        if repo.sizes_bytes[file] > LARGEST_BYTES:
            yield error(file, "is larger than 2 GB, which no protobuf message may be", "export with external data")
    for graph in repo.graphs:
        for name, end in graph.data_ends.items():
            yield from _chunk(repo, graph, name, end)
        yield from _declared(repo, graph)


def _chunk(repo: RepoView, graph: GraphFile, name: str, end: int) -> Iterator[Finding]:
    if not is_plain(name):
        yield error(graph.file, f"keeps weights in {name!r}, a path", f"name it {graph.name}_data, beside the graph")
        return
    file = graph.file.removesuffix(graph.name) + name
    if not re.fullmatch(rf"{re.escape(graph.name)}_data(_[1-9]\d*)?", name):
        fix = f"name it {graph.name}_data, further ones _data_1, _data_2, in the graph and on disk"
        yield error(graph.file, f"keeps weights in {name!r}, which no client fetches", fix)
    if not repo.has(file):
        yield error(file, f"is missing, and {graph.name} keeps weights in it", "add it to the repo")
    elif repo.sizes_bytes[file] < end:
        yield error(file, f"ends at byte {repo.sizes_bytes[file]}, and {graph.name} reads up to {end}", "export again")
    elif repo.sizes_bytes[file] > LARGEST_BYTES:
        yield error(file, "is larger than 2 GB, which browsers cannot fetch", "export in chunks below 1 GB")


def _declared(repo: RepoView, graph: GraphFile) -> Iterator[Finding]:
    needed = 1 + max(map(_index, graph.data_ends), default=-1)
    for device in DEVICES:
        declared = _chunks(repo, graph, device)
        if declared != needed:
            many = "chunks" if needed != 1 else "chunk"
            hangs = ": loading never ends" if declared > needed else ": a browser does not fetch all"
            yield error(
                CONFIG,
                f"transformers.js_config.{_KEY} declares {declared} for {graph.name}, which has {needed} {many}{hangs}",
                f'write "{graph.name}": {needed} into it' if needed else f"drop {graph.name} from it",
            )


def _index(name: str) -> int:
    found = re.search(r"_data_(\d{1,4})$", name)
    return int(found[1]) if found else 0


def _chunks(repo: RepoView, graph: GraphFile, device: str) -> int:
    """How many chunks a client fetches for a graph."""
    declared = repo.client_setting(_KEY, device)
    if isinstance(declared, dict):
        declared = declared.get(graph.name, declared.get(graph.component))
    return int(declared) if isinstance(declared, bool) else integer(declared) or 0
