"""What is made of a prompt and a picture before any graph runs: ids, pixels, and the ids that end a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.runtime.images import ImageProcessor
from vlm_export.runtime.repo import Repo, open_repo
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.client_inputs import OwnFiles, coarse, ids_difference, peculiarity, pixel_difference
from vlm_export.verify.pixels_in_graph import PixelsInGraph
from vlm_export.verify.report import RUNS
from vlm_export.verify.verification import Verification


def check_own_files(run: Verification, dtype: str, golden_inputs: Sequence[Arrays]) -> None:
    """Prompt ids, pixels and ends that this package's runtime makes of the repo's files, which all dtypes share."""
    repo = open_repo(run.repo)
    own, facts, paths = OwnFiles(repo), run.golden.facts, run.golden.image_paths()
    check_ends(run, dtype, "ort", repo.generation.get("eos_token_id"))
    if has_prompt(repo):
        pairs = zip(paths, golden_inputs, strict=True)
        ids = [own.prompt_ids(facts, inputs, path) for path, inputs in pairs]
        check_prompts(run, dtype, "ort", ids, golden_inputs)
    check_pixels(run, dtype, "ort", limits.PIXELS, [own.pixels(path) for path in paths], golden_inputs)
    if run.pixels is not None:
        check_pixels_in_graph(run, dtype, run.pixels)


def check_pixels_in_graph(run: Verification, dtype: str, pixels: PixelsInGraph) -> None:
    """Check that a graph which prepares pictures itself makes Pillow's pixels of them, in any size."""
    try:
        found = dict(entry for path in run.golden.image_paths()[:_PICTURES] for entry in pixels.differences(path))
    except GRAPH_ERRORS as error:
        run.fail(pixels.graph.stem, dtype, "ort", RUNS, f"ONNX Runtime: {' '.join(str(error).split())}")
        return
    worst = max(found, key=lambda name: found[name])
    detail = f"{worst}, of {len(found)} pictures"
    run.add(pixels.graph.stem, dtype, "ort", limits.PIXELS_IN_GRAPH, found[worst], detail)


_PICTURES = 3  # in several sizes each


def has_prompt(repo: Repo) -> bool:
    """Whether the model reads a conversation, image tokens included, or a task, and not a text behind an image."""
    return repo.takes_prompt and not repo.has_prefix


def _other_sizes(found: np.ndarray | None, expected: np.ndarray) -> bool:
    """Whether a client made a picture of another size, or, of patches, tiles of other numbers of them."""
    if found is None or found.shape != expected.shape:
        return found is not None
    return bool((found.any(axis=-1) != expected.any(axis=-1)).any())  # patches of zeros pad a tile


def check_ends(run: Verification, dtype: str, runtime: Target, found: int | Sequence[int] | None) -> None:
    """Check that the ids which end a text are PyTorch's; `found` is what the client has, one id or several."""
    ids = [found] if isinstance(found, int) else list(found or ())
    expected = run.golden.facts.eos_token_ids
    detail = "" if set(ids) == set(expected) else f"stops at {ids}, PyTorch at {expected}"
    run.add("files", dtype, runtime, limits.ENDS, float(bool(detail)), detail)


def check_prompts(
    run: Verification, dtype: str, runtime: Target, found: Sequence[Sequence[int]], golden_inputs: Sequence[Arrays]
) -> None:
    """Check that the client makes PyTorch's ids of each prompt: `found` and `golden_inputs` in the order of images."""
    pairs = zip(run.golden.facts.images, found, golden_inputs, strict=True)
    differences = {
        image.file: difference
        for image, ids, inputs in pairs
        if (difference := ids_difference(ids, inputs["input_ids"][0].tolist()))
    }
    detail = "; ".join(f"{file} {difference}" for file, difference in list(differences.items())[:2])
    run.add("files", dtype, runtime, limits.PROMPT_IDS, float(len(differences)), detail)


def check_pixels(
    run: Verification,
    dtype: str,
    runtime: Target,
    metric: str,
    found: Sequence[np.ndarray | None],
    golden_inputs: Sequence[Arrays],
) -> None:
    """Check the picture whose pixels are farthest off.

    Those that a client cannot read, or reads otherwise by their kind, are named and not judged; so are those of which
    it makes a picture of another size, where sizes follow from the picture: JavaScript rounds halves up, Python to
    even numbers.
    """
    made = [run.made_pixels(pixels) for pixels in found]
    pairs = [(pixels, inputs["pixel_values"]) for pixels, inputs in zip(made, golden_inputs, strict=True)]
    if metric == limits.PIXELS_FROM_FILE:
        values = [pixel_difference(coarse(pixels), coarse(expected)) for pixels, expected in pairs]
    else:
        values = [pixel_difference(pixels, expected) for pixels, expected in pairs]
    odd = {path.name: kind for path in run.golden.image_paths() if (kind := peculiarity(path))}
    if runtime != "ort" and ImageProcessor(open_repo(run.repo).preprocessor).kind.own_sizes:
        images = zip(run.golden.facts.images, pairs, strict=True)
        odd |= {image.file: "made of another size" for image, pair in images if _other_sizes(*pair)}
    judged = {
        image.file: value
        for image, value in zip(run.golden.facts.images, values, strict=True)
        if runtime == "ort" or image.file not in odd
    }
    worst = max(judged, key=lambda file: judged[file], default="")
    detail = f"{worst}, of {len(judged)} pictures" if worst else "no picture that all decoders read alike"
    if runtime != "ort" and odd:
        detail += f"; not judged: {', '.join(f'{file} ({kind})' for file, kind in odd.items())}"
    run.add("files", dtype, runtime, metric, judged.get(worst, 0.0), detail)
