"""Compare an exported repo with the golden PyTorch outputs, and decide.

For every dtype: the graphs' inputs and outputs against the family's declaration; every output and every `present.*` in
prefill and decode, for each golden case; then the generated tokens of every golden image, through ONNX Runtime here and
through stock transformers.js in Node. A report holds every check with its value and limit; no checks is not a pass.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from vlm_export.dtypes import DTYPES, FP32
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import file_hashes, read_json, sha256
from vlm_export.graph import signature
from vlm_export.manifest import ONNX, Manifest, load_manifest
from vlm_export.quantize import saturation
from vlm_export.recipe import Tolerance
from vlm_export.runtime import logits
from vlm_export.runtime.drivers import Driver, driver_for, with_encoded
from vlm_export.runtime.generate import Decoder, generate
from vlm_export.runtime.images import open_image
from vlm_export.runtime.options import Options, Plan, plan
from vlm_export.runtime.repo import Repo, open_repo
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, DecoderRun, Sessions
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.spec.family import Feeder, Layout
from vlm_export.spec.graph import Component
from vlm_export.verify import limits
from vlm_export.verify.client_inputs import OwnFiles, coarse, ids_difference, peculiarity, pixel_difference
from vlm_export.verify.golden import GoldenCase, GoldenFolder, array_sha256
from vlm_export.verify.metrics import agreement, cosine_similarity, first_difference, max_relative_error
from vlm_export.web import node_runtime

Runtime = Literal["ort", "node"]
RUNTIMES: tuple[Runtime, ...] = ("ort", "node")
# Metrics of checks that need no tolerance: a graph is as it should be, or it is not.
LOADS, RUNS, SHAPE, SIGNATURE, SATURATION = "loads", "runs", "shape", "signature", "largest_pair_of_integer_weights"


@dataclass(frozen=True)
class Check:
    """One comparison.

    `verdict` is pass, fail, reported (no limit applies), or near-tie: tokens that differ where two scores are equal to
    rounding, which passes.
    """

    component: str
    dtype: str
    runtime: str
    metric: str
    value: float
    limit: float | None
    verdict: Literal["pass", "fail", "near-tie", "reported"]
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """`report.json`."""

    recipe: str
    layout: str
    verdict: Literal["pass", "fail"]
    runtimes: list[str]
    checks: list[Check]
    graphs_sha256: dict[str, str]
    files_sha256: dict[str, str]
    golden_inputs_sha256: dict[str, str]
    versions: dict[str, str]
    schema: int = 1

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == "fail"]

    @property
    def failed_dtypes(self) -> list[str]:
        """Those with a check that failed, in the order of the checks."""
        return list(dict.fromkeys(check.dtype for check in self.failures))


@dataclass
class _Verification:
    """What one verification reads, and the checks that it has made so far."""

    repo: Path
    manifest: Manifest
    layout: Layout
    components: Sequence[Component]
    golden: GoldenFolder
    tolerances: tuple[Tolerance, ...]
    progress: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, component: str, dtype: str, runtime: str, metric: str, value: float, detail: str = "") -> bool:
        """Judge a value by its limit and keep the check. Returns whether it did not fail."""
        limit = limits.limit_for(metric, dtype, self.tolerances)
        verdict: Literal["pass", "fail", "reported"] = "reported"
        if limit is not None:
            verdict = "pass" if limit.holds(value) else "fail"
            detail = "; ".join(part for part in (detail, limit.reason and f"limit: {limit.reason}") if part)
        bound = None if limit is None else limit.limit
        self.checks.append(Check(component, dtype, runtime, metric, value, bound, verdict, detail))
        return verdict != "fail"

    def fail(self, component: str, dtype: str, runtime: str, metric: str, detail: str) -> None:
        """A check that needs no number: the graph is not what it should be."""
        self.checks.append(Check(component, dtype, runtime, metric, 1.0, 0.0, "fail", detail))


def verify(
    repo: Path,
    merged: Checkpoint,
    golden: GoldenFolder,
    *,
    tolerances: tuple[Tolerance, ...] = (),
    runtimes: Sequence[Runtime] = RUNTIMES,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check the repo and return the report, passing or not.

    Raises:
        InputError: there is nothing to check, the golden was recorded from other inputs, or Node cannot be had.
    """
    manifest = load_manifest(repo)
    _check_comparable(repo, manifest, golden)
    layout = merged.family.layouts[manifest.layout]
    components = layout.components(merged.config)
    run = _Verification(repo, manifest, layout, components, golden, tolerances, progress)
    fed = _golden_feeds(golden, merged.family.feeder(merged.path, merged.config, golden.facts.image_processor))
    wanted = [runtime for runtime in runtimes if runtime != "node" or layout.client.node]
    if "node" in wanted:
        node_runtime.node_home()  # a missing Node is better told before the work than after it
    if "ort" in wanted:
        _check_own_files(run, fed)
    for name in manifest.dtypes:
        if "ort" in wanted and not _verify_in_ort(run, name, fed):
            continue
        if "node" in wanted:
            _verify_in_node(run, name, fed)
    passed = bool(run.checks) and not any(check.verdict == "fail" for check in run.checks)
    return Report(
        recipe=manifest.recipe,
        layout=manifest.layout,
        verdict="pass" if passed else "fail",
        runtimes=list(wanted),
        checks=run.checks,
        graphs_sha256={graph.file: sha256(repo / ONNX / graph.file) for graph in manifest.graphs},
        files_sha256={},
        golden_inputs_sha256=golden.facts.inputs_sha256,
        versions={"onnxruntime": version("onnxruntime"), "python": platform.python_version(), **run.versions},
    )


