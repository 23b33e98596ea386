"""Every limit that decides a verdict, by metric and dtype; an exception is a `tolerance` of the recipe, with a reason.

`at_most` limits hold for errors, `at_least` limits for rates. They are judgement. Measured on
shapes-captioner, the worst over all outputs: fp32 error 1.7e-6; lowest cosine 0.99999 in fp16, 0.998 in int8 and q8. On
SmolLM2-135M, whose activations have outliers as those of toys do not: lowest cosine of a row of text in int8 0.966; the
best token of English prose is PyTorch's at 96 and 95 % of the places in int8 and q8 (`benchmarks/quality.py`); captions
leave less to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_export.dtypes import DTYPES, FP32
from vlm_export.recipe import Tolerance
from vlm_export.targets import ClientTarget, Target


@dataclass(frozen=True)
class Limit:
    """`value <= limit` (an error) or `value >= limit` (a rate), and why, where a recipe made an exception."""

    limit: float
    at_most: bool
    reason: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value is within the limit; NaN never is."""
        return value <= self.limit if self.at_most else value >= self.limit


MAX_RELATIVE_ERROR = "max_relative_error"
COSINE_SIMILARITY = "cosine_similarity"
OTHER_SIZES = "max_relative_error_at_other_sizes"  # than the golden's, of any dynamic axis: see `other_sizes.py`
TOKENS_EXACT = "tokens_exact_rate"
TOKENS_TOGETHER = "tokens_together_as_alone_rate"  # of one graph that captions several pictures in a run
SEARCHED_EXACT = "searched_tokens_exact_rate"  # of one graph that searches with beams
TEXTS_EXACT = "texts_exact_rate"  # of one graph that gives texts: as the tokenizer makes them of its tokens
TOP1_AGREEMENT = "teacher_forced_top1_agreement"
FROM_FILE_EXACT = "tokens_exact_rate_from_image_file"
# What a dtype costs, reported and not judged: see `metrics.py`.
TEACHER_FORCED_KL, ROUGE_L = "teacher_forced_kl", "rouge_l"
TOKENS_AS_ORT = "tokens_as_onnxruntime_rate"  # of transformers.js in fewer bits than 32: on the same graph and pixels
LOGITS = "max_logits_difference"  # of transformers.js from ONNX Runtime, the same graph, pixels and tokens given
# What a client is fed: prompts whose ids are not PyTorch's, whether it stops elsewhere, and how far pixels are from
# PyTorch's on the average, in the units of the model; in transformers.js those of large parts of a picture, since it
# makes pictures smaller without smoothing. Noise of 240 pixels made 16 differs by 0.11 so, a slope of colours by 0.06;
# another crop, size or mean makes more.
PROMPT_IDS, ENDS = "prompts_that_differ", "ends_that_differ"
PIXELS, PIXELS_FROM_FILE = "mean_pixel_difference", "mean_pixel_difference_from_image_file"
PIXELS_IN_GRAPH = "largest_pixel_difference_in_graph"  # of a graph that prepares pictures, from Pillow's, of 255
PHOTOGRAPHS = "photographs_exact_rate"  # from files, of the package's photographs: see `from_files.py`
# Signs of a collapse, in any dtype and whatever the cosines are: see `collapse.py`.
DISTINCT_CAPTIONS, IMAGE_SWAP = "distinct_captions_rate", "image_swap_sensitivity"
LOOPING_CAPTIONS, EMPTY_CAPTIONS = "looping_captions_rate", "empty_captions_rate"
COLLAPSE = (IMAGE_SWAP, DISTINCT_CAPTIONS, LOOPING_CAPTIONS, EMPTY_CAPTIONS)
# A gap between two scores, as a share of the largest logit, that float32 sums in another order may turn round.
NEAR_TIE = 1e-4
# The same where two builds of ONNX Runtime run one graph, by dtype. With SmolLM2-135M, one build with and without some
# of its fusions makes scores that are apart by at most 2.5e-6 in q8, 2.6e-3 in fp16 and 3.6e-2 in int8, whose kernels
# round activations. Two scores may part.
NEAR_TIES_OF_BUILDS = {
    "fp32": NEAR_TIE,
    "fp16": 5e-3,
    "int8": 1e-2,
    "uint8": NEAR_TIE,
    "q8": NEAR_TIE,
    "q4": 1e-2,
    "q4f16": 1e-2,
    "bnb4": 1e-2,
    "q2": 1e-2,
    "q2f16": 1e-2,
}
# And at least on WebGPU, whose sines and cosines, those of positions, are right to 11 bits.
_NEAR_TIE_ON_WEBGPU = 1e-3
# How far the scores of transformers.js may be from ONNX Runtime's of the same graph, pixels and tokens, as a share of
# the largest. Measured, the worst of two images, of shapes-captioner and of SmolLM2-135M behind DINOv2-small: fp32,
# uint8 and q8 0 in Node, 1.5e-6 and 8.4e-6 in WASM, 1.6e-4 on WebGPU; fp16 5e-4 and 7.6e-3; kernels for packed
# weights, since each build rounds activations in a way of its own, 1.5e-2 and 5.8e-2, bnb4 7.1e-3 and 1.7e-2. Wrong
# attention, as WebGPU in software has where subgroups are of 4, made 0.11 in fp32 with not a token wrong.
_OF_SCORES = {
    "fp32": 1e-4,
    "fp16": 3e-2,
    "int8": 0.1,
    "uint8": 1e-4,
    "q8": 1e-4,
    "q4": 0.1,
    "q4f16": 0.1,
    "bnb4": 5e-2,
    "q2": 0.1,
    "q2f16": 0.1,
}
LOGITS_LIMITS: dict[ClientTarget, dict[str, float]] = {
    "node": _OF_SCORES,
    "wasm": _OF_SCORES,
    "webgpu": _OF_SCORES | dict.fromkeys(("fp32", "uint8", "q8"), 1e-3),
}

