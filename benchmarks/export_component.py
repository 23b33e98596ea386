"""Export one component of a merged checkpoint, as `vlm-export onnx` does each of them.

python benchmarks/export_component.py CHECKPOINT language_model FOLDER/model.onnx [fp16]

A component of the captioner layout is looked for where the family has no other.

Prints the seconds of its two phases as JSON: what depends on the skeleton alone, and what moves weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vlm_export.cli import startup


def export(source: Path, name: str, target: Path, dtype: str) -> dict[str, float]:
    """Write `target`; returns the seconds of each phase."""
    from vlm_export.dtypes import DTYPES
    from vlm_export.graph.graph_cache import GraphCache
    from vlm_export.graph.graph_file import save_graph
    from vlm_export.quantize.variants import Source, Variant
    from vlm_export.source.checkpoint import open_checkpoint

    started = time.perf_counter()
    merged = open_checkpoint(source)
    cache = GraphCache(merged, "components" if "components" in merged.family.layouts else "captioner")
    component = next(component for component in cache.components if component.name == name)
    skeleton, _ = cache.find(component) or cache.trace(component)
    traced = time.perf_counter()
    variant = Variant(Source(component, skeleton, merged.tensors), DTYPES[dtype]).make()
    save_graph(variant, target)
    return {"structure_s": traced - started, "weights_s": time.perf_counter() - traced}


if __name__ == "__main__":
    startup.begin()  # as the command line does
    source, name, target, *dtype = sys.argv[1:]
    print(json.dumps(export(Path(source), name, Path(target), *(dtype or ["fp32"]))))
