"""Stock transformers.js, in any runtime: what it is fed, the scores that it makes of it, and the tokens it takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vlm_export.atomic import scratch_folder
from vlm_export.dtypes import DTYPES, FP32
from vlm_export.errors import CheckFailed
from vlm_export.runtime.images import open_image
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays
from vlm_export.targets import ClientTarget
from vlm_export.verify import in_ort, limits
from vlm_export.verify.client_inputs import peculiarity
from vlm_export.verify.from_files import Photograph, add_golden_images, add_photographs
from vlm_export.verify.golden_sessions import as_fed
from vlm_export.verify.in_files import check_ends, check_pixels, check_prompts, has_prompt
from vlm_export.verify.metrics import first_difference, largest_difference
from vlm_export.verify.report import RUNS
from vlm_export.verify.tokens import add_rate, add_searched, add_tokens
from vlm_export.verify.verification import Verification
from vlm_export.wanted import MIXED
from vlm_export.web.captions import Caption, Captions, Item, NoAnswer, client_of
from vlm_export.web.runtimes import Runtime

_SCORED_IMAGES = 2  # the golden images whose scores are compared, a vocabulary for each token


def verify_in_client(
    run: Verification,
    runtime: Runtime,
    dtype: str,
    golden_inputs: Sequence[Arrays],
    photographs: Sequence[Photograph] = (),
) -> None:
    """Tokens and scores from the same pixels, which must be those of ONNX Runtime; from the image files, reported.

    Where there are photographs, the pixels that the client makes of files are reported too.
    """
    target, count = runtime.target, len(golden_inputs)
    if reason := cannot_run(run, runtime, dtype):
        run.leave_out("all", dtype, target, RUNS, reason)
        return
    try:
        made = _caption(run, runtime, dtype, golden_inputs, [picture.path for picture in photographs])
        searched = _search(run, runtime, dtype, golden_inputs) if run.golden.facts.search else []
    except CheckFailed as error:
        if isinstance(error, NoAnswer) and runtime.is_software:
            run.leave_out("all", dtype, target, RUNS, f"too slow in software: {error}")
            return
        run.fail("all", dtype, target, RUNS, str(error))
        return
    run.versions |= {f"{target}: {name}": number for name, number in {**made.versions, **runtime.versions}.items()}
    same, from_file, of_photographs = (
        made.captions[:count],
        made.captions[count : 2 * count],
        made.captions[2 * count :],
    )
    check_ends(run, dtype, target, made.eos_token_ids)
    if has_prompt(open_repo(run.repo)):
        check_prompts(run, dtype, target, [caption.prompt_ids for caption in same], golden_inputs)
    pixels = [caption.pixel_values for caption in from_file]
    check_pixels(run, dtype, target, limits.PIXELS_FROM_FILE, pixels, golden_inputs)
    add_tokens(run, dtype, target, limits.TOKENS_EXACT, [caption.token_ids for caption in same])
    if searched:
        add_searched(run, dtype, target, searched)
    _check_as_in_ort(run, dtype, target, same, golden_inputs)
    add_tokens(run, dtype, target, limits.FROM_FILE_EXACT, [caption.token_ids for caption in from_file])
    for image, caption in zip(run.golden.facts.images, from_file, strict=True):
        if caption.failure and not peculiarity(run.golden.path / "images" / image.file):
            run.fail("all", dtype, target, RUNS, f"{image.file}: {caption.failure}")
    if photographs:
        add_golden_images(run, target, dtype, from_file, golden_inputs)
        with suppress(*GRAPH_ERRORS, FloatingPointError):  # of which the checks in ONNX Runtime say more
            add_photographs(run, target, dtype, of_photographs, photographs)


def cannot_run(run: Verification, runtime: Runtime, dtype: str) -> str:
    """Why graphs of a dtype cannot run in a runtime, whatever is in them; or nothing."""
    halves = any(DTYPES[name].arithmetic == "float16" for name in run.dtypes_of(dtype))
    return runtime.no_float16 if halves else ""


def _caption(
    run: Verification, runtime: Runtime, dtype: str, golden_inputs: Sequence[Arrays], photographs: Sequence[Path]
) -> Captions:
    """Caption each golden image from PyTorch's pixels, then each from its file, then the photographs from theirs.

    Raises:
        CheckFailed: the model does not load or run there.
    """
    paths = [*run.golden.image_paths(), *photographs]
    with scratch_folder() as scratch:
        items = _from_pixels(run, golden_inputs, Path(scratch))
        items += [Item(path, prompt=_prompt(run), may_fail=True, keep_pixels=True) for path in paths]
        greedy = {"num_beams": 1} if run.golden.facts.search else {}
        return _run(run, runtime, dtype, items, greedy, counted=1)


def _search(run: Verification, runtime: Runtime, dtype: str, golden_inputs: Sequence[Arrays]) -> list[tuple[int, ...]]:
    """The tokens that a graph's own search finds, of each golden image's pixels.

    Raises:
        CheckFailed: the model does not load or run there.
    """
    with scratch_folder() as scratch:
        made = _run(run, runtime, dtype, _from_pixels(run, golden_inputs, Path(scratch)), {})
    return [caption.token_ids for caption in made.captions]


def _prompt(run: Verification) -> str | list[dict[str, Any]]:
    """What the client is asked about each picture."""
    facts = run.golden.facts
    return facts.conversation or run.layout.client.prompt(facts.text)


def _from_pixels(run: Verification, golden_inputs: Sequence[Arrays], scratch: Path) -> list[Item]:
    """An item of PyTorch's pixels for each golden image; files that are made for them go into the folder."""
    paths = run.golden.image_paths()
    fed = [as_fed(inputs, run.steps)["pixel_values"] for inputs in golden_inputs]
    sizes = [picture_size(run.repo, *pair) for pair in zip(golden_inputs, paths, strict=True)]
    return [
        Item(_readable(path, scratch), pixels, _prompt(run), keep_scores=place < _SCORED_IMAGES, size=size)
        for place, (path, pixels, size) in enumerate(zip(paths, fed, sizes, strict=True))
    ]