_AT_MOST = {
    MAX_RELATIVE_ERROR,
    OTHER_SIZES,
    LOGITS,
    PROMPT_IDS,
    ENDS,
    PIXELS,
    PIXELS_FROM_FILE,
    PIXELS_IN_GRAPH,
    LOOPING_CAPTIONS,
    EMPTY_CAPTIONS,
}
_OF_FILES = {PROMPT_IDS: 0.0, ENDS: 0.0, PIXELS: 1e-3, PIXELS_FROM_FILE: 0.3, PIXELS_IN_GRAPH: 2.0}
_OF_COLLAPSE = {
    # Below a third, most of what the image says is lost. Of shapes-captioner, 4 levels in all activations of the tower
    # leave 0.05, in its residuals 0.16; 4 levels in its last layer alone, with 15 of 20 captions exact, leave 0.74.
    # Of real-captioner, 4 levels leave 0.02, or less than 0 of the last layer alone. In int8 and q8 it is 1.00 of the
    # former, 0.99 and 0.98 of the latter.
    IMAGE_SWAP: 0.3,
    # One caption for all images leaves 0.5 of two images, and less of more. A few captions that become equal are no
    # collapse: how many may differ from PyTorch's is what the rate of exact ones limits.
    DISTINCT_CAPTIONS: 0.6,
    # Some image may lie where PyTorch itself is close to a loop or to the end; more than one in ten is no accident.
    LOOPING_CAPTIONS: 0.1,
    EMPTY_CAPTIONS: 0.1,
}
_OF_ANY_DTYPE = {**_OF_FILES, **_OF_COLLAPSE, TEXTS_EXACT: 1.0}
# What 4 bits cost is reported, and decided by what they do to captions alone; what 2 bits cost decides nothing but
# whether the model has collapsed.
_LIMITS = {
    MAX_RELATIVE_ERROR: {"fp32": 1e-4},
    OTHER_SIZES: {"fp32": 1e-4},
    COSINE_SIMILARITY: {"fp16": 0.999, "int8": 0.9, "uint8": 0.9, "q8": 0.9},
    TOKENS_EXACT: {"fp32": 1.0, "fp16": 0.95, "int8": 0.85, "uint8": 0.85, "q8": 0.85},
    SEARCHED_EXACT: {"fp32": 1.0, "fp16": 0.95, "int8": 0.85, "uint8": 0.85, "q8": 0.85},
    TOKENS_TOGETHER: {"fp32": 1.0},
    TOKENS_AS_ORT: {name: 1.0 for name in DTYPES if name != FP32.name},
    TOP1_AGREEMENT: {
        "fp32": 1.0,
        "fp16": 0.99,
        "int8": 0.97,
        "uint8": 0.97,
        "q8": 0.97,
        "q4": 0.9,
        "q4f16": 0.9,
        "bnb4": 0.85,
    },
}


def limit_for(
    metric: str, dtypes: Sequence[str], tolerances: tuple[Tolerance, ...] = (), target: Target = "ort"
) -> Limit | None:
    """The limit in force in a runtime, or None where a metric is reported but decides nothing.

    Of several `dtypes`, one for each component, it is the widest of theirs.
    """
    limits = [_limit_for(metric, dtype, tolerances, target) for dtype in dtypes]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return None
    return (max if metric in _AT_MOST else min)(known, key=lambda limit: limit.limit)


def near_tie(dtypes: Sequence[str], target: Target) -> float:
    """The gap of two scores, as a share of the largest, that a runtime may turn round: of several dtypes the widest."""
    if target == "ort":
        return NEAR_TIE
    least = _NEAR_TIE_ON_WEBGPU if target == "webgpu" else NEAR_TIE
    return max(least, *(NEAR_TIES_OF_BUILDS[dtype] for dtype in dtypes))


def _limit_for(metric: str, dtype: str, tolerances: tuple[Tolerance, ...], target: Target) -> Limit | None:
    for tolerance in tolerances:
        if (tolerance.metric, tolerance.dtype) == (metric, dtype):
            return Limit(tolerance.limit, metric in _AT_MOST, tolerance.reason)
    by_dtype = LOGITS_LIMITS[target] if metric == LOGITS and target != "ort" else _LIMITS.get(metric, {})
    value = _OF_ANY_DTYPE.get(metric, by_dtype.get(dtype))
    return None if value is None else Limit(value, metric in _AT_MOST)


def metrics() -> list[str]:
    """Names that a recipe's tolerance may give."""
    return sorted([*_LIMITS, LOGITS])
