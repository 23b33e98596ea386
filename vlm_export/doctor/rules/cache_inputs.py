"""Contract §1.4, §2, §3, §14.2: the empty cache is made from the decoder's own inputs, under names from `config.json`.

Axes are [batch_size, heads, length, head size]: the first must have that very name, the length any other, and the two
that stay must be numbers. Every other name becomes 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import CONFIG, GraphFile, RepoView, dimensions

_BATCH = ("batch_size", "batch_size x num_heads")
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_OF_ATTENTION = "past_key_values."


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a cache without names, names that are not made, and axes or types that become a wrong cache."""
    decoders = [graph for graph, loaded in repo.loaded() if loaded.cached]
    if decoders and repo.layers is None:
        section = repo.client.text if repo.client else ""
        yield error(
            CONFIG,
            f"{section or 'config'} has no number of layers under a model_type that transformers.js knows "
            f"({repo.text_config.get('model_type')!r}): it makes no cache",
            'write "model_type": "llama" and num_hidden_layers there: names of the cache are all that is made of it',
        )
    for graph in decoders:
        yield from _names(repo, graph)
        for name, value in graph.inputs.items():
            if name.startswith(_OF_ATTENTION):
                yield from _entry(graph, name, value)


def _names(repo: RepoView, graph: GraphFile) -> Iterator[Finding]:
    entries = [name for name in graph.inputs if name.startswith("past_")]
    if not entries:
        fix = "export it with past_key_values.{i}.key and .value, and present.{i}.key and .value"
        yield error(graph.file, "has no cache: after the first token it sees that token alone", fix)
    unknown = [name for name in entries if name not in repo.cache_names]
    if unknown and repo.layers is not None:
        yield error(
            graph.file,
            f"input {unknown[0]!r}{f' and {len(unknown) - 1} more' * (len(unknown) > 1)} of the cache is not made by "
            f"transformers.js, which reads {repo.layers} layers",
            "call entries past_key_values.{i}.key and .value, and write as many layers into config.json",
        )


def _entry(graph: GraphFile, name: str, value: ir.Value) -> Iterator[Finding]:
    axes = dimensions(value)
    if axes is None or len(axes) != 4:
        yield error(graph.file, f"{name} is {axes}, not 4 axes", "declare [batch_size, heads, past_length, head size]")
        return
    batch, heads, length, size = axes
    if batch not in _BATCH:
        yield error(graph.file, f"axis 0 of {name} is {batch!r}, not 'batch_size': {axes}", "name it batch_size")
    if not (isinstance(heads, int) and isinstance(size, int)):
        yield error(graph.file, f"axes 1 and 3 of {name} are no numbers, and become 0: {axes}", "declare the sizes")
    if isinstance(length, int) or length in _BATCH:
        yield error(graph.file, f"axis 2 of {name} is no free length: {axes}", "name it past_sequence_length")
    if value.dtype not in _TYPES:
        yield error(graph.file, f"{name} is {value.dtype}, not float32 or float16", "declare float32 or float16")
