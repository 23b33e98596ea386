"""Compare an exported repo with the golden PyTorch outputs, and decide.

For every dtype: the graphs' inputs and outputs against the family's declaration; every output and every `present.*` in
prefill and decode, for each golden case; then the generated tokens of every golden image, through ONNX Runtime here and
through stock transformers.js, in Node or in a browser. A report holds every check with its value and limit; no checks
is not a pass.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from vlm_export.contract import IMAGE
from vlm_export.dtypes import FP32
from vlm_export.errors import InputError
from vlm_export.graph import loop, pieces
from vlm_export.manifest import ONNX, Manifest, load_manifest
from vlm_export.models import pixels
from vlm_export.recipe import Tolerance
from vlm_export.runtime.sessions import Arrays
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.spec.family import Layout, Preprocessor
from vlm_export.spec.graph import Component
from vlm_export.targets import TARGETS, UNASKED, Target
from vlm_export.typed import command
from vlm_export.verify.from_files import Photograph, photographs
from vlm_export.verify.golden import GoldenFolder, array_sha256
from vlm_export.verify.in_client import cannot_run, verify_in_client
from vlm_export.verify.in_files import check_own_files
from vlm_export.verify.in_ort import verify_in_ort, verify_other_sizes
from vlm_export.verify.pixels_in_graph import PixelsInGraph
from vlm_export.verify.report import Fault, Report
from vlm_export.verify.reuse import Reuse
from vlm_export.verify.verification import Verification
from vlm_export.web.runtimes import Runtime, open_runtime


def verify(
    repo: Path,
    merged: Checkpoint,
    golden: GoldenFolder,
    *,
    tolerances: tuple[Tolerance, ...] = (),
    runtimes: Sequence[Target] | None = None,
    dtypes: Sequence[str] = (),
    bisecting: bool = False,
    earlier: Report | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Check the repo and return the report, passing or not.

    Without `runtimes` they are those of `targets.UNASKED` that load the layout; without `dtypes`, all that there are.
    With `bisecting`, the first stage and tensor are looked for that make a graph wrong. What passed in an `earlier`
    report is taken over where nothing that it depends on has changed.

    Raises:
        InputError: there is nothing to check, the golden was recorded from other inputs, or what was asked for by name
            cannot be had: a runtime's programs, a dtype that was not exported or that a runtime cannot run here.
    """
    manifest = load_manifest(repo)
    _check_comparable(repo, manifest, golden)
    layout = merged.family.layouts[manifest.layout]
    components = pixels.published(layout.components(merged.config), manifest.in_graph)
    if layout.joins:
        has_texts = pieces.pieces_of(repo / "tokenizer.json", 1) is not None
        components = (loop.declared(components, takes_picture=bool(manifest.in_graph), has_texts=has_texts),)
    run = Verification(repo, manifest, layout, components, golden, tolerances, progress)
    run.pixels = _pixels(repo, manifest, components)
    names, wanted = _dtypes(repo, manifest, dtypes), _runtimes(repo, layout, runtimes)
    clients = [open_runtime(target) for target in wanted if target != "ort"]  # what is missing is told before the work
    _check_can_run(run, clients, dtypes)
    preprocessor = merged.family.preprocessor(merged.path, merged.config, golden.facts.image_processor)
    model_inputs = _golden_inputs(golden, preprocessor)
    golden.check_fed(model_inputs[0])
    pictures = photographs(preprocessor, golden.facts.text) if clients else []
    run.planned = len(names) * sum(_captions(run, target) for target in wanted) + len(pictures) * len(clients)
    reuse = Reuse.of(run, earlier)
    running = names
    if "ort" in wanted:
        check_own_files(run, names[0], model_inputs)
        running = _in_ort(run, reuse, names, merged, model_inputs)
    for client in clients:
        _in_client(run, reuse, running, client, model_inputs, pictures)
    files = [graph.file for graph in manifest.graphs]
    verdicts = {check.verdict for check in run.checks} - {"left-out"}
    passed = bool(verdicts) and "fail" not in verdicts
    return Report(
        recipe=manifest.recipe,
        layout=manifest.layout,
        verdict="pass" if passed else "fail",
        runtimes=list(wanted),
        checks=run.checks,
        graphs_sha256={file: reuse.digests[file] for file in files if file in reuse.digests},
        files_sha256={},
        golden_inputs_sha256=golden.facts.inputs_sha256,
        versions={"onnxruntime": version("onnxruntime"), "python": platform.python_version(), **run.versions},
        faults=_bisected(run, merged) if bisecting and not passed else [],
        captions=run.captions,
        from_files=run.from_files,
        fingerprints=run.fingerprints,
        reused=run.reused,
        commits=manifest.commits,
    )


def _captions(run: Verification, target: Target) -> int:
    """How many captions of golden images a dtype takes in a runtime: a client reads the files too."""
    return len(run.golden.facts.images) * (1 if target == "ort" else 2)


