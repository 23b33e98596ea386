"""Contract §10: all sessions in a browser share 4 GB of WASM memory, weights, cache and activations together."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import CONFIG, RepoView

_ALL_BYTES = 65536 * 65536
_COMFORTABLE_BYTES = 1_500_000_000


def check(repo: RepoView) -> Iterator[Finding]:
    """Find a repo whose graphs for WASM do not fit, or leave little room."""
    files = {repo.taken(component, "wasm") for component in repo.client.graphs} if repo.client else set()
    weights = [name for name in repo.sizes_bytes for file in files if name == file or name.startswith(f"{file}_data")]
    total = sum(repo.sizes_bytes[name] for name in weights)
    fix = "name a smaller dtype for wasm in transformers.js_config.device_config"
    if total > _ALL_BYTES:
        yield error(CONFIG, f"a browser's graphs (wasm) are {total / 1e9:.1f} GB, and WASM has 4.3 GB in all", fix)
    elif total > _COMFORTABLE_BYTES:
        yield warning(CONFIG, f"a browser's graphs (wasm) are {total / 1e9:.1f} GB: above 1.5 GB many tabs fail", fix)