def with_files(report: Report, repo: Path) -> dict[str, Any]:
    """The report as JSON, with the sha256 of every file of the repo as it is now."""
    return asdict(report) | {"files_sha256": file_hashes(repo)}


def _check_comparable(repo: Path, manifest: Manifest, golden: GoldenFolder) -> None:
    if not manifest.graphs:
        raise InputError(f"{repo / 'export.json'}: lists no graphs: run `vlm-export onnx`")
    if golden.facts.inputs_sha256 != manifest.inputs_sha256:
        changed = sorted(
            name
            for name in golden.facts.inputs_sha256.keys() | manifest.inputs_sha256.keys()
            if golden.facts.inputs_sha256.get(name) != manifest.inputs_sha256.get(name)
        )
        raise InputError(
            f"{golden.path}: recorded from other inputs than were exported ({', '.join(changed)} differ): "
            f"run `vlm-export merge` and `vlm-export onnx`, or record anew with `vlm-export golden {manifest.recipe}`"
        )


def _golden_feeds(golden: GoldenFolder, feeder: Feeder) -> list[Arrays]:
    """What the golden images are fed as, made anew: it must be the very pixels that the golden was recorded on."""
    feeds = [feeder.feed(path, golden.facts.text) for path in golden.image_paths()]
    for image, fed in zip(golden.facts.images, feeds, strict=True):
        if array_sha256(fed["pixel_values"]) != image.pixel_values_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: preprocessing gives other pixels than when the golden was "
                f"recorded (with Pillow {golden.facts.versions.get('pillow')}): install that version, or record anew "
                f"with `vlm-export golden {golden.facts.recipe}`"
            )
        if array_sha256(fed["input_ids"]) != image.prompt_ids_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: the prompt has other ids than when the golden was recorded "
                f"(with transformers {golden.facts.versions.get('transformers')}): install that version, or record "
                f"anew with `vlm-export golden {golden.facts.recipe}`"
            )
    return feeds


def _check_own_files(run: _Verification, feeds: Sequence[Arrays]) -> None:
    """Prompt ids, pixels and ends that this package's runtime makes of the repo's files."""
    repo = open_repo(run.repo)
    own, facts, paths = OwnFiles(repo), run.golden.facts, run.golden.image_paths()
    _check_ends(run, FP32.name, "ort", repo.generation.get("eos_token_id"))
    if _has_prompt(repo):
        pairs = zip(paths, feeds, strict=True)
        _check_prompts(run, FP32.name, "ort", [own.prompt_ids(facts, fed, path) for path, fed in pairs], feeds)
    _check_pixels(run, FP32.name, "ort", limits.PIXELS, [own.pixels(path) for path in paths], feeds)


def _has_prompt(repo: Repo) -> bool:
    """Whether the model reads a conversation, image tokens included, and not a text behind an image."""
    return repo.layout == "chat" and not repo.has_prefix


