"""Contract §2: a decoder continues a text. A graph of pixels to logits is one forward pass, and answers for the image.

Such a graph predicts at the image's own positions: its tokens are no caption, whatever loop is put around it.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm_export.doctor.findings import Finding, error
from vlm_export.doctor.repo_view import RepoView, dimensions, integer
from vlm_export.graph.signature import VISION_LOGITS

_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "encoder_hidden_states")


def check(repo: RepoView) -> Iterator[Finding]:
    """Find graphs that take pixels, take no text, and give logits over the model's vocabulary."""
    sizes = {integer(part.get("vocab_size")) for part in (repo.text_config, repo.config)} - {None}
    for graph in repo.graphs:
        logits = graph.outputs.get("logits")
        axes = dimensions(logits) if logits is not None else None
        takes_text = any(name in _TEXT or name.startswith("past_") for name in graph.inputs)
        if "pixel_values" not in graph.inputs or takes_text or axes is None or len(axes) != 3:
            continue
        if axes[2] in sizes or list(graph.outputs) == ["logits"]:
            yield error(
                graph.file,
                f"logits {axes}{VISION_LOGITS.format(count=axes[1])}",
                "export an encoder of the image and a decoder with a cache as two graphs: vlm-export onnx does",
            )
