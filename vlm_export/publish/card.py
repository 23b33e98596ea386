"""The model card: what the model says, in pictures; how to run it; which dtype to take; what was verified, and how.

It is a draft until it is pushed: the id of the repo in it is the recipe's, or one that nobody has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_export.atomic import write_text
from vlm_export.contract import SINGLE_GRAPH, SINGLE_OPTIONS
from vlm_export.dtypes import DTYPES, FP32, PREFERRED
from vlm_export.files import read_json
from vlm_export.graph.pieces import pieces_of
from vlm_export.manifest import ONNX, Manifest
from vlm_export.measure import bench_table
from vlm_export.measure.bench_table import megabytes, significant
from vlm_export.publish import decision_table, examples, quality_plot
from vlm_export.publish.addresses import CARD, HUB, address, draft_id, signature
from vlm_export.publish.config_files import taken
from vlm_export.publish.examples import Example
from vlm_export.publish.front_matter import front_matter, relation
from vlm_export.publish.snippets import Subject, snippets
from vlm_export.recipe import Recipe, RecipeFile
from vlm_export.spec.client import Client
from vlm_export.targets import TARGETS
from vlm_export.verify.golden import GoldenFolder
from vlm_export.verify.report import DtypeRow

NOT_CALIBRATED = "weights of few bits are rounded to the nearest, not calibrated on images, for want of memory"
PROJECT = "vlm-export"
_DEVICES = {"cpu": "Node", "wasm": "browsers", "webgpu": "browsers on WebGPU"}
_RUNTIMES = {
    "ort": "ONNX Runtime",
    "node": "transformers.js in Node",
    "wasm": "transformers.js in Chromium on WASM",
    "webgpu": "transformers.js in Chromium on WebGPU",
}
_RELATIONS = {
    "quantized": "A conversion of",
    "finetune": "Fine-tuned from",
    "merge": "Merged from",
    "adapter": "An adapter of",
}


@dataclass(frozen=True)
class Found:
    """What is known of a repo's graphs: a `Report` and a `Benchmark`, as JSON has them; the golden of the report."""

    report: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None
    golden: GoldenFolder | None = None


def write_card(folder: Path, recipe: RecipeFile, client: Client, manifest: Manifest, found: Found = Found()) -> None:
    """Write the card of the repo in `folder`, and the pictures that it shows.

    Raises:
        InputError: a golden image or a config file of the repo cannot be read.
    """
    rows = decision_table.rows(manifest, found.report, found.benchmark)
    shown = _examples(folder, recipe.recipe, found)
    repo_id = draft_id(recipe)
    front = yaml.safe_dump(
        front_matter(recipe.recipe, client, repo_id, rows, shown), sort_keys=False, allow_unicode=True, width=1000
    )
    sections = [
        f"---\n{front}---\n\n# {recipe.name}\n\n{recipe.recipe.description.strip()}",
        _says(shown, manifest),
        _use(folder, client, repo_id, shown),
        _dtypes(folder, manifest, rows),
        _verified(found.report, found.golden),
        f"## Measured\n\n{bench_table.markdown(found.benchmark)}" if found.benchmark else "",
        _limits(folder, recipe.recipe, manifest),
        _made(recipe.recipe, manifest, repo_id),
        signature(repo_id),
    ]
    write_text(folder / CARD, "\n\n".join(section.strip() for section in sections if section) + "\n")


def _examples(folder: Path, recipe: Recipe, found: Found) -> list[Example]:
    """The pictures of a repo that was verified, unless the recipe keeps them back."""
    if found.golden is None or found.report is None or not recipe.hub.pictures:
        examples.remove_examples(folder)
        return []
    return examples.write_examples(folder, found.golden, found.report["captions"])


def _says(shown: Sequence[Example], manifest: Manifest) -> str:
    return f"## What it says\n\n{examples.markdown(shown, manifest.verified)}" if shown else ""


def _use(folder: Path, client: Client, repo_id: str, shown: Sequence[Example]) -> str:
    subject = Subject(
        repo_id=repo_id,
        example=shown[0].file if shown else "",
        client=client,
        settings=read_json(folder / "preprocessor_config.json"),
        generation=read_json(folder / "generation_config.json"),
        has_texts=pieces_of(folder / "tokenizer.json", 1) is not None
        and not any((folder / ONNX).glob(f"{SINGLE_GRAPH}.onnx_data*")),
    )
    return "\n\n".join(["## Use", *(snippet.markdown() for snippet in snippets(subject))])