def _check_ends(run: _Verification, dtype: str, runtime: str, found: int | Sequence[int] | None) -> None:
    ids = [found] if isinstance(found, int) else list(found or ())
    expected = run.golden.facts.eos_token_ids
    detail = "" if set(ids) == set(expected) else f"stops at {ids}, PyTorch at {expected}"
    run.add("files", dtype, runtime, limits.ENDS, float(bool(detail)), detail)


def _check_prompts(
    run: _Verification, dtype: str, runtime: str, found: Sequence[Sequence[int]], feeds: Sequence[Arrays]
) -> None:
    pairs = zip(run.golden.facts.images, found, feeds, strict=True)
    differences = {
        image.file: difference
        for image, ids, fed in pairs
        if (difference := ids_difference(ids, fed["input_ids"][0].tolist()))
    }
    detail = "; ".join(f"{file} {difference}" for file, difference in list(differences.items())[:2])
    run.add("files", dtype, runtime, limits.PROMPT_IDS, float(len(differences)), detail)


def _check_pixels(
    run: _Verification,
    dtype: str,
    runtime: str,
    metric: str,
    found: Sequence[np.ndarray | None],
    feeds: Sequence[Arrays],
) -> None:
    """The picture that is farthest off; those that a client cannot read, or reads otherwise by its kind, are named."""
    pairs = [(pixels, fed["pixel_values"]) for pixels, fed in zip(found, feeds, strict=True)]
    if metric == limits.PIXELS_FROM_FILE:
        values = [pixel_difference(coarse(pixels), coarse(expected)) for pixels, expected in pairs]
    else:
        values = [pixel_difference(pixels, expected) for pixels, expected in pairs]
    odd = {path.name: kind for path in run.golden.image_paths() if (kind := peculiarity(path))}
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


def _verify_in_ort(run: _Verification, dtype: str, feeds: Sequence[Arrays]) -> bool:
    """Returns whether the graphs run; then captions are compared, whatever else was found."""
    sessions = Sessions(run.repo / ONNX, DTYPES[dtype].suffix)
    run.progress(f"{dtype}: graphs")
    if not _check_signatures(run, dtype, sessions):
        return False
    files = {name: read_json(run.repo / name) for name in ("config.json", "generation_config.json")}
    driver = driver_for(sessions, files)
    try:
        for case in run.golden.facts.cases:
            _check_case(run, dtype, driver, case)
        run.progress(f"{dtype}: tokens in ONNX Runtime")
        _check_tokens(run, dtype, driver, feeds)
    except GRAPH_ERRORS as error:
        run.fail("all", dtype, "ort", RUNS, f"ONNX Runtime: {' '.join(str(error).split())}")
        return False
    return True


def _check_signatures(run: _Verification, dtype: str, sessions: Sessions) -> bool:
    """Every graph loads, has the inputs and outputs that the family declares, and no product that may saturate."""
    good = True
    for component in run.components:
        try:
            sessions.session(component.name)
        except GRAPH_ERRORS as error:
            run.fail(component.name, dtype, "ort", LOADS, f"ONNX Runtime: {' '.join(str(error).split())}")
            good = False
            continue
        graph = ir.load(sessions.path(component.name)).graph
        found = signature.differences(component, graph)
        if found:
            run.fail(component.name, dtype, "ort", SIGNATURE, "; ".join(found))
            good = False
        else:
            run.checks.append(Check(component.name, dtype, "ort", SIGNATURE, 0.0, 0.0, "pass"))
        _check_saturation(run, component.name, dtype, graph)
    return good


def _check_saturation(run: _Verification, component: str, dtype: str, graph: ir.Graph) -> None:
    """Computed from the weights, because many processors would show nothing."""
    largest = max((product.largest_pair for product in saturation.integer_products(graph)), default=0.0)
    worst = saturation.worst(graph)
    verdict: Literal["pass", "fail"] = "fail" if worst else "pass"
    detail = str(worst or "")
    run.checks.append(Check(component, dtype, "ort", SATURATION, largest, saturation.LIMIT, verdict, detail))


