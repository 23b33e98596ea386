"""Contract §3: transformers.js 3.x to 4.1 take the cache's type from `kv_cache_dtype`, float32 where it is missing."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from vlm_export.doctor.findings import Finding, warning
from vlm_export.doctor.repo_view import CONFIG, RepoView, mapping


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a float16 cache that older clients would make in float32."""
    declared = repo.client_config.get("kv_cache_dtype")
    for graph, loaded in repo.loaded():
        types = {value.dtype for name, value in graph.inputs.items() if name.startswith("past_") and loaded.cached}
        named = declared if isinstance(declared, str) else mapping(declared).get(graph.dtype)
        if ir.DataType.FLOAT16 in types and named != "float16":
            yield warning(
                CONFIG,
                f"the cache of {graph.name} is float16, and transformers.js before 4.2 makes it in float32",
                f'write "kv_cache_dtype": {{"{graph.dtype}": "float16"}} into transformers.js_config',
            )