def _dtypes(folder: Path, manifest: Manifest, rows: Sequence[DtypeRow]) -> str:
    """A line in words for each dtype, and all figures behind a fold."""
    chosen = _chosen(manifest)
    lines = [f"- {_in_words(row, chosen.get(row.dtype, []))}" for row in rows]
    table = f"{decision_table.markdown(rows)}\n- {_suffixes(manifest)}{_plot(folder, rows)}"
    return "\n".join(["## Which dtype", "", *lines, "", _fold("All figures", table)])


def _in_words(row: DtypeRow, devices: Sequence[str]) -> str:
    """`**q4** · 78 MB · 97 of 100 captions equal · 41 tok/s`, and where it is loaded if nobody says another."""
    measured = row.speed.get("ort") or next(iter(row.speed.values()), None)
    said = [
        f"**{row.dtype}**",
        megabytes(row.total_bytes),
        f"{row.captions_exact} captions equal" if row.captions_exact else "",
        f"{significant(measured.tokens_per_second)} tok/s" if measured else "",
        "**wrong: do not use it**" if row.verdict == "fail" else "",
        f"loaded by {_enumerated(devices)}" if devices else "",
    ]
    return " · ".join(part for part in said if part)


def _chosen(manifest: Manifest) -> dict[str, list[str]]:
    """By dtype, the devices on which transformers.js takes it where it is not told another."""
    chosen: dict[str, list[str]] = {}
    for device in PREFERRED:
        dtype = taken(device, manifest)
        if isinstance(dtype, str):
            chosen.setdefault(dtype, []).append(_DEVICES[device])
    return chosen


def _suffixes(manifest: Manifest) -> str:
    suffixes = [f"`{DTYPES[dtype].suffix}` {dtype}" for dtype in manifest.dtypes if DTYPES[dtype].suffix]
    return f"files in `onnx/`: no suffix is {FP32.name}" + "".join(f", {suffix}" for suffix in suffixes)


def _plot(folder: Path, rows: Sequence[DtypeRow]) -> str:
    """Write the picture of what each dtype costs; returns the card's link to it, or nothing where there is none."""
    picture = quality_plot.svg(rows)
    (folder / quality_plot.FILE).unlink(missing_ok=True)
    if picture is None:
        return ""
    write_text(folder / quality_plot.FILE, picture)
    return f"\n\n![Size and KL of each dtype]({quality_plot.FILE})"


def _verified(report: Mapping[str, Any] | None, golden: GoldenFolder | None) -> str:
    if report is None:
        return "## Verified\n\nNot verified yet."
    checks = report["checks"]
    names = [_RUNTIMES[name] for name in TARGETS if any(check["runtime"] == name for check in checks)]
    lines = [
        f"**{report['verdict']}**: {len(checks):,} checks of graphs and captions, in {_enumerated(names)}, against the "
        "PyTorch model with its adapter attached, before anything was merged"
        + (f", on {len(golden.facts.images)} pictures." if golden else ".")
    ]
    if failed := sorted({check["dtype"] for check in checks if check["verdict"] == "fail"}):
        lines.append(f"Not as PyTorch: {', '.join(failed)}.")
    if ties := sum(check["verdict"] == "near-tie" for check in checks):
        lines.append(f"In {ties} of them two words were equally likely, and the other one was said.")
    if left := sorted({(check["dtype"], check["runtime"]) for check in checks if check["verdict"] == "left-out"}):
        lines.append("Not looked at: " + ", ".join(f"{dtype} in {_RUNTIMES[name]}" for dtype, name in left) + ".")
    return "## Verified\n\n" + "\n\n".join(lines)


_OF_CLIENT = (
    "transformers.js takes the likeliest token each time and has no beams; the Python package has.",
    "Give transformers.js one picture at a time: of several, of different sizes, it mixes up the pixels without a "
    "word.",
)
_OF_SINGLE = (
    "`options` are a list of numbers, which may be empty: "
    f"{', '.join(SINGLE_OPTIONS)}, in this order; what is left out is as it was exported.",
    "transformers.js does not load it: the whole text is one run of ONNX Runtime.",
)


