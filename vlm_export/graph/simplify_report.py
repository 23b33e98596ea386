"""The report of how a skeleton was made, which is kept beside the skeleton.

It is not in `simplify.py`, so that an export that finds a skeleton in the graph cache imports nothing that simplifies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ONNXSIM_RAN = "applied"  # `onnxsim` of a report; anything else there says why it did not


@dataclass(frozen=True)
class SimplifyReport:
    """What was done to one graph: node counts, how often each rewrite applied, and whether onnxsim ran.

    `nodes_before` are the traced ones, `nodes_after` the finished graph's. `fused` counts ONNX Runtime's own operators
    in it; `unfused_attention` and `unfused_rotary` say why attention and rotary embedding are none of them, if so.
    `repeated` says by stack how many layers were added to the two that were traced, `not_repeated` why another stack
    was traced whole.
    """

    nodes_before: int
    nodes_after: int
    rewrites: dict[str, int]
    fused: dict[str, int]
    unfused_attention: str
    onnxsim: str
    unfused_rotary: str = ""
    repeated: dict[str, int] = field(default_factory=dict)
    not_repeated: dict[str, str] = field(default_factory=dict)