def _check_case(run: _Verification, dtype: str, driver: Driver, case: GoldenCase) -> None:
    """Encoder outputs, prefill, and the decode steps of one case, each against its golden quantity."""
    quantities = {
        name.removeprefix(f"{case.name}/"): value
        for name, value in run.golden.tensors.items()
        if name.startswith(f"{case.name}/")
    }
    where = f"{case.name}, batch {case.batch}"
    for seen in driver.encode(quantities):
        _compare(run, dtype, seen.component, seen.output, seen.value, quantities[seen.quantity], where, quantities)
    done = driver.prefill(quantities)
    to_come = len(case.step_token_ids)
    _compare_run(run, dtype, done, quantities["prefill.logits"], quantities, to_come, f"{where}, prefill")
    after_prefill = done.cache
    for step, tokens in enumerate(case.step_token_ids):
        ids = np.array(tokens, dtype=np.int64).reshape(case.batch, 1)
        done = driver.step(ids, done.cache, quantities)
        logits = quantities[f"step{step}.logits"]
        _compare_run(run, dtype, done, logits, quantities, to_come - step - 1, f"{where}, decode step {step + 1}")
    if case.batch == 1:  # GroupQueryAttention takes several tokens after a past at this batch only (ORT 1.31)
        together = np.array(case.step_token_ids, dtype=np.int64).T
        done = driver.step(together, after_prefill, quantities)
        _compare_run(run, dtype, done, logits, quantities, 0, f"{where}, {together.shape[1]} tokens in one step")


def _compare_run(
    run: _Verification,
    dtype: str,
    done: DecoderRun,
    logits: np.ndarray,
    quantities: Mapping[str, np.ndarray],
    to_come: int,
    where: str,
) -> None:
    """Logits and cache of one run; the golden cache holds the tokens of `to_come` more, but for cross-attention's."""
    _compare(run, dtype, done.component, "logits", done.logits, logits, where, quantities)
    for name, held in done.cache.items():
        value = held.numpy()
        whole = quantities[name.replace("past_key_values", "cache")]
        reference = whole if ".encoder." in name else whole[:, :, : whole.shape[2] - to_come]
        output = name.replace("past_key_values", "present")
        _compare(run, dtype, done.component, output, value, reference, where, quantities)


def _compare(
    run: _Verification,
    dtype: str,
    component: str,
    output: str,
    value: np.ndarray,
    reference: np.ndarray,
    where: str,
    quantities: Mapping[str, np.ndarray],
) -> None:
    """One output. In float32 the error decides; in fewer bits the direction of each row does."""
    if not value.size:
        run.fail(component, dtype, "ort", SHAPE, f"{output} ({where}) is empty: {list(value.shape)}")
        return
    if value.shape != reference.shape:
        detail = f"{output} ({where}) has shape {list(value.shape)}, not {list(reference.shape)}"
        if output == "logits" and value.ndim == 3 and value.shape[1] > 1:
            detail += signature.VISION_LOGITS.format(count=value.shape[1])
        run.fail(component, dtype, "ort", SHAPE, detail)
        return
    error = max_relative_error(value, reference)
    if dtype == FP32.name:
        good = run.add(component, dtype, "ort", limits.MAX_RELATIVE_ERROR, error, f"{output} ({where})")
    else:
        run.add(component, dtype, "ort", limits.MAX_RELATIVE_ERROR, error, f"{output} ({where})")
        cosine = cosine_similarity(value, reference)
        good = run.add(component, dtype, "ort", limits.COSINE_SIMILARITY, cosine, f"{output} ({where})")
    if not good:
        _explain(run, value, quantities)


def _explain(run: _Verification, value: np.ndarray, quantities: Mapping[str, np.ndarray]) -> None:
    """Say which other golden quantity a wrong output equals: two outputs that were swapped."""
    last = run.checks[-1]
    for name, other in quantities.items():
        if name.startswith("cache.") and value.ndim == 4:
            other = other[:, :, : value.shape[2]]
        if other.shape == value.shape and max_relative_error(value, other) < 1e-3:
            run.checks[-1] = Check(
                **(asdict(last) | {"detail": f"{last.detail}: it holds {name}: outputs are swapped"})
            )
            return


