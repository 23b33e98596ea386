"""Contract §7.1, §10, §14.7: weights outside a graph's file are named and declared so that a browser finds them.

A chunk that is declared and missing leaves `from_pretrained` waiting for ever; one that is not declared is not fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import CLIENT_CONFIG, CONFIG, DEVICES, GraphFile, RepoView, integer, is_plain

_KEY = "use_external_data_format"
_MOST_CHUNKS = 100
_LARGEST_BYTES = 2**31 - 1  # of one fetch in most browsers, and of a protobuf message


def check(repo: RepoView) -> Iterator[Finding]:
    """Find chunks of a wrong name, size or number."""
    for file in repo.graph_files:
        if repo.sizes_bytes[file] > _LARGEST_BYTES:
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
    if _number(graph, name) is None:
        fix = f"name it {graph.name}_data, further ones _data_1, _data_2, in the graph and on disk"
        yield error(graph.file, f"keeps weights in {name!r}, which no client fetches", fix)
    if not repo.has(file):
        yield error(file, f"is missing, and {graph.name} keeps weights in it", "add it to the repo")
    elif repo.sizes_bytes[file] < end:
        yield error(file, f"ends at byte {repo.sizes_bytes[file]}, and {graph.name} reads up to {end}", "export again")
    elif repo.sizes_bytes[file] > _LARGEST_BYTES:
        yield error(file, "is larger than 2 GB, which browsers cannot fetch", "export in chunks below 1 GB")


def _declared(repo: RepoView, graph: GraphFile) -> Iterator[Finding]:
    numbers = {_number(graph, name) for name in graph.data_ends}
    if None in numbers:
        return  # told already, and to be counted when it has a name
    needed = 1 + max((number for number in numbers if number is not None), default=-1)
    for declared in {_chunks(repo, graph, device) for device in DEVICES} - {needed}:
        many = "chunk" if needed == 1 else "chunks"
        hangs = "loading never ends" if declared > needed else "a browser does not fetch all"
        yield error(
            CONFIG,
            f"{CLIENT_CONFIG}.{_KEY} declares {declared} for {graph.name}, which has {needed} {many}: {hangs}",
            f'write "{graph.name}": {needed} into it' if needed else f"drop {graph.name} from it",
        )
    if needed > _MOST_CHUNKS:
        yield error(graph.file, f"has {needed} chunks, and clients take {_MOST_CHUNKS}", "export in larger chunks")
    elif len(numbers) < needed:
        yield error(graph.file, f"has {len(numbers)} chunks, numbered up to {needed - 1}", "number them from 0 on")


def _number(graph: GraphFile, name: str) -> int | None:
    """The number of a chunk, which is 0 where its name has none; None where clients give no chunk that name."""
    found = re.fullmatch(rf"{re.escape(graph.name)}_data(?:_([1-9]\d{{0,5}}))?", name)
    return int(found[1] or 0) if found else None


def _chunks(repo: RepoView, graph: GraphFile, device: str) -> int:
    """How many chunks a client fetches for a graph."""
    declared = repo.client_setting(_KEY, device)
    if isinstance(declared, dict):
        declared = declared.get(graph.name, declared.get(graph.component))
    return int(declared) if isinstance(declared, bool) else integer(declared) or 0