def _in_ort(
    run: Verification, reuse: Reuse, names: Sequence[str], merged: Checkpoint, model_inputs: Sequence[Arrays]
) -> list[str]:
    """Verify dtypes in ONNX Runtime; returns those whose graphs run."""
    left = reuse.take(names, "ort", {})
    run.made += (len(names) - len(left)) * _captions(run, "ort")
    broken = set()
    for name in left:
        if not verify_in_ort(run, name, model_inputs):
            broken.add(name)
        elif name == FP32.name and not run.layout.joins:
            verify_other_sizes(run, merged)
        reuse.done(name, "ort", {})
    return [name for name in names if name not in broken]


def _in_client(
    run: Verification,
    reuse: Reuse,
    names: Sequence[str],
    client: Runtime,
    model_inputs: Sequence[Arrays],
    shown: Sequence[Photograph],
) -> None:
    """Verify dtypes in a client, the first of them with photographs."""
    left = reuse.take(names, client.target, client.versions)
    run.made += (len(names) - len(left)) * _captions(run, client.target)
    for name in left:
        verify_in_client(run, client, name, model_inputs, shown if name == names[0] else ())
        reuse.done(name, client.target, client.versions)


def _bisected(run: Verification, merged: Checkpoint) -> list[Fault]:
    if run.layout.joins:
        raise InputError(
            f"{run.repo}: nothing inside one file can be bisected: export layout {run.layout.joins}, and verify that"
        )
    from vlm_export.verify.bisect import bisect  # it traces, which nothing else here does

    return bisect(run, merged)


def _pixels(repo: Path, manifest: Manifest, components: Sequence[Component]) -> PixelsInGraph | None:
    """The part of the float32 vision graph that prepares pictures, if it does."""
    if not manifest.in_graph:
        return None
    tower = next(each for each in components if {spec.name for spec in each.inputs} & {pixels.PIXELS, IMAGE})
    return PixelsInGraph(repo / ONNX / f"{tower.name}.onnx", manifest.in_graph)


def _dtypes(repo: Path, manifest: Manifest, asked: Sequence[str]) -> list[str]:
    """The dtypes to verify: those that were asked for, or all."""
    have = manifest.verified
    if missing := [name for name in asked if name not in have]:
        raise InputError(f"--dtype {', '.join(missing)}: {repo / ONNX} has {', '.join(have)}")
    return list(dict.fromkeys(asked)) or have


def _runtimes(repo: Path, layout: Layout, asked: Sequence[Target] | None) -> list[Target]:
    """The runtimes to verify in: those that were asked for, or those that load the layout of `UNASKED`."""
    able: Sequence[Target] = TARGETS if layout.client.node else ("ort",)
    if asked is None:
        return [target for target in UNASKED if target in able]
    if missing := [target for target in asked if target not in able]:
        raise InputError(
            f"--runtime {', '.join(missing)}: {repo}: transformers.js does not load this layout: run with --runtime ort"
        )
    return list(dict.fromkeys(asked))


def _check_can_run(run: Verification, clients: Sequence[Runtime], asked: Sequence[str]) -> None:
    """Raise an InputError for a dtype that was asked for by name and that one of the runtimes cannot run here."""
    for name in asked:
        for client in clients:
            if reason := cannot_run(run, client, name):
                raise InputError(
                    f"--dtype {name} --runtime {client.target}: {reason}: leave one of the two out, or verify it on "
                    "another machine"
                )


def _check_comparable(repo: Path, manifest: Manifest, golden: GoldenFolder) -> None:
    if not manifest.graphs:
        raise InputError(f"{repo / 'export.json'}: lists no graphs: run `{command('onnx')}`")
    if golden.facts.inputs_sha256 != manifest.inputs_sha256:
        changed = sorted(
            name
            for name in golden.facts.inputs_sha256.keys() | manifest.inputs_sha256.keys()
            if golden.facts.inputs_sha256.get(name) != manifest.inputs_sha256.get(name)
        )
        raise InputError(
            f"{golden.path}: recorded from other inputs than were exported ({', '.join(changed)} differ): "
            f"run `{command('merge')}` and `{command('onnx')}`, or record anew with `{command('golden')}`"
        )


def _golden_inputs(golden: GoldenFolder, preprocessor: Preprocessor) -> list[Arrays]:
    """What the golden images are fed as, made anew: it must be the very pixels that the golden was recorded on."""
    golden_inputs = [preprocessor.model_inputs(path, golden.facts.text) for path in golden.image_paths()]
    for image, model_inputs in zip(golden.facts.images, golden_inputs, strict=True):
        if array_sha256(model_inputs["pixel_values"]) != image.pixel_values_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: gives other pixels than with Pillow "
                f"{golden.facts.versions.get('pillow')}, which recorded it: install that, or run `{command('golden')}`"
            )
        if array_sha256(model_inputs["input_ids"]) != image.prompt_ids_sha256:
            raise InputError(
                f"{golden.path / 'images' / image.file}: the prompt has other ids than with transformers "
                f"{golden.facts.versions.get('transformers')}, which recorded it: install that, or run "
                f"`{command('golden')}`"
            )
    return golden_inputs
