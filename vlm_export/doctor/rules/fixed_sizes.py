"""Contract §2, §14.3: batch and length are free; a size that tracing wrote into a graph holds for that size alone."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error, warning
from vlm_export.doctor.repo_view import RepoView, dimensions

# By input, the axis along which it grows from step to step, and the one along which there may be several.
_LENGTH = {"input_ids": 1, "inputs_embeds": 1, "attention_mask": 1, "position_ids": -1}
_BATCH = dict.fromkeys(("input_ids", "inputs_embeds", "attention_mask", "encoder_hidden_states", "pixel_values"), 0)


def check(repo: RepoView) -> Iterator[Finding]:
    """Find fixed lengths, with which no text can be generated, and fixed batches, with which one at a time can."""
    for graph, _ in repo.loaded():
        for name, value in graph.inputs.items():
            axes = dimensions(value)
            for free, found in ((_LENGTH, error), (_BATCH, warning)):
                if axes and name in free and len(axes) > free[name] and isinstance(axes[free[name]], int):
                    problem = f"axis {free[name] % len(axes)} of {name} is fixed at {axes[free[name]]}: {axes}"
                    yield found(graph.file, problem, "export with that axis dynamic, under a name")