def _limits(folder: Path, recipe: Recipe, manifest: Manifest) -> str:
    generation = read_json(folder / "generation_config.json")
    lines = [
        f"Language: {', '.join(recipe.hub.language)}." if recipe.hub.language else "",
        f"It says at most {generation['max_new_tokens']} tokens." if "max_new_tokens" in generation else "",
        *(
            (_choice(generation), *_OF_SINGLE)
            if manifest.layout == "single"
            else _OF_CLIENT[: 2 if manifest.in_graph else 1]
        ),
        _picture_size(folder, manifest),
        *_in_float32(manifest),
        *_not_calibrated(manifest),
        "Verified is that it says what its PyTorch model says, not that this is true: it is wrong where that is, and "
        "has its biases and those of its base.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _choice(generation: Mapping[str, Any]) -> str:
    beams = generation.get("num_beams") or 1
    return f"It searches with {beams} beams." if beams > 1 else "It takes the likeliest token each time."


def _picture_size(folder: Path, manifest: Manifest) -> str:
    settings = manifest.in_graph or read_json(folder / "preprocessor_config.json")
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        return ""
    return f"It sees a picture in {size['width']} × {size['height']} pixels: what is smaller than one is lost."


def _in_float32(manifest: Manifest) -> list[str]:
    """A sentence for each component whose variants in float16 keep what that cannot hold in float32."""
    halves = [graph for graph in manifest.graphs if DTYPES[graph.dtype].arithmetic == "float16"]
    found = []
    for name, of in manifest.ranges.items():
        dtypes = [graph.dtype for graph in halves if graph.component in (name, SINGLE_GRAPH)]
        found += [f"Of `{name}` in {', '.join(dtypes)}, {of.remedy}."] if of.in_float32 else []
    return found


def _not_calibrated(manifest: Manifest) -> list[str]:
    rounded = dict.fromkeys(graph.dtype for graph in manifest.graphs if graph.rounded)
    return [f"{', '.join(rounded)}: {NOT_CALIBRATED}."] if rounded else []


def _made(recipe: Recipe, manifest: Manifest, repo_id: str) -> str:
    """Base, licence, adapters, and how to make and verify it again."""
    hub = recipe.hub
    bases = [f"[{base}]({HUB}/{base})" for base in hub.base_model]
    commits = [f"- `{key}` is `{commit}` of the Hub" for key, commit in manifest.commits.items()]
    hashes = [f"- `{name}` sha256 `{digest}`" for name, digest in manifest.inputs_sha256.items()]
    inputs = "\n".join([*commits, *hashes])
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    adapters = f", with {len(recipe.adapters)} adapter{'s' * (len(recipe.adapters) > 1)} merged into its weights"
    name = hub.license_name or hub.license
    lines = [
        f"{_RELATIONS[relation(recipe)]} {_enumerated(bases)}." if bases else "",
        f"Licence: {f'[{name}]({hub.license_link})' if hub.license_link else name}." if name else "",
        f"Trained on {_enumerated([f'[{data}]({HUB}/datasets/{data})' for data in hub.datasets])}."
        if hub.datasets
        else "",
        f"Exported from PyTorch by {PROJECT} {manifest.versions.get('vlm-export', '')}"
        f"{adapters if recipe.adapters else ''}. "
        f"[recipe.yaml]({address(repo_id, 'recipe.yaml')}) says how, and [export.json]"
        f"({address(repo_id, 'export.json')}) of what.",
    ]
    again = (
        "To look for what is wrong with the files, and to verify them again from the checkpoint:\n\n"
        f"```sh\nvlm-export doctor {repo_id}\n"
        + "".join(f"vlm-export {command} recipe.yaml\n" for command in ("golden", "merge", "onnx", "verify"))
        + "```"
    )
    made_from = _fold("Made from", f"{inputs}\n\nwith {versions}.")
    return "\n\n".join(["## How it was made", " ".join(line for line in lines if line), again, made_from])


def _fold(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _enumerated(names: Sequence[str]) -> str:
    *most, last = names or ["no runtime"]
    return f"{', '.join(most)} and {last}" if most else last
