"""What a failed verification most likely means, and what can be done: words for a report that holds numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm_export.commands import Commands
from vlm_export.dtypes import DTYPES, FP32
from vlm_export.verify.limits import (
    COLLAPSE,
    DISTINCT_CAPTIONS,
    EMPTY_CAPTIONS,
    ENDS,
    FROM_FILE_EXACT,
    IMAGE_SWAP,
    LOGITS,
    LOOPING_CAPTIONS,
    OTHER_SIZES,
    PIXELS,
    PIXELS_FROM_FILE,
    PROMPT_IDS,
    SEARCHED_EXACT,
    TOKENS_AS_ORT,
    TOKENS_EXACT,
    TOP1_AGREEMENT,
)
from vlm_export.verify.report import LOADS, RUNS, SATURATION, SHAPE, SIGNATURE, Check, Report
from vlm_export.wanted import MIXED

_OF_FILES = {
    PROMPT_IDS: "the repo's tokenizer or chat template makes other prompt ids than PyTorch was fed",
    ENDS: "the repo's generation_config.json ends texts elsewhere than the model does",
    PIXELS: "the repo's preprocessor_config.json makes other pixels than PyTorch was fed",
    PIXELS_FROM_FILE: "the client makes other pixels of the pictures: it reads a setting of theirs otherwise",
}
_OF_COLLAPSE = {
    IMAGE_SWAP: "its tokens hardly depend on the image",
    DISTINCT_CAPTIONS: "it says the same of different images",
    LOOPING_CAPTIONS: "it says the same words again and again",
    EMPTY_CAPTIONS: "it says nothing of images",
}
_OF_TOKENS = (TOKENS_EXACT, SEARCHED_EXACT, TOP1_AGREEMENT, FROM_FILE_EXACT, LOGITS, *COLLAPSE)


def explain(report: Report, commands: Commands, mixed: Mapping[str, str] | None = None) -> list[str]:
    """For each dtype that failed a line with the likely cause, then one that says how to publish without them.

    `commands` are the recipe's, `mixed` is the manifest's.
    """
    failed = report.failed_dtypes
    if not failed:
        return []
    lines = [f"{dtype}: {cause(report, dtype)}{_captions(report, dtype)}" for dtype in failed]
    without = publishable(report, commands, mixed or {})
    if not without:
        return [*lines, "nothing can be published before fp32 passes"]
    return [*lines, f"to publish without {', '.join(failed)}: {', then '.join(f'`{line}`' for line in without)}"]


def publishable(report: Report, commands: Commands, mixed: Mapping[str, str]) -> list[str]:
    """The commands that leave out the dtypes that failed, of a recipe; none if float32 is among them."""
    left = passed(report)
    if FP32.name in report.failed_dtypes:
        return []
    wanted = [dtype for dtype in left if dtype != MIXED] or [FP32.name]
    if MIXED in left:
        wanted.append(",".join(f"{component}={dtype}" for component, dtype in mixed.items()))
    return [commands.onnx(wanted), commands.verify()]


def passed(report: Report) -> list[str]:
    """The dtypes that passed, in the order of the checks."""
    return [dtype for dtype in report.verified_dtypes if dtype not in report.failed_dtypes]


def cause(report: Report, dtype: str) -> str:
    """In words, what most likely made a dtype fail, and what can be done."""
    failures = [check for check in report.failures if check.dtype == dtype]
    metrics = {check.metric for check in failures}
    for metric, words in _OF_FILES.items():
        if metric in metrics:
            return words
    if metrics & {LOADS, RUNS}:
        return _does_not_run(report, [check for check in failures if check.metric in (LOADS, RUNS)])
    if metrics & {SIGNATURE, SHAPE}:
        return "a graph has other inputs or outputs than the model family declares: it was made or edited elsewhere"
    if metrics == {OTHER_SIZES}:
        return f"a graph kept a size that its tracer saw, or counts padding: {_where(failures)}; please report it"
    if SATURATION in metrics:
        return "integer products saturate on processors without VNNI: quantize the weights to 7 bits or as unsigned"
    asked_ort = "ort" in report.runtimes or metrics & {TOKENS_AS_ORT, LOGITS}
    if asked_ort and all(check.runtime != "ort" for check in failures):
        return _of_clients(report, failures)
    if dtype == FP32.name and metrics <= {SEARCHED_EXACT}:
        return "it is right token by token, and its search with beams finds other texts than PyTorch's"
    if dtype == FP32.name:
        return f"{_where(failures)} computes something else than PyTorch: a fault of the export; please report it"
    if FP32.name in report.failed_dtypes:
        return "it is made from fp32, which failed: mend that first"
    if any(math.isnan(check.value) for check in failures):
        return f"{_where(failures)} is not finite: {_too_large(dtype)}"
    if metrics & set(COLLAPSE):
        return _collapse(report, failures)
    if metrics <= set(_OF_TOKENS):
        return (
            "every output is close to PyTorch's and yet other tokens are chosen: the dtype is too coarse for the model"
        )
    return f"{_where(failures)} is far from PyTorch's: the dtype is too coarse for its weights"


def _does_not_run(report: Report, failures: Sequence[Check]) -> str:
    """Why graphs most likely do not load or run: the file, where ONNX Runtime itself says so, else what runs it."""
    wrong = list(dict.fromkeys(check.runtime for check in failures))
    if "ort" in wrong:
        return "a graph does not run: its file is damaged, or this ONNX Runtime lacks an operator that it needs"
    lacks = f"does not run in {', '.join(wrong)}, where an operator that a graph needs may be missing, or memory"
    if "ort" in report.runtimes:
        return f"it runs in ONNX Runtime and {lacks}"
    return f"it {lacks}; whether its file is damaged, `verify --runtime ort` tells"


def _of_clients(report: Report, failures: Sequence[Check]) -> str:
    """What most likely differs where ONNX Runtime is right and the client is not."""
    wrong = list(dict.fromkeys(check.runtime for check in failures))
    right = [runtime for runtime in report.runtimes if runtime not in ("ort", *wrong)]
    reason = "its processor, tokenizer or end tokens differ"
    if right:
        reason = f"kernels there compute something else, since {', '.join(right)} is right"
    elif LOGITS in {check.metric for check in failures}:
        reason = "it makes other scores of the same pixels: rules of generation, or kernels, differ"
    client = "its other builds" if report.layout == "single" else "transformers.js"
    return f"right in ONNX Runtime, wrong in {client} ({', '.join(wrong)}): {reason}"


def _collapse(report: Report, failures: Sequence[Check]) -> str:
    """What collapsed, by its signs; the first output that is far from PyTorch's, if one is; what to take instead."""
    metrics = {check.metric for check in failures}
    signs = " and ".join(words for metric, words in _OF_COLLAPSE.items() if metric in metrics)
    begins = "" if metrics <= set(_OF_TOKENS) else f"; it begins at {_where(failures)}"
    return f"it has collapsed: {signs}{begins}; take another dtype: {', '.join(passed(report))}"


def _too_large(dtype: str) -> str:
    """Why numbers are too large, and what can be done, by what the dtype computes in."""
    own = DTYPES.get(dtype)
    if own is None or own.arithmetic == "float32":
        return "numbers are too large for the dtype"
    twin = next(other.name for other in DTYPES.values() if other == replace(own, name=other.name, arithmetic="float32"))
    return (
        "it passes 65504, where float16 ends, on inputs that were not measured: name fewer golden.images, such ones "
        f"among them, and export again; or publish {twin}, which is the same in float32"
    )


def _where(failures: Sequence[Check]) -> str:
    """The first output that differs, of which the others may be consequences."""
    first = next((check for check in failures if check.metric not in _OF_TOKENS), failures[0])
    return f"{first.component}, {first.detail}" if first.detail else first.component


def _captions(report: Report, dtype: str) -> str:
    rates = [check for check in report.checks if (check.dtype, check.metric) == (dtype, TOKENS_EXACT)]
    return "".join(f"; captions in {check.runtime}: {check.detail.partition(';')[0]} as PyTorch's" for check in rates)
