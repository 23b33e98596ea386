"""Stock transformers.js in Node: what it is fed, and the tokens that it makes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlm_export.dtypes import FP32
from vlm_export.errors import CheckFailed
from vlm_export.runtime.images import open_image
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays
from vlm_export.verify import in_ort, limits
from vlm_export.verify.client_inputs import peculiarity
from vlm_export.verify.golden_sessions import as_fed
from vlm_export.verify.in_files import check_ends, check_pixels, check_prompts, has_prompt
from vlm_export.verify.metrics import first_difference
from vlm_export.verify.report import RUNS
from vlm_export.verify.tokens import add_rate, add_tokens
from vlm_export.verify.verification import Verification
from vlm_export.wanted import MIXED
from vlm_export.web import node_runtime


def _readable(path: Path, scratch: Path) -> Path:
    """A picture of the same size that any client can read: beside pixels nothing else of it counts."""
    if not peculiarity(path):
        return path
    copy = scratch / f"{path.name}.png"
    open_image(path).save(copy)
    return copy


def verify_in_node(run: Verification, dtype: str, golden_inputs: Sequence[Arrays]) -> None:
    """Stock transformers.js: tokens from the same pixels, which must be equal, and from the image files, reported."""
    run.progress(f"{dtype}: tokens in transformers.js")
    client, paths = run.layout.client, run.golden.image_paths()
    assert client.node is not None
    facts = run.golden.facts
    prompt = facts.conversation or client.prompt(facts.text)
    from_files = [node_runtime.Item(path, prompt=prompt, may_fail=True, keep_pixels=True) for path in paths]
    try:
        with tempfile.TemporaryDirectory(prefix="vlm-export-") as scratch:
            readable = [_readable(path, Path(scratch)) for path in paths]
            fed = [as_fed(inputs, run.steps)["pixel_values"] for inputs in golden_inputs]
            same = [node_runtime.Item(path, pixels, prompt) for path, pixels in zip(readable, fed, strict=True)]
            items = [*same, *from_files]
            taken = "auto" if dtype == MIXED else dtype  # the repo's own config.json says which each component has
            result = node_runtime.caption(run.repo, layout=client.node, dtype=taken, items=items, generation={})
    except CheckFailed as error:
        run.fail("all", dtype, "node", RUNS, str(error))
        return
    run.versions |= {f"node: {name}": number for name, number in result.versions.items()}
    tokens = [list(caption.token_ids) for caption in result.captions]
    from_file = result.captions[len(same) :]
    check_ends(run, dtype, "node", result.eos_token_ids)
    if has_prompt(open_repo(run.repo)):
        check_prompts(
            run, dtype, "node", [caption.prompt_ids for caption in result.captions[: len(same)]], golden_inputs
        )
    pixels = [caption.pixel_values for caption in from_file]
    check_pixels(run, dtype, "node", limits.PIXELS_FROM_FILE, pixels, golden_inputs)
    add_tokens(run, dtype, "node", limits.TOKENS_EXACT, tokens[: len(same)])
    if dtype != FP32.name:  # where the golden tokens leave room for what fewer bits cost, another client could hide
        _check_as_in_ort(run, dtype, tokens[: len(same)], golden_inputs)
    add_tokens(run, dtype, "node", limits.FROM_FILE_EXACT, tokens[len(same) :])
    failures = {image.file: caption.failure for image, caption in zip(facts.images, from_file, strict=True)}
    for file, failure in failures.items():
        if failure and not peculiarity(run.golden.path / "images" / file):
            run.fail("all", dtype, "node", RUNS, f"{file}: {failure}")


def _check_as_in_ort(
    run: Verification, dtype: str, tokens: Sequence[Sequence[int]], golden_inputs: Sequence[Arrays]
) -> None:
    """The tokens are those that ONNX Runtime makes of the same graphs and pixels, but for two scores that are near."""
    try:
        expected = in_ort.generated(run, dtype, golden_inputs)
    except (*GRAPH_ERRORS, FloatingPointError) as error:
        run.fail("all", dtype, "node", limits.TOKENS_AS_ORT, f"ONNX Runtime: {' '.join(str(error).split())}")
        return
    near: list[str] = []
    different: list[str] = []
    for image, found, own, inputs in zip(run.golden.facts.images, tokens, expected, golden_inputs, strict=True):
        place = first_difference(found, own)
        if place is None:
            continue
        is_near = place < min(len(found), len(own)) and (
            in_ort.gap(run, dtype, inputs, own[:place], found[place]) < limits.near_tie_of_builds(run.dtypes_of(dtype))
        )
        (near if is_near else different).append(f"{image.file} from token {place + 1}")
    add_rate(run, dtype, "node", limits.TOKENS_AS_ORT, len(tokens), near, different)