def _check_tokens(run: _Verification, dtype: str, driver: Driver, feeds: Sequence[Arrays]) -> None:
    """Greedy tokens of every image, and top-1 agreement when the golden tokens are forced."""
    facts = run.golden.facts
    ids = {"eos_token_id": facts.eos_token_ids, "pad_token_id": facts.eos_token_ids[0]}
    generated, agreed = [], []
    for image, fed in zip(facts.images, feeds, strict=True):
        inputs = with_encoded(driver, fed)
        decided = plan(Options(), {**facts.generation, **ids}, inputs["input_ids"].shape[1])
        try:
            [own] = generate(Decoder(driver, inputs), decided)
            follows = own.token_ids == image.token_ids
            forced = own.token_ids if follows else _forced(Decoder(driver, inputs), decided, image.token_ids)
        except FloatingPointError as error:
            run.add("all", dtype, "ort", limits.TOKENS_EXACT, math.nan, f"{image.file}: {error}")
            return
        generated.append(own.token_ids)
        agreed.append(agreement(forced, image.token_ids))
    _add_tokens(run, dtype, "ort", limits.TOKENS_EXACT, generated)
    run.add("all", dtype, "ort", limits.TOP1_AGREEMENT, float(np.mean(agreed)), f"{len(agreed)} images")


def _forced(decoder: Decoder, plan: Plan, golden: Sequence[int]) -> list[int]:
    """The graphs' choice at each place when the golden tokens came before it."""
    chosen: list[int] = []
    for count, token in enumerate(golden):
        chosen.append(int(logits.process(decoder.scores, decoder.history, count, plan).argmax()))
        if count + 1 < len(golden):
            decoder.step([token])
    return chosen


def _add_tokens(run: _Verification, dtype: str, runtime: str, metric: str, generated: Sequence[Sequence[int]]) -> None:
    """The rate of images whose tokens are the golden ones, near-ties counted as equal in float32 and named."""
    images = run.golden.facts.images
    equal, near, different = 0, [], []
    tie = limits.NEAR_TIE * run.golden.largest_logit()
    for image, tokens in zip(images, generated, strict=True):
        place = first_difference(tokens, image.token_ids)
        if place is None:
            equal += 1
        elif dtype == FP32.name and place < len(image.margins) and image.margins[place] < tie:
            near.append(image.file)
        else:
            kind = peculiarity(run.golden.path / "images" / image.file) if metric == limits.FROM_FILE_EXACT else ""
            different.append(f"{image.file} from token {place + 1}" + (f" ({kind})" if kind else ""))
    detail = f"{equal} of {len(images)} images"
    if near:
        detail += f"; near-ties: {', '.join(near)}"
    if different:
        detail += f"; differ: {', '.join(different[:5])}"
    run.add("all", dtype, runtime, metric, (equal + len(near)) / len(images), detail)
    if near and run.checks[-1].verdict == "pass":
        run.checks[-1] = Check(**(asdict(run.checks[-1]) | {"verdict": "near-tie"}))


def _readable(path: Path, scratch: Path) -> Path:
    """A picture of the same size that any client can read: beside pixels nothing else of it counts."""
    if not peculiarity(path):
        return path
    copy = scratch / f"{path.name}.png"
    open_image(path).save(copy)
    return copy


def _verify_in_node(run: _Verification, dtype: str, feeds: Sequence[Arrays]) -> None:
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
            pairs = zip(readable, feeds, strict=True)
            same = [node_runtime.Item(path, fed["pixel_values"], prompt) for path, fed in pairs]
            items = [*same, *from_files]
            result = node_runtime.caption(run.repo, layout=client.node, dtype=dtype, items=items, generation={})
    except CheckFailed as error:
        run.fail("all", dtype, "node", RUNS, str(error))
        return
    run.versions |= {f"node: {name}": number for name, number in result.versions.items()}
    tokens = [list(caption.token_ids) for caption in result.captions]
    from_file = result.captions[len(same) :]
    _check_ends(run, dtype, "node", result.eos_token_ids)
    if _has_prompt(open_repo(run.repo)):
        _check_prompts(run, dtype, "node", [caption.prompt_ids for caption in result.captions[: len(same)]], feeds)
    pixels = [caption.pixel_values for caption in from_file]
    _check_pixels(run, dtype, "node", limits.PIXELS_FROM_FILE, pixels, feeds)
    _add_tokens(run, dtype, "node", limits.TOKENS_EXACT, tokens[: len(same)])
    _add_tokens(run, dtype, "node", limits.FROM_FILE_EXACT, tokens[len(same) :])
    failures = {image.file: caption.failure for image, caption in zip(facts.images, from_file, strict=True)}
    for file, failure in failures.items():
        if failure and not peculiarity(run.golden.path / "images" / file):
            run.fail("all", dtype, "node", RUNS, f"{file}: {failure}")