def _run(
    run: Verification, runtime: Runtime, dtype: str, items: Sequence[Item], generation: dict[str, Any], counted: int = 0
) -> Captions:
    """Let the client run the items; each counts as so many captions of those that `verify` said it makes."""
    client = run.layout.client
    assert client.node is not None
    what = f"{dtype}: {client_of(client.node)}, {runtime.target}"

    def on_item(_: Caption) -> None:
        run.tell(what, captions=counted)

    run.tell(what)
    taken = "auto" if dtype == MIXED else dtype  # the repo's own config.json says which each component has
    return runtime.caption(
        run.repo, layout=client.node, dtype=taken, items=items, generation=generation, on_item=on_item
    )


def picture_size(repo: Path, inputs: Arrays, path: Path) -> tuple[int, int] | None:
    """Height and width in pixels of a picture of which this repo's client makes patches that lie as those of `inputs`.

    None where no pixels are patches. A picture of several tiles, in `path`, is cut as its own size says.
    """
    settings = open_repo(repo).preprocessor
    if "image_grid_thw" in inputs:
        [[_, rows, columns]], patch = inputs["image_grid_thw"].tolist(), settings["patch_size"]
        return rows * patch, columns * patch
    if "spatial_shapes" not in inputs:
        return None
    if len(inputs["spatial_shapes"]) > 1:
        image = open_image(path)
        return image.height, image.width
    [[rows, columns]], patch = inputs["spatial_shapes"].tolist(), settings.get("encoder_patch_size", 16)
    return rows * patch, columns * patch


def _readable(path: Path, scratch: Path) -> Path:
    """A picture of the same size that any client can read: beside pixels nothing else of it counts."""
    if not peculiarity(path):
        return path
    copy = scratch / f"{path.name}.png"
    open_image(path).save(copy)
    return copy


def _check_as_in_ort(
    run: Verification, dtype: str, target: ClientTarget, captions: Sequence[Caption], golden_inputs: Sequence[Arrays]
) -> None:
    """Scores and tokens are those that ONNX Runtime makes of the same graphs and pixels.

    Of tokens, float32's have been compared with PyTorch's; where those leave room for what fewer bits cost, another
    client could hide.
    """
    try:
        _check_scores(run, dtype, target, captions, golden_inputs)
        if dtype != FP32.name:
            _check_tokens(run, dtype, target, [caption.token_ids for caption in captions], golden_inputs)
    except (*GRAPH_ERRORS, FloatingPointError) as error:
        run.fail("all", dtype, target, limits.TOKENS_AS_ORT, f"ONNX Runtime: {' '.join(str(error).split())}")


def _check_scores(
    run: Verification, dtype: str, target: ClientTarget, captions: Sequence[Caption], golden_inputs: Sequence[Arrays]
) -> None:
    """Check the step whose scores are farthest from those of ONNX Runtime behind the same tokens."""
    found = [caption.scores for caption in captions if caption.scores is not None]
    scored = len(found)
    tokens = [caption.token_ids for caption in captions[:scored]]
    expected = in_ort.scores(run, dtype, golden_inputs[:scored], tokens)
    differences = {
        f"{image.file}, token {step + 1}": largest_difference(own, theirs)
        for image, *pair in zip(run.golden.facts.images[:scored], found, expected, strict=True)
        for step, (own, theirs) in enumerate(zip(*pair, strict=True))
    }
    worst = max(differences, key=lambda where: (np.isnan(differences[where]), differences[where]))
    detail = f"{worst}, of {len(differences)} tokens of {scored} images"
    run.add("all", dtype, target, limits.LOGITS, differences[worst], detail)


def _check_tokens(
    run: Verification,
    dtype: str,
    target: ClientTarget,
    tokens: Sequence[Sequence[int]],
    golden_inputs: Sequence[Arrays],
) -> None:
    """Check that the tokens are ONNX Runtime's, but for two scores that are near."""
    expected = in_ort.generated(run, dtype, golden_inputs)
    near: list[str] = []
    different: list[str] = []
    tie = limits.near_tie(run.dtypes_of(dtype), target)
    for image, found, own, inputs in zip(run.golden.facts.images, tokens, expected, golden_inputs, strict=True):
        place = first_difference(found, own)
        if place is None:
            continue
        is_near = place < min(len(found), len(own)) and (
            in_ort.gap(run, dtype, inputs, own[:place], found[place]) < tie
        )
        (near if is_near else different).append(f"{image.file} from token {place + 1}")
    add_rate(run, dtype, target, limits.TOKENS_AS_ORT, len(tokens), near, different)
